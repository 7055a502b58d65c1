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
    memory: Arc<Mutex<Memory>>,
}

#[derive(Debug, Default)]
pub(crate) struct Memory {
    begun_anew: VecDeque<Instant>,
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
    pub(crate) fn may_begin_anew(&self, now: Instant) -> bool {
        let begun_anew = &mut self.memory().begun_anew;
        begun_anew.retain(|begun| now.saturating_duration_since(*begun) < WINDOW);

        let is_allowed = begun_anew.len() < LIMIT;
        if is_allowed {
            begun_anew.push_back(now);
        }

        is_allowed
    }

    pub(crate) fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
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
        assert!(
            [0, 1, 2].into_iter().all(|minutes| history.clone().may_begin_anew(after(minutes)))
        );
        assert!(!history.may_begin_anew(after(59)));
        assert!(history.may_begin_anew(after(60)));
        assert!(!history.may_begin_anew(after(60)));
    }
}
