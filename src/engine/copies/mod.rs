//! Copies that run beside the stream: `scheduler` begins rounds and waits for what they tell,
//! `handler` does what follows from it between two batches.

mod handler;
mod scheduler;

pub use scheduler::{CopyScheduler, RoundUpdate};
