//! The integration tests: only the public surface (the binary, its sockets, real files).
//!
//! One test binary, since each further one costs a link. Where a tool is missing, a test prints
//! SKIPPED and passes, unless `QBLKD_TEST_REQUIRE=1` asks for a failure instead.
//!
//! `cfg(test)` on the modules tells clippy that helper functions are test code too, which may unwrap.

// The client that also makes the benchmarks: tests see what a guest sees.
#[path = "../../examples/blkclient/kit/mod.rs"]
#[expect(dead_code, reason = "the tests use a part of what the client can do")]
mod kit;

#[cfg(test)]
mod bench;
#[cfg(test)]
mod chaos;
#[cfg(test)]
mod cli;
#[cfg(test)]
mod control;
#[cfg(test)]
mod crash;
#[cfg(test)]
mod docs;
#[cfg(test)]
mod external;
#[cfg(test)]
mod external_races;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod referee;
#[cfg(test)]
mod resources;
#[cfg(test)]
mod snapshot;
#[cfg(test)]
mod support;
#[cfg(test)]
mod tidy;
#[cfg(test)]
mod vhost_user;
