//! A connection that is in the target, and what is special about statements on it.

use std::{borrow::Cow, mem, ops::Deref, sync::Arc};

use duckdb::Connection;

use super::{TargetError, error::is_invalidated};

/// The schema of the state, as statements spell it.
const STATE: &str = "_rhei";

/// A connection that is in the target: a file, or a lake.
pub struct TargetConnection {
    /// None while the connection is dropped.
    connection: Option<Connection>,
    dialect: Arc<Dialect>,
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
    pub fn new(connection: Connection, dialect: Arc<Dialect>) -> Self {
        Self { connection: Some(connection), dialect }
    }

    pub fn is_lake(&self) -> bool {
        self.dialect.is_lake
    }

    /// Returns another connection to the same database, which is not in the target yet.
    pub fn another(&self) -> Result<Self, TargetError> {
        Ok(Self::new(self.try_clone()?, Arc::clone(&self.dialect)))
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

#[cfg(test)]
impl TargetConnection {
    /// Opens an empty database in memory, for tests.
    pub fn in_memory() -> Self {
        Self::new(Connection::open_in_memory().unwrap(), Arc::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipeline_of_a_lake_finds_its_state_in_a_schema_of_its_own() {
        let of = |state: &str| {
            let dialect = Dialect { state: state.to_owned(), is_lake: true };
            TargetConnection::new(Connection::open_in_memory().unwrap(), Arc::new(dialect))
        };

        let sql = "SELECT 1 FROM _rhei.jobs, _rhei_stage";
        assert_eq!(of("_rhei").sql(sql), sql);
        assert_eq!(of("shop__rhei").sql(sql), "SELECT 1 FROM \"shop__rhei\".jobs, _rhei_stage");
    }
}
