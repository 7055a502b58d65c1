//! Opens a lake.

use std::{path::PathBuf, sync::Arc, time::Duration};

use duckdb::{AccessMode, Connection};

use super::{LakeOptions, extensions, inlining, secrets};
use crate::olap::{
    TargetError, TargetOptions,
    arrow_scan::Database,
    connection::TargetConnection,
    file::settings,
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
    let database = Arc::new(Database::open(&settings(options))?);
    let connection = database.connect()?;
    let _ = connection.execute_batch("SET GLOBAL TimeZone = 'UTC'; SET TimeZone = 'UTC'");

    extensions::load(&connection, lake)?;
    let statements = [secrets::of_catalog(lake), store_secret(lake)];
    for statement in statements.into_iter().flatten() {
        // The error would show the statement.
        connection.execute_batch(&statement).map_err(|_| TargetError::NoSecret)?;
    }

    connection.execute_batch(&format!("SET GLOBAL ducklake_retry_wait_ms = {RETRY_WAIT_MS}"))?;
    let bytes = lake.file_bytes;
    connection.execute_batch(&format!("SET GLOBAL ducklake_target_file_size = '{bytes}B'"))?;
    if !lake.is_in_store() {
        // The system keeps them in memory already: DuckDB would keep every file that it has read
        // until its memory is full.
        connection.execute_batch("SET GLOBAL enable_external_file_cache = false")?;
    }
    attach(&connection, lake, mode)?;
    Ok((database, TargetConnection::new(connection, Arc::new(lake.dialect()))))
}

fn store_secret(lake: &LakeOptions) -> Option<String> {
    lake.is_in_store().then(|| secrets::of_store(&lake.s3))
}

/// Attaches a lake whose extensions are loaded.
pub fn attach(
    connection: &Connection,
    lake: &LakeOptions,
    mode: AccessMode,
) -> Result<(), TargetError> {
    let mut options = vec![format!("DATA_INLINING_ROW_LIMIT {}", inlining::INLINED_ROWS)];
    if matches!(mode, AccessMode::ReadOnly) {
        options.push("READ_ONLY, CREATE_IF_NOT_EXISTS false".to_owned());
    }
    if let Some(data) = &lake.data_path {
        let data = if data.ends_with('/') { data.clone() } else { format!("{data}/") };
        options.push(format!("DATA_PATH {}", literal(&data)));
    }
    if lake.catalog.starts_with("ducklake:sqlite:") {
        // Not with SQLite's log of its own: the connections of a reader would see different
        // commits.
        options.push(format!("META_BUSY_TIMEOUT {BUSY_TIMEOUT_MS}"));
    }
    if secrets::of_catalog(lake).is_some() {
        options.push(format!("META_SECRET {}", literal(secrets::CATALOG)));
    }

    let catalog = literal(&secrets::address(&lake.catalog));
    let attach = format!("ATTACH {catalog} AS {CATALOG} ({}); USE {CATALOG};", options.join(", "));
    let mut tries = 1;
    loop {
        match connection.execute_batch(&attach).map_err(|source| refused(lake, source)) {
            // Another process may be making the same lake.
            Err(TargetError::LakeNotOpened { .. }) if tries < ATTACH_TRIES => {
                tries += 1;
                std::thread::sleep(TRY_INTERVAL);
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
    } else {
        TargetError::LakeNotOpened { lake, source }
    }
}
