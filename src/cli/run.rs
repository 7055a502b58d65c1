//! `rhei run`: follows the source until a signal.

use std::{
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{CliError, Invocation, reload::Steering};
use crate::{
    config::Inputs,
    control::{Control, Requests},
    engine::{self, supervisor::RestartBudget},
    error::error_chain,
    observe::Observe,
    olap::{DuckDb, TargetError},
    pipeline::{Context, EngineError, Options, Writer, meter::EngineState},
    serve::Endpoint,
};

/// How long a DuckDB that is to be started again may take to end.
const TIME_TO_CLOSE: Duration = Duration::from_secs(10);

/// Runs the command.
pub async fn run(session: Invocation, inputs: Inputs) -> Result<ExitCode, CliError> {
    let (mut context, progress) = session.service_context()?;
    let stop = session.stop_on_signal();
    let observe = match session.config.observe.clone() {
        Some(options) => Some(Observe::start(&context, options).await?),
        None => None,
    };
    let mut steering = Steering::start(inputs, &session, &context.options);
    let mut restarts = RestartBudget::new(context.options.supervision.restart);

    let ended = loop {
        let followed = follow(&session, &mut context, observe.as_ref(), &mut steering, &stop);
        let (ended, is_closed) = followed.await?;
        match ended {
            // After a bug that any statement has met, also one of a reader, DuckDB takes no other.
            Err(EngineError::Target(error))
                if error.is_invalidated() && is_closed && restarts.take() =>
            {
                tracing::error!(
                    event = "duckdb_restarted",
                    error = error_chain(&error),
                    "DuckDB met a bug of its own and takes no statement any more: starting it \
                     again, and going on from the checkpoint"
                );
                context.meter.duckdb_restarted();
            }
            ended => break ended,
        }
    };

    drop((observe, context));
    progress.finish().await;

    ended?;
    Ok(ExitCode::SUCCESS)
}

/// Opens the file and follows the source until `stop`. Returns also whether DuckDB has ended and
/// can be started again. When the settings were read again, `context` has the new ones.
async fn follow(
    session: &Invocation,
    context: &mut Context,
    observe: Option<&Observe>,
    steering: &mut Steering,
    stop: &CancellationToken,
) -> Result<(Result<(), EngineError>, bool), CliError> {
    // The file is opened once: two DuckDB instances on one file do not lock each other out in one
    // process.
    let writer = {
        // Opening the file replays what is in its log.
        let _rest = context.pulse.rest();
        Writer::new(DuckDb::open(&context.options.target)?).with_pulse(context.pulse.clone())
    };

    let endpoint = match session.config.serve.clone() {
        Some(options) => {
            let publication = session.config.publication.clone().map(|(options, _)| options);
            let share = move |target: &mut DuckDb| target.share(publication.as_ref());
            let endpoint = {
                let meter = context.meter.clone();
                Endpoint::start(writer.call(share).await?, options, meter).await?
            };
            endpoint.announce();
            Some(endpoint)
        }
        None => None,
    };

    let watch = observe.map(|observe| observe.watch_file(writer.clone()));

    let broken = endpoint.as_ref().map(Endpoint::broken).unwrap_or_default();
    let ended = loop {
        match run_engine(context, &writer, steering, &broken, stop).await {
            Ok(RunEnd::Reloaded(options)) => context.options = options,
            Ok(RunEnd::Stopped) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    context.meter.set_engine(EngineState::Ended);

    let has_ended = match endpoint {
        Some(endpoint) => endpoint.stop().await,
        None => true,
    };
    drop(watch);

    // A plain stop does not wait for those who still ask the replicator something.
    let must_restart = matches!(&ended, Err(EngineError::Target(error)) if error.is_invalidated());
    let is_closed = must_restart && has_ended && is_closed(writer).await;
    Ok((ended, is_closed))
}

/// Why the engine has ended.
enum RunEnd {
    Stopped,
    /// The settings have changed: the engine goes on with these options.
    Reloaded(Arc<Options>),
}

/// Runs the engine until `stop`, until its settings change, or until DuckDB is `broken`: with an
/// idle source, nothing but a reader notices that DuckDB is dead.
async fn run_engine(
    context: &Context,
    writer: &Writer<DuckDb>,
    steering: &mut Steering,
    broken: &CancellationToken,
    stop: &CancellationToken,
) -> Result<RunEnd, EngineError> {
    let (command, commands) = mpsc::unbounded_channel();
    let requests = Requests { commands: command, steer: steering.steer.clone() };
    let _control = Control::listen(context, writer.clone(), requests);

    let stop_here = stop.child_token();
    let mut running = std::pin::pin!(engine::run(context, writer, commands, &stop_here));
    tokio::select! {
        ended = &mut running => ended.map(|()| RunEnd::Stopped),
        () = broken.cancelled() => {
            stop_here.cancel();
            // Whatever the rest of the run says, this is why it ended.
            let _ = running.await;
            Err(TargetError::Invalidated.into())
        }
        Ok(()) = steering.options.changed() => {
            stop_here.cancel();
            running.await?;
            if stop.is_cancelled() {
                return Ok(RunEnd::Stopped);
            }
            Ok(RunEnd::Reloaded(Arc::clone(&steering.options.borrow_and_update())))
        }
    }
}

/// Waits until nothing in this process uses the file any more, and closes it. Returns `false` when
/// something still does after [`TIME_TO_CLOSE`].
async fn is_closed(writer: Writer<DuckDb>) -> bool {
    const STEP: Duration = Duration::from_millis(50);
    let since = Instant::now();
    while since.elapsed() < TIME_TO_CLOSE {
        let is_used = writer.call(|target: &mut DuckDb| Ok::<_, EngineError>(target.is_used()));
        if writer.is_last() && matches!(is_used.await, Ok(false)) {
            return true;
        }
        tokio::time::sleep(STEP).await;
    }
    false
}
