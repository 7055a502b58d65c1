//! Shows the progress of long work: bars on a terminal, otherwise a line now and then.

use std::{
    collections::HashMap,
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressStyle};
use tokio::sync::mpsc;

use super::service::Service;
use crate::pipeline::{
    CycleReport, Event,
    copy_progress::{CopyProgress, Figures},
};

/// Listens to a pipeline until the pipeline is gone.
pub struct Progress {
    task: tokio::task::JoinHandle<()>,
}

/// The time between two lines about the same work.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

impl Progress {
    /// Starts listening. A service manager hears of what happens, too.
    pub fn start(
        events: mpsc::UnboundedReceiver<Event>,
        is_quiet: bool,
        copy_progress: CopyProgress,
        service: Option<Service>,
    ) -> Self {
        let has_bars = !is_quiet && std::io::stderr().is_terminal();
        Self { task: tokio::spawn(listen(events, copy_progress, has_bars, service)) }
    }

    /// Waits until all events are shown. The pipeline's options must be dropped before.
    pub async fn finish(self) {
        let _ = self.task.await;
    }
}

/// A bar for each table that is being copied, and one for all of them.
struct Bars {
    all: MultiProgress,
    total: ProgressBar,
    tables: HashMap<String, ProgressBar>,
}

impl Bars {
    fn new() -> Self {
        let all = MultiProgress::new();
        let total = all.add(bar("total"));
        Self { all, total, tables: HashMap::new() }
    }

    fn show(&mut self, copy_progress: &CopyProgress) {
        let (tables, total) = copy_progress.progress().unwrap_or_default();
        self.tables.retain(|table, bar| {
            let is_open = tables.contains_key(table);
            if !is_open {
                bar.finish_and_clear();
            }
            is_open
        });

        for (table, progress) in &tables {
            let bar = self
                .tables
                .entry(table.clone())
                .or_insert_with(|| self.all.insert_before(&self.total, bar(table)));
            set(bar, progress);
        }

        if tables.is_empty() {
            self.total.finish_and_clear();
        } else {
            set(&self.total, &total);
        }
    }
}

fn bar(name: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    let style = "{msg:30!} {bar:30} {human_pos}/{human_len} rows, {prefix}";

    bar.set_style(
        ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    bar.set_message(name.to_owned());
    bar
}

fn set(bar: &ProgressBar, progress: &Figures) {
    bar.set_length(progress.estimated_rows.max(progress.rows));
    bar.set_position(progress.rows);
    let left = progress.seconds_left.map_or_else(String::new, |seconds| {
        format!(", {} left", HumanDuration(Duration::from_secs_f64(seconds.clamp(0.0, 1e9))))
    });
    bar.set_prefix(format!("{:.1} MB/s{left}", progress.megabytes_per_second));
}

async fn listen(
    mut heard: mpsc::UnboundedReceiver<Event>,
    copy_progress: CopyProgress,
    has_bars: bool,
    mut service: Option<Service>,
) {
    let mut display = Display {
        bars: has_bars.then(Bars::new),
        copy_progress,
        last_line: Instant::now(),
        applied: Applied::default(),
    };

    while let Some(event) = heard.recv().await {
        if let Some(service) = &mut service {
            service.hear(&event);
        }
        display.show(event);
    }
}

/// Shows events as they come.
struct Display {
    bars: Option<Bars>,
    copy_progress: CopyProgress,
    /// When the log said last how far the copies are.
    last_line: Instant,
    applied: Applied,
}

impl Display {
    fn show(&mut self, event: Event) {
        match event {
            Event::WaitingForTransactions { what } => {
                tracing::info!(
                    event = "waiting_for_transactions",
                    "waiting for transactions at the source that are still open: {what}"
                );
            }
            Event::CopyStarted { table, estimated_rows } => {
                tracing::debug!(table, estimated_rows, "copying")
            }
            Event::CopyProgress => match &mut self.bars {
                Some(bars) => bars.show(&self.copy_progress),
                None if self.last_line.elapsed() >= LOG_INTERVAL => {
                    self.last_line = Instant::now();
                    log_copies(&self.copy_progress);
                }
                None => {}
            },
            Event::CopyFinished { table, rows } => {
                if let Some(bars) = &mut self.bars {
                    bars.show(&self.copy_progress);
                }
                tracing::info!(event = "table_copied", table, rows, "copied");
            }
            Event::WentLive { table } => tracing::info!(event = "table_live", table, "live"),
            Event::AllLive => tracing::info!(event = "all_live", "all tables are live"),
            Event::CopyFailed { table, reason } => {
                tracing::error!(event = "copy_failed", table, reason, "not copied")
            }
            Event::Nulled { table, nulled } => {
                let (column, values, first) = (nulled.column, nulled.values, nulled.first);
                tracing::warn!(
                    event = "values_nulled",
                    table,
                    column,
                    values,
                    first,
                    "values that DuckDB has no room for were stored as NULL"
                );
            }
            Event::Streaming { checkpoint } => tracing::info!(
                event = "streaming",
                %checkpoint,
                "following the source"
            ),
            Event::Cycle(report) => self.applied.add(&report),
            // The log has a line about it already, with the reason.
            Event::Pausing { .. } => {}
        }
    }
}

fn log_copies(copy_progress: &CopyProgress) {
    let (tables, total) = copy_progress.progress().unwrap_or_default();

    let seconds_left = total.seconds_left.map(f64::round);
    let mb_per_second = (total.megabytes_per_second * 10.0).round() / 10.0;
    let (rows, of_about) = (total.rows, total.estimated_rows);

    tracing::info!(
        event = "copy_progress",
        tables = tables.len(),
        rows,
        of_about,
        mb_per_second,
        seconds_left,
        "copying"
    );
}

/// What cycles have applied since the last line about them.
#[derive(Default)]
struct Applied {
    last_line: Option<Instant>,
    transactions: u64,
    changes: u64,
}

impl Applied {
    /// Adds a cycle, and logs what was applied when the last line is long enough ago.
    fn add(&mut self, report: &CycleReport) {
        self.transactions += report.source_transactions;
        self.changes += report.inserted + report.updated + report.deleted;

        let is_due = self.last_line.is_none_or(|last| last.elapsed() >= LOG_INTERVAL);
        if self.transactions > 0 && is_due {
            let Self { transactions, changes, .. } = std::mem::take(self);
            self.last_line = Some(Instant::now());
            let (checkpoint, lag_bytes) = (report.checkpoint, report.lag_bytes);
            tracing::info!(
                event = "changes_applied",
                transactions,
                changes,
                %checkpoint,
                lag_bytes,
                "applied"
            );
        }
    }
}
