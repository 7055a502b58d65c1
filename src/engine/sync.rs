//! `sync`: catches up with the source, and ends.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{
    CycleOptions, SyncEngine, SyncReport,
    attach::{Recopy, attach},
    copies::CopyScheduler,
    cycle::{Cycle, NextStep},
    periodic::spawn_upkeep,
    schema::{LockNotAvailable, SchemaStep},
    session::{SessionEnd, stream, wants_whole_from_now_on},
    slot_recovery,
    supervisor::Supervisor,
};
use crate::{
    Lsn,
    checkpoint::reachable_target,
    error::error_chain,
    olap::{Compaction, DuckDb, OlapEngine, engine::FileMaintenance},
    pipeline::{
        Context, CycleReport, EngineError, Event, Writer,
        error_policy::{Policy, policy},
    },
    source::{CdcConsumer, SourceError, catalog, connection::connect_sql, pg_consumer::PgConsumer},
};

/// How often `sync` attaches before it gives up: `sync` attaches again each time it finds a table
/// that has to be copied again.
const ATTACH_LIMIT: u32 = 30;

/// How often `sync` goes on after its stream broke.
const MAX_RECONNECTS: u32 = 3;

/// Catches up with what the source had committed at the time of the call, then stops. The tables
/// that need a copy and the tables of `again` are copied.
///
/// # Errors
/// See [`EngineError`]. The batches that were applied stay; a second call goes on from there.
pub async fn sync(
    context: &Context,
    again: Recopy,
    stop: &CancellationToken,
) -> Result<SyncReport, EngineError> {
    let goal = wal_position(context).await?;

    let writer = Writer::new(DuckDb::open(&context.options.target)?);
    let mut copies = CopyScheduler::new(context, &writer, MAX_RECONNECTS);
    let mut supervisor = Supervisor::new(context.options.supervision.grace);
    spawn_upkeep(&mut supervisor, context, &writer);

    let ended = Box::pin(sync_sessions(context, again, stop, goal, &writer, &mut copies)).await;
    copies.shutdown().await;
    supervisor.end().await;

    let report = ended?;
    if !report.is_stopped {
        tracing::info!(
            event = "caught_up",
            position = %report.reached,
            "caught up"
        );
    }

    let compaction = compaction_after(&report);
    writer.call(move |target| target.checkpoint_file(compaction)).await?;
    Ok(report)
}

/// Returns how much the file is compacted at the end. What a copy has just written needs no
/// compaction: only its last row groups are small.
fn compaction_after(report: &SyncReport) -> Compaction {
    let changed_rows = report.updated + report.deleted;
    if changed_rows > 0 { Compaction::For { changed_rows } } else { Compaction::Skip }
}

/// How one session of `sync` ended.
enum SyncSession {
    /// The goal is reached, or the operator has stopped `sync`.
    Ended(SessionEnd),
    /// Another session goes on from the checkpoint.
    Again,
    /// The goal is reached, and the connection broke before the source had the acknowledgement.
    NotAcknowledged(SourceError),
}

/// What `sync` remembers from one session for the next one.
#[derive(Default)]
struct SyncState {
    recopy: Recopy,
    breaks: u32,
    no_streaming_in_progress: bool,
    /// The lake has to be read again before anything else.
    must_reopen: bool,
    report: SyncReport,
}

impl SyncState {
    /// Counts a break that may heal. Returns how long to wait before the next session, or `None`
    /// when there were too many breaks.
    fn pause_after_break(&mut self) -> Option<Duration> {
        if self.breaks >= MAX_RECONNECTS {
            return None;
        }
        self.breaks += 1;
        Some(Duration::from_millis(500) * self.breaks)
    }
}

async fn sync_sessions<T: OlapEngine + 'static>(
    context: &Context,
    recopy: Recopy,
    stop: &CancellationToken,
    goal: Lsn,
    writer: &Writer<T>,
    copies: &mut CopyScheduler<T>,
) -> Result<SyncReport, EngineError> {
    let report = SyncReport { reached: goal, ..SyncReport::default() };
    let mut state = SyncState { recopy, report, ..SyncState::default() };

    for _ in 0..ATTACH_LIMIT {
        let session = Box::pin(sync_session(context, writer, &mut state, copies, stop)).await;

        match session {
            Ok(SyncSession::Again) => {}
            Ok(SyncSession::NotAcknowledged(error)) => return Err(error.into()),
            Ok(SyncSession::Ended(SessionEnd::Reattach(reason))) => {
                tracing::info!(event = "reattaching", reason, "attaching to the source again");
            }
            Ok(SyncSession::Ended(end)) => {
                state.report.is_stopped = end == SessionEnd::Stopped;
                return Ok(state.report);
            }
            Err(EngineError::Target(error)) if error.is_of_lake() => {
                let Some(pause) = state.pause_after_break() else { return Err(error.into()) };
                state.must_reopen = true;
                tracing::warn!(
                    event = "sync_interrupted_by_lake",
                    error = error_chain(&error),
                    "the lake could not be used, or has changed; the sync reads it again and goes \
                     on from the checkpoint"
                );
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = tokio::time::sleep(pause) => {}
                }
            }
            Err(error) => {
                let recopy = Box::pin(slot_recovery::recover(context, error, copies)).await?;
                state.recopy = std::mem::take(&mut state.recopy).widen(recopy);
            }
        }
    }

    Err(changed_again_and_again())
}

/// Attaches, and follows the stream to the goal of the report.
async fn sync_session<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    state: &mut SyncState,
    copies: &mut CopyScheduler<T>,
    stop: &CancellationToken,
) -> Result<SyncSession, EngineError> {
    if state.must_reopen {
        // No other task may have the lake open.
        copies.shutdown().await;
        writer.call(|target| target.reopen()).await?;
        state.must_reopen = false;
    }

    let attached = tokio::select! {
        () = stop.cancelled() => return Ok(SyncSession::Ended(SessionEnd::Stopped)),
        attached = attach(context, writer, &state.recopy, |oid| copies.is_active(oid)) => attached,
    };

    let attached = match attached {
        Ok(attached) => attached,
        Err(error) if policy(&error) == Policy::Passing => {
            let Some(pause) = state.pause_after_break() else { return Err(error) };
            tracing::warn!(
                event = "catalogs_asked_again",
                error = error_chain(&error),
                "asking the source's catalogs again"
            );
            return Ok(again_after(pause, stop).await);
        }
        Err(error) => return Err(error),
    };

    // The target has recorded the tables to copy again by now.
    state.recopy = Recopy::None;
    state.report.checkpoint = attached.pipeline.checkpoint.lsn;
    state.report.in_error = attached
        .in_error
        .iter()
        .map(|(_, table, reason)| (table.to_string(), reason.clone()))
        .collect();

    let whole = state.no_streaming_in_progress;
    let mut engine = stream(context, writer, attached, copies, whole).await?;

    let end = match catch_up(&mut engine, &mut state.report, context, copies, stop).await {
        Ok(end) => end,
        // A stream that broke after it had begun may heal: the checkpoint says where to go on.
        Err(error) if may_heal(&error) => {
            let Some(pause) = state.pause_after_break() else { return Err(error) };
            state.no_streaming_in_progress |= wants_whole_from_now_on(&error);
            tracing::warn!(
                event = "sync_interrupted",
                error = error_chain(&error),
                "the stream broke; going on from the checkpoint"
            );
            return Ok(again_after(pause, stop).await);
        }
        Err(error) => return Err(error),
    };

    Ok(match engine.into_consumer().shutdown().await {
        Ok(()) => SyncSession::Ended(end),
        Err(error) => SyncSession::NotAcknowledged(error),
    })
}

async fn again_after(pause: Duration, stop: &CancellationToken) -> SyncSession {
    tokio::select! {
        () = stop.cancelled() => SyncSession::Ended(SessionEnd::Stopped),
        () = tokio::time::sleep(pause) => SyncSession::Again,
    }
}

/// Returns whether a stream that ended with this error is begun again from the checkpoint.
fn may_heal(error: &EngineError) -> bool {
    policy(error).is_waited_for() || matches!(error, EngineError::Bug { .. })
}

/// Lets one round copy every table that the stream and the look before it found to need another
/// copy.
///
/// # Errors
/// The source was altered during each of the earlier rounds, too.
fn copy_what_was_found<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
    copies: &mut CopyScheduler<T>,
    rounds: u32,
) -> Result<(), EngineError> {
    if rounds > ATTACH_LIMIT {
        return Err(changed_again_and_again());
    }
    copies.want(engine.take_to_copy());
    Ok(())
}

fn changed_again_and_again() -> EngineError {
    EngineError::Setup(
        "tables changed their shape again and again while they were copied\nhint: run it again \
         when fewer schema changes are made"
            .to_owned(),
    )
}

/// Follows the stream to the goal of the report, and then to the shapes that the catalogs have by
/// that time.
async fn catch_up<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
    report: &mut SyncReport,
    context: &Context,
    copies: &mut CopyScheduler<T>,
    stop: &CancellationToken,
) -> Result<SessionEnd, EngineError> {
    let mut is_settled = false;
    let mut rounds = 0;

    // The latest time at which the position to be reached was read.
    let mut read_at = Instant::now();

    loop {
        if let Some(end) = finish_copies(engine, report, context, copies, stop).await? {
            return Ok(end);
        }
        if let Some(end) = reach_goal(engine, report, context, read_at, stop).await? {
            return Ok(end);
        }

        if is_settled && !engine.has_to_copy() {
            return Ok(SessionEnd::Done);
        }

        if !engine.is_looking() {
            let looked = tokio::select! {
                () = stop.cancelled() => return Ok(SessionEnd::Stopped),
                looked = engine.look() => looked?,
            };

            match looked {
                Ok(None) if engine.has_to_copy() => {
                    rounds += 1;
                    copy_what_was_found(engine, copies, rounds)?;
                    is_settled = false;
                }
                Ok(None) => return Ok(SessionEnd::Done),
                Ok(Some(at)) => {
                    report.reached = report.reached.max(at);
                    read_at = Instant::now();
                }
                Err(LockNotAvailable) => {
                    tracing::warn!(
                        event = "catalogs_locked",
                        "waiting for a lock that another session holds on a published table, to \
                         read its shape"
                    )
                }
            }

            continue;
        }

        match engine.apply_pending().await? {
            SchemaStep::Reattach(reason) => return Ok(SessionEnd::Reattach(reason)),
            SchemaStep::Done if !engine.has_to_copy() => return Ok(SessionEnd::Done),
            SchemaStep::Done => {
                rounds += 1;
                copy_what_was_found(engine, copies, rounds)?;
            }
            SchemaStep::NewShapes => is_settled = true,
            // A transaction is half read, or a copy waits: one more cycle follows.
            SchemaStep::Waiting => {
                report.reached = Lsn(report.reached.0.max(engine.checkpoint().lsn.0 + 1))
            }
        }
    }
}

/// Applies what the source had committed up to the goal of the report, which was read at `read_at`.
async fn reach_goal<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
    report: &mut SyncReport,
    context: &Context,
    read_at: Instant,
    stop: &CancellationToken,
) -> Result<Option<SessionEnd>, EngineError> {
    while engine.checkpoint().lsn < report.reached || engine.has_shapes() {
        let decoded = engine.consumer.position().decoded;
        let options = cycle_towards(report.reached, decoded);

        let Cycle { report: cycle, next } = engine.sync_once(options, stop).await?;
        add_cycle(report, context, &cycle, &next);
        if let Some(end) = end_of(next) {
            return Ok(Some(end));
        }

        if cycle.source_transactions == 0 && engine.checkpoint().lsn < report.reached {
            report.reached = engine.reachable(report.reached, read_at.elapsed()).await?;
        }
    }

    Ok(None)
}

/// Returns how a cycle is run whose stream is to reach `goal`, and has decoded this much.
fn cycle_towards(goal: Lsn, decoded: Lsn) -> CycleOptions {
    CycleOptions {
        linger: Duration::from_millis(500),
        until: Some(goal),
        request_keepalives: true,
        // Only the last position needs to be saved.
        save_idle: decoded >= goal,
    }
}

/// Reports a cycle, and counts what it brought unless it was stopped.
fn add_cycle(report: &mut SyncReport, context: &Context, cycle: &CycleReport, next: &NextStep) {
    let _ = context.events.send(Event::Cycle(cycle.clone()));
    if *next != NextStep::Stop {
        report.add(cycle);
    }
}

/// Returns how a session ends after a cycle, if it does.
fn end_of(next: NextStep) -> Option<SessionEnd> {
    match next {
        NextStep::Stop => Some(SessionEnd::Stopped),
        NextStep::Reattach(reason) => Some(SessionEnd::Reattach(reason)),
        NextStep::Wait | NextStep::Continue | NextStep::EndOfStream => None,
    }
}

/// Waits until every copy is merged. The stream goes on in the meantime.
async fn finish_copies<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
    report: &mut SyncReport,
    context: &Context,
    copies: &mut CopyScheduler<T>,
    stop: &CancellationToken,
) -> Result<Option<SessionEnd>, EngineError> {
    let mut ticks = tokio::time::interval(context.options.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);

    while engine.is_copying() || !copies.is_idle() {
        let is_merging = engine.merge_step(copies).await?;
        report.in_error.extend(engine.take_not_copied());
        if is_merging {
            continue;
        }

        let is_waiting = !copies.is_idle() || engine.checkpoint().lsn >= engine.copies_reach();
        if is_waiting {
            tokio::select! {
                () = stop.cancelled() => return Ok(Some(SessionEnd::Stopped)),
                update = copies.next() => {
                    let mut cycles = Vec::new();
                    let reattach =
                        engine.handle_copy_event(update?, copies, stop, &mut cycles).await?;

                    for cycle in cycles {
                        report.add(&cycle);
                        let _ = context.events.send(Event::Cycle(cycle));
                    }
                    report.in_error.extend(engine.take_not_copied());

                    if let Some(reason) = reattach {
                        return Ok(Some(SessionEnd::Reattach(reason)));
                    }
                    continue;
                }
                _ = ticks.tick() => {}
            }
        }

        let options = cycle_beside_copies(engine.copies_reach(), is_waiting);

        loop {
            let Cycle { report: cycle, next } = engine.sync_once(options, stop).await?;
            add_cycle(report, context, &cycle, &next);

            let is_behind = next == NextStep::Continue;
            if let Some(end) = end_of(next) {
                return Ok(Some(end));
            }
            if !is_behind || copies.is_holding() {
                break;
            }
        }
    }

    Ok(None)
}

/// Returns how a cycle is run while copies have to be merged at `reach`. When a copy is waited for
/// (`is_waiting`), the stream only takes what has come; else the stream has to come to `reach`.
fn cycle_beside_copies(reach: Lsn, is_waiting: bool) -> CycleOptions {
    CycleOptions {
        linger: if is_waiting { Duration::ZERO } else { Duration::from_millis(100) },
        until: Some(reach),
        request_keepalives: !is_waiting,
        save_idle: !is_waiting,
    }
}

/// Returns the end of the source's WAL, as far as a slot can follow it.
async fn wal_position(context: &Context) -> Result<Lsn, EngineError> {
    let sql = connect_sql(&context.options.source, "control").await?;
    let server = catalog::server(&sql).await?;
    crate::source::slot::check_server(&server)?;
    Ok(reachable_target(catalog::wal_insert_lsn(&sql).await?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pipeline::Options,
        source::{SourceError, wire::WireError},
    };

    #[test]
    fn three_breaks_are_waited_for_longer_each_time_and_the_fourth_ends_the_command() {
        let mut state = SyncState::default();
        let pauses: Vec<Option<u128>> =
            (0..5).map(|_| state.pause_after_break().map(|pause| pause.as_millis())).collect();
        assert_eq!(pauses, [Some(500), Some(1000), Some(1500), None, None]);
    }

    #[test]
    fn a_session_ends_when_the_operator_or_a_new_shape_says_so() {
        let reason = || "a table came".to_owned();
        for (next, expected) in [
            (NextStep::Wait, None),
            (NextStep::Continue, None),
            (NextStep::EndOfStream, None),
            (NextStep::Stop, Some(SessionEnd::Stopped)),
            (NextStep::Reattach(reason()), Some(SessionEnd::Reattach(reason()))),
        ] {
            let name = format!("{next:?}");
            assert_eq!(end_of(next), expected, "{name}");
        }
    }

    #[test]
    fn a_stream_is_begun_again_after_an_outage_or_a_bug_only() {
        let wire = |error: WireError| EngineError::Source(SourceError::Wire(error));
        for (error, expected) in [
            (wire(WireError::Closed), true),
            (wire(WireError::Silent(Duration::from_secs(1))), true),
            (EngineError::Bug { what: "a task", why: "it is gone".to_owned() }, true),
            (EngineError::SnapshotLost, true),
            (wire(WireError::BadLength(-1)), false),
            (changed_again_and_again(), false),
        ] {
            assert_eq!(may_heal(&error), expected, "{error}");
        }
    }

    #[test]
    fn a_cycle_that_was_stopped_is_reported_and_not_counted() {
        let options = Options::sample();
        let (events, mut seen) = tokio::sync::mpsc::unbounded_channel();
        let context = Context::new(options, events);
        let cycle = CycleReport { inserted: 2, ..CycleReport::default() };

        for (next, inserted) in
            [(NextStep::Stop, 0), (NextStep::Wait, 2), (NextStep::Reattach(String::new()), 2)]
        {
            let mut report = SyncReport::default();
            add_cycle(&mut report, &context, &cycle, &next);
            assert_eq!(report.inserted, inserted, "{next:?}");
            assert!(matches!(seen.try_recv(), Ok(Event::Cycle(_))), "{next:?}");
        }
    }

    #[test]
    fn only_rows_that_were_changed_or_deleted_call_for_compaction() {
        for (inserted, updated, deleted, expected) in [
            (1000, 0, 0, Compaction::Skip),
            (0, 2, 0, Compaction::For { changed_rows: 2 }),
            (1000, 2, 3, Compaction::For { changed_rows: 5 }),
        ] {
            let report = SyncReport { inserted, updated, deleted, ..SyncReport::default() };
            assert_eq!(compaction_after(&report), expected, "{report:?}");
        }
    }

    #[test]
    fn on_the_way_to_a_goal_only_the_last_position_is_saved() {
        let saves = |decoded| cycle_towards(Lsn(100), Lsn(decoded)).save_idle;
        assert_eq!([0, 99, 100, 101].map(saves), [false, false, true, true]);
    }

    #[test]
    fn the_stream_hurries_only_when_no_copy_is_waited_for() {
        let waiting = cycle_beside_copies(Lsn(7), true);
        assert!(waiting.linger.is_zero() && !waiting.request_keepalives && !waiting.save_idle);

        let behind = cycle_beside_copies(Lsn(7), false);
        assert!(!behind.linger.is_zero() && behind.request_keepalives && behind.save_idle);
        assert_eq!([waiting.until, behind.until], [Some(Lsn(7)); 2]);
    }
}
