//! `_rhei.jobs`: work that is done piece by piece, durably. Today these are the chunks of copies.
//!
//! A job is written before it is begun, and is `done` in the very transaction that holds what it
//! did, so that no piece of work is lost or done twice without a trace. Rows are replaced by DELETE
//! and INSERT, never updated.

use std::{sync::Arc, time::Duration};

use arrow::record_batch::RecordBatch;
use duckdb::{Connection, params};
use serde::Serialize;

use super::{
    RowStream, TargetError, apply,
    arrow_scan::{BatchView, Database},
    ddl,
};
use crate::{
    Lsn,
    change::TableSpec,
    failpoint::{reached, refuses},
    types::schema_of,
};

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

/// How often a transaction that met another one at a row of this table is tried, and how long it
/// waits before.
pub(super) const CONFLICTS: u32 = 100;
pub(super) const CONFLICT_PAUSE: Duration = Duration::from_millis(20);

/// Jobs that ended are kept this long.
const KEPT: &str = "7 days";

/// Drops jobs that ended long ago, except those of copies that are still on their way: a resume
/// asks for them.
pub(super) fn prune(connection: &Connection) -> Result<u64, TargetError> {
    let sql = format!(
        "DELETE FROM _rhei.jobs WHERE finished_at < now() - INTERVAL '{KEPT}' \
         AND table_oid NOT IN (SELECT oid FROM _rhei.tables WHERE has_shadow)"
    );
    Ok(connection.execute(&sql, [])? as u64)
}

/// Writes the jobs of tables, by oid; returns their ids, in order.
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

    // A statement costs more than the rows that it brings.
    const ROWS_OF_A_STATEMENT: usize = 500;
    for jobs in jobs.chunks(ROWS_OF_A_STATEMENT) {
        let row = |(id, (oid, job)): &(u64, (u32, &NewJob))| {
            let (kind, payload) = (ddl::literal(job.kind), ddl::literal(&job.payload.to_string()));
            format!(
                "({id}, {oid}, {kind}, {payload}, 'pending', 0, {}, NULL, NULL, now(), NULL, NULL)",
                job.priority
            )
        };
        let rows: Vec<String> = jobs.iter().map(row).collect();
        connection.execute_batch(&format!("INSERT INTO _rhei.jobs VALUES {}", rows.join(", ")))?;
    }
    Ok(jobs.iter().map(|(id, _)| *id).collect())
}

/// Ends the open jobs of tables.
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

/// What is in the shadow that was begun at this LSN.
pub(super) fn done(
    connection: &Connection,
    oid: u32,
    copy_lsn: Lsn,
) -> Result<Vec<(serde_json::Value, u64)>, TargetError> {
    let mut statement = connection.prepare(
        "SELECT payload, coalesce(rows, 0) FROM _rhei.jobs WHERE table_oid = ? AND type = \
         'copy_chunk' AND status = 'done' \
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

/// Replaces a job's row. `set` is a REPLACE list.
fn change(
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

fn listed(jobs: &[u64]) -> String {
    jobs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn is_cancelled(connection: &Connection, job: u64) -> Result<bool, TargetError> {
    let sql = "SELECT count(*) = 0 FROM _rhei.jobs WHERE id = ? AND status <> 'cancelled'";
    Ok(connection.query_row(sql, params![job], |row| row.get(0))?)
}

/// Fails as DuckDB does for a value that it refuses, where a test asks for it.
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

/// Loads chunks beside the writer and beside other loaders, through a connection of its own. DuckDB
/// lets several of them append to one table at a time.
pub struct Loader {
    connection: Connection,
    database: Arc<Database>,
    /// Says that it is alive.
    _alive: Arc<()>,
    /// Of the table that was loaded last.
    view: Option<(Arc<TableSpec>, BatchView)>,
}

impl Loader {
    pub(super) fn new(connection: Connection, database: Arc<Database>, alive: Arc<()>) -> Self {
        Self { connection, database, _alive: alive, view: None }
    }

    /// A view of batches of the table. Made before the transaction that loads them, since one
    /// transaction writes to one database only.
    fn view_of(&mut self, table: &Arc<TableSpec>) -> Result<BatchView, TargetError> {
        if let Some((of, view)) = self.view.take()
            && Arc::ptr_eq(&of, table)
        {
            return Ok(view);
        }
        let schema = schema_of(
            table.columns.iter().map(|column| (column.target_name.as_str(), &column.mapping)),
        );
        Ok(BatchView::new(&self.database, schema)?)
    }

    fn transaction<R>(
        &self,
        work: impl FnOnce(&Connection) -> Result<R, TargetError>,
    ) -> Result<R, TargetError> {
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

    /// Once more when the writer was at the same row.
    fn patiently<R>(
        &self,
        work: impl Fn(&Connection) -> Result<R, TargetError>,
    ) -> Result<R, TargetError> {
        for _ in 1..CONFLICTS {
            match self.transaction(&work) {
                Err(error) if error.is_conflict() => std::thread::sleep(CONFLICT_PAUSE),
                done => return done,
            }
        }
        self.transaction(work)
    }

    /// A job is begun, once more. `false`: it was cancelled meanwhile.
    pub fn begin(&self, job: u64) -> Result<bool, TargetError> {
        self.patiently(|connection| {
            if is_cancelled(connection, job)? {
                return Ok(false);
            }
            change(
                connection,
                job,
                "'running' AS status, attempts + 1 AS attempts, now() AS started_at, \
                 NULL::TIMESTAMPTZ AS finished_at",
                &[],
            )?;
            Ok(true)
        })
    }

    /// Whether nobody wants the job to be done any more.
    pub fn is_cancelled(&self, job: u64) -> Result<bool, TargetError> {
        is_cancelled(&self.connection, job)
    }

    /// Appends rows to the shadow of a table and marks the job as done, in one transaction. Rows
    /// have the order and the target names of `table.columns`.
    ///
    /// # Errors
    /// Also when the job was cancelled, or is while it is loaded: its shadow is another one then.
    pub fn load(
        &mut self,
        table: &Arc<TableSpec>,
        job: u64,
        rows: RowStream,
    ) -> Result<u64, TargetError> {
        let view = self.view_of(table)?;
        let loaded = self.transaction(|connection| {
            if is_cancelled(connection, job)? {
                return Err(TargetError::Cancelled);
            }
            let loaded = apply::load(connection, table, rows, &view)
                .and_then(|loaded| refuse(connection, "load.refused", table).map(|()| loaded))
                .map_err(|error| error.of_copy(table))?;
            change(
                connection,
                job,
                "'done' AS status, NULL::VARCHAR AS error, ?::UBIGINT AS rows, now() AS \
                 finished_at",
                &[&loaded],
            )?;
            reached("chunk.loading");
            Ok(loaded)
        });
        reached("chunk.loaded");
        self.view = Some((Arc::clone(table), view));
        loaded
    }

    /// As [`Self::load`], for chunks of several small tables, all in one transaction: each with its
    /// job and its rows. Their jobs go from `pending` to `done`: `reading` is how long it took to
    /// read the rows.
    pub fn load_all(
        &mut self,
        chunks: &[(Arc<TableSpec>, u64, Vec<RecordBatch>)],
        reading: Duration,
    ) -> Result<(), TargetError> {
        let jobs: Vec<u64> = chunks.iter().map(|(_, job, _)| *job).collect();
        let loaded = self.transaction(|connection| {
            let listed = listed(&jobs);
            let open: u64 = connection.query_row(
                &format!(
                    "SELECT count(*) FROM _rhei.jobs WHERE id IN ({listed}) AND status <> \
                          'cancelled'"
                ),
                [],
                |row| row.get(0),
            )?;
            if open < jobs.len() as u64 {
                return Err(TargetError::Cancelled);
            }
            let mut done = Vec::with_capacity(chunks.len());
            for (table, job, batches) in chunks {
                apply::append_to_shadow(connection, table, batches)
                    .and_then(|()| refuse(connection, "load.refused", table))
                    .map_err(|error| error.of_copy(table))?;
                done.push(format!("({job}, {})", apply::total(batches)));
            }
            connection.execute_batch(&format!(
                "CREATE OR REPLACE TEMP TABLE _rhei_job AS SELECT * FROM _rhei.jobs WHERE id IN \
                 ({listed}); \
                 DELETE FROM _rhei.jobs WHERE id IN ({listed}); \
                 INSERT INTO _rhei.jobs SELECT j.* REPLACE ('done' AS status, attempts + 1 AS \
                 attempts, \
                 NULL::VARCHAR AS error, done.rows::UBIGINT AS rows, \
                 now() - INTERVAL '{} microseconds' AS started_at, now() AS finished_at) \
                 FROM _rhei_job j JOIN (VALUES {}) AS done(id, rows) ON done.id = j.id; DROP TABLE \
                 _rhei_job;",
                reading.as_micros(),
                done.join(", ")
            ))?;
            reached("chunk.loading");
            Ok(())
        });
        reached("chunk.loaded");
        loaded
    }

    /// A job could not be done, this time (`pending`) or for good (`failed`, `cancelled`).
    pub fn give_up(&self, job: u64, status: &str, error: &str) -> Result<(), TargetError> {
        self.patiently(|connection| {
            if is_cancelled(connection, job)? {
                return Ok(());
            }
            change(
                connection,
                job,
                "?::VARCHAR AS status, ?::VARCHAR AS error, now() AS finished_at",
                &[&status, &error],
            )
        })
    }
}
