//! `rhei sync`: catches up with the source, then stops.

use std::process::ExitCode;

use super::{CliError, Invocation};
use crate::engine::attach::Recopy;

/// Runs the command.
pub async fn run(session: Invocation) -> Result<ExitCode, CliError> {
    let (context, progress) = session.context()?;
    let stop = session.stop_on_signal();

    let report = crate::engine::sync(&context, Recopy::None, &stop).await;
    drop(context);
    progress.finish().await;

    let report = report?;
    if report.is_stopped {
        eprintln!(
            "stopped before the end; nothing is lost, the next sync goes on at {}",
            report.checkpoint
        );
        return Ok(ExitCode::from(1));
    }

    println!(
        "caught up at {}: {} source transactions, {} rows inserted, {} updated, {} deleted",
        report.checkpoint,
        report.source_transactions,
        report.inserted,
        report.updated,
        report.deleted
    );
    session.report_paused(&report.in_error)
}
