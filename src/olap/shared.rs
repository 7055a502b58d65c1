//! A file that readers share with the writer of this process: sessions for them, and the settings
//! that keep them from everything but reading.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    DuckDb, PublishOptions, TargetError, TargetOptions, compact,
    duckdb::reader_of,
    gate::Gate,
    lake, names, publish,
    session::{ErrorKind, SessionConnection, StatementError},
};
use crate::olap::arrow_scan::Database;

/// A file that is open in this process.
#[derive(Clone)]
pub struct SharedFile {
    database: Arc<Database>,
    gate: Arc<Gate>,
    path: PathBuf,
}

impl SharedFile {
    /// Opens a session: a connection that is in the file.
    pub fn connect(&self) -> Result<SessionConnection, StatementError> {
        SessionConnection::open(&self.database)
    }

    /// Returns the gate that sessions pass before they read the file.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Returns the folder of the file.
    pub fn folder(&self) -> &Path {
        match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        }
    }

    /// Opens a file that no replicator holds, for reading only.
    ///
    /// # Errors
    /// There is no such file, or another process has it open.
    pub fn open_read_only(options: &TargetOptions) -> Result<Self, TargetError> {
        let (database, connection) = reader_of(options)?;
        let shared = Self { database, gate: Arc::default(), path: options.path.clone() };
        let data =
            if connection.is_lake() { vec![lake::data_path(&connection)?] } else { Vec::new() };
        shared.lock_down(&connection, (Vec::new(), data))?;
        Ok(shared)
    }

    /// Refuses statements access to files and settings, for all connections of this process but for
    /// what the writer needs. What is locked cannot be unlocked.
    fn lock_down(
        &self,
        connection: &duckdb::Connection,
        (files, folders): (Vec<PathBuf>, Vec<PathBuf>),
    ) -> Result<(), TargetError> {
        // The log of a file, and the two that DuckDB writes while it puts the log into the file.
        const ENDINGS: [&str; 4] = ["", ".wal", ".wal.checkpoint", ".wal.recovery"];
        // What `tuning` sets, and the settings of connections.
        const SETTINGS: &str = "['threads', 'checkpoint_threshold', 'max_vacuum_tasks', \
                                'TimeZone', 'search_path', 'schema', 'arrow_lossless_conversion', \
                                'preserve_insertion_order']";

        let real = std::fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let files = [self.path.clone(), real]
            .into_iter()
            .flat_map(|path| [path.clone(), compact::next_of(&path)])
            .chain(files)
            .flat_map(|path| ENDINGS.map(|ending| compact::sibling(&path, ending)));
        let literal = |path: PathBuf| names::literal(&path.display().to_string());
        let files: Vec<String> = files.map(literal).collect();
        let folders: Vec<String> = folders.into_iter().map(literal).collect();

        Ok(connection.execute_batch(&format!(
            "SET GLOBAL allowed_paths = [{}]; SET GLOBAL allowed_directories = [{}]; \
             SET GLOBAL enable_external_access = false; SET GLOBAL allowed_configs = {SETTINGS}; \
             SET GLOBAL lock_configuration = true;",
            files.join(", "),
            folders.join(", ")
        ))?)
    }
}

/// Opens a session of an empty database in memory.
///
/// # Errors
/// DuckDB does not start.
pub fn empty_session() -> Result<SessionConnection, StatementError> {
    let database = Database::open(&[])
        .map_err(|error| StatementError { kind: ErrorKind::Other, message: error.to_string() })?;
    SessionConnection::open(&Arc::new(database))
}

impl DuckDb {
    /// Shares the file with readers, who may do nothing but read from now on.
    ///
    /// # Errors
    /// DuckDB does not take the settings.
    pub fn share(
        &mut self,
        publication: Option<&PublishOptions>,
    ) -> Result<SharedFile, TargetError> {
        self.ensure_attached()?;
        let shared = SharedFile {
            database: Arc::clone(&self.database),
            gate: Arc::clone(&self.gate),
            path: self.path().to_owned(),
        };
        let written = publication.map(publish::opened_paths).transpose()?;
        shared.lock_down(&self.connection, written.unwrap_or_default())?;
        Ok(shared)
    }
}
