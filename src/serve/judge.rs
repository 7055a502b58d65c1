//! Statements judged without a copy, for tests that try many.

use std::collections::HashSet;

use super::{
    catalog,
    command::Command,
    error::SqlError,
    guard::Guard,
    rewrite::rewrite,
    tokens::{statements, text, tokens},
};
use crate::olap::{self, SessionConnection, StatementError, Value};

/// Judges statements as a session does before it runs them, over an empty database in memory.
pub struct Judge {
    connection: SessionConnection,
    guard: Guard,
    names: HashSet<String>,
}

impl Judge {
    /// # Errors
    /// DuckDB does not start.
    pub fn new() -> Result<Self, StatementError> {
        let connection = olap::empty_session()?;
        let names = catalog::names();
        Ok(Self { connection, guard: Guard::new(&names), names })
    }

    /// Returns the statements of a text that readers may run, in DuckDB's words.
    pub fn passed(&self, sql: &str) -> Vec<String> {
        let all = statements(tokens(sql));
        all.into_iter().filter_map(|statement| self.judged(statement).ok().flatten()).collect()
    }

    fn judged(&self, statement: Vec<super::tokens::Token>) -> Result<Option<String>, SqlError> {
        let query = match Command::of(statement)? {
            Command::Query(query)
            | Command::CopyOut { query, .. }
            | Command::Declare { query, .. } => query,
            _ => return Ok(None),
        };
        let sql = text(&rewrite(query, &self.names));
        let mut serialise = self.connection.prepare("SELECT json_serialize_sql($1::VARCHAR)")?;
        let json = super::reader::first_text(&mut serialise, &[Value::Text(sql.clone())])?;
        self.guard.check(&json.unwrap_or_default(), &|_| false)?;
        Ok(Some(sql))
    }

    /// Returns whether DuckDB takes a statement for a SELECT; `None` when it does not prepare it.
    pub fn is_select(&self, sql: &str) -> Option<bool> {
        self.connection.prepare(sql).ok().map(|statement| statement.is_select)
    }
}
