//! `_rhei.jobs`: work that rhei does piece by piece, durably. Today these jobs are the chunks of
//! copies.
//!
//! A job is written before it begins, and becomes `done` in the very transaction that holds its
//! result, so that no piece of work is lost or done twice without a trace. Rows are replaced by
//! DELETE and INSERT, never updated; in a lake, loaders only add rows.

use std::{collections::BTreeMap, time::Duration};

use duckdb::params;
use serde::Serialize;

use super::{TargetError, connection::TargetConnection, names, state::PIPELINE_ID};
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

/// The row that counts of each job: that it is done, or else the last one. In a file each job has
/// one row. In a lake, loaders only add rows: transactions that only add rows to a table never
/// conflict there. A clock that steps back must not hide that a job is done.
const LATEST: &str = "(FROM _rhei.jobs WHERE id > 0 QUALIFY row_number() OVER (PARTITION BY id \
                      ORDER BY status = 'done' DESC, finished_at DESC NULLS LAST) = 1)";

/// The id of the row that a writer of a lake replaces when it begins: a load of an earlier process
/// whose commit comes later than that fails (see `lake`).
pub(super) const WRITER: u64 = 0;

/// Drops jobs that ended long ago, except the jobs of copies that are not finished: resuming a copy
/// reads them.
pub(super) fn prune(connection: &TargetConnection) -> Result<u64, TargetError> {
    let old = format!(
        "SELECT id FROM {LATEST} WHERE finished_at < now() - INTERVAL '{KEPT}' \
         AND table_oid NOT IN (SELECT oid FROM _rhei.tables WHERE has_shadow)"
    );
    let sql = format!("DELETE FROM _rhei.jobs WHERE id IN ({old})");
    Ok(connection.execute(&connection.sql(&sql), [])? as u64)
}

/// Writes the jobs of tables, by oid; returns the ids of the jobs, in order.
pub(super) fn add(
    connection: &TargetConnection,
    tables: &[(u32, &[NewJob])],
) -> Result<Vec<u64>, TargetError> {
    prune(connection)?;
    let last: u64 = connection.query_row(
        &connection.sql("SELECT coalesce(max(id), 0) FROM _rhei.jobs"),
        [],
        |row| row.get(0),
    )?;

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
        connection.execute_batch(&format!(
            "{} VALUES {}",
            connection.sql("INSERT INTO _rhei.jobs"),
            rows.join(", ")
        ))?;
    }

    Ok(jobs.iter().map(|(id, _)| *id).collect())
}

/// Cancels the open jobs of tables.
pub(super) fn cancel(
    connection: &TargetConnection,
    oids: &[u32],
    why: &str,
) -> Result<(), TargetError> {
    let oids: Vec<String> = oids.iter().map(ToString::to_string).collect();
    let open = format!(
        "FROM {LATEST} WHERE table_oid IN ({}) AND status IN ('pending', 'running')",
        oids.join(", ")
    );

    if oids.is_empty()
        || !connection.query_row(
            &connection.sql(&format!("SELECT count(*) > 0 {open}")),
            [],
            |row| row.get(0),
        )?
    {
        return Ok(());
    }

    connection.execute_batch(&connection.sql(&format!(
        "CREATE OR REPLACE TEMP TABLE _rhei_open AS SELECT * {open}; \
         DELETE FROM _rhei.jobs WHERE id IN (SELECT id FROM _rhei_open);"
    )))?;
    connection.execute(
        &connection.sql(
            "INSERT INTO _rhei.jobs SELECT * REPLACE ('cancelled' AS status, coalesce(error, \
             ?::VARCHAR) AS error, \
             now() AS finished_at) FROM _rhei_open",
        ),
        params![why],
    )?;
    Ok(connection.execute_batch("DROP TABLE _rhei_open")?)
}

/// Returns the chunks that are in the shadow whose copy began at this LSN.
pub(super) fn done(
    connection: &TargetConnection,
    oid: u32,
    copy_lsn: Lsn,
) -> Result<Vec<(serde_json::Value, u64)>, TargetError> {
    let mut statement = connection.prepare(&connection.sql(&format!(
        "SELECT payload, coalesce(rows, 0) FROM {LATEST} WHERE table_oid = ? \
         AND type = 'copy_chunk' AND status = 'done' \
         AND (payload::JSON ->> 'copy_lsn') = ?"
    )))?;

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

/// Changes jobs, by their ids: in a file their rows are replaced, in a lake newer rows follow them.
/// `set` is a REPLACE list, in which `job` is the row as it was.
pub(super) fn change(
    connection: &TargetConnection,
    ids: &[u64],
    set: &str,
    given: &[&dyn duckdb::ToSql],
) -> Result<(), TargetError> {
    let ids = listed(ids);
    connection.execute_batch(&connection.sql(&format!(
        "CREATE OR REPLACE TEMP TABLE _rhei_job AS FROM {LATEST} WHERE id IN ({ids})"
    )))?;

    if !connection.is_lake() {
        connection.execute_batch(&format!("DELETE FROM _rhei.jobs WHERE id IN ({ids})"))?;
    }
    connection.execute(
        &format!(
            "{} SELECT job.* REPLACE ({set}) FROM _rhei_job job",
            connection.sql("INSERT INTO _rhei.jobs")
        ),
        given,
    )?;

    Ok(connection.execute_batch("DROP TABLE _rhei_job")?)
}

/// Replaces the row of the writer of a lake.
pub(super) fn put_writer(connection: &TargetConnection, writer: &str) -> Result<(), TargetError> {
    connection
        .execute_batch(&connection.sql(&format!("DELETE FROM _rhei.jobs WHERE id = {WRITER}")))?;
    connection.execute(
        &connection.sql(&format!(
            "INSERT INTO _rhei.jobs VALUES ({WRITER}, 0, 'writer', ?, 'done', 0, 0, NULL, NULL, \
             now(), NULL, NULL, {PIPELINE_ID})"
        )),
        [writer],
    )?;
    Ok(())
}

/// Returns the name of the process that writes the lake, as the loads of its copies have it.
pub(super) fn writer(connection: &TargetConnection) -> Result<Option<String>, TargetError> {
    let sql = format!("SELECT max(payload) FROM _rhei.jobs WHERE id = {WRITER}");
    Ok(connection.query_row(&connection.sql(&sql), [], |row| row.get(0))?)
}

pub(super) fn all(connection: &TargetConnection) -> Result<Vec<StoredJob>, TargetError> {
    let mut statement = connection.prepare(&connection.sql(&format!(
        "SELECT id, type, payload, status, attempts, priority, error, rows, created_at::VARCHAR, \
         epoch(finished_at - started_at) FROM {LATEST} ORDER BY id"
    )))?;

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

/// Returns the numbers of rows of those jobs that are done.
pub(super) fn rows_of_done(
    connection: &TargetConnection,
    jobs: &[u64],
) -> Result<BTreeMap<u64, u64>, TargetError> {
    let sql = format!(
        "SELECT id, coalesce(rows, 0) FROM {LATEST} WHERE id IN ({}) AND status = 'done'",
        listed(jobs)
    );
    let mut statement = connection.prepare(&connection.sql(&sql))?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Returns whether one of these jobs was cancelled.
pub(super) fn is_cancelled(
    connection: &TargetConnection,
    jobs: &[u64],
) -> Result<bool, TargetError> {
    let sql = format!(
        "SELECT count(*) < {} FROM {LATEST} WHERE id IN ({}) AND status <> 'cancelled'",
        jobs.len(),
        listed(jobs)
    );
    Ok(connection.query_row(&connection.sql(&sql), [], |row| row.get(0))?)
}

/// Fails as DuckDB does for a value that it refuses, where a test requests it.
pub(super) fn refuse(
    connection: &TargetConnection,
    place: &'static str,
    table: &TableSpec,
) -> Result<(), TargetError> {
    if refuses(place, &table.source) {
        connection.execute_batch("SELECT error('refused on purpose')")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::state, *};

    #[test]
    fn a_job_that_is_done_stays_done_although_a_clock_stepped_back() {
        let connection = TargetConnection::in_memory();
        state::create(&connection).unwrap();
        let new = |copy_lsn: Lsn| NewJob {
            kind: "copy_chunk",
            payload: serde_json::json!({ "copy_lsn": copy_lsn.to_string() }),
            priority: 0,
        };
        let (jobs, copy_lsn) = ([new(Lsn(7)), new(Lsn(7))], Lsn(7));
        assert_eq!(add(&connection, &[(1, jobs.as_slice())]).unwrap(), [1, 2]);

        // As loaders add them to a lake: a failure, and what came after it by an earlier clock.
        for (status, rows, finished_at) in
            [("pending", "NULL", "2026-01-01 12:00:00"), ("done", "5", "2026-01-01 11:00:00")]
        {
            connection
                .execute_batch(&format!(
                    "INSERT INTO _rhei.jobs SELECT * REPLACE ('{status}' AS status, \
                     {rows} AS rows, TIMESTAMPTZ '{finished_at}+00' AS finished_at) \
                     FROM _rhei.jobs WHERE id = 1 AND finished_at IS NULL"
                ))
                .unwrap();
        }

        let found = done(&connection, 1, copy_lsn).unwrap();
        assert_eq!(found.iter().map(|(_, rows)| *rows).collect::<Vec<_>>(), [5]);
        assert_eq!(rows_of_done(&connection, &[1, 2]).unwrap(), BTreeMap::from([(1, 5)]));
        assert!(!is_cancelled(&connection, &[1, 2]).unwrap());
        cancel(&connection, &[1], "its snapshot was lost").unwrap();
        assert!(!is_cancelled(&connection, &[1]).unwrap());
        assert!(is_cancelled(&connection, &[1, 2]).unwrap());
    }
}
