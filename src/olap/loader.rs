//! Loads rows into shadows.

use std::{sync::Arc, time::Duration};

use arrow::record_batch::RecordBatch;
use duckdb::Connection;

use super::{
    CopyLoader, RowStream, TargetError,
    arrow_scan::{BatchView, Database},
    jobs::{CONFLICT_PAUSE, CONFLICTS, change, is_cancelled, listed, refuse},
    names,
    stage::{self, STAGE, append, column_list, stage, stage_columns, stage_values, total},
};
use crate::{change::TableSpec, failpoint::reached, types::schema_of};

/// Loads chunks beside the writer and beside other loaders, through a connection of its own. DuckDB
/// lets several connections append to one table at the same time.
pub struct Loader {
    /// The view of the table that was loaded last.
    view: Option<(Arc<TableSpec>, BatchView)>,
    connection: Connection,
    database: Arc<Database>,
    /// Shows that this loader is alive; dropped last.
    _alive: Arc<()>,
}

impl Loader {
    pub(super) fn new(connection: Connection, database: Arc<Database>, alive: Arc<()>) -> Self {
        Self { connection, database, _alive: alive, view: None }
    }

    /// Returns a view of batches of the table. The view is made before the transaction that loads
    /// the batches, since one transaction writes to one database only.
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
            // The ROLLBACK fails when COMMIT itself ended the transaction; in both cases no change
            // is left.
            let _ = self.connection.execute_batch("ROLLBACK");
        }
        done
    }

    /// Runs `work` in a transaction, and again when the writer was changing the same row.
    fn retry_conflicts<R>(
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
}

impl CopyLoader for Loader {
    fn begin(&self, job: u64) -> Result<bool, TargetError> {
        self.retry_conflicts(|connection| {
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

    fn is_cancelled(&self, job: u64) -> Result<bool, TargetError> {
        is_cancelled(&self.connection, job)
    }

    fn load(
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

            let loaded = load(connection, table, rows, &view)
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

    fn load_all(
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
                append_to_shadow(connection, table, batches)
                    .and_then(|()| refuse(connection, "load.refused", table))
                    .map_err(|error| error.of_copy(table))?;
                done.push(format!("({job}, {})", stage::total(batches)));
            }

            connection.execute_batch(&format!(
                "CREATE OR REPLACE TEMP TABLE _rhei_job AS SELECT * FROM _rhei.jobs \
                 WHERE id IN ({listed}); \
                 DELETE FROM _rhei.jobs WHERE id IN ({listed}); \
                 INSERT INTO _rhei.jobs SELECT j.* REPLACE ('done' AS status, \
                 attempts + 1 AS attempts, \
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

    fn fail_job(&self, job: u64, status: &str, error: &str) -> Result<(), TargetError> {
        self.retry_conflicts(|connection| {
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

/// Appends rows to the shadow of a table; the body of [`super::Loader::load`]. DuckDB reads each
/// batch in place, without a copy.
pub(super) fn load(
    connection: &Connection,
    spec: &TableSpec,
    rows: RowStream,
    view: &BatchView,
) -> Result<u64, TargetError> {
    let all: Vec<usize> = (0..spec.columns.len()).collect();
    let insert = format!(
        "INSERT INTO {} ({}) SELECT {} FROM {} s",
        names::table(&names::shadow_of(&spec.target)),
        column_list(spec, &all),
        stage_values(spec, &all),
        view.name()
    );

    // DuckDB binds the statement once: at each binding it asks for the schema of the stream and
    // keeps it.
    let mut insert = connection.prepare(&insert)?;

    let mut loaded = 0;
    for batch in rows {
        let batch = batch.map_err(|source| TargetError::Rows { source })?;
        let expected = batch.num_rows() as u64;

        view.put([batch]);
        let found = insert.execute([])? as u64;
        if found != expected {
            return Err(TargetError::Diverged { what: "rows to load", expected, found });
        }
        loaded += found;
    }

    Ok(loaded)
}

/// Appends few rows to the shadow of a table. Making a view of them would take longer than
/// appending them.
pub(super) fn append_to_shadow(
    connection: &Connection,
    spec: &TableSpec,
    batches: &[RecordBatch],
) -> Result<(), TargetError> {
    if total(batches) == 0 {
        return Ok(());
    }

    let shadow = names::shadow_of(&spec.target);
    if spec.columns.iter().all(|column| column.mapping.stage_type() == column.mapping.target_type) {
        let mut appender =
            connection.appender_to_catalog_and_db(&shadow.name, names::CATALOG, &shadow.schema)?;
        for batch in batches {
            append(&mut appender, batch)?;
        }
        return Ok(appender.flush()?);
    }

    let all: Vec<usize> = (0..spec.columns.len()).collect();
    stage(connection, &stage_columns(spec, &all, ""), batches)?;

    connection.execute_batch(&format!(
        "INSERT INTO {} ({}) SELECT {} FROM {STAGE} s; DROP TABLE {STAGE};",
        names::table(&shadow),
        column_list(spec, &all),
        stage_values(spec, &all)
    ))?;
    Ok(())
}
