//! `_rhei.jobs`: work that is done piece by piece, durably. Today these are the chunks of copies.
//!
//! A job is written before it is begun, and is `done` in the very transaction that holds what it did, so that no piece of
//! work is lost or done twice without a trace. Rows are replaced by DELETE and INSERT, never updated.

use duckdb::{Connection, params};
use serde::Serialize;

use super::{RowStream, TargetError, apply};
use crate::change::TableSpec;

/// A job that is to be written.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// `copy_chunk`.
    pub kind: &'static str,
    /// What to do, as JSON.
    pub payload: serde_json::Value,
    /// Lower ones are taken first.
    pub priority: i32,
}

/// A job as it is stored, for those who look.
#[derive(Debug, Clone, Serialize)]
pub struct StoredJob {
    pub id: u64,
    #[serde(rename = "type")]
    pub kind: String,
    pub payload: serde_json::Value,
    /// `pending`, `running`, `done`, `failed` or `cancelled`.
    pub status: String,
    pub attempts: u32,
    pub priority: i32,
    pub error: Option<String>,
    pub rows: Option<u64>,
    pub created_at: String,
    /// Seconds from its last start to its end.
    pub seconds: Option<f64>,
}

/// Jobs that ended are kept this long.
const KEPT: &str = "7 days";

/// Writes jobs; returns their ids, in order. Those of earlier rounds that never ended are cancelled: their snapshot is
/// gone. Ended ones are pruned by age.
pub(super) fn add(connection: &Connection, jobs: &[NewJob]) -> Result<Vec<u64>, TargetError> {
    connection.execute_batch(&format!(
        "DELETE FROM _rhei.jobs WHERE finished_at < now() - INTERVAL '{KEPT}';
         CREATE OR REPLACE TEMP TABLE _rhei_open AS SELECT * FROM _rhei.jobs WHERE status IN ('pending', 'running');
         DELETE FROM _rhei.jobs WHERE status IN ('pending', 'running');
         INSERT INTO _rhei.jobs SELECT * REPLACE ('cancelled' AS status, now() AS finished_at) FROM _rhei_open;
         DROP TABLE _rhei_open;"
    ))?;
    let last: u64 = connection.query_row("SELECT coalesce(max(id), 0) FROM _rhei.jobs", [], |row| row.get(0))?;
    let mut ids = Vec::with_capacity(jobs.len());
    for (id, job) in (last + 1..).zip(jobs) {
        connection.execute(
            "INSERT INTO _rhei.jobs VALUES (?, ?, ?, 'pending', 0, ?, NULL, NULL, now(), NULL, NULL)",
            params![id, job.kind, job.payload.to_string(), job.priority],
        )?;
        ids.push(id);
    }
    Ok(ids)
}

/// Replaces a job's row. `set` is a REPLACE list.
fn change(connection: &Connection, id: u64, set: &str, given: &[&dyn duckdb::ToSql]) -> Result<(), TargetError> {
    connection.execute_batch("CREATE OR REPLACE TEMP TABLE _rhei_job AS SELECT * FROM _rhei.jobs LIMIT 0")?;
    connection.execute("INSERT INTO _rhei_job SELECT * FROM _rhei.jobs WHERE id = ?", params![id])?;
    connection.execute("DELETE FROM _rhei.jobs WHERE id = ?", params![id])?;
    connection.execute(&format!("INSERT INTO _rhei.jobs SELECT * REPLACE ({set}) FROM _rhei_job"), given)?;
    Ok(connection.execute_batch("DROP TABLE _rhei_job")?)
}

pub(super) fn all(connection: &Connection) -> Result<Vec<StoredJob>, TargetError> {
    let mut statement = connection.prepare(
        "SELECT id, type, payload, status, attempts, priority, error, rows, created_at::VARCHAR, \
         epoch(finished_at - started_at) FROM _rhei.jobs ORDER BY id",
    )?;
    let mut rows = statement.query([])?;
    let mut jobs = Vec::new();
    while let Some(row) = rows.next()? {
        let payload: String = row.get(2)?;
        jobs.push(StoredJob {
            id: row.get(0)?,
            kind: row.get(1)?,
            payload: serde_json::from_str(&payload).unwrap_or(serde_json::Value::String(payload)),
            status: row.get(3)?,
            attempts: row.get(4)?,
            priority: row.get(5)?,
            error: row.get(6)?,
            rows: row.get(7)?,
            created_at: row.get(8)?,
            seconds: row.get(9)?,
        });
    }
    Ok(jobs)
}

/// Loads chunks beside the writer and beside other loaders, through a connection of its own. DuckDB lets several of them
/// append to one table at a time.
pub struct Loader {
    connection: Connection,
}

impl Loader {
    pub(super) fn new(connection: Connection) -> Self {
        Self { connection }
    }

    fn transaction<R>(&self, work: impl FnOnce(&Connection) -> Result<R, TargetError>) -> Result<R, TargetError> {
        self.connection.execute_batch("BEGIN TRANSACTION")?;
        let done = work(&self.connection).and_then(|done| {
            self.connection.execute_batch("COMMIT")?;
            Ok(done)
        });
        if done.is_err() {
            // Fails when COMMIT itself ended the transaction; either way nothing of it is left.
            let _ = self.connection.execute_batch("ROLLBACK");
        }
        done
    }

    /// A job is begun, once more.
    pub fn begin(&self, job: u64) -> Result<(), TargetError> {
        self.transaction(|connection| {
            change(
                connection,
                job,
                "'running' AS status, attempts + 1 AS attempts, now() AS started_at, NULL::TIMESTAMPTZ AS finished_at",
                &[],
            )
        })
    }

    /// Appends rows to the shadow of a table and marks the job as done, in one transaction. Rows have the order and the
    /// target names of `table.columns`.
    pub fn load(&self, table: &TableSpec, job: u64, rows: RowStream) -> Result<u64, TargetError> {
        self.transaction(|connection| {
            let loaded = apply::load(connection, table, rows)?;
            change(
                connection,
                job,
                "'done' AS status, NULL::VARCHAR AS error, ?::UBIGINT AS rows, now() AS finished_at",
                &[&loaded],
            )?;
            Ok(loaded)
        })
    }

    /// A job could not be done, this time (`pending`) or for good (`failed`, `cancelled`).
    pub fn give_up(&self, job: u64, status: &str, error: &str) -> Result<(), TargetError> {
        self.transaction(|connection| {
            change(
                connection,
                job,
                "?::VARCHAR AS status, ?::VARCHAR AS error, now() AS finished_at",
                &[&status, &error],
            )
        })
    }
}
