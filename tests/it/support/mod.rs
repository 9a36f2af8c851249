//! Builders and fixtures of the integration tests; assertions live in the tests.

pub(crate) mod command;
pub(crate) mod corpus;
pub(crate) mod driver;
pub(crate) mod qemu;
pub(crate) mod qmp;
pub(crate) mod server;
pub(crate) mod terminal;

use std::error::Error;
use std::io::Write;
use std::num::NonZero;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Why one case of a test failed.
pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// The binary under test.
pub(crate) const QBLKD: &str = env!("CARGO_BIN_EXE_qblkd");

/// Fails a case with a sentence, unless the condition holds.
pub(crate) fn ensure(condition: bool, otherwise: impl FnOnce() -> String) -> Result<(), Failure> {
    if condition {
        Ok(())
    } else {
        Err(otherwise().into())
    }
}

/// Tells whether all `tools` can be run. If not, says so on the real stderr, which the test
/// harness does not capture; with `QBLKD_TEST_REQUIRE=1` a missing tool is a failure.
pub(crate) fn have_tools(test: &str, tools: &[&str]) -> bool {
    let missing: Vec<_> = tools
        .iter()
        .filter(|tool| !command::is_installed(tool))
        .collect();
    if missing.is_empty() {
        return true;
    }
    let required = std::env::var_os("QBLKD_TEST_REQUIRE").is_some_and(|value| value == "1");
    assert!(
        !required,
        "{test} needs {missing:?}, and QBLKD_TEST_REQUIRE is set"
    );
    skip(test, &format!("{missing:?} not installed"));
    false
}

/// Says on the real stderr that a test is skipped, and why.
pub(crate) fn skip(test: &str, why: &str) {
    writeln!(std::io::stderr(), "SKIPPED {test}: {why}").ok();
}

/// Runs `check` on each case, on all cores, and reports every case that fails, by its name.
pub(crate) fn for_each_case<T: Sync>(
    cases: &[T],
    name: impl Fn(&T) -> &str + Sync,
    check: impl Fn(&T) -> Result<(), Failure> + Sync,
) {
    assert!(!cases.is_empty(), "no cases: nothing would be tested");
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(failure) = check(case) {
                        let line = format!("{}: {failure}", name(case));
                        failures.lock().unwrap().push(line);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    let (failed, total) = (failures.len(), cases.len());
    assert!(
        failures.is_empty(),
        "{failed} of {total} failed:\n{}",
        failures.join("\n")
    );
}
