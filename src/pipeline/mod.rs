//! The settings of a pipeline, the state that its parts share while it runs, and the events that it
//! reports.
//!
//! `options` are the settings as plain data, `context` holds the live handles, `writer` is the
//! target for one caller at a time, `event` is what is reported, `error` is what ends a session and
//! `error_policy` what an error leads to, `pulse` says whether the engine hangs, `tables` chooses
//! tables and plans their shapes in the target; the others are counters and figures that outlive
//! sessions.

pub mod activity;
pub mod context;
pub mod copy_progress;
pub mod error;
pub mod error_policy;
pub mod event;
pub mod latency;
pub mod left_out;
pub mod meter;
pub mod new_tables;
pub mod options;
pub mod pulse;
pub mod recopies;
pub mod schedule;
pub mod settled;
pub mod slot_history;
pub mod tables;
pub mod writer;

pub use context::{Context, DdlLock};
pub use error::EngineError;
pub use event::{CycleReport, Event};
pub use options::Options;
pub use writer::Writer;
