//! `rhei wait`: returns when the copy has reached a position of the source.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use tokio::time::{Instant, timeout, timeout_at};

use super::{CliError, Invocation};
use crate::{
    Lsn,
    checkpoint::reachable_target,
    config::Span,
    control,
    olap::DuckDb,
    source::{catalog, connection::connect_sql},
};

/// After this time every commit that was visible is flushed.
const FLUSHED_SOON: Duration = Duration::from_secs(1);

/// Flags of `rhei wait`.
#[derive(Debug, Clone, Args)]
#[command(group = clap::ArgGroup::new("position").required(true))]
pub struct WaitArgs {
    /// Wait for this position of the source's WAL, as pg_current_wal_lsn() prints it
    #[arg(long, group = "position")]
    pub lsn: Option<Lsn>,
    /// Wait for everything that is committed at the source by now
    #[arg(long, group = "position")]
    pub now: bool,
    /// Wait also until nothing is being copied and changed tables have arrived in their new shape
    #[arg(long)]
    pub settled: bool,
    /// Give up after this time
    #[arg(long, default_value = "60s", value_name = "TIME")]
    pub timeout: Span,
}

/// Runs the command.
pub async fn run(session: Invocation, args: WaitArgs) -> Result<ExitCode, CliError> {
    let position = args.lsn.map_or(Position::Now, Position::At);
    let end = Instant::now() + args.timeout.0;
    let reached = wait(&session, position, args.timeout.0).await?;
    if args.settled {
        wait_settled(&session, reached, end).await?;
    }
    println!("{reached}");
    Ok(ExitCode::SUCCESS)
}

/// Waits until a running replicator has everything before `reached`, also what is being copied.
async fn wait_settled(session: &Invocation, reached: Lsn, end: Instant) -> Result<(), CliError> {
    let question = format!("settle {reached}");
    match timeout_at(end, control::request(&session.target()?.path, &question)).await {
        Ok(Some(answer)) => match answer["error"].as_str() {
            Some(error) => Err(CliError::Failed(error.to_owned())),
            None => Ok(()),
        },
        Ok(None) => Err(CliError::Failed(
            "no replicator runs, so nothing settles\nhint: `rhei run` starts one".to_owned(),
        )),
        Err(_) => Err(CliError::Failed(
            "not everything is in the copy yet\nhint: `rhei status` shows what is being copied; \
             --timeout waits for longer"
                .to_owned(),
        )),
    }
}

/// What to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    Now,
    At(Lsn),
}

impl std::str::FromStr for Position {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "now" {
            return Ok(Self::Now);
        }
        text.parse()
            .map(Self::At)
            .map_err(|_| "neither \"now\" nor an LSN like 0/16B3748".to_owned())
    }
}

/// Waits until the copy has what is committed before a position, and returns the checkpoint that it
/// has then.
pub async fn wait(
    session: &Invocation,
    position: Position,
    within: Duration,
) -> Result<Lsn, CliError> {
    let end = Instant::now() + within;
    let target = session.target()?;
    let path = &target.path;
    let goal = match position {
        Position::At(lsn) => lsn,
        Position::Now => {
            let source = connect_sql(&session.source()?, "wait").await?;
            let written = catalog::wal_insert_lsn(&source).await?;
            // What a commit that is not flushed yet has written is flushed soon, and WAL that
            // belongs to no commit may stay unflushed for long.
            let soon = format!("wait {written}");
            match timeout(FLUSHED_SOON, control::request(path, &soon)).await {
                Ok(_) => written,
                Err(_) => written.min(catalog::wal_flush_lsn(&source).await?),
            }
        }
    };

    let question = format!("wait {goal}");
    let answer = match timeout_at(end, control::request(path, &question)).await {
        Ok(answer) => answer,
        Err(_) => {
            return Err(CliError::Failed(format!(
                "the copy has not reached {goal} within {} s\nhint: `rhei status` says how far \
                 it is",
                within.as_secs()
            )));
        }
    };

    if let Some(answer) = answer {
        if let Some(error) = answer["error"].as_str() {
            return Err(CliError::Failed(error.to_owned()));
        }
        let reached = answer["reached"].as_str().and_then(|lsn| lsn.parse().ok());
        return Ok(reached.unwrap_or(goal));
    }

    // Without a replicator the copy stays as it is.
    let state = DuckDb::read_state(&target)?;
    let checkpoint = state.map_or(Lsn::ZERO, |(state, _)| state.pipeline.checkpoint.lsn);
    if checkpoint >= reachable_target(goal) {
        return Ok(checkpoint);
    }
    Err(CliError::Failed(format!(
        "the copy is at {checkpoint}, before {goal}, and no replicator runs\nhint: `rhei sync` \
         brings it up to date, `rhei run` keeps it so"
    )))
}
