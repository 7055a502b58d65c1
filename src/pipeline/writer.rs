//! The target of a pipeline, used by one caller at a time.

#![deny(missing_docs)]

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
};

use tokio_util::sync::CancellationToken;

use super::{EngineError, pulse::Pulse};
use crate::{error::panic_message, olap::OlapEngine};

/// The target, used by one caller at a time and never from an async thread.
pub struct Writer<T> {
    target: Arc<Mutex<T>>,
    pulse: Pulse,
    broken: CancellationToken,
}

impl<T> Clone for Writer<T> {
    fn clone(&self) -> Self {
        let (target, pulse) = (Arc::clone(&self.target), self.pulse.clone());
        Self { target, pulse, broken: self.broken.clone() }
    }
}

impl<T: OlapEngine + 'static> Writer<T> {
    /// Takes over a target. Clones of the writer share it, and their calls wait for each other.
    pub fn new(target: T) -> Self {
        let target = Arc::new(Mutex::new(target));
        Self { target, pulse: Pulse::default(), broken: CancellationToken::new() }
    }

    /// Has the pipeline's pulse know of each call.
    #[must_use]
    pub fn with_pulse(self, pulse: Pulse) -> Self {
        Self { pulse, ..self }
    }

    /// Returns what is cancelled when a call has found that the target takes no call any more.
    pub fn broken(&self) -> &CancellationToken {
        &self.broken
    }

    /// Runs `work` on a thread that may block. A call that has begun is always finished, even when
    /// the caller does not wait for it.
    pub async fn call<R: Send + 'static, E: Send + 'static>(
        &self,
        work: impl FnOnce(&mut T) -> Result<R, E> + Send + 'static,
    ) -> Result<R, EngineError>
    where
        EngineError: From<E>,
    {
        let (target, pulse) = (Arc::clone(&self.target), self.pulse.clone());
        let what = "a call to DuckDB";

        let done = tokio::task::spawn_blocking(move || {
            let mut target = target.lock().unwrap_or_else(PoisonError::into_inner);
            let _call = pulse.call();
            let done = std::panic::catch_unwind(AssertUnwindSafe(|| {
                work(&mut target).map_err(|error| match EngineError::from(error) {
                    EngineError::Target(error) => EngineError::Target(target.classify(error)),
                    error => error,
                })
            }));
            done.map_err(|panic| {
                // The next caller must see nothing of a transaction that a panic left open.
                let _ = target.roll_back();
                EngineError::Bug { what, why: panic_message(&*panic) }
            })
        });

        let done = done.await.map_err(|lost| EngineError::lost(what, lost))??;
        if let Err(EngineError::Target(error)) = &done
            && error.is_invalidated()
        {
            self.broken.cancel();
        }
        done
    }
}
