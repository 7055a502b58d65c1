//! The tasks that a long run repeats beside its sessions.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio_util::sync::CancellationToken;

use super::{
    publication::{LastPublished, publish_again},
    supervisor::Supervisor,
};
use crate::{
    olap::{Compaction, OlapEngine, StoredTable, StoredVerification, TableState},
    pgoutput::QualifiedName,
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

    spawn_upkeep(supervisor, context, writer);

    spawn_retention(supervisor, writer);

    let (watched, level) = (context.clone(), Arc::new(AtomicU32::new(0)));
    supervisor.spawn_periodic("lag watch", context.options.supervision.lag_interval, move || {
        let (context, level) = (watched.clone(), Arc::clone(&level));
        async move { watch_lag(&context, &level).await }
    });

    if let Some((options, Some(interval))) = context.options.publication.clone() {
        let (writer, last) = (writer.clone(), LastPublished::default());
        let stop = supervisor.stop_token();
        supervisor.spawn_periodic("publication", interval, move || {
            let (writer, options) = (writer.clone(), options.clone());
            let (last, stop) = (last.clone(), stop.clone());
            async move {
                match publish_again(&writer, &options, &last, &stop).await {
                    Err(_) if stop.is_cancelled() => Ok(()),
                    published => published,
                }
            }
        });
    }

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

/// Starts what keeps the target small, and the writer of a lake known as alive while it waits.
pub(super) fn spawn_upkeep<T: OlapEngine + 'static>(
    supervisor: &mut Supervisor,
    context: &Context,
    writer: &Writer<T>,
) {
    const LOOK: Duration = Duration::from_secs(1);

    let (looked_after, its_writer) = (context.clone(), writer.clone());
    let stop = supervisor.stop_token();
    supervisor.spawn_periodic("upkeep", LOOK, move || {
        let (context, writer) = (looked_after.clone(), its_writer.clone());
        let stop = stop.clone();
        async move { upkeep(&context, &writer, &stop).await }
    });
}

/// Starts what forgets old jobs.
fn spawn_retention<T: OlapEngine + 'static>(supervisor: &mut Supervisor, writer: &Writer<T>) {
    const RETENTION: Duration = Duration::from_secs(3600);

    let pruner = writer.clone();
    supervisor.spawn_periodic("retention of jobs", RETENTION, move || {
        let writer = pruner.clone();
        async move { writer.call(|target| target.prune()).await.map(|_| ()) }
    });
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

    let Some(state) = writer.call(|target| target.state()).await? else { return Ok(()) };
    let results = writer.call(|target| target.verifications()).await?;
    if !is_due(&state.tables, &results, now, interval) {
        return Ok(());
    }

    let request = Request {
        parts: schedule.sample.parts(),
        rate_limit_bytes: schedule.rate_limit_bytes,
        ..Request::default()
    };
    verify(context, writer, &request).await.map(|_| ())
}

/// Returns whether some live table was verified an interval ago or earlier, or none was ever
/// verified. A table that was added since waits for the turn of the others, and a verification of
/// one table by hand does not postpone that turn.
fn is_due(
    tables: &[StoredTable],
    results: &[StoredVerification],
    now: Duration,
    interval: Duration,
) -> bool {
    let live: BTreeSet<&QualifiedName> = tables
        .iter()
        .filter(|table| table.state == TableState::Live)
        .map(|table| &table.source)
        .collect();
    let of_live = results.iter().filter(|result| live.contains(&result.table));
    let oldest = of_live.filter_map(|result| result.finished_at_us).min();

    match oldest {
        Some(at) => now >= Duration::from_micros(at.unsigned_abs()) + interval,
        None => !live.is_empty(),
    }
}

/// Does what the target needs now and then, step by step; cycles come between the steps.
async fn upkeep<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    stop: &CancellationToken,
) -> Result<(), EngineError> {
    loop {
        let has_more = {
            let _shape = context.ddl_lock.write().await;
            writer.call(|target| target.upkeep()).await?
        };
        if !has_more || stop.is_cancelled() {
            return Ok(());
        }
        tokio::task::yield_now().await;
    }
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
    use crate::engine::schema::samples::{followed, orders};

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

    #[test]
    fn a_verification_is_due_an_interval_after_the_oldest_result_of_a_live_table() {
        let table = |name: &str, state| StoredTable {
            source: QualifiedName::new("public", name),
            ..StoredTable::of(&followed(&orders()), state)
        };
        let result = |name: &str, seconds: i64| StoredVerification {
            table: QualifiedName::new("public", name),
            finished_at_us: Some(seconds * 1_000_000),
            lsn: "0/1".to_owned(),
            verdict: "equal".to_owned(),
            reason: None,
            part: 0,
            parts: 1,
            source_rows: 1,
            copy_rows: 1,
            missing: 0,
            extra: 0,
            different: 0,
            repaired: 0,
            seconds: 0.1,
        };
        let [a, b] = ["a", "b"].map(|name| table(name, TableState::Live));
        let gone = table("gone", TableState::Dropped);
        let copying = table("a", TableState::Copying);

        for (name, tables, results, expected) in [
            ("no table is live", vec![copying], vec![], false),
            ("none was ever verified", vec![a.clone()], vec![], true),
            ("not yet", vec![a.clone()], vec![result("a", 901)], false),
            ("an interval ago", vec![a.clone()], vec![result("a", 900)], true),
            (
                "one by hand",
                vec![a.clone(), b.clone()],
                vec![result("a", 900), result("b", 999)],
                true,
            ),
            ("a new table", vec![a.clone(), b], vec![result("a", 950)], false),
            (
                "an old result of a dropped table",
                vec![a, gone],
                vec![result("gone", 1), result("a", 950)],
                false,
            ),
        ] {
            let (now, interval) = (Duration::from_secs(1000), Duration::from_secs(100));
            assert_eq!(is_due(&tables, &results, now, interval), expected, "{name}");
        }
    }
}
