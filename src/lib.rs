//! rhei keeps a DuckDB copy of a PostgreSQL database, live and exact.
//!
//! ```text
//! walsender -> wire -> pgoutput -> assemble -> net effect per key -> Arrow columns -> ChangeBatch
//!           -> SyncEngine -> DuckDB: stage, DELETE USING, INSERT, checkpoint, COMMIT
//!           -> durable LSN -> feedback
//! COPY BINARY (ctid chunks, N workers) -> Arrow -> DuckDB  (backfill, under an exported snapshot)
//! ```
//!
//! Most people use the program; this library is what it is made of. [`sync()`] brings a file up to
//! date with a database, [`run()`] follows the database until it is told to stop, and a [`Feed`]
//! returns the changes as Arrow batches without a copy. `examples/` holds a program for each of
//! them.
//!
//! [`Options`] say what is followed, and [`Config`] makes them of `rhei.toml`; a [`Context`] is
//! what the parts of one pipeline share while it runs, and [`Event`]s say what happens in it. A
//! [`CdcConsumer`] makes a [`ChangeBatch`] of the stream, and a [`SyncEngine`] applies it to an
//! [`OlapEngine`], in one transaction with the [`Checkpoint`].
//!
//! The modules stand top down: each imports only from those after it. `source` and `olap` never
//! name each other: they meet in `change`. ARCHITECTURE.md follows one UPDATE through them.

#[doc(hidden)]
pub mod cli;

mod config;

mod observe;

mod control;

mod engine;

mod serve;

mod backfill;

mod verify;

mod pipeline;

mod olap;
mod source;

mod change;

mod types;

mod pgoutput;

mod checkpoint;
mod lsn;

mod conninfo;
mod error;
mod failpoint;

pub use change::{ChangeBatch, ColumnSpec, Deletes, Key, Nulled, Patch, Pause, Remedy, RowCounts};
pub use change::{TableChanges, TableFailure, TableSpec};
pub use checkpoint::{Checkpoint, DurableLsn};
pub use config::Config;
pub use engine::{
    Cycle, CycleOptions, Feed, NextStep, SyncEngine, SyncReport, attach::Recopy, command::Command,
    run, sync,
};
pub use lsn::Lsn;
pub use olap::{DuckDb, OlapEngine, TargetError, TargetOptions};
pub use pgoutput::{QualifiedName, ReplicaIdentity};
pub use pipeline::{Context, CycleReport, EngineError, Event, Options, Writer};
pub use source::{
    BatchLimits, CdcConsumer, Delivery, SourceError, SourcePosition,
    connection::{Environment, SourceOptions},
};

/// What tests, benchmarks and fuzz targets of this repository reach into. No part of it is stable.
#[doc(hidden)]
pub mod internals {
    pub use crate::cli;
    pub mod config {
        pub use crate::config::*;
    }
    pub mod observe {
        pub use crate::observe::*;
    }
    pub mod control {
        pub use crate::control::*;
    }
    pub mod engine {
        pub use crate::engine::*;
    }
    pub mod backfill {
        pub use crate::backfill::*;
    }
    pub mod serve {
        pub use crate::serve::*;
    }
    pub mod verify {
        pub use crate::verify::*;
    }
    pub mod pipeline {
        pub use crate::pipeline::*;
    }
    pub mod olap {
        pub use crate::olap::*;
    }
    pub mod source {
        pub use crate::source::*;
    }
    pub mod change {
        pub use crate::change::*;
    }
    pub mod types {
        pub use crate::types::*;
    }
    pub mod pgoutput {
        pub use crate::pgoutput::*;
    }
    pub mod checkpoint {
        pub use crate::checkpoint::*;
    }
    pub mod lsn {
        pub use crate::lsn::*;
    }
    pub mod error {
        pub use crate::error::*;
    }
    pub mod failpoint {
        pub use crate::failpoint::*;
    }
    pub use crate::{Checkpoint, Lsn};
}
