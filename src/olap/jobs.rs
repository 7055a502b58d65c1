//! `_rhei.jobs`: work that rhei does piece by piece, durably. Today these jobs are the chunks of
//! copies.
//!
//! A job is written before it begins, and becomes `done` in the very transaction that holds its
//! result, so that no piece of work is lost or done twice without a trace. Rows are replaced by
//! DELETE and INSERT, never updated.

use std::time::Duration;

use duckdb::{Connection, params};
use serde::Serialize;

use super::{TargetError, names, state::PIPELINE_ID};
use crate::{Lsn, change::TableSpec, failpoint::refuses};

/// A job that is to be written.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// `copy_chunk`.
    pub kind: &'static str,
    /// The work to do, as JSON.
    pub payload: serde_json::Value,
    /// Jobs with a lower priority are taken first.
    pub priority: i32,
}

/// A job as the file stores it, for a user who lists the jobs.
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
    /// Seconds from the last start of the job to its end.
    pub seconds: Option<f64>,
}

/// How often a transaction is tried that conflicted with another one at a row of this table, and
/// how long it waits before each new try.
pub(super) const CONFLICTS: u32 = 100;
pub(super) const CONFLICT_PAUSE: Duration = Duration::from_millis(20);

/// How long jobs that ended are kept.
const KEPT: &str = "7 days";

/// Drops jobs that ended long ago, except the jobs of copies that are not finished: resuming a copy
/// reads them.
pub(super) fn prune(connection: &Connection) -> Result<u64, TargetError> {
    let sql = format!(
        "DELETE FROM _rhei.jobs WHERE finished_at < now() - INTERVAL '{KEPT}' \
         AND table_oid NOT IN (SELECT oid FROM _rhei.tables WHERE has_shadow)"
    );
    Ok(connection.execute(&sql, [])? as u64)
}

/// Writes the jobs of tables, by oid; returns the ids of the jobs, in order.
pub(super) fn add(
    connection: &Connection,
    tables: &[(u32, &[NewJob])],
) -> Result<Vec<u64>, TargetError> {
    prune(connection)?;
    let last: u64 =
        connection
            .query_row("SELECT coalesce(max(id), 0) FROM _rhei.jobs", [], |row| row.get(0))?;

    let jobs = tables.iter().flat_map(|(oid, jobs)| jobs.iter().map(move |job| (*oid, job)));
    let jobs: Vec<(u64, (u32, &NewJob))> = (last + 1..).zip(jobs).collect();

    // A statement costs more than the rows that it writes, so each statement writes many rows.
    const ROWS_OF_A_STATEMENT: usize = 500;
    for jobs in jobs.chunks(ROWS_OF_A_STATEMENT) {
        let row = |(id, (oid, job)): &(u64, (u32, &NewJob))| {
            let (kind, payload) =
                (names::literal(job.kind), names::literal(&job.payload.to_string()));
            format!(
                "({id}, {oid}, {kind}, {payload}, 'pending', 0, {}, NULL, NULL, now(), NULL, NULL, \
                 {})",
                job.priority, PIPELINE_ID
            )
        };

        let rows: Vec<String> = jobs.iter().map(row).collect();
        connection.execute_batch(&format!("INSERT INTO _rhei.jobs VALUES {}", rows.join(", ")))?;
    }

    Ok(jobs.iter().map(|(id, _)| *id).collect())
}

/// Cancels the open jobs of tables.
pub(super) fn cancel(connection: &Connection, oids: &[u32], why: &str) -> Result<(), TargetError> {
    let oids: Vec<String> = oids.iter().map(ToString::to_string).collect();
    let open = format!("table_oid IN ({}) AND status IN ('pending', 'running')", oids.join(", "));

    if oids.is_empty()
        || !connection.query_row(
            &format!("SELECT count(*) > 0 FROM _rhei.jobs WHERE {open}"),
            [],
            |row| row.get(0),
        )?
    {
        return Ok(());
    }

    connection.execute_batch(&format!(
        "CREATE OR REPLACE TEMP TABLE _rhei_open AS SELECT * FROM _rhei.jobs WHERE {open}; \
         DELETE FROM _rhei.jobs WHERE {open};"
    ))?;
    connection.execute(
        "INSERT INTO _rhei.jobs SELECT * REPLACE ('cancelled' AS status, coalesce(error, \
         ?::VARCHAR) AS error, \
         now() AS finished_at) FROM _rhei_open",
        params![why],
    )?;
    Ok(connection.execute_batch("DROP TABLE _rhei_open")?)
}

/// Returns the chunks that are in the shadow whose copy began at this LSN.
pub(super) fn done(
    connection: &Connection,
    oid: u32,
    copy_lsn: Lsn,
) -> Result<Vec<(serde_json::Value, u64)>, TargetError> {
    let mut statement = connection.prepare(
        "SELECT payload, coalesce(rows, 0) FROM _rhei.jobs WHERE table_oid = ? \
         AND type = 'copy_chunk' AND status = 'done' \
         AND (payload::JSON ->> 'copy_lsn') = ?",
    )?;

    let mut rows = statement.query(params![oid, copy_lsn.to_string()])?;
    let mut done = Vec::new();
    while let Some(row) = rows.next()? {
        let payload: String = row.get(0)?;
        let corrupt =
            |error: serde_json::Error| TargetError::Corrupt { reason: format!("a job: {error}") };
        done.push((serde_json::from_str(&payload).map_err(corrupt)?, row.get(1)?));
    }
    Ok(done)
}

/// Replaces the row of a job. `set` is a REPLACE list.
pub(super) fn change(
    connection: &Connection,
    id: u64,
    set: &str,
    given: &[&dyn duckdb::ToSql],
) -> Result<(), TargetError> {
    connection.execute_batch(
        "CREATE OR REPLACE TEMP TABLE _rhei_job AS SELECT * FROM _rhei.jobs LIMIT 0",
    )?;

    connection
        .execute("INSERT INTO _rhei_job SELECT * FROM _rhei.jobs WHERE id = ?", params![id])?;
    connection.execute("DELETE FROM _rhei.jobs WHERE id = ?", params![id])?;
    connection.execute(
        &format!("INSERT INTO _rhei.jobs SELECT * REPLACE ({set}) FROM _rhei_job"),
        given,
    )?;

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

pub(super) fn listed(jobs: &[u64]) -> String {
    jobs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

pub(super) fn is_cancelled(connection: &Connection, job: u64) -> Result<bool, TargetError> {
    let sql = "SELECT count(*) = 0 FROM _rhei.jobs WHERE id = ? AND status <> 'cancelled'";
    Ok(connection.query_row(sql, params![job], |row| row.get(0))?)
}

/// Fails as DuckDB does for a value that it refuses, where a test requests it.
pub(super) fn refuse(
    connection: &Connection,
    place: &'static str,
    table: &TableSpec,
) -> Result<(), TargetError> {
    if refuses(place, &table.source) {
        connection.execute_batch("SELECT error('refused on purpose')")?;
    }
    Ok(())
}
