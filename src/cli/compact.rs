//! `rhei compact`: the file without what deletes left behind.

use std::process::ExitCode;

use clap::Args;
use indicatif::HumanBytes;
use serde_json::Value;

use super::{CliError, Session};
use crate::{
    control,
    target::{DuckDb, OlapEngine},
};

/// Flags of `rhei compact`.
#[derive(Debug, Clone, Default, Args)]
pub struct CompactArgs {
    /// For scripts
    #[arg(long)]
    pub json: bool,
}

/// Runs the command. A running replicator does it itself, between two cycles; else it is done here.
pub async fn run(session: Session, args: CompactArgs) -> Result<ExitCode, CliError> {
    let target = session.target()?;
    let compacted = match control::ask(&target.path, "compact").await {
        Some(answer) => match answer["error"].as_str() {
            Some(error) => return Err(CliError::Failed(error.to_owned())),
            None => answer,
        },
        None => {
            if DuckDb::look(&target.path)?.is_none() {
                return Err(CliError::Failed(format!("{} is not a copy that rhei made", target.path.display())));
            }
            serde_json::to_value(DuckDb::open(&target)?.compact()?)
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

fn print_text(compacted: &Value) {
    let bytes = |side: &str, name: &str| HumanBytes(compacted[side][name].as_u64().unwrap_or_default());
    let rows = compacted["rows"].as_u64().unwrap_or_default();
    let stored = compacted["before"]["stored_rows"].as_u64().unwrap_or_default().max(1);
    let dead = 100.0 * stored.saturating_sub(rows) as f64 / stored as f64;
    println!(
        "before  {} in the file, {} of it free, {} in its log; {dead:.0} % of the stored rows deleted",
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
