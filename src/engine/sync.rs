//! `sync`: catches up with the source, and ends.

use std::time::Duration;

use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::{
    CycleOptions, SyncEngine, SyncReport,
    attach::{Recopy, attach},
    copies::CopyScheduler,
    cycle::{LockNotAvailable, SchemaStep},
    session::{SessionEnd, stream, wants_whole_from_now_on},
    slot_recovery,
};
use crate::{
    Lsn,
    checkpoint::reachable_target,
    error::error_chain,
    olap::{Compaction, DuckDb, OlapEngine, engine::FileMaintenance},
    pipeline::{
        Context, EngineError, Event, Writer,
        error_policy::{Policy, policy},
    },
    source::{CdcConsumer, catalog, connection::connect_sql, pg_consumer::PgConsumer},
};

/// How often `sync` attaches before it gives up: `sync` attaches again each time it finds a table
/// that has to be copied again.
pub(super) const ATTACH_LIMIT: u32 = 30;

/// How often `sync` goes on after its stream broke.
pub(super) const MAX_RECONNECTS: u32 = 3;

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

    let ended = Box::pin(sync_sessions(context, again, stop, goal, &writer, &mut copies)).await;
    copies.shutdown().await;

    let report = ended?;
    if !report.is_stopped {
        tracing::info!(position = %report.reached, "caught up");
    }

    // What a copy has just written needs no compaction: only its last row groups are small.
    let changed_rows = report.updated + report.deleted;
    let compaction =
        if changed_rows > 0 { Compaction::For { changed_rows } } else { Compaction::Skip };

    writer.call(move |target| target.checkpoint_file(compaction)).await?;
    Ok(report)
}

pub(super) async fn sync_sessions<T: OlapEngine + 'static>(
    context: &Context,
    mut again: Recopy,
    stop: &CancellationToken,
    goal: Lsn,
    writer: &Writer<T>,
    copies: &mut CopyScheduler<T>,
) -> Result<SyncReport, EngineError> {
    let mut report = SyncReport { reached: goal, ..SyncReport::default() };
    let mut breaks = 0;
    let mut no_streaming_in_progress = false;

    for _ in 0..ATTACH_LIMIT {
        let attached = tokio::select! {
            () = stop.cancelled() => return Ok(SyncReport { is_stopped: true, ..report }),
            attached = attach(context, writer, &again, |oid| copies.is_active(oid)) => attached,
        };

        let attached = match attached {
            Ok(attached) => attached,
            Err(error) if policy(&error) == Policy::Passing && breaks < MAX_RECONNECTS => {
                breaks += 1;
                tracing::warn!(error = error_chain(&error), "asking the source's catalogs again");
                tokio::time::sleep(Duration::from_millis(500) * breaks).await;
                continue;
            }
            Err(error) => {
                again =
                    again.widen(Box::pin(slot_recovery::recover(context, error, copies)).await?);
                continue;
            }
        };

        // The target has recorded the tables of `again` by now.
        again = Recopy::None;
        report.checkpoint = attached.pipeline.checkpoint.lsn;
        report.in_error = attached
            .in_error
            .iter()
            .map(|(_, table, reason)| (table.to_string(), reason.clone()))
            .collect();

        let mut engine =
            match stream(context, writer, attached, copies, no_streaming_in_progress).await {
                Ok(engine) => engine,
                Err(error) => {
                    again = again
                        .widen(Box::pin(slot_recovery::recover(context, error, copies)).await?);
                    continue;
                }
            };

        let ended = match catch_up(&mut engine, &mut report, context, copies, stop).await {
            // A stream that broke after it had begun may heal: the checkpoint says where to go on.
            Err(error) if may_heal(&error) && breaks < MAX_RECONNECTS => {
                breaks += 1;
                no_streaming_in_progress |= wants_whole_from_now_on(&error);
                tracing::warn!(
                    error = error_chain(&error),
                    "the stream broke; going on from the checkpoint"
                );

                tokio::select! {
                    () = stop.cancelled() => return Ok(SyncReport { is_stopped: true, ..report }),
                    () = tokio::time::sleep(Duration::from_millis(500) * breaks) => {}
                }
                continue;
            }
            Err(error) => {
                again =
                    again.widen(Box::pin(slot_recovery::recover(context, error, copies)).await?);
                continue;
            }
            Ok(ended) => ended,
        };

        engine.into_consumer().shutdown().await?;
        match ended {
            SessionEnd::Reattach(reason) => tracing::info!(reason, "attaching to the source again"),
            ended => {
                report.is_stopped = ended == SessionEnd::Stopped;
                return Ok(report);
            }
        }
    }

    Err(changed_again_and_again())
}

/// Returns whether a stream that ended with this error is begun again from the checkpoint.
pub(super) fn may_heal(error: &EngineError) -> bool {
    policy(error).is_waited_for() || matches!(error, EngineError::Bug { .. })
}

/// Lets one round copy every table that the stream and the look before it found to need another
/// copy.
///
/// # Errors
/// The source was altered during each of the earlier rounds, too.
pub(super) fn copy_what_was_found<T: OlapEngine + 'static>(
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

pub(super) fn changed_again_and_again() -> EngineError {
    EngineError::Setup(
        "tables changed their shape again and again while they were copied\nhint: run it again \
         when fewer schema changes are made"
            .to_owned(),
    )
}

/// Follows the stream to the goal of the report, and then to the shapes that the catalogs have by
/// that time.
pub(super) async fn catch_up<T: OlapEngine + 'static>(
    engine: &mut SyncEngine<PgConsumer, T>,
    report: &mut SyncReport,
    context: &Context,
    copies: &mut CopyScheduler<T>,
    stop: &CancellationToken,
) -> Result<SessionEnd, EngineError> {
    let mut is_settled = false;
    let mut rounds = 0;

    // The latest time at which the position to be reached was read.
    let mut read_at = tokio::time::Instant::now();

    loop {
        if let Some(ended) = finish_copies(engine, report, context, copies, stop).await? {
            return Ok(ended);
        }

        while engine.checkpoint().lsn < report.reached || engine.has_shapes() {
            let decoded = engine.consumer.position().decoded;
            let cycle = CycleOptions {
                linger: Duration::from_millis(500),
                until: Some(report.reached),
                hurry: true,
                // Only the last position needs to be saved.
                save_idle: decoded >= report.reached,
            };

            let cycle = engine.sync_once(cycle, stop).await?;
            let _ = context.events.send(Event::Cycle(cycle.clone()));
            if cycle.is_stopped {
                return Ok(SessionEnd::Stopped);
            }

            report.add(&cycle);
            if let Some(reason) = cycle.reattach {
                return Ok(SessionEnd::Reattach(reason));
            }

            if cycle.source_transactions == 0 && engine.checkpoint().lsn < report.reached {
                report.reached = engine.reachable(report.reached, read_at.elapsed()).await?;
            }
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
                    read_at = tokio::time::Instant::now();
                }
                Err(LockNotAvailable) => {
                    tracing::warn!(
                        "waiting for a lock that another session holds on a published table, to \
                         read its shape"
                    )
                }
            }

            continue;
        }

        match engine.settle().await? {
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

/// Waits until every copy is merged. The stream goes on in the meantime.
pub(super) async fn finish_copies<T: OlapEngine + 'static>(
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
                news = copies.next() => {
                    let mut cycles = Vec::new();
                    let update = news?;
                    let reattach =
                        engine.handle_copy_event(update, copies, stop, &mut cycles).await?;
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

        let options_of_cycle = CycleOptions {
            linger: if is_waiting { Duration::ZERO } else { Duration::from_millis(100) },
            until: Some(engine.copies_reach()),
            hurry: !is_waiting,
            save_idle: !is_waiting,
        };

        loop {
            let cycle = engine.sync_once(options_of_cycle, stop).await?;
            let _ = context.events.send(Event::Cycle(cycle.clone()));
            if cycle.is_stopped {
                return Ok(Some(SessionEnd::Stopped));
            }

            report.add(&cycle);
            if let Some(reason) = cycle.reattach {
                return Ok(Some(SessionEnd::Reattach(reason)));
            }

            if !cycle.is_behind || copies.is_holding() {
                break;
            }
        }
    }

    Ok(None)
}

/// Returns the end of the source's WAL, as far as a slot can follow it.
pub(super) async fn wal_position(context: &Context) -> Result<Lsn, EngineError> {
    let sql = connect_sql(&context.options.source, "control").await?;
    let server = catalog::server(&sql).await?;
    crate::source::slot::judge_server(&server)?;
    Ok(reachable_target(catalog::wal_insert_lsn(&sql).await?))
}
