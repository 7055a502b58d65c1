//! The database in memory that holds PostgreSQL's catalogs for clients.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

use super::{
    error::SqlError,
    tokens::{Token, tokens},
};
use crate::olap::{SessionConnection, StatementError};

/// The name of the database.
pub const DATABASE: &str = "_pg";

const SQL: &str = include_str!("../../schemas/pg_catalog.sql");

/// Makes the database when the first session needs it: its views name tables of `_rhei`, which a
/// new copy gets a moment after it is opened.
#[derive(Default)]
pub struct Catalog {
    is_made: Mutex<bool>,
}

impl Catalog {
    /// Makes the database if it is not there yet.
    ///
    /// # Errors
    /// The copy has no tables yet, or DuckDB refuses.
    pub fn make(&self, connection: &SessionConnection) -> Result<(), SqlError> {
        let mut is_made = self.is_made.lock().unwrap_or_else(PoisonError::into_inner);
        if *is_made {
            return Ok(());
        }

        connection.execute("SELECT 1 FROM rhei_target._rhei.pipeline").map_err(|_| {
            SqlError::fatal("57P03", "the copy is only being made: try again in a moment")
        })?;
        self.make_all(connection).map_err(|error| {
            let message = format!("the catalogs for clients cannot be made: {error}");
            SqlError::fatal("XX000", message)
        })?;
        *is_made = true;
        Ok(())
    }

    fn make_all(&self, connection: &SessionConnection) -> Result<(), StatementError> {
        connection.execute(&format!(
            "DETACH DATABASE IF EXISTS {DATABASE}; ATTACH ':memory:' AS {DATABASE}"
        ))?;
        connection.execute(SQL)
    }
}

/// Returns the names of the views and macros of the database.
pub fn names() -> HashSet<String> {
    let all = tokens(SQL);
    let is_made = |three: &[Token]| {
        (three[0].is("view") || three[0].is("macro") || three[0].is("table"))
            && three[1].is(DATABASE)
            && three[2].is_sign(".")
    };
    let after = |(at, three): (usize, &[Token])| {
        if is_made(three) { all.get(at + 3).and_then(Token::name) } else { None }
    };
    all.windows(3).enumerate().filter_map(after).collect()
}
