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
use super::{
    BindError, CLIENT_COUNT_MAX, ControlServer, Event, Handler, IoErrorAction, IoOperation,
    ShutdownReason,
};

const TOKEN_BASE: u64 = 100;

#[derive(Default)]
struct Daemon {
    quit_count: usize,
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
            });
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

    fn quit(&mut self) {
        self.quit_count += 1;
    }
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
                r#"{"name":"query-blockstats"},{"name":"quit"},{"name":"qmp_capabilities"}]}"#
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
    let stats = json!({
        "rd_operations": 6, "failed_rd_operations": 1, "invalid_rd_operations": 2,
        "rd_total_time_ns": 99, "rd_bytes": 4096, "rd_merged": 0,
        "rd_latency_histogram": { "boundaries": [10, 100], "bins": [1, 2, 3] },
        "wr_operations": 0, "failed_wr_operations": 0, "invalid_wr_operations": 0,
        "wr_total_time_ns": 0, "wr_bytes": 0, "wr_merged": 0,
        "flush_operations": 0, "failed_flush_operations": 0, "invalid_flush_operations": 0,
        "flush_total_time_ns": 0,
        "unmap_operations": 0, "failed_unmap_operations": 0, "invalid_unmap_operations": 0,
        "unmap_total_time_ns": 0, "unmap_bytes": 0, "unmap_merged": 0,
        "zone_append_operations": 0, "failed_zone_append_operations": 0,
        "invalid_zone_append_operations": 0, "zone_append_total_time_ns": 0,
        "zone_append_bytes": 0, "zone_append_merged": 0,
        "wr_highest_offset": 12345, "account_invalid": false, "account_failed": false,
        "timed_stats": [],
    });
    assert_eq!(
        reply,
        [json!({ "return": [{
            "device": "disk0", "node-name": "disk0", "stats": stats,
            "x-qblkd": { "workers": [{
                "worker": 0, "metadata-cache-hits": 7, "metadata-cache-misses": 8,
                "put-table-hits": 9,
            }]},
        }]})]
    );
}

#[test]
fn blockstats_by_node_have_no_device() {
    let mut bench = Bench::new();
    let mut client = bench.negotiated();
    let request = r#"{"execute":"query-blockstats","arguments":{"query-nodes":true}}"#;
    let nodes = &bench.ask(&mut client, request)[0]["return"];
    assert_eq!(nodes[0].get("device"), None);
    assert_eq!(nodes[0]["stats"]["rd_operations"], 6);
    assert_eq!(nodes[1]["stats"]["rd_operations"], 0);
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
        "cannot listen on control socket /nonexistent/control.sock"
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
