//! Remembers the warnings and errors of the log, and counts them by their stable names.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::{self, Write as _},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, layer::Context};

/// Lines that are kept, and how long each may be.
const MAX_LINES: usize = 50;
const MAX_LINE_BYTES: usize = 1000;

/// A warning or an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// Seconds since 1970.
    pub at: u64,
    /// `warn` or `error`.
    pub level: &'static str,
    /// The stable name.
    pub event: String,
    /// The message and its fields.
    pub text: String,
}

#[derive(Debug)]
struct Remembered {
    lines: VecDeque<LogLine>,
    counts: BTreeMap<(String, &'static str), u64>,
}

/// The log is one for the whole process, and begins before its settings are read.
static REMEMBERED: Mutex<Remembered> =
    Mutex::new(Remembered { lines: VecDeque::new(), counts: BTreeMap::new() });

fn remembered() -> MutexGuard<'static, Remembered> {
    REMEMBERED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the last warnings and errors, newest first.
pub fn lines() -> Vec<LogLine> {
    remembered().lines.iter().rev().cloned().collect()
}

/// Returns how many there were of each name and level.
pub fn counts() -> BTreeMap<(String, &'static str), u64> {
    remembered().counts.clone()
}

/// Takes part in the log, beside what writes it.
pub struct LogWatch;

impl<S: Subscriber> Layer<S> for LogWatch {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warn",
            _ => return,
        };

        let mut fields = Fields::default();
        event.record(&mut fields);
        // Only rhei's own lines have names.
        let Some(name) = fields.event else { return };

        let mut text = fields.message + &fields.others;
        if let Some((end, _)) = text.char_indices().find(|(at, _)| *at >= MAX_LINE_BYTES) {
            text.truncate(end);
            text.push_str(" ..");
        }

        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut remembered = remembered();
        *remembered.counts.entry((name.clone(), level)).or_default() += 1;
        if remembered.lines.len() == MAX_LINES {
            remembered.lines.pop_front();
        }
        remembered.lines.push_back(LogLine { at, level, event: name, text });
    }
}

#[derive(Default)]
struct Fields {
    event: Option<String>,
    message: String,
    others: String,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "event" => self.event = Some(value.to_owned()),
            _ => self.record_debug(field, &format_args!("{value}")),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            name => {
                let _ = write!(self.others, " {name}={value:?}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tracing::event;
    use tracing_subscriber::prelude::*;

    use super::*;

    #[test]
    fn warnings_and_errors_are_kept_with_their_fields_and_counted_by_name() {
        let log = tracing_subscriber::registry().with(LogWatch);
        tracing::subscriber::with_default(log, || {
            for number in 0..3 {
                event!(Level::WARN, event = "log_watch_warning", number, "a test warns");
            }
            let what = "ä".repeat(2000);
            event!(Level::ERROR, event = "log_watch_error", what, "a test fails");
            event!(Level::INFO, event = "log_watch_info", "a test works");
            event!(Level::WARN, "a library warns");
        });

        let count = |name: &str, level| counts().get(&(name.to_owned(), level)).copied();
        assert_eq!(count("log_watch_warning", "warn"), Some(3));
        assert_eq!(count("log_watch_error", "error"), Some(1));

        let lines = lines();
        let of = |name: &str| lines.iter().find(|line| line.event == name);
        assert_eq!(of("log_watch_warning").unwrap().text, "a test warns number=2");
        assert!(of("log_watch_error").unwrap().text.len() < MAX_LINE_BYTES + 10);
        assert_eq!(of("log_watch_info"), None);
        assert!(lines.iter().all(|line| !line.text.contains("a library")));
    }
}
