//! The log on standard error: text for people, or one JSON object per line.

use std::{fmt, io::IsTerminal};

use tracing::field::{Field, Visit};
use tracing_subscriber::{
    EnvFilter,
    field::{RecordFields, VisitOutput},
    fmt::{
        FormatFields,
        format::{DefaultVisitor, Writer},
    },
};

use super::{GlobalArgs, LogFormat};

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
        .with_writer(std::io::stderr)
        .with_target(false);

    match args.log_format {
        LogFormat::Text => {
            logs.with_ansi(std::io::stderr().is_terminal()).fmt_fields(WithoutEvent).init()
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
