//! The server as clients see it: golden transcripts and hostile clients over real sockets, with the
//! epoll loop turned by hand, so that every test is one thread and deterministic.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::RawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::info::{
    BackingInfo, CacheInfo, DeviceInfo, DeviceStats, InternalSnapshotInfo, LatencyHistogram,
    NodeInfo, OperationStats, Qcow2Info, WorkerStats,
};
use super::job::{IoStatus, JobInfo, JobKind, JobStatus};
use super::{
    BindError, CLIENT_COUNT_MAX, CommandError, ControlServer, Event, Handler, IoErrorAction,
    IoOperation, Order, Overlay, ShutdownReason, SnapshotAction, Ticket,
};
use crate::engine::Selector;

const TOKEN_BASE: u64 = 100;

#[derive(Default)]
struct Daemon {
    quit_count: usize,
    /// Orders that were handed over, and not answered yet.
    orders: Vec<(Ticket, Order)>,
    jobs: Vec<JobInfo>,
    /// The device is read-only.
    read_only: bool,
}

fn job(id: &str, status: JobStatus) -> JobInfo {
    JobInfo {
        id: id.into(),
        kind: JobKind::SnapshotSave,
        status,
        io_status: IoStatus::Ok,
        done: 3,
        total: 8,
        speed: 0,
        error: None,
        snapshot: Some(("1".into(), "first".into())),
    }
}

fn node(name: &str, filename: &str) -> NodeInfo {
    NodeInfo {
        node_name: name.into(),
        format: "qcow2",
        filename: filename.into(),
        read_only: false,
        cache: CacheInfo {
            writeback: true,
            direct: false,
            no_flush: false,
        },
        virtual_size_bytes: 64 << 20,
        actual_size_bytes: Some(200_704),
        backing: None,
        qcow2: Some(Qcow2Info {
            version: 3,
            cluster_size_bytes: 65536,
            refcount_bits: 16,
            lazy_refcounts: false,
            dirty: false,
            corrupt: false,
            compression_type: "zlib",
            internal_snapshots: Vec::new(),
        }),
    }
}

impl Handler for Daemon {
    fn device_info(&mut self) -> DeviceInfo {
        let mut active = node("disk0", "top.qcow2");
        active.backing = Some(BackingInfo {
            filename: "base.raw".into(),
            full_filename: "/images/base.raw".into(),
            format: Some("raw".into()),
        });
        active
            .qcow2
            .as_mut()
            .unwrap()
            .internal_snapshots
            .push(InternalSnapshotInfo {
                id: "1".into(),
                name: "first".into(),
                vm_state_size: 0,
                date_sec: 10_000_200,
                date_nsec: 12,
                vm_clock_sec: 206,
                vm_clock_nsec: 30,
                icount: None,
                more: None,
            });
        active.read_only = self.read_only;
        let mut base = node("disk0.1", "/images/base.raw");
        base.format = "raw";
        base.read_only = true;
        base.actual_size_bytes = None;
        base.qcow2 = None;
        DeviceInfo {
            name: "disk0".into(),
            chain: vec![active, base],
        }
    }

    fn device_stats(&mut self) -> DeviceStats {
        let latency = Some(LatencyHistogram {
            boundaries: vec![10, 100],
            bins: vec![1, 2, 3],
        });
        DeviceStats {
            read: OperationStats {
                operations: 6,
                bytes: 4096,
                failed: 1,
                invalid: 2,
                total_time_ns: 99,
                latency,
            },
            write_highest_offset: 12345,
            workers: vec![WorkerStats {
                worker: 0,
                metadata_cache_hits: 7,
                metadata_cache_misses: 8,
                put_table_hits: 9,
            }],
            ..DeviceStats::default()
        }
    }

    fn jobs(&mut self) -> Vec<JobInfo> {
        self.jobs.clone()
    }

    fn set_job_speed(&mut self, id: &str, speed: u64) {
        let job = self.jobs.iter_mut().find(|job| job.id == id);
        job.unwrap().speed = speed;
    }

    fn dismiss_job(&mut self, id: &str) {
        self.jobs.retain(|job| job.id != id);
    }

    fn order(&mut self, ticket: Ticket, order: Order) -> Result<(), CommandError> {
        if self.orders.len() == ORDERS_MAX {
            return Err(CommandError::generic("enough"));
        }
        self.orders.push((ticket, order));
        Ok(())
    }

    fn quit(&mut self) {
        self.quit_count += 1;
    }
}

/// More orders are refused at once.
const ORDERS_MAX: usize = 2;

/// What becomes of a request that is refused: (arguments, description).
type Refusal = (&'static str, &'static str);

fn refusals(command: &str, refusals: &[Refusal]) {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    for (arguments, desc) in refusals {
        let request = format!(r#"{{"execute":"{command}","arguments":{arguments}}}"#);
        assert_eq!(
            bench.ask(&mut client, &request),
            [error("GenericError", desc)],
            "{request}"
        );
    }
    assert_eq!(bench.daemon.orders, []);
}

/// A server with the loop around it.
struct Bench {
    daemon: Daemon,
    server: ControlServer,
    epoll: RawFd,
    path: PathBuf,
    #[expect(dead_code, reason = "kept for its Drop")]
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let epoll = epoll::create(true).unwrap();
        let server = ControlServer::bind(&path, epoll, TOKEN_BASE).unwrap();
        Self {
            daemon: Daemon::default(),
            server,
            epoll,
            path,
            folder,
        }
    }

    /// Handles what is ready until nothing is.
    fn run(&mut self) {
        let mut events = [epoll::Event::new(epoll::Events::empty(), 0); 8];
        loop {
            let count = epoll::wait(self.epoll, 0, &mut events).unwrap();
            if count == 0 {
                return;
            }
            for event in &events[..count] {
                let token = event.data;
                assert!(self.server.owns(token));
                self.server.handle_ready(token, &mut self.daemon);
            }
        }
    }

    fn connect(&mut self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_nonblocking(true).unwrap();
        self.run();
        Client { stream }
    }

    /// A client that has its greeting and its negotiation behind it.
    fn negotiated(&mut self) -> Client {
        let mut client = self.connect();
        client.send(r#"{"execute":"qmp_capabilities"}"#);
        self.run();
        assert_eq!(client.receive().len(), 2);
        client
    }

    /// What comes back for `input`.
    fn ask(&mut self, client: &mut Client, input: &str) -> Vec<Value> {
        client.send(input);
        self.run();
        client.receive()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = epoll::close(self.epoll);
    }
}

struct Client {
    stream: UnixStream,
}

impl Client {
    fn send(&mut self, input: &str) {
        self.stream.write_all(input.as_bytes()).unwrap();
    }

    /// Everything that has arrived, as text.
    fn receive_text(&mut self) -> String {
        let mut bytes = Vec::new();
        if let Err(error) = self.stream.read_to_end(&mut bytes) {
            assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        }
        String::from_utf8(bytes).unwrap()
    }

    fn receive(&mut self) -> Vec<Value> {
        self.receive_text()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0))
    }
}

fn error(class: &str, desc: &str) -> Value {
    json!({ "error": { "class": class, "desc": desc } })
}

/// A request and what must come back for it.
type Exchange = (&'static str, &'static str);

fn transcript(exchanges: &[Exchange]) {
    let mut bench = Bench::new();
    let mut client = bench.connect();
    client.receive();
    for (request, reply) in exchanges {
        client.send(request);
        bench.run();
        assert_eq!(
            client.receive_text(),
            format!("{reply}\r\n"),
            "reply to {request}"
        );
    }
}

#[test]
fn a_client_is_greeted() {
    let mut client = Bench::new().connect();
    assert_eq!(
        client.receive_text(),
        concat!(
            r#"{"QMP":{"version":{"qemu":{"major":0,"minor":1,"micro":0},"#,
            r#""package":"qblkd 0.1.0"},"capabilities":[]}}"#,
            "\r\n"
        )
    );
}

#[test]
fn negotiation_transcript() {
    transcript(&[
        (
            r#"{"execute":"query-version","id":1}"#,
            concat!(
                r#"{"error":{"class":"CommandNotFound","desc":"Expecting capabilities "#,
                r#"negotiation with 'qmp_capabilities'"},"id":1}"#
            ),
        ),
        (
            r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#,
            r#"{"error":{"class":"GenericError","desc":"Capability 'oob' is not available"}}"#,
        ),
        (
            r#"{"execute":"qmp_capabilities","arguments":{"bar":1}}"#,
            r#"{"error":{"class":"GenericError","desc":"Parameter 'bar' is unexpected"}}"#,
        ),
        (
            r#"{"execute":"qmp_capabilities","arguments":{"enable":[]},"id":{"a":[1]}}"#,
            r#"{"return":{},"id":{"a":[1]}}"#,
        ),
        (
            r#"{"execute":"qmp_capabilities"}"#,
            concat!(
                r#"{"error":{"class":"CommandNotFound","desc":"Capabilities negotiation is "#,
                r#"already complete, command ignored"}}"#
            ),
        ),
    ]);
}

#[test]
fn command_transcript() {
    transcript(&[
        (r#"{"execute":"qmp_capabilities"}"#, r#"{"return":{}}"#),
        (
            r#"{"execute":"query-version","id":"v"}"#,
            concat!(
                r#"{"return":{"qemu":{"major":0,"minor":1,"micro":0},"package":"qblkd 0.1.0"},"#,
                r#""id":"v"}"#
            ),
        ),
        (
            r#"{"execute":"query-commands"}"#,
            concat!(
                r#"{"return":[{"name":"query-version"},{"name":"query-commands"},"#,
                r#"{"name":"query-block"},{"name":"query-named-block-nodes"},"#,
                r#"{"name":"query-blockstats"},"#,
                r#"{"name":"blockdev-snapshot-internal-sync"},"#,
                r#"{"name":"blockdev-snapshot-delete-internal-sync"},"#,
                r#"{"name":"blockdev-snapshot-sync"},{"name":"x-qblkd-snapshot-revert"},"#,
                r#"{"name":"transaction"},"#,
                r#"{"name":"query-jobs"},{"name":"query-block-jobs"},"#,
                r#"{"name":"block-job-set-speed"},{"name":"block-job-cancel"},"#,
                r#"{"name":"block-job-dismiss"},{"name":"job-cancel"},{"name":"job-dismiss"},"#,
                r#"{"name":"quit"},{"name":"qmp_capabilities"}]}"#
            ),
        ),
        (
            r#"{"execute":"nope","id":null}"#,
            concat!(
                r#"{"error":{"class":"CommandNotFound","desc":"The command nope has not been "#,
                r#"found"},"id":null}"#
            ),
        ),
        (
            r#"{"exec-oob":"query-version","id":2}"#,
            concat!(
                r#"{"error":{"class":"GenericError","desc":"QMP input member 'exec-oob' is "#,
                r#"unexpected"},"id":2}"#
            ),
        ),
        (
            r#"{"execute":"query-block","arguments":{"b":1,"a":2}}"#,
            r#"{"error":{"class":"GenericError","desc":"Parameter 'b' is unexpected"}}"#,
        ),
        (
            r#"{"execute":"query-blockstats","arguments":{"query-nodes":1}}"#,
            concat!(
                r#"{"error":{"class":"GenericError","desc":"Invalid parameter type for "#,
                r#"'query-nodes', expected: boolean"}}"#
            ),
        ),
    ]);
}

#[test]
fn every_listed_command_exists() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    let listed = bench.ask(&mut client, r#"{"execute":"query-commands"}"#);
    for entry in listed[0]["return"].as_array().unwrap() {
        let request = json!({ "execute": entry["name"] }).to_string();
        let reply = &bench.ask(&mut client, &request)[0];
        let desc = reply["error"]["desc"].as_str().unwrap_or_default();
        assert!(!desc.contains("has not been found"), "{entry}: {reply}");
    }
}

#[test]
fn query_block_has_qemus_shape() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    let reply = bench.ask(&mut client, r#"{"execute":"query-block"}"#);
    let base_image = json!({
        "filename": "/images/base.raw", "format": "raw", "virtual-size": 67108864,
        "dirty-flag": false,
    });
    let image = json!({
        "filename": "top.qcow2", "format": "qcow2", "virtual-size": 67108864,
        "actual-size": 200704, "dirty-flag": false, "cluster-size": 65536,
        "backing-filename": "base.raw", "full-backing-filename": "/images/base.raw",
        "backing-filename-format": "raw", "backing-image": base_image,
        "snapshots": [{
            "id": "1", "name": "first", "vm-state-size": 0, "date-sec": 10000200,
            "date-nsec": 12, "vm-clock-sec": 206, "vm-clock-nsec": 30,
        }],
        "format-specific": { "type": "qcow2", "data": {
            "compat": "1.1", "compression-type": "zlib", "lazy-refcounts": false,
            "refcount-bits": 16, "corrupt": false, "extended-l2": false,
        }},
    });
    let inserted = json!({
        "file": "top.qcow2", "node-name": "disk0", "ro": false, "drv": "qcow2",
        "backing_file": "/images/base.raw", "backing_file_depth": 1, "active": true,
        "encrypted": false, "detect_zeroes": "off", "bps": 0, "bps_rd": 0, "bps_wr": 0,
        "iops": 0, "iops_rd": 0, "iops_wr": 0, "image": image, "write_threshold": 0,
        "cache": { "writeback": true, "direct": false, "no-flush": false },
    });
    assert_eq!(
        reply,
        [json!({ "return": [{
            "device": "disk0", "type": "unknown", "removable": false, "locked": false,
            "inserted": inserted,
        }]})]
    );
}

#[test]
fn flat_nodes_do_not_contain_each_other() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    let request = r#"{"execute":"query-named-block-nodes","arguments":{"flat":true}}"#;
    let nodes = &bench.ask(&mut client, request)[0]["return"];
    assert_eq!(nodes[0]["image"].get("backing-image"), None);
    assert_eq!(nodes[0]["backing_file_depth"], 0);
    assert_eq!(nodes[1]["node-name"], "disk0.1");
    assert_eq!(nodes[1]["ro"], true);
}

#[test]
fn blockstats_have_every_member_that_typed_clients_require() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    let reply = bench.ask(&mut client, r#"{"execute":"query-blockstats"}"#);
    let mut none = json!({ "account_invalid": false, "account_failed": false, "timed_stats": [] });
    for kind in ["rd", "wr", "flush", "unmap", "zone_append"] {
        let mut members = vec![
            format!("{kind}_operations"),
            format!("failed_{kind}_operations"),
            format!("invalid_{kind}_operations"),
            format!("{kind}_total_time_ns"),
        ];
        if kind != "flush" {
            members.extend([format!("{kind}_bytes"), format!("{kind}_merged")]);
        }
        for member in members {
            none[member] = json!(0);
        }
    }
    let with = |members: Value| {
        let mut stats = none.clone();
        let changed = members.as_object().expect("an object").clone();
        stats.as_object_mut().expect("an object").extend(changed);
        stats
    };
    let stats = with(json!({
        "rd_operations": 6, "failed_rd_operations": 1, "invalid_rd_operations": 2,
        "rd_total_time_ns": 99, "rd_bytes": 4096, "wr_highest_offset": 12345,
        "rd_latency_histogram": { "boundaries": [10, 100], "bins": [1, 2, 3] },
        "account_invalid": true, "account_failed": true,
    }));
    let file = with(json!({ "wr_highest_offset": 12345 }));
    let unused = with(json!({ "wr_highest_offset": 0 }));
    assert_eq!(
        reply,
        [json!({ "return": [{
            "device": "disk0", "node-name": "disk0", "stats": stats,
            "parent": { "stats": file },
            "backing": {
                "node-name": "disk0.1", "stats": unused, "parent": { "stats": unused },
            },
            "x-qblkd": { "workers": [{
                "worker": 0, "metadata-cache-hits": 7, "metadata-cache-misses": 8,
                "put-table-hits": 9,
            }]},
        }]})]
    );
}

#[test]
fn blockstats_by_node_have_no_device_and_no_chain() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    let request = r#"{"execute":"query-blockstats","arguments":{"query-nodes":true}}"#;
    let nodes = &bench.ask(&mut client, request)[0]["return"];
    assert_eq!(nodes[0].get("device"), None);
    assert_eq!(nodes[0].get("backing"), None);
    assert_eq!(nodes[0]["stats"]["rd_operations"], 6);
    assert_eq!(nodes[0]["parent"]["stats"]["wr_highest_offset"], 12345);
    assert_eq!(nodes[1]["stats"]["rd_operations"], 0);
    assert_eq!(nodes[1]["parent"]["stats"]["wr_highest_offset"], 0);
}

#[test]
fn quit_is_answered_before_the_shutdown_starts() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    let replies = bench.ask(&mut client, r#"{"execute":"quit","id":"q"}"#);
    assert_eq!(replies, [json!({ "return": {}, "id": "q" })]);
    assert_eq!(bench.daemon.quit_count, 1);
}

#[test]
fn several_commands_in_one_packet_are_answered_in_order() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    let input = r#"{"execute":"a","id":1}{"execute":"quit","id":2} {"execute":"b","id":3}"#;
    let ids: Vec<_> = bench
        .ask(&mut client, input)
        .iter()
        .map(|reply| reply["id"].clone())
        .collect();
    assert_eq!(ids, [1, 2, 3]);
}

#[test]
fn a_command_may_be_split_anywhere() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    assert_eq!(
        bench.ask(&mut client, r#"{"execute":"no"#),
        [] as [Value; 0]
    );
    let replies = bench.ask(&mut client, "pe\"}");
    assert_eq!(
        replies,
        [error(
            "CommandNotFound",
            "The command nope has not been found"
        )]
    );
}

#[test]
fn events_reach_negotiated_clients_only() {
    let mut bench = Bench::new();
    let mut listening = bench.negotiated();
    let mut new = bench.connect();
    new.receive();
    bench.server.emit(&Event::Shutdown {
        guest: false,
        reason: ShutdownReason::HostSignal,
    });
    let events = listening.receive();
    assert_eq!(events[0]["event"], "SHUTDOWN");
    assert_eq!(
        events[0]["data"],
        json!({ "guest": false, "reason": "host-signal" })
    );
    assert_eq!(new.receive(), [] as [Value; 0]);
}

#[test]
fn a_flood_of_io_errors_is_one_event() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    let event = Event::BlockIoError {
        qom_path: String::new(),
        device: "disk0".into(),
        node_name: "disk0".into(),
        operation: IoOperation::Read,
        action: IoErrorAction::Report,
        nospace: false,
        reason: "Input/output error".into(),
    };
    bench.server.emit(&event);
    bench.server.emit(&event);
    assert_eq!(client.receive().len(), 1);
}

#[test]
fn a_bad_message_costs_one_error_and_nobody_else_anything() {
    let mut bench = Bench::new();
    let mut bad = bench.negotiated();
    let mut good = bench.negotiated();
    bad.send("{\"execute\": ");
    let replies = bench.ask(&mut good, r#"{"execute":"quit"}"#);
    assert_eq!(replies, [json!({ "return": {} })]);
    let replies = bench.ask(&mut bad, "nonsense here}\n{\"execute\":\"quit\"}\n");
    assert_eq!(replies[0]["error"]["class"], "GenericError");
    assert_eq!(replies[1..], [json!({ "return": {} })]);
}

#[test]
fn an_oversized_line_gets_an_error_and_the_session_lives() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    let mut replies = Vec::new();
    let long = format!("{{\"execute\":\"{}\"}}\n", "x".repeat(1 << 20));
    for piece in long.as_bytes().chunks(4096) {
        client.stream.write_all(piece).unwrap();
        bench.run();
        replies.extend(client.receive());
    }
    assert_eq!(
        replies,
        [error("GenericError", "message is longer than 65536 bytes")]
    );
    assert_eq!(
        bench.ask(&mut client, r#"{"execute":"quit"}"#),
        [json!({ "return": {} })]
    );
}

/// Has a long reply.
const REQUEST: &[u8] = b"{\"execute\":\"query-block\"}";

/// Sends until the socket is full, serving all the while.
fn stuff(bench: &mut Bench, client: &mut Client, input: &[u8]) -> usize {
    let mut sent = 0;
    while let Ok(count) = client.stream.write(input) {
        sent += count;
        bench.run();
    }
    sent
}

#[test]
fn a_client_that_asks_without_reading_waits_and_loses_nothing() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    let request = REQUEST;
    // Whole requests only: the socket takes what it has room for.
    let sent = stuff(&mut bench, &mut client, request);
    let mut text = String::new();
    loop {
        let more = client.receive_text();
        if more.is_empty() {
            break;
        }
        text.push_str(&more);
        bench.run();
    }
    assert_eq!(text.lines().count(), sent / request.len());
    assert!(
        text.lines()
            .all(|line| line.starts_with(r#"{"return":[{"device":"disk0""#))
    );
}

#[test]
fn a_client_that_ignores_events_is_dropped_and_others_are_not() {
    let mut bench = Bench::new();
    let mut deaf = bench.negotiated();
    let mut good = bench.negotiated();
    let event = Event::BlockImageCorrupted {
        device: "disk0".into(),
        node_name: "disk0".into(),
        msg: "x".repeat(64 * 1024),
        offset: None,
        size: None,
        fatal: false,
    };
    for _ in 0..64 {
        bench.server.emit(&event);
        assert_eq!(good.receive().len(), 1);
    }
    bench.run();
    let text = deaf.receive_text();
    assert!(text.len() < 3 << 20, "{} bytes were held", text.len());
    assert!(deaf.is_closed());
    assert_eq!(
        bench.ask(&mut good, r#"{"execute":"quit"}"#),
        [json!({ "return": {} })]
    );
}

/// An event can empty the output of a client whose commands are held back. They must then run,
/// although the client sends nothing more and its socket never was full again.
#[test]
fn held_back_commands_run_after_an_event_emptied_the_output() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    // One read of the server, and more replies than the socket has room for.
    let burst = REQUEST.repeat(600);
    client.stream.write_all(&burst).unwrap();
    bench.run();
    let mut count = client.receive().len();
    assert!(count < 600);
    bench.server.emit(&Event::Shutdown {
        guest: false,
        reason: ShutdownReason::HostSignal,
    });
    count += client.receive().len();
    while count < 601 {
        bench.run();
        let more = client.receive().len();
        assert!(more > 0, "stuck after {count} replies");
        count += more;
    }
}

#[test]
fn clients_beyond_the_limit_are_told_and_closed() {
    let mut bench = Bench::new();
    let mut clients: Vec<_> = (0..CLIENT_COUNT_MAX).map(|_| bench.negotiated()).collect();
    let mut refused = bench.connect();
    let desc = "too many clients: at most 32 can be connected at once";
    assert_eq!(refused.receive(), [error("GenericError", desc)]);
    assert!(refused.is_closed());
    clients.pop();
    bench.run();
    bench.negotiated();
}

#[test]
fn a_client_that_half_closes_still_gets_its_replies() {
    let mut bench = Bench::new();
    let mut client = bench.connect();
    client.send(r#"{"execute":"qmp_capabilities"}{"execute":"quit"}"#);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    bench.run();
    assert_eq!(client.receive().len(), 3);
    assert!(client.is_closed());
}

#[test]
fn a_vanished_client_leaves_nothing_behind() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    client.send(r#"{"execute":"query-block"}"#);
    drop(client);
    bench.run();
    assert!(bench.server.sessions.is_empty());
}

#[test]
fn a_client_that_vanishes_while_it_is_waited_for_leaves_nothing_behind() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    stuff(&mut bench, &mut client, REQUEST);
    drop(client);
    bench.run();
    assert!(bench.server.sessions.is_empty());
}

#[test]
fn random_bytes_from_many_clients_hurt_nobody() {
    let mut bench = Bench::new();
    let mut good = bench.negotiated();
    let mut random = fastrand::Rng::with_seed(0x716d_7032);
    let words: [&[u8]; 10] = [
        b"{",
        b"}",
        b"[",
        b"\"",
        b"\n",
        b"\xff",
        b"\\",
        b"\"execute\":",
        b"\"query-block\"",
        b"\0",
    ];
    for _ in 0..50 {
        let mut client = bench.negotiated();
        for _ in 0..200 {
            let word = words[random.usize(..words.len())];
            client.stream.write_all(word).unwrap();
        }
        bench.run();
        client.receive();
    }
    assert_eq!(
        bench.ask(&mut good, r#"{"execute":"quit"}"#),
        [json!({ "return": {} })]
    );
}

#[test]
fn the_socket_is_for_its_owner_only() {
    let bench = Bench::new();
    let mode = fs::metadata(&bench.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn the_socket_file_goes_with_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let server = bind_again(&path).unwrap();
    assert!(path.exists());
    drop(server);
    assert!(!path.exists());
}

#[test]
fn a_file_that_took_the_place_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let server = bind_again(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(server);
    assert!(path.exists());
}

fn bind_again(path: &Path) -> Result<ControlServer, BindError> {
    ControlServer::bind(path, epoll::create(true).unwrap(), TOKEN_BASE)
}

#[test]
fn a_stale_socket_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stale.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    bind_again(&path).unwrap();
}

#[test]
fn a_live_socket_is_refused_and_lives_on() {
    let mut bench = Bench::new();
    let refusal = bind_again(&bench.path).unwrap_err();
    assert!(matches!(refusal, BindError::InUse { .. }), "{refusal}");
    bench.run();
    bench.negotiated();
}

#[test]
fn a_live_socket_whose_owner_does_not_accept_is_refused() {
    let bench = Bench::new();
    let mut waiting = Vec::new();
    for _ in 0..64 {
        let stream = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::NONBLOCK,
            None,
        )
        .unwrap();
        let address = rustix::net::SocketAddrUnix::new(&bench.path).unwrap();
        if rustix::net::connect(&stream, &address).is_err() {
            break;
        }
        waiting.push(stream);
    }
    assert!(waiting.len() < 64);
    assert!(matches!(
        bind_again(&bench.path),
        Err(BindError::InUse { .. })
    ));
}

#[test]
fn a_file_that_is_no_socket_is_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("precious");
    fs::write(&path, "data").unwrap();
    assert!(matches!(
        bind_again(&path),
        Err(BindError::NotASocket { .. })
    ));
    assert_eq!(fs::read(&path).unwrap(), b"data");
}

#[test]
fn a_folder_that_is_missing_is_named() {
    let refusal = bind_again(Path::new("/nonexistent/control.sock")).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "there is no directory '/nonexistent' for the control socket; make it or give another path"
    );
}

/// The package that other people's tools are made of. `QBLKD_TEST_PYTHON` names an interpreter
/// that has it.
#[test]
fn the_python_package_qemu_qmp_works_unchanged() {
    let Some(python) = std::env::var_os("QBLKD_TEST_PYTHON") else {
        let _ = writeln!(std::io::stderr(), "SKIPPED: QBLKD_TEST_PYTHON is not set");
        return;
    };
    let mut bench = Bench::new();
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/it/support/qmp_client.py"
    );
    let mut child = Command::new(python)
        .arg(script)
        .arg(&bench.path)
        .spawn()
        .unwrap();
    let status = loop {
        let mut events = [epoll::Event::new(epoll::Events::empty(), 0); 8];
        let count = epoll::wait(bench.epoll, 50, &mut events).unwrap();
        for event in &events[..count] {
            let token = event.data;
            let quit_before = bench.daemon.quit_count;
            bench.server.handle_ready(token, &mut bench.daemon);
            if bench.daemon.quit_count > quit_before {
                let reason = ShutdownReason::HostQmpQuit;
                bench.server.emit(&Event::Shutdown {
                    guest: false,
                    reason,
                });
            }
        }
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
    };
    assert!(status.success(), "{status}");
    assert_eq!(bench.daemon.quit_count, 1);
}

#[test]
fn bad_snapshots_are_refused_in_qemus_words() {
    refusals(
        "blockdev-snapshot-internal-sync",
        &[
            (r#"{}"#, "Parameter 'device' is missing"),
            (r#"{"device":"disk0"}"#, "Parameter 'name' is missing"),
            (
                r#"{"device":1,"name":"a"}"#,
                "Invalid parameter type for 'device', expected: string",
            ),
            (
                r#"{"device":"disk0","name":"a","x":1}"#,
                "Parameter 'x' is unexpected",
            ),
            (
                r#"{"device":"nope","name":"a"}"#,
                "Cannot find device='nope' nor node-name='nope'",
            ),
            (
                r#"{"device":"disk0.1","name":"a"}"#,
                "Need a root block node",
            ),
            (r#"{"device":"disk0","name":""}"#, "Name is empty"),
            (
                r#"{"device":"disk0","name":"first"}"#,
                "Snapshot with name 'first' already exists on device 'disk0'",
            ),
        ],
    );
}

#[test]
fn bad_deletes_are_refused_in_qemus_words() {
    refusals(
        "blockdev-snapshot-delete-internal-sync",
        &[
            (r#"{}"#, "Parameter 'device' is missing"),
            (r#"{"device":"disk0"}"#, "Name or id must be provided"),
            (
                r#"{"device":"nope","id":"1"}"#,
                "Cannot find device='nope' nor node-name='nope'",
            ),
            (
                r#"{"device":"disk0","name":"x"}"#,
                "Snapshot with id 'null' and name 'x' does not exist on device 'disk0'",
            ),
            (
                r#"{"device":"disk0","id":"2","name":"first"}"#,
                "Snapshot with id '2' and name 'first' does not exist on device 'disk0'",
            ),
        ],
    );
}

#[test]
fn bad_transactions_are_refused_as_a_whole() {
    refusals(
        "transaction",
        &[
            (r#"{}"#, "Parameter 'actions' is missing"),
            (
                r#"{"actions":[3]}"#,
                "Invalid parameter type for 'actions[0]', expected: object",
            ),
            (
                r#"{"actions":[{"data":{}}]}"#,
                "Parameter 'actions[0].type' is missing",
            ),
            (
                r#"{"actions":[{"type":"blockdev-backup","data":{}}]}"#,
                "Parameter 'type' does not accept value 'blockdev-backup'",
            ),
            (
                concat!(
                    r#"{"actions":[{"type":"abort","data":{}},"#,
                    r#"{"type":"blockdev-snapshot-internal-sync"}]}"#
                ),
                "Parameter 'actions[1].data' is missing",
            ),
            (
                concat!(
                    r#"{"actions":[{"type":"blockdev-snapshot-internal-sync","#,
                    r#""data":{"device":"disk0"}}]}"#
                ),
                "Parameter 'actions[0].data.name' is missing",
            ),
            (
                concat!(
                    r#"{"actions":[{"type":"blockdev-snapshot-internal-sync","#,
                    r#""data":{"device":"disk0","name":"a"}},"#,
                    r#"{"type":"blockdev-snapshot-internal-sync","#,
                    r#""data":{"device":"disk0","name":"a"}}]}"#
                ),
                "Snapshot with name 'a' already exists on device 'disk0'",
            ),
            (
                concat!(
                    r#"{"actions":[{"type":"blockdev-snapshot-internal-sync","#,
                    r#""data":{"device":"disk0","name":"a"}},{"type":"abort","data":{}}]}"#
                ),
                "Transaction aborted using Abort action",
            ),
            (
                concat!(
                    r#"{"actions":[{"type":"blockdev-snapshot-internal-sync","#,
                    r#""data":{"device":"disk0","name":"a"}}],"#,
                    r#""properties":{"completion-mode":"grouped"}}"#
                ),
                "Action 'blockdev-snapshot-internal-sync' does not support transaction property \
                 completion-mode = grouped",
            ),
        ],
    );
}

#[test]
fn bad_external_snapshots_are_refused() {
    refusals(
        "blockdev-snapshot-sync",
        &[
            (r#"{}"#, "Parameter 'snapshot-file' is missing"),
            (
                r#"{"snapshot-file":"o"}"#,
                "Cannot find device='' nor node-name=''",
            ),
            (
                r#"{"device":"disk0","snapshot-file":3}"#,
                "Invalid parameter type for 'snapshot-file', expected: string",
            ),
            (
                r#"{"device":"disk0","snapshot-file":"o","x":1}"#,
                "Parameter 'x' is unexpected",
            ),
            (
                r#"{"device":"nope","snapshot-file":"o"}"#,
                "Cannot find device='nope' nor node-name=''",
            ),
            (
                r#"{"node-name":"nope","snapshot-node-name":"n","snapshot-file":"o"}"#,
                "Cannot find device='' nor node-name='nope'",
            ),
            (
                r#"{"device":"nope","node-name":"disk0","snapshot-file":"o"}"#,
                "Cannot find device='nope' nor node-name='disk0'",
            ),
            (
                r#"{"node-name":"disk0.1","snapshot-node-name":"n","snapshot-file":"o"}"#,
                "Need a root block node",
            ),
            (
                r#"{"node-name":"disk0","snapshot-file":"o"}"#,
                "New overlay node-name missing",
            ),
            (
                r#"{"device":"disk0","node-name":"disk0","snapshot-file":"o"}"#,
                "New overlay node-name missing",
            ),
            (
                r#"{"device":"disk0","snapshot-node-name":"disk0","snapshot-file":"o"}"#,
                "New overlay node-name already in use",
            ),
            (
                r#"{"device":"disk0","snapshot-node-name":"disk0.1","snapshot-file":"o"}"#,
                "New overlay node-name already in use",
            ),
            (
                r#"{"device":"disk0","snapshot-file":"o","format":"raw"}"#,
                "Parameter 'format' does not accept value 'raw': an overlay is of format qcow2",
            ),
            (
                r#"{"device":"disk0","snapshot-file":"o","mode":"copy"}"#,
                "Parameter 'mode' does not accept value 'copy'",
            ),
        ],
    );
    refusals(
        "transaction",
        &[(
            concat!(
                r#"{"actions":[{"type":"blockdev-snapshot-internal-sync","#,
                r#""data":{"device":"disk0","name":"a"}},{"type":"blockdev-snapshot-sync","#,
                r#""data":{"device":"disk0","snapshot-file":"o"}}]}"#
            ),
            "An external snapshot must be the only one of its transaction: nothing else can be \
             done to an image that becomes a backing file",
        )],
    );
}

#[test]
fn external_snapshots_are_ordered_as_they_were_meant() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    let arguments = [
        r#"{"device":"disk0","snapshot-file":"o","format":"qcow2","mode":"absolute-paths"}"#,
        r#"{"node-name":"disk0","snapshot-file":"o","snapshot-node-name":"n","mode":"existing"}"#,
    ];
    let requests = [
        format!(
            r#"{{"execute":"blockdev-snapshot-sync","arguments":{}}}"#,
            arguments[0]
        ),
        format!(
            r#"{{"execute":"transaction","arguments":{{"actions":[{{"type":"blockdev-snapshot-sync","data":{}}}]}}}}"#,
            arguments[1]
        ),
    ];
    let overlays = [(None, false), (Some("n".to_owned()), true)];
    for (request, (node_name, existing)) in requests.iter().zip(overlays) {
        assert_eq!(bench.ask(&mut client, request), [] as [Value; 0]);
        let overlay = Overlay {
            file: "o".into(),
            node_name,
            existing,
        };
        let order = Order::Snapshot(vec![SnapshotAction::External(overlay)]);
        assert_eq!(bench.daemon.orders[0].1, order);
        bench.answer(&Ok(json!({})));
        assert_eq!(client.receive(), [json!({ "return": {} })]);
    }
}

#[test]
fn a_disk_that_is_read_only_keeps_its_snapshots() {
    let mut bench = Bench::new();
    bench.daemon.read_only = true;
    let mut client = bench.negotiated();
    let refused = [error("GenericError", "Device 'disk0' is read only")];
    let requests = [
        r#"{"execute":"blockdev-snapshot-internal-sync","arguments":{"device":"disk0","name":"a"}}"#,
        concat!(
            r#"{"execute":"blockdev-snapshot-delete-internal-sync","#,
            r#""arguments":{"device":"disk0","name":"first"}}"#
        ),
        concat!(
            r#"{"execute":"blockdev-snapshot-sync","#,
            r#""arguments":{"device":"disk0","snapshot-file":"o"}}"#
        ),
    ];
    for request in requests {
        assert_eq!(bench.ask(&mut client, request), refused);
    }
}

const TAKE: &str = r#"{"execute":"blockdev-snapshot-internal-sync","arguments":{"device":"disk0","name":"a"},"id":7}"#;

impl Bench {
    /// Answers the oldest order.
    fn answer(&mut self, result: &Result<Value, CommandError>) {
        let (ticket, _) = self.daemon.orders.remove(0);
        self.server.answer(ticket, result, &mut self.daemon);
        self.run();
    }
}

#[test]
fn orders_arrive_as_they_were_meant() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    assert_eq!(
        bench.ask(
            &mut client,
            concat!(
                r#"{"execute":"transaction","arguments":{"actions":["#,
                r#"{"type":"blockdev-snapshot-internal-sync","data":{"device":"disk0","name":"a"}},"#,
                r#"{"type":"blockdev-snapshot-internal-sync","data":{"device":"disk0","name":"b"}}"#,
                r#"]}}"#
            )
        ),
        [] as [Value; 0]
    );
    let internal = |name: &str| SnapshotAction::Internal { name: name.into() };
    let order = Order::Snapshot(vec![internal("a"), internal("b")]);
    assert_eq!(bench.daemon.orders[0].1, order);
    bench.answer(&Ok(json!({})));
    assert_eq!(client.receive(), [json!({ "return": {} })]);
    bench.ask(
        &mut client,
        concat!(
            r#"{"execute":"blockdev-snapshot-delete-internal-sync","#,
            r#""arguments":{"device":"disk0","id":"1"}}"#
        ),
    );
    let selector = Selector {
        id: Some("1".into()),
        name: None,
    };
    assert_eq!(bench.daemon.orders[0].1, Order::DeleteSnapshot(selector));
    bench.answer(&Err(CommandError::generic("no luck")));
    assert_eq!(client.receive(), [error("GenericError", "no luck")]);
}

#[test]
fn replies_keep_the_order_of_the_requests_and_other_clients_do_not_wait() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    let mut other = bench.negotiated();
    let nothing: [Value; 0] = [];
    let requests = format!(r#"{TAKE}{{"execute":"query-jobs","id":8}}"#);
    assert_eq!(bench.ask(&mut client, &requests), nothing);
    client.send(r#"{"execute":"query-jobs","id":9}"#);
    let jobs = r#"{"execute":"query-jobs"}"#;
    assert_eq!(bench.ask(&mut other, jobs), [json!({ "return": [] })]);
    assert_eq!(client.receive(), nothing);
    bench.answer(&Ok(json!({})));
    assert_eq!(
        client.receive(),
        [
            json!({ "return": {}, "id": 7 }),
            json!({ "return": [], "id": 8 }),
            json!({ "return": [], "id": 9 }),
        ]
    );
}

#[test]
fn a_client_that_is_gone_before_its_reply_hurts_nobody() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    let mut other = bench.negotiated();
    bench.ask(&mut client, TAKE);
    drop(client);
    // The loop comes to rest, and the client is gone before it is answered.
    bench.run();
    assert_eq!(bench.server.sessions.len(), 1);
    bench.ask(&mut other, TAKE);
    let (ticket, _) = bench.daemon.orders[0];
    let refused = Err(CommandError::generic("for the first"));
    bench.server.answer(ticket, &refused, &mut bench.daemon);
    bench.daemon.orders.remove(0);
    bench.answer(&Ok(json!({})));
    assert_eq!(other.receive(), [json!({ "return": {}, "id": 7 })]);
}

#[test]
fn a_client_that_sends_no_more_still_gets_its_late_reply() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    client.send(TAKE);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    bench.run();
    bench.server.emit(&Event::Shutdown {
        guest: false,
        reason: ShutdownReason::HostSignal,
    });
    bench.answer(&Ok(json!({})));
    let received = client.receive();
    assert_eq!(received.len(), 2, "{received:?}");
    assert_eq!(received[1], json!({ "return": {}, "id": 7 }));
    assert!(client.is_closed());
}

#[test]
fn an_answer_counts_once_and_a_refused_order_needs_none() {
    let mut bench = Bench::new();
    let mut clients: Vec<_> = (0..=ORDERS_MAX).map(|_| bench.negotiated()).collect();
    let replies: Vec<_> = clients
        .iter_mut()
        .map(|client| bench.ask(client, TAKE))
        .collect();
    let mut refused = error("GenericError", "enough");
    refused["id"] = json!(7);
    assert_eq!(replies, [vec![], vec![], vec![refused]]);
    let (ticket, _) = bench.daemon.orders[0];
    bench.answer(&Ok(json!({})));
    bench
        .server
        .answer(ticket, &Ok(json!(1)), &mut bench.daemon);
    assert_eq!(clients[0].receive(), [json!({ "return": {}, "id": 7 })]);
}

#[test]
fn jobs_have_qemus_shape() {
    let mut bench = Bench::new();
    bench.daemon.jobs = vec![job("settle-1", JobStatus::Running)];
    let mut client = bench.negotiated();
    assert_eq!(
        bench.ask(&mut client, r#"{"execute":"query-jobs"}"#),
        [json!({ "return": [{
            "id": "settle-1", "type": "snapshot-save", "status": "running",
            "current-progress": 3, "total-progress": 8,
            "x-qblkd": { "snapshot-id": "1", "snapshot-name": "first" },
        }] })]
    );
    assert_eq!(
        bench.ask(&mut client, r#"{"execute":"query-block-jobs"}"#),
        [json!({ "return": [{
            "type": "snapshot-save", "device": "settle-1", "len": 8, "busy": true, "paused": false,
            "offset": 3, "speed": 0, "io-status": "ok", "ready": false, "status": "running",
            "auto-finalize": true, "auto-dismiss": true,
        }] })]
    );
}

#[test]
fn jobs_take_the_commands_that_suit_their_state() {
    let mut bench = Bench::new();
    bench.daemon.jobs = vec![
        job("settle-1", JobStatus::Concluded),
        job("settle-2", JobStatus::Running),
    ];
    let mut client = bench.negotiated();
    let mut ask = |command: &str, arguments: &str| {
        let request = format!(r#"{{"execute":"{command}","arguments":{arguments}}}"#);
        bench.ask(&mut client, &request).remove(0)
    };
    let done = json!({ "return": {} });
    let gone = error("GenericError", "Job not found");
    let inactive = error("DeviceNotActive", "Block job 'x' not found");
    assert_eq!(ask("job-cancel", r#"{"id":"x"}"#), gone);
    assert_eq!(ask("job-dismiss", r#"{"id":"x"}"#), gone);
    assert_eq!(ask("block-job-cancel", r#"{"device":"x"}"#), inactive);
    assert_eq!(ask("block-job-dismiss", r#"{"id":"x"}"#), inactive);
    assert_eq!(
        ask("block-job-set-speed", r#"{"device":"x","speed":1}"#),
        inactive
    );
    assert_eq!(
        ask("block-job-set-speed", r#"{"device":"settle-2","speed":-1}"#),
        error(
            "GenericError",
            "Parameter 'speed' expects a non-negative value"
        )
    );
    assert_eq!(
        ask("block-job-set-speed", r#"{"device":"settle-2","speed":5}"#),
        done
    );
    assert_eq!(ask("query-block-jobs", "{}")["return"][1]["speed"], 5);
    assert_eq!(
        ask("job-cancel", r#"{"id":"settle-2"}"#),
        error(
            "GenericError",
            "Job 'settle-2' in state 'running' cannot accept command verb 'cancel': this work is \
             needed to bring the image's reference counts up to date"
        )
    );
    assert_eq!(
        ask("job-dismiss", r#"{"id":"settle-2"}"#),
        error(
            "GenericError",
            "Job 'settle-2' in state 'running' cannot accept command verb 'dismiss'"
        )
    );
    assert_eq!(ask("job-dismiss", r#"{"id":"settle-1"}"#), done);
    assert_eq!(
        ask("query-jobs", "{}")["return"].as_array().unwrap().len(),
        1
    );
}
