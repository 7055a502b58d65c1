//! Copies that run beside the stream: `scheduler` begins rounds and waits for their events, and
//! `handler` acts upon the events between two batches.

mod handler;
mod scheduler;

pub use scheduler::{CopyScheduler, RoundUpdate};
