//! `rhei compact`: rewrites the file without the deleted rows and the free space.

use std::{
    fs,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args;
use indicatif::HumanBytes;
use serde_json::{Value, json};

use super::{
    CliError, Invocation,
    progress::{JSON_INTERVAL, LOG_INTERVAL, Style, print_json},
    screen,
};
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
    let style = session.style;

    let compacted = match with_size_display(&path, style, control::request(&path, "compact")).await
    {
        Some(answer) => match answer["error"].as_str() {
            Some(error) => return Err(CliError::Failed(error.to_owned())),
            None => answer,
        },
        None => {
            if DuckDb::read_state(&target)?.is_none() {
                return Err(CliError::Failed(format!("{target} is not a copy that rhei made")));
            }

            let work = tokio::task::spawn_blocking(move || DuckDb::open(&target)?.compact());
            let compacted = with_size_display(&path, style, work)
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
async fn with_size_display<R>(path: &Path, style: Style, work: impl Future<Output = R>) -> R {
    const POLL_INTERVAL: Duration = Duration::from_millis(200);

    let mut work = std::pin::pin!(work);
    let mut last_line = Instant::now();
    loop {
        if let Ok(done) = tokio::time::timeout(POLL_INTERVAL, &mut work).await {
            screen::show(Vec::new());
            return done;
        }

        let (written, old) =
            (written_beside(path), fs::metadata(path).map_or(0, |file| file.len()));
        let is_due = |interval| last_line.elapsed() >= interval;
        match style {
            Style::Bars => {
                screen::show(vec![match old {
                    0 => "compacting the lake".to_owned(),
                    old => {
                        let (written, old) = (HumanBytes(written), HumanBytes(old));
                        format!("{written} written; the old file has {old}")
                    }
                }]);
            }
            Style::Lines if is_due(LOG_INTERVAL) => {
                last_line = Instant::now();
                tracing::info!(
                    event = "compaction_progress",
                    written_bytes = written,
                    old_bytes = old,
                    "compacting"
                );
            }
            Style::Json if is_due(JSON_INTERVAL) => {
                last_line = Instant::now();
                print_json(&json!({
                    "event": "compacting", "written_bytes": written, "old_bytes": old
                }));
            }
            Style::Lines | Style::Json | Style::None => {}
        }
    }
}

fn print_lake(compacted: &Value) {
    for (side, what) in [("before", "before"), ("after", "after ")] {
        let lake = &compacted[side]["lake"];
        println!(
            "{what}  {} in {} data files and {} delete files; {} files wait to be deleted, {} \
             snapshots",
            HumanBytes(compacted[side]["file_bytes"].as_u64().unwrap_or_default()),
            lake["files"],
            lake["delete_files"],
            lake["old_files"],
            lake["snapshots"]
        );
    }
    println!("{} rows of {} tables counted", compacted["rows"], compacted["tables"]);
}

fn print_text(compacted: &Value) {
    if !compacted["before"]["lake"].is_null() {
        return print_lake(compacted);
    }
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
