//! Shows the progress of long work: bars on a terminal, otherwise a line now and then.

use std::{
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use clap::ValueEnum;
use serde_json::json;
use tokio::{sync::mpsc, time::MissedTickBehavior};

use super::{
    bars,
    screen::{self, Size, StderrWriter},
    service::Service,
};
use crate::pipeline::{
    CycleReport, Event,
    copy_progress::{CopyProgress, Overview},
};

/// The time between two lines about the same work.
pub const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// The same, for a program that reads them.
pub const JSON_INTERVAL: Duration = Duration::from_secs(1);
const DRAW_INTERVAL: Duration = Duration::from_millis(200);

/// How the user wants to see progress: the flag `--progress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProgressChoice {
    /// Bars on a terminal, unless NO_COLOR or TERM=dumb is set; otherwise plain. Nothing with -q
    Auto,
    /// Bars, also with NO_COLOR; plain where standard error is no terminal or a dumb one
    Bar,
    /// A log line every ten seconds
    Plain,
    /// Nothing
    None,
    /// A JSON object per line on standard error every second; the log is JSON, too
    Json,
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    Bars,
    Lines,
    Json,
    None,
}

/// What is known of standard error.
#[derive(Debug, Clone, Copy)]
pub struct Terminal {
    /// Whether it is a terminal that can move its cursor.
    can_redraw: bool,
    /// The user wants no colour (no-color.org).
    is_plain: bool,
}

impl Terminal {
    pub fn of_process() -> Self {
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        Self {
            can_redraw: std::io::stderr().is_terminal() && !is_dumb,
            is_plain: std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()),
        }
    }

    pub fn has_colour(self) -> bool {
        self.can_redraw && !self.is_plain
    }
}

impl Style {
    pub fn new(choice: ProgressChoice, is_quiet: bool, terminal: Terminal) -> Self {
        match choice {
            ProgressChoice::Auto if is_quiet => Style::None,
            ProgressChoice::Auto if terminal.has_colour() => Style::Bars,
            ProgressChoice::Bar if terminal.can_redraw => Style::Bars,
            ProgressChoice::Auto | ProgressChoice::Bar | ProgressChoice::Plain => Style::Lines,
            ProgressChoice::Json => Style::Json,
            ProgressChoice::None => Style::None,
        }
    }
}

/// Listens to a pipeline until the pipeline is gone.
pub struct Progress {
    task: tokio::task::JoinHandle<()>,
}

impl Progress {
    /// Starts listening. A service manager hears of what happens, too.
    pub fn start(
        events: mpsc::UnboundedReceiver<Event>,
        style: Style,
        copy_progress: CopyProgress,
        service: Option<Service>,
    ) -> Self {
        Self { task: tokio::spawn(listen(events, copy_progress, style, service)) }
    }

    /// Waits until all events are shown. The pipeline's options must be dropped before.
    pub async fn finish(self) {
        let _ = self.task.await;
    }
}

async fn listen(
    mut heard: mpsc::UnboundedReceiver<Event>,
    copy_progress: CopyProgress,
    style: Style,
    mut service: Option<Service>,
) {
    let mut display = Display {
        style,
        copy_progress,
        is_copying: false,
        last_line: Instant::now(),
        applied: Applied::default(),
    };

    let mut ticks = tokio::time::interval(DRAW_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            event = heard.recv() => {
                let Some(event) = event else { break };
                if let Some(service) = &mut service {
                    service.hear(&event);
                }
                display.show(event);
            }
            _ = ticks.tick(), if display.is_copying => display.show_copies(),
        }
    }
    display.end_copies();
}

/// Shows events as they come.
struct Display {
    style: Style,
    copy_progress: CopyProgress,
    /// Whether copies are shown that have not ended.
    is_copying: bool,
    /// When a line said last how far the copies are.
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
            Event::CopyProgress => self.is_copying = true,
            Event::CopyFinished { table, rows } => {
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

    /// Shows how far the copies are, if it is time to.
    fn show_copies(&mut self) {
        let Some(overview) = self.copy_progress.overview() else { return };
        if overview.tables_left == 0 {
            return self.end_copies();
        }

        let is_due = |interval| self.last_line.elapsed() >= interval;
        match self.style {
            Style::Bars => screen::show(bars::lines(&overview, Size::now())),
            Style::Lines if is_due(LOG_INTERVAL) => {
                self.last_line = Instant::now();
                log_copies(&overview);
            }
            Style::Json if is_due(JSON_INTERVAL) => {
                self.last_line = Instant::now();
                print_copies("copying", &overview);
            }
            Style::Lines | Style::Json | Style::None => {}
        }
    }

    fn end_copies(&mut self) {
        let is_copying = std::mem::take(&mut self.is_copying);
        match self.style {
            Style::Bars => screen::show(Vec::new()),
            Style::Json if is_copying => {
                let overview = self.copy_progress.overview().unwrap_or_default();
                print_copies("copies_ended", &overview);
            }
            Style::Json | Style::Lines | Style::None => {}
        }
    }
}

fn log_copies(overview: &Overview) {
    let total = &overview.total;
    let seconds_left = total.seconds_left.map(f64::round);
    let mb_per_second = (total.megabytes_per_second * 10.0).round() / 10.0;
    let (rows, of_about) = (total.rows, total.estimated_rows);

    tracing::info!(
        event = "copy_progress",
        tables = overview.tables_left,
        tables_done = overview.tables_done,
        rows,
        of_about,
        mb_per_second,
        seconds_left,
        "copying"
    );
}

/// Prints a line for a program that shows the progress itself (docs/operating.md).
fn print_copies(event: &str, overview: &Overview) {
    let total = &overview.total;
    print_json(&json!({
        "event": event,
        "tables": overview.tables,
        "tables_done": overview.tables_done,
        "tables_left": overview.tables_left,
        "rows": total.rows,
        "estimated_rows": total.estimated_rows,
        "bytes": total.bytes,
        "seconds": total.seconds,
        "seconds_left": total.seconds_left,
    }));
}

/// Prints an object on a line of its own to standard error.
pub fn print_json(object: &serde_json::Value) {
    // Nobody can be told that standard error is gone.
    let _ = StderrWriter.write_all(format!("{object}\n").as_bytes());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_need_a_terminal_that_can_draw_them() {
        let style = |choice, is_quiet, can_redraw, is_plain| {
            Style::new(choice, is_quiet, Terminal { can_redraw, is_plain })
        };

        assert_eq!(style(ProgressChoice::Auto, false, true, false), Style::Bars);
        assert_eq!(style(ProgressChoice::Auto, true, true, false), Style::None);
        assert_eq!(style(ProgressChoice::Auto, false, true, true), Style::Lines);
        assert_eq!(style(ProgressChoice::Auto, false, false, false), Style::Lines);
        assert_eq!(style(ProgressChoice::Bar, true, true, true), Style::Bars);
        assert_eq!(style(ProgressChoice::Bar, false, false, false), Style::Lines);
        assert_eq!(style(ProgressChoice::Plain, false, true, false), Style::Lines);
        assert_eq!(style(ProgressChoice::Json, true, true, false), Style::Json);
        assert_eq!(style(ProgressChoice::None, false, true, false), Style::None);
    }
}
