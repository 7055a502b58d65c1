//! Keeps a long run alive: limits how often a session may begin again, runs periodic tasks, and
//! waits for their end.

use std::{
    collections::VecDeque,
    future::Future,
    panic::AssertUnwindSafe,
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use tokio::{task::JoinHandle, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{error_chain, panic_message},
    pipeline::{EngineError, options::Budget},
};

/// The restarts of one worker.
#[derive(Debug)]
pub struct RestartBudget {
    budget: Budget,
    taken: VecDeque<Instant>,
}

impl RestartBudget {
    pub fn new(budget: Budget) -> Self {
        Self { budget, taken: VecDeque::new() }
    }

    /// Takes one restart. Returns `false` when the budget is spent.
    pub fn take(&mut self) -> bool {
        if let Some(within) = self.budget.within {
            self.taken.retain(|at| at.elapsed() < within);
        }

        let is_left = self.taken.len() < self.budget.max as usize;
        if is_left {
            self.taken.push_back(Instant::now());
        }

        is_left
    }

    /// Notes a restart that was taken this long ago.
    pub fn note(&mut self, ago: Duration) {
        self.taken.push_back(Instant::now().checked_sub(ago).unwrap_or_else(Instant::now));
    }

    /// Returns how long ago the restarts were taken that still count.
    pub fn ages(&self) -> impl Iterator<Item = Duration> {
        self.taken.iter().map(Instant::elapsed)
    }
}

/// Runs `work`; a panic in `work` becomes an error.
pub async fn catch_panic<R>(
    what: &'static str,
    work: impl Future<Output = Result<R, EngineError>>,
) -> Result<R, EngineError> {
    // No later step uses what a panic left half done: the next session begins from the file.
    let ended = AssertUnwindSafe(work).catch_unwind().await;
    ended.unwrap_or_else(|panic| Err(EngineError::Bug { what, why: panic_message(&*panic) }))
}

/// Runs periodic tasks, each in a task of its own. A failure or panic is logged, and the task runs
/// again at its next turn; the other tasks are not disturbed.
pub struct Supervisor {
    stop: CancellationToken,
    grace: Duration,
    tasks: Vec<(String, JoinHandle<()>)>,
}

impl Supervisor {
    /// Creates a supervisor. `grace` is how long [`Self::shutdown`] waits for work that has begun.
    pub fn new(grace: Duration) -> Self {
        Self { stop: CancellationToken::new(), grace, tasks: Vec::new() }
    }

    /// Returns a token that is cancelled when the shutdown begins: long work ends itself by it.
    pub fn stop_token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Runs `work` at once and then every `interval`; a turn that is missed because the turn before
    /// took long is left out. `name` says what the work is, and of which table if it concerns one.
    pub fn spawn_periodic<W, F>(&mut self, name: impl Into<String>, interval: Duration, mut work: W)
    where
        W: FnMut() -> F + Send + 'static,
        F: Future<Output = Result<(), EngineError>> + Send,
    {
        let (name, stop) = (name.into(), self.stop.clone());
        let task_name = name.clone();

        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(interval);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);

            // An error that comes again and again is logged once.
            let mut last_error = None;

            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    _ = ticks.tick() => {}
                }

                let ended = AssertUnwindSafe(async { work().await }).catch_unwind().await;
                let error = match ended {
                    Ok(Ok(())) => None,
                    Ok(Err(error)) => Some(error_chain(&error)),
                    Err(panic) => Some(format!("a bug: {}", panic_message(&*panic))),
                };

                if error != last_error
                    && let Some(error) = &error
                {
                    tracing::warn!(
                        event = "task_failed",
                        task = task_name,
                        error,
                        "a periodic task failed; it runs again at its next turn"
                    );
                }

                last_error = error;
            }
        });

        self.tasks.push((name, task));
    }

    /// Lets work that has begun come to its end, and says which did not. See [`Self::shutdown`].
    pub async fn end(&mut self) {
        for task in self.shutdown().await {
            tracing::warn!(
                event = "task_given_up",
                task,
                "a task did not finish within the grace period, and was given up"
            );
        }
    }

    /// Lets work that has begun come to its end, within the grace period. Returns the tasks that
    /// did not end and were given up. Calling it again is harmless.
    pub async fn shutdown(&mut self) -> Vec<String> {
        self.stop.cancel();

        let end = tokio::time::Instant::now() + self.grace;
        let mut unfinished = Vec::new();

        for (name, mut task) in std::mem::take(&mut self.tasks) {
            if tokio::time::timeout_at(end, &mut task).await.is_err() {
                task.abort();
                unfinished.push(name);
            }
        }

        unfinished
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use super::*;

    const SHORT: Duration = Duration::from_millis(1);

    fn block_on<F: Future>(work: F) -> F::Output {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap()
            .block_on(work)
    }

    async fn until(counter: &AtomicU32, count: u32) {
        while counter.load(Ordering::SeqCst) < count {
            tokio::time::sleep(SHORT).await;
        }
    }

    #[test]
    fn a_budget_is_spent_and_comes_back_with_time() {
        let mut once = RestartBudget::new(Budget { max: 1, within: None });
        assert_eq!([once.take(), once.take(), once.take()], [true, false, false]);

        let mut twice =
            RestartBudget::new(Budget { max: 2, within: Some(Duration::from_millis(5)) });
        assert_eq!([twice.take(), twice.take(), twice.take()], [true, true, false]);

        std::thread::sleep(Duration::from_millis(6));
        assert!(twice.take());
    }

    #[test]
    fn one_task_that_fails_and_one_that_panics_do_not_keep_the_third_from_its_turns() {
        block_on(async {
            let counts: [Arc<AtomicU32>; 3] = Default::default();
            let mut supervisor = Supervisor::new(Duration::from_secs(10));

            for (at, count) in counts.iter().enumerate() {
                let count = Arc::clone(count);
                supervisor.spawn_periodic(format!("task {at}"), SHORT, move || {
                    count.fetch_add(1, Ordering::SeqCst);
                    async move {
                        match at {
                            0 => Err(EngineError::Setup("it fails".to_owned())),
                            1 => panic!("it panics"),
                            _ => Ok(()),
                        }
                    }
                });
            }

            for count in &counts {
                until(count, 3).await;
            }
            assert!(supervisor.shutdown().await.is_empty());
        });
    }

    #[test]
    fn a_shutdown_says_what_did_not_finish_and_a_second_one_is_harmless() {
        block_on(async {
            let began = Arc::new(AtomicU32::new(0));
            let mut supervisor = Supervisor::new(Duration::from_millis(20));

            let begun = Arc::clone(&began);
            supervisor.spawn_periodic("endless", SHORT, move || {
                begun.fetch_add(1, Ordering::SeqCst);
                std::future::pending()
            });
            supervisor.spawn_periodic("quick", SHORT, || async { Ok(()) });

            until(&began, 1).await;
            assert_eq!(supervisor.shutdown().await, ["endless"]);
            assert!(supervisor.shutdown().await.is_empty());
        });
    }

    #[test]
    fn a_panic_becomes_an_error_that_says_what_it_said() {
        let ended: Result<(), _> =
            block_on(catch_panic("the session", async { panic!("number {}", 7) }));
        assert_eq!(ended.unwrap_err().to_string(), "the session met a bug: number 7");
    }
}
