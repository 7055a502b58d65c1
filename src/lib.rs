//! rhei keeps a DuckDB copy of a PostgreSQL database, live and exact.
//!
//! ```text
//! walsender -> wire -> pgoutput -> assemble -> net effect per key -> Arrow columns -> ChangeBatch
//!           -> SyncEngine -> DuckDB: stage, DELETE USING, INSERT, checkpoint, COMMIT
//!           -> durable LSN -> feedback
//! COPY BINARY (ctid chunks, N workers) -> Arrow -> DuckDB  (backfill, under an exported snapshot)
//! ```
//!
//! The modules stand top down: each imports only from those after it. `source` and `olap` never
//! name each other: they meet in `change`. ARCHITECTURE.md follows one UPDATE through them.

pub mod cli;

pub mod config;
pub mod control;

pub mod engine;

pub mod backfill;

pub mod pipeline;

pub mod olap;
pub mod source;

pub mod change;

pub mod types;

pub mod pgoutput;

pub mod checkpoint;
pub mod lsn;

pub mod error;
pub mod failpoint;

pub use checkpoint::Checkpoint;
pub use lsn::Lsn;
