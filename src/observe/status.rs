//! What `/healthz`, `/readyz` and `/status.json` say, from what was seen last.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    log_watch,
    watch::{FileSeen, Watched, unix_now},
};
use crate::{
    Lsn, control,
    olap::{StoredTable, TableState},
    pipeline::meter::EngineState,
};

/// Tables that the status page shows; those with something to say come first.
const MAX_SHOWN_TABLES: usize = 200;

/// A rung of the lag ladder.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rung {
    pub name: &'static str,
    pub lsn: Lsn,
    /// How far it lies behind the source's end; none while that is not known.
    pub lag_bytes: Option<u64>,
    pub lag: Option<Duration>,
}

/// The name of the rung that says how far readers are behind.
pub const APPLIED: &str = "applied";

/// Returns the rungs that are known, from the source to what is durable, without the source's end.
pub fn ladder(watched: &Watched) -> Vec<Rung> {
    let (meter, now) = (&watched.context.meter, Instant::now());
    let stream = meter.stream();
    let sent = watched.source().slot.and_then(|slot| slot.sent).unwrap_or_default();
    let heads = watched.heads();

    [
        ("sent", stream.sent().max(sent)),
        ("received", stream.received()),
        ("decoded", stream.decoded()),
        (APPLIED, meter.applied()),
        ("durable", stream.acknowledged()),
    ]
    .into_iter()
    .filter(|(_, lsn)| *lsn > Lsn::ZERO)
    .map(|(name, lsn)| Rung {
        name,
        lsn,
        lag_bytes: heads.last().map(|head| head.bytes_since(lsn)),
        lag: heads.behind(lsn, now),
    })
    .collect()
}

/// Returns why the process is to be replaced, if it is.
pub fn unhealthy(watched: &Watched) -> Option<String> {
    let (state, since) = watched.context.meter.engine();
    (state == EngineState::Ended).then(|| {
        format!("the engine ended {} ago: nothing follows the source", seconds(since.as_secs_f64()))
    })
}

/// Returns why the copy is not to be relied on now, if it is not: it is further behind than
/// `[observe] ready_lag`, or how far it is behind is unknown.
pub fn unready(watched: &Watched) -> Option<String> {
    let limit = watched.options.ready_lag;
    let (state, since) = watched.context.meter.engine();
    match state {
        EngineState::Streaming => {}
        EngineState::Ended => return unhealthy(watched),
        EngineState::Attaching if since <= limit && watched.context.meter.applied() > Lsn::ZERO => {
        }
        EngineState::Attaching => return Some("attaching to the source".to_owned()),
        EngineState::Waiting(_) if since <= limit => {}
        EngineState::Waiting(error) => {
            return Some(format!("the stream is broken: {}", first_line(&error)));
        }
    }

    let file = watched.file().filter(|file| file.state.is_some());
    let Some(file) = file else { return Some("starting".to_owned()) };
    let waiting = tables(&file).filter(|table| is_first_copy(table)).count();
    if waiting > 0 {
        let tables = if waiting == 1 { "table is" } else { "tables are" };
        return Some(format!("{waiting} {tables} being copied for the first time"));
    }

    let source = watched.source();
    let Some(seen) = source.at else { return Some("the source has not answered yet".to_owned()) };
    let applied = ladder(watched).into_iter().find(|rung| rung.name == APPLIED);
    let Some(lag) = applied.and_then(|rung| rung.lag) else {
        return Some("how far the copy is behind is not known yet".to_owned());
    };

    // What the source has written since it last answered is unknown.
    let lag = if source.error.is_some() { lag + seen.elapsed() } else { lag };
    (lag > limit).then(|| {
        format!(
            "the copy is {} behind, and [observe] ready_lag is {}",
            seconds(lag.as_secs_f64()),
            seconds(limit.as_secs_f64())
        )
    })
}

fn seconds(seconds: f64) -> String {
    if seconds < 10.0 { format!("{seconds:.1} s") } else { format!("{seconds:.0} s") }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// Returns the tables that the copy follows.
pub fn tables(file: &FileSeen) -> impl Iterator<Item = &StoredTable> {
    let tables = file.state.iter().flat_map(|state| &state.tables);
    tables.filter(|table| table.state != TableState::Dropped)
}

/// Returns whether a table has no copy yet that readers can use.
pub fn is_first_copy(table: &StoredTable) -> bool {
    matches!(table.state, TableState::Pending | TableState::Copying | TableState::CatchingUp)
}

/// Returns the seconds until the slot may lose WAL that it needs, at the speed of the last minutes.
pub fn slot_left_seconds(watched: &Watched) -> Option<f64> {
    let left = watched.source().slot?.left_bytes?;
    let speed = watched.heads().bytes_per_second()?;
    (speed > 0.0).then(|| left as f64 / speed)
}

/// Returns everything that the status page shows; samples from this number on.
pub fn describe(watched: &Watched, samples_from: u64) -> Value {
    let context = &watched.context;
    let (engine, since) = context.meter.engine();
    let error = match &engine {
        EngineState::Waiting(error) => Some(error.as_str()),
        _ => None,
    };
    let unready = unready(watched);
    let totals = context.meter.totals();

    let mut status = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "now": unix_now(),
        "started_at": watched.process.started_at,
        "engine": { "state": engine.as_str(), "seconds": since.as_secs_f64(), "error": error },
        "ready": {
            "is_ready": unready.is_none(),
            "reason": unready,
            "ready_lag_seconds": watched.options.ready_lag.as_secs_f64(),
        },
        "source": describe_source(watched),
        "ladder": ladder(watched).iter().map(describe_rung).collect::<Vec<_>>(),
        "totals": {
            "cycles": totals.cycles,
            "commits": totals.commits,
            "source_transactions": totals.source_transactions,
            "sessions": totals.sessions,
            "session_failures": totals.session_failures,
            "duckdb_restarts": totals.duckdb_restarts,
            "received_bytes": context.meter.stream().received_bytes(),
        },
        "readers": describe_readers(watched),
        "log": log_watch::lines().into_iter().map(|line| json!({
            "at": line.at,
            "level": line.level,
            "event": line.event,
            "text": line.text,
        })).collect::<Vec<_>>(),
        "samples": watched.samples().describe(samples_from),
    });
    status["memory"] = describe_memory(watched);
    status["copy"] = describe_copies(watched);
    status["file"] = Value::Null;

    if let Some(file) = watched.file() {
        status["file"] = describe_file(watched, &file);
        status["tables"] = describe_tables(watched, &file);
    }
    status
}

fn describe_rung(rung: &Rung) -> Value {
    json!({
        "rung": rung.name,
        "lsn": rung.lsn,
        "lag_bytes": rung.lag_bytes,
        "lag_seconds": rung.lag.map(|lag| lag.as_secs_f64()),
    })
}

fn describe_source(watched: &Watched) -> Value {
    let source = watched.source();
    let slot = source.slot.as_ref();
    json!({
        "head": slot.map(|slot| slot.head),
        "seen_seconds_ago": source.at.map(|at| at.elapsed().as_secs_f64()),
        "error": source.error,
        "slot": slot.map(|slot| json!({
            "name": watched.context.options.slot,
            "active": slot.active,
            "wal_status": slot.wal_status,
            "held_bytes": slot.held_bytes,
            "left_bytes": slot.left_bytes,
            "limit_bytes": slot.limit_bytes,
            "left_seconds": slot_left_seconds(watched),
        })),
    })
}

fn describe_readers(watched: &Watched) -> Value {
    let readers = watched.context.meter.readers();
    let (ok, failed) = readers.statements();
    json!({
        "sessions": readers.now(),
        "sessions_total": readers.opened(),
        "statements": ok,
        "failed_statements": failed,
    })
}

fn describe_memory(watched: &Watched) -> Value {
    let stream = watched.context.meter.stream();
    json!({
        "resident_bytes": watched.process.resident_bytes(),
        "duckdb_bytes": watched.file().map(|file| file.memory.used_bytes),
        "duckdb_spilled_bytes": watched.file().map(|file| file.memory.spilled_bytes),
        "queue_bytes": stream.queue_bytes(),
        "batch_bytes": stream.batch_bytes(),
        "spooled_bytes": stream.spooled_bytes(),
        "limit_bytes": watched.context.options.memory_limit_bytes,
    })
}

fn describe_copies(watched: &Watched) -> Value {
    let progress = &watched.context.copy_progress;
    let (tables, total) = progress.progress().unwrap_or_default();
    json!({
        "copies": tables.len(),
        "is_paused": progress.is_paused(),
        "total": (!tables.is_empty()).then_some(total),
    })
}

/// Returns what the file says of the pipeline, as `rhei status --json` does, without its tables.
fn describe_file(watched: &Watched, file: &FileSeen) -> Value {
    let figures = control::Figures::of(&watched.context);
    let mut described = json!({});
    if let Some(state) = &file.state {
        described = control::describe(&control::without_tables(state), file.space, &[], &figures);
    }
    described["seen_seconds_ago"] = json!(file.at.elapsed().as_secs_f64());
    described["dead_rows"] = json!(watched.dead_rows());
    described["jobs"] = json!(file.jobs);
    described
}

/// Returns the tables that have most to say, and how many there are in each state.
fn describe_tables(watched: &Watched, file: &FileSeen) -> Value {
    let mut states: BTreeMap<&'static str, usize> = BTreeMap::new();
    tables(file).for_each(|table| *states.entry(table.state.as_str()).or_default() += 1);

    let (meters, _) = watched.context.meter.tables();
    let (copies, _) = watched.context.copy_progress.progress().unwrap_or_default();
    let changes = |table: &StoredTable| {
        meters.get(&table.source).map_or(0, |meter| {
            meter.changes.inserted + meter.changes.updated + meter.changes.deleted
        })
    };

    let mut shown: Vec<&StoredTable> = tables(file).collect();
    shown.sort_by_key(|table| {
        let urgency = match table.state {
            TableState::Error(_) => 0,
            TableState::Live => 2,
            _ => 1,
        };
        (urgency, std::cmp::Reverse(changes(table)), &table.source)
    });
    shown.truncate(MAX_SHOWN_TABLES);

    let verified: BTreeMap<_, _> =
        file.verified.iter().map(|result| (&result.table, result)).collect();
    let rows: Vec<Value> = shown
        .into_iter()
        .map(|table| {
            let name = table.source.to_string();
            let counts = meters.get(&table.source).copied().unwrap_or_default();
            let reason = match &table.state {
                TableState::Error(pause) => Some(&pause.reason),
                _ => None,
            };
            json!({
                "copy": copies.get(&name),
                "name": name,
                "state": table.state.as_str(),
                "reason": reason,
                "copied_rows": table.copied_rows,
                "inserted": counts.changes.inserted,
                "updated": counts.changes.updated,
                "deleted": counts.changes.deleted,
                "verified": verified.get(&table.source).map(|result| {
                    control::describe_verification(result)
                }),
            })
        })
        .collect();

    json!({ "total": tables(file).count(), "states": states, "shown": rows })
}
