//! `rhei run`: follow the source until a signal.

use std::process::ExitCode;

use super::{CliError, Session};

/// Runs the command.
pub async fn run(session: Session) -> Result<ExitCode, CliError> {
    let (options, progress) = session.options()?;
    let stop = session.stop_on_signal();
    let ended = crate::engine::replicate::run(&options, &stop).await;
    drop(options);
    progress.finish().await;
    ended?;
    Ok(ExitCode::SUCCESS)
}
