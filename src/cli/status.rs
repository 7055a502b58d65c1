//! `rhei status`: how far the copy is.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::{CliError, Session};
use crate::{
    source::{catalog, connect::connect_sql},
    target::{DuckDb, Phase, StoredState, TableState},
};

/// Flags of `rhei status`.
#[derive(Debug, Clone, Default, Args)]
pub struct StatusArgs {
    /// For scripts
    #[arg(long)]
    pub json: bool,
}

struct Slot {
    held_bytes: Option<u64>,
    lag_bytes: u64,
    active: bool,
    wal_status: Option<String>,
}

/// Runs the command. Without a source, or when it cannot be reached, only the file is read.
pub async fn run(session: Session, args: StatusArgs) -> Result<ExitCode, CliError> {
    let path = session.target()?.path;
    let state = DuckDb::look(&path)?;
    let Some(state) = state else {
        return Err(CliError::Failed(format!("{} is not a copy that rhei made", path.display())));
    };
    let slot = match session.source() {
        Ok(source) => match connect_sql(&source, "status").await {
            Ok(client) => {
                let end = catalog::wal_insert_lsn(&client).await?;
                catalog::slot(&client, &state.pipeline.slot).await?.map(|slot| Slot {
                    held_bytes: slot.held_bytes,
                    lag_bytes: end.bytes_since(state.pipeline.checkpoint.lsn),
                    active: slot.active,
                    wal_status: slot.wal_status,
                })
            }
            Err(error) => {
                tracing::warn!("{}", crate::engine::with_causes(&error));
                None
            }
        },
        Err(_) => None,
    };
    if args.json {
        println!("{}", as_json(&state, slot.as_ref()));
    } else {
        print_text(&state, slot.as_ref());
    }
    Ok(ExitCode::SUCCESS)
}

fn phase_word(phase: Phase) -> &'static str {
    match phase {
        Phase::Creating => "creating",
        Phase::Running => "running",
        Phase::PlainCopy => "plain_copy",
    }
}

fn lag_seconds(state: &StoredState) -> Option<f64> {
    let committed = state.pipeline.checkpoint.commit_time_us? + 946_684_800_000_000;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?.as_micros();
    Some((now as f64 - committed as f64).max(0.0) / 1_000_000.0)
}

fn as_json(state: &StoredState, slot: Option<&Slot>) -> serde_json::Value {
    let pipeline = &state.pipeline;
    let tables: Vec<_> = state
        .tables
        .iter()
        .map(|table| {
            let error = match &table.state {
                TableState::Error(reason) => Some(reason),
                _ => None,
            };
            json!({
                "source": table.source.to_string(), "target": table.target.to_string(), "state": table.state.word(),
                "error": error, "copied_rows": table.copied_rows, "copy_lsn": table.copy_lsn,
            })
        })
        .collect();
    json!({
        "phase": phase_word(pipeline.phase), "slot": pipeline.slot, "publications": pipeline.publications,
        "database": pipeline.database, "system_id": pipeline.system_id, "timeline": pipeline.timeline,
        "checkpoint": { "lsn": pipeline.checkpoint.lsn, "seconds_since_commit": lag_seconds(state) },
        "source": slot.map(|slot| json!({
            "lag_bytes": slot.lag_bytes, "wal_held_bytes": slot.held_bytes, "slot_active": slot.active,
            "wal_status": slot.wal_status,
        })),
        "tables": tables,
    })
}

fn print_text(state: &StoredState, slot: Option<&Slot>) {
    let pipeline = &state.pipeline;
    println!("copy of      {} ({}, slot {})", pipeline.database, phase_word(pipeline.phase), pipeline.slot);
    println!("checkpoint   {}", pipeline.checkpoint.lsn);
    if let Some(seconds) = lag_seconds(state) {
        println!("last change  committed {seconds:.1} s ago");
    }
    if let Some(slot) = slot {
        let held = slot.held_bytes.map_or_else(|| "unknown".to_owned(), |bytes| bytes.to_string());
        println!("behind       {} bytes of WAL; the slot holds {held} bytes", slot.lag_bytes);
    }
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["table", "state", "rows copied", "note"]);
    for stored in &state.tables {
        let note = match &stored.state {
            TableState::Error(reason) => reason.as_str(),
            _ => "",
        };
        table.add_row([&stored.source.to_string(), stored.state.word(), &stored.copied_rows.to_string(), note]);
    }
    println!("{table}");
}
