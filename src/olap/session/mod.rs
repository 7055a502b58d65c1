//! Sessions of readers who write their own SQL, through DuckDB's C API: unlike the duckdb crate it
//! names the types of parameters and columns before a statement runs, ends a statement from
//! another thread, and returns a result chunk by chunk.

mod arrow_form;
mod cells;
mod sql_type;
mod statement;

pub use arrow_form::ArrowForm;
pub use cells::{Bytes, Cells, Column, Interval};
pub use sql_type::SqlType;
pub use statement::{
    Chunk, ErrorKind, Interrupter, Rows, SessionConnection, Statement, StatementError, Value,
};
