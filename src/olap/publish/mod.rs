//! Published copies: files that other tools read while the replicator goes on writing its own.
//!
//! A publication is written from one snapshot, under another name, and put in its place by one
//! rename: a tool that opens the path gets a whole copy, as of one position of the source, and a
//! tool that has an older file open keeps that file. `place` guards the path and replaces what is
//! there, `parquet` writes folders.

mod parquet;
mod place;

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use duckdb::InterruptHandle;
use serde::{Deserialize, Serialize};

use self::place::{Place, refused, remove_if_there, resolved, size_of};
use super::{
    DuckDb, TargetError, TargetOptions, arrow_scan::Database, compact,
    connection::TargetConnection, duckdb::reader_of, error, names, state,
};
use crate::{Lsn, pgoutput::QualifiedName};

/// The name under which the new file is attached while it is written, and that of the one before.
const NAME: &str = "rhei_publish";
const BEFORE: &str = "rhei_published";

/// How long a statement is tried again that a session which reads the catalogs blocks.
const RETRY_TIME: Duration = Duration::from_secs(10);
/// How long a publication may take to end after it was interrupted.
const TIME_TO_END: Duration = Duration::from_secs(60);
const STEP: Duration = Duration::from_millis(50);

/// What a published copy consists of.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum PublishFormat {
    /// One DuckDB file.
    #[default]
    DuckDb,
    /// A folder: of each version a folder with a folder per table, and a manifest.
    Parquet,
}

impl FromStr for PublishFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        <Self as clap::ValueEnum>::from_str(text, false)
            .map_err(|_| "expected \"duckdb\" or \"parquet\"".to_owned())
    }
}

/// Where a copy is published, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishOptions {
    /// The file, or the folder.
    pub path: PathBuf,
    /// What is written.
    pub format: PublishFormat,
    /// How many versions there are, with the newest.
    pub keep: usize,
}

/// A copy that was published.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Published {
    /// The file, or the folder.
    pub path: PathBuf,
    /// The position of the source as of which everything in the copy is.
    pub lsn: Lsn,
    /// The tables of the copy that are in it.
    pub tables: u64,
    /// The rows of these tables.
    pub rows: u64,
    /// The tables that are not in it, each with the reason: its state, if it is not live.
    pub not_live: BTreeMap<String, String>,
    /// The size, in bytes.
    pub bytes: u64,
    /// How long it took.
    pub seconds: f64,
}

/// Publishes the copy as it is at one moment, through a connection of its own.
pub struct Publisher {
    connection: TargetConnection,
    /// The file whose copy this is.
    source: PathBuf,
    _alive: Arc<()>,
    _database: Option<Arc<Database>>,
}

/// The publications that are under way: the file cannot be closed before they have ended.
#[derive(Default)]
pub(super) struct Publishers(Mutex<Vec<(Weak<()>, Arc<InterruptHandle>)>>);

impl Publishers {
    fn add(&self, publisher: &Publisher) {
        let mut publishers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        publishers.push((Arc::downgrade(&publisher._alive), publisher.interrupt_handle()));
    }

    /// Returns whether a publication is under way.
    pub(super) fn are_busy(&self) -> bool {
        let mut publishers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        publishers.retain(|(alive, _)| alive.strong_count() > 0);
        !publishers.is_empty()
    }

    /// Interrupts all publications, and waits until their threads have ended. Returns `false` when
    /// one has not ended in time.
    pub(super) fn end(&self) -> bool {
        let since = Instant::now();
        while self.are_busy() {
            if since.elapsed() > TIME_TO_END {
                return false;
            }
            for (_, handle) in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                handle.interrupt();
            }
            std::thread::sleep(STEP);
        }
        true
    }
}

/// The tables of a snapshot.
struct Snapshot {
    lsn: Lsn,
    tables: Vec<QualifiedName>,
    /// Tables of the copy's file that are not published.
    left_out: Vec<QualifiedName>,
    not_live: BTreeMap<String, String>,
}

impl Snapshot {
    /// Returns whether nothing has changed since `published` was made, and it is still there.
    fn is_as(&self, published: &Published) -> bool {
        published.lsn == self.lsn && published.not_live == self.not_live && published.path.exists()
    }
}

impl DuckDb {
    /// Returns what publishes the copy beside the writer.
    pub(super) fn new_publisher(&mut self) -> Result<Publisher, TargetError> {
        self.ensure_attached()?;
        let publisher = Publisher {
            connection: self.new_connection()?,
            source: self.path().to_owned(),
            _alive: Arc::default(),
            _database: None,
        };
        self.publishers.add(&publisher);
        Ok(publisher)
    }
}

impl Publisher {
    /// Opens a file that no replicator holds.
    ///
    /// # Errors
    /// There is no such file, or another process has it open.
    pub fn open(options: &TargetOptions) -> Result<Self, TargetError> {
        let (database, connection) = reader_of(options)?;
        let source = options.path.clone();
        Ok(Self { connection, source, _alive: Arc::default(), _database: Some(database) })
    }

    /// Returns what ends the publication from another thread.
    pub fn interrupt_handle(&self) -> Arc<InterruptHandle> {
        self.connection.interrupt_handle()
    }

    /// Publishes the copy. Returns `None` when it is as it was at `last`. A failure leaves the
    /// version that is there as it was.
    ///
    /// # Errors
    /// Nothing was copied yet, something else is at the path, or a file cannot be written.
    pub fn publish(
        self,
        options: &PublishOptions,
        last: Option<&Published>,
    ) -> Result<Option<Published>, TargetError> {
        if last.is_some_and(|last| self.snapshot().is_ok_and(|now| now.is_as(last))) {
            return Ok(None);
        }

        let started = Instant::now();
        let place = Place::take(options, &self.source)?;
        let next = place.next(options.format);
        match options.format {
            PublishFormat::DuckDb => self.prepare_file(&place, &next, last.is_some())?,
            PublishFormat::Parquet => parquet::prepare(&place, &next)?,
        }

        let written = self.write(&place, &next, options);
        if written.is_err() {
            self.remove(&next);
        }
        let (snapshot, rows, bytes) = written.map_err(plain)?;
        Ok(Some(Published {
            path: place.path.clone(),
            lsn: snapshot.lsn,
            tables: snapshot.tables.len() as u64,
            rows,
            not_live: snapshot.not_live,
            bytes,
            seconds: started.elapsed().as_secs_f64(),
        }))
    }

    /// Removes a version that did not become whole.
    fn remove(&self, next: &Path) {
        // The transaction may be over already, and the file detached.
        let _ = self.connection.execute_batch("ROLLBACK");
        let _ = self.connection.execute_batch(&format!("DETACH DATABASE IF EXISTS {NAME}"));
        if next.is_dir() {
            let _ = fs::remove_dir_all(next);
        } else {
            let _ = fs::remove_file(next);
            let _ = fs::remove_file(compact::sibling(next, ".wal"));
        }
    }

    /// Writes the new version, and puts it in its place. Returns its rows and bytes.
    fn write(
        &self,
        place: &Place,
        next: &Path,
        options: &PublishOptions,
    ) -> Result<(Snapshot, u64, u64), TargetError> {
        self.connection.execute_batch("BEGIN")?;
        let snapshot = self.snapshot()?;

        if options.format == PublishFormat::Parquet {
            let (rows, tables) = parquet::write(&self.connection, &snapshot, next)?;
            self.connection.execute_batch("COMMIT")?;
            let bytes = size_of(next)?;
            parquet::put_in_place(place, next, &snapshot, &tables, options.keep)?;
            return Ok((snapshot, rows, bytes));
        }

        let rows = self.write_file(&snapshot)?;
        let bytes = size_of(next)?;
        place.replace_file(next, &self.source, options.keep)?;
        Ok((snapshot, rows, bytes))
    }

    /// Runs a statement, and tries it again while a session that reads the catalogs blocks it.
    fn retried(&self, sql: &str) -> Result<(), TargetError> {
        let since = Instant::now();
        loop {
            match self.connection.execute_batch(sql) {
                Err(error)
                    if since.elapsed() < RETRY_TIME
                        && error::is_of_kind(
                            &error.to_string(),
                            &["TransactionContext Error", "Binder Error"],
                        ) =>
                {
                    std::thread::sleep(STEP);
                }
                done => return Ok(done?),
            }
        }
    }

    /// Makes the new file and attaches it. `is_ours`: this process has published the file that is
    /// at the path.
    ///
    /// # Errors
    /// Another file is at the path, or the disk has no room.
    fn prepare_file(&self, place: &Place, next: &Path, is_ours: bool) -> Result<(), TargetError> {
        if !is_ours && place.path.exists() {
            self.recognize(&place.path)?;
        }

        let space = compact::space(&self.connection, &self.source)?;
        let wanted = space.file_bytes.saturating_sub(space.free_bytes);
        let disk = rustix::fs::statvfs(place.path.parent().unwrap_or(Path::new("/")));
        if let Ok(disk) = disk
            && disk.f_bavail.saturating_mul(disk.f_frsize) < wanted
        {
            return Err(refused(format!(
                "the disk has no room for its {wanted} bytes\nhint: make room, or name another \
                 folder"
            )));
        }

        remove_if_there(next)?;
        remove_if_there(&compact::sibling(next, ".wal"))?;
        let file = names::literal(&next.display().to_string());
        // A session that lists tables or columns opens a transaction in each database that is not
        // hidden, and CHECKPOINT and DETACH would have to wait for it.
        let attach = format!("ATTACH {file} AS {NAME} (STORAGE_VERSION 'latest', HIDDEN)");
        self.retried(&attach).map_err(plain)
    }

    /// Fails unless the file at the path is a published copy: no other file is replaced.
    fn recognize(&self, path: &Path) -> Result<(), TargetError> {
        let file = names::literal(&path.display().to_string());
        let attached = is_database(path)
            && self
                .connection
                .execute_batch(&format!("ATTACH {file} AS {BEFORE} (READ_ONLY, HIDDEN)"))
                .is_ok();
        let known = format!("FROM {BEFORE}._rhei.freshness SELECT lsn LIMIT 1");
        let is_known = attached && self.connection.execute_batch(&known).is_ok();
        if attached {
            self.retried(&format!("DETACH {BEFORE}"))?;
        }
        if is_known {
            return Ok(());
        }
        Err(refused(format!(
            "{} is there, and is no copy that rhei published, or another process writes to \
             it\nhint: move it away, or name another file",
            path.display()
        )))
    }

    /// Reads what is in the copy. The snapshot of the transaction is taken by that.
    fn snapshot(&self) -> Result<Snapshot, TargetError> {
        let pipeline = state::read_pipeline(&self.connection)?;
        let lsn = match pipeline.map(|pipeline| pipeline.checkpoint.lsn) {
            Some(lsn) => lsn,
            None => {
                return Err(refused("nothing was copied yet\nhint: run `rhei sync` first"));
            }
        };

        let left_out = self.left_out()?;
        let mut all = self.connection.prepare(&format!(
            "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = '{}' AND \
             schema_name <> '_rhei' ORDER BY ALL",
            names::CATALOG
        ))?;
        let all = all.query_map([], |row| {
            Ok(QualifiedName::new(row.get::<_, String>(0)?, row.get::<_, String>(1)?))
        })?;
        let all = all.collect::<Result<Vec<_>, _>>()?;

        let shadows = names::shadows(&self.connection)?;
        let reason = |name: &QualifiedName| {
            let lower = names::lower(name);
            left_out.iter().find(|(other, _)| names::lower(other) == lower)
        };
        let (left, tables): (Vec<_>, Vec<_>) = all
            .into_iter()
            .partition(|name| reason(name).is_some() || shadows.contains(&names::lower(name)));
        let there: HashSet<_> = left.iter().map(names::lower).collect();
        let not_live = left_out
            .iter()
            .filter(|(name, state)| state != "dropped" || there.contains(&names::lower(name)))
            .map(|(name, state)| (name.to_string(), state.clone()))
            .collect();
        Ok(Snapshot { lsn, tables, left_out: left, not_live })
    }

    /// Returns the tables that are not published, each with the reason: its state, if it is not at
    /// the position of the live tables; or that an INSERT of all its rows and columns would fail.
    fn left_out(&self) -> Result<Vec<(QualifiedName, String)>, TargetError> {
        let mut left_out = self.connection.prepare(&format!(
            "SELECT target_schema, target_name, state FROM _rhei.tables WHERE state <> 'live' \
             UNION ALL \
             SELECT DISTINCT schema_name, table_name, 'it has a foreign key' \
             FROM duckdb_constraints() \
             WHERE database_name = '{0}' AND constraint_type = 'FOREIGN KEY' \
             UNION ALL \
             SELECT schema_name, table_name, 'it has a generated column' \
             FROM duckdb_tables() \
             WHERE database_name = '{0}' AND contains(sql, ' GENERATED ALWAYS AS(') \
             ORDER BY ALL",
            names::CATALOG
        ))?;
        let left_out = left_out.query_map([], |row| {
            let name = QualifiedName::new(row.get::<_, String>(0)?, row.get::<_, String>(1)?);
            Ok((name, row.get(2)?))
        })?;
        Ok(left_out.collect::<Result<_, _>>()?)
    }

    /// Writes everything into the new file, in the transaction of the snapshot.
    fn write_file(&self, snapshot: &Snapshot) -> Result<u64, TargetError> {
        let connection = &self.connection;
        connection.execute_batch(&format!(
            "COPY FROM DATABASE {} TO {NAME} (SCHEMA); DROP SCHEMA {NAME}._rhei CASCADE;",
            names::CATALOG
        ))?;
        for table in &snapshot.left_out {
            connection.execute_batch(&format!("DROP TABLE {NAME}.{}", names_of(table)))?;
        }

        let mut rows = 0;
        for table in &snapshot.tables {
            let name = names_of(table);
            let sql = format!("INSERT INTO {NAME}.{name} FROM {}.{name}", names::CATALOG);
            rows += connection.execute(&sql, []).map_err(|error| match plain(error.into()) {
                TargetError::Query(error) => refused(format!("table {table}: {error}")),
                other => other,
            })? as u64;
        }

        connection.execute_batch(&format!(
            "CREATE SCHEMA {NAME}._rhei; CREATE TABLE {NAME}._rhei.freshness AS SELECT \
             checkpoint_lsn AS lsn, checkpoint_time AS committed_at, now() AS published_at, {} AS \
             not_live FROM _rhei.pipeline; COMMIT",
            list_of(&snapshot.not_live)
        ))?;
        self.retried(&format!("CHECKPOINT {NAME}"))?;
        self.retried(&format!("DETACH {NAME}"))?;
        Ok(rows)
    }
}

/// Returns whether a file begins as those of DuckDB do: after a checksum of 8 bytes.
fn is_database(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read = fs::File::open(path).and_then(|file| file.read_exact_at(&mut magic, 8));
    read.is_ok() && &magic == b"DUCK"
}

/// Returns the name of a table within its database.
fn names_of(table: &QualifiedName) -> String {
    format!("{}.{}", names::quoted(&table.schema), names::quoted(&table.name))
}

/// Returns a list of SQL: tables, each with its state.
fn list_of(not_live: &BTreeMap<String, String>) -> String {
    let items = not_live.iter().map(|(name, state)| names::literal(&format!("{name}: {state}")));
    format!("[{}]::VARCHAR[]", items.collect::<Vec<_>>().join(", "))
}

/// Returns the paths that DuckDB opens for a publication, for the settings that let no other be
/// opened: files, and folders.
pub(super) fn opened_paths(
    options: &PublishOptions,
) -> std::io::Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let path = resolved(&options.path)?;
    Ok(match options.format {
        PublishFormat::DuckDb => {
            (vec![compact::sibling(&path, place::UNFINISHED), path], Vec::new())
        }
        PublishFormat::Parquet => (Vec::new(), vec![path]),
    })
}

/// Returns the error in the words of the settings, when the reason is that DuckDB may open no other
/// files than those that were listed when readers were let in.
fn plain(error: TargetError) -> TargetError {
    match error {
        TargetError::Query(error)
            if error::is_of_kind(&error.to_string(), &["Permission Error"]) =>
        {
            refused(
                "the replicator writes to no path but that of its own [publish] section\nhint: set \
                 it in rhei.toml, and start the replicator again",
            )
        }
        error => error,
    }
}
