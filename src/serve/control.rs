//! What ends a statement from outside: a client that cancels it, its timeout, the end of the
//! session, a file that has to be closed.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::error::SqlError;
use crate::olap::Interrupter;

/// The statement that a session runs, for those who may end it.
pub struct Control {
    interrupter: Interrupter,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The number of the statement that runs.
    running: Option<u64>,
    /// The thread is in a step that must not be interrupted: a transaction begins or ends.
    is_shielded: bool,
    /// The time that the statement still has; it stands while the statement waits for its client.
    left: Option<Duration>,
    since: Option<Instant>,
    ended: Option<SqlError>,
    /// Since when a transaction is open and nothing runs.
    idle_since: Option<Instant>,
    /// Since when a transaction is open, also that of a single statement.
    open_since: Option<Instant>,
    is_in_transaction: bool,
}

/// What a session has open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    Nothing,
    /// The transaction of one statement.
    Statement,
    /// A transaction that the client has begun.
    Transaction,
}

/// What a session has been doing, for how long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ages {
    /// The time since a transaction is open in which nothing runs.
    pub idle: Option<Duration>,
    /// The time since a transaction is open.
    pub open: Option<Duration>,
}

impl Control {
    pub fn new(interrupter: Interrupter) -> Self {
        Self { interrupter, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that a statement begins, which may run for this time.
    pub fn begin(&self, number: u64, within: Option<Duration>) {
        let mut state = self.lock();
        *state = State {
            running: Some(number),
            left: within,
            since: Some(Instant::now()),
            open_since: state.open_since,
            is_in_transaction: state.is_in_transaction,
            ..State::default()
        };
    }

    /// Records what is open from now on.
    pub fn set_open(&self, open: Open) {
        let mut state = self.lock();
        state.open_since = (open != Open::Nothing).then(Instant::now);
        state.is_in_transaction = open == Open::Transaction;
    }

    /// Returns whether the client has begun a transaction. DuckDB ends the whole of it when a
    /// statement of it is interrupted.
    pub fn is_in_transaction(&self) -> bool {
        self.lock().is_in_transaction
    }

    /// Does a step that no interrupt may hit.
    pub fn shielded<R>(&self, step: impl FnOnce() -> R) -> R {
        self.lock().is_shielded = true;
        let done = step();
        self.lock().is_shielded = false;
        done
    }

    /// Records that the client of an open transaction is not idle.
    pub fn touch(&self) {
        let mut state = self.lock();
        if state.idle_since.is_some() {
            state.idle_since = Some(Instant::now());
        }
    }

    /// Records that the statement waits for its client.
    pub fn pause(&self) {
        let mut state = self.lock();
        if let Some(since) = state.since.take() {
            let used = since.elapsed();
            state.left = state.left.map(|left| left.saturating_sub(used));
        }
    }

    /// Records that the statement goes on.
    pub fn resume(&self) {
        self.lock().since = Some(Instant::now());
    }

    /// Records that the statement is over. Returns the reason if it was ended.
    pub fn finish(&self, is_in_transaction: bool) -> Option<SqlError> {
        let mut state = self.lock();
        let ended = state.ended.take();
        *state = State {
            idle_since: is_in_transaction.then(Instant::now),
            open_since: state.open_since,
            is_in_transaction: state.is_in_transaction,
            ..State::default()
        };
        ended
    }

    /// Ends the statement that runs, if one does.
    pub fn end(&self, reason: SqlError) {
        self.end_if(|_| true, reason);
    }

    /// Ends the statement of this number, if it runs.
    pub fn end_statement(&self, number: u64, reason: SqlError) {
        self.end_if(|running| running == number, reason);
    }

    fn end_if(&self, is_meant: impl Fn(u64) -> bool, reason: SqlError) {
        let mut state = self.lock();
        if state.running.is_some_and(is_meant) {
            state.ended.get_or_insert(reason);
            if !state.is_shielded {
                self.interrupter.interrupt();
            }
        }
    }

    pub fn is_over(&self) -> bool {
        self.lock().ended.is_some()
    }

    /// Ends the statement when its time is over. Called now and then, since DuckDB does not notice
    /// an interrupt just before it begins a step. Returns what the session has been doing.
    pub fn tick(&self) -> Ages {
        let mut state = self.lock();
        let is_late = match (state.left, state.since) {
            (Some(left), Some(since)) => since.elapsed() > left,
            _ => false,
        };
        if state.running.is_some() && is_late {
            state.ended.get_or_insert_with(|| {
                SqlError::new("57014", "canceling statement due to statement timeout")
                    .hint("rhei.toml, [serve] statement_timeout, sets the limit")
            });
        }
        if state.running.is_some() && state.ended.is_some() && !state.is_shielded {
            self.interrupter.interrupt();
        }
        let age = |since: Instant| since.elapsed();
        Ages { idle: state.idle_since.map(age), open: state.open_since.map(age) }
    }
}
