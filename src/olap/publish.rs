//! Published copies: files that other tools read while the replicator goes on writing its own.
//!
//! Everything is written from one snapshot, under another name, and put in its place by one rename:
//! whoever opens the path gets a whole copy, as of one position of the source. A file that a reader
//! has open stays as it is for that reader.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use duckdb::{Connection, InterruptHandle};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    DuckDb, TargetError, TargetOptions, arrow_scan::Database, compact, duckdb::reader_of, names,
    state,
};
use crate::{Lsn, failpoint::reached, pgoutput::QualifiedName};

/// The name under which the new file is attached while it is written.
const NAME: &str = "rhei_publish";

/// The ending of the names of what is not whole yet.
const UNFINISHED: &str = ".publishing";

/// The file that names the newest version of a folder of Parquet files.
const MANIFEST: &str = "manifest.json";

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
    /// The tables that are not in it, because they are not at that position, and their states.
    pub not_live: BTreeMap<String, String>,
    /// The size, in bytes.
    pub bytes: u64,
    /// How long it took.
    pub seconds: f64,
}

/// Publishes the copy as it is at one moment, through a connection of its own. The file is neither
/// reopened nor rewritten while a publisher lives.
pub struct Publisher {
    connection: Connection,
    /// The file whose copy this is.
    source: PathBuf,
    _alive: Option<Arc<()>>,
    _database: Option<Arc<Database>>,
}

/// The tables of a snapshot.
struct Snapshot {
    lsn: Lsn,
    tables: Vec<QualifiedName>,
    /// Tables that are in the file and are not published.
    left_out: Vec<QualifiedName>,
    not_live: BTreeMap<String, String>,
}

impl Snapshot {
    /// Returns whether the copy was like this when it was published, and still is where it was put.
    fn is_as(&self, published: &Published) -> bool {
        published.lsn == self.lsn && published.not_live == self.not_live && published.path.exists()
    }
}

impl DuckDb {
    /// Returns what publishes the copy beside the writer.
    pub(super) fn new_publisher(&mut self) -> Result<Publisher, TargetError> {
        self.ensure_attached()?;
        Ok(Publisher {
            connection: self.new_connection()?,
            source: self.path().to_owned(),
            _alive: Some(self.alive()),
            _database: None,
        })
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
        Ok(Self { connection, source, _alive: None, _database: Some(database) })
    }

    /// Returns what ends the publication from another thread.
    pub fn interrupt_handle(&self) -> Arc<InterruptHandle> {
        self.connection.interrupt_handle()
    }

    /// Publishes the copy. Returns `None` when it is as it was at `last`. Any failure leaves the
    /// versions that are there as they were.
    ///
    /// # Errors
    /// Nothing was copied yet, there is no folder for the path, or a file cannot be written.
    pub fn publish(
        self,
        options: &PublishOptions,
        last: Option<&Published>,
    ) -> Result<Option<Published>, TargetError> {
        let started = Instant::now();
        let path = std::path::absolute(&options.path)?;
        let folder = path.parent().unwrap_or(Path::new("/")).to_owned();
        if !folder.is_dir() {
            return Err(TargetError::NoFolder { path, folder });
        }
        if same_file(&path, &self.source) {
            return Err(TargetError::NotPublished {
                reason: "[publish] path is the copy itself\nhint: name another file".to_owned(),
            });
        }

        if last.is_some_and(|last| self.snapshot().is_ok_and(|now| now.is_as(last))) {
            return Ok(None);
        }

        let next = Next::prepare(&self.connection, &path, options.format)?;
        let written = self.write(&next, options.keep);
        if written.is_err() {
            // The transaction may be over already, and the file detached.
            let _ = self.connection.execute_batch("ROLLBACK");
            next.remove(&self.connection);
        }
        let (snapshot, rows) = written.map_err(refused)?;

        Ok(Some(Published {
            bytes: size_of(&path)?,
            path,
            lsn: snapshot.lsn,
            tables: snapshot.tables.len() as u64,
            rows,
            not_live: snapshot.not_live,
            seconds: started.elapsed().as_secs_f64(),
        }))
    }

    fn write(&self, next: &Next, keep: usize) -> Result<(Snapshot, u64), TargetError> {
        self.connection.execute_batch("BEGIN")?;
        let snapshot = self.snapshot()?;

        let rows = match next {
            Next::File { path, next } => {
                let rows = self.write_file(&snapshot)?;
                self.put_in_place(path, next, keep)?;
                rows
            }
            Next::Folder { path, next } => {
                let (rows, manifest) = self.write_folder(&snapshot, next)?;
                self.connection.execute_batch("COMMIT")?;
                put_folder_in_place(path, next, &snapshot, &manifest, keep)?;
                rows
            }
        };
        Ok((snapshot, rows))
    }

    /// Reads what is in the copy. The snapshot of the transaction is taken by that.
    fn snapshot(&self) -> Result<Snapshot, TargetError> {
        let pipeline = state::read_pipeline(&self.connection)?;
        let lsn = match pipeline.map(|pipeline| pipeline.checkpoint.lsn) {
            Some(lsn) => lsn,
            None => {
                return Err(TargetError::NotPublished {
                    reason: "nothing was copied yet\nhint: `rhei sync` copies".to_owned(),
                });
            }
        };

        let mut states = self.connection.prepare(
            "SELECT target_schema, target_name, state FROM _rhei.tables WHERE state <> 'live'",
        )?;
        let states = states.query_map([], |row| {
            Ok((
                QualifiedName::new(row.get::<_, String>(0)?, row.get::<_, String>(1)?),
                row.get(2)?,
            ))
        })?;
        let states = states.collect::<Result<BTreeMap<QualifiedName, String>, _>>()?;

        let shadows = names::shadows(&self.connection)?;
        let mut all = self.connection.prepare(&format!(
            "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = '{}' AND \
             schema_name <> '_rhei' ORDER BY ALL",
            names::CATALOG
        ))?;
        let all = all.query_map([], |row| {
            Ok(QualifiedName::new(row.get::<_, String>(0)?, row.get::<_, String>(1)?))
        })?;
        let all = all.collect::<Result<Vec<_>, _>>()?;

        let is_whole = |name: &QualifiedName| {
            let lower = (name.schema.to_lowercase(), name.name.to_lowercase());
            !states.contains_key(name) && !shadows.contains(&lower)
        };
        let (tables, left_out) = all.into_iter().partition(is_whole);
        let not_live = states
            .into_iter()
            .filter(|(_, state)| state != "dropped")
            .map(|(name, state)| (name.to_string(), state))
            .collect();
        Ok(Snapshot { lsn, tables, left_out, not_live })
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
            rows += connection.execute(&sql, [])? as u64;
        }

        connection.execute_batch(&format!(
            "CREATE SCHEMA {NAME}._rhei; CREATE TABLE {NAME}._rhei.freshness AS SELECT \
             checkpoint_lsn AS lsn, checkpoint_time AS committed_at, now() AS published_at, {} AS \
             not_live FROM _rhei.pipeline; COMMIT; CHECKPOINT {NAME}; DETACH {NAME};",
            list_of(&snapshot.not_live)
        ))?;
        Ok(rows)
    }

    /// Puts the new file at its path; the one that was there becomes the first of the older ones.
    fn put_in_place(&self, path: &Path, next: &Path, keep: usize) -> Result<(), TargetError> {
        // The rights of the file stay, and at first are those of the copy.
        let permissions = fs::metadata(path).or_else(|_| fs::metadata(&self.source))?.permissions();
        fs::set_permissions(next, permissions)?;
        File::open(next)?.sync_all()?;
        reached("publish.written");

        if path.exists() {
            for number in (1..keep.saturating_sub(1)).rev() {
                rename_if_there(&numbered(path, number), &numbered(path, number + 1))?;
            }
            if keep > 1 {
                let older = numbered(path, 1);
                remove_if_there(&older)?;
                // Some file systems have no links. The path itself is never without a file.
                fs::hard_link(path, &older).or_else(|_| fs::copy(path, &older).map(|_| ()))?;
            }
        }
        for number in keep.. {
            if !remove_if_there(&numbered(path, number))? {
                break;
            }
        }

        fs::rename(next, path)?;
        reached("publish.renamed");
        sync_folder_of(path);
        Ok(())
    }

    /// Writes a folder for each table. Returns the rows, and what the manifest says of the tables.
    fn write_folder(
        &self,
        snapshot: &Snapshot,
        next: &Path,
    ) -> Result<(u64, Vec<serde_json::Value>), TargetError> {
        let (mut rows, mut tables) = (0, Vec::new());
        for table in &snapshot.tables {
            let columns = self.parquet_columns(table)?;
            let selected: Vec<String> = columns.iter().map(ParquetColumn::selected).collect();
            let folder = folder_name(table);

            let sql = format!(
                "COPY (SELECT {} FROM {}) TO {} (FORMAT parquet, COMPRESSION zstd, FILE_SIZE_BYTES \
                 '512MB')",
                selected.join(", "),
                names::table(table),
                names::literal(&next.join(&folder).display().to_string())
            );
            let written = self.connection.execute(&sql, [])? as u64;

            rows += written;
            tables.push(json!({
                "schema": table.schema, "table": table.name, "folder": folder, "rows": written,
                "columns": columns,
            }));
        }
        Ok((rows, tables))
    }

    fn parquet_columns(&self, table: &QualifiedName) -> Result<Vec<ParquetColumn>, TargetError> {
        let mut columns = self.connection.prepare(&format!(
            "SELECT column_name, data_type FROM duckdb_columns() WHERE database_name = '{}' AND \
             schema_name = ? AND table_name = ? ORDER BY column_index",
            names::CATALOG
        ))?;
        let columns = columns.query_map([&table.schema, &table.name], |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
        })?;
        let column = |(name, data_type): (String, String)| {
            let is_text = !parquet_keeps(&data_type);
            ParquetColumn { name, data_type, is_text }
        };
        Ok(columns.collect::<Result<Vec<_>, _>>()?.into_iter().map(column).collect())
    }
}

/// A column of a table in Parquet.
#[derive(Serialize)]
struct ParquetColumn {
    name: String,
    #[serde(rename = "type")]
    data_type: String,
    /// The values are stored as DuckDB's text of them.
    is_text: bool,
}

impl ParquetColumn {
    fn selected(&self) -> String {
        let name = names::quoted(&self.name);
        if self.is_text { format!("{name}::VARCHAR AS {name}") } else { name }
    }
}

/// Returns whether Parquet files hold values of a type as they are. DuckDB writes HUGEINT as
/// DOUBLE, brings a TIMETZ to UTC, and leaves out the microseconds of an INTERVAL.
fn parquet_keeps(data_type: &str) -> bool {
    const LOSSY: [&str; 7] =
        ["HUGEINT", "TIME WITH TIME ZONE", "INTERVAL", "BIGNUM", "UNION(", "VARIANT", "BIT"];
    // The label of an ENUM or the name of a field may look like one of them, which does no harm.
    !LOSSY.iter().any(|lossy| data_type.contains(lossy))
}

/// Where the new version is written.
enum Next {
    File { path: PathBuf, next: PathBuf },
    Folder { path: PathBuf, next: PathBuf },
}

impl Next {
    /// Makes room for a new version: what a crash has left is removed.
    fn prepare(
        connection: &Connection,
        path: &Path,
        format: PublishFormat,
    ) -> Result<Self, TargetError> {
        let path = path.to_owned();
        match format {
            PublishFormat::DuckDb => {
                let next = compact::sibling(&path, UNFINISHED);
                remove_if_there(&next)?;
                remove_if_there(&compact::sibling(&next, ".wal"))?;
                let file = names::literal(&next.display().to_string());
                let attach = format!("ATTACH {file} AS {NAME} (STORAGE_VERSION 'latest')");
                connection.execute_batch(&attach).map_err(|error| refused(error.into()))?;
                Ok(Self::File { path, next })
            }
            PublishFormat::Parquet => {
                fs::create_dir_all(&path)?;
                let next = path.join(UNFINISHED);
                if next.exists() {
                    fs::remove_dir_all(&next)?;
                }
                fs::create_dir(&next)?;
                Ok(Self::Folder { path, next })
            }
        }
    }

    /// Removes a version that did not become whole.
    fn remove(&self, connection: &Connection) {
        match self {
            Self::File { next, .. } => {
                let _ = connection.execute_batch(&format!("DETACH DATABASE IF EXISTS {NAME}"));
                let _ = fs::remove_file(next);
                let _ = fs::remove_file(compact::sibling(next, ".wal"));
            }
            Self::Folder { next, .. } => {
                let _ = fs::remove_dir_all(next);
            }
        }
    }
}

/// Puts a new version into its folder, and has the manifest name it.
fn put_folder_in_place(
    path: &Path,
    next: &Path,
    snapshot: &Snapshot,
    tables: &[serde_json::Value],
    keep: usize,
) -> Result<(), TargetError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Names of later versions sort behind those of earlier ones.
    let version = format!("{:016X}-{}", snapshot.lsn.0, now.as_micros());
    let manifest = json!({
        "lsn": snapshot.lsn.to_string(),
        "published_at_us": now.as_micros() as u64,
        "version": version,
        "tables": tables,
        "not_live": snapshot.not_live,
    });
    let manifest = format!("{manifest:#}\n");

    fs::write(next.join(MANIFEST), &manifest)?;
    sync_all(next)?;
    reached("publish.written");
    fs::rename(next, path.join(&version))?;
    sync_folder_of(&path.join(&version));

    let unfinished = path.join(format!("{MANIFEST}{UNFINISHED}"));
    fs::write(&unfinished, &manifest)?;
    File::open(&unfinished)?.sync_all()?;
    fs::rename(&unfinished, path.join(MANIFEST))?;
    reached("publish.renamed");
    sync_folder_of(&path.join(MANIFEST));

    let mut versions: Vec<PathBuf> = fs::read_dir(path)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|entry| entry.is_dir() && entry.join(MANIFEST).is_file())
        .collect();
    versions.sort();
    let too_many = versions.len().saturating_sub(keep.max(1));
    for version in versions.iter().take(too_many) {
        fs::remove_dir_all(version)?;
    }
    Ok(())
}

/// Returns the name of a table within its database.
fn names_of(table: &QualifiedName) -> String {
    format!("{}.{}", names::quoted(&table.schema), names::quoted(&table.name))
}

/// Returns the name of a table's folder: any file system and any tool can take it.
fn folder_name(table: &QualifiedName) -> String {
    let mut name = String::new();
    for (at, part) in [&table.schema, &table.name].into_iter().enumerate() {
        if at > 0 {
            name.push('.');
        }
        for byte in part.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' => name.push(byte.into()),
                _ => name.push_str(&format!("%{byte:02X}")),
            }
        }
    }
    name
}

/// Returns a list of SQL: tables, each with its state.
fn list_of(not_live: &BTreeMap<String, String>) -> String {
    let items = not_live.iter().map(|(name, state)| names::literal(&format!("{name}: {state}")));
    format!("[{}]::VARCHAR[]", items.collect::<Vec<_>>().join(", "))
}

/// Returns the path of an older version: `shop.1.duckdb` of `shop.duckdb`.
fn numbered(path: &Path, number: usize) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!(".{number}"));
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

/// Returns the paths that a publication writes, for the settings that let no other be written:
/// files, and folders.
pub(super) fn written_paths(
    options: &PublishOptions,
) -> std::io::Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let path = std::path::absolute(&options.path)?;
    Ok(match options.format {
        PublishFormat::DuckDb => (vec![compact::sibling(&path, UNFINISHED)], Vec::new()),
        PublishFormat::Parquet => (Vec::new(), vec![path]),
    })
}

/// DuckDB may be set to write nowhere but to paths that it knows since it began.
fn refused(error: TargetError) -> TargetError {
    match error {
        TargetError::Query(error)
            if super::error::is_of_kind(&error.to_string(), &["Permission Error"]) =>
        {
            TargetError::NotPublished {
                reason: "the replicator writes to no path but that of its own [publish] \
                         section\nhint: set it in rhei.toml, and start the replicator again"
                    .to_owned(),
            }
        }
        error => error,
    }
}

fn same_file(one: &Path, other: &Path) -> bool {
    match (fs::canonicalize(one), fs::canonicalize(other)) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}

fn rename_if_there(from: &Path, to: &Path) -> std::io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Returns whether there was such a file.
fn remove_if_there(path: &Path) -> std::io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Has the disk keep all files below a folder.
fn sync_all(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sync_all(&path)?;
        } else {
            File::open(&path)?.sync_all()?;
        }
    }
    File::open(folder)?.sync_all()
}

fn sync_folder_of(path: &Path) {
    if let Some(folder) = path.parent() {
        // A crash before this sync leaves the version before, which is equally valid.
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
    }
}

/// Returns the size of a file, or of the newest version in a folder.
fn size_of(path: &Path) -> std::io::Result<u64> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_dir() {
        return Ok(metadata.len());
    }
    let mut bytes = 0;
    for entry in fs::read_dir(path)? {
        bytes += size_of(&entry?.path())?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_versions_keep_the_ending_that_tools_know() {
        let path = Path::new("/data/shop.ro.duckdb");
        assert_eq!(numbered(path, 1), Path::new("/data/shop.ro.1.duckdb"));
        assert_eq!(numbered(Path::new("/data/shop"), 2), Path::new("/data/shop.2"));
    }

    #[test]
    fn a_folder_has_the_name_of_its_table_whatever_is_in_it() {
        assert_eq!(folder_name(&QualifiedName::new("public", "orders")), "public.orders");
        assert_eq!(folder_name(&QualifiedName::new("a.b", "x/../é")), "a%2Eb.x%2F%2E%2E%2F%C3%A9");
    }
}
