//! `rhei jobs`: the durable pieces of work, and their results.

use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::{CliError, Invocation};
use crate::{control, olap::DuckDb};

/// Flags of `rhei jobs`.
#[derive(Debug, Clone, Default, Args)]
pub struct JobsArgs {
    /// For scripts
    #[arg(long)]
    pub json: bool,
    /// Also those that are done
    #[arg(long)]
    pub all: bool,
}

/// Runs the command. A running replicator answers; without one the command reads the file.
pub async fn run(session: Invocation, args: JobsArgs) -> Result<ExitCode, CliError> {
    let target = session.target()?;

    let jobs = match control::request(&target.path, "jobs").await {
        Some(answer) => match answer["error"].as_str() {
            Some(error) => {
                return Err(CliError::Failed(format!("the running replicator answered: {error}")));
            }
            None => answer,
        },
        None => serde_json::to_value(DuckDb::read_jobs(&target)?)
            .map_err(|error| CliError::Failed(format!("jobs cannot be shown: {error}")))?,
    };

    if args.json {
        println!("{jobs}");
    } else {
        print_text(&jobs, args.all);
    }
    Ok(ExitCode::SUCCESS)
}

fn print_text(jobs: &Value, with_done: bool) {
    let text = |value: &Value| match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };

    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["id", "type", "what", "status", "attempts", "rows", "seconds", "error"]);

    let mut counts: std::collections::BTreeMap<String, u64> = std::collections::BTreeMap::new();
    for job in jobs.as_array().into_iter().flatten() {
        let status = text(&job["status"]);
        *counts.entry(status.clone()).or_default() += 1;
        if status == "done" && !with_done {
            continue;
        }

        let payload = &job["payload"];
        let pages = &payload["pages"];
        let what = match pages[1].as_u64() {
            Some(next) => format!("{} pages {}..{next}", text(&payload["from"]), pages[0]),
            None => format!("{} pages {}..", text(&payload["from"]), pages[0]),
        };

        let seconds =
            job["seconds"].as_f64().map_or_else(String::new, |seconds| format!("{seconds:.2}"));

        table.add_row([
            text(&job["id"]),
            text(&job["type"]),
            what,
            status,
            text(&job["attempts"]),
            text(&job["rows"]),
            seconds,
            text(&job["error"]),
        ]);
    }

    if table.row_iter().next().is_some() {
        println!("{table}");
    }

    let counts: Vec<String> =
        counts.iter().map(|(status, count)| format!("{count} {status}")).collect();
    println!("{}", if counts.is_empty() { "no jobs".to_owned() } else { counts.join(", ") });
}
