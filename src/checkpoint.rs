//! The meaning of a checkpoint. The module is pure, and holds the proof that no change is lost and
//! no change is applied twice.
//!
//! The checkpoint is the `end_lsn` of the last source transaction whose effect is in the target,
//! and it is written in the target transaction that holds that effect. Then:
//!
//! 1. The target equals f(all source transactions with `commit_lsn < checkpoint`). A target
//!    transaction changes the left side and the checkpoint together or not at all.
//! 2. Replication starts at the checkpoint. The server sends a transaction again iff `commit_lsn >=
//!    start`, so with `start = end_lsn` of the last applied one it is not sent again, and none
//!    after it is left out. `end_lsn` of one transaction may equal `commit_lsn` of the next, so the
//!    test must be strict (trap 1): [`already_applied`].
//! 3. What is acknowledged is durable: only a [`DurableLsn`] can be acknowledged, and only a
//!    returned target commit makes one (trap 3). So `confirmed_flush_lsn <= checkpoint` always, the
//!    server keeps all that we still need, and a slot that is ahead of the checkpoint proves that
//!    this copy is older than the slot (trap 2).

#![deny(missing_docs)]

use crate::Lsn;

/// The position of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// The `end_lsn` of the last applied source transaction, or a later position up to which no
    /// change concerns rhei.
    pub lsn: Lsn,
    /// The commit time of the last applied source transaction, in microseconds since 2000-01-01
    /// UTC.
    pub commit_time_us: Option<i64>,
}

/// A checkpoint whose target commit has returned. No other position may be acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DurableLsn(Lsn);

impl DurableLsn {
    /// Makes a durable LSN. The target calls this after COMMIT returned, and when it reads a
    /// checkpoint back from the file.
    pub(crate) fn committed(lsn: Lsn) -> Self {
        Self(lsn)
    }

    /// Returns the position itself, without the proof that it is durable.
    pub fn lsn(self) -> Lsn {
        self.0
    }
}

/// Returns whether a source transaction is in the target already. The test is strict: see the head
/// of this file.
pub fn already_applied(commit_lsn: Lsn, checkpoint: Lsn) -> bool {
    commit_lsn < checkpoint
}

/// Returns the position that `sync` must reach to have seen every transaction committed before
/// `insert_lsn` was read.
///
/// Right after a WAL page header no record has begun, and the server then reports the end of the
/// WAL it sent as the start of that page. Such a position is moved back to the page start,
/// otherwise `sync` would wait for WAL that no session writes.
pub fn reachable_target(insert_lsn: Lsn) -> Lsn {
    const PAGE_BYTES: u64 = 8192;
    const HEADER_BYTES: [u64; 2] = [24, 40];
    let in_page = insert_lsn.0 % PAGE_BYTES;
    if HEADER_BYTES.contains(&in_page) { Lsn(insert_lsn.0 - in_page) } else { insert_lsn }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Trap 1: `end_lsn` of one transaction equals `commit_lsn` of the next for back-to-back
    /// commits.
    #[test]
    fn the_transaction_right_after_the_checkpoint_is_not_skipped() {
        let end_of_first = Lsn(0x2C1_B560);
        let commit_of_second = end_of_first;
        assert!(!already_applied(commit_of_second, end_of_first));
        assert!(already_applied(Lsn(end_of_first.0 - 1), end_of_first));
    }

    #[test]
    fn a_target_behind_a_page_header_is_taken_back_to_the_page_start() {
        assert_eq!(reachable_target(Lsn(0x300_0028)), Lsn(0x300_0000));
        assert_eq!(reachable_target(Lsn(0x300_2018)), Lsn(0x300_2000));
        assert_eq!(reachable_target(Lsn(0x300_2020)), Lsn(0x300_2020));
    }
}
