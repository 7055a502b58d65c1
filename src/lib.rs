//! rhei keeps a DuckDB copy of a PostgreSQL database, live and exact.
//!
//! ```text
//! walsender -> wire -> pgoutput -> assemble -> net effect per key -> Arrow columns -> ChangeBatch
//!           -> SyncEngine -> DuckDB: stage, DELETE USING, INSERT, checkpoint, COMMIT
//!           -> durable LSN -> feedback
//! COPY BINARY (ctid chunks, N workers) -> Arrow -> DuckDB  (backfill, under an exported snapshot)
//! ```
//!
//! The modules stand in reading order. `source` and `target` never name each other: they meet in
//! `change`. ARCHITECTURE.md follows one UPDATE through them.

pub mod config;

pub mod checkpoint;
pub mod error;
pub mod lsn;

pub mod pgoutput;

pub mod source;

pub mod change;

pub mod types;

pub mod target;

pub mod pipeline;

pub mod engine;

pub mod backfill;

pub mod control;

pub mod failpoint;

pub mod cli;

pub use checkpoint::Checkpoint;
pub use lsn::Lsn;
