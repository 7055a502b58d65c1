//! When rows last changed.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};
/// When rows last changed in the target, and whether the target was tidied since. Shared by the
/// session, which writes, and the task that tidies.
#[derive(Debug, Clone, Default)]
pub struct IdleTimer(Arc<std::sync::Mutex<Option<Instant>>>);

impl IdleTimer {
    /// Records that rows have changed.
    pub fn touch(&self) {
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(Instant::now());
    }

    /// Returns whether rows have changed within this time.
    pub fn is_busy(&self, within: Duration) -> bool {
        let changed_at = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        changed_at.is_some_and(|at| at.elapsed() < within)
    }

    /// Returns whether nothing has changed for the time `calm` since the last change. Returns true
    /// only once per change.
    pub fn take_idle(&self, calm: Duration) -> bool {
        let mut changed_at = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        changed_at.take_if(|at| at.elapsed() >= calm).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calm_is_noticed_once_after_each_change() {
        let activity = IdleTimer::default();
        assert!(!activity.take_idle(Duration::ZERO));
        assert!(!activity.is_busy(Duration::from_secs(60)));
        activity.touch();
        assert!(activity.is_busy(Duration::from_secs(60)));
        assert!(!activity.is_busy(Duration::ZERO));
        assert!(!activity.take_idle(Duration::from_secs(60)));
        assert!(activity.take_idle(Duration::ZERO));
        assert!(!activity.take_idle(Duration::ZERO));
    }
}
