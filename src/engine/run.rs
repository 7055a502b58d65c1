//! `run`: follows the source, one session after the other.

use std::time::Duration;

use rand::RngExt;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{
    attach::Recopy,
    command::Command,
    copies::CopyScheduler,
    periodic::spawn_periodic_tasks,
    session::{SessionEnd, SessionOptions, session, wants_whole_from_now_on},
    slot_recovery,
    supervisor::{self, RestartBudget, Supervisor},
};
use crate::{
    Lsn,
    error::error_chain,
    olap::{Compaction, OlapEngine},
    pipeline::{
        Context, EngineError, Writer,
        error_policy::{Policy, Standstill, policy},
    },
};

/// Follows the source until `stop`. A session that breaks for a reason that may heal is begun again
/// from the checkpoint, with growing, jittered pauses; other errors end the run.
///
/// # Errors
/// The first session could not begin, or a later session met an error that no retry mends.
pub async fn run<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    mut commands: mpsc::UnboundedReceiver<Command>,
    stop: &CancellationToken,
) -> Result<(), EngineError> {
    let mut copies = CopyScheduler::new(context, writer, u32::MAX);
    let mut supervisor = Supervisor::new(context.options.supervision.grace);
    spawn_periodic_tasks(&mut supervisor, context, writer);

    let ended = run_sessions(context, writer, &mut commands, &mut copies, stop).await;
    copies.shutdown().await;

    for task in supervisor.shutdown().await {
        tracing::warn!(task, "did not finish in time, and was given up");
    }

    ended?;
    match writer.call(|target| target.checkpoint_file(Compaction::Skip)).await {
        // The changes stay in the log, and are written into the file by the next checkpoint.
        Err(error) if policy(&error) == Policy::Disk => {
            tracing::warn!(error = error_chain(&error), "file checkpoint put off");
            Ok(())
        }
        tidied => tidied,
    }
}

pub(super) async fn run_sessions<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    asked: &mut mpsc::UnboundedReceiver<Command>,
    copies: &mut CopyScheduler<T>,
    stop: &CancellationToken,
) -> Result<(), EngineError> {
    const FIRST_PAUSE: Duration = Duration::from_millis(500);
    const MAX_PAUSE: Duration = Duration::from_secs(30);
    const CALM: Duration = Duration::from_secs(10);
    const HEALTHY_AFTER: Duration = Duration::from_secs(2);
    const IN_A_ROW: u32 = 20;
    const EMPTY_PAUSE: Duration = Duration::from_secs(2);
    const EMPTY_WARNING: Duration = Duration::from_secs(60);

    let mut pause = FIRST_PAUSE;
    let mut failures = 0_u32;
    let mut has_streamed = false;
    let mut in_a_row = 0_u32;

    let mut again = Recopy::None;
    let mut no_streaming_in_progress = false;

    let mut restarts = RestartBudget::new(context.options.supervision.restart);
    let mut must_reopen = false;
    let mut standstill = Standstill::default();
    let mut said_empty: Option<tokio::time::Instant> = None;

    loop {
        let (mut is_streaming, mut position) = (false, Lsn::ZERO);
        let began = tokio::time::Instant::now();

        let how = SessionOptions {
            no_streaming_in_progress,
            is_streaming: &mut is_streaming,
            position: &mut position,
        };

        let ended = supervisor::catch_panic("the session", async {
            if must_reopen {
                // No other task may have the file open.
                copies.shutdown().await;
                writer.call(|target| target.reopen()).await?;
                must_reopen = false;
            }
            Box::pin(session(context, writer, &again, asked, copies, stop, how)).await
        });
        let ended = ended.await;

        // Once the session has streamed, the target has recorded the copies that were asked for.
        if is_streaming {
            again = Recopy::None;
        }
        has_streamed |= is_streaming;

        let ended = match ended {
            Err(error) => match Box::pin(slot_recovery::recover(context, error, copies)).await {
                Ok(copy_again) => {
                    again = again.widen(copy_again);
                    continue;
                }
                Err(error) => Err(error),
            },
            ended => ended,
        };

        let error = match ended {
            Ok(SessionEnd::Resync(tables)) => {
                tracing::info!(?tables, "copying again, as asked");
                again = Recopy::Tables(tables);
                continue;
            }
            Ok(SessionEnd::Reattach(reason)) => {
                tracing::info!(reason, "attaching to the source again");

                // After many changes in a row, or after a change that a new session does not
                // settle, the next session does not begin at once.
                in_a_row = if began.elapsed() < CALM { in_a_row + 1 } else { 0 };
                if in_a_row > IN_A_ROW {
                    tokio::select! {
                        () = stop.cancelled() => return Ok(()),
                        () = tokio::time::sleep(FIRST_PAUSE * (in_a_row - IN_A_ROW).min(20)) => {}
                    }
                }
                continue;
            }
            Ok(_) => return Ok(()),
            // A table that was to be copied again is gone by now; all other tables go on.
            Err(EngineError::Setup(reason))
                if has_streamed && matches!(again, Recopy::Tables(_)) =>
            {
                tracing::error!(reason, "not copied again");
                again = Recopy::None;
                continue;
            }
            Err(EngineError::NoTable { .. }) => {
                has_streamed = true;
                if said_empty.is_none_or(|said| said.elapsed() >= EMPTY_WARNING) {
                    said_empty = Some(tokio::time::Instant::now());
                    tracing::warn!(
                        publications = context.options.publications.join(", "),
                        "waiting for the first table: the publication holds none that [source] \
                         tables and exclude choose"
                    );
                }

                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    () = tokio::time::sleep(context.options.catalog_interval.min(EMPTY_PAUSE)) => {}
                }
                continue;
            }
            Err(error) => error,
        };

        // The operator has to mend a session that cannot begin; a session that broke after it had
        // begun may heal.
        let policy = policy(&error);
        match policy {
            Policy::Passing => {}
            Policy::Outage | Policy::Disk if has_streamed => {}
            Policy::Restart if restarts.take() => {}
            Policy::Restart => {
                tracing::error!("too many bugs in too short a time; rhei stops");
                return Err(error);
            }
            Policy::Outage | Policy::Disk | Policy::Table | Policy::Operator => return Err(error),
        }

        // A failed call of DuckDB may have left the file closed.
        must_reopen = policy == Policy::Disk || matches!(error, EngineError::Target(_));
        no_streaming_in_progress |= wants_whole_from_now_on(&error);

        // A session that breaks as soon as it streams may do so again and again.
        if is_streaming && began.elapsed() > HEALTHY_AFTER {
            (failures, pause) = (0, FIRST_PAUSE);
        }

        failures += 1;
        let is_end_of_stream = is_streaming && policy.is_waited_for();
        let left_alone =
            if is_end_of_stream { standstill.ended(position, began.elapsed()) } else { None };
        let jittered = left_alone.unwrap_or(pause).mul_f64(rand::rng().random_range(0.5..1.0));

        tracing::warn!(
            error = error_chain(&error),
            failures,
            retry_in_ms = jittered.as_millis() as u64,
            "{}; going on from the checkpoint",
            match policy {
                Policy::Disk => "the disk failed",
                Policy::Restart => "rhei met a bug",
                _ => "the stream broke",
            }
        );

        if left_alone.is_some() {
            tracing::error!(
                %position,
                "the source ends the stream at the same position again and again, and is left \
                 alone for longer and longer: its log says whether it crashes over what comes next \
                 there"
            );
        }

        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(jittered) => {}
        }

        pause = (pause * 2).min(MAX_PAUSE);
    }
}
