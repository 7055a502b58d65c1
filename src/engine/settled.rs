//! How far the copy equals the source, also in what the stream never mentions: `settled_lsn` of
//! `rhei status --json`.
//!
//! A checkpoint says that every row change before it is in the copy. It does not say that a
//! rewrite, a renamed label or a new table has been noticed, since only a look at the catalogs
//! finds those. A position is settled once all of this holds: a look began after the position was
//! read, and showed nothing that is not acted upon; no transaction has its commit record before the
//! position and was invisible to that look; the stream has passed the position; the changes that
//! the look led to are applied; and no table waits for its copy or is being copied.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::Instant;

use super::{SyncEngine, copies::CopyScheduler, schema::CatalogWatch};
use crate::{
    Lsn,
    change::xids::XidSnapshot,
    checkpoint::reachable_target,
    olap::OlapEngine,
    pipeline::{EngineError, settled::SettledLsn},
    source::{CdcConsumer, catalog::VISIBLE_AFTER_FLUSH},
};

/// How long the stream has to reach a position before the server is asked whether the stream can
/// reach it at all; twice as long each time.
const FIRST_PATIENCE: Duration = Duration::from_millis(100);

/// A position of the source's WAL, read before a look that left nothing to do.
#[derive(Debug)]
pub struct Began {
    at: Lsn,
    read_at: Instant,
    /// How far the stream has to come: no commit lies between `reach` and the position.
    reach: Lsn,
    patience: Duration,
    /// Transactions that the look did not see and that may have their commit record before the
    /// position: a commit is written, flushed, and confirmed by synchronous standbys before it
    /// becomes visible.
    unseen: BTreeSet<u32>,
    /// The transactions that the look sees.
    snapshot: XidSnapshot,
    doubt: Doubt,
}

/// What is known of transactions that stay invisible: whether their commit record is before the
/// position.
#[derive(Debug)]
enum Doubt {
    /// The transactions may be flushing their commit records.
    Unflushed,
    /// All WAL before the position was flushed by this time.
    Flushed(Instant),
    /// The time at which the server was asked which of the transactions wait for synchronous
    /// standbys, long after the flush, and those that may wait. The others become visible soon, or
    /// have no commit record before the position.
    Answered { at: Instant, waiting: BTreeSet<u32> },
}

impl Began {
    /// Creates a position. `xids` are the transactions that were in progress after the position was
    /// read, and before the look; `snapshot` is what the look sees.
    pub(super) fn new(
        at: Lsn,
        read_at: Instant,
        xids: BTreeSet<u32>,
        snapshot: XidSnapshot,
    ) -> Self {
        Self {
            at,
            read_at,
            reach: reachable_target(at),
            patience: FIRST_PATIENCE,
            unseen: xids.into_iter().filter(|xid| !snapshot.sees(*xid)).collect(),
            snapshot,
            doubt: Doubt::Unflushed,
        }
    }

    /// Returns the snapshot of the look.
    pub(super) fn snapshot(&self) -> &XidSnapshot {
        &self.snapshot
    }

    /// Takes notice of a later look that found nothing new: the later look saw the transactions
    /// that have ended since.
    pub(super) async fn confirm(
        &mut self,
        later: &Self,
        catalogs: &CatalogWatch,
    ) -> Result<(), EngineError> {
        match self.question_after(later) {
            Some(NextQuestion::HasFlushed) => {
                let has_flushed = catalogs.has_flushed(self.at).await?;
                if has_flushed {
                    self.doubt = Doubt::Flushed(Instant::now());
                }
            }
            Some(NextQuestion::AwaitingStandbys) => {
                let waiting = catalogs.awaiting_standbys(&self.unseen).await?;
                self.doubt = Doubt::Answered { at: Instant::now(), waiting };
            }
            None => {}
        }

        Ok(())
    }

    /// Gives up the transactions that a later look saw, or that have no commit record before the
    /// position. Returns what is to be asked about the others, if it is time to ask.
    fn question_after(&mut self, later: &Self) -> Option<NextQuestion> {
        self.unseen.retain(|xid| !later.snapshot.sees(*xid));
        if self.unseen.is_empty() {
            return None;
        }

        let is_long_ago = |then: Instant| later.read_at.duration_since(then) >= VISIBLE_AFTER_FLUSH;

        match &self.doubt {
            Doubt::Unflushed => return Some(NextQuestion::HasFlushed),
            Doubt::Flushed(since) if is_long_ago(*since) => {}
            Doubt::Answered { at, waiting } if is_long_ago(*at) => {
                self.unseen.retain(|xid| waiting.contains(xid))
            }
            Doubt::Flushed(_) | Doubt::Answered { .. } => return None,
        }

        (!self.unseen.is_empty()).then_some(NextQuestion::AwaitingStandbys)
    }

    /// Returns whether the stream, which has passed `passed`, has had long enough to come as far as
    /// the position, `age` after the position was read.
    fn is_patience_over(&self, passed: Lsn, age: Duration) -> bool {
        self.reach > passed && age >= self.patience
    }
}

/// A question to the server about transactions that stay invisible.
#[derive(Debug, PartialEq, Eq)]
enum NextQuestion {
    /// Whether all WAL before the position is flushed.
    HasFlushed,
    /// Which of the transactions wait for synchronous standbys.
    AwaitingStandbys,
}

impl<C: CdcConsumer, T: OlapEngine + 'static> SyncEngine<C, T> {
    /// Returns whether a position waits for the stream to pass it.
    pub fn is_settling(&self) -> bool {
        self.looked.as_ref().is_some_and(|looked| looked.unseen.is_empty())
    }

    /// Publishes the position of the last look that left nothing to do, once everything before the
    /// position is in the copy. Between two cycles only.
    pub async fn publish_settled(
        &mut self,
        copies: &CopyScheduler<T>,
        settled: &SettledLsn,
    ) -> Result<(), EngineError> {
        // The next cycle or a copy brings what the look led to.
        if self.has_shapes || self.is_copying() || !copies.has_all() {
            return Ok(());
        }

        // Every batch that was taken is applied by now, so the copy holds all that came before the
        // end of the last batch.
        let passed = self.consumer.position().decoded.max(self.checkpoint.lsn);
        let (Some(looked), Some(catalogs)) = (&mut self.looked, &self.catalogs) else {
            return Ok(());
        };

        // The server is asked how far the stream has to come only when nothing before the position
        // can be flushed later.
        if !looked.unseen.is_empty() {
            return Ok(());
        }

        let age = looked.read_at.elapsed();
        if looked.is_patience_over(passed, age) {
            looked.reach = catalogs.flushed(looked.reach, age).await?;
            looked.patience = age * 2;
        }

        if looked.reach <= passed {
            settled.raise(looked.at);
            self.looked = None;
        }

        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = VISIBLE_AFTER_FLUSH;

    fn began(at: u64, xids: &[u32], snapshot: &str) -> Began {
        let snapshot = XidSnapshot::parse(snapshot).unwrap();
        Began::new(Lsn(at), Instant::now(), xids.iter().copied().collect(), snapshot)
    }

    fn unseen(began: &Began) -> Vec<u32> {
        began.unseen.iter().copied().collect()
    }

    /// Returns a later look that still does not see transaction 100, this long after `then`.
    fn look_after(then: Instant, wait: Duration) -> Began {
        Began { read_at: then + wait, ..began(1, &[], "100:101:100") }
    }

    #[test]
    fn a_position_waits_only_for_transactions_that_the_look_missed() {
        let began = began(1, &[98, 100, 101, 105], "100:103:100,101");
        assert_eq!(unseen(&began), [100, 101, 105]);
    }

    #[test]
    fn nothing_is_asked_once_a_later_look_sees_every_transaction() {
        let mut began = began(1, &[100, 101], "100:102:100,101");
        let one_left = self::began(1, &[], "101:103:101");
        assert_eq!(began.question_after(&one_left), Some(NextQuestion::HasFlushed));
        assert_eq!(unseen(&began), [101]);

        let none_left = self::began(1, &[], "103:103:");
        assert_eq!(began.question_after(&none_left), None);
        assert!(unseen(&began).is_empty());
    }

    #[test]
    fn standbys_are_asked_about_a_full_second_after_the_flush() {
        let flushed = Instant::now();
        for (wait, expected) in [
            (Duration::ZERO, None),
            (SECOND - Duration::from_millis(1), None),
            (SECOND, Some(NextQuestion::AwaitingStandbys)),
        ] {
            let began = began(1, &[100], "100:101:100");
            let mut began = Began { doubt: Doubt::Flushed(flushed), ..began };
            let asked = began.question_after(&look_after(flushed, wait));
            assert_eq!(asked, expected, "{wait:?} after the flush");
            assert_eq!(unseen(&began), [100], "{wait:?} after the flush");
        }
    }

    #[test]
    fn transactions_that_wait_for_no_standby_are_given_up_a_second_after_the_answer() {
        let at = Instant::now();
        for (name, waiting, wait, left, expected) in [
            ("just answered", vec![], Duration::ZERO, vec![100], None),
            ("none waits", vec![], SECOND, vec![], None),
            ("another one waits", vec![7], SECOND, vec![], None),
            ("it waits", vec![100], SECOND, vec![100], Some(NextQuestion::AwaitingStandbys)),
        ] {
            let waiting = waiting.into_iter().collect();
            let doubt = Doubt::Answered { at, waiting };
            let mut began = Began { doubt, ..began(1, &[100], "100:101:100") };
            assert_eq!(began.question_after(&look_after(at, wait)), expected, "{name}");
            assert_eq!(unseen(&began), left, "{name}");
        }
    }

    #[test]
    fn the_server_is_asked_how_far_the_stream_can_come_when_the_stream_stays_behind() {
        let began = began(10_000, &[], "1:1:");
        let millis = Duration::from_millis;

        for (name, passed, age, expected) in [
            ("it has just begun", 9000, millis(0), false),
            ("it may still come", 9000, millis(99), false),
            ("it had its time", 9000, millis(100), true),
            ("it is there", 10_000, millis(100), false),
            ("it is past the position", 11_000, millis(5000), false),
        ] {
            assert_eq!(began.is_patience_over(Lsn(passed), age), expected, "{name}");
        }
    }
}
