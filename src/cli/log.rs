//! The log on standard error: text for people, or one JSON object per line.

use std::{fmt, sync::OnceLock};

use tracing::field::{Field, Visit};
use tracing_subscriber::{
    EnvFilter, Layer,
    field::{RecordFields, VisitOutput},
    filter::LevelFilter,
    fmt::{
        FormatFields,
        format::{DefaultVisitor, Writer},
    },
    layer::SubscriberExt,
    reload,
    util::SubscriberInitExt,
};

use super::{
    GlobalArgs, LogFormat,
    progress::{ProgressChoice, Terminal},
    screen::StderrWriter,
};
use crate::observe::LogWatch;

/// The field that holds the stable name of a line (docs/logs.md).
const EVENT: &str = "event";

/// Starts the log. `RHEI_LOG` takes a filter of its own.
pub(super) fn start(args: &GlobalArgs) {
    let level = match (args.verbose, args.quiet) {
        (true, _) => "info,rhei=debug,tokio_postgres=warn,rustls=warn",
        (_, true) => "error",
        _ => "warn,rhei=info",
    };

    let filter = EnvFilter::try_from_env("RHEI_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let (filter, handle) = reload::Layer::new(filter);
    let _ = SET_FILTER.set(Box::new(move |filter| handle.reload(filter)));

    // Whoever reads the progress as JSON can read every line.
    let format = args.log_format.unwrap_or(match args.progress {
        ProgressChoice::Json => LogFormat::Json,
        _ => LogFormat::Text,
    });

    let writer = StderrWriter::default;
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_target(false);
    let lines = match format {
        LogFormat::Text => lines
            .with_ansi(Terminal::of_process().has_colour())
            .fmt_fields(WithoutEvent)
            .with_filter(filter)
            .boxed(),
        LogFormat::Json => lines.json().with_filter(filter).boxed(),
    };

    // Warnings are remembered for the status page, whatever is written.
    let watched = LogWatch.with_filter(LevelFilter::WARN);
    tracing_subscriber::registry().with(lines).with(watched).init();
}

type SetFilter = Box<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync>;

/// Replaces the filter of the log, which is one for the whole process.
static SET_FILTER: OnceLock<SetFilter> = OnceLock::new();

/// Logs by another filter from now on: a level, or a filter as in `RHEI_LOG`.
///
/// # Errors
/// The text is no filter; the error says why.
pub(super) fn set_filter(text: &str) -> Result<(), String> {
    // A bare level is one of rhei, as for `--verbose`.
    let is_level = ["error", "warn", "info", "debug", "trace"].contains(&text);
    let text = if is_level { format!("warn,rhei={text}") } else { text.to_owned() };

    let filter = EnvFilter::try_new(text).map_err(|error| error.to_string())?;
    let set = SET_FILTER.get().ok_or("the log was not started")?;
    set(filter).map_err(|error| error.to_string())
}

/// Writes the message and the fields of a line, but not its stable name, which scripts read.
struct WithoutEvent;

impl<'w> FormatFields<'w> for WithoutEvent {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut visitor = EventFilter(DefaultVisitor::new(writer, true));
        fields.record(&mut visitor);
        visitor.0.finish()
    }
}

struct EventFilter<'w>(DefaultVisitor<'w>);

impl Visit for EventFilter<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() != EVENT {
            self.0.record_str(field, value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() != EVENT {
            self.0.record_debug(field, value);
        }
    }
}
