//! `rhei compact`: rewrites the file without the deleted rows and the free space.

use std::{
    fs,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args;
use indicatif::{HumanBytes, ProgressBar};
use serde_json::Value;

use super::{CliError, Invocation};
use crate::{
    control,
    olap::{DuckDb, compact::written_beside, engine::FileMaintenance},
    pipeline::EngineError,
};

/// Flags of `rhei compact`.
#[derive(Debug, Clone, Default, Args)]
pub struct CompactArgs {
    /// For scripts
    #[arg(long)]
    pub json: bool,
}

/// Runs the command. A running replicator compacts between two cycles; otherwise this process does.
pub async fn run(session: Invocation, args: CompactArgs) -> Result<ExitCode, CliError> {
    let target = session.target()?;
    let path = target.path.clone();
    let is_quiet = session.is_quiet;

    let compacted = match with_size_display(&path, is_quiet, control::request(&path, "compact"))
        .await
    {
        Some(answer) => match answer["error"].as_str() {
            Some(error) => return Err(CliError::Failed(error.to_owned())),
            None => answer,
        },
        None => {
            if DuckDb::read_state(&path)?.is_none() {
                return Err(CliError::Failed(format!(
                    "{} is not a copy that rhei made",
                    path.display()
                )));
            }

            let work = tokio::task::spawn_blocking(move || DuckDb::open(&target)?.compact());
            let compacted = with_size_display(&path, is_quiet, work)
                .await
                .map_err(|lost| EngineError::lost("compacting", lost))??;
            serde_json::to_value(compacted)
                .map_err(|error| CliError::Failed(format!("the result cannot be shown: {error}")))?
        }
    };

    if args.json {
        println!("{compacted}");
    } else {
        print_text(&compacted);
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits for the work, and shows how much of the new file is written: on a terminal at once,
/// otherwise by a line now and then.
async fn with_size_display<R>(path: &Path, is_quiet: bool, work: impl Future<Output = R>) -> R {
    const POLL_INTERVAL: Duration = Duration::from_millis(200);
    const LOG_INTERVAL: Duration = Duration::from_secs(10);

    let mut work = std::pin::pin!(work);
    let bar = if is_quiet { ProgressBar::hidden() } else { ProgressBar::new_spinner() };

    let mut last_line = Instant::now();
    loop {
        if let Ok(done) = tokio::time::timeout(POLL_INTERVAL, &mut work).await {
            bar.finish_and_clear();
            return done;
        }

        let (written, old) =
            (written_beside(path), fs::metadata(path).map_or(0, |file| file.len()));
        bar.set_message(format!(
            "{} written; the old file has {}",
            HumanBytes(written),
            HumanBytes(old)
        ));

        bar.tick();
        if bar.is_hidden() && last_line.elapsed() >= LOG_INTERVAL {
            last_line = Instant::now();
            tracing::info!(
                event = "compaction_progress",
                written_bytes = written,
                old_bytes = old,
                "compacting"
            );
        }
    }
}

fn print_text(compacted: &Value) {
    let bytes =
        |side: &str, name: &str| HumanBytes(compacted[side][name].as_u64().unwrap_or_default());

    let rows = compacted["rows"].as_u64().unwrap_or_default();
    let stored = compacted["before"]["stored_rows"].as_u64().unwrap_or_default().max(1);
    let dead = 100.0 * stored.saturating_sub(rows) as f64 / stored as f64;

    println!(
        "before  {} in the file, {} of it free, {} in its log; {dead:.0} % of the stored rows \
         deleted",
        bytes("before", "file_bytes"),
        bytes("before", "free_bytes"),
        bytes("before", "log_bytes")
    );

    println!(
        "after   {} in the file; {rows} rows of {} tables compared",
        bytes("after", "file_bytes"),
        compacted["tables"]
    );
}
