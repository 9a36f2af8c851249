//! A served chain on the simulated disk, to which external snapshots come under load.
//!
//! The disk has the files of all overlays from the start. The folder is a file too, with a sector for
//! each name that says which file has it: a name is made, made durable and lost as other bytes are.
//!
//! The next start takes the newest overlay that is found by its name and is an image, else what is
//! below it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use async_lock::{RwLock, RwLockWriteGuardArc};

use super::build::{Recipe, read_snapshot, read_tree};
use super::support::{BASE, Client, IMAGE, Mix, Rig, Violation, chaos, violation};
use crate::engine::create::{Backing, create};
use crate::engine::order::keeps;
use crate::engine::overlay::{Handover, can_become_backing, go_over, overlay_options};
use crate::engine::{Error, Image, LayerFormat, LayerSpec, NewSnapshot, OpenOptions, Step};
use crate::format::Header;
use crate::storage::sim::{SimDisk, SimFileOptions, yield_now};
use crate::storage::{AlignedBuf, FileId, SgList, Storage};
use crate::units::{to_u64, to_usize};

/// Bytes of one name in the folder.
const NAME: u64 = 512;
/// More files than that are never made in vain.
const ATTEMPTS_FAILED_MAX: u16 = 2;
/// What an overlay's file begins with once it is an image.
const MAGIC: &[u8] = b"QFI\xfb";

/// A run.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub(super) name: &'static str,
    pub(super) recipe: Recipe,
    /// The first image is the recipe's raw backing file.
    pub(super) raw: bool,
    /// External snapshots taken.
    pub(super) overlays: u16,
    /// Internal ones are taken between them.
    pub(super) internal: bool,
    /// Bytes of the name that an overlay knows the image below by.
    pub(super) name_bytes: usize,
    pub(super) workers: usize,
    pub(super) requests: u32,
    pub(super) mix: Mix,
    pub(super) options: fn() -> OpenOptions,
}

/// Bytes of files, wherever they are.
pub(super) type Bytes<'a> = &'a dyn Fn(FileId) -> Vec<u8>;

/// The disk that a chain shows. Without the engine.
pub(super) fn flat(chain: &[LayerSpec], bytes: Bytes<'_>) -> Result<Option<Vec<u8>>, Violation> {
    let mut below: Option<Vec<u8>> = None;
    for spec in chain.iter().rev() {
        below = Some(match spec.format {
            LayerFormat::Raw => bytes(spec.file),
            LayerFormat::Qcow2 => {
                read_tree(&bytes(spec.file), below.as_deref(), false).map_err(Violation)?
            }
        });
    }
    Ok(below)
}

/// What is known of the files of a run.
#[derive(Clone, Default)]
pub(super) struct Ledger {
    /// What was served first.
    first: Vec<LayerSpec>,
    /// What is served now, active layer first.
    pub(super) chain: Vec<LayerSpec>,
    /// Overlays that are in use, oldest first.
    pub(super) used: Vec<FileId>,
    /// Chains that overlays were put over, oldest first, and what each shows for ever.
    pub(super) kept: Vec<(Vec<LayerSpec>, Vec<u8>)>,
    /// Internal snapshots: the chain, the id, and what it shows for ever.
    pub(super) internal: Vec<(Vec<LayerSpec>, String, Vec<u8>)>,
}

impl Ledger {
    /// What the next start serves: every overlay that is found and is an image.
    pub(super) fn chain_after_cut(
        &self,
        plan: &Plan,
        rig: &Rig,
    ) -> Result<Vec<LayerSpec>, Violation> {
        let folder = rig.disk.contents(folder_of(plan));
        let mut chain = self.first.clone();
        for number in 0..to_usize(u64::from(plan.overlays)) {
            // 0: no name.
            let named = folder.get(number * to_usize(NAME)).copied().unwrap_or(0);
            let file = FileId(u16::from(named));
            let content = rig.disk.contents(file);
            let is_image = named != 0 && content.starts_with(MAGIC);
            if let Some(used) = self.used.get(number)
                && (file != *used || !is_image)
            {
                return violation(format!(
                    "overlay {number} is in use: {used:?}, but {named} is found (an image: \
                     {is_image})"
                ));
            }
            if !is_image {
                return Ok(chain);
            }
            let header = Header::decode(&content)
                .map_err(|error| Violation(format!("overlay {number}: {error}")))?;
            let below = chain.first().map(|spec| plan.name_of(spec.file));
            if header.backing_name != below {
                return violation(format!("overlay {number} is over something else"));
            }
            chain.insert(0, qcow2(file));
        }
        Ok(chain)
    }
}

fn qcow2(file: FileId) -> LayerSpec {
    LayerSpec {
        file,
        format: LayerFormat::Qcow2,
    }
}

/// The first file after those of the recipe.
pub(super) fn folder_of(plan: &Plan) -> FileId {
    FileId(if plan.recipe.backing.is_some() { 2 } else { 1 })
}

impl Plan {
    /// What an overlay calls a file: a path as long as is wanted.
    fn name_of(&self, file: FileId) -> Vec<u8> {
        let name = format!("{}.img", file.0);
        let longer = "./".repeat(self.name_bytes.saturating_sub(name.len()) / 2);
        format!("{longer}{name}").into_bytes()
    }

    pub(super) fn rig(&self, seed: u64) -> Rig {
        let rig = Rig::new(self.recipe, seed);
        let names = vec![0; to_usize(u64::from(self.overlays) * NAME)];
        let folder = rig.disk.add_file(&names, SimFileOptions::default());
        assert_eq!(folder, folder_of(self));
        for _ in 0..self.overlays + ATTEMPTS_FAILED_MAX {
            rig.disk.add_file(&[], SimFileOptions::default());
        }
        rig
    }
}

/// A served chain, and who works on it.
pub(super) struct Stage {
    plan: Plan,
    disk: SimDisk,
    /// Files that were made.
    made: Cell<u16>,
    /// Held by whoever has a request in flight; all of it by who pauses the device.
    gate: Arc<RwLock<()>>,
    /// One for each queue.
    pub(super) seats: RefCell<Vec<Client>>,
    pub(super) ledger: RefCell<Ledger>,
}

/// Opens a chain in a rig.
pub(super) fn open(
    rig: &mut Rig,
    chain: &[LayerSpec],
    options: OpenOptions,
) -> Result<(), Violation> {
    let (storage, specs) = (rig.disk.storage(), chain.to_vec());
    let opened = rig
        .driver
        .block_on(async move { Image::open(&storage, &specs, &options).await });
    match opened {
        Some(Ok(image)) => {
            rig.image = Some(image);
            Ok(())
        }
        other => violation(format!("cannot open {chain:?}: {other:?}")),
    }
}

impl Stage {
    pub(super) fn new(plan: Plan, rig: &mut Rig) -> Result<Rc<Self>, Violation> {
        let first = if plan.raw {
            LayerSpec {
                file: BASE,
                format: LayerFormat::Raw,
            }
        } else {
            qcow2(IMAGE)
        };
        open(rig, &[first], (plan.options)())?;
        Ok(Rc::new(Self {
            plan,
            disk: rig.disk.clone(),
            made: Cell::new(0),
            gate: Arc::default(),
            seats: RefCell::new((0..plan.workers).map(|_| rig.worker()).collect()),
            ledger: RefCell::new(Ledger {
                first: vec![first],
                chain: vec![first],
                ..Ledger::default()
            }),
        }))
    }

    pub(super) fn seat(&self, number: usize) -> Client {
        self.seats.borrow()[number].clone()
    }

    /// Requests of one queue, to whatever is served.
    pub(super) async fn work(self: Rc<Self>, seat: usize, mut random: fastrand::Rng) {
        for _ in 0..self.plan.requests {
            let _running = self.gate.read_arc().await;
            chaos(self.seat(seat), random.fork(), 1, self.plan.mix).await;
        }
    }

    /// Gives a file the name of an overlay, or nobody (0).
    async fn put_name(&self, number: u64, file: FileId) -> Result<(), Error> {
        let file = u8::try_from(file.0).expect("few files");
        let bytes = vec![file; to_usize(NAME)];
        let sg = SgList::from_buf(AlignedBuf::from_slice(&bytes));
        let storage = self.disk.storage();
        storage
            .write(folder_of(&self.plan), number * NAME, sg)
            .await
            .map_err(|error| Error::io("cannot make the file", error))
    }

    /// Takes an external snapshot, as the daemon does it.
    pub(super) async fn take(self: &Rc<Self>) -> Result<(), Error> {
        let old = Arc::clone(self.seat(0).worker.image());
        can_become_backing(&old)?;
        let number = to_u64(self.ledger.borrow().used.len());
        self.made.set(self.made.get() + 1);
        let overlay = FileId(folder_of(&self.plan).0 + self.made.get());
        let (storage, below) = (self.disk.storage(), self.ledger.borrow().chain.clone());
        let made = async {
            self.put_name(number, overlay).await?;
            let backing = Backing {
                name: self.plan.name_of(below[0].file),
                format: below[0].format,
            };
            let options = overlay_options(&old, backing);
            create(&storage, overlay, &options, &mut |_, _| ()).await?;
            let mut specs = vec![qcow2(overlay)];
            specs.extend(&below);
            let change = Change {
                stage: self,
                overlay,
                below,
                chain: specs.clone(),
            };
            let worker = old.worker(storage.clone());
            let options = (self.plan.options)();
            go_over(&worker, &storage, &specs, &options, &change).await
        };
        let made = made.await;
        if let Err(error) = made {
            // What is left of it is an empty overlay, at worst.
            let _ = self.put_name(number, FileId(0)).await;
            return Err(error);
        }
        Ok(())
    }

    /// Takes an internal snapshot and settles it: nothing may be unsettled below an overlay.
    async fn take_internal(&self, name: String) -> Result<(), Error> {
        let client = self.seat(0);
        let chain = self.ledger.borrow().chain.clone();
        let called = client.model.borrow_mut().watch();
        let new = NewSnapshot {
            name,
            date_sec: 1,
            date_nsec: 2,
            vm_clock_nsec: 3,
        };
        let created = client.worker.create_snapshots(&[new]).await?;
        let returned = client.model.borrow_mut().watch();
        while client.worker.background_step().await? != Step::Idle {
            yield_now().await;
        }
        let id = created[0].snapshot.id.clone();
        let bytes = |file| self.disk.contents(file);
        let judged = internal(&chain, &id, &bytes).and_then(|content| {
            let model = client.model.borrow();
            model.judge_snapshot(&content, called, returned)?;
            Ok(content)
        });
        for watched in [called, returned] {
            client.model.borrow_mut().unwatch(watched);
        }
        match judged {
            Ok(content) => self.ledger.borrow_mut().internal.push((chain, id, content)),
            Err(violation) => client.complain(violation),
        }
        Ok(())
    }

    /// Takes all snapshots of the plan.
    pub(super) async fn commands(self: Rc<Self>, mut random: fastrand::Rng) {
        for number in 0..self.plan.overlays {
            for _ in 0..random.u8(..40) {
                yield_now().await;
            }
            let taken = async {
                if self.plan.internal && random.bool() {
                    self.take_internal(format!("s{number}")).await?;
                }
                self.take().await
            };
            if let Err(error) = taken.await {
                return self
                    .seat(0)
                    .complain(format!("snapshot: {}", error.chain()));
            }
        }
    }
}

/// What an internal snapshot of the first file of a chain shows.
pub(super) fn internal(
    chain: &[LayerSpec],
    id: &str,
    bytes: Bytes<'_>,
) -> Result<Vec<u8>, Violation> {
    let below = flat(&chain[1..], bytes)?;
    read_snapshot(&bytes(chain[0].file), below.as_deref(), id).map_err(Violation)
}

/// One change of images.
struct Change<'a> {
    stage: &'a Rc<Stage>,
    overlay: FileId,
    below: Vec<LayerSpec>,
    chain: Vec<LayerSpec>,
}

impl Handover for Change<'_> {
    type Paused = Option<RwLockWriteGuardArc<()>>;

    async fn sync_overlay(&self) -> Result<(), Error> {
        let storage = self.stage.disk.storage();
        for file in [self.overlay, folder_of(&self.stage.plan)] {
            let synced = storage.sync_data(file).await;
            synced.map_err(|error| Error::io("cannot make the overlay durable", error))?;
        }
        Ok(())
    }

    async fn pause(&self) -> Self::Paused {
        if !keeps!(PauseBeforeOverlay) {
            return None;
        }
        Some(self.stage.gate.write_arc().await)
    }

    fn hand_over(&self, _: &Self::Paused, image: &Arc<Image>) -> Result<(), Error> {
        let client = self.stage.seat(0);
        // Nothing is in flight: the image below is what was written last.
        let bytes = |file| self.stage.disk.contents(file);
        let now = client.model.borrow_mut().watch();
        let judged = flat(&self.below, &bytes).and_then(|content| {
            let content = content.unwrap_or_default();
            client.model.borrow().judge(0, &content, now)?;
            Ok(content)
        });
        client.model.borrow_mut().unwatch(now);
        match judged {
            Ok(content) => {
                let mut ledger = self.stage.ledger.borrow_mut();
                ledger.kept.push((self.below.clone(), content));
            }
            Err(violation) => client.complain(format!("the new backing file: {violation}")),
        }
        let mut ledger = self.stage.ledger.borrow_mut();
        ledger.used.push(self.overlay);
        ledger.chain.clone_from(&self.chain);
        for seat in &mut *self.stage.seats.borrow_mut() {
            seat.worker = image.worker(self.stage.disk.storage());
        }
        Ok(())
    }
}
