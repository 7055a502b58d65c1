//! Opens the file, and names the folder where DuckDB spills.

#![deny(missing_docs)]

use std::{
    fmt,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use duckdb::{AccessMode, Connection};

use super::{
    TargetError,
    arrow_scan::Database,
    compact,
    connection::TargetConnection,
    error::is_damage,
    lake::{self, LakeOptions},
    names, new_file,
};

/// The path of the copy, and the resources that DuckDB may use.
#[derive(Debug, Clone, Default)]
pub struct TargetOptions {
    /// The path of the DuckDB file. Its folder has to exist; the file is made when it is missing.
    /// Of a lake: the path after which the files are named that rhei keeps on this machine.
    pub path: PathBuf,
    /// The lake that takes the place of the file.
    pub lake: Option<Arc<LakeOptions>>,
    /// A size in DuckDB's notation; the default of DuckDB is 80 % of the machine's memory.
    pub duckdb_memory_limit: Option<String>,
    /// The most threads that DuckDB may use; the default of DuckDB is all cores.
    pub threads: Option<u32>,
}

/// Shows the path, or the address of the lake without its password.
impl fmt::Display for TargetOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.lake {
            Some(lake) => lake.fmt(f),
            None => self.path.display().fmt(f),
        }
    }
}

impl TargetOptions {
    /// Names the file of a target, with the memory and the threads that DuckDB takes by default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), ..Self::default() }
    }
}

/// Returns the folder where DuckDB writes data that does not fit in its memory: beside the file,
/// under the name that DuckDB itself would give it.
pub(super) fn spill_folder(path: &Path) -> PathBuf {
    compact::sibling(path, ".tmp")
}

/// Removes the spilled files of a process that was killed. The caller holds the lock of the file,
/// and opened the file no earlier than `since`: newer files may be its own, from replaying the log.
/// The folder stays, since DuckDB makes it only once.
pub(super) fn remove_stale_spill(path: &Path, since: SystemTime) {
    const CLOCKS: Duration = Duration::from_secs(2);
    let Ok(entries) = std::fs::read_dir(spill_folder(path)) else { return };
    for entry in entries.flatten() {
        let is_old =
            entry.metadata().and_then(|file| file.modified()).is_ok_and(|at| at + CLOCKS < since);
        if is_old && entry.file_name().as_encoded_bytes().starts_with(b"duckdb_temp_") {
            // A file that cannot be removed does no harm.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Returns the settings that DuckDB gets before it starts.
pub(super) fn settings(options: &TargetOptions) -> Vec<(&'static str, String)> {
    let mut settings = vec![
        ("autoinstall_known_extensions", "false".to_owned()),
        ("autoload_known_extensions", "false".to_owned()),
        // DuckDB derives this setting from the file that it is opened with, and rhei opens it
        // without one: its own choice would be the folder that rhei was started in.
        ("temp_directory", spill_folder(&options.path).display().to_string()),
    ];
    settings.extend(options.duckdb_memory_limit.clone().map(|limit| ("max_memory", limit)));
    settings.extend(options.threads.map(|threads| ("threads", threads.to_string())));
    settings
}

/// Opens the file and attaches it under a name of our own: DuckDB names a database after its file,
/// and `shop.orders` is ambiguous in `shop.duckdb`. A new file gets the newest storage version,
/// which VARIANT needs.
pub(super) fn open(
    options: &TargetOptions,
    mode: AccessMode,
) -> Result<(Arc<Database>, TargetConnection), TargetError> {
    if let Some(lake) = &options.lake {
        return lake::open(options, lake, mode);
    }

    let database = Arc::new(Database::open(&settings(options))?);
    let connection = database.connect()?;

    // The zone is set before the file is opened, and for every connection: DuckDB replays the log
    // in a connection of its own, and the replay must not depend on the zone of the host. The plain
    // source build has no zones.
    let _ = connection.execute_batch("SET GLOBAL TimeZone = 'UTC'; SET TimeZone = 'UTC'");

    attach(&connection, &options.path, mode)?;
    Ok((database, TargetConnection::new(connection, Arc::default(), Some(Arc::default()))))
}

pub(super) fn attach(
    connection: &Connection,
    path: &Path,
    mode: AccessMode,
) -> Result<(), TargetError> {
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

    let file = names::literal(&path.display().to_string());
    let attach = format!("ATTACH {file} AS {} ({how}); USE {};", names::CATALOG, names::CATALOG);
    connection.execute_batch(&attach).map_err(|source| not_attached(path, source))
}

/// Returns the reason why DuckDB did not open, or make, the file at `path`.
pub(super) fn not_attached(path: &Path, source: duckdb::Error) -> TargetError {
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
    } else if is_damage(&text) {
        TargetError::Damaged { path, source }
    } else if text.contains("Permission denied") || text.contains("Read-only file system") {
        TargetError::NotWritable { path }
    } else {
        TargetError::Open { path, source }
    }
}
