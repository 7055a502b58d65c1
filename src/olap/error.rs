//! The errors of the target.

#![deny(missing_docs)]

use std::{path::PathBuf, sync::Arc};

use super::arrow_scan;
use crate::{
    Lsn,
    change::{Remedy, TableSpec},
    types::ValueError,
};

/// Any error of the target. After an error of `apply` the transaction is rolled back.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// DuckDB refused a statement. The text names the cause when it is the disk, the memory or a
    /// damaged file, and then what to do.
    #[error("{}", refused(.0))]
    Query(#[source] ::duckdb::Error),
    /// The path of the target leads to a folder.
    #[error("target {} is a folder\nhint: name a file in it with --target", .path.display())]
    IsFolder {
        /// The path of the target, as the settings name it.
        path: PathBuf,
    },
    /// The folder in which a new file would be made does not exist.
    #[error("cannot make target {}: there is no folder {}\nhint: make the folder \
             first", .path.display(), .folder.display())]
    NoFolder {
        /// The path of the target, as the settings name it.
        path: PathBuf,
        /// The folder that is missing.
        folder: PathBuf,
    },
    /// A command that only reads found no file, and does not make one.
    #[error("there is no target {}\nhint: `rhei sync` makes it; --target names another \
             one", .path.display())]
    NoFile {
        /// The path of the target, as the settings name it.
        path: PathBuf,
    },
    /// Another process has the file open, and has to end first.
    #[error("target {} is in use by process {holder}\ndetail: One process at a time may write a \
             DuckDB file, and no other process may read it meanwhile.\nhint: stop that process, or \
             name another file with --target", .path.display())]
    Locked {
        /// The path of the target, as the settings name it.
        path: PathBuf,
        /// The id of that process, or `unknown`.
        holder: String,
    },
    /// DuckDB does not read the file as a database.
    #[error("target {} is not a DuckDB database\nhint: name another file with --target; this one \
             was not touched", .path.display())]
    NotADatabase {
        /// The path of the target, as the settings name it.
        path: PathBuf,
    },
    /// The file or its write-ahead log is damaged. A backup of both, or a new copy, replaces them.
    #[error("target {}, or the log beside it, is damaged; neither was touched\nhint: restore both \
             from a backup; or move them away, drop the slot (SELECT \
             pg_drop_replication_slot('..')) and copy again with `rhei sync`", .path.display())]
    Damaged {
        /// The path of the target, as the settings name it.
        path: PathBuf,
        /// The error of DuckDB.
        source: ::duckdb::Error,
    },
    /// Permissions or a read-only file system forbid to write the file or its folder.
    #[error("target {} cannot be written\nhint: check the permissions of the file and its \
             folder", .path.display())]
    NotWritable {
        /// The path of the target, as the settings name it.
        path: PathBuf,
    },
    /// DuckDB did not start with its settings, or did not take Arrow data.
    #[error(transparent)]
    Raw(#[from] arrow_scan::RawError),
    /// DuckDB did not open the file, for a reason that no other variant names.
    #[error("cannot open target {}", .path.display())]
    Open {
        /// The path of the target, as the settings name it.
        path: PathBuf,
        /// The error of DuckDB.
        source: ::duckdb::Error,
    },
    /// The state in `_rhei` has a newer format; the rhei that wrote it, or a newer one, reads it.
    #[error(
        "the copy was written by rhei {written_by} in format {found}, and this rhei knows formats \
         up to {known}\nhint: use that version or a newer one"
    )]
    NewerFormat {
        /// The format of the file.
        found: i32,
        /// The version of the rhei that wrote the state last.
        written_by: String,
        /// The newest format that this rhei knows.
        known: i32,
    },
    /// The state in `_rhei` has an older format, which a command that only reads does not migrate.
    #[error(
        "the copy was written by rhei {written_by} in format {found}, and this rhei reads format \
         {known}\nhint: the next `rhei sync` or `rhei run` brings the copy to format {known} and \
         goes on with it"
    )]
    NotMigrated {
        /// The format of the file.
        found: i32,
        /// The version of the rhei that wrote the state last.
        written_by: String,
        /// The format that this rhei reads and writes.
        known: i32,
    },
    /// The state in `_rhei` has a format that is too old to be migrated: a new copy is needed.
    #[error(
        "the copy was written by rhei {written_by} in format {found}, which this rhei no longer \
         reads\nhint: name a new file with --target, and drop the old one with its slot"
    )]
    OlderFormat {
        /// The format of the file.
        found: i32,
        /// The version of the rhei that wrote the state last.
        written_by: String,
    },
    /// The state in `_rhei` holds what no rhei writes, or a call does not fit it.
    #[error(
        "the copy's state makes no sense: {reason}\nhint: copy again with `rhei backfill --force`"
    )]
    Corrupt {
        /// What makes no sense.
        reason: String,
    },
    /// A copy would take the name of a table that rhei did not make; that table is not touched.
    #[error("table {table} is in {} already, and rhei did not put it there\nhint: give the copy \
             another name with `target` in its [tables.\"..\"] section, or another file; in a \
             lake, another schema_prefix", .path.display())]
    ForeignTable {
        /// The name of the table in DuckDB.
        table: String,
        /// The path of the target, as the settings name it.
        path: PathBuf,
    },
    /// A batch ends before the stored checkpoint: its changes are in the target already.
    #[error("the checkpoint would go back from {from} to {to}")]
    Backwards {
        /// The checkpoint that is stored.
        from: Lsn,
        /// The checkpoint that came with the batch.
        to: Lsn,
    },
    /// A statement found another number of rows than the stream or a copy calls for. The table is
    /// copied again, or paused for the operator to look at.
    #[error("the copy differs from the source: {expected} {what}, {found} found")]
    Diverged {
        /// Which rows were counted, as `rows to delete`.
        what: &'static str,
        /// The number of rows that the stream or the copy calls for.
        expected: u64,
        /// The number of rows that the statement found.
        found: u64,
    },
    /// The file was closed to be opened again or compacted, and could not be opened. A later call
    /// tries again.
    #[error("target {} is closed, and cannot be opened again", .path.display())]
    Closed {
        /// The path of the target, as the settings name it.
        path: PathBuf,
        /// Why the file could not be opened.
        source: Box<TargetError>,
    },
    /// A compaction was refused because of copies or a large transaction, or the new file came out
    /// different. The old file is as it was.
    #[error("the file was not compacted: {reason}")]
    NotCompacted {
        /// The reason, with a hint when a later attempt may succeed.
        reason: String,
    },
    /// An extension of DuckDB, without which no lake can be opened, is in none of these folders.
    #[error(
        "DuckDB's extension {name} is missing\ndetail: it was looked for in {folders}\nhint: \
             the archive rhei-lake has it, and `make setup` fetches it; or run INSTALL {name} in \
             the DuckDB {version} of this user, or name its folder by RHEI_EXTENSIONS"
    )]
    NoExtension {
        /// The name of the extension.
        name: &'static str,
        /// The version of DuckDB, which the extension has to be made for.
        version: String,
        /// The folders, as a list for people.
        folders: String,
    },
    /// DuckDB does not load an extension: it is damaged, not signed, or of another version.
    #[error("DuckDB refuses its extension {}\nhint: remove this file, and fetch the extension of \
             DuckDB's own version", .file.display())]
    ExtensionRefused {
        /// The file of the extension.
        file: PathBuf,
        /// The error of DuckDB.
        source: ::duckdb::Error,
    },
    /// DuckDB does not take the credentials of a lake.
    #[error(
        "DuckDB does not take the password of the lake's catalog, or the access key of its \
             store\nhint: look at RHEI_LAKE_PASSWORD, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )]
    NoSecret,
    /// Without an access key DuckDB's aws extension looks for credentials, and finds none.
    #[error(
        "there are no credentials for the store of the lake\nhint: set AWS_ACCESS_KEY_ID and \
             AWS_SECRET_ACCESS_KEY, or what else AWS clients read: a profile, or a role"
    )]
    NoCredentials {
        /// The error of DuckDB.
        source: ::duckdb::Error,
    },
    /// A lake is to be made where Parquet files are that it does not know.
    #[error(
        "target.data_path {data_path} holds files of others, such as {file}\nhint: name an empty \
             folder or prefix for a new lake: `rhei compact` deletes Parquet files there that the \
             lake does not know"
    )]
    DataPathInUse {
        /// The place of the data.
        data_path: String,
        /// One of the files.
        file: String,
    },
    /// The lake was made with another place for its data.
    #[error(
        "lake {lake} has its data elsewhere\nhint: set [target] data_path to the place that the \
         detail names as existing, or leave it out if that is a folder"
    )]
    OtherDataPath {
        /// The address of the catalog, without its password.
        lake: String,
        /// The error of DuckDB.
        source: ::duckdb::Error,
    },
    /// The catalog of the lake has the format of another version of DuckLake.
    #[error(
        "lake {lake} has the format of another version of DuckLake\nhint: an older rhei, or a \
             newer one, reads it; to bring an older lake to the new format, stop everything that \
             writes it, and attach it once in DuckDB with AUTOMATIC_MIGRATION true"
    )]
    OtherLakeFormat {
        /// The address of the catalog, without its password.
        lake: String,
        /// The error of DuckDB.
        source: ::duckdb::Error,
    },
    /// A lake is to be made in a catalog where its role may not make tables.
    #[error(
        "role {role} may not make the tables of lake {lake}\nhint: make it the owner of the \
             catalog's database, or GRANT CREATE ON SCHEMA public TO {role}"
    )]
    NoCatalogRight {
        /// The address of the catalog, without its password.
        lake: String,
        /// The role.
        role: String,
    },
    /// Another process of this machine writes the copy in a lake.
    #[error(
        "another rhei on this machine writes this copy, and has locked {}\nhint: stop it; or \
             give this copy a state_path of its own, and a schema_prefix in the same \
             lake", .lock.display()
    )]
    LakeLocked {
        /// The file that is locked.
        lock: PathBuf,
    },
    /// The folder with the data of a lake lacks the file that marks it: it is not mounted.
    #[error(
        "the data of the lake is not in {}\nhint: mount it, and rhei goes on; if the data is gone \
             for good, make an empty file {}, and the next start copies the tables again",
        .folder.display(), .mark.display()
    )]
    NoData {
        /// The folder.
        folder: PathBuf,
        /// The file that marks it.
        mark: PathBuf,
    },
    /// A command that only reads found no lake, and does not make one.
    #[error("there is no lake {lake}\nhint: `rhei sync` makes it")]
    NoLake {
        /// The address of the catalog, without its password.
        lake: String,
    },
    /// A lake is to be made, or has its data in a store, and the settings do not name the place.
    #[error(
        "nothing says where the data of lake {lake} is\nhint: set [target] data_path to a \
             folder, or to s3://bucket/prefix"
    )]
    NoDataPath {
        /// The address of the catalog, without its password.
        lake: String,
    },
    /// DuckLake did not open a lake, for a reason that no other variant names.
    #[error("cannot open lake {lake}")]
    LakeNotOpened {
        /// The address of the catalog, without its password.
        lake: String,
        /// The error of DuckDB.
        source: ::duckdb::Error,
    },
    /// A process that is alive writes the copy in a lake.
    #[error(
        "the copy in the lake is written by {holder}\nhint: stop that process, or give this \
             copy schemas of its own with [target] schema_prefix"
    )]
    LakeInUse {
        /// The process and its host.
        holder: String,
    },
    /// Another process has taken over the copy in a lake. This one wrote nothing after that.
    #[error(
        "{holder} has taken over the copy in the lake, and this process has stopped \
             writing\nhint: run one replicator for a copy"
    )]
    Fenced {
        /// The process and its host.
        holder: String,
    },
    /// The lake holds another state than this session knows: a commit that was taken for lost has
    /// come through, or tables wait for another copy.
    #[error(
        "the lake has changed since rhei last read it\nhint: rhei reads it again, and goes on \
             from there"
    )]
    Moved,
    /// The answer to a commit was lost, and the lake does not say what became of it.
    #[error(
        "it is not known whether the lake has taken the last commit\nhint: rhei looks as soon as \
             the lake's catalog answers"
    )]
    OutcomeUnknown {
        /// Why the lake does not answer.
        source: Box<TargetError>,
    },
    /// The catalog or the store of a lake does not answer, or refuses.
    #[error(
        "the lake cannot be used now: its catalog or its store does not answer, or \
             refuses\nhint: rhei goes on as soon as it can; nothing that was committed is lost"
    )]
    LakeAway {
        /// The error of DuckDB.
        source: Box<TargetError>,
    },
    /// The work on a lake was interrupted for a reason that may pass; nothing of it is in the lake.
    #[error("the lake did not answer for a moment")]
    LakeInterrupted {
        /// The error.
        source: Box<TargetError>,
    },
    /// No copy was published.
    #[error("the copy was not published: {reason}")]
    NotPublished {
        /// The reason, with a hint.
        reason: String,
    },
    /// A statement met a bug of DuckDB, which takes no other statement of this process.
    #[error("DuckDB has failed, and takes no statement of this process any more")]
    Invalidated {
        /// The error of a statement of the writer; none for one of a reader.
        source: Option<Box<TargetError>>,
    },
    /// A commit to the DuckDB file that is the target, or the catalog of a lake, has failed with
    /// this error. The file takes no other commit until it was opened again.
    #[error(transparent)]
    CommitFailed(Arc<TargetError>),
    /// A step of a compaction failed. The old file is as it was.
    #[error("the file could not be compacted, and is as it was")]
    CompactionFailed {
        /// The error of that step.
        source: Box<TargetError>,
    },
    /// The file system refused an operation that rhei made without DuckDB.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The job of a chunk was cancelled, so no row of the chunk was loaded.
    #[error("the work was cancelled")]
    Cancelled,
    /// The file cannot be closed, since a reader of it does not end.
    #[error("a reader of the copy does not end\nhint: end its session, and try again")]
    ReaderStays,
    /// The rows to write could not be read or decoded; none of them was written.
    #[error("the rows to load broke off")]
    Rows {
        /// The error of the rows: a [`ValueError`] when a value is the cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An error that concerns one table only, so that the other tables can go on.
    #[error("table {table} cannot be applied")]
    Table {
        /// The oid of the table at the source.
        oid: u32,
        /// The name of the table at the source.
        table: String,
        /// The error itself.
        source: Box<TargetError>,
    },
}

impl From<::duckdb::Error> for TargetError {
    fn from(error: ::duckdb::Error) -> Self {
        Self::Query(without_stack_trace(error))
    }
}

/// Returns an error of DuckDB without the many lines of a stack trace, which DuckDB adds to an
/// error that is a bug of its own; those go to the log.
fn without_stack_trace(error: ::duckdb::Error) -> ::duckdb::Error {
    let ::duckdb::Error::DuckDBFailure(code, Some(text)) = error else { return error };
    let Some((cause, trace)) = text.split_once("\n\nStack Trace:\n") else {
        return ::duckdb::Error::DuckDBFailure(code, Some(text));
    };

    tracing::debug!(event = "duckdb_stack_trace", cause, trace, "DuckDB met a bug of its own");
    ::duckdb::Error::DuckDBFailure(code, Some(cause.to_owned()))
}

/// What stands before the error of a statement whose result was read although the statement had
/// failed: DuckLake reads some answers of its catalog so.
const UNREAD: &str =
    "Invalid Input Error: Attempting to fetch from an unsuccessful query result\nError: ";

/// Returns whether an error is of one of these kinds. DuckDB names the kind of an error before the
/// first colon. The text after that may hold values of the source.
pub(super) fn is_of_kind(text: &str, kinds: &[&str]) -> bool {
    let cause = text.strip_prefix(UNREAD).unwrap_or(text);
    cause.split_once(':').is_some_and(|(kind, _)| kinds.contains(&kind))
}

/// DuckDB's words for itself, or for a file, that takes no statement any more.
const INVALIDATED: &str = "has been invalidated";

/// Returns whether DuckDB takes no statement any more, for whatever reason.
pub(super) fn is_invalidated(text: &str) -> bool {
    is_of_kind(text, &["FATAL Error"]) && text.contains(INVALIDATED)
}

/// Returns whether a file takes no statement until it is opened again: a file checkpoint has
/// failed.
fn wants_reopening(text: &str) -> bool {
    is_of_kind(text, &["IO Error"]) && text.contains(INVALIDATED)
}

pub(super) fn is_of_disk(text: &str) -> bool {
    if is_invalidated(text) {
        return false;
    }
    if wants_reopening(text) {
        // DuckDB leaves the kind of the first error out.
        const OTHERS: [&str; 2] = ["failed to pin block", "allocate"];
        return !OTHERS.iter().any(|words| text.contains(words));
    }

    const WORDS: [&str; 6] = [
        "No space left",
        "quota exceeded",
        "Could not write",
        "Could not truncate",
        "Could not sync",
        "FSYNC",
    ];
    // A COMMIT that cannot be written fails with an error of its transaction.
    is_of_kind(text, &["IO Error", "FATAL Error", "TransactionContext Error"])
        && WORDS.iter().any(|words| text.contains(words))
}

/// Returns whether the error is about checksums that do not match, or files that end too soon.
pub(super) fn is_damage(text: &str) -> bool {
    const WORDS: [&str; 3] =
        ["Corrupt", "Could not read enough bytes", "Failure while replaying WAL"];
    is_of_kind(text, &["IO Error"]) && WORDS.iter().any(|words| text.contains(words))
}

pub(super) fn refused(error: &::duckdb::Error) -> &'static str {
    if is_of_disk(&error.to_string()) {
        "the target's disk does not take what is written\nhint: make room; nothing that was \
         committed is lost"
    } else if error.to_string().contains("Out of Memory Error") {
        "DuckDB has no memory left\nhint: raise [target] duckdb_memory_limit, or lower [target] \
         threads"
    } else if is_damage(&error.to_string()) {
        "the target is damaged\nhint: restore it with its log from a backup, or copy again into a \
         new file"
    } else {
        "DuckDB refused a statement"
    }
}

impl TargetError {
    /// Ties an error to the table whose statements caused it. An error of the whole file stays as
    /// it is.
    pub(super) fn of(self, table: &TableSpec) -> Self {
        let is_of_file = match &self {
            Self::Query(error) => {
                const KINDS: [&str; 6] = [
                    "IO Error",
                    "HTTP Error",
                    "Out of Memory Error",
                    "FATAL Error",
                    "INTERNAL Error",
                    "INTERRUPT Error",
                ];
                let text = error.to_string();
                is_of_disk(&text) || is_of_kind(&text, &KINDS)
            }
            Self::Diverged { .. } | Self::Rows { .. } => false,
            _ => true,
        };

        if is_of_file {
            return self;
        }
        Self::Table { oid: table.oid, table: table.source.to_string(), source: Box::new(self) }
    }

    /// Works as [`Self::of`], for the copy of a table. An error in the rows before they reached the
    /// target is not an error of the table, and a copy that does not match its source is restarted.
    pub(super) fn of_copy(self, table: &TableSpec) -> Self {
        match self {
            Self::Rows { .. } | Self::Diverged { .. } => self,
            other => other.of(table),
        }
    }

    /// Returns whether the error is about the content of one table. A conflict with another
    /// transaction is not.
    pub fn is_of_table(&self) -> bool {
        self.table().is_some() && !self.is_conflict()
    }

    /// Returns whether the disk does not accept writes because it is full or broken, or whether the
    /// file is closed. The file then has to be opened again, and that may need several tries.
    pub fn is_of_disk(&self) -> bool {
        match self {
            Self::Query(error) | Self::Open { source: error, .. } => is_of_disk(&error.to_string()),
            Self::Table { source, .. } | Self::CompactionFailed { source } => source.is_of_disk(),
            Self::CommitFailed(error) => error.is_of_disk(),
            Self::Closed { .. } => true,
            Self::Io(error) => {
                matches!(
                    error.kind(),
                    std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
                )
            }
            error => error.is_of_lake(),
        }
    }

    /// Returns whether nothing can be written to the target until it is opened again.
    pub fn wants_reopening(&self) -> bool {
        match self {
            Self::CommitFailed(_) => true,
            Self::CompactionFailed { source } => source.wants_reopening(),
            _ => self.is_of_disk(),
        }
    }

    /// Returns whether a statement that commits by itself may have met this error at its commit.
    pub(super) fn may_be_of_commit(&self) -> bool {
        self.is_conflict() || self.is_internal() || self.wants_reopening()
    }

    /// Returns whether a file checkpoint has to wait: a reader holds an older snapshot, or a loader
    /// writes.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self, Self::Query(error) if error.to_string().contains("Cannot CHECKPOINT"))
    }

    /// Returns whether a lake does not answer, or holds another state than this process knows: what
    /// it holds has to be read before anything else.
    pub fn is_of_lake(&self) -> bool {
        matches!(
            self,
            Self::Moved | Self::OutcomeUnknown { .. } | Self::LakeAway { .. } | Self::NoData { .. }
        )
    }

    /// Returns whether another transaction changed the same row, or has replaced the table.
    pub fn is_conflict(&self) -> bool {
        match self {
            Self::Query(error) => {
                let text = error.to_string();
                is_of_kind(&text, &["TransactionContext Error"]) && !is_of_disk(&text)
            }
            Self::LakeInterrupted { .. } => true,
            Self::Table { source, .. } => source.is_conflict(),
            _ => false,
        }
    }

    /// Returns whether DuckDB had no memory left, or met a bug of its own; the file may have to be
    /// opened again. The rows to be written are not the cause.
    pub fn is_internal(&self) -> bool {
        match self {
            Self::Query(error) | Self::Open { source: error, .. } => {
                let text = error.to_string();
                let kinds = ["Out of Memory Error", "INTERNAL Error", "FATAL Error"];
                (is_of_kind(&text, &kinds) || wants_reopening(&text)) && !is_of_disk(&text)
            }
            Self::Table { source, .. } | Self::CompactionFailed { source } => source.is_internal(),
            Self::CommitFailed(error) => error.is_internal(),
            _ => false,
        }
    }

    /// Returns whether DuckDB has met a bug of its own, in whatever statement of this process, and
    /// takes no other one until it is started again.
    pub fn is_invalidated(&self) -> bool {
        match self {
            Self::Invalidated { .. } => true,
            Self::Query(error) => is_invalidated(&error.to_string()),
            Self::Table { source, .. } | Self::CompactionFailed { source } => {
                source.is_invalidated()
            }
            Self::CommitFailed(error) => error.is_invalidated(),
            _ => false,
        }
    }

    /// Returns whether the copy does not hold the rows that the stream expects in it.
    pub fn is_diverged(&self) -> bool {
        match self {
            Self::Diverged { .. } => true,
            Self::Table { source, .. } => source.is_diverged(),
            _ => false,
        }
    }

    /// Returns who has to bring the table of this error back.
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Table { source, .. } => source.remedy(),
            Self::Rows { source } => match source.downcast_ref::<ValueError>() {
                Some(error) if error.is_unrepresentable() => Remedy::AllowNulls,
                _ => Remedy::Operator,
            },
            _ => Remedy::Operator,
        }
    }

    /// Makes an error as if DuckDB had refused a statement with this text: for tests, and for the
    /// places where a test has DuckDB refuse something.
    pub fn saying(text: &str) -> Self {
        Self::Query(::duckdb::Error::DuckDBFailure(
            ::duckdb::ffi::Error::new(1),
            Some(text.to_owned()),
        ))
    }

    /// Returns the oid of the one table that this error concerns, if there is one.
    pub fn table(&self) -> Option<u32> {
        match self {
            Self::Table { oid, .. } => Some(*oid),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(sql: &str) -> TargetError {
        ::duckdb::Connection::open_in_memory().unwrap().execute_batch(sql).unwrap_err().into()
    }

    /// As DuckDB 1.5.5 says it, without the kind of the first error.
    #[test]
    fn a_duckdb_that_takes_no_statement_is_no_full_disk() {
        for original in [
            "Attempted to access index 0 within vector of size 0",
            "Failed to rollback transaction: No space left on device",
        ] {
            let invalidated = format!(
                "FATAL Error: Failed: database has been invalidated because of a previous fatal \
                 error. The database must be restarted prior to being used again.\nOriginal error: \
                 \"{original}\""
            );
            let error = TargetError::saying(&invalidated);
            assert!(error.is_invalidated() && !error.is_of_disk(), "{original}");
        }
    }

    #[test]
    fn a_file_whose_checkpoint_has_failed_wants_to_be_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let connection = ::duckdb::Connection::open_in_memory().unwrap();
        connection
            .execute_batch(&format!(
                "ATTACH '{}/a.duckdb' AS a; CREATE TABLE a.t (n INT); \
                 SET debug_checkpoint_abort = 'before_header'",
                folder.path().display()
            ))
            .unwrap();

        for sql in ["CHECKPOINT a", "SELECT * FROM a.t"] {
            let error = TargetError::from(connection.execute_batch(sql).unwrap_err());
            assert!(error.is_of_disk() && !error.is_invalidated(), "{sql}: {error:?}");
        }
        connection.execute_batch("SELECT 1").unwrap();

        let without_memory = TargetError::saying(
            "IO Error: Database \"a\" has been invalidated because checkpointing failed. Detach \
             and reattach it before using it again. Original error: failed to pin block of size \
             256.0 KiB",
        );
        assert!(without_memory.is_internal() && !without_memory.is_of_disk());
    }

    #[test]
    fn an_error_of_duckdb_is_one_line_long_also_when_it_has_a_stack_trace() {
        let error = TargetError::from(::duckdb::Error::DuckDBFailure(
            ::duckdb::ffi::Error::new(1),
            Some("INTERNAL Error: an index\n\nStack Trace:\n\nlib(a)\nlib(b)".to_owned()),
        ));

        let text = crate::error::error_chain(&error);
        assert!(error.is_internal() && text.contains("INTERNAL Error: an index"), "{text}");
        assert!(!text.contains("lib("), "{text}");
    }

    /// As DuckLake says it when the connection to the catalog has broken between two statements of
    /// one transaction.
    #[test]
    fn a_question_of_ducklake_that_its_catalog_did_not_answer_is_no_error_of_the_table() {
        let read = |cause: &str| TargetError::saying(&format!("{UNREAD}{cause}"));

        let aborted = TargetError::Table {
            oid: 1,
            table: "public.t".to_owned(),
            source: Box::new(read("TransactionContext Error: Current transaction is aborted")),
        };
        assert!(aborted.is_conflict() && !aborted.is_of_table());

        let TargetError::Query(away) = read("IO Error: server closed the connection") else {
            panic!("an error of a statement");
        };
        assert!(is_of_kind(&away.to_string(), &["IO Error"]));
    }

    /// The messages of DuckDB hold the values that DuckDB could not read.
    #[test]
    fn a_value_of_the_source_does_not_pass_for_a_disk_that_is_full_or_a_file_that_is_damaged() {
        for words in [
            "No space left",
            "quota exceeded",
            "FATAL Error",
            "IO Error: Corrupt",
            "TransactionContext Error",
        ] {
            let error = error(&format!("SELECT CAST('{words}' AS INTEGER)"));
            let TargetError::Query(source) = &error else { panic!("{error}") };

            assert!(source.to_string().contains(words), "{source}");
            assert!(!error.is_of_disk() && !error.is_conflict(), "{source}");
            assert_eq!(error.to_string(), "DuckDB refused a statement");
        }
    }
}
