//! How many statements run at once: fewer than the machine has cores, so that the replicator always
//! finds one.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

/// The turns that statements wait for.
pub struct Turns {
    free: Mutex<usize>,
    given_back: Condvar,
}

/// The right to run a statement, until it is dropped.
pub struct Turn(Arc<Turns>);

impl Turns {
    pub fn new(count: usize) -> Arc<Self> {
        Arc::new(Self { free: Mutex::new(count.max(1)), given_back: Condvar::new() })
    }

    /// Waits for a turn. Returns `None` when the statement has ended meanwhile.
    pub fn take(self: &Arc<Self>, is_over: impl Fn() -> bool) -> Option<Turn> {
        const STEP: Duration = Duration::from_millis(50);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            if is_over() {
                return None;
            }
            let waited = self.given_back.wait_timeout(free, STEP);
            free = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *free -= 1;
        Some(Turn(Arc::clone(self)))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.given_back.notify_one();
    }
}
