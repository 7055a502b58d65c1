//! What this process has done about slots that could no longer serve the copy.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Starting over this number of times within [`WINDOW`] does not help: something takes the slot
/// away.
pub(crate) const LIMIT: usize = 3;

const WINDOW: Duration = Duration::from_secs(3600);

/// How often every table was copied again because a slot was lost, and what the server said.
#[derive(Debug, Clone, Default)]
pub struct SlotHistory {
    memory: Arc<Mutex<SlotFindings>>,
}

#[derive(Debug, Default)]
pub(crate) struct SlotFindings {
    resyncs: VecDeque<Instant>,
    /// The server said that WAL is gone which the slot should have kept.
    pub(crate) has_no_wal: bool,
}

impl SlotHistory {
    /// Returns whether the stream has found that WAL is gone which the catalogs take for kept.
    /// Returns true only once.
    pub fn take_has_no_wal(&self) -> bool {
        std::mem::take(&mut self.memory().has_no_wal)
    }

    /// Returns whether the pipeline may start over with another slot, and counts it. Returns
    /// `false` when it has done so too often within the window.
    pub(crate) fn may_resync(&self, now: Instant) -> bool {
        let resyncs = &mut self.memory().resyncs;
        resyncs.retain(|begun| now.saturating_duration_since(*begun) < WINDOW);

        let is_allowed = resyncs.len() < LIMIT;
        if is_allowed {
            resyncs.push_back(now);
        }

        is_allowed
    }

    pub(crate) fn memory(&self) -> std::sync::MutexGuard<'_, SlotFindings> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_copied_again_three_times_an_hour_at_most() {
        let history = SlotHistory::default();
        let begin = Instant::now();
        let after = |minutes: u64| begin + Duration::from_secs(60 * minutes);
        assert!([0, 1, 2].into_iter().all(|minutes| history.clone().may_resync(after(minutes))));
        assert!(!history.may_resync(after(59)));
        assert!(history.may_resync(after(60)));
        assert!(!history.may_resync(after(60)));
    }
}
