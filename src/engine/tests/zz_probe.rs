use super::referee::storage_at;
use crate::engine::*;
use crate::storage::{FileId, block_on};
#[test]
fn probe() {
    let Some(path) = std::env::var_os("PERF_IMAGE") else {
        return;
    };
    let storage = storage_at(std::path::Path::new(&path));
    let specs = [LayerSpec {
        file: FileId(0),
        format: LayerFormat::Qcow2,
    }];
    let image = block_on(Image::open(&storage, &specs, &OpenOptions::default())).expect("open");
    let w = image.worker(storage);
    let run = |what: &str| {
        let start = std::time::Instant::now();
        let (mut steps, mut longest, mut bytes) = (0, std::time::Duration::ZERO, 0);
        let mut slow = 0;
        loop {
            let at = std::time::Instant::now();
            let step = block_on(w.background_step()).expect("step");
            longest = longest.max(at.elapsed());
            if at.elapsed().as_millis() > 10 {
                slow += 1;
            }
            steps += 1;
            match step {
                Step::Idle => break,
                Step::Progress { bytes: b } => bytes += b,
                other => println!("  {:?} {other:?}", start.elapsed()),
            }
        }
        println!(
            "{what}: {:?}, {steps} steps, longest {longest:?}, {slow} over 10 ms, {bytes} bytes",
            start.elapsed()
        );
    };
    for round in 0..2 {
        let start = std::time::Instant::now();
        block_on(w.create_snapshots(&[NewSnapshot {
            name: format!("s{round}"),
            date_sec: 0,
            date_nsec: 0,
            vm_clock_nsec: 0,
        }]))
        .expect("create");
        println!("create {:?}", start.elapsed());
        run("settle");
    }
    for round in 0..2 {
        let start = std::time::Instant::now();
        block_on(w.delete_snapshot(&Selector {
            id: None,
            name: Some(format!("s{round}")),
        }))
        .expect("delete");
        println!("delete {:?}", start.elapsed());
        run("delete");
    }
    block_on(w.close()).expect("close");
}
