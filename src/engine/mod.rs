//! Decides what a pipeline does next.
//!
//! `run` follows the source until it is told to stop, `sync` catches up and ends; both are made of
//! sessions (`session`), and `periodic` runs the tasks that accompany a long run. `attach` proves
//! that this file and this source belong together, or makes it so. `cycle` applies one batch.
//! `copies` runs copies beside the stream, `schema` judges how the shape of a table changed,
//! `slot_recovery` decides what follows from a slot that this copy cannot go on with, `supervisor`
//! begins again what failed, `settled` says how far everything is in the copy, `command` is what a
//! running replicator may be asked.

pub mod attach;
pub mod command;
pub mod copies;
pub mod cycle;
mod feed;
mod left_out;
mod new_tables;
mod periodic;
pub mod publication;
mod recopies;
mod retry;
mod run;
pub mod schema;
mod session;
pub mod settled;
mod slot_recovery;
pub mod supervisor;
mod sync;
mod sync_report;

pub use cycle::{Cycle, CycleOptions, NextStep, SyncEngine};
pub use feed::Feed;
pub use run::run;
pub use sync::sync;
pub use sync_report::SyncReport;
