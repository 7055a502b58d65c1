//! Progress of long work: bars on a terminal, a line now and then otherwise.

use std::{
    collections::HashMap,
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::sync::mpsc;

use crate::engine::Event;

/// Listens to a pipeline until it is gone.
pub struct Progress {
    task: tokio::task::JoinHandle<()>,
}

/// Between two lines about the same thing.
const PAUSE: Duration = Duration::from_secs(10);

impl Progress {
    /// The sending end goes into the pipeline's options.
    pub fn start(is_quiet: bool) -> (mpsc::UnboundedSender<Event>, Self) {
        let (events, heard) = mpsc::unbounded_channel();
        let has_bars = !is_quiet && std::io::stderr().is_terminal();
        (events, Self { task: tokio::spawn(listen(heard, has_bars)) })
    }

    /// Waits until everything was shown. The pipeline's options must be gone.
    pub async fn finish(self) {
        let _ = self.task.await;
    }
}

async fn listen(mut heard: mpsc::UnboundedReceiver<Event>, has_bars: bool) {
    let bars = has_bars.then(MultiProgress::new);
    let mut open: HashMap<String, (Option<ProgressBar>, u64, Instant)> = HashMap::new();
    let mut last_cycle = None::<Instant>;
    let (mut transactions, mut changes) = (0, 0);
    while let Some(event) = heard.recv().await {
        match event {
            Event::WaitingForTransactions { what } => {
                tracing::info!("waiting for transactions at the source that are still open: {what}");
            }
            Event::CopyStarted { table, estimated_rows } => {
                let bar = bars.as_ref().map(|bars| {
                    let bar = bars.add(ProgressBar::new(estimated_rows));
                    let style = "{msg:30!} {bar:30} {human_pos}/{human_len} rows, {per_sec}, {eta} left";
                    bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
                    bar.set_message(table.clone());
                    bar
                });
                open.insert(table, (bar, 0, Instant::now()));
            }
            Event::CopyProgress { table, rows, .. } => {
                let Some((bar, copied, shown)) = open.get_mut(&table) else { continue };
                *copied += rows;
                match bar {
                    Some(bar) => bar.inc(rows),
                    None if shown.elapsed() >= PAUSE => {
                        *shown = Instant::now();
                        tracing::info!(table, rows = copied, "copying");
                    }
                    None => {}
                }
            }
            Event::CopyFinished { table, rows } => {
                if let Some((Some(bar), ..)) = open.remove(&table) {
                    bar.finish_and_clear();
                }
                tracing::info!(table, rows, "copied");
            }
            Event::CopyFailed { table, reason } => tracing::error!(table, reason, "not copied"),
            Event::Nulled { table, nulled } => {
                let (column, values, first) = (nulled.column, nulled.values, nulled.first);
                tracing::warn!(table, column, values, first, "values that DuckDB has no room for were stored as NULL");
            }
            Event::Streaming { checkpoint } => tracing::info!(%checkpoint, "following the source"),
            Event::Cycle(report) => {
                transactions += report.source_transactions;
                changes += report.inserted + report.updated + report.deleted;
                if transactions > 0 && last_cycle.is_none_or(|last| last.elapsed() >= PAUSE) {
                    last_cycle = Some(Instant::now());
                    let (checkpoint, lag_bytes) = (report.checkpoint, report.lag_bytes);
                    tracing::info!(transactions, changes, %checkpoint, lag_bytes, "applied");
                    (transactions, changes) = (0, 0);
                }
            }
        }
    }
}
