//! How far the copy is the source's equal, with what the stream never mentions: `settled_lsn` of `rhei status --json`.
//!
//! A checkpoint says that every row change before it is in the copy. It does not say that a rewrite, a renamed label or
//! a new table has been noticed, since only a look at the catalogs finds those. A position is settled once all of this
//! holds: a look began after the position was read, and showed nothing that is not acted upon; the stream has passed the
//! position; what the look led to is applied; and no table waits for its copy or is being copied.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::{EngineError, SyncEngine, copying::Copies};
use crate::{Lsn, checkpoint::reachable_target, source::CdcConsumer, target::OlapEngine};

/// How long the stream has to come to a position before the server is asked whether it can at all; twice as long each
/// time.
const FIRST_PATIENCE: Duration = Duration::from_millis(100);

/// The settled position, which never falls. Shared by the session, which moves it on, and `status`.
#[derive(Debug, Clone, Default)]
pub struct SettledLsn(Arc<AtomicU64>);

impl SettledLsn {
    fn raise(&self, lsn: Lsn) {
        self.0.fetch_max(lsn.0, Ordering::Relaxed);
    }

    /// None: nothing is settled since this process began.
    pub fn get(&self) -> Option<Lsn> {
        Some(Lsn(self.0.load(Ordering::Relaxed))).filter(|lsn| *lsn > Lsn::ZERO)
    }
}

/// A position of the source's WAL, read before a look that left nothing to be done.
#[derive(Debug)]
pub struct Began {
    at: Lsn,
    read_at: Instant,
    /// How far the stream has to come: no commit lies between this and the position.
    reach: Lsn,
    patience: Duration,
}

impl Began {
    pub(super) fn new(at: Lsn, read_at: Instant) -> Self {
        Self { at, read_at, reach: reachable_target(at), patience: FIRST_PATIENCE }
    }
}

impl<C: CdcConsumer, T: OlapEngine + 'static> SyncEngine<C, T> {
    /// A position waits for the stream to pass it.
    pub fn is_settling(&self) -> bool {
        self.looked.is_some()
    }

    /// Publishes the position of the last look that left nothing to be done, once everything before it is in the copy.
    /// Between two cycles only.
    pub async fn publish_settled(&mut self, copies: &Copies<T>, settled: &SettledLsn) -> Result<(), EngineError> {
        // The next cycle brings what the look led to, or a copy does.
        if self.has_shapes || self.is_copying() || !copies.has_all() {
            return Ok(());
        }
        // Every batch that was taken is applied by now, so the copy holds all that came before the end of the last one.
        let passed = self.consumer.position().decoded.max(self.checkpoint.lsn);
        let (Some(looked), Some(catalogs)) = (&mut self.looked, &self.catalogs) else { return Ok(()) };
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
