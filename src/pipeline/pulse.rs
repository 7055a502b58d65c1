//! Whether the engine of a long run makes progress, for a service manager that starts a hung one
//! again.
//!
//! One of three things proves it. While a call to DuckDB is under way, the call alone counts: its
//! thread has to run, or to wait for the disk. A merge or a file checkpoint may take hours and is
//! alive all the time; a deadlock is not. Otherwise the engine beats after each step that it takes,
//! or rests: it waits for something outside, as the next change, and says so.
//!
//! What this cannot tell from progress is a loop without end inside of DuckDB.

#![deny(missing_docs)]

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

/// The progress of one pipeline. A clone shares the same state.
#[derive(Debug, Clone, Default)]
pub struct Pulse(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    beats: AtomicU64,
    rests: AtomicUsize,
    call: Mutex<Option<CallThread>>,
}

/// The thread on which a call to DuckDB runs: its folder in `/proc`. `None` where there is no such
/// folder, so that nothing is known of the thread.
type CallThread = Option<PathBuf>;

/// The engine waits for something outside until this is dropped.
#[must_use]
pub struct Rest<'a>(&'a Pulse);

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        self.0.0.rests.fetch_sub(1, Ordering::AcqRel);
        self.0.beat();
    }
}

/// A call to DuckDB runs on the thread that made this, until it is dropped.
#[must_use]
pub(super) struct Call<'a>(&'a Pulse);

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.set_call(None);
    }
}

/// What the last look at a pulse saw.
#[derive(Debug, Default)]
pub struct LastLook {
    beats: u64,
    switches: Option<String>,
}

impl Pulse {
    /// Says that the engine has taken a step.
    pub fn beat(&self) {
        self.0.beats.fetch_add(1, Ordering::AcqRel);
    }

    /// Says that the engine waits for something outside.
    pub fn rest(&self) -> Rest<'_> {
        self.0.rests.fetch_add(1, Ordering::AcqRel);
        Rest(self)
    }

    /// Says that a call to DuckDB begins on this thread. One call at a time is under way.
    pub(super) fn call(&self) -> Call<'_> {
        let thread = std::fs::read_link("/proc/thread-self");
        self.set_call(Some(thread.ok().map(|thread| Path::new("/proc").join(thread))));
        Call(self)
    }

    fn set_call(&self, thread: Option<CallThread>) {
        *self.0.call.lock().unwrap_or_else(PoisonError::into_inner) = thread;
    }

    /// Returns whether the engine has made progress since the last look, or does without it for a
    /// good reason.
    pub fn is_alive(&self, last: &mut LastLook) -> bool {
        let beats = self.0.beats.load(Ordering::Acquire);
        let has_beaten = beats != std::mem::replace(&mut last.beats, beats);

        let call = self.0.call.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match call {
            Some(thread) => works(thread.as_deref(), &mut last.switches) || has_beaten,
            None => has_beaten || self.0.rests.load(Ordering::Acquire) > 0,
        }
    }
}

/// Returns whether a thread runs, waits for the disk, or has run since the last look.
fn works(thread: Option<&Path>, last_switches: &mut Option<String>) -> bool {
    let status = thread.and_then(|thread| std::fs::read_to_string(thread.join("status")).ok());
    let Some(status) = status else { return true };

    let line = |name: &str| status.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    let is_busy = line("State:").contains(['R', 'D']);

    // A thread that was given a processor in the meantime has given it back again.
    let switches = format!("{}{}", line("voluntary_ctxt_switches:"), line("nonvoluntary_ctxt"));
    let has_run = last_switches.replace(switches.clone()) != Some(switches);
    is_busy || has_run
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn an_engine_is_alive_while_it_beats_or_rests() {
        let (pulse, mut last) = (Pulse::default(), LastLook::default());
        assert!(!pulse.is_alive(&mut last));

        pulse.beat();
        assert!(pulse.is_alive(&mut last));
        assert!(!pulse.is_alive(&mut last));

        let rest = pulse.rest();
        assert!(pulse.is_alive(&mut last));
        assert!(pulse.is_alive(&mut last));

        // The end of a rest is a step.
        drop(rest);
        assert!(pulse.is_alive(&mut last));
        assert!(!pulse.is_alive(&mut last));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_call_is_alive_while_its_thread_works_and_not_while_it_waits() {
        let (pulse, mut last) = (Pulse::default(), LastLook::default());
        let (gate, signal) = mpsc::channel::<()>();
        let (began, has_begun) = mpsc::channel();

        let its_pulse = pulse.clone();
        let thread = std::thread::spawn(move || {
            let _call = its_pulse.call();
            began.send(()).unwrap();
            // Works until it is told to wait.
            while signal.try_recv().is_err() {
                std::hint::spin_loop();
            }
            began.send(()).unwrap();
            signal.recv().unwrap();
        });

        has_begun.recv().unwrap();
        // A rest elsewhere says nothing of a call that is under way.
        let _rest = pulse.rest();
        for _ in 0..20 {
            assert!(pulse.is_alive(&mut last));
        }

        gate.send(()).unwrap();
        has_begun.recv().unwrap();
        let mut looks = std::iter::repeat_with(|| {
            std::thread::yield_now();
            pulse.is_alive(&mut last)
        });
        assert!(looks.any(|is_alive| !is_alive));

        gate.send(()).unwrap();
        thread.join().unwrap();
        assert!(pulse.is_alive(&mut last));
    }
}
