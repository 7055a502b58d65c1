//! Keeps readers out of the file while it is closed, and ends those that hold it up.
//!
//! DuckDB can close a file only when no connection has a transaction in it. A session enters for a
//! statement or a transaction. The writer that has to close the file waits a few seconds for the
//! sessions inside, and then ends their transactions.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How long those who read may go on before they are ended, and how long it may take them to end.
const GRACE: Duration = Duration::from_secs(5);
const TIME_TO_END: Duration = Duration::from_secs(30);
const STEP: Duration = Duration::from_millis(50);

/// Ends what a reader does. Called again and again until its pass is dropped.
type EndReader = Box<dyn Fn() + Send + Sync>;

/// Counts the sessions that read the file, and keeps them out while the writer has it closed.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    is_closed: bool,
    next: u64,
    readers: BTreeMap<u64, Arc<EndReader>>,
}

/// The right to read the file, until it is dropped.
pub struct Pass {
    gate: Arc<Gate>,
    number: u64,
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.lock().readers.remove(&self.number);
        self.gate.changed.notify_all();
    }
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a reader in, who waits while the file is closed. Returns `None` when the file is still
    /// closed after this time.
    pub fn enter(self: &Arc<Self>, within: Duration, end: EndReader) -> Option<Pass> {
        let since = Instant::now();
        let mut state = self.lock();
        while state.is_closed {
            let left = within.checked_sub(since.elapsed())?;
            let waited = self.changed.wait_timeout(state, left.max(Duration::from_millis(1)));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }

        state.next += 1;
        let number = state.next;
        state.readers.insert(number, Arc::new(end));
        Some(Pass { gate: Arc::clone(self), number })
    }

    /// Keeps new readers out, and waits until the last one has left. Returns `false`, with the gate
    /// open, when one of them does not end.
    pub(super) fn close(&self) -> bool {
        let since = Instant::now();
        let mut state = self.lock();
        state.is_closed = true;

        while !state.readers.is_empty() {
            if since.elapsed() > GRACE + TIME_TO_END {
                state.is_closed = false;
                self.changed.notify_all();
                return false;
            }
            if since.elapsed() > GRACE {
                let readers: Vec<_> = state.readers.values().cloned().collect();
                drop(state);
                readers.iter().for_each(|end| end());
                state = self.lock();
            }
            state =
                self.changed.wait_timeout(state, STEP).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Lets readers in again.
    pub(super) fn open(&self) {
        self.lock().is_closed = false;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_closed_gate_keeps_readers_out_until_it_opens() {
        let gate = Arc::new(Gate::default());
        assert!(gate.close());
        assert!(gate.enter(Duration::from_millis(5), Box::new(|| {})).is_none());
        gate.open();
        assert!(gate.enter(Duration::ZERO, Box::new(|| {})).is_some());
    }

    #[test]
    fn a_reader_that_stays_is_ended() {
        let gate = Arc::new(Gate::default());
        let was_ended = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&was_ended);
        let pass =
            gate.enter(Duration::ZERO, Box::new(move || seen.store(true, Ordering::Relaxed)));

        std::thread::scope(|scope| {
            scope.spawn(|| assert!(gate.close()));
            while !was_ended.load(Ordering::Relaxed) {
                std::thread::sleep(STEP);
            }
            drop(pass);
        });
    }
}
