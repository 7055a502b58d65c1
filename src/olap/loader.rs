//! Loads rows into shadows.

use std::{cell::Cell, collections::BTreeMap, sync::Arc, time::Duration};

use arrow::record_batch::RecordBatch;

use super::{
    CopyLoader, RowStream, TargetError,
    arrow_scan::{BatchView, Database},
    connection::TargetConnection,
    jobs::{self, CONFLICT_PAUSE, CONFLICTS, change, is_cancelled, refuse},
    lake::{self, Lake},
    names,
    stage::{self, STAGE, append, column_list, stage, stage_columns, stage_values, total},
};
use crate::{change::TableSpec, failpoint::reached, types::schema_of};

/// Loads chunks beside the writer and beside other loaders, through a connection of its own. DuckDB
/// lets several connections append to one table at the same time.
pub struct Loader {
    /// The view of the table that was loaded last.
    view: Option<(Arc<TableSpec>, BatchView)>,
    connection: TargetConnection,
    database: Arc<Database>,
    /// What this loader shares with the writer of a lake.
    lake: Option<Arc<lake::Shared>>,
    /// The answer to a commit was lost.
    is_unsure: Cell<bool>,
    /// How often loads into a lake have failed in a row, for reasons that may pass.
    failures: Cell<u32>,
    /// Shows that this loader is alive; dropped last.
    _alive: Arc<()>,
}

/// How many batches of rows a loader gathers for one INSERT into a lake. The size of a batch
/// follows from `memory_limit`.
const GATHERED: usize = 4;

/// How often work on a lake may fail in a row before its error is taken for the last word.
const FAILURES: u32 = 10;

impl Loader {
    pub(super) fn new(
        connection: TargetConnection,
        database: Arc<Database>,
        lake: Option<&Lake>,
        alive: Arc<()>,
    ) -> Self {
        let lake = lake.map(|lake| Arc::clone(&lake.shared));
        let (view, failures, is_unsure) = (None, Cell::default(), Cell::default());
        Self { connection, database, lake, is_unsure, failures, _alive: alive, view }
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
        work: impl FnOnce(&TargetConnection) -> Result<R, TargetError>,
    ) -> Result<R, TargetError> {
        let _turn = self.lake.as_ref().and_then(|lake| lake.turn());
        let begun = self.connection.execute_batch("BEGIN TRANSACTION").map_err(TargetError::from);
        let done = begun.and_then(|()| work(&self.connection)).and_then(|done| {
            self.connection.commit().inspect_err(|error| self.doubt(error))?;
            Ok(done)
        });

        if done.is_err() {
            // The ROLLBACK fails when COMMIT itself ended the transaction; in both cases no change
            // is left, unless the answer of a lake was lost.
            let _ = self.connection.execute_batch("ROLLBACK");
        }
        done
    }

    /// Notes that a commit to a lake has failed, which may be there all the same.
    fn doubt(&self, error: &TargetError) {
        if let Some(lake) = &self.lake
            && !lake::is_conflict_of_lake(error)
        {
            self.is_unsure.set(true);
            lake.doubt_files();
        }
    }

    /// Counts the failures of loads into a lake: the caller tries a load again that has met another
    /// transaction, or has found the lake away.
    fn of_lake<R>(&self, done: Result<R, TargetError>) -> Result<R, TargetError> {
        let Err(error) = done else { return done };
        if self.lake.is_none() || !lake::may_pass_later(&error) {
            return Err(error);
        }
        // Another try would find the same.
        if error.wants_reopening() {
            return Err(TargetError::LakeAway { source: Box::new(error) });
        }

        self.failures.set(self.failures.get() + 1);
        if self.failures.get() < FAILURES {
            // The cause of the first failure may be another transaction that came before it.
            if self.failures.get() > 1 {
                tracing::warn!(
                    event = "lake_load_failed",
                    error = crate::error::error_chain(&error),
                    failures = self.failures.get(),
                    "a load of copied rows into the lake failed again, and is tried again"
                );
            }
            return Err(TargetError::LakeInterrupted { source: Box::new(error) });
        }
        if error.table().is_some() {
            return Err(error);
        }
        Err(TargetError::LakeAway { source: Box::new(error) })
    }

    /// Has a commit fail whose answer was lost and that is still on its way to the lake: whether it
    /// has come through is certain after this.
    fn settle(&self) -> Result<(), TargetError> {
        let Some(lake) = self.lake.as_ref().filter(|_| self.is_unsure.get()) else {
            return Ok(());
        };
        self.retry_conflicts(|connection| {
            self.refuse_if_replaced(connection)?;
            jobs::put_writer(connection, &lake.writer)
        })?;
        self.is_unsure.set(false);
        Ok(())
    }

    /// Fails when another process writes the lake now.
    fn refuse_if_replaced(&self, connection: &TargetConnection) -> Result<(), TargetError> {
        let Some(lake) = &self.lake else { return Ok(()) };
        match jobs::writer(connection)? {
            Some(writer) if writer == lake.writer => Ok(()),
            writer => Err(TargetError::Fenced { holder: lake::shown(&writer.unwrap_or_default()) }),
        }
    }

    /// Returns the rows of those jobs that are done already: the answer to their commit was lost.
    ///
    /// # Errors
    /// Jobs were cancelled, or another process writes the lake now.
    fn done_before(
        &self,
        connection: &TargetConnection,
        jobs: &[u64],
    ) -> Result<BTreeMap<u64, u64>, TargetError> {
        self.refuse_if_replaced(connection)?;
        if is_cancelled(connection, jobs)? {
            return Err(TargetError::Cancelled);
        }
        if self.lake.is_none() { Ok(BTreeMap::new()) } else { jobs::rows_of_done(connection, jobs) }
    }

    /// Runs `work` in a transaction, and again when the writer was changing the same row.
    fn retry_conflicts<R>(
        &self,
        work: impl Fn(&TargetConnection) -> Result<R, TargetError>,
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
        self.of_lake(self.retry_conflicts(|connection| {
            if is_cancelled(connection, &[job])? {
                return Ok(false);
            }
            // Each commit to a lake takes as long as loading many rows.
            if connection.is_lake() {
                return Ok(true);
            }

            change(
                connection,
                &[job],
                "'running' AS status, attempts + 1 AS attempts, now() AS started_at, \
                 NULL::TIMESTAMPTZ AS finished_at",
                &[],
            )?;
            Ok(true)
        }))
    }

    fn is_cancelled(&self, job: u64) -> Result<bool, TargetError> {
        self.of_lake(is_cancelled(&self.connection, &[job]))
    }

    fn load(
        &mut self,
        table: &Arc<TableSpec>,
        job: u64,
        rows: RowStream,
    ) -> Result<u64, TargetError> {
        self.of_lake(self.settle())?;
        let view = self.view_of(table)?;
        let loaded = self.transaction(|connection| {
            if let Some(rows) = self.done_before(connection, &[job])?.remove(&job) {
                return Ok(rows);
            }

            let loaded = load(connection, table, rows, &view)
                .and_then(|loaded| refuse(connection, "load.refused", table).map(|()| loaded))
                .map_err(|error| error.of_copy(table))?;

            // The loads of a lake begin without a row of their own.
            let begun = if connection.is_lake() { "attempts + 1 AS attempts, " } else { "" };
            change(
                connection,
                &[job],
                &format!(
                    "{begun}'done' AS status, NULL::VARCHAR AS error, ?::UBIGINT AS rows, now() AS \
                     finished_at"
                ),
                &[&loaded],
            )?;

            reached("chunk.loading");
            Ok(loaded)
        });

        reached("chunk.loaded");
        self.view = Some((Arc::clone(table), view));
        self.of_lake(loaded).inspect(|_| self.failures.set(0))
    }

    fn load_all(
        &mut self,
        chunks: &[(Arc<TableSpec>, u64, Vec<RecordBatch>)],
        reading: Duration,
    ) -> Result<(), TargetError> {
        let jobs: Vec<u64> = chunks.iter().map(|(_, job, _)| *job).collect();
        self.of_lake(self.settle())?;

        let loaded = self.transaction(|connection| {
            let before = self.done_before(connection, &jobs)?;
            let jobs: Vec<u64> =
                jobs.iter().filter(|job| !before.contains_key(job)).copied().collect();
            if jobs.is_empty() {
                return Ok(());
            }

            let mut done = Vec::with_capacity(jobs.len());
            for (table, job, batches) in chunks.iter().filter(|(_, job, _)| jobs.contains(job)) {
                append_to_shadow(connection, table, batches)
                    .and_then(|()| refuse(connection, "load.refused", table))
                    .map_err(|error| error.of_copy(table))?;
                done.push(format!("{job}::UBIGINT: {}", stage::total(batches)));
            }

            let rows = format!("MAP {{{}}}[job.id]", done.join(", "));
            change(
                connection,
                &jobs,
                &format!(
                    "'done' AS status, attempts + 1 AS attempts, NULL::VARCHAR AS error, \
                     {rows}::UBIGINT AS rows, now() - INTERVAL '{} microseconds' AS started_at, \
                     now() AS finished_at",
                    reading.as_micros()
                ),
                &[],
            )?;

            reached("chunk.loading");
            Ok(())
        });

        reached("chunk.loaded");
        self.of_lake(loaded).inspect(|()| self.failures.set(0))
    }

    fn fail_job(&self, job: u64, status: &str, error: &str) -> Result<(), TargetError> {
        self.of_lake(self.retry_conflicts(|connection| {
            if is_cancelled(connection, &[job])? {
                return Ok(());
            }

            change(
                connection,
                &[job],
                "?::VARCHAR AS status, ?::VARCHAR AS error, now() AS finished_at",
                &[&status, &error],
            )
        }))
    }
}

/// Appends rows to the shadow of a table; the body of [`super::Loader::load`]. DuckDB reads each
/// batch in place, without a copy.
pub(super) fn load(
    connection: &TargetConnection,
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

    let mut insert_all = |batches: Vec<RecordBatch>| {
        let expected = stage::total(&batches);
        view.put(batches);
        match insert.execute([])? as u64 {
            found if found == expected => Ok(found),
            found => Err(TargetError::Diverged { what: "rows to load", expected, found }),
        }
    };

    // Each INSERT into a lake makes a file.
    let gathered = if connection.is_lake() { GATHERED } else { 1 };
    let (mut loaded, mut waiting) = (0, Vec::with_capacity(gathered));
    for batch in rows {
        waiting.push(batch.map_err(|source| TargetError::Rows { source })?);
        if waiting.len() == gathered {
            loaded += insert_all(std::mem::take(&mut waiting))?;
        }
    }
    if !waiting.is_empty() {
        loaded += insert_all(waiting)?;
    }
    Ok(loaded)
}

/// Appends few rows to the shadow of a table. Making a view of them would take longer than
/// appending them.
pub(super) fn append_to_shadow(
    connection: &TargetConnection,
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
