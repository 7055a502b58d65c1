//! A connection that is in the target, and what is special about statements on it.

use std::{
    borrow::Cow,
    mem,
    ops::Deref,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use duckdb::Connection;

use super::{TargetError, error::is_invalidated, names::CATALOG};

/// The schema of the state, as statements spell it.
const STATE: &str = "_rhei";

/// Has DuckDB close files without a checkpoint, until this is taken back.
const NO_LAST_CHECKPOINT: &str = "PRAGMA disable_checkpoint_on_shutdown";

/// A connection that is in the target: a file, or a lake.
pub struct TargetConnection {
    /// None while the connection is dropped.
    connection: Option<Connection>,
    dialect: Arc<Dialect>,
    /// The commits to the DuckDB file that is the target, or the catalog of a lake. None for a lake
    /// whose catalog is something else.
    commits: Option<Arc<Commits>>,
}

/// The commits to a DuckDB file, on whatever connection: they come one at a time, and none comes
/// after one that has failed.
///
/// DuckDB 1.5.5 takes the rows of a failed commit back, but keeps marks of deleted rows for their
/// places. The next checkpoint writes these marks to the file, and rows that come to those places
/// later are gone. So after a failed commit this DuckDB must write no checkpoint, of which a commit
/// can be one: the file has to be closed without a checkpoint and opened again.
#[derive(Default)]
pub struct Commits {
    failure: Mutex<Option<Arc<TargetError>>>,
}

/// What statements may use in a target, and where it keeps the state of the pipeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dialect {
    /// The schema of the state.
    pub state: String,
    /// The tables lie in a lake.
    pub is_lake: bool,
}

impl Default for Dialect {
    /// Returns the dialect of a file.
    fn default() -> Self {
        Self { state: STATE.to_owned(), is_lake: false }
    }
}

impl Deref for TargetConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        match &self.connection {
            Some(connection) => connection,
            None => unreachable!("a connection is used while it is dropped"),
        }
    }
}

impl Drop for TargetConnection {
    /// Rolls back and closes the connection: DuckDB ends the process when it fails to roll back
    /// while it closes a connection. One that is in a lake stays open until the process has ended,
    /// if DuckDB takes no statement any more, since DuckLake can roll nothing back then.
    fn drop(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        if let Err(error) = connection.execute_batch("ROLLBACK")
            && self.dialect.is_lake
            && is_invalidated(&error.to_string())
        {
            mem::forget(connection);
        }
    }
}

impl TargetConnection {
    /// Takes a connection. All connections of one DuckDB share its `commits`.
    pub fn new(
        connection: Connection,
        dialect: Arc<Dialect>,
        commits: Option<Arc<Commits>>,
    ) -> Self {
        Self { connection: Some(connection), dialect, commits }
    }

    pub fn is_lake(&self) -> bool {
        self.dialect.is_lake
    }

    /// Returns another connection to the same database, which is not in the target yet.
    pub fn another(&self) -> Result<Self, TargetError> {
        Ok(Self::new(self.try_clone()?, Arc::clone(&self.dialect), self.commits.clone()))
    }

    /// Commits the open transaction.
    ///
    /// # Errors
    /// [`TargetError::CommitFailed`] when DuckDB must write nothing more to the file until it is
    /// opened again.
    pub fn commit(&self) -> Result<(), TargetError> {
        let Some(commits) = &self.commits else { return Ok(self.execute_batch("COMMIT")?) };

        let mut failure = commits.refuse_after_failure()?;
        let Err(error) = self.execute_batch("COMMIT") else { return Ok(()) };
        Err(self.note_failure(&mut failure, error.into()))
    }

    /// Runs a statement that commits by itself.
    ///
    /// # Errors
    /// [`TargetError::CommitFailed`] as [`Self::commit`], also when it cannot be told whether the
    /// statement or its commit has failed.
    pub fn autocommit(&self, statement: &str) -> Result<(), TargetError> {
        let Some(commits) = &self.commits else { return Ok(self.execute_batch(statement)?) };

        let mut failure = commits.refuse_after_failure()?;
        let Err(error) = self.execute_batch(statement) else { return Ok(()) };
        let error = TargetError::from(error);
        if error.may_be_of_commit() {
            return Err(self.note_failure(&mut failure, error));
        }
        Err(error)
    }

    /// Writes the log of the file into the file.
    ///
    /// # Errors
    /// [`TargetError::CommitFailed`] as [`Self::commit`], when a commit has failed before.
    pub fn checkpoint(&self) -> Result<(), TargetError> {
        let _no_commit_beside =
            self.commits.as_ref().map(|commits| commits.refuse_after_failure()).transpose()?;
        Ok(self.execute_batch("CHECKPOINT")?)
    }

    fn note_failure(
        &self,
        failure: &mut Option<Arc<TargetError>>,
        error: TargetError,
    ) -> TargetError {
        // A DuckDB that takes no statement any more writes no checkpoint either.
        let _ = self.execute_batch(NO_LAST_CHECKPOINT);
        let error = Arc::new(error);
        *failure = Some(Arc::clone(&error));
        TargetError::CommitFailed(error)
    }

    /// Closes the target: no connection is in it until it is attached again. Nothing is written to
    /// a file after a failed commit.
    pub fn detach(&self) -> Result<(), TargetError> {
        // Without the schema DuckDB would look for one of that name in the target, and fails if a
        // file checkpoint has failed.
        self.execute_batch("USE memory.main")?;
        if self.has_failed_commit() {
            self.execute_batch(NO_LAST_CHECKPOINT)?;
        }
        Ok(self.execute_batch(&format!("DETACH DATABASE IF EXISTS {CATALOG}"))?)
    }

    /// Returns whether a commit to the file has failed since it was opened.
    pub fn has_failed_commit(&self) -> bool {
        self.commits.as_ref().is_some_and(|commits| commits.lock().is_some())
    }

    /// Takes notice that the file was closed and opened again.
    pub fn opened_again(&self) -> Result<(), TargetError> {
        let Some(commits) = &self.commits else { return Ok(()) };
        let mut failure = commits.lock();
        self.execute_batch("PRAGMA enable_checkpoint_on_shutdown")?;
        *failure = None;
        Ok(())
    }

    /// Returns a statement as this target takes it: `_rhei.` stands for the schema where this
    /// pipeline keeps its state. No value of the source may be in the statement.
    pub fn sql<'s>(&self, statement: &'s str) -> Cow<'s, str> {
        if self.dialect.state == STATE {
            return Cow::Borrowed(statement);
        }
        let state = format!("{}.", super::names::quoted(&self.dialect.state));
        Cow::Owned(statement.replace("_rhei.", &state))
    }

    /// Returns the schema where this pipeline keeps its state.
    pub fn state_schema(&self) -> &str {
        &self.dialect.state
    }
}

impl Commits {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<TargetError>>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps all other commits out until the guard is dropped.
    fn refuse_after_failure(
        &self,
    ) -> Result<MutexGuard<'_, Option<Arc<TargetError>>>, TargetError> {
        let failure = self.lock();
        match &*failure {
            Some(source) => Err(TargetError::CommitFailed(Arc::clone(source))),
            None => Ok(failure),
        }
    }
}

#[cfg(test)]
impl TargetConnection {
    /// Opens an empty database in memory, for tests.
    pub fn in_memory() -> Self {
        Self::new(Connection::open_in_memory().unwrap(), Arc::default(), Some(Arc::default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipeline_of_a_lake_finds_its_state_in_a_schema_of_its_own() {
        let of = |state: &str| {
            let dialect = Dialect { state: state.to_owned(), is_lake: true };
            TargetConnection::new(Connection::open_in_memory().unwrap(), Arc::new(dialect), None)
        };

        let sql = "SELECT 1 FROM _rhei.jobs, _rhei_stage";
        assert_eq!(of("_rhei").sql(sql), sql);
        assert_eq!(of("shop__rhei").sql(sql), "SELECT 1 FROM \"shop__rhei\".jobs, _rhei_stage");
    }
}
