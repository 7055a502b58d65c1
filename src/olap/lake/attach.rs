//! Opens a lake.

use std::{
    fs::DirBuilder,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use duckdb::{AccessMode, Connection};

use super::{
    CatalogKind, LakeOptions,
    address::{self, without_password},
    extensions, inlining, secrets,
};
use crate::olap::{
    TargetError, TargetOptions,
    arrow_scan::Database,
    connection::TargetConnection,
    file::{settings, spill_folder},
    names::{CATALOG, literal},
};

/// How long DuckLake waits before it commits again that another commit came between; each next wait
/// is longer.
const RETRY_WAIT_MS: u32 = 10;

/// How often a lake is tried to be opened, and the time between two tries.
const ATTACH_TRIES: u32 = 4;
const TRY_INTERVAL: Duration = Duration::from_millis(500);

/// How long a statement waits for the lock of a SQLite file.
const BUSY_TIMEOUT_MS: u32 = 20_000;

impl LakeOptions {
    /// Returns whether the data lies in a store that speaks S3.
    pub(super) fn is_in_store(&self) -> bool {
        let data = self.data_path.as_deref().unwrap_or_default();
        data.starts_with("s3://")
    }
}

/// Starts DuckDB with the extensions and the credentials of a lake, and opens the lake.
///
/// # Errors
/// An extension is missing, or the lake cannot be opened; a lake that does not exist is made unless
/// it is opened for reading only.
pub fn open(
    options: &TargetOptions,
    lake: &LakeOptions,
    mode: AccessMode,
) -> Result<(Arc<Database>, TargetConnection), TargetError> {
    if !matches!(mode, AccessMode::ReadOnly) {
        // Files of a lake may be for others to read; what DuckDB spills is not. Where the folder
        // cannot be made, DuckDB cannot make it either.
        let _ = DirBuilder::new().mode(0o700).create(spill_folder(&options.path));
    }

    let (database, connection) = prepare(options, lake)?;
    attach(&connection, lake, mode)?;
    let commits = (lake.catalog_kind() == CatalogKind::DuckDb).then(Arc::default);
    Ok((database, TargetConnection::new(connection, Arc::new(lake.dialect()), commits)))
}

/// Starts DuckDB with the extensions and the credentials of a lake.
fn prepare(
    options: &TargetOptions,
    lake: &LakeOptions,
) -> Result<(Arc<Database>, Connection), TargetError> {
    let database = Arc::new(Database::open(&settings(options))?);
    let connection = database.connect()?;
    let _ = connection.execute_batch("SET GLOBAL TimeZone = 'UTC'; SET TimeZone = 'UTC'");

    extensions::load(&connection, lake)?;
    if let Some(secret) = secrets::of_catalog(lake) {
        // The error would show the statement.
        connection.execute_batch(&secret).map_err(|_| TargetError::NoSecret)?;
    }
    secrets::put_for_store(&connection, lake)?;

    connection.execute_batch(&format!("SET GLOBAL ducklake_retry_wait_ms = {RETRY_WAIT_MS}"))?;
    let bytes = lake.file_bytes;
    connection.execute_batch(&format!("SET GLOBAL ducklake_target_file_size = '{bytes}B'"))?;
    if !lake.is_in_store() {
        // The system keeps them in memory already: DuckDB would keep every file that it has read
        // until its memory is full.
        connection.execute_batch("SET GLOBAL enable_external_file_cache = false")?;
    }
    Ok((database, connection))
}

/// Fails when a lake that is not there could not be made: its data has no place, or the catalog or
/// the place does not take it.
pub fn refuse_to_make(options: &TargetOptions, lake: &LakeOptions) -> Result<(), TargetError> {
    if lake.data_path.is_none()
        && matches!(lake.catalog_kind(), CatalogKind::Postgres | CatalogKind::Sqlite)
    {
        return Err(TargetError::NoDataPath { lake: lake.to_string() });
    }

    let (_database, connection) = prepare(options, lake)?;
    refuse_files_of_others(&connection, lake)?;
    if let Some(folder) = lake.data_path.as_deref().filter(|_| !lake.is_in_store()) {
        let there = Path::new(folder).ancestors().find(|folder| folder.exists());
        let folder = there.unwrap_or(Path::new("/"));
        if rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_err() {
            return Err(TargetError::NotWritable { path: folder.to_owned() });
        }
    }

    let Some((conninfo, _)) = address::conninfo_of(&lake.catalog) else { return Ok(()) };
    let secret = secrets::of_catalog(lake).map(|_| format!(", SECRET {}", secrets::CATALOG));
    connection.execute_batch(&format!(
        "ATTACH {} AS rhei_catalog (TYPE postgres, READ_ONLY{})",
        literal(&conninfo),
        secret.unwrap_or_default()
    ))?;
    let (may_make, role) = connection.query_row(
        "FROM postgres_query('rhei_catalog', \
         'SELECT has_schema_privilege(''public'', ''CREATE''), current_user::text')",
        [],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    match may_make {
        true => Ok(()),
        false => Err(TargetError::NoCatalogRight { lake: lake.to_string(), role }),
    }
}

/// Attaches a lake whose extensions are loaded, and makes it if it is not there and may be written.
fn attach(
    connection: &Connection,
    lake: &LakeOptions,
    mode: AccessMode,
) -> Result<(), TargetError> {
    let is_reader = matches!(mode, AccessMode::ReadOnly);
    // DuckLake opens the file before it looks for a lake in it.
    if is_reader && address::file_of(&lake.catalog).is_some_and(|file| !file.exists()) {
        return Err(TargetError::NoLake { lake: lake.to_string() });
    }

    match execute_attach(connection, lake, is_reader, false) {
        Err(TargetError::NoLake { .. }) if !is_reader => {}
        attached => {
            attached?;
            return know_data_path(connection, lake);
        }
    }

    let Err(in_use) = refuse_files_of_others(connection, lake) else {
        return execute_attach(connection, lake, false, true);
    };
    // Another process may have made the lake meanwhile, and written these files.
    execute_attach(connection, lake, false, false).map_err(|_| in_use)
}

/// Attaches a lake that was closed. Makes none where its catalog is gone.
pub fn reattach(connection: &Connection, lake: &LakeOptions) -> Result<(), TargetError> {
    // DuckLake opens the file before it looks for a lake in it.
    if address::file_of(&lake.catalog).is_some_and(|file| !file.exists()) {
        return Err(TargetError::NoLake { lake: lake.to_string() });
    }
    execute_attach(connection, lake, false, false)
}

/// Fails when Parquet files are where the data of a new lake is to be: `rhei compact` would delete
/// them, since the lake does not know them.
fn refuse_files_of_others(connection: &Connection, lake: &LakeOptions) -> Result<(), TargetError> {
    let Some(data) = data_folder(lake) else { return Ok(()) };
    let sql = format!(
        "SELECT file FROM glob({}) WHERE file LIKE '%.parquet' LIMIT 1",
        literal(&format!("{data}**"))
    );
    let found: Vec<String> =
        connection.prepare(&sql)?.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    match found.into_iter().next() {
        Some(file) => Err(TargetError::DataPathInUse { data_path: data, file }),
        None => Ok(()),
    }
}

/// Fails when the lake has its data in a store, and the settings do not say so: what reads from a
/// store is not loaded then.
fn know_data_path(connection: &Connection, lake: &LakeOptions) -> Result<(), TargetError> {
    let data = data_path(connection)?;
    if data.starts_with("s3:") && !lake.is_in_store() {
        return Err(TargetError::NoDataPath { lake: lake.to_string() });
    }
    Ok(())
}

/// Returns the folder of the data as DuckLake keeps it: with a slash at its end.
fn data_folder(lake: &LakeOptions) -> Option<String> {
    let data = lake.data_path.as_deref()?;
    Some(format!("{}/", data.trim_end_matches('/')))
}

/// Executes the ATTACH of a lake. `may_make`: it is made if it is not there.
fn execute_attach(
    connection: &Connection,
    lake: &LakeOptions,
    is_reader: bool,
    may_make: bool,
) -> Result<(), TargetError> {
    let mut options = vec![format!("DATA_INLINING_ROW_LIMIT {}", inlining::INLINED_ROWS)];
    if is_reader {
        options.push("READ_ONLY".to_owned());
    }
    if !may_make {
        options.push("CREATE_IF_NOT_EXISTS false".to_owned());
    }
    if let Some(data) = data_folder(lake) {
        options.push(format!("DATA_PATH {}", literal(&data)));
    }
    if lake.catalog_kind() == CatalogKind::Sqlite {
        // Not with SQLite's log of its own: the connections of a reader would see different
        // commits.
        options.push(format!("META_BUSY_TIMEOUT {BUSY_TIMEOUT_MS}"));
    }
    if secrets::of_catalog(lake).is_some() {
        options.push(format!("META_SECRET {}", literal(secrets::CATALOG)));
    }

    let catalog = literal(&without_password(&lake.catalog));
    let attach = format!("ATTACH {catalog} AS {CATALOG} ({}); USE {CATALOG};", options.join(", "));
    let mut tries = 1;
    loop {
        match connection.execute_batch(&attach).map_err(|source| refused(lake, source)) {
            // Another process may be making the same lake.
            Err(TargetError::LakeNotOpened { .. }) if tries < ATTACH_TRIES => {
                tries += 1;
                std::thread::sleep(TRY_INTERVAL);
                // The lake may have failed only after it was opened.
                let detach = format!("DETACH DATABASE IF EXISTS {CATALOG}");
                connection.execute_batch(&detach).map_err(|source| refused(lake, source))?;
            }
            attached => return attached,
        }
    }
}

/// Returns the place of the data of a lake that is open.
pub fn data_path(connection: &Connection) -> Result<PathBuf, TargetError> {
    let sql = format!("SELECT data_path FROM {CATALOG}.settings()");
    Ok(connection.query_row(&sql, [], |row| row.get::<_, String>(0))?.into())
}

/// Returns why DuckLake did not open the lake.
fn refused(lake: &LakeOptions, source: duckdb::Error) -> TargetError {
    let (text, lake) = (source.to_string(), lake.to_string());
    if text.contains("creating a new DuckLake is explicitly disabled") {
        TargetError::NoLake { lake }
    } else if text.contains("data_path is not set") {
        TargetError::NoDataPath { lake }
    } else if text.contains("does not match existing data path") {
        TargetError::OtherDataPath { lake, source }
    } else if text.contains("catalog version mismatch") {
        TargetError::OtherLakeFormat { lake, source }
    } else {
        TargetError::LakeNotOpened { lake, source }
    }
}
