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
    RelationAnswer { at: Instant, waiting: BTreeSet<u32> },
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
        self.unseen.retain(|xid| !later.snapshot.sees(*xid));
        if self.unseen.is_empty() {
            return Ok(());
        }

        let is_long_ago = |then: Instant| later.read_at.duration_since(then) >= VISIBLE_AFTER_FLUSH;

        match &self.doubt {
            Doubt::Unflushed => {
                if catalogs.has_flushed(self.at).await? {
                    self.doubt = Doubt::Flushed(Instant::now());
                }
                return Ok(());
            }
            Doubt::Flushed(since) if is_long_ago(*since) => {}
            Doubt::RelationAnswer { at, waiting } if is_long_ago(*at) => {
                self.unseen.retain(|xid| waiting.contains(xid))
            }
            Doubt::Flushed(_) | Doubt::RelationAnswer { .. } => return Ok(()),
        }

        if !self.unseen.is_empty() {
            let waiting = catalogs.awaiting_standbys(&self.unseen).await?;
            self.doubt = Doubt::RelationAnswer { at: Instant::now(), waiting };
        }

        Ok(())
    }
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
        if looked.reach > passed && age >= looked.patience {
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
