//! Errors as clients see them: each has a code of PostgreSQL.

use pgwire::error::{ErrorInfo, PgWireError};

use super::encode::EncodeError;
use crate::olap::{ErrorKind, StatementError};

/// An error that a client gets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SqlError {
    /// The SQLSTATE.
    pub code: &'static str,
    pub message: String,
    pub hint: Option<&'static str>,
    /// The session ends with this error.
    pub is_fatal: bool,
}

impl SqlError {
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, is_fatal: false }
    }

    pub fn hint(self, hint: &'static str) -> Self {
        Self { hint: Some(hint), ..self }
    }

    pub fn fatal(code: &'static str, message: impl Into<String>) -> Self {
        Self { is_fatal: true, ..Self::new(code, message) }
    }

    /// The thread of the session is gone, which no client can cause.
    pub fn lost() -> Self {
        Self::fatal("XX000", "the session's reader has ended unexpectedly")
    }
}

impl From<StatementError> for SqlError {
    fn from(error: StatementError) -> Self {
        let code = match error.kind {
            ErrorKind::Syntax => "42601",
            ErrorKind::Name if error.message.contains("olumn") => "42703",
            ErrorKind::Name if error.message.contains("Function") => "42883",
            ErrorKind::Name => "42P01",
            ErrorKind::Meaning => "42804",
            ErrorKind::Value => "22000",
            ErrorKind::DivisionByZero => "22012",
            ErrorKind::NotImplemented => "0A000",
            ErrorKind::OutOfMemory => "53200",
            ErrorKind::Interrupted => "57014",
            ErrorKind::Refused => "42501",
            ErrorKind::Disk => "58030",
            ErrorKind::Fatal | ErrorKind::Other => "XX000",
        };
        // DuckDB's own functions are of no use to a client.
        let mut message = error.message;
        message.truncate(message.find("\n\nStack Trace:").unwrap_or(message.len()));
        Self::new(code, message)
    }
}

impl From<EncodeError> for SqlError {
    fn from(error: EncodeError) -> Self {
        let code = match error {
            EncodeError::OutOfRange => "22008",
            EncodeError::Jagged => "2202E",
        };
        Self::new(code, error.to_string())
    }
}

impl From<SqlError> for PgWireError {
    fn from(error: SqlError) -> Self {
        let severity = if error.is_fatal { "FATAL" } else { "ERROR" };
        let mut info = ErrorInfo::new(severity.to_owned(), error.code.to_owned(), error.message);
        info.hint = error.hint.map(str::to_owned);
        Self::UserError(Box::new(info))
    }
}
