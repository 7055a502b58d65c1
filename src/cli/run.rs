//! `rhei run`: follows the source until a signal.

use std::{
    io,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitCode},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{CliError, Invocation, reload::Steering};
use crate::{
    config::Inputs,
    control::{Control, Requests},
    engine::{self, supervisor::RestartBudget},
    error::error_chain,
    failpoint,
    observe::Observe,
    olap::{DuckDb, TargetError, TargetState, lake},
    pipeline::{Context, EngineError, Options, Writer, meter::EngineState, options::Budget},
    serve::Endpoint,
};

/// Hands the restarts over to the program that goes on: how many there were, and when those were
/// that still count, in microseconds since 1970.
const RESTARTS: &str = "RHEI_DUCKDB_RESTARTS";

/// The restarts of rhei because DuckDB had failed.
struct Restarts {
    count: u64,
    budget: RestartBudget,
}

impl Restarts {
    /// Reads what an earlier program of this process has handed over.
    fn take_over(handed_over: Option<&String>, budget: Budget) -> Self {
        let mut restarts = Self { count: 0, budget: RestartBudget::new(budget) };
        let mut numbers = handed_over.into_iter().flat_map(|text| text.split(' '));
        restarts.count = numbers.next().and_then(|count| count.parse().ok()).unwrap_or_default();
        for at in numbers.filter_map(|at| at.parse().ok()) {
            restarts.budget.note(since_1970().saturating_sub(Duration::from_micros(at)));
        }
        restarts
    }

    /// Takes one restart. Returns `false` when the budget is spent.
    fn take(&mut self) -> bool {
        self.count += 1;
        self.budget.take()
    }

    fn hand_over(&self) -> String {
        let now = since_1970();
        self.budget.ages().fold(self.count.to_string(), |text, age| {
            format!("{text} {}", now.saturating_sub(age).as_micros())
        })
    }
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Runs the command.
pub async fn run(session: Invocation, inputs: Inputs) -> Result<ExitCode, CliError> {
    let (mut context, progress) = session.service_context()?;
    let stop = session.stop_on_signal();
    let observe = match session.config.observe.clone() {
        Some(options) => Some(Observe::start(&context, options).await?),
        None => None,
    };
    let handed_over = inputs.environment.get(RESTARTS);
    let mut restarts = Restarts::take_over(handed_over, context.options.supervision.restart);
    let goes_on = handed_over.is_some();
    for _ in 0..restarts.count {
        context.meter.duckdb_restarted();
    }

    let mut steering = Steering::start(inputs, &session, &context.options);
    let followed = follow(&session, &mut context, observe.as_ref(), &mut steering, goes_on, &stop);
    let ended = followed.await?;
    let starts_again = match &ended {
        // After a bug that any statement has met, also one of a reader, DuckDB takes no other.
        Err(EngineError::Target(error))
            if error.is_invalidated() && !stop.is_cancelled() && restarts.take() =>
        {
            tracing::error!(
                event = "duckdb_restarted",
                error = error_chain(error),
                "DuckDB met a bug of its own and takes no statement any more: starting it again, \
                 and going on from the checkpoint"
            );
            true
        }
        _ => false,
    };

    drop((observe, context));
    progress.finish().await;

    if starts_again && !stop.is_cancelled() {
        let error = start_again(&restarts);
        tracing::error!(event = "not_started_again", %error, "rhei cannot start itself again");
    }
    ended?;
    Ok(ExitCode::SUCCESS)
}

/// Replaces the program of this process by a new run of the same program: what a DuckDB that has
/// failed holds open cannot be closed, and ends with its program. Returns only when the new one
/// cannot be started.
fn start_again(restarts: &Restarts) -> io::Error {
    // Also when another version has replaced the file meanwhile.
    const OWN: &str = "/proc/self/exe";
    let program = match std::env::current_exe() {
        Ok(_) if Path::new(OWN).exists() => OWN.into(),
        Ok(program) => program,
        Err(error) => return error,
    };
    let mut arguments = std::env::args_os();

    let mut command = Command::new(program);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    command.args(arguments).env(RESTARTS, restarts.hand_over());
    // What a test has asked for has happened in this program.
    command.env_remove(failpoint::VARIABLE);
    command.exec()
}

/// Opens the target. A process that goes on for an earlier one waits until the target can be
/// opened, since the cause that DuckDB failed over may last; none when `stop` comes first.
async fn open(
    context: &Context,
    goes_on: bool,
    stop: &CancellationToken,
) -> Result<Option<DuckDb>, TargetError> {
    const TRY_INTERVAL: Duration = Duration::from_secs(2);
    let is_lake = context.options.target.lake.is_some();
    let mut logged = None;

    while !stop.is_cancelled() {
        // Opening the file replays what is in its log.
        let _rest = context.pulse.rest();
        let opened = DuckDb::open(&context.options.target).and_then(|mut target| {
            let state = if goes_on { target.state()? } else { None };
            Ok((state, target))
        });
        let error = match opened {
            Ok((Some(state), target)) => {
                // So the first session waits for an outage of the source as a later one does.
                context.checkpoint.set_reached(state.pipeline.checkpoint.lsn);
                return Ok(Some(target));
            }
            Ok((None, target)) => return Ok(Some(target)),
            // The next program begins with a DuckDB of its own, as long as the budget lasts.
            Err(error) if goes_on && (error.is_internal() || error.is_invalidated()) => {
                return Err(TargetError::Invalidated { source: Some(Box::new(error)) });
            }
            Err(error) if goes_on && is_lake && lake::may_open_later(&error) => {
                error_chain(&TargetError::LakeAway { source: Box::new(error) })
            }
            Err(error) if goes_on && error.wants_reopening() => error_chain(&error),
            Err(error) => return Err(error),
        };

        if logged.as_ref() != Some(&error) {
            tracing::warn!(
                event = "target_not_opened",
                error,
                "the target cannot be opened now; rhei tries again until it can"
            );
            logged = Some(error);
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(TRY_INTERVAL) => {}
        }
    }
    Ok(None)
}

/// Opens the target and follows the source until `stop`. When the settings were read again,
/// `context` has the new ones. `goes_on`: this process has taken the place of one that followed.
async fn follow(
    session: &Invocation,
    context: &mut Context,
    observe: Option<&Observe>,
    steering: &mut Steering,
    goes_on: bool,
    stop: &CancellationToken,
) -> Result<Result<(), EngineError>, CliError> {
    // The file is opened once: two DuckDB instances on one file do not lock each other out in one
    // process.
    let target = match open(context, goes_on, stop).await {
        Ok(Some(target)) => target,
        Ok(None) => return Ok(Ok(())),
        Err(error) => return Ok(Err(error.into())),
    };
    let writer = Writer::new(target).with_pulse(context.pulse.clone());

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

    if let Some(endpoint) = endpoint {
        endpoint.stop().await;
    }
    drop(watch);
    Ok(ended)
}

/// Why the engine has ended.
enum RunEnd {
    Stopped,
    /// The settings have changed: the engine goes on with these options.
    Reloaded(Arc<Options>),
}

/// Runs the engine until `stop`, until its settings change, or until DuckDB is `broken`: with an
/// idle source, nothing but a reader or a periodic task notices that DuckDB is dead.
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
    let broken = async {
        tokio::select! {
            () = broken.cancelled() => {}
            () = writer.broken().cancelled() => {}
        }
    };
    let ended = tokio::select! {
        ended = &mut running => ended.map(|()| RunEnd::Stopped),
        () = broken => {
            stop_here.cancel();
            // Whatever the rest of the run says, this is why it ended.
            let source = match running.await {
                Err(EngineError::Target(error)) => Some(Box::new(error)),
                _ => None,
            };
            Err(TargetError::Invalidated { source }.into())
        }
        Ok(()) = steering.options.changed() => {
            stop_here.cancel();
            running.await.map(|()| match stop.is_cancelled() {
                true => RunEnd::Stopped,
                false => RunEnd::Reloaded(Arc::clone(&steering.options.borrow_and_update())),
            })
        }
    };

    match ended {
        // The error of a loader does not say that DuckDB takes no other statement.
        Err(EngineError::Target(error)) if !error.is_invalidated() && is_broken(writer).await => {
            Err(TargetError::Invalidated { source: Some(Box::new(error)) }.into())
        }
        ended => ended,
    }
}

/// Returns whether DuckDB takes no statement any more.
async fn is_broken(writer: &Writer<DuckDb>) -> bool {
    let _ = writer.call(|target: &mut DuckDb| target.state()).await;
    writer.broken().is_cancelled()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_holds_across_the_programs_that_take_each_others_place() {
        let budget = Budget { max: 2, within: Some(Duration::from_secs(600)) };
        let mut text = None;
        for is_left in [true, true, false] {
            let mut restarts = Restarts::take_over(text.as_ref(), budget);
            assert_eq!(restarts.take(), is_left);
            text = Some(restarts.hand_over());
        }

        // Those of long ago are counted, and do not count.
        let mut restarts = Restarts::take_over(Some(&"7 1 2".to_owned()), budget);
        assert!(restarts.take());
        assert_eq!(restarts.count, 8);
    }
}
