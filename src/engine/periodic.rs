//! The tasks that a long run repeats beside its sessions.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use super::supervisor::Supervisor;
use crate::{
    olap::{Compaction, OlapEngine, StoredTable, TableState},
    pipeline::{Context, EngineError, Writer},
    source::{catalog, connection::connect_sql},
    verify::{Request, verify},
};

/// Starts the tasks that run periodically beside the sessions, also while the source is away.
pub(super) fn spawn_periodic_tasks<T: OlapEngine + 'static>(
    supervisor: &mut Supervisor,
    context: &Context,
    writer: &Writer<T>,
) {
    const QUIET_PERIOD: Duration = Duration::from_secs(5);
    const RETENTION: Duration = Duration::from_secs(3600);

    let (tidied, its_writer) = (context.clone(), writer.clone());
    supervisor.spawn_periodic("file checkpoint", Duration::from_secs(1), move || {
        let (context, writer) = (tidied.clone(), its_writer.clone());
        async move {
            if context.activity.take_idle(QUIET_PERIOD) {
                checkpoint_file(&context, &writer).await
            } else {
                Ok(())
            }
        }
    });

    let pruner = writer.clone();
    supervisor.spawn_periodic("retention of jobs", RETENTION, move || {
        let writer = pruner.clone();
        async move { writer.call(|target| target.prune()).await.map(|_| ()) }
    });

    let (watched, level) = (context.clone(), Arc::new(AtomicU32::new(0)));
    supervisor.spawn_periodic("lag watch", context.options.supervision.lag_interval, move || {
        let (context, level) = (watched.clone(), Arc::clone(&level));
        async move { watch_lag(&context, &level).await }
    });

    if let Some(interval) = context.options.verification.interval {
        let (context, writer) = (context.clone(), writer.clone());
        let (stop, retry) = (supervisor.stop_token(), VerificationRetry::default());
        supervisor.spawn_periodic("verification", VERIFICATION_LOOK.min(interval), move || {
            let (context, writer, stop) = (context.clone(), writer.clone(), stop.clone());
            let retry = retry.clone();
            async move {
                if retry.is_too_early() {
                    return Ok(());
                }
                // A stop does not wait for a verification, which may take hours.
                tokio::select! {
                    verified = Box::pin(verify_if_due(&context, &writer, interval)) => {
                        retry.ended(verified.is_err());
                        verified
                    }
                    () = stop.cancelled() => Ok(()),
                }
            }
        });
    }
}

/// How often a run looks whether its next verification is due.
const VERIFICATION_LOOK: Duration = Duration::from_secs(60);

/// When the last verification failed: making its snapshot may have waited for a transaction that
/// stays open for hours.
#[derive(Debug, Clone, Default)]
struct VerificationRetry(Arc<Mutex<Option<Instant>>>);

impl VerificationRetry {
    fn is_too_early(&self) -> bool {
        const RETRY_AFTER: Duration = Duration::from_secs(900);
        let failed_at = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        failed_at.is_some_and(|at| at.elapsed() < RETRY_AFTER)
    }

    fn ended(&self, has_failed: bool) {
        let mut failed_at = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *failed_at = has_failed.then(Instant::now);
    }
}

/// Verifies the copy when the last verification is an interval ago and the time of the day allows
/// it. A copy that was never verified is verified at once.
async fn verify_if_due<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    interval: Duration,
) -> Result<(), EngineError> {
    let schedule = &context.options.verification;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    if schedule.window.is_some_and(|window| !window.has(now.as_secs())) {
        return Ok(());
    }

    let is_live = |table: &StoredTable| table.state == TableState::Live;
    let state = writer.call(|target| target.state()).await?;
    if !state.is_some_and(|state| state.tables.iter().any(is_live)) {
        return Ok(());
    }

    let results = writer.call(|target| target.verifications()).await?;
    let last = results.iter().filter_map(|result| result.finished_at_us).max();
    let next = last.map(|last| Duration::from_micros(last.unsigned_abs()) + interval);
    if next.is_some_and(|next| now < next) {
        return Ok(());
    }

    let request = Request {
        parts: schedule.sample.parts(),
        rate_limit_bytes: schedule.rate_limit_bytes,
        ..Request::default()
    };
    verify(context, writer, &request).await.map(|_| ())
}

/// Writes DuckDB's log into the file while nothing else happens.
pub(super) async fn checkpoint_file<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
) -> Result<(), EngineError> {
    let _shape = context.ddl_lock.write().await;

    let tidied = writer.call(|target| target.checkpoint_file(Compaction::Incremental)).await;
    if tidied.is_err() {
        // The checkpoint is tried again later.
        context.activity.touch();
    }

    tidied
}

/// Warns of WAL that the slot holds: once, and again each time that the amount has doubled.
pub(super) async fn watch_lag(context: &Context, level: &AtomicU32) -> Result<(), EngineError> {
    let sql = connect_sql(&context.options.source, "lag watch").await?;
    let Some(slot) = catalog::slot(&sql, &context.options.slot).await? else { return Ok(()) };

    let held_bytes = slot.held_bytes.unwrap_or_default();
    let now = lag_level(held_bytes, context.options.supervision.lag_warning_bytes);

    if now > level.swap(now, Ordering::Relaxed) {
        tracing::warn!(
            event = "slot_holds_wal",
            slot = context.options.slot,
            held_bytes,
            "the slot holds much WAL at the source, which waits for this copy"
        );
    }

    if slot.wal_status.as_deref() == Some("unreserved") {
        tracing::error!(
            event = "wal_about_to_be_lost",
            slot = context.options.slot,
            held_bytes,
            "the source is about to throw away WAL that this copy needs (max_slot_wal_keep_size)"
        );
    }

    Ok(())
}

/// Returns how often the WAL that the slot holds has doubled since it reached `warning_bytes`, from
/// 1; 0 below that.
fn lag_level(held_bytes: u64, warning_bytes: u64) -> u32 {
    let times = held_bytes / warning_bytes.max(1);
    u64::BITS - times.leading_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_wal_comes_to_another_level_each_time_that_it_doubles() {
        for (held, warning, level) in [
            (0, 100, 0),
            (99, 100, 0),
            (100, 100, 1),
            (199, 100, 1),
            (200, 100, 2),
            (399, 100, 2),
            (400, 100, 3),
            (u64::MAX, 1, 64),
        ] {
            assert_eq!(lag_level(held, warning), level, "{held} of {warning} bytes");
        }
    }

    #[test]
    fn a_limit_of_no_bytes_warns_from_the_first_byte_on() {
        assert_eq!([0, 1, 2].map(|held_bytes| lag_level(held_bytes, 0)), [0, 1, 2]);
    }
}
