//! What the server does with little: memory for a very large image, a host without space, and the
//! terminal of a tool.
//!
//! How long things take is no test's business here; `contrib/bench/idle.py` measures that.

use crate::support::command::{LIMIT, run_command};
use crate::support::driver::{DATA, Driver, FLUSH_REQUEST, IN, IOERR, OK, OUT, WRITE};
use crate::support::qemu::{self, CHECK_CLEAN};
use crate::support::qmp::Qmp;
use crate::support::server::Server;
use crate::support::{Failure, QBLKD, ensure, have_tools, skip, terminal};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

// --- A very large image ---

/// A folder with `big.qcow2` in it: an image of `size` with all metadata allocated. Below the target
/// folder, since a tmpfs may be small.
fn big_image(size: &str) -> Result<(TempDir, PathBuf), Failure> {
    let dir = TempDir::with_prefix_in("qblkd-", env!("CARGO_TARGET_TMPDIR"))?;
    let file = dir.path().join("big.qcow2");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/corpus/big.py");
    let mut make = Command::new("python3");
    // -B: leave no compiled files in the source tree.
    make.arg("-B").arg(script).arg(size).arg(&file);
    run_command(&mut make, LIMIT)?.success()?;
    Ok((dir, file))
}

/// Memory of a process that is its own and no file's, in KiB.
fn anonymous_kib(process: u32) -> Result<u64, Failure> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.ok_or("no RssAnon")?.parse()?)
}

#[test]
fn two_tebibytes_of_metadata_are_served_from_little_memory() -> Result<(), Failure> {
    const SECTORS: u64 = (2 << 40) / 512;
    const IDLE_KIB_MAX: u64 = 16 << 10;
    let test = "two_tebibytes_of_metadata_are_served_from_little_memory";
    if !have_tools(test, &["python3"]) {
        return Ok(());
    }
    let (_dir, file) = big_image("2T")?;
    let server = Server::start([OsStr::new("--blk-file"), file.as_os_str()])?;
    let idle = anonymous_kib(server.id())?;
    ensure(idle <= IDLE_KIB_MAX, || format!("{idle} KiB when idle"))?;
    let mut driver = Driver::connect(&server.socket)?;
    for sector in [0, SECTORS / 2, SECTORS - 8] {
        let status = driver.request(IN, sector, 4096, WRITE)?;
        ensure(status == OK, || format!("sector {sector}: status {status}"))?;
    }
    drop(driver);
    let ended = server.terminate()?;
    ensure(ended.code()? == 0, || format!("{ended:?}"))
}

/// The most anonymous memory of a server in KiB, until it has no background work left.
fn most_while_working(server: &Server, client: &mut Qmp) -> Result<u64, Failure> {
    let mut most = 0;
    loop {
        let jobs = client.execute("query-jobs")?;
        most = most.max(anonymous_kib(server.id())?);
        if jobs.as_array().is_some_and(Vec::is_empty) {
            return Ok(most);
        }
    }
}

#[test]
fn background_work_on_two_tebibytes_needs_little_memory() -> Result<(), Failure> {
    const SETTLE_KIB_MAX: u64 = 16 << 10;
    /// Counts of 9 MiB, buffers, and what the heap keeps between them.
    const REBUILD_KIB_MAX: u64 = 24 << 10;
    /// Of the header: the least significant byte of the incompatible features.
    const DIRTY_BYTE: u64 = 79;
    let test = "background_work_on_two_tebibytes_needs_little_memory";
    if !have_tools(test, &["python3"]) {
        return Ok(());
    }
    let (dir, file) = big_image("2T")?;
    let control = dir.path().join("control.sock");
    let arguments = [
        OsStr::new("--blk-file"),
        file.as_os_str(),
        OsStr::new("--control"),
        control.as_os_str(),
    ];
    let server = Server::start(arguments)?;
    let idle = anonymous_kib(server.id())?;
    let mut client = Qmp::connect(&control)?;
    client.send(
        b"{\"execute\": \"blockdev-snapshot-internal-sync\", \"arguments\": \
        {\"device\": \"disk0\", \"name\": \"s1\"}}\n",
    )?;
    let taken = client.answer()?;
    ensure(taken["return"].is_object(), || taken.to_string())?;
    let settle = most_while_working(&server, &mut client)?;
    ensure(settle <= idle + SETTLE_KIB_MAX, || {
        format!("{settle} KiB in a settle, {idle} before")
    })?;
    drop(client);
    let ended = server.terminate()?;
    ensure(ended.code()? == 0, || format!("{ended:?}"))?;

    // Each cluster has two references now.
    let image = File::options().write(true).open(&file)?;
    image.write_all_at(&[1], DIRTY_BYTE)?;
    let server = Server::start(arguments)?;
    let mut client = Qmp::connect(&control)?;
    let jobs = client.execute("query-jobs")?;
    let is_rebuild = |id: &str| id.starts_with("rebuild-");
    ensure(jobs[0]["id"].as_str().is_some_and(is_rebuild), || {
        jobs.to_string()
    })?;
    let rebuild = most_while_working(&server, &mut client)?;
    ensure(rebuild <= idle + REBUILD_KIB_MAX, || {
        format!("{rebuild} KiB in a rebuild, {idle} when idle")
    })?;
    drop(client);
    let ended = server.terminate()?;
    ensure(ended.code()? == 0, || format!("{ended:?}"))
}

// --- No space ---

/// A server on an image in a small tmpfs, which only this process and it can see.
struct SmallHost {
    server: Server,
    control: PathBuf,
    /// The tmpfs, through the server's eyes.
    folder: PathBuf,
    image: File,
    dir: TempDir,
}

/// The shell's part: mounts, makes the image, and becomes the server.
const IN_NAMESPACE: &str = r#"
mount -t tmpfs -o size="$1" qblkd "$2" && "$QBLKD" create "$2/disk.qcow2" 64M || exit
shift 2
exec "$QBLKD" "$@"
"#;

impl SmallHost {
    /// `None`: this host lets nobody mount anything, and the test has said so.
    fn new(test: &str, size: &str) -> Result<Option<Self>, Failure> {
        let root: &[&str] = &["--mount"];
        let anybody: &[&str] = &["--user", "--map-root-user", "--mount"];
        let may_mount = |words: &&&[&str]| {
            let mut unshare = Command::new("unshare");
            unshare.args(**words);
            unshare.args(["mount", "-t", "tmpfs", "qblkd", "/tmp"]);
            run_command(&mut unshare, LIMIT).is_ok_and(|finished| finished.status.success())
        };
        let Some(words) = [root, anybody].iter().find(may_mount).copied() else {
            skip(test, "this host lets us mount no tmpfs");
            return Ok(None);
        };
        let dir = TempDir::with_prefix("qblkd-")?;
        let [folder, control, socket] =
            ["small", "control.sock", "vhost.sock"].map(|name| dir.path().join(name));
        fs::create_dir(&folder)?;
        let mut command = Command::new("unshare");
        command
            .args(words)
            .args(["sh", "-c", IN_NAMESPACE, "sh", size]);
        command.arg(&folder).arg("--socket-path").arg(&socket);
        command.arg("--blk-file").arg(folder.join("disk.qcow2"));
        command.arg("--control").arg(&control).env("QBLKD", QBLKD);
        let server = Server::start_command(command, socket)?;
        let inside = format!("/proc/{}/root{}", server.id(), folder.display());
        let folder = PathBuf::from(inside);
        // Keeps the tmpfs until the test has looked at what the server left there.
        let image = File::open(folder.join("disk.qcow2"))?;
        Ok(Some(Self {
            server,
            control,
            folder,
            image,
            dir,
        }))
    }

    /// Ends the server, and gives back a copy of the image that other processes can see.
    fn finish(self) -> Result<(TempDir, PathBuf), Failure> {
        let ended = self.server.terminate()?;
        ensure(ended.code()? == 0, || format!("{ended:?}"))?;
        let mut bytes = vec![0; usize::try_from(self.image.metadata()?.len())?];
        self.image.read_exact_at(&mut bytes, 0)?;
        let copy = self.dir.path().join("copy.qcow2");
        fs::write(&copy, bytes)?;
        Ok((self.dir, copy))
    }
}

const CLUSTER_BYTES: u32 = 64 << 10;
const CLUSTER_SECTORS: u64 = CLUSTER_BYTES as u64 / 512;
/// Clusters on the virtual disk: far more than there is space for.
const CLUSTERS: u64 = (64 << 20) / CLUSTER_BYTES as u64;

/// Writes whole clusters, each full of its own number, from `first` on until a write fails; returns
/// the cluster whose write failed, and its status.
fn write_until_full(driver: &mut Driver, first: u64) -> Result<(u64, u8), Failure> {
    for cluster in first..CLUSTERS {
        let status = write_cluster(driver, cluster)?;
        if status != OK {
            return Ok((cluster, status));
        }
    }
    Err("the host was never full".into())
}

fn content_of(cluster: u64) -> Vec<u8> {
    let word = (cluster + 1).to_le_bytes();
    word.repeat(CLUSTER_BYTES as usize / word.len())
}

fn write_cluster(driver: &mut Driver, cluster: u64) -> Result<u8, Failure> {
    let content = content_of(cluster);
    driver.memory.write_slice(&content, GuestAddress(DATA))?;
    driver.request(OUT, cluster * CLUSTER_SECTORS, CLUSTER_BYTES, 0)
}

/// An error unless the disk holds what was written to each of these clusters.
fn expect_clusters(driver: &mut Driver, clusters: u64) -> Result<(), Failure> {
    (0..clusters).try_for_each(|cluster| expect_cluster(driver, cluster))
}

fn expect_cluster(driver: &mut Driver, cluster: u64) -> Result<(), Failure> {
    let mut found = vec![0; CLUSTER_BYTES as usize];
    let status = driver.request(IN, cluster * CLUSTER_SECTORS, CLUSTER_BYTES, WRITE)?;
    ensure(status == OK, || format!("read {cluster}: status {status}"))?;
    driver.memory.read_slice(&mut found, GuestAddress(DATA))?;
    ensure(found == content_of(cluster), || {
        format!("cluster {cluster} holds something else")
    })
}

#[test]
fn a_full_host_fails_writes_until_there_is_space_again() -> Result<(), Failure> {
    let test = "a_full_host_fails_writes_until_there_is_space_again";
    if !have_tools(test, &["qemu-img", "unshare", "mount"]) {
        return Ok(());
    }
    let Some(host) = SmallHost::new(test, "8m")? else {
        return Ok(());
    };
    let ballast = host.folder.join("ballast");
    fs::write(&ballast, vec![1; 4 << 20])?;
    let mut listener = Qmp::connect(&host.control)?;
    let mut driver = Driver::connect(&host.server.socket)?;
    let (full, status) = write_until_full(&mut driver, 0)?;
    ensure(status == IOERR, || format!("status {status}"))?;
    let event = listener.event("BLOCK_IO_ERROR")?;
    let data = &event["data"];
    let told = ["operation", "action"].map(|name| data[name].as_str());
    ensure(told == [Some("write"), Some("report")], || {
        event.to_string()
    })?;
    ensure(data["nospace"] == true, || event.to_string())?;
    // It fails again, and costs nothing that was there before.
    let again = write_cluster(&mut driver, full)?;
    ensure(again == IOERR, || format!("once more: status {again}"))?;
    expect_clusters(&mut driver, full)?;

    fs::remove_file(&ballast)?;
    let (full_again, status) = write_until_full(&mut driver, full)?;
    ensure(status == IOERR, || format!("status {status}"))?;
    ensure(full_again > full, || "no write fits into free space".into())?;
    expect_clusters(&mut driver, full_again)?;
    drop(driver);
    let (_dir, copy) = host.finish()?;
    qemu::expect_check(&copy, &[CHECK_CLEAN])
}

/// The signal that comes with such a failure ends a process that does nothing about it.
#[test]
fn a_limit_on_file_sizes_fails_writes_and_not_the_server() -> Result<(), Failure> {
    const DISK_BYTES: u64 = 16 << 20;
    const LIMIT_BYTES: u64 = 4 << 20;
    let test = "a_limit_on_file_sizes_fails_writes_and_not_the_server";
    if !have_tools(test, &["qemu-img", "prlimit"]) {
        return Ok(());
    }
    // Writes to a file in memory are made in another way than those to one on a disk.
    for parent in ["/dev/shm", env!("CARGO_TARGET_TMPDIR")] {
        let dir = TempDir::with_prefix_in("qblkd-", parent)?;
        let [file, socket] = ["disk.qcow2", "vhost.sock"].map(|name| dir.path().join(name));
        qemu::create(&file, DISK_BYTES, "cluster_size=64k,preallocation=falloc")?;
        let mut command = Command::new("prlimit");
        command.arg(format!("--fsize={LIMIT_BYTES}")).arg(QBLKD);
        command.arg("--socket-path").arg(&socket);
        command.arg("--blk-file").arg(&file);
        let server = Server::start_command(command, socket)?;
        let mut driver = Driver::connect(&server.socket)?;
        let clusters = [
            (0, OK),
            (DISK_BYTES / u64::from(CLUSTER_BYTES) - 1, IOERR),
            (1, OK),
        ];
        for (cluster, expected) in clusters {
            let status = write_cluster(&mut driver, cluster)?;
            ensure(status == expected, || {
                format!("{parent}: write of cluster {cluster}: status {status}")
            })?;
        }
        expect_clusters(&mut driver, 2)?;
        drop(driver);
        let ended = server.terminate()?;
        ensure(ended.code()? == 0, || format!("{ended:?}"))?;
        qemu::expect_check(&file, &[CHECK_CLEAN])?;
    }
    Ok(())
}

#[test]
fn a_flush_on_a_full_host_keeps_what_it_covers() -> Result<(), Failure> {
    let test = "a_flush_on_a_full_host_keeps_what_it_covers";
    if !have_tools(test, &["qemu-img", "unshare", "mount"]) {
        return Ok(());
    }
    let Some(host) = SmallHost::new(test, "4m")? else {
        return Ok(());
    };
    let mut driver = Driver::connect(&host.server.socket)?;
    let (full, _) = write_until_full(&mut driver, 0)?;
    let status = driver.request(FLUSH_REQUEST, 0, 512, 0)?;
    ensure(status == OK, || format!("flush: status {status}"))?;
    expect_clusters(&mut driver, full)?;
    drop(driver);
    let (_dir, copy) = host.finish()?;
    qemu::expect_check(&copy, &[CHECK_CLEAN])
}

#[test]
fn an_external_snapshot_on_a_full_host_is_refused_and_leaves_nothing() -> Result<(), Failure> {
    let test = "an_external_snapshot_on_a_full_host_is_refused_and_leaves_nothing";
    if !have_tools(test, &["qemu-img", "unshare", "mount"]) {
        return Ok(());
    }
    let Some(host) = SmallHost::new(test, "4m")? else {
        return Ok(());
    };
    let ballast = host.folder.join("ballast");
    // It ends with the space.
    ensure(fs::write(&ballast, vec![1; 8 << 20]).is_err(), || {
        "there is too much space".into()
    })?;
    let overlay = host.folder.join("overlay.qcow2");
    let mut client = Qmp::connect(&host.control)?;
    let mut take = || -> Result<Value, Failure> {
        // As the server sees it.
        let file = host.dir.path().join("small/overlay.qcow2");
        let arguments = json!({ "device": "disk0", "snapshot-file": file });
        let command = json!({ "execute": "blockdev-snapshot-sync", "arguments": arguments });
        client.send(format!("{command}\n").as_bytes())?;
        client.answer()
    };
    let refused = take()?;
    let said = refused["error"]["desc"].as_str().unwrap_or_default();
    ensure(said.contains("No space"), || refused.to_string())?;
    ensure(!overlay.exists(), || "the overlay was left behind".into())?;
    fs::remove_file(&ballast)?;
    let taken = take()?;
    ensure(taken["return"].is_object(), || taken.to_string())?;
    let mut driver = Driver::connect(&host.server.socket)?;
    ensure(write_cluster(&mut driver, 0)? == OK, || "no write".into())?;
    drop(driver);
    ensure(overlay.exists(), || "there is no overlay".into())?;
    let (_dir, copy) = host.finish()?;
    qemu::expect_check(&copy, &[CHECK_CLEAN])
}

/// A guest writes, and overlays are asked for, until long after the space is used up.
#[test]
fn external_snapshots_while_the_host_fills_up_lose_nothing() -> Result<(), Failure> {
    const ROUNDS: u64 = 60;
    let test = "external_snapshots_while_the_host_fills_up_lose_nothing";
    if !have_tools(test, &["qemu-img", "unshare", "mount"]) {
        return Ok(());
    }
    let Some(host) = SmallHost::new(test, "6m")? else {
        return Ok(());
    };
    let mut driver = Driver::connect(&host.server.socket)?;
    let mut client = Qmp::connect(&host.control)?;
    let (mut written, mut refused, mut failed) = (BTreeSet::new(), 0, 0);
    let mut last = "disk.qcow2".to_owned();
    for round in 0..ROUNDS {
        let name = format!("{round}.qcow2");
        let file = host.dir.path().join("small").join(&name);
        let arguments = json!({ "device": "disk0", "snapshot-file": file });
        let command = json!({ "execute": "blockdev-snapshot-sync", "arguments": arguments });
        client.send(format!("{command}\n").as_bytes())?;
        // While the snapshot is taken; some of them to clusters of before.
        for cluster in [round * 2, round * 2 + 1, round / 2] {
            match write_cluster(&mut driver, cluster)? {
                OK => {
                    written.insert(cluster);
                }
                IOERR => failed += 1,
                status => return Err(format!("status {status}").into()),
            }
        }
        let answer = client.answer()?;
        let there = host.folder.join(&name).exists();
        if answer["return"].is_object() {
            ensure(there, || format!("{name} is not there"))?;
            last = name;
        } else {
            refused += 1;
            let said = answer["error"]["desc"].as_str().unwrap_or_default();
            ensure(said.contains("No space"), || answer.to_string())?;
            ensure(!there, || format!("{name} was left behind: {said}"))?;
        }
    }
    ensure(refused > 0 && failed > 0, || {
        format!("{refused} refused, {failed} writes failed: there is too much space")
    })?;
    ensure(last != "disk.qcow2", || "no snapshot was taken".into())?;
    for cluster in &written {
        expect_cluster(&mut driver, *cluster)?;
    }
    let status = driver.request(FLUSH_REQUEST, 0, 512, 0)?;
    ensure(status == OK, || format!("flush: status {status}"))?;
    drop(driver);
    // The tmpfs goes with the server, but for what is open.
    let mut images = Vec::new();
    for entry in fs::read_dir(&host.folder)? {
        let entry = entry?;
        images.push((entry.file_name(), File::open(entry.path())?));
    }
    let ended = host.server.terminate()?;
    ensure(ended.code()? == 0, || format!("{ended:?}"))?;
    // All of them first: each names the one below.
    for (name, image) in &mut images {
        let mut copy = File::create(host.dir.path().join(name))?;
        std::io::copy(image, &mut copy)?;
    }
    for (name, _) in &images {
        qemu::expect_check(&host.dir.path().join(name), &[CHECK_CLEAN])
            .map_err(|failure| format!("{}: {failure}", name.display()))?;
    }
    Ok(())
}

// --- The terminal ---

#[test]
fn check_shows_how_far_it_is_on_a_terminal_only() -> Result<(), Failure> {
    let test = "check_shows_how_far_it_is_on_a_terminal_only";
    if !have_tools(test, terminal::TOOLS) {
        return Ok(());
    }
    let (_dir, file) = big_image("16G")?;
    let mut on_terminal = terminal::command(QBLKD, [OsStr::new("check"), file.as_os_str()]);
    let shown = run_command(&mut on_terminal, LIMIT)?.success()?;
    ensure(shown.stdout.contains("reading refcounts"), || {
        format!("{shown:?}")
    })?;
    ensure(shown.stdout.contains("no errors found"), || {
        format!("{shown:?}")
    })?;
    let piped = run_command(Command::new(QBLKD).arg("check").arg(&file), LIMIT)?.success()?;
    ensure(piped.stderr.is_empty(), || piped.stderr.clone())?;
    ensure(!piped.stdout.contains("reading"), || piped.stdout.clone())
}
