//! Places where a test makes rhei die, stumble or wait, as a crash, a bug or a slow disk would:
//! between any two steps that a crash can part.
//!
//! Builds without the feature `failpoints` of the crate `fail`, which only tests and benchmarks ask
//! for, contain none of this.

/// Every place, in the order in which a first copy and its stream come by.
pub const ALL: [&str; 29] = [
    "publication.created",
    "slot.intended",
    "slot.created",
    "slot.recorded",
    "stream.started",
    "copy.snapshot",
    "copy.planned",
    "copy.adopted",
    "chunk.loading",
    "chunk.loaded",
    "copy.loaded",
    "copy.finished",
    "merge.step",
    "merge.merged",
    "merge.swapping",
    "merge.live",
    "stream.received",
    "spool.committed",
    "apply.reshaped",
    "apply.part",
    "apply.committing",
    "apply.committed",
    "feedback.sending",
    "feedback.sent",
    "tidy.begun",
    "tidy.done",
    "compact.written",
    "compact.closed",
    "compact.renamed",
];

/// Places that only some files come by.
pub const OTHERS: [&str; 5] = [
    "migration.written",
    "verify.standing",
    "repair.committing",
    "publish.written",
    "publish.renamed",
];

/// The places of the upkeep of a lake.
pub const UPKEEP: [&str; 6] = [
    "upkeep.flushed",
    "upkeep.rewritten",
    "upkeep.merged",
    "upkeep.expired",
    "upkeep.cleaned",
    "upkeep.ended",
];

/// The variable of the environment that says what happens where.
pub const VARIABLE: &str = "FAILPOINTS";

/// Reads what the environment ([`VARIABLE`]) wants to happen where. Once, at the start of the
/// process.
pub fn begin() {
    if fail::has_failpoints() {
        // Kept until the process ends.
        std::mem::forget(fail::FailScenario::setup());
    }
}

/// Comes by a place: `return` there ends the process at once, other actions are those of the crate
/// `fail`.
pub fn reached(place: &'static str) {
    debug_assert!([ALL.as_slice(), &OTHERS, &UPKEEP].iter().any(|places| places.contains(&place)));
    fail::fail_point!(place, |_| std::process::abort());
}

/// Whether DuckDB is to refuse something here: a value of the table (`return(public.orders)`). What
/// it refuses by itself is judged before it comes so far, as far as anybody knows.
pub fn refuses(place: &'static str, what: &impl std::fmt::Display) -> bool {
    fail::fail_point!(place, |named| named.is_some_and(|named| named == what.to_string()));
    // Not read in a plain build.
    let _ = (place, what);
    false
}
