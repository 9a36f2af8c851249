//! External snapshots: a new overlay takes the place of the image that is served, which stays
//! behind as the overlay's backing file.
//!
//! Everything that can fail or take long is done before the device is paused: the overlay is made
//! (or looked at), opened and locked, and the image is flushed. The order of the rest, and what a
//! failure or a power cut leaves, is `engine::overlay`'s. Afterwards the old image's lock becomes one
//! of a reader. A failure removes the file that was made.
//!
//! New files: only in a folder that the administrator has allowed, and never over something that is
//! there already. The folder is opened first and judged by where it really is; the file is made in
//! that open folder, under a name that is not followed if it is a link.

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, openat, statat, unlinkat};

use super::chain::{self, Chain, Node};
use crate::config::ImageConfig;
use crate::control;
use crate::device::{Paused, Pauser};
use crate::engine::chain::{
    ChainOptions, OpenLayer, backing_name, fd_path, given_folder, open_chain, protocol,
};
use crate::engine::create::{Backing, create};
use crate::engine::overlay::{Handover, can_become_backing, go_over, overlay_options};
use crate::engine::{Error, ErrorKind, Image, LayerFormat, Worker};
use crate::storage::lock::ImageLock;
use crate::storage::{BlockingStorage, FileId, HostFile, OpenMode, block_on};

/// Flushes before the pause at most. Each is much shorter than the one before if the guest writes
/// slower than the host; if not, more of them would not help.
const FLUSHES_BEFORE_MAX: u32 = 8;
/// A flush as short as this leaves next to nothing for the one in the pause.
const SHORT_FLUSH: Duration = Duration::from_millis(3);

/// Takes an external snapshot of `old`, which the device of `pauser` serves. Returns the chain that
/// is served from now on; `old` is given back by dropping it. `watch` gets the new image before
/// anything happens to it. Blocks: not for the main thread.
///
/// # Errors
/// `Exists`, `Invalid`, `Unsupported`, `ReadOnly`, `Failed`, `Locked`, and those of the host. The
/// device goes on with `old` then.
pub(super) fn take(
    old: &Chain,
    config: &ImageConfig,
    pauser: &Pauser,
    asked: &control::Overlay,
    watch: &dyn Fn(&Image),
) -> Result<Chain, Error> {
    can_become_backing(&old.image)?;
    let name = node_name(old, asked.node_name.as_deref())?;
    let overlay = Overlay::prepare(old, config, asked)?;
    let old_worker = old.image.worker(BlockingStorage::new(old.files()));
    let storage = chain::storage(&overlay.layers);
    let specs = chain::specs(&overlay.layers);
    let options = chain::open_options(config);
    let change = Change {
        old,
        old_worker: &old_worker,
        overlay: &overlay,
        path: &asked.file,
        pauser,
        watch,
        times: Cell::default(),
    };
    let image = block_on(go_over(&old_worker, &storage, &specs, &options, &change))?;
    let times = change.times.get();
    log::info!(
        "external snapshot '{}': requests waited for {} us (drain {}, flush and open {}, hand over {})",
        asked.file.display(),
        (times.drain + times.flush + times.hand_over).as_micros(),
        times.drain.as_micros(),
        times.flush.as_micros(),
        times.hand_over.as_micros(),
    );
    let nodes = nodes(old, config, overlay, &name);
    Ok(Chain {
        image,
        nodes: nodes.into(),
    })
}

/// How long requests waited, and for what.
#[derive(Clone, Copy, Default)]
struct Times {
    drain: Duration,
    flush: Duration,
    hand_over: Duration,
}

/// The change from one image to another, on the host and on the device.
struct Change<'a> {
    old: &'a Chain,
    old_worker: &'a Rc<Worker<BlockingStorage>>,
    overlay: &'a Overlay,
    /// The overlay as it was named.
    path: &'a Path,
    pauser: &'a Pauser,
    watch: &'a dyn Fn(&Image),
    times: Cell<Times>,
}

/// A paused device, since when, and how long that took.
struct Stopped<'a> {
    paused: Paused<'a>,
    drain: Duration,
    idle: Instant,
}

impl<'a> Handover for Change<'a> {
    type Paused = Stopped<'a>;

    async fn sync_overlay(&self) -> Result<(), Error> {
        self.overlay.sync(self.path)
    }

    async fn before_pause(&self) -> Result<(), Error> {
        let mut last = Duration::MAX;
        for _ in 0..FLUSHES_BEFORE_MAX {
            let since = Instant::now();
            self.old_worker.flush().await?;
            let took = since.elapsed();
            if took <= SHORT_FLUSH || took > last / 2 {
                break;
            }
            last = took;
        }
        Ok(())
    }

    async fn pause(&self) -> Stopped<'a> {
        let since = Instant::now();
        let paused = self.pauser.pause();
        Stopped {
            paused,
            drain: since.elapsed(),
            idle: Instant::now(),
        }
    }

    fn hand_over(&self, stopped: &Stopped<'a>, image: &Arc<Image>) -> Result<(), Error> {
        let flush = stopped.idle.elapsed();
        (self.watch)(image);
        let files: Vec<_> = self.overlay.files().collect();
        stopped
            .paused
            .set_image(&self.old.image, image, &files)
            .map_err(|error| Error::new(ErrorKind::Invalid, error.to_string()))?;
        // From here on the overlay is the disk.
        if let Some(made) = &self.overlay.made {
            made.kept.set(true);
        }
        // What befalls the old one from now on does not befall the device.
        self.old.image.set_event_sink(|_| ());
        self.times.set(Times {
            drain: stopped.drain,
            flush,
            hand_over: stopped.idle.elapsed() - flush,
        });
        Ok(())
    }
}

/// The name of the new node: as asked for, or made up as QEMU does.
fn node_name(old: &Chain, asked: Option<&str>) -> Result<String, Error> {
    let is_taken = |name: &str| old.nodes.iter().any(|node| node.name == name);
    let Some(name) = asked else {
        let mut number = old.nodes.len();
        loop {
            let name = format!("#block{number:03}");
            if !is_taken(&name) {
                return Ok(name);
            }
            number += 1;
        }
    };
    let mut bytes = name.bytes();
    let well_formed = bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
        && name.len() <= NODE_NAME_MAX;
    if !well_formed {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "'{name}' is no node name: a letter, then letters, digits, '-', '.' and '_', at \
                 most {NODE_NAME_MAX} in all"
            ),
        ));
    }
    if is_taken(name) {
        return Err(Error::new(
            ErrorKind::Exists,
            format!("there is a node '{name}' already"),
        ));
    }
    Ok(name.to_owned())
}

/// As QEMU has it.
const NODE_NAME_MAX: usize = 31;

/// The overlay and all below it, open and, but for the image that is served, locked.
struct Overlay {
    layers: Vec<OpenLayer>,
    locks: Vec<Option<ImageLock>>,
    /// Removes the file on drop unless it is in use; `None` if it was there before.
    made: Option<MadeFile>,
}

impl Overlay {
    fn prepare(old: &Chain, config: &ImageConfig, asked: &control::Overlay) -> Result<Self, Error> {
        let path = &asked.file;
        if let Some(protocol) = protocol(path.as_os_str().as_bytes()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the protocol '{}:' is not supported (for a file of that name, write ./ before \
                     it)",
                    protocol.escape_ascii()
                ),
            ));
        }
        let allowed = allowed_folders(old, config)?;
        let made = if asked.existing {
            look_at(old, path, &allowed)?;
            None
        } else {
            Some(make(old, path, &allowed)?)
        };
        let overlay = Self::open(old, config, path, made)?;
        overlay.check(old, path, &allowed)?;
        overlay.try_out(old, config)?;
        Ok(overlay)
    }

    /// Opens the chain as the next start of a server would.
    fn open(
        old: &Chain,
        config: &ImageConfig,
        path: &Path,
        made: Option<MadeFile>,
    ) -> Result<Self, Error> {
        let mut backing_dirs = config.backing_dirs.clone();
        // What is served already may be served on.
        for node in &*old.nodes {
            let real = fd_path(node.layer.file.as_file(), &node.layer.path)?;
            backing_dirs.extend(real.parent().map(Path::to_owned));
        }
        let options = ChainOptions {
            read_only: false,
            direct: config.cache.is_direct(),
            backing_dirs,
        };
        let mut locks = Vec::new();
        let layers = open_chain(
            path,
            LayerFormat::Qcow2,
            &options,
            &mut |file, read_only| {
                // Our own lock of a writer is still on it.
                let is_served = read_only && same_file(file, &old.nodes[0].layer.file)?;
                locks.push(if is_served {
                    None
                } else {
                    Some(chain::lock(config, file, read_only)?)
                });
                Ok(())
            },
        )?;
        Ok(Self {
            layers,
            locks,
            made,
        })
    }

    /// Whether what was opened is what was meant: this file, over just the chain that is served.
    fn check(&self, old: &Chain, path: &Path, allowed: &[PathBuf]) -> Result<(), Error> {
        let invalid = |text: String| Err(Error::new(ErrorKind::Invalid, text));
        let Some(top) = self.layers.first() else {
            return invalid("there is no overlay".to_owned());
        };
        let replaced = || invalid(format!("'{}' was replaced meanwhile", path.display()));
        match &self.made {
            Some(made) => {
                let metadata = top.file.as_file().metadata();
                let metadata = metadata.map_err(|error| Error::io("cannot look at it", error))?;
                if (metadata.dev(), metadata.ino()) != made.identity {
                    return replaced();
                }
            }
            None => judge(&fd_path(top.file.as_file(), path)?, allowed)?,
        }
        let Some(below) = self.layers.get(1) else {
            return invalid(format!(
                "'{}' names no backing file; it must name the image that is served",
                path.display()
            ));
        };
        let mut same = self.layers.len() == old.nodes.len() + 1;
        for (layer, node) in self.layers.iter().skip(1).zip(&*old.nodes) {
            same = same
                && layer.format == node.layer.format
                && same_file(&layer.file, &node.layer.file)?;
        }
        if same {
            return Ok(());
        }
        if self.made.is_some() {
            return invalid(format!(
                "the image that is served is not found as '{}' any more",
                below.path.display()
            ));
        }
        invalid(format!(
            "the backing file of '{}' is '{}', which is not the image that is served, or not of \
             its format",
            path.display(),
            below.path.display()
        ))
    }

    /// Opens the overlay alone, so that nothing of it can fail in the pause: bad tables, another
    /// size, options that do not suit it, a repair that takes its time.
    fn try_out(&self, old: &Chain, config: &ImageConfig) -> Result<(), Error> {
        let Some(top) = self.layers.get(..1) else {
            return Ok(());
        };
        let options = chain::open_options(config);
        let image = block_on(Image::open(
            &chain::storage(top),
            &chain::specs(top),
            &options,
        ))?;
        let (size, wanted) = (image.virtual_size(), old.image.virtual_size());
        if size != wanted {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("the overlay has a virtual size of {size} bytes, the disk has {wanted}"),
            ));
        }
        Ok(())
    }

    /// Makes the file durable, the name that it was asked for by, and that which it really has.
    fn sync(&self, path: &Path) -> Result<(), Error> {
        let Some(top) = self.layers.first() else {
            return Ok(());
        };
        let file = top.file.as_file();
        let sync_all = || {
            file.sync_all()?;
            if let Some(made) = &self.made {
                return made.folder.sync_all();
            }
            // Whoever made the file need not have done that.
            let real = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
            for name in [path, &real] {
                match File::open(folder_of(name)) {
                    Ok(folder) => folder.sync_all()?,
                    // A folder may be closed to us though the file is not.
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                        rustix::fs::syncfs(file)?;
                    }
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        };
        sync_all()
            .map_err(|error| Error::io(format!("cannot make '{}' durable", path.display()), error))
    }

    fn files(&self) -> impl Iterator<Item = Arc<HostFile>> {
        self.layers.iter().map(|layer| Arc::clone(&layer.file))
    }
}

fn same_file(one: &HostFile, other: &HostFile) -> Result<bool, Error> {
    let identity = |file: &HostFile| {
        file.identity()
            .map_err(|error| Error::io(format!("cannot look at {}", file.path().display()), error))
    };
    Ok(identity(one)? == identity(other)?)
}

/// The nodes of the new chain: those of the old one with their names, below the overlay.
fn nodes(old: &Chain, config: &ImageConfig, overlay: Overlay, name: &str) -> Vec<Node> {
    let kept = |layer: &OpenLayer, error: &Error| {
        log::warn!("{}: {}", layer.path.display(), error.chain());
    };
    let old_nodes = std::iter::once(None).chain(old.nodes.iter().map(Some));
    let mut nodes = Vec::with_capacity(overlay.layers.len());
    for ((layer, lock), old_node) in overlay.layers.into_iter().zip(overlay.locks).zip(old_nodes) {
        let lock = lock.or_else(|| {
            // Ours of a writer; nobody can come between the two.
            if let Some(lock) = old_node.and_then(|node| node.lock.as_ref()) {
                lock.become_reader();
            }
            chain::lock(config, &layer.file, true)
                .inspect_err(|error| kept(&layer, error))
                .ok()
        });
        let info = chain::node_info(&layer).unwrap_or_else(|error| {
            kept(&layer, &error);
            old_node.and_then(|node| node.info.clone())
        });
        nodes.push(Node {
            name: old_node.map_or(name, |node| &node.name).to_owned(),
            layer,
            info,
            lock,
        });
    }
    nodes
}

/// The real folders that an overlay may be in.
fn allowed_folders(old: &Chain, config: &ImageConfig) -> Result<Vec<PathBuf>, Error> {
    let mut folders = vec![given_folder(&config.path)?];
    let active = &old.nodes[0].layer;
    let real = fd_path(active.file.as_file(), &active.path)?;
    folders.extend(real.parent().map(Path::to_owned));
    for folder in &config.snapshot_dirs {
        folders.push(std::fs::canonicalize(folder).map_err(|error| {
            let text = format!("cannot use --snapshot-dir {}", folder.display());
            Error::io(text, error)
        })?);
    }
    Ok(folders)
}

/// Whether a file at this real path may be an overlay.
fn judge(real: &Path, allowed: &[PathBuf]) -> Result<(), Error> {
    if allowed.iter().any(|folder| real.starts_with(folder)) {
        return Ok(());
    }
    let folder = real.parent().unwrap_or(Path::new("/"));
    Err(Error::new(
        ErrorKind::Invalid,
        format!(
            "{} is outside the image's own folder: allow it with --snapshot-dir {}",
            real.display(),
            folder.display()
        ),
    ))
}

/// Judges a file that is there already by its name alone; nothing happens to it.
fn look_at(old: &Chain, path: &Path, allowed: &[PathBuf]) -> Result<(), Error> {
    let probe = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
        .map_err(|error| Error::io(format!("cannot open '{}'", path.display()), error))?;
    judge(&fd_path(&probe, path)?, allowed)?;
    let found = probe
        .metadata()
        .map_err(|error| Error::io(format!("cannot look at '{}'", path.display()), error))?;
    for node in &*old.nodes {
        let served = node.layer.file.as_file().metadata();
        let is_served =
            served.is_ok_and(|served| (served.dev(), served.ino()) == (found.dev(), found.ino()));
        if is_served {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("'{}' is part of the chain that is served", path.display()),
            ));
        }
    }
    Ok(())
}

/// A file that was made here.
struct MadeFile {
    folder: File,
    name: OsString,
    identity: (u64, u64),
    file: File,
    path: PathBuf,
    /// It is in use: not to be removed.
    kept: Cell<bool>,
}

/// The folder that a name is in.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes an empty overlay.
fn make(old: &Chain, path: &Path, allowed: &[PathBuf]) -> Result<MadeFile, Error> {
    let active = &old.nodes[0].layer;
    let made = MadeFile::new(path, active.file.as_file(), allowed)?;
    let folder = fd_path(&made.folder, path)?;
    let options = overlay_options(
        &old.image,
        Backing {
            name: backing_name(&active.path, &folder)?,
            format: active.format,
        },
    );
    let fault = |error| Error::io(format!("cannot use '{}'", path.display()), error);
    let mode = OpenMode {
        write: true,
        direct: false,
    };
    let file = made.file.try_clone().map_err(fault)?;
    let file = HostFile::from_file(file, path, mode).map_err(fault)?;
    let storage = BlockingStorage::new(vec![Arc::new(file)]);
    block_on(create(&storage, FileId(0), &options, &mut |_, _| ()))
        .map_err(|error| error.context(format!("cannot make '{}'", path.display())))?;
    Ok(made)
}

impl MadeFile {
    /// Makes an empty file that nobody but us knows, as private as `like`.
    fn new(path: &Path, like: &File, allowed: &[PathBuf]) -> Result<Self, Error> {
        let named = path.as_os_str().as_bytes().last() != Some(&b'/');
        let Some(name) = path.file_name().filter(|_| named) else {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("'{}' does not name a file", path.display()),
            ));
        };
        let fault = |error| Error::io(format!("cannot make '{}'", path.display()), error);
        let parent = folder_of(path);
        let folder = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(parent)
            .map_err(fault)?;
        judge(&fd_path(&folder, parent)?.join(name), allowed)?;
        let mode = like.metadata().map_err(fault)?.permissions().mode() & 0o666;
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_bits_truncate(mode | 0o600);
        let file = openat(&folder, name, flags, mode).map_err(|errno| {
            if errno == rustix::io::Errno::EXIST {
                return Error::new(
                    ErrorKind::Exists,
                    format!(
                        "'{}' is there already, and is not overwritten; to use it as it is, give \
                         mode 'existing'",
                        path.display()
                    ),
                );
            }
            fault(errno.into())
        })?;
        let file = File::from(file);
        let metadata = file.metadata().map_err(fault)?;
        Ok(Self {
            folder,
            name: name.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
            file,
            path: path.to_owned(),
            kept: Cell::new(false),
        })
    }
}

impl Drop for MadeFile {
    fn drop(&mut self) {
        if self.kept.get() {
            return;
        }
        let is_ours = |name: &OsStr| {
            statat(self.folder.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW)
                .is_ok_and(|found| (found.st_dev, found.st_ino) == self.identity)
        };
        if is_ours(&self.name)
            && let Err(error) = unlinkat(self.folder.as_fd(), &self.name, AtFlags::empty())
        {
            log::warn!("cannot remove '{}': {error}", self.path.display());
        }
    }
}
