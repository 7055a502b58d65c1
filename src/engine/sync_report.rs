//! What `sync` did.

use crate::{Lsn, pipeline::CycleReport};
/// What `sync` did.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct SyncReport {
    pub source_transactions: u64,
    pub inserted: u64,
    pub updated: u64,
    pub deleted: u64,
    pub truncated: u64,
    pub cycles: u64,
    pub checkpoint: Lsn,
    /// The position of the source's WAL that was to be reached.
    pub reached: Lsn,
    /// Tables that are paused, with their reasons.
    pub in_error: Vec<(String, String)>,
    pub is_stopped: bool,
}

impl SyncReport {
    pub(super) fn add(&mut self, cycle: &CycleReport) {
        self.source_transactions += cycle.source_transactions;
        self.inserted += cycle.inserted;
        self.updated += cycle.updated;
        self.deleted += cycle.deleted;
        self.truncated += cycle.truncated;
        self.cycles += 1;
        self.checkpoint = cycle.checkpoint;

        for failure in cycle.paused.iter().filter(|failure| !failure.remedy.is_copy()) {
            self.in_error.push((failure.table.to_string(), failure.reason.clone()));
        }
    }
}
