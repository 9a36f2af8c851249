//! `qblkd snapshot`: internal snapshots of an image that is served, or of one that nobody uses.
//!
//! With `--control` this is a QMP client: it sends a command, and follows the job that the server
//! makes of it. With `--blk-file` it takes the image's lock and does the same work itself, to its
//! end, with the backing files left alone: nothing of a guest's data is read or written.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use indicatif::ProgressBar;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::info::{clock, date};
use super::{Exit, human_size, lock, print, printable, progress_bar};
use crate::config::{SnapshotAction, SnapshotConfig, SnapshotName, SnapshotTarget};
use crate::engine::info::info;
use crate::engine::{
    Error, ErrorKind, Image, LayerFormat, LayerSpec, NewSnapshot, OpenOptions, Selector,
    SnapshotInfo, Step, Worker, revert,
};
use crate::format::snapshot::SnapshotEntry;
use crate::storage::lock::{ImageLock, LockKind};
use crate::storage::{BlockingStorage, FileId, HostFile, OpenMode, block_on};

/// How often a server is asked how far a job is.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// How long a server may take to greet, which it does at once unless it is very busy. Whoever waits
/// for us to speak first, as on a vhost-user socket, is no control socket.
const GREETING_PATIENCE: Duration = Duration::from_secs(10);

/// Does what the configuration says, and prints what there is to print.
#[must_use]
pub fn snapshot(config: &SnapshotConfig) -> Exit {
    let bar = progress_bar();
    let (path, result) = match &config.target {
        SnapshotTarget::Control(path) => (path, online(path, &config.action, &bar)),
        SnapshotTarget::File(path) => (path, offline(path, &config.action, &bar)),
    };
    bar.finish_and_clear();
    match result {
        Ok(text) => print(&text, Exit::Success),
        Err(error) => super::fail(path, &error),
    }
}

/// Which of these snapshots is meant.
fn select<'a>(
    snapshots: &'a [SnapshotInfo],
    which: &SnapshotName,
) -> Result<&'a SnapshotInfo, Error> {
    let by_id = |id: &str| snapshots.iter().find(|snapshot| snapshot.id == id);
    let found = match which {
        SnapshotName::Id(id) => by_id(id),
        SnapshotName::NameOrId(name) => {
            let mut named = snapshots.iter().filter(|snapshot| snapshot.name == *name);
            let found = named.next();
            if named.next().is_some() {
                return Err(ambiguous(name));
            }
            found.or_else(|| by_id(name))
        }
    };
    found.ok_or_else(|| missing(which))
}

fn missing(which: &SnapshotName) -> Error {
    let text = match which {
        SnapshotName::Id(id) => format!("there is no snapshot with the id '{id}'"),
        SnapshotName::NameOrId(name) => {
            format!("there is no snapshot with the name or id '{name}'")
        }
    };
    Error::new(ErrorKind::NotFound, text)
}

/// What picks a listed snapshot. By its id alone where the list could not show its name: images of
/// others may hold names that are no text.
fn selector(snapshot: &SnapshotInfo) -> Selector {
    let is_whole = !snapshot.name.contains(char::REPLACEMENT_CHARACTER);
    Selector {
        id: Some(snapshot.id.clone()),
        name: is_whole.then(|| snapshot.name.clone()),
    }
}

/// The same as arguments of a command.
fn naming(device: &str, snapshot: &SnapshotInfo) -> Value {
    let Selector { id, name } = selector(snapshot);
    let mut arguments = json!({ "device": device, "id": id });
    if let Some(name) = name {
        arguments["name"] = name.into();
    }
    arguments
}

fn ambiguous(name: &str) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!("several snapshots are named '{name}': give --id"),
    )
}

/// The list, for people or for programs.
fn show(snapshots: &[SnapshotInfo], as_json: bool) -> String {
    if as_json {
        let list: Vec<Value> = snapshots.iter().map(to_json).collect();
        return format!("{:#}\n", json!(list));
    }
    if snapshots.is_empty() {
        return "no internal snapshots\n".to_owned();
    }
    let mut text = format!(
        "{:<8} {:<20} {:>10} {:>19} {:>14} {:>10}\n",
        "ID", "NAME", "VM STATE", "TAKEN (UTC)", "VM CLOCK", "DISK SIZE"
    );
    for snapshot in snapshots {
        text.push_str(&format!(
            "{:<8} {:<20} {:>10} {:>19} {:>14} {:>10}{}\n",
            printable(&snapshot.id),
            printable(&snapshot.name),
            human_size(snapshot.vm_state_size),
            date(snapshot.date_sec),
            clock(snapshot.vm_clock_nsec),
            human_size(snapshot.disk_size),
            if snapshot.unsettled {
                "  unsettled"
            } else {
                ""
            },
        ));
    }
    text
}

/// QEMU's `SnapshotInfo`, with what it lacks under `x-qblkd`, as on the control socket.
fn to_json(snapshot: &SnapshotInfo) -> Value {
    const SECOND: u64 = 1_000_000_000;
    let mut value = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec / SECOND,
        "vm-clock-nsec": snapshot.vm_clock_nsec % SECOND,
        "x-qblkd": { "disk-size": snapshot.disk_size, "unsettled": snapshot.unsettled },
    });
    if let Some(icount) = snapshot.icount {
        value["icount"] = json!(icount);
    }
    value
}

/// What [`to_json`] makes.
fn from_json(value: &Value) -> SnapshotInfo {
    let text = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
    let number = |name: &str| value[name].as_u64().unwrap_or(0);
    let small = |name: &str| u32::try_from(number(name)).unwrap_or(0);
    let more = &value["x-qblkd"];
    SnapshotInfo {
        id: text("id"),
        name: text("name"),
        date_sec: small("date-sec"),
        date_nsec: small("date-nsec"),
        vm_clock_nsec: number("vm-clock-sec")
            .saturating_mul(1_000_000_000)
            .saturating_add(number("vm-clock-nsec")),
        vm_state_size: number("vm-state-size"),
        disk_size: more["disk-size"].as_u64().unwrap_or(0),
        icount: value["icount"].as_u64(),
        unsettled: more["unsettled"].as_bool().unwrap_or(false),
    }
}

/// Does it through the control socket of a server.
fn online(socket: &Path, action: &SnapshotAction, bar: &ProgressBar) -> Result<String, Error> {
    let mut client = Client::connect(socket, GREETING_PATIENCE)?;
    let device = client.device()?;
    let job = match action {
        SnapshotAction::List { json } => return Ok(show(&device.snapshots, *json)),
        SnapshotAction::Create { name, wait } => {
            let arguments = json!({ "device": device.name, "name": name });
            client.execute("blockdev-snapshot-internal-sync", &arguments)?;
            wait.then(|| ("settle-", Some(name.clone())))
        }
        SnapshotAction::Delete { which, wait } => {
            let snapshot = select(&device.snapshots, which)?;
            let arguments = naming(&device.name, snapshot);
            client.execute("blockdev-snapshot-delete-internal-sync", &arguments)?;
            wait.then(|| ("delete-", Some(snapshot.name.clone())))
        }
        SnapshotAction::Revert { which, wait } => {
            let snapshot = select(&device.snapshots, which)?;
            let arguments = naming(&device.name, snapshot);
            client.execute("x-qblkd-snapshot-revert", &arguments)?;
            // That job is about the whole image.
            wait.then_some(("rebuild-", None))
        }
    };
    if let Some((kind, name)) = job {
        client.follow(kind, name.as_deref(), bar)?;
    }
    Ok(String::new())
}

/// A connection to a control socket.
struct Client {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

/// The device of a server.
struct Device {
    name: String,
    snapshots: Vec<SnapshotInfo>,
}

impl Client {
    fn connect(socket: &Path, patience: Duration) -> Result<Self, Error> {
        let connected = UnixStream::connect(socket)
            .and_then(|stream| Ok((stream.try_clone()?, stream)))
            .map_err(|error| {
                let text = "cannot connect to the control socket (a qblkd that serves makes it with \
                            --control)";
                Error::io(text, error)
            });
        let (reader, stream) = connected?;
        let mut client = Self {
            stream,
            lines: BufReader::new(reader),
        };
        if !client.wait(patience)? {
            return Err(no_greeting());
        }
        let greeting = client.read()?;
        if let Some(error) = greeting.get("error") {
            return Err(refusal(error));
        }
        if greeting.get("QMP").is_none() {
            return Err(no_greeting());
        }
        client.execute("qmp_capabilities", &json!({}))?;
        Ok(client)
    }

    fn read(&mut self) -> Result<Value, Error> {
        let mut line = String::new();
        let count = self
            .lines
            .read_line(&mut line)
            .map_err(|error| lost("cannot read from the control socket", error))?;
        if count == 0 {
            return Err(closed());
        }
        serde_json::from_str(&line).map_err(|error| {
            Error::io(
                "what comes from the control socket is not QMP",
                error.into(),
            )
        })
    }

    /// Runs a command, however long it takes; events are skipped.
    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, Error> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream
            .write_all(format!("{request}\n").as_bytes())
            .map_err(|error| lost("cannot write to the control socket", error))?;
        loop {
            let mut message = self.read()?;
            if let Some(error) = message.get("error") {
                return Err(refusal(error));
            }
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn device(&mut self) -> Result<Device, Error> {
        let list = self.execute("query-block", &json!({}))?;
        let device = &list[0];
        let snapshots = device["inserted"]["image"]["snapshots"].as_array();
        let name = device["device"].as_str().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "the server has no device of its own")
        })?;
        Ok(Device {
            name: name.to_owned(),
            snapshots: snapshots.map_or_else(Vec::new, |list| list.iter().map(from_json).collect()),
        })
    }

    /// Waits until the server tells something, at most for `limit`. Returns whether it does.
    fn wait(&self, limit: Duration) -> Result<bool, Error> {
        let limit = Timespec::try_from(limit).unwrap_or_default();
        let mut polled = [PollFd::new(&self.stream, PollFlags::IN)];
        match rustix::event::poll(&mut polled, Some(&limit)) {
            Ok(count) => Ok(count > 0),
            // Early is soon enough.
            Err(Errno::INTR) => Ok(true),
            Err(errno) => {
                let text = "cannot wait for the control socket";
                Err(Error::io(text, errno.into()))
            }
        }
    }

    /// Waits for the jobs of this kind about the snapshot of this name, or about none, the ones before
    /// them included.
    fn follow(&mut self, kind: &str, name: Option<&str>, bar: &ProgressBar) -> Result<(), Error> {
        loop {
            let jobs = self.execute("query-jobs", &json!({}))?;
            let jobs = jobs.as_array().map_or(&[][..], Vec::as_slice);
            let is_ours = |job: &&Value| {
                job["id"].as_str().is_some_and(|id| id.starts_with(kind))
                    && job["x-qblkd"]["snapshot-name"].as_str() == name
            };
            // The last: an earlier one of the same name is not ours.
            let Some(job) = jobs.iter().rfind(is_ours) else {
                return Ok(());
            };
            let status = job["status"].as_str().unwrap_or_default();
            let error = job["error"].as_str().unwrap_or_default();
            if status == "concluded" {
                let text = format!("the background work was given up: {error}");
                return Err(Error::new(ErrorKind::Failed, text));
            }
            bar.set_message(match status {
                "paused" => format!("stopped, {error}"),
                "created" => "waiting for earlier work".to_owned(),
                _ => message(kind).to_owned(),
            });
            bar.set_length(job["total-progress"].as_u64().unwrap_or(0));
            bar.set_position(job["current-progress"].as_u64().unwrap_or(0));
            // Not long: progress is not told.
            self.wait(POLL_INTERVAL)?;
        }
    }
}

fn no_greeting() -> Error {
    Error::new(
        ErrorKind::Invalid,
        "this is not a control socket: there is no QMP greeting",
    )
}

fn closed() -> Error {
    Error::new(
        ErrorKind::Failed,
        "the server has ended, or has closed the connection",
    )
}

/// An error of the connection, in plain words if it is the end of it.
fn lost(action: &'static str, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => closed(),
        _ => Error::io(action, error),
    }
}

/// The `error` of a reply.
fn refusal(error: &Value) -> Error {
    let text = error["desc"].as_str().unwrap_or("refused without a reason");
    Error::new(ErrorKind::Invalid, text)
}

/// What the bar says.
fn message(kind: &str) -> &'static str {
    match kind {
        "delete-" => "giving space back",
        "rebuild-" => "counting all references anew",
        _ => "counting references",
    }
}

/// An image file that nobody else uses.
struct Locked {
    file: Arc<HostFile>,
    write: bool,
    /// Given back last.
    _lock: ImageLock,
}

fn lock_image(path: &Path, write: bool) -> Result<Locked, Error> {
    let direct = false;
    let file = HostFile::open(path, OpenMode { write, direct })
        .map(Arc::new)
        .map_err(|error| Error::io("cannot open the image", error))?;
    let kind = if write {
        LockKind::Writer
    } else {
        LockKind::Reader
    };
    let lock = lock(&file, kind).map_err(|error| {
        let text = format!(
            "{}; or, where that is a qblkd with a control socket, give --control PATH instead of \
             --blk-file",
            error.chain()
        );
        Error::new(error.kind(), text)
    })?;
    Ok(Locked {
        file,
        write,
        _lock: lock,
    })
}

impl Locked {
    fn storage(&self) -> BlockingStorage {
        BlockingStorage::new(vec![Arc::clone(&self.file)])
    }

    /// Opens the image alone, without its backing files.
    fn open(&self) -> Result<Arc<Image>, Error> {
        let spec = LayerSpec {
            file: FileId(0),
            format: LayerFormat::Qcow2,
        };
        let options = OpenOptions {
            read_only: !self.write,
            ..OpenOptions::default()
        };
        block_on(Image::open(&self.storage(), &[spec], &options))
    }
}

/// Does it in an image that nobody uses.
fn offline(path: &Path, action: &SnapshotAction, bar: &ProgressBar) -> Result<String, Error> {
    match action {
        SnapshotAction::List { json } => {
            let image = lock_image(path, false)?.open()?;
            Ok(show(&image.snapshots(), *json))
        }
        SnapshotAction::Revert { which, .. } => go_back(path, which, bar),
        SnapshotAction::Create { name, .. } => {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            let new = NewSnapshot {
                name: name.clone(),
                // The format's own limit: seconds end in the year 2106.
                date_sec: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
                date_nsec: now.subsec_nanos(),
                vm_clock_nsec: 0,
            };
            change(lock_image(path, true)?, bar, "settle-", async |worker| {
                worker.create_snapshots(&[new]).await.map(drop)
            })
        }
        SnapshotAction::Delete { which, .. } => {
            change(lock_image(path, true)?, bar, "delete-", async |worker| {
                let snapshots = worker.image().snapshots();
                let snapshot = select(&snapshots, which)?;
                worker.delete_snapshot(&selector(snapshot)).await.map(drop)
            })
        }
    }
}

/// Goes back to a snapshot, and counts what that has changed.
fn go_back(path: &Path, which: &SnapshotName, bar: &ProgressBar) -> Result<String, Error> {
    let locked = lock_image(path, true)?;
    let storage = locked.storage();
    let snapshots = block_on(info(&storage, FileId(0)))?.snapshots;
    let selector = match which {
        SnapshotName::Id(id) => Selector {
            id: Some(id.clone()),
            name: None,
        },
        SnapshotName::NameOrId(name) => {
            let count = |entry: &&SnapshotEntry| entry.name == name.as_bytes();
            let has_id = || snapshots.iter().any(|entry| entry.id == name.as_bytes());
            let (id, name) = match snapshots.iter().filter(count).count() {
                0 if !has_id() => return Err(missing(which)),
                0 => (Some(name.clone()), None),
                1 => (None, Some(name.clone())),
                _ => return Err(ambiguous(name)),
            };
            Selector { id, name }
        }
    };
    block_on(revert(storage, FileId(0), &selector))?;
    // What the revert has left to be counted is counted now.
    change(locked, bar, "rebuild-", async |_| Ok(()))
}

/// Changes an image, does the background work of that, and closes the image. After an error it is
/// closed too: what was there before is there still.
#[expect(clippy::needless_pass_by_value, reason = "the lock goes with the work")]
fn change(
    locked: Locked,
    bar: &ProgressBar,
    kind: &str,
    command: impl AsyncFnOnce(&Worker<BlockingStorage>) -> Result<(), Error>,
) -> Result<String, Error> {
    let worker = locked.open()?.background_worker(locked.storage());
    let done = block_on(async {
        command(&worker).await?;
        bar.set_message(message(kind));
        while worker.background_step().await? != Step::Idle {
            if let Some(work) = worker.image().background().first() {
                bar.set_length(work.total);
                bar.set_position(work.done);
            }
        }
        Ok(())
    });
    let closed = block_on(worker.close());
    done.and(closed).map(|()| String::new())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    fn named(id: &str, name: &str) -> SnapshotInfo {
        SnapshotInfo {
            id: id.to_owned(),
            name: name.to_owned(),
            date_sec: 1_700_000_000,
            date_nsec: 5,
            vm_clock_nsec: 3_000_000_007,
            vm_state_size: 1 << 20,
            disk_size: 10 << 30,
            icount: Some(9),
            unsettled: true,
        }
    }

    #[test]
    fn a_name_goes_before_an_id_and_must_be_the_only_one() {
        let list = [
            named("1", "2"),
            named("2", "x"),
            named("3", "y"),
            named("4", "y"),
        ];
        let id = |which: &SnapshotName| select(&list, which).map(|found| found.id.clone());
        let name = |name: &str| SnapshotName::NameOrId(name.to_owned());
        assert_eq!(id(&name("2")).unwrap(), "1");
        assert_eq!(id(&name("3")).unwrap(), "3");
        assert_eq!(id(&SnapshotName::Id("2".to_owned())).unwrap(), "2");
        assert_eq!(id(&name("y")).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(id(&name("z")).unwrap_err().kind(), ErrorKind::NotFound);
        let missing = SnapshotName::Id("x".to_owned());
        assert_eq!(id(&missing).unwrap_err().kind(), ErrorKind::NotFound);
    }

    /// With the name as it was shown nothing was found, not even by id.
    #[test]
    fn a_name_that_is_no_text_is_no_part_of_the_choice() {
        let lossy = named("7", "caf\u{fffd}");
        let id = Some("7".to_owned());
        assert_eq!(selector(&lossy), Selector { id, name: None });
        assert_eq!(
            naming("disk0", &lossy),
            json!({ "device": "disk0", "id": "7" })
        );
        assert_eq!(
            naming("disk0", &named("7", "a")),
            json!({ "device": "disk0", "id": "7", "name": "a" })
        );
    }

    /// A name of an image could tell the terminal anything.
    #[test]
    fn the_list_has_one_line_for_each_and_no_control_characters() {
        let text = show(&[named("7", "a\u{1b}[31m\nb\u{9b}c")], false);
        assert_eq!(text.lines().count(), 2);
        assert!(
            !text.replace('\n', "").contains(char::is_control),
            "{text:?}"
        );
        assert!(text.contains(r"a\u{1b}[31m\nb\u{9b}c"), "{text}");
    }

    /// Connects to a socket that says this first; the error.
    fn greeted_with(first: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let text = first.to_owned();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(text.as_bytes()).unwrap();
            stream
        });
        let patience = Duration::from_millis(if first.is_empty() { 10 } else { 60_000 });
        let refused = Client::connect(&path, patience).err().unwrap();
        drop(server.join().unwrap());
        refused.to_string()
    }

    /// On a vhost-user socket, which waits for the front-end to speak, the tool hung; and of a server
    /// with too many clients it said that it was no control socket.
    #[test]
    fn a_server_that_does_not_greet_is_no_control_socket_or_says_why() {
        assert!(greeted_with("").contains("no QMP greeting"));
        assert!(greeted_with("{\"event\": \"X\"}\n").contains("no QMP greeting"));
        let full = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"too many clients\"}}\n";
        assert_eq!(greeted_with(full), "too many clients");
    }

    #[test]
    fn what_the_socket_tells_is_what_the_list_shows() {
        let snapshot = named("7", "first");
        assert_eq!(from_json(&to_json(&snapshot)), snapshot);
        let text = show(&[snapshot], false);
        let row = text.lines().nth(1).unwrap();
        let words: Vec<_> = row.split_whitespace().collect();
        assert_eq!(
            words,
            [
                "7",
                "first",
                "1",
                "MiB",
                "2023-11-14",
                "22:13:20",
                "0000:00:03.000",
                "10",
                "GiB",
                "unsettled"
            ]
        );
    }
}
