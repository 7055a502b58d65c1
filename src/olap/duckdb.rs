//! `DuckDb`: opens and locks the file, keeps its settings, and is the one writer.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use duckdb::AccessMode;

use super::{
    Applied, ApplyTarget, Compacted, Compaction, FileMaintenance, Memory, Pipeline, Publisher,
    Repair, Repaired, Space, StoredJob, StoredState, StoredVerification, TargetError,
    TargetOptions, TargetState,
    apply::{self, Progress},
    arrow_scan::Database,
    compact,
    connection::TargetConnection,
    error::is_invalidated,
    file::{attach, open, remove_stale_spill},
    gate::Gate,
    jobs,
    lake::{self, Lake, inlining},
    migrations, names, new_file, pending,
    publish::Publishers,
    stage::StagingViews,
    state,
    tables::Tables,
    tuning::Tuning,
    verifications,
};
use crate::{
    Checkpoint, Lsn,
    change::{ChangeBatch, TableSpec},
    checkpoint::DurableLsn,
    failpoint::{reached, refuses},
    pgoutput::QualifiedName,
};

/// The number of statements that DuckDB keeps planned.
const PREPARED: usize = 1024;

/// The target: a DuckDB file, or a lake. A `DuckDb` is the one writer of its copy: it holds the
/// lock of its file, or has taken over the copy in its lake.
pub struct DuckDb {
    pub(super) connection: TargetConnection,
    pub(super) database: Arc<Database>,
    path: PathBuf,
    /// What is special about a lake; none for a file.
    pub(super) lake: Option<Lake>,
    pub(super) pipeline: Option<Pipeline>,
    /// None after a transaction failed: the tables have to be read from the file again.
    pub(super) tables: Option<Tables>,
    /// Tables that are being copied, and whether their shadows are loaded.
    pub(super) copying: BTreeMap<u32, bool>,
    pub(super) tuning: Tuning,
    pub(super) views: StagingViews,
    /// The transaction that is open for parts of a source transaction.
    parts: Option<Progress>,
    /// A transaction was begun and has not ended.
    is_open: bool,
    /// The file was closed and could not be opened again yet.
    is_detached: bool,
    /// Each loader and each reader that is alive holds one more reference to this.
    loaders: Arc<()>,
    /// Publications that are under way.
    pub(super) publishers: Publishers,
    /// The way of readers who write their own SQL to the file.
    pub(super) gate: Arc<Gate>,
}

impl DuckDb {
    /// Opens the file, and creates it when it is missing.
    ///
    /// # Errors
    /// The file is locked, a folder, not a database, or from a newer rhei; each case has its own
    /// message.
    pub fn open(options: &TargetOptions) -> Result<Self, TargetError> {
        let path = &options.path;
        if path.is_dir() && options.lake.is_none() {
            return Err(TargetError::IsFolder { path: path.clone() });
        }

        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty())
            && !folder.is_dir()
        {
            return Err(TargetError::NoFolder { path: path.clone(), folder: folder.to_owned() });
        }

        let since = SystemTime::now();
        let (database, connection) = open(options, AccessMode::ReadWrite)?;
        let lake = match &options.lake {
            Some(lake) => Some(Lake::take_over(&connection, lake, path)?),
            None => None,
        };
        remove_stale_spill(path, since);
        if lake.is_none() {
            new_file::remove_stale_spill(path);
        }
        connection.set_prepared_statement_cache_capacity(PREPARED);

        if let Some(from) = migrations::run(&connection)? {
            tracing::info!(
                event = "state_migrated",
                from,
                to = migrations::FORMAT_VERSION,
                "the copy's state was brought to the format of this rhei"
            );
        }

        let tuning = Tuning::new(&connection)?;
        let mut opened = Self {
            connection,
            database,
            path: path.clone(),
            lake,
            pipeline: None,
            tables: None,
            copying: BTreeMap::new(),
            tuning,
            views: StagingViews::default(),
            parts: None,
            is_open: false,
            is_detached: false,
            loaders: Arc::default(),
            publishers: Publishers::default(),
            gate: Arc::default(),
        };

        opened.read_for_the_first_time()?;
        Ok(opened)
    }

    fn read_for_the_first_time(&mut self) -> Result<(), TargetError> {
        if self.lake.is_some() && state::exists(&self.connection)? {
            // Whatever is committed from here on replaces the row of the writer.
            self.pipeline = state::read_pipeline(&self.connection)?;
        }

        match self.state() {
            // Tables were found that have to be copied again; no session knows the lake yet.
            Err(TargetError::Moved) => self.reopen(),
            read => read.map(|_| ()),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns what `_rhei` says of the tables, with the changes of the transaction that is open.
    pub(super) fn tables(&mut self) -> Result<&mut Tables, TargetError> {
        let tables = match self.tables.take() {
            Some(tables) => tables,
            None if state::exists(&self.connection)? => Tables::read(&self.connection)?,
            None => Tables::of_new_file(&self.connection)?,
        };
        Ok(self.tables.insert(tables))
    }

    /// Drops the rows and changes that an unfinished copy of each table has gathered.
    pub(super) fn drop_shadows(&mut self, oids: &[u32]) -> Result<(), TargetError> {
        let mut statements = String::new();
        for &oid in oids {
            let Some(target) = self.tables()?.get(oid).map(|table| table.target.clone()) else {
                continue;
            };
            statements.push_str(&names::drop_table(&names::shadow_of(&target)));
            self.drop_pending(oid)?;
            self.tables()?.set_shadowless(oid);
        }

        self.connection.execute_batch(&statements)?;
        jobs::cancel(&self.connection, oids, "its copy was given up")
    }

    /// Drops the changes that were kept for a copy.
    pub(super) fn drop_pending(&mut self, oid: u32) -> Result<(), TargetError> {
        if self.tables()?.has_pending(oid) {
            pending::drop_table(&self.connection, oid)?;
            self.tables()?.set_pending(oid, false);
        }
        Ok(())
    }

    /// Reads again what depends on the tables, after a transaction that may have changed them.
    pub(super) fn refresh(&mut self) -> Result<(), TargetError> {
        self.copying = self.tables()?.copying();
        // DuckDB does not keep the plans that it makes after a table has changed.
        self.connection.flush_prepared_statement_cache();
        self.tune()
    }

    pub(super) fn roll_back_quietly(&mut self) {
        self.parts = None;
        if std::mem::take(&mut self.is_open) {
            self.tables = None;
            // The ROLLBACK fails when no transaction is open any more; in both cases no change of
            // it is left.
            let _ = self.connection.execute_batch("ROLLBACK");
            self.end_turn();
        }
    }

    pub(super) fn has_open_parts(&self) -> bool {
        self.parts.is_some()
    }

    /// Returns whether a loader or a reader holds the file open until it ends.
    pub(super) fn has_loaders(&self) -> bool {
        Arc::strong_count(&self.loaders) > 1
    }

    /// Returns whether a connection beside the writer is open.
    pub(super) fn is_used(&self) -> bool {
        self.has_loaders() || self.publishers.are_busy()
    }

    /// Waits until no session reads the file, and keeps sessions out until [`Self::reattach`]. The
    /// transactions of sessions that go on reading are ended.
    pub(super) fn keep_readers_out(&self) -> Result<(), TargetError> {
        if !self.publishers.end() {
            return Err(TargetError::ReaderStays);
        }
        if self.gate.close() { Ok(()) } else { Err(TargetError::ReaderStays) }
    }

    /// Closes the file. Every method but [`Self::reattach`] fails until the file is open again.
    pub(super) fn detach(&mut self) -> Result<(), TargetError> {
        self.is_detached = true;
        self.connection.flush_prepared_statement_cache();
        self.connection.detach()
    }

    /// Opens the file again after it was closed; the settings of the DuckDB instance stay.
    pub(super) fn reattach(&mut self) -> Result<(), TargetError> {
        const TIMEOUT: Duration = Duration::from_secs(3);
        let since = Instant::now();

        loop {
            let attached = match &self.lake {
                Some(lake) => lake::reattach(&self.connection, &lake.options),
                None => attach(&self.connection, &self.path, AccessMode::ReadWrite),
            };
            match attached {
                Ok(()) => break,
                // The process that had the file open is still closing it, or another one just read
                // it.
                Err(_) if since.elapsed() < TIMEOUT => std::thread::sleep(jobs::CONFLICT_PAUSE),
                Err(error) if self.lake.is_some() => {
                    return Err(TargetError::LakeAway { source: Box::new(error) });
                }
                Err(error) => {
                    return Err(TargetError::Closed {
                        path: self.path.clone(),
                        source: Box::new(error),
                    });
                }
            }
        }

        self.connection.opened_again()?;
        self.is_detached = false;
        self.tables = None;
        self.gate.open();
        self.state().map(|_| ())
    }

    /// Opens the file if it is closed: no statement may read from, or write to, the database in
    /// memory that stands in for a closed file.
    pub(super) fn ensure_attached(&mut self) -> Result<(), TargetError> {
        if self.is_detached {
            self.keep_readers_out()?;
            self.detach()?;
            self.reattach()?;
        }
        if self.lake.is_some() {
            return self.settle_lake().map_err(|error| self.of_lake(error));
        }
        Ok(())
    }

    /// Reads the state that a file holds, without writing to the file; for `status`.
    pub fn read_state(
        options: &TargetOptions,
    ) -> Result<Option<(StoredState, Space)>, TargetError> {
        let (_database, connection) = reader_of(options)?;
        let Some(state) = state::read(&connection)? else { return Ok(None) };
        let space = match &options.lake {
            Some(lake) => lake::space(&connection, lake)?,
            None => compact::space(&connection, &options.path)?,
        };
        Ok(Some((state, space)))
    }

    /// Returns the process that writes the copy in a lake, as far as can be told; for `status`.
    pub fn read_writer(options: &TargetOptions) -> Result<Option<String>, TargetError> {
        if options.lake.is_none() {
            return Ok(None);
        }
        let (_database, connection) = reader_of(options)?;
        lake::writer(&connection)
    }

    /// Fails when a lake that is not there could not be made; for `check`.
    pub fn refuse_to_make(options: &TargetOptions) -> Result<(), TargetError> {
        match &options.lake {
            Some(lake) => lake::refuse_to_make(options, lake),
            None => Ok(()),
        }
    }

    /// Reads the jobs in a file, without writing to the file; for `jobs`.
    pub fn read_jobs(options: &TargetOptions) -> Result<Vec<StoredJob>, TargetError> {
        let (_database, connection) = reader_of(options)?;
        if state::read(&connection)?.is_some() { jobs::all(&connection) } else { Ok(Vec::new()) }
    }

    /// Reads the last result of each table that was verified, without writing to the file; for
    /// `status`.
    pub fn read_verifications(
        options: &TargetOptions,
    ) -> Result<Vec<StoredVerification>, TargetError> {
        let (_database, connection) = reader_of(options)?;
        verifications::last(&connection)
    }

    /// Runs `work` in one transaction: all of it or nothing. Runs it again when a loader was
    /// changing the same row of `_rhei.jobs`, which a loader does for a moment only.
    pub(super) fn transaction<R>(
        &mut self,
        work: impl Fn(&mut Self) -> Result<R, TargetError>,
    ) -> Result<R, TargetError> {
        self.ensure_attached()?;
        self.roll_back()?;

        let before = self.pipeline.clone();
        let mut failures = 0;
        loop {
            self.begin()?;

            let done = work(self).and_then(|done| {
                self.commit()?;
                Ok(done)
            });
            self.is_open = false;
            let Err(error) = done else {
                self.end_turn();
                return done;
            };

            self.pipeline.clone_from(&before);
            self.tables = None;
            // The ROLLBACK fails when COMMIT itself ended the transaction; in both cases no change
            // is left.
            let _ = self.connection.execute_batch("ROLLBACK");
            self.end_turn();

            failures += 1;
            if let Some(lake) = &mut self.lake {
                if matches!(error, TargetError::Moved) {
                    lake.doubt();
                }
                if !Lake::is_tried_again(&error, failures) {
                    return Err(self.of_lake(error));
                }
                continue;
            }
            if !error.is_conflict() || failures >= jobs::CONFLICTS {
                return Err(error);
            }
            std::thread::sleep(jobs::CONFLICT_PAUSE);
        }
    }

    fn end_turn(&mut self) {
        if let Some(lake) = &mut self.lake {
            lake.ended();
        }
    }

    /// Reads what the lake holds, if that is in doubt.
    fn settle_lake(&mut self) -> Result<(), TargetError> {
        let Some(lake) = self.lake.as_mut() else { return Ok(()) };
        if lake.has_moved {
            return Err(TargetError::Moved);
        }
        if lake.is_unsure() {
            lake.resume(&self.connection)?;
            (self.tables, self.pipeline) = (None, None);
            self.pipeline = state::read_pipeline(&self.connection)?;
            self.refresh()?;
        }
        if self.parts.is_none() { self.settle_files() } else { Ok(()) }
    }

    /// Returns whether DuckDB has failed, and takes no statement of this process any more. The
    /// error that came first does not say so.
    fn takes_no_statement(&self) -> bool {
        let Err(error) = self.connection.execute_batch("SELECT 1") else { return false };
        is_invalidated(&error.to_string())
    }

    /// Returns an error as the one of a lake that does not answer, if it may be that.
    pub(super) fn of_lake(&self, error: TargetError) -> TargetError {
        if self.lake.is_none() || !lake::may_pass_later(&error) {
            return error;
        }
        // An error of one table is the table's own as long as the catalog answers.
        if error.table().is_some() && state::read_pipeline(&self.connection).is_ok() {
            return error;
        }
        TargetError::LakeAway { source: Box::new(error) }
    }

    fn begin(&mut self) -> Result<(), TargetError> {
        match &mut self.lake {
            Some(lake) => lake.begin(&self.connection)?,
            None => self.connection.execute_batch("BEGIN TRANSACTION")?,
        }
        self.is_open = true;
        Ok(())
    }

    pub(super) fn commit(&mut self) -> Result<(), TargetError> {
        if let Some(tables) = &mut self.tables {
            tables.write(&self.connection)?;
        }
        match &mut self.lake {
            Some(lake) => lake.commit(&self.connection, self.pipeline.as_ref()),
            None => self.connection.commit(),
        }
    }

    /// Returns the statements that make an empty shadow.
    pub(super) fn shadow_statements(
        &self,
        spec: &TableSpec,
        long_columns: &BTreeSet<String>,
    ) -> String {
        match &self.lake {
            Some(lake) => lake::create_shadow(spec, &lake.options),
            None => names::create_shadow(spec, long_columns),
        }
    }

    /// Begins the transaction, continues it, or ends it. After a failure no change of it is left.
    fn apply_in_parts(
        &mut self,
        batch: &ChangeBatch,
        checkpoint: &Checkpoint,
    ) -> Result<(Applied, bool), TargetError> {
        let before = self.pipeline.clone();
        let mut progress = match self.parts.take() {
            Some(progress) => progress,
            None => {
                self.begin()?;
                Progress::default()
            }
        };

        let applied = apply::apply(self, batch, &mut progress).and_then(|()| {
            if batch.is_part {
                reached("apply.part");
                return Ok(Applied {
                    durable: DurableLsn::committed(
                        before.as_ref().map_or(Lsn::ZERO, |before| before.checkpoint.lsn),
                    ),
                    deleted_rows: progress.deleted_rows,
                    inserted_rows: progress.inserted_rows,
                    pruned: 0,
                });
            }

            let applied = apply::finish(self, batch, checkpoint, &progress)?;
            reached("apply.committing");
            self.commit()?;
            Ok(applied)
        });

        let ends_a_copy = progress.ends_a_copy;
        match (&applied, batch.is_part) {
            (Ok(_), true) => self.parts = Some(progress),
            (Ok(_), false) => {
                self.is_open = false;
                self.end_turn();
            }
            (Err(_), _) => {
                self.is_open = false;
                self.pipeline = before;
                self.tables = None;
                // The ROLLBACK fails when COMMIT ended the transaction; in both cases no change is
                // left.
                let _ = self.connection.execute_batch("ROLLBACK");
                self.end_turn();
                return match (applied, &mut self.lake) {
                    (Err(error), Some(lake)) => {
                        if matches!(error, TargetError::Moved) {
                            lake.doubt();
                        }
                        let error = lake.of_part(error);
                        Err(self.of_lake(error))
                    }
                    (applied, _) => applied.map(|applied| (applied, false)),
                };
            }
        }

        applied.map(|applied| (applied, ends_a_copy))
    }

    fn tune(&mut self) -> Result<(), TargetError> {
        if self.lake.is_some() {
            return Ok(());
        }
        if self.parts.is_none() {
            self.tuning.look_if_due(&self.connection);
        }
        self.tuning.set(&self.connection, &self.path, !self.copying.is_empty())
    }

    fn log_bytes(&self) -> u64 {
        compact::size(&compact::sibling(&self.path, ".wal"))
    }

    /// Reads what is committed. While a transaction is open for parts, the connection of that
    /// transaction would also show rows that are not committed, so another connection reads.
    pub(super) fn reading<R>(
        &self,
        read: impl FnOnce(&TargetConnection) -> Result<R, TargetError>,
    ) -> Result<R, TargetError> {
        if self.parts.is_none() {
            return read(&self.connection);
        }

        read(&self.new_connection()?)
    }

    /// Returns another connection to the file.
    pub(super) fn new_connection(&self) -> Result<TargetConnection, TargetError> {
        let connection = self.connection.another()?;
        connection.execute_batch(&format!("USE {}", names::CATALOG))?;
        Ok(connection)
    }

    /// Returns a token; while it lives, a loader or a reader uses the file beside the writer.
    pub(super) fn alive(&self) -> Arc<()> {
        Arc::clone(&self.loaders)
    }

    /// Fails for a table of that name that rhei did not make: the table is the work of a user.
    pub(super) fn refuse_foreign(&mut self, name: &QualifiedName) -> Result<(), TargetError> {
        if self.tables()?.is_foreign(name) {
            return Err(TargetError::ForeignTable {
                table: name.to_string(),
                path: self.path.clone(),
            });
        }
        Ok(())
    }
}

impl Drop for DuckDb {
    /// Leaves a copy in a lake to the next process, which then need not wait.
    fn drop(&mut self) {
        self.roll_back_quietly();
        if let Some(lake) = &mut self.lake
            && !lake.shared.is_in_doubt()
            && let Err(error) = lake.fence.release(&self.connection)
        {
            tracing::debug!(%error, "the copy in the lake still names this process");
        }
    }
}

/// Opens a file for reading only.
pub(super) fn reader_of(
    options: &TargetOptions,
) -> Result<(Arc<Database>, TargetConnection), TargetError> {
    if options.lake.is_none() && !options.path.is_file() {
        return Err(TargetError::NoFile { path: options.path.clone() });
    }
    open(options, AccessMode::ReadOnly)
}

impl ApplyTarget for DuckDb {
    fn apply(
        &mut self,
        batch: &ChangeBatch,
        checkpoint: &Checkpoint,
    ) -> Result<Applied, TargetError> {
        self.ensure_attached()?;
        if refuses("apply.invalidated", &"now") {
            return Err(TargetError::saying(
                "FATAL Error: Failed: database has been invalidated because of a previous fatal \
                 error. Original error: \"INTERNAL Error: on purpose\"",
            ));
        }
        if !batch.continues {
            self.roll_back()?;
        }

        self.tuning.before_apply(batch);
        self.tune()?;
        if self.parts.is_none() {
            let live = batch
                .tables
                .iter()
                .filter(|changes| !self.copying.contains_key(&changes.table.oid));
            self.views.prepare(&self.database, live)?;
        }

        if let (Some(lake), None) = (&self.lake, &self.parts) {
            let _turn = lake.shared.turn();
            inlining::before_change(&self.connection, batch.schema_changes.iter())?;
        }

        if batch.continues && self.parts.is_none() {
            let reason = "a large transaction goes on whose beginning was taken back".to_owned();
            return Err(TargetError::Corrupt { reason });
        }

        let (since, log_bytes) = (Instant::now(), self.log_bytes());
        let (applied, ends_a_copy) = if batch.is_part || self.parts.is_some() {
            self.apply_in_parts(batch, checkpoint)?
        } else {
            self.transaction(|target| {
                let mut progress = Progress::default();
                apply::apply(target, batch, &mut progress)?;
                let applied = apply::finish(target, batch, checkpoint, &progress)?;
                reached("apply.committing");
                Ok((applied, progress.ends_a_copy))
            })?
        };

        self.note_for_upkeep(batch);
        self.tuning.after_apply(since.elapsed());
        if batch.is_part {
            return Ok(applied);
        }

        self.tuning.applied(&applied, (log_bytes, self.log_bytes()));
        if !batch.schema_changes.is_empty() || ends_a_copy && !self.copying.is_empty() {
            self.refresh()?;
        }
        Ok(applied)
    }

    fn roll_back(&mut self) -> Result<(), TargetError> {
        if self.is_open {
            self.roll_back_quietly();
            // The state may have been read from the file meanwhile.
            self.state()?;
        }
        Ok(())
    }

    fn repair(&mut self, repair: Repair<'_>) -> Result<Option<Repaired>, TargetError> {
        self.repair_rows(repair)
    }

    fn holds_other_values(
        &mut self,
        table: &TableSpec,
        columns: &[usize],
        allowed: &[String],
    ) -> Result<bool, TargetError> {
        self.ensure_attached()?;
        let target = names::table(&table.target);
        let allowed: Vec<String> = allowed.iter().map(|value| names::literal(value)).collect();

        for column in columns.iter().filter_map(|&at| table.columns.get(at)) {
            let name = names::quoted(&column.target_name);
            let is_list = column.mapping.target_type.ends_with("[]");
            let value = if is_list { format!("unnest({name}, recursive := true)") } else { name };

            let other = if allowed.is_empty() {
                String::new()
            } else {
                format!("AND value NOT IN ({})", allowed.join(", "))
            };

            let found: bool = self.connection.query_row(
                &format!(
                    "SELECT EXISTS (SELECT 1 FROM (SELECT {value} AS value FROM {target}) \
                     WHERE value IS NOT NULL {other})"
                ),
                [],
                |row| row.get(0),
            )?;
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl FileMaintenance for DuckDb {
    fn reopen(&mut self) -> Result<(), TargetError> {
        self.roll_back_quietly();
        if let Some(lake) = &mut self.lake {
            lake.read_again();
            // DuckLake connects again by itself.
            if !self.is_detached && !self.connection.has_failed_commit() {
                return self.ensure_attached();
            }
        }
        let has_failed_commit = self.connection.has_failed_commit();
        self.keep_readers_out()?;
        self.detach()?;
        self.reattach()?;
        if has_failed_commit {
            tracing::info!(
                event = "target_opened_again",
                "opened the target again without what DuckDB had in memory, since a commit to it \
                 had failed"
            );
        }
        Ok(())
    }

    fn classify(&self, error: TargetError) -> TargetError {
        if self.takes_no_statement() {
            return TargetError::Invalidated { source: Some(Box::new(error)) };
        }
        self.of_lake(error)
    }

    fn upkeep(&mut self) -> Result<bool, TargetError> {
        self.ensure_attached()?;
        if self.lake.is_none() || self.has_open_parts() {
            return Ok(false);
        }
        if self.connection.has_failed_commit() && !self.is_used() {
            return self.reopen().map(|()| true);
        }
        self.look_after_lake()
    }

    fn checkpoint_file(&mut self, compaction: Compaction) -> Result<(), TargetError> {
        self.ensure_attached()?;

        // A file checkpoint would end the transaction.
        if self.has_open_parts() {
            return Ok(());
        }
        if self.lake.is_some() {
            return Ok(());
        }

        self.tuning.set_for_tidying(&self.connection, compaction, !self.copying.is_empty())?;
        reached("tidy.begun");
        let tidied = self.connection.checkpoint();
        reached("tidy.done");
        self.tuning.tidied(&self.connection, tidied.is_ok())?;

        match tidied {
            // A reader holds an older snapshot, or a loader writes; the next file checkpoint will
            // do it.
            Err(error) if error.is_busy() => {
                tracing::debug!(
                    error = crate::error::error_chain(&error),
                    "file checkpoint put off"
                );
            }
            Err(error) => {
                // The caller that has chunks loaded gives them up first; then the file can be
                // reopened.
                if error.wants_reopening() && !self.has_loaders() {
                    self.reopen()?;
                }
                return Err(error);
            }
            Ok(()) => {}
        }
        Ok(())
    }

    fn space(&mut self) -> Result<Space, TargetError> {
        self.ensure_attached()?;
        match &mut self.lake {
            Some(lake) => lake.space(&self.connection),
            None => compact::space(&self.connection, &self.path),
        }
    }

    fn memory(&mut self) -> Result<Memory, TargetError> {
        compact::memory(&self.connection)
    }

    fn compact(&mut self) -> Result<Compacted, TargetError> {
        self.ensure_attached()?;
        if self.lake.is_some() { self.compact_lake() } else { self.rewrite_file() }
    }

    fn publisher(&mut self) -> Result<Publisher, TargetError> {
        self.new_publisher()
    }
}

#[cfg(test)]
mod tests;
