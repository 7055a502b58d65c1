//! What `sync` did.

#![deny(missing_docs)]

use crate::{Lsn, pipeline::CycleReport};
/// What `sync` did.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct SyncReport {
    /// The number of source transactions, including those that changed no followed table.
    pub source_transactions: u64,
    /// The number of rows that the source inserted, before changes were reduced to their net
    /// effect. The rows that copies loaded do not count.
    pub inserted: u64,
    /// The number of rows that the source updated, counted in the same way.
    pub updated: u64,
    /// The number of rows that the source deleted, counted in the same way.
    pub deleted: u64,
    /// The number of TRUNCATEs of followed tables.
    pub truncated: u64,
    /// The number of cycles, including those that had nothing to apply.
    pub cycles: u64,
    /// The checkpoint at the end; 0/0 when `sync` was stopped before it had attached.
    pub checkpoint: Lsn,
    /// The position of the source's WAL that was to be reached.
    pub reached: Lsn,
    /// Tables that are paused, with their reasons.
    pub in_error: Vec<(String, String)>,
    /// Whether the caller stopped `sync` before it had caught up; another `sync` goes on from
    /// there.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        change::{Remedy, TableFailure},
        pgoutput::QualifiedName,
    };

    #[test]
    fn the_cycles_of_a_sync_add_up_and_the_last_one_says_how_far_it_came() {
        let cycle = |checkpoint| CycleReport {
            source_transactions: 1,
            inserted: 2,
            updated: 3,
            deleted: 4,
            truncated: 5,
            checkpoint: Lsn(checkpoint),
            ..CycleReport::default()
        };

        let mut report = SyncReport::default();
        report.add(&cycle(10));
        report.add(&cycle(20));

        let changes = (report.inserted, report.updated, report.deleted, report.truncated);
        assert_eq!(changes, (4, 6, 8, 10));
        let reached = (report.cycles, report.source_transactions, report.checkpoint);
        assert_eq!(reached, (2, 2, Lsn(20)));
    }

    #[test]
    fn a_table_that_is_copied_again_is_not_in_error() {
        for (remedy, is_in_error) in [
            (Remedy::Operator, true),
            (Remedy::AllowNulls, true),
            (Remedy::CopyAgain, false),
            (Remedy::CopyAltered, false),
        ] {
            let (table, reason) = (QualifiedName::new("public", "t"), "no room".to_owned());
            let paused = vec![TableFailure { oid: 1, table, reason, remedy }];
            let mut report = SyncReport::default();
            report.add(&CycleReport { paused, ..CycleReport::default() });

            let expected = is_in_error.then(|| ("public.t".to_owned(), "no room".to_owned()));
            assert_eq!(report.in_error, Vec::from_iter(expected), "{remedy:?}");
        }
    }
}
