//! `DuckDb`: opens and locks the file, keeps its settings, and is the one writer.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use arrow::record_batch::RecordBatch;
use duckdb::{AccessMode, Connection};

use super::{
    Applied, Compacted, Compaction, Loader, NewCopy, OlapEngine, Pipeline, Space, StoredJob,
    StoredState, StoredTable, TableState, TargetError,
    apply::{self, Progress, Views},
    arrow_scan::Database,
    compact, ddl,
    jobs::{self, NewJob},
    new_file,
    pace::Pace,
    pending, state,
    tables::Tables,
};
use crate::{
    Checkpoint, Lsn,
    change::{ChangeBatch, Pause, TableSpec},
    checkpoint::DurableLsn,
    failpoint::reached,
    pgoutput::QualifiedName,
};

/// Where the copy is, and what DuckDB may use.
#[derive(Debug, Clone, Default)]
pub struct TargetOptions {
    pub path: PathBuf,
    /// As DuckDB writes sizes; its own default is 80 % of the machine.
    pub duckdb_memory_limit: Option<String>,
    /// The most that it may use; its own default is all cores.
    pub threads: Option<u32>,
}

/// So many statements are kept planned.
const PREPARED: usize = 1024;

/// The DuckDB file. Holding it holds the file's lock: one rhei per file.
pub struct DuckDb {
    pub(super) connection: Connection,
    pub(super) database: Arc<Database>,
    path: PathBuf,
    pub(super) pipeline: Option<Pipeline>,
    /// None: they have to be read, since a transaction failed.
    tables: Option<Tables>,
    /// Tables that are being copied, and whether their shadows are loaded.
    pub(super) copying: BTreeMap<u32, bool>,
    pub(super) pace: Pace,
    pub(super) views: Views,
    /// The transaction that is open for parts of a source transaction.
    parts: Option<Progress>,
    /// A transaction was begun and not ended.
    is_open: bool,
    /// The file was closed, and could not be opened again yet.
    is_detached: bool,
    /// One more for each loader that is alive.
    loaders: Arc<()>,
}

impl DuckDb {
    /// Opens the file, makes it when it is missing.
    ///
    /// # Errors
    /// It is locked, a folder, no database, or from a newer rhei; each has its own message.
    pub fn open(options: &TargetOptions) -> Result<Self, TargetError> {
        let path = &options.path;
        if path.is_dir() {
            return Err(TargetError::IsFolder { path: path.clone() });
        }
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty())
            && !folder.is_dir()
        {
            return Err(TargetError::NoFolder { path: path.clone(), folder: folder.to_owned() });
        }
        let since = SystemTime::now();
        let (database, connection) = open(options, AccessMode::ReadWrite)?;
        sweep(path, since);
        new_file::sweep(path);
        connection.set_prepared_statement_cache_capacity(PREPARED);
        let pace = Pace::new(&connection)?;
        let mut opened = Self {
            connection,
            database,
            path: path.clone(),
            pipeline: None,
            tables: None,
            copying: BTreeMap::new(),
            pace,
            views: Views::default(),
            parts: None,
            is_open: false,
            is_detached: false,
            loaders: Arc::default(),
        };
        opened.state()?;
        Ok(opened)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What `_rhei` says of the tables, and what the transaction that is open has changed of it.
    pub(super) fn tables(&mut self) -> Result<&mut Tables, TargetError> {
        let tables = match self.tables.take() {
            Some(tables) => tables,
            None if state::exists(&self.connection)? => Tables::read(&self.connection)?,
            None => Tables::of_new_file(&self.connection)?,
        };
        Ok(self.tables.insert(tables))
    }

    /// Drops what a copy on its way has gathered.
    pub(super) fn drop_shadows(&mut self, oids: &[u32]) -> Result<(), TargetError> {
        let mut statements = String::new();
        for &oid in oids {
            let Some(target) = self.tables()?.get(oid).map(|table| table.target.clone()) else {
                continue;
            };
            statements.push_str(&ddl::drop_table(&ddl::shadow_of(&target)));
            self.drop_pending(oid)?;
            self.tables()?.set_shadowless(oid);
        }
        self.connection.execute_batch(&statements)?;
        jobs::cancel(&self.connection, oids, "its copy was given up")
    }

    /// Drops the changes that were kept for a copy.
    pub(super) fn drop_pending(&mut self, oid: u32) -> Result<(), TargetError> {
        if self.tables()?.has_pending(oid) {
            self.connection.execute_batch(&pending::drop_statement(oid))?;
            self.tables()?.set_pending(oid, false);
        }
        Ok(())
    }

    /// After a transaction that may have changed tables.
    fn refresh(&mut self) -> Result<(), TargetError> {
        self.copying = self.tables()?.copying();
        // DuckDB does not keep what it plans anew after a table has changed.
        self.connection.flush_prepared_statement_cache();
        self.set_pace()
    }

    fn roll_back_quietly(&mut self) {
        self.parts = None;
        if std::mem::take(&mut self.is_open) {
            self.tables = None;
            // Fails when there is none any more; either way nothing of it is left.
            let _ = self.connection.execute_batch("ROLLBACK");
        }
    }

    pub(super) fn has_open_parts(&self) -> bool {
        self.parts.is_some()
    }

    /// Somebody loads chunks, and holds the file open until that ends.
    pub(super) fn has_loaders(&self) -> bool {
        Arc::strong_count(&self.loaders) > 1
    }

    /// Closes the file. Everything but [`Self::attach_again`] fails until it is open again.
    pub(super) fn detach(&mut self) -> Result<(), TargetError> {
        self.is_detached = true;
        self.connection.flush_prepared_statement_cache();
        let detached = format!("USE memory; DETACH DATABASE IF EXISTS {}", ddl::CATALOG);
        Ok(self.connection.execute_batch(&detached)?)
    }

    /// Opens the file once more after it was closed; settings of the instance stay.
    pub(super) fn attach_again(&mut self) -> Result<(), TargetError> {
        const PATIENCE: Duration = Duration::from_secs(3);
        let since = Instant::now();
        loop {
            match attach(&self.connection, &self.path, AccessMode::ReadWrite) {
                Ok(()) => break,
                // Whoever had it open still lets go of it, or looked at it just now.
                Err(_) if since.elapsed() < PATIENCE => std::thread::sleep(jobs::CONFLICT_PAUSE),
                Err(error) => {
                    return Err(TargetError::Closed {
                        path: self.path.clone(),
                        source: Box::new(error),
                    });
                }
            }
        }
        self.is_detached = false;
        self.tables = None;
        self.state().map(|_| ())
    }

    /// Nothing may be read from, or written to, the database in memory that stands in for a closed
    /// file.
    fn be_attached(&mut self) -> Result<(), TargetError> {
        if self.is_detached {
            self.detach()?;
            self.attach_again()?;
        }
        Ok(())
    }

    /// What a file says of itself, without writing to it; for `status`.
    pub fn look(path: &Path) -> Result<Option<(StoredState, Space)>, TargetError> {
        if !path.is_file() {
            return Err(TargetError::NoFile { path: path.to_owned() });
        }
        let options = TargetOptions { path: path.to_owned(), ..TargetOptions::default() };
        let (_database, connection) = open(&options, AccessMode::ReadOnly)?;
        let Some(state) = state::read(&connection)? else { return Ok(None) };
        Ok(Some((state, compact::space(&connection, path)?)))
    }

    /// The jobs in a file, without writing to it; for `jobs`.
    pub fn look_at_jobs(path: &Path) -> Result<Vec<StoredJob>, TargetError> {
        if !path.is_file() {
            return Err(TargetError::NoFile { path: path.to_owned() });
        }
        let options = TargetOptions { path: path.to_owned(), ..TargetOptions::default() };
        let (_database, connection) = open(&options, AccessMode::ReadOnly)?;
        if state::read(&connection)?.is_some() { jobs::all(&connection) } else { Ok(Vec::new()) }
    }

    /// Runs `work` in one transaction: all of it or nothing. Once more when a loader was at the
    /// same row of `_rhei.jobs`, which it is for a moment only.
    fn transaction<R>(
        &mut self,
        work: impl Fn(&mut Self) -> Result<R, TargetError>,
    ) -> Result<R, TargetError> {
        self.be_attached()?;
        self.roll_back()?;
        let before = self.pipeline.clone();
        let mut conflicts = 0;
        loop {
            self.connection.execute_batch("BEGIN TRANSACTION")?;
            self.is_open = true;
            let done = work(self).and_then(|done| {
                self.commit()?;
                Ok(done)
            });
            self.is_open = false;
            let Err(error) = done else { return done };
            self.pipeline.clone_from(&before);
            self.tables = None;
            // Fails when COMMIT itself ended the transaction; either way nothing of it is left.
            let _ = self.connection.execute_batch("ROLLBACK");
            conflicts += 1;
            if !error.is_conflict() || conflicts >= jobs::CONFLICTS {
                return Err(error);
            }
            std::thread::sleep(jobs::CONFLICT_PAUSE);
        }
    }

    fn commit(&mut self) -> Result<(), TargetError> {
        if let Some(tables) = &mut self.tables {
            tables.write(&self.connection)?;
        }
        Ok(self.connection.execute_batch("COMMIT")?)
    }

    /// Begins the transaction, goes on with it, or ends it. After a failure nothing of it is left.
    fn apply_in_parts(
        &mut self,
        batch: &ChangeBatch,
        checkpoint: &Checkpoint,
    ) -> Result<(Applied, bool), TargetError> {
        let before = self.pipeline.clone();
        let mut progress = match self.parts.take() {
            Some(progress) => progress,
            None => {
                self.connection.execute_batch("BEGIN TRANSACTION")?;
                self.is_open = true;
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
            let applied = apply::conclude(self, batch, checkpoint, &progress)?;
            reached("apply.committing");
            self.commit()?;
            Ok(applied)
        });
        let ends_a_copy = progress.ends_a_copy;
        match (&applied, batch.is_part) {
            (Ok(_), true) => self.parts = Some(progress),
            (Ok(_), false) => self.is_open = false,
            (Err(_), _) => {
                self.is_open = false;
                self.pipeline = before;
                self.tables = None;
                // Fails when COMMIT itself ended the transaction; either way nothing of it is left.
                let _ = self.connection.execute_batch("ROLLBACK");
                return applied.map(|applied| (applied, false));
            }
        }
        applied.map(|applied| (applied, ends_a_copy))
    }

    fn set_pace(&mut self) -> Result<(), TargetError> {
        if self.parts.is_none() {
            self.pace.look_if_due(&self.connection);
        }
        self.pace.set(&self.connection, &self.path, !self.copying.is_empty())
    }

    fn log_bytes(&self) -> u64 {
        compact::size(&compact::beside(&self.path, ".wal"))
    }

    /// Reads what is committed. While a transaction is open for parts, its connection would show
    /// what is not.
    fn reading<R>(
        &self,
        read: impl FnOnce(&Connection) -> Result<R, TargetError>,
    ) -> Result<R, TargetError> {
        if self.parts.is_none() {
            return read(&self.connection);
        }
        let other = self.connection.try_clone()?;
        other.execute_batch(&format!("USE {}", ddl::CATALOG))?;
        read(&other)
    }

    /// A table of that name that rhei did not make is somebody's work.
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

/// Makes the empty shadows of copies that begin, in the place of older ones.
fn create_shadows(connection: &Connection, copies: &[&NewCopy]) -> Result<(), TargetError> {
    let older = ddl::shadows(connection)?;
    let schemas: BTreeMap<String, String> = copies
        .iter()
        .map(|copy| (copy.spec.target.schema.clone(), ddl::create_schema(&copy.spec.target)))
        .collect();
    let mut statements: String = schemas.into_values().collect();
    for NewCopy { spec, long_columns, .. } in copies {
        let shadow = ddl::shadow_of(&spec.target);
        if older.contains(&ddl::lower(&shadow)) {
            statements.push_str(&ddl::drop_table(&shadow));
        }
        statements.push_str(&ddl::create_shadow(spec, long_columns));
    }
    Ok(connection.execute_batch(&statements)?)
}

/// Where DuckDB writes what has no room in its memory: beside the file, under the name that DuckDB
/// itself would give it.
fn spill_folder(path: &Path) -> PathBuf {
    compact::beside(path, ".tmp")
}

/// A process that was killed leaves behind what it spilled. To be called by whoever holds the
/// file's lock, and opened the file no earlier than `since`: what is newer may be its own, from
/// replaying the log. The folder stays, since DuckDB makes it only once.
fn sweep(path: &Path, since: SystemTime) {
    const CLOCKS: Duration = Duration::from_secs(2);
    let Ok(entries) = std::fs::read_dir(spill_folder(path)) else { return };
    for entry in entries.flatten() {
        let is_old =
            entry.metadata().and_then(|file| file.modified()).is_ok_and(|at| at + CLOCKS < since);
        if is_old && entry.file_name().as_encoded_bytes().starts_with(b"duckdb_temp_") {
            // Whatever cannot be removed is in nobody's way.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// What DuckDB is told before it starts.
fn settings(options: &TargetOptions) -> Vec<(&'static str, String)> {
    let mut settings = vec![
        ("autoinstall_known_extensions", "false".to_owned()),
        ("autoload_known_extensions", "false".to_owned()),
        // DuckDB goes by the file that it is opened with, and that is none: its own choice is the
        // folder that rhei was started in.
        ("temp_directory", spill_folder(&options.path).display().to_string()),
    ];
    settings.extend(options.duckdb_memory_limit.clone().map(|limit| ("max_memory", limit)));
    settings.extend(options.threads.map(|threads| ("threads", threads.to_string())));
    settings
}

/// Attaches the file under a name of our own: DuckDB calls a database after its file, and
/// `shop.orders` is ambiguous in `shop.duckdb`. A new file gets the newest storage version, which
/// VARIANT needs.
fn open(
    options: &TargetOptions,
    mode: AccessMode,
) -> Result<(Arc<Database>, Connection), TargetError> {
    let database = Arc::new(Database::open(&settings(options))?);
    let connection = database.connect()?;
    // Before the file is opened, and for every connection: DuckDB replays the log in one of its
    // own, and what it finds there must not depend on the zone of the host. The plain source build
    // has no zones.
    let _ = connection.execute_batch("SET GLOBAL TimeZone = 'UTC'; SET TimeZone = 'UTC'");
    attach(&connection, &options.path, mode)?;
    Ok((database, connection))
}

fn attach(connection: &Connection, path: &Path, mode: AccessMode) -> Result<(), TargetError> {
    if !matches!(mode, AccessMode::ReadOnly) {
        new_file::make(connection, path).map_err(|error| match error {
            TargetError::Query(source) => not_attached(path, source),
            TargetError::Io(source) if source.kind() == ErrorKind::PermissionDenied => {
                TargetError::NotWritable { path: path.to_owned() }
            }
            error => error,
        })?;
    }
    let how = match mode {
        AccessMode::ReadOnly => "READ_ONLY",
        _ => "STORAGE_VERSION 'latest'",
    };
    let file = ddl::literal(&path.display().to_string());
    let attach = format!("ATTACH {file} AS {} ({how}); USE {};", ddl::CATALOG, ddl::CATALOG);
    connection.execute_batch(&attach).map_err(|source| not_attached(path, source))
}

/// Why DuckDB did not open, or make, the file at `path`.
fn not_attached(path: &Path, source: duckdb::Error) -> TargetError {
    let text = source.to_string();
    let path = path.to_owned();
    if text.contains("Could not set lock") {
        let holder = text
            .split("(PID ")
            .nth(1)
            .and_then(|rest| rest.split(')').next())
            .unwrap_or("unknown")
            .to_owned();
        TargetError::Locked { path, holder }
    } else if text.contains("not a valid DuckDB database file") {
        TargetError::NotADatabase { path }
    } else if super::is_damage(&text) {
        TargetError::Damaged { path, source }
    } else if text.contains("Permission denied") || text.contains("Read-only file system") {
        TargetError::NotWritable { path }
    } else {
        TargetError::Open { path, source }
    }
}

impl OlapEngine for DuckDb {
    fn state(&mut self) -> Result<Option<StoredState>, TargetError> {
        self.be_attached()?;
        if self.parts.is_some() {
            return self.reading(state::read);
        }
        if self.tables.is_none() || self.pipeline.is_none() {
            self.pipeline = state::read_pipeline(&self.connection)?;
        }
        self.refresh()?;
        let Some(pipeline) = self.pipeline.clone() else { return Ok(None) };
        Ok(Some(StoredState { pipeline, tables: self.tables()?.list() }))
    }

    fn put_state(
        &mut self,
        pipeline: &Pipeline,
        tables: &[StoredTable],
    ) -> Result<(), TargetError> {
        self.transaction(|target| {
            state::create(&target.connection)?;
            state::put_pipeline(&target.connection, pipeline)?;
            let stored = target.tables()?;
            tables.iter().for_each(|table| stored.put(table.clone()));
            target.pipeline = Some(pipeline.clone());
            Ok(())
        })?;
        self.refresh()
    }

    fn note(&mut self, tables: &[StoredTable]) -> Result<(), TargetError> {
        self.transaction(|target| {
            let is_ended =
                |table: &&StoredTable| target.copying.contains_key(&table.oid) && !table.has_shadow;
            let ended: Vec<u32> = tables.iter().filter(is_ended).map(|table| table.oid).collect();
            target.drop_shadows(&ended)?;
            let stored = target.tables()?;
            tables.iter().for_each(|table| stored.put(table.clone()));
            Ok(())
        })?;
        self.refresh()
    }

    fn note_shapes(&mut self, tables: &[Arc<TableSpec>]) -> Result<(), TargetError> {
        self.transaction(|target| {
            let stored = target.tables()?;
            tables.iter().for_each(|table| stored.put_shape(table));
            Ok(())
        })?;
        self.refresh()
    }

    fn rename(&mut self, moves: &[(QualifiedName, StoredTable)]) -> Result<(), TargetError> {
        self.transaction(|target| {
            let (mut moving, mut ours) = (Vec::new(), Vec::new());
            for (from, table) in moves {
                let is_ours = target.tables()?.is_ours(from);
                ours.push(is_ours);
                if is_ours
                    && *from != table.target
                    && state::table_exists(&target.connection, from)?
                {
                    moving.push((from, table));
                }
            }
            // All at once, so that two tables can swap their names.
            for (from, table) in &moving {
                target.connection.execute_batch(&ddl::set_aside(from, table.oid))?;
            }
            for (from, table) in &moving {
                // A copy that is only kept gives way.
                if target.tables()?.give_way([(&table.target, table.oid)]) {
                    target.connection.execute_batch(&ddl::drop_table(&table.target))?;
                }
                target.refuse_foreign(&table.target)?;
                target.connection.execute_batch(&ddl::bring_back(
                    from,
                    table.oid,
                    &table.target,
                ))?;
            }
            let stored = target.tables()?;
            for ((_, table), is_ours) in moves.iter().zip(ours) {
                stored.put(table.clone());
                if is_ours {
                    stored.set_ours(table.oid);
                }
            }
            Ok(())
        })?;
        self.refresh()
    }

    fn begin_copies(
        &mut self,
        copies: &[NewCopy],
    ) -> Result<Vec<Result<Vec<u64>, String>>, TargetError> {
        let ids = self.transaction(|target| {
            let oids: Vec<u32> = copies.iter().map(|copy| copy.spec.oid).collect();
            jobs::cancel(&target.connection, &oids, "its snapshot was lost")?;
            let (mut refused, mut begun) = (BTreeMap::new(), Vec::new());
            for copy in copies.iter().filter(|copy| !copy.is_resumed) {
                let spec = &copy.spec;
                if let Err(error @ TargetError::ForeignTable { .. }) =
                    target.refuse_foreign(&spec.target)
                {
                    let state = TableState::Error(Pause::new(error.to_string()));
                    target.tables()?.put(StoredTable::of(spec, state));
                    refused.insert(spec.oid, error.to_string());
                    continue;
                }
                begun.push(copy);
                target.drop_pending(spec.oid)?;
                let stored = target.tables()?;
                let has_old = stored.is_ours(&spec.target);
                let state = if has_old { TableState::Resync } else { TableState::Copying };
                stored.put(StoredTable { has_shadow: true, ..StoredTable::of(spec, state) });
            }
            create_shadows(&target.connection, &begun)?;
            let begun: Vec<(u32, &[NewJob])> = copies
                .iter()
                .filter(|copy| !refused.contains_key(&copy.spec.oid))
                .map(|copy| (copy.spec.oid, copy.jobs.as_slice()))
                .collect();
            let mut ids = jobs::add(&target.connection, &begun)?.into_iter();
            let outcome = |copy: &NewCopy| match refused.remove(&copy.spec.oid) {
                Some(reason) => Err(reason),
                None => Ok(ids.by_ref().take(copy.jobs.len()).collect()),
            };
            Ok(copies.iter().map(outcome).collect())
        })?;
        self.refresh()?;
        Ok(ids)
    }

    fn done_chunks(
        &mut self,
        oid: u32,
        copy_lsn: Lsn,
    ) -> Result<Vec<(serde_json::Value, u64)>, TargetError> {
        self.reading(|connection| jobs::done(connection, oid, copy_lsn))
    }

    fn open_keys(
        &mut self,
        table: &TableSpec,
        most: usize,
    ) -> Result<Vec<Vec<String>>, TargetError> {
        if !self.tables()?.has_pending(table.oid) {
            return Ok(Vec::new());
        }
        pending::open_keys(&self.connection, table, most)
    }

    fn fill_open(
        &mut self,
        table: &TableSpec,
        rows: &[RecordBatch],
        asked: usize,
    ) -> Result<(), TargetError> {
        self.transaction(|target| pending::fill(&target.connection, table, rows, asked as u64))
    }

    fn finish_loads(&mut self, tables: &[Arc<TableSpec>]) -> Result<(), TargetError> {
        self.transaction(|target| {
            for table in tables {
                let has_pending = target.tables()?.has_pending(table.oid);
                let closed = if has_pending {
                    pending::close_open_values(&target.connection, table)
                } else {
                    Ok(())
                };
                closed
                    .and_then(|()| jobs::refuse(&target.connection, "finish.refused", table))
                    .map_err(|error| error.of_copy(table))?;
            }
            let shadows = tables.iter().map(|table| ddl::table(&ddl::shadow_of(&table.target)));
            let copied = apply::counts(&target.connection, shadows)?;
            let stored = target.tables()?;
            for (table, copied) in tables.iter().zip(copied) {
                stored.set_state(table.oid, TableState::CatchingUp, Some(copied));
            }
            Ok(())
        })?;
        self.refresh()
    }

    fn merge(
        &mut self,
        tables: &[Arc<TableSpec>],
        most_rows: u64,
    ) -> Result<BTreeSet<u32>, TargetError> {
        self.be_attached()?;
        self.roll_back()?;
        let stored = self.tables()?;
        let (changed, mut merged): (Vec<_>, Vec<_>) =
            tables.iter().partition(|table| stored.has_pending(table.oid));
        let kept = pending::kept_rows(&self.connection, changed.iter().map(|table| table.oid))?;
        let (due, unchanged): (Vec<_>, Vec<_>) =
            changed.into_iter().zip(kept).partition(|(_, kept)| *kept > 0);
        merged.extend(unchanged.into_iter().map(|(table, _)| table));
        let whole = self.transaction(|target| {
            for table in &merged {
                jobs::refuse(&target.connection, "merge.refused", table)
                    .map_err(|error| error.of_copy(table))?;
            }
            let (mut left, mut done) = (most_rows, Vec::new());
            for &(table, kept) in &due {
                if left == 0 {
                    break;
                }
                let is_merged = pending::merge(&target.connection, table, left)
                    .and_then(|merged| {
                        jobs::refuse(&target.connection, "merge.refused", table).map(|()| merged)
                    })
                    .map_err(|error| error.of_copy(table))?;
                left = left.saturating_sub(kept);
                done.extend(is_merged.then_some(table));
            }
            reached("merge.step");
            Ok(done)
        })?;
        merged.extend(whole);
        if merged.is_empty() {
            return Ok(BTreeSet::new());
        }
        reached("merge.merged");
        // In a transaction of its own. DuckDB writes rows into its log under the name that their
        // table has at the end of the transaction, and before the renaming: a log with both cannot
        // be replayed after a crash. Nothing can come between the two: this is the one writer, and
        // a crash leaves a shadow with nothing more to merge.
        self.transaction(|target| {
            let mut statements = String::new();
            for table in &merged {
                target.refuse_foreign(&table.target)?;
                statements.push_str(&ddl::swap(&table.target));
            }
            target.connection.execute_batch(&statements)?;
            for table in &merged {
                target.drop_pending(table.oid)?;
            }
            let stored = target.tables()?;
            stored.give_way(merged.iter().map(|table| (&table.target, table.oid)));
            merged.iter().for_each(|table| stored.set_live(table.oid));
            reached("merge.swapping");
            Ok(())
        })?;
        self.refresh()?;
        Ok(merged.iter().map(|table| table.oid).collect())
    }

    fn abandon_copies(&mut self, copies: &[(u32, Option<Pause>)]) -> Result<(), TargetError> {
        self.transaction(|target| {
            let oids: Vec<u32> = copies.iter().map(|(oid, _)| *oid).collect();
            target.drop_shadows(&oids)?;
            let stored = target.tables()?;
            for (oid, pause) in copies {
                let Some(name) = stored.get(*oid).map(|table| table.target.clone()) else {
                    continue;
                };
                let state = match pause {
                    Some(pause) => TableState::Error(pause.clone()),
                    None if stored.is_ours(&name) => TableState::Resync,
                    None => TableState::Pending,
                };
                stored.set_state(*oid, state, None);
            }
            Ok(())
        })?;
        self.refresh()
    }

    fn jobs(&mut self) -> Result<Vec<StoredJob>, TargetError> {
        self.be_attached()?;
        self.reading(jobs::all)
    }

    fn loader(&mut self) -> Result<Loader, TargetError> {
        self.be_attached()?;
        let connection = self.connection.try_clone()?;
        connection.execute_batch(&format!("USE {}", ddl::CATALOG))?;
        let _ = connection.execute_batch("SET TimeZone = 'UTC'");
        Ok(Loader::new(connection, Arc::clone(&self.database), Arc::clone(&self.loaders)))
    }

    fn apply(
        &mut self,
        batch: &ChangeBatch,
        checkpoint: &Checkpoint,
    ) -> Result<Applied, TargetError> {
        self.be_attached()?;
        if !batch.continues {
            self.roll_back()?;
        }
        self.pace.expect(batch);
        self.set_pace()?;
        if self.parts.is_none() {
            let live = batch
                .tables
                .iter()
                .filter(|changes| !self.copying.contains_key(&changes.table.oid));
            self.views.prepare(&self.database, live)?;
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
                let applied = apply::conclude(target, batch, checkpoint, &progress)?;
                reached("apply.committing");
                Ok((applied, progress.ends_a_copy))
            })?
        };
        self.pace.took(since.elapsed());
        if batch.is_part {
            return Ok(applied);
        }
        self.pace.applied(&applied, (log_bytes, self.log_bytes()));
        if !batch.reshapes.is_empty() || ends_a_copy && !self.copying.is_empty() {
            self.refresh()?;
        }
        Ok(applied)
    }

    fn roll_back(&mut self) -> Result<(), TargetError> {
        if self.is_open {
            self.roll_back_quietly();
            // It may have been looked at meanwhile.
            self.state()?;
        }
        Ok(())
    }

    fn reopen(&mut self) -> Result<(), TargetError> {
        self.roll_back_quietly();
        self.detach()?;
        self.attach_again()
    }

    fn prune(&mut self) -> Result<u64, TargetError> {
        if self.pipeline.is_none() || self.has_open_parts() {
            return Ok(0);
        }
        self.transaction(|target| jobs::prune(&target.connection))
    }

    fn tidy(&mut self, compaction: Compaction) -> Result<(), TargetError> {
        self.be_attached()?;
        // It would end the transaction.
        if self.has_open_parts() {
            return Ok(());
        }
        self.pace.set_for_tidying(&self.connection, compaction, !self.copying.is_empty())?;
        reached("tidy.begun");
        let tidied = self.connection.execute_batch("CHECKPOINT");
        reached("tidy.done");
        self.pace.tidied(&self.connection, tidied.is_ok())?;
        match tidied {
            // An older reader's snapshot, or a writer; the next one will do.
            Err(error) if error.to_string().contains("Cannot CHECKPOINT") => {
                tracing::debug!(error = %error, "file checkpoint put off");
            }
            Err(error) => {
                let error = TargetError::from(error);
                // Chunks that are being loaded are given up first, by whoever has them loaded.
                if error.is_of_disk() && !self.has_loaders() {
                    self.reopen()?;
                }
                return Err(error);
            }
            Ok(()) => {}
        }
        Ok(())
    }

    fn holds_other_values(
        &mut self,
        table: &TableSpec,
        columns: &[usize],
        allowed: &[String],
    ) -> Result<bool, TargetError> {
        self.be_attached()?;
        let target = ddl::table(&table.target);
        let allowed: Vec<String> = allowed.iter().map(|value| ddl::literal(value)).collect();

        for column in columns.iter().filter_map(|&at| table.columns.get(at)) {
            let name = ddl::quoted(&column.target_name);
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

    fn space(&mut self) -> Result<Space, TargetError> {
        self.be_attached()?;
        compact::space(&self.connection, &self.path)
    }

    fn compact(&mut self) -> Result<Compacted, TargetError> {
        self.be_attached()?;
        self.write_anew()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_room_in_memory_goes_beside_the_file_and_is_swept_away_after_a_kill() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("copy.duckdb");
        let spilled = folder.path().join("copy.duckdb.tmp");
        std::fs::create_dir(&spilled).unwrap();
        let [old, new] = ["duckdb_temp_storage_DEFAULT-0.tmp", "duckdb_temp_block-1.block"]
            .map(|name| spilled.join(name));
        for file in [&old, &new] {
            std::fs::write(file, "left behind").unwrap();
        }
        let an_hour_ago = SystemTime::now() - Duration::from_secs(3600);
        std::fs::File::options().write(true).open(&old).unwrap().set_modified(an_hour_ago).unwrap();
        let options = TargetOptions {
            path,
            duckdb_memory_limit: Some("32MB".to_owned()),
            ..TargetOptions::default()
        };
        let target = DuckDb::open(&options).unwrap();
        assert!(!old.exists() && new.exists());
        std::fs::remove_file(&new).unwrap();
        target
            .connection
            .execute_batch(
                "BEGIN; CREATE TABLE rhei_target.t AS SELECT i, hash(i)::VARCHAR || hash(i + \
                 1)::VARCHAR AS v FROM range(1500000) r(i); \
                 CREATE TEMP TABLE sorted AS FROM rhei_target.t ORDER BY v;",
            )
            .unwrap();
        assert!(spilled.read_dir().unwrap().count() > 0);
        drop(target);
        assert_eq!(spilled.read_dir().unwrap().count(), 0);
    }
}
