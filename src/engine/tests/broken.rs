//! One rule out of force, and whether a test notices.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::support::Violation;
use crate::engine::order::{Rule, break_rule};

/// Puts the rule in force again, whatever happens.
pub(super) struct Broken;

impl Broken {
    pub(super) fn new(rule: Rule) -> Self {
        break_rule(Some(rule));
        Self
    }
}

impl Drop for Broken {
    fn drop(&mut self) {
        break_rule(None);
    }
}

/// A panic of the engine's own assertions counts as noticing.
pub(super) fn notices(check: impl FnOnce() -> Result<(), Violation>) -> Option<String> {
    match catch_unwind(AssertUnwindSafe(check)) {
        Ok(Ok(())) => None,
        Ok(Err(violation)) => Some(violation.to_string()),
        Err(panic) => Some(format!("panic: {:?}", panic.downcast_ref::<String>())),
    }
}
