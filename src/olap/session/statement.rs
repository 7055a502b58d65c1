//! Connections, statements and results.
#![allow(unsafe_code, reason = "DuckDB's C API; each block says why it is sound")]

use std::{
    ffi::{CStr, CString},
    marker::PhantomData,
    ptr,
    sync::Arc,
};

use duckdb::ffi;

use super::{Column, SqlType, sql_type::take_text};
use crate::olap::arrow_scan::Database;

/// What DuckDB did not do.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct StatementError {
    pub kind: ErrorKind,
    pub message: String,
}

/// The kinds of errors that callers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    Syntax,
    /// A table, column or function is not there.
    Name,
    /// Types do not fit, or the statement makes no sense in another way.
    Meaning,
    /// A value does not fit its type.
    Value,
    DivisionByZero,
    NotImplemented,
    OutOfMemory,
    Interrupted,
    Refused,
    Disk,
    /// DuckDB cannot go on with this file or process.
    Fatal,
    Other,
}

impl StatementError {
    pub(super) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// DuckDB's error of a statement that was not prepared has no code, only a text that begins
    /// with the name of its kind.
    fn unprepared(message: String) -> Self {
        let kind = match message.split_once(" Error:").map(|(kind, _)| kind) {
            Some("Parser" | "Syntax") => ErrorKind::Syntax,
            Some("Catalog") => ErrorKind::Name,
            Some("Binder") if message.contains("not found in FROM clause") => ErrorKind::Name,
            Some("Binder" | "Parameter Not Resolved" | "Parameter Not Allowed") => {
                ErrorKind::Meaning
            }
            Some("Conversion" | "Out of Range" | "Invalid Input") => ErrorKind::Value,
            Some("Not implemented") => ErrorKind::NotImplemented,
            Some("Permission") => ErrorKind::Refused,
            Some("INTERRUPT") => ErrorKind::Interrupted,
            Some("FATAL") => ErrorKind::Fatal,
            _ => ErrorKind::Other,
        };
        Self { kind, message }
    }

    /// # Safety
    /// The result is alive.
    unsafe fn of_result(result: &mut ffi::duckdb_result) -> Self {
        // SAFETY: the text belongs to the result.
        let (code, message) = unsafe {
            let message = ffi::duckdb_result_error(result);
            let message = if message.is_null() {
                "DuckDB gave no reason".to_owned()
            } else {
                CStr::from_ptr(message).to_string_lossy().into_owned()
            };
            (ffi::duckdb_result_error_type(result), message)
        };

        let kind = match code {
            ffi::duckdb_error_type_DUCKDB_ERROR_PARSER
            | ffi::duckdb_error_type_DUCKDB_ERROR_SYNTAX => ErrorKind::Syntax,
            ffi::duckdb_error_type_DUCKDB_ERROR_CATALOG => ErrorKind::Name,
            ffi::duckdb_error_type_DUCKDB_ERROR_BINDER => ErrorKind::Meaning,
            ffi::duckdb_error_type_DUCKDB_ERROR_CONVERSION
            | ffi::duckdb_error_type_DUCKDB_ERROR_OUT_OF_RANGE
            | ffi::duckdb_error_type_DUCKDB_ERROR_INVALID_INPUT
            | ffi::duckdb_error_type_DUCKDB_ERROR_MISMATCH_TYPE => ErrorKind::Value,
            ffi::duckdb_error_type_DUCKDB_ERROR_DIVIDE_BY_ZERO => ErrorKind::DivisionByZero,
            ffi::duckdb_error_type_DUCKDB_ERROR_NOT_IMPLEMENTED => ErrorKind::NotImplemented,
            ffi::duckdb_error_type_DUCKDB_ERROR_OUT_OF_MEMORY => ErrorKind::OutOfMemory,
            ffi::duckdb_error_type_DUCKDB_ERROR_INTERRUPT => ErrorKind::Interrupted,
            ffi::duckdb_error_type_DUCKDB_ERROR_PERMISSION => ErrorKind::Refused,
            ffi::duckdb_error_type_DUCKDB_ERROR_IO => ErrorKind::Disk,
            ffi::duckdb_error_type_DUCKDB_ERROR_FATAL
            | ffi::duckdb_error_type_DUCKDB_ERROR_INTERNAL => ErrorKind::Fatal,
            _ => ErrorKind::Other,
        };
        Self { kind, message }
    }
}

/// A connection, which is closed with its last statement.
struct Handle {
    raw: ffi::duckdb_connection,
    /// The database outlives its connections.
    _database: Arc<Database>,
}

// SAFETY: DuckDB locks a connection for each call, and `duckdb_interrupt` is made to be called from
// another thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the connection is closed once, here.
        unsafe { ffi::duckdb_disconnect(&mut self.raw) }
    }
}

/// Ends the statement that a connection runs, from any thread.
#[derive(Clone)]
pub struct Interrupter(Arc<Handle>);

impl Interrupter {
    /// Ends the statement that runs now, if there is one. A statement that is only about to begin
    /// does not notice.
    pub fn interrupt(&self) {
        // SAFETY: the connection is alive.
        unsafe { ffi::duckdb_interrupt(self.0.raw) }
    }
}

/// A connection of a reader.
pub struct SessionConnection(Arc<Handle>);

impl SessionConnection {
    /// Opens a connection. It begins in the database in memory, not in the file.
    pub(in crate::olap) fn open(database: &Arc<Database>) -> Result<Self, StatementError> {
        let mut raw = ptr::null_mut();
        // SAFETY: the database is open.
        let connected = unsafe { ffi::duckdb_connect(database.raw(), &mut raw) };
        if connected != ffi::DuckDBSuccess {
            return Err(StatementError::new(ErrorKind::Other, "DuckDB opens no connection"));
        }
        Ok(Self(Arc::new(Handle { raw, _database: Arc::clone(database) })))
    }

    /// Returns what ends a statement of this connection.
    pub fn interrupter(&self) -> Interrupter {
        Interrupter(Arc::clone(&self.0))
    }

    /// Runs statements and discards their results.
    pub fn execute(&self, sql: &str) -> Result<(), StatementError> {
        let sql = c_string(sql)?;
        // SAFETY: the connection is alive, and the result is destroyed once.
        unsafe {
            let mut result = std::mem::zeroed();
            let state = ffi::duckdb_query(self.0.raw, sql.as_ptr(), &mut result);
            let done = if state == ffi::DuckDBSuccess {
                Ok(())
            } else {
                Err(StatementError::of_result(&mut result))
            };
            ffi::duckdb_destroy_result(&mut result);
            done
        }
    }

    /// Prepares the one statement that `sql` holds.
    pub fn prepare(&self, sql: &str) -> Result<Statement, StatementError> {
        let sql = c_string(sql)?;
        // SAFETY: the connection is alive; what was extracted is destroyed once; a statement is
        // destroyed with `Statement`, also one that only holds an error.
        unsafe {
            let mut extracted = ptr::null_mut();
            let count = ffi::duckdb_extract_statements(self.0.raw, sql.as_ptr(), &mut extracted);
            if count != 1 {
                let error = if count > 1 {
                    StatementError::new(ErrorKind::Syntax, "one statement at a time")
                } else {
                    let message = ffi::duckdb_extract_statements_error(extracted);
                    StatementError::unprepared(if message.is_null() {
                        "Parser Error: there is no statement".to_owned()
                    } else {
                        CStr::from_ptr(message).to_string_lossy().into_owned()
                    })
                };
                ffi::duckdb_destroy_extracted(&mut extracted);
                return Err(error);
            }

            let mut raw = ptr::null_mut();
            let state = ffi::duckdb_prepare_extracted_statement(self.0.raw, extracted, 0, &mut raw);
            ffi::duckdb_destroy_extracted(&mut extracted);

            let statement = Raw { raw, _connection: Arc::clone(&self.0) };
            if state != ffi::DuckDBSuccess {
                return Err(StatementError::unprepared(
                    CStr::from_ptr(ffi::duckdb_prepare_error(raw)).to_string_lossy().into_owned(),
                ));
            }
            Ok(Statement::of(statement))
        }
    }
}

fn c_string(sql: &str) -> Result<CString, StatementError> {
    CString::new(sql)
        .map_err(|_| StatementError::new(ErrorKind::Syntax, "a statement holds a zero byte"))
}

struct Raw {
    raw: ffi::duckdb_prepared_statement,
    _connection: Arc<Handle>,
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: the statement is destroyed once, here, before its connection.
        unsafe { ffi::duckdb_destroy_prepare(&mut self.raw) }
    }
}

/// A statement that can run again and again.
pub struct Statement {
    statement: Raw,
    /// The types of the parameters, by their numbers from 1 on.
    pub parameters: Vec<SqlType>,
    pub columns: Vec<(String, SqlType)>,
    /// The statement only reads, as far as its kind tells.
    pub is_select: bool,
}

// SAFETY: a statement is used by one thread at a time, and not bound to the one that made it.
unsafe impl Send for Statement {}

/// The value of a parameter.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Null,
    Boolean(bool),
    BigInt(i64),
    Float(f32),
    Double(f64),
    Decimal { value: i128, width: u8, scale: u8 },
    Text(String),
    Blob(Vec<u8>),
}

impl Statement {
    fn of(statement: Raw) -> Self {
        let raw = statement.raw;
        // SAFETY: the statement is alive; names and types are taken over once.
        unsafe {
            let parameters = (1..=ffi::duckdb_nparams(raw))
                .map(|at| SqlType::take(ffi::duckdb_param_logical_type(raw, at)));
            let columns = (0..ffi::duckdb_prepared_statement_column_count(raw)).map(|at| {
                let name = ffi::duckdb_prepared_statement_column_name(raw, at);
                let of = ffi::duckdb_prepared_statement_column_logical_type(raw, at);
                let name = take_text(name.cast_mut());
                let of = SqlType::take(of).in_column(&name);
                (name, of)
            });

            Self {
                parameters: parameters.collect(),
                columns: columns.collect(),
                is_select: ffi::duckdb_prepared_statement_type(raw)
                    == ffi::duckdb_statement_type_DUCKDB_STATEMENT_TYPE_SELECT,
                statement,
            }
        }
    }

    /// Begins to run the statement. The result ends when its connection runs anything else.
    ///
    /// # Errors
    /// DuckDB refuses, or a column has a type that cannot be read ([`SqlType::is_readable`]).
    pub fn run(&mut self, values: &[Value]) -> Result<Rows<'_>, StatementError> {
        if let Some((name, _)) = self.columns.iter().find(|(_, of)| !of.is_readable()) {
            let message = format!("column {name} has a type that cannot be read as it is");
            return Err(StatementError::new(ErrorKind::NotImplemented, message));
        }

        for (at, value) in (1..).zip(values) {
            self.bind(at, value)?;
        }

        // SAFETY: the statement is alive; a result is destroyed once, here or with `Rows`.
        unsafe {
            let mut result = std::mem::zeroed();
            let state = ffi::duckdb_execute_prepared_streaming(self.statement.raw, &mut result);
            let mut rows = Rows { result, types: Vec::new(), statement: PhantomData };
            if state != ffi::DuckDBSuccess {
                return Err(StatementError::of_result(&mut rows.result));
            }

            // The types of the parameters' values may have changed those of the columns.
            rows.types = (0..ffi::duckdb_column_count(&mut rows.result))
                .map(|at| {
                    let of = ffi::duckdb_column_logical_type(&mut rows.result, at);
                    let column = self.columns.get(at as usize);
                    SqlType::take(of).in_column(column.map_or("", |(name, _)| name))
                })
                .collect();
            Ok(rows)
        }
    }

    fn bind(&mut self, at: u64, value: &Value) -> Result<(), StatementError> {
        let raw = self.statement.raw;
        // SAFETY: the statement is alive, and copies what it is given.
        let state = unsafe {
            match value {
                Value::Null => ffi::duckdb_bind_null(raw, at),
                Value::Boolean(value) => ffi::duckdb_bind_boolean(raw, at, *value),
                Value::BigInt(value) => ffi::duckdb_bind_int64(raw, at, *value),
                Value::Float(value) => ffi::duckdb_bind_float(raw, at, *value),
                Value::Double(value) => ffi::duckdb_bind_double(raw, at, *value),
                Value::Decimal { value, width, scale } => {
                    let value =
                        ffi::duckdb_hugeint { lower: *value as u64, upper: (*value >> 64) as i64 };
                    let decimal = ffi::duckdb_decimal { width: *width, scale: *scale, value };
                    ffi::duckdb_bind_decimal(raw, at, decimal)
                }
                Value::Text(text) => ffi::duckdb_bind_varchar_length(
                    raw,
                    at,
                    text.as_ptr().cast(),
                    text.len() as u64,
                ),
                Value::Blob(bytes) => {
                    ffi::duckdb_bind_blob(raw, at, bytes.as_ptr().cast(), bytes.len() as u64)
                }
            }
        };

        if state == ffi::DuckDBSuccess {
            return Ok(());
        }
        let message = format!("the statement has no parameter ${at}");
        Err(StatementError::new(ErrorKind::Meaning, message))
    }
}

/// The rows of a statement that runs.
pub struct Rows<'a> {
    result: ffi::duckdb_result,
    types: Vec<SqlType>,
    statement: PhantomData<&'a mut Statement>,
}

impl Rows<'_> {
    /// Returns the types of the columns.
    pub fn types(&self) -> &[SqlType] {
        &self.types
    }

    pub(super) fn raw(&mut self) -> &mut ffi::duckdb_result {
        &mut self.result
    }

    /// Returns the next rows; `None` after the last ones.
    pub fn next_chunk(&mut self) -> Result<Option<Chunk<'_>>, StatementError> {
        loop {
            // SAFETY: the result is alive; a chunk is destroyed with `Chunk`.
            let raw = unsafe { ffi::duckdb_fetch_chunk(self.result) };
            if raw.is_null() {
                // SAFETY: as above; no text means that there was no error.
                let has_failed = unsafe {
                    let message = ffi::duckdb_result_error(&mut self.result);
                    !message.is_null() && *message != 0
                };
                if has_failed {
                    // SAFETY: as above.
                    return Err(unsafe { StatementError::of_result(&mut self.result) });
                }
                return Ok(None);
            }

            // SAFETY: the chunk is alive.
            let len = unsafe { ffi::duckdb_data_chunk_get_size(raw) } as usize;
            let chunk = ChunkHandle(raw);
            if len > 0 {
                return Ok(Some(Chunk { chunk, len, types: &self.types }));
            }
        }
    }
}

impl Drop for Rows<'_> {
    fn drop(&mut self) {
        // SAFETY: the result is destroyed once, here.
        unsafe { ffi::duckdb_destroy_result(&mut self.result) }
    }
}

struct ChunkHandle(ffi::duckdb_data_chunk);

impl Drop for ChunkHandle {
    fn drop(&mut self) {
        // SAFETY: the chunk is destroyed once, here.
        unsafe { ffi::duckdb_destroy_data_chunk(&mut self.0) }
    }
}

/// Some rows of a result, at least one.
pub struct Chunk<'a> {
    chunk: ChunkHandle,
    len: usize,
    types: &'a [SqlType],
}

impl Chunk<'_> {
    pub(super) fn raw(&self) -> ffi::duckdb_data_chunk {
        self.chunk.0
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.len
    }

    /// Returns the columns.
    pub fn columns(&self) -> Vec<Column<'_>> {
        let column = |(at, of)| {
            // SAFETY: a chunk of a result has flat vectors of the result's types with `len` values
            // each, and they live as long as the chunk.
            unsafe {
                let vector = ffi::duckdb_data_chunk_get_vector(self.chunk.0, at);
                Column::of(vector, self.len, of)
            }
        };
        (0..).zip(self.types).map(column).collect()
    }
}
