//! `rhei status`: shows how far the copy is.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use indicatif::HumanBytes;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{CliError, Invocation};
use crate::{
    Lsn, control,
    olap::DuckDb,
    source::{catalog, connection::connect_sql},
};

/// How long a health check waits for the replicator, which answers at once also while it is busy.
const TIME_TO_ANSWER: Duration = Duration::from_secs(5);

/// Flags of `rhei status`.
#[derive(Debug, Clone, Default, Args)]
pub struct StatusArgs {
    /// For scripts
    #[arg(long)]
    pub json: bool,
    /// Ask a running replicator alone: fail if there is none, and leave the source in peace. For
    /// health checks, with --quiet
    #[arg(long)]
    pub running: bool,
}

/// Runs the command. A running replicator answers; without one the command reads the file. Without
/// a source, or if the source cannot be reached, the WAL that the slot holds stays unknown.
pub async fn run(session: Invocation, args: StatusArgs) -> Result<ExitCode, CliError> {
    let target = session.target()?;
    let path = target.path.clone();

    let answered = control::request(&path, "status");
    let answer = if args.running {
        timeout(TIME_TO_ANSWER, answered).await.unwrap_or(None)
    } else {
        answered.await
    };

    let mut status = match answer {
        Some(answer) => {
            if let Some(error) = answer["error"].as_str() {
                if args.running {
                    // It has nothing to tell yet, and it runs.
                    return Ok(ExitCode::SUCCESS);
                }
                return Err(CliError::Failed(format!("the running replicator answered: {error}")));
            }

            let mut answer = answer;
            answer["replicator"] = json!("running");
            answer
        }
        None if args.running => {
            return Err(CliError::Failed(format!(
                "no replicator answers for {}\nhint: `rhei run` starts one; its log says why it \
                 ended",
                target
            )));
        }
        None => {
            let (state, space) = DuckDb::read_state(&target)?.ok_or_else(|| {
                CliError::Failed(format!("{target} is not a copy that rhei made"))
            })?;

            let verified = DuckDb::read_verifications(&target)?;
            let figures = control::Figures::default();
            let mut status = control::describe(&state, space, &verified, &figures);
            status["replicator"] = match DuckDb::read_writer(&target)? {
                Some(writer) => {
                    status["writer"] = json!(writer);
                    json!("elsewhere")
                }
                None => json!("stopped"),
            };
            status
        }
    };

    let slot = if args.running { None } else { slot_of(&session, &status).await };
    status["source"] = slot.unwrap_or(Value::Null);

    if args.json {
        println!("{status}");
    } else if !(args.running && session.is_quiet) {
        print_text(&status);
    }
    Ok(ExitCode::SUCCESS)
}

async fn slot_of(session: &Invocation, status: &Value) -> Option<Value> {
    let source = session.source().ok()?;
    let client = connect_sql(&source, "status")
        .await
        .inspect_err(|error| {
            tracing::warn!(
                event = "slot_unknown",
                error = crate::error::error_chain(error),
                "the source cannot be asked what its slot holds"
            )
        })
        .ok()?;

    let end = catalog::wal_insert_lsn(&client).await.ok()?;
    let slot = catalog::slot(&client, status["slot"].as_str()?).await.ok()??;
    let checkpoint: Lsn = status["checkpoint"]["lsn"].as_str()?.parse().ok()?;

    Some(json!({
        "lag_bytes": end.bytes_since(checkpoint),
        "wal_held_bytes": slot.held_bytes,
        "slot_active": slot.active,
        "wal_status": slot.wal_status,
    }))
}

/// Returns the line about the file, or the files of a lake.
fn space(file: &Value) -> String {
    let bytes = |name: &str| HumanBytes(file[name].as_u64().unwrap_or_default());
    let lake = &file["lake"];
    if lake.is_null() {
        return format!(
            "file         {}, {} of it free; its log {}",
            bytes("file_bytes"),
            bytes("free_bytes"),
            bytes("log_bytes")
        );
    }

    let catalog =
        lake["catalog_bytes"].as_u64().map(|bytes| format!("; catalog {}", HumanBytes(bytes)));
    format!(
        "lake         {} in {} data files and {} delete files; {} files wait to be deleted, {} \
         snapshots{}",
        bytes("file_bytes"),
        lake["files"],
        lake["delete_files"],
        lake["old_files"],
        lake["snapshots"],
        catalog.unwrap_or_default()
    )
}

fn print_text(status: &Value) {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    // A lake cannot tell a process of another machine that was killed from one that runs.
    let elsewhere = status["writer"].as_str().map(|writer| format!(", or killed there: {writer}"));
    println!(
        "copy of      {} ({}, slot {}, replicator {}{})",
        text(&status["database"]),
        text(&status["phase"]),
        text(&status["slot"]),
        text(&status["replicator"]),
        elsewhere.unwrap_or_default()
    );
    println!("checkpoint   {}", text(&status["checkpoint"]["lsn"]));

    if let Some(seconds) = status["checkpoint"]["seconds_since_commit"].as_f64() {
        println!("last change  committed {seconds:.1} s ago");
    }

    let recent = &status["commit_to_visible"]["last_minutes"];
    if let (Some(p50), Some(p99)) = (recent["p50_ms"].as_f64(), recent["p99_ms"].as_f64()) {
        println!(
            "latency      half of the last minutes' transactions were here within {p50:.0} ms of \
             their commit, 99 % within {p99:.0} ms"
        );
    }

    if let Some(most) = status["commit_pause"]["last_minutes"]["max_ms"].as_f64() {
        println!("commits      into DuckDB took {most:.0} ms at most in the last minutes");
    }

    println!("{}", space(&status["file"]));

    if let Some(lag) = status["source"]["lag_bytes"].as_u64() {
        println!(
            "behind       {lag} bytes of WAL; the slot holds {} bytes",
            text(&status["source"]["wal_held_bytes"])
        );
    }

    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["table", "state", "rows copied", "verified", "note"]);

    for stored in status["tables"].as_array().into_iter().flatten() {
        let note = [stored["error"].as_str().map(str::to_owned), other_names(stored)];
        let note = note.into_iter().flatten().collect::<Vec<_>>().join("; ");
        table.add_row([
            text(&stored["source"]),
            text(&stored["state"]),
            text(&stored["copied_rows"]),
            verified(&stored["verified"]),
            note,
        ]);
    }

    println!("{table}");
    for (relation, left_out) in status["left_out"].as_object().into_iter().flatten() {
        let reason = text(&left_out["reason"]).replace('_', " ");
        println!("left out     {relation}: {} changes ({reason})", text(&left_out["changes"]));
    }
    for (table, sql) in status["not_published"].as_object().into_iter().flatten() {
        println!("not copied   {table}: it is not published; {}", text(sql));
    }
}

/// Returns the names of a table that differ from those at the source, as a sentence.
fn other_names(stored: &Value) -> Option<String> {
    let mut names = Vec::new();
    if stored["target"] != stored["source"] {
        names.push(format!("called {} in DuckDB", stored["target"].as_str().unwrap_or_default()));
    }

    for (column, name) in stored["renamed_columns"].as_object().into_iter().flatten() {
        names.push(format!("its column {column} is {}", name.as_str().unwrap_or_default()));
    }
    (!names.is_empty()).then(|| names.join(", "))
}

/// Returns the last verification of a table, as `equal, 3 h ago`.
fn verified(result: &Value) -> String {
    let Some(verdict) = result["verdict"].as_str() else { return String::new() };
    let seconds = result["seconds_ago"].as_u64().unwrap_or_default();
    let ago = match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    };

    let is_repaired = result["repaired"].as_u64().is_some_and(|rows| rows > 0);
    let verdict = match verdict {
        "different" if is_repaired => "repaired".to_owned(),
        "different" => "DIFFERENT".to_owned(),
        verdict => verdict.replace('_', " "),
    };
    format!("{verdict}, {ago} ago")
}
