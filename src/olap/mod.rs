//! DuckDB: transactions, apply, state.
//!
//! `engine` is the interface that rhei needs of a target, `stored` the state that a target keeps of
//! the pipeline and its tables, `error` the errors. `file` opens and locks the file, `duckdb` holds
//! the one writer, `reader` reads beside it. `shared` has sessions for readers who write their own
//! SQL (`session`), and `gate` keeps them out while the file is closed. `copies` begins, merges and
//! ends copies and `loader` loads them. `apply` turns a change batch into statements: `stage`
//! brings the rows (`arrow_scan` has DuckDB read Arrow in place), `reshape` alters tables; `repair`
//! replaces rows that differ from the source. `names` is the only place that quotes the target's
//! identifiers, `tuning` sets DuckDB for its present work, `compact` rewrites the file, `publish`
//! writes another one for readers, `lake` is what differs where the tables lie in a lake,
//! `connection` what statements need to know of that, `new_file` makes one, `migrations` brings the
//! state of an older file to this version; `target_state` is what the engine reads and replaces of
//! the state; `state`, `tables`, `jobs`, `verifications` and `pending` (changes of tables that are
//! still being copied) are the only places that touch `_rhei`.

pub mod apply;
mod arrow_scan;
pub mod compact;
mod connection;
mod copies;
pub mod duckdb;
pub mod engine;
pub mod error;
mod file;
mod gate;
pub mod jobs;
pub mod lake;
mod loader;
mod migrations;
pub mod names;
mod new_file;
mod pending;
mod publish;
mod reader;
mod repair;
pub mod reshape;
mod session;
mod shared;
mod stage;
pub mod state;
pub mod stored;
mod tables;
mod target_state;
mod tuning;
mod verifications;

pub use self::{
    arrow_scan::library_version,
    compact::{Compacted, Memory, Space},
    duckdb::DuckDb,
    engine::{
        Applied, ApplyTarget, Compaction, CopyLoader, CopyTarget, FileMaintenance, NewCopy,
        OlapEngine, ReadTarget, Readers, Repair, Repaired, RowStream, TargetReader, TargetState,
    },
    error::TargetError,
    file::TargetOptions,
    gate::{Gate, Pass},
    jobs::{NewJob, StoredJob},
    publish::{PublishFormat, PublishOptions, Published, Publisher},
    session::{
        ArrowForm, Bytes, Cells, Chunk, Column, ErrorKind, Interrupter, Interval, Rows,
        SessionConnection, SqlType, Statement, StatementError, Value,
    },
    shared::{SharedFile, empty_session},
    stored::{
        Phase, Pipeline, StoredColumn, StoredState, StoredTable, StoredVerification, TableState,
    },
};
