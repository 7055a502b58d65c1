//! `run`: follows the source, one session after the other.

use std::time::Duration;

use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    command::Command,
    copies::CopyScheduler,
    periodic::spawn_periodic_tasks,
    retry::{NextSession, RetryState, SessionRun},
    session::{SessionEnd, SessionOptions, session},
    slot_recovery, supervisor,
    supervisor::Supervisor,
};
use crate::{
    Lsn,
    error::error_chain,
    olap::{Compaction, OlapEngine},
    pipeline::{
        Context, EngineError, Event, Writer,
        error_policy::{Policy, policy},
        meter::EngineState,
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

    context.meter.set_engine(EngineState::Attaching);
    let ended = run_sessions(context, writer, &mut commands, &mut copies, stop).await;
    copies.shutdown().await;

    supervisor.end().await;

    ended?;
    match writer.call(|target| target.checkpoint_file(Compaction::Skip)).await {
        // The changes stay in the log, and are written into the file by the next checkpoint.
        Err(error)
            if policy(&error) == Policy::Disk
                || matches!(&error, EngineError::Target(of) if of.wants_reopening()) =>
        {
            tracing::warn!(
                event = "file_checkpoint_postponed",
                error = error_chain(&error),
                "file checkpoint put off"
            );
            Ok(())
        }
        tidied => tidied,
    }
}

/// Runs one session after the other, until `stop` or an error that no retry mends.
async fn run_sessions<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    commands: &mut mpsc::UnboundedReceiver<Command>,
    copies: &mut CopyScheduler<T>,
    stop: &CancellationToken,
) -> Result<(), EngineError> {
    // A run whose settings were read again has streamed before, so that it waits for an outage.
    let has_streamed = context.checkpoint.reached() > Lsn::ZERO;
    let mut state = RetryState::new(&context.options, has_streamed);

    loop {
        let (end, run) = run_session(context, writer, commands, copies, &mut state, stop).await;
        state.ended(run);
        context.meter.set_engine(match &end {
            Ok(_) => EngineState::Attaching,
            Err(error) => EngineState::Waiting(error_chain(error)),
        });

        let end = match end {
            Err(error) => match Box::pin(slot_recovery::recover(context, error, copies)).await {
                Ok(recopy) => {
                    state.recopy = std::mem::take(&mut state.recopy).widen(recopy);
                    continue;
                }
                Err(error) => Err(error),
            },
            end => end,
        };

        match state.next(end, run) {
            NextSession::AtOnce => {}
            NextSession::After(pause) => tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = rest(context, pause) => {}
            },
            NextSession::Stop => return Ok(()),
            NextSession::Fail(error) => return Err(error),
        }
    }
}

/// Leaves the source alone for a while.
async fn rest(context: &Context, pause: Duration) {
    let _ = context.events.send(Event::Pausing { pause });
    let _rest = context.pulse.rest();
    tokio::time::sleep(pause).await;
}

async fn run_session<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    commands: &mut mpsc::UnboundedReceiver<Command>,
    copies: &mut CopyScheduler<T>,
    state: &mut RetryState,
    stop: &CancellationToken,
) -> (Result<SessionEnd, EngineError>, SessionRun) {
    let began = Instant::now();
    let mut run = SessionRun::default();

    let end = supervisor::catch_panic("the session", async {
        if state.must_reopen {
            // No other task may have the file open.
            copies.shutdown().await;
            writer.call(|target| target.reopen()).await?;
            state.must_reopen = false;
        }

        let options = SessionOptions {
            recopy: &state.recopy,
            no_streaming_in_progress: state.no_streaming_in_progress,
        };
        Box::pin(session(context, writer, options, commands, copies, &mut run, stop)).await
    });

    let end = end.await;
    run.lasted = began.elapsed();
    (end, run)
}
