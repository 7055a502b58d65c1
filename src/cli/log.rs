//! The log on standard error: text for people, or one JSON object per line.

use std::fmt;

use tracing::field::{Field, Visit};
use tracing_subscriber::{
    EnvFilter,
    field::{RecordFields, VisitOutput},
    fmt::{
        FormatFields,
        format::{DefaultVisitor, Writer},
    },
};

use super::{
    GlobalArgs, LogFormat,
    progress::{ProgressChoice, Terminal},
    screen::StderrWriter,
};

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
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(StderrWriter::default)
        .with_target(false);

    // Whoever reads the progress as JSON can read every line.
    let format = args.log_format.unwrap_or(match args.progress {
        ProgressChoice::Json => LogFormat::Json,
        _ => LogFormat::Text,
    });
    match format {
        LogFormat::Text => {
            logs.with_ansi(Terminal::of_process().has_colour()).fmt_fields(WithoutEvent).init()
        }
        LogFormat::Json => logs.json().init(),
    }
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
