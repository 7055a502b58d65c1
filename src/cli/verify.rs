//! `rhei verify`: proves that the copy is equal to its source.

use std::{collections::BTreeSet, process::ExitCode};

use clap::Args;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{CliError, Invocation};
use crate::{
    config::ByteSize,
    control, engine,
    olap::DuckDb,
    pipeline::{EngineError, Writer, schedule::Share},
    verify::{
        self, ColumnDifference, RepairReport, Report, Request, RowVerdict, TableReport,
        TableVerdict,
    },
};

/// The exit code when the copy differs from its source.
const DIFFERENT: u8 = 3;

/// A slower limit would have a small table take hours.
const MIN_RATE_LIMIT: usize = 100_000;

/// The text shows at most this number of rows of a table.
const MAX_SHOWN: usize = 20;

/// Flags of `rhei verify`.
#[derive(Debug, Clone, Default, Args)]
pub struct VerifyArgs {
    /// Compare this table only, as schema.table; may be given several times
    #[arg(long, value_name = "TABLE")]
    pub table: Vec<String>,
    /// Show the values that differ
    #[arg(long)]
    pub values: bool,
    /// Replace the rows that differ by those of the source, and compare again
    #[arg(long)]
    pub repair: bool,
    /// Compare this share of each table's rows, the next share each time
    #[arg(long, value_name = "PERCENT")]
    pub sample: Option<Share>,
    /// The most bytes of tables that the source reads in a second, as 50MB
    #[arg(long, value_name = "SIZE", value_parser = rate_limit)]
    pub rate_limit: Option<ByteSize>,
    /// For scripts
    #[arg(long)]
    pub json: bool,
}

fn rate_limit(text: &str) -> Result<ByteSize, String> {
    let limit: ByteSize = text.parse()?;
    if limit.0 < MIN_RATE_LIMIT { Err("it has to be at least 100KB".to_owned()) } else { Ok(limit) }
}

/// Runs the command. A running replicator verifies beside its stream; otherwise this process brings
/// the copy up to date and verifies it.
pub async fn run(session: Invocation, args: VerifyArgs) -> Result<ExitCode, CliError> {
    let path = session.target()?.path;
    let request = Request {
        tables: args.table,
        shows_values: args.values,
        repairs: args.repair,
        parts: args.sample.map_or(1, Share::parts),
        rate_limit_bytes: args.rate_limit.map(|limit| limit.0 as u64),
    };

    let question = serde_json::to_string(&request).map_err(unreadable)?;
    let report = match control::request(&path, &format!("verify {question}")).await {
        Some(answer) => match answer["error"].as_str() {
            Some(error) => return Err(CliError::Failed(error.to_owned())),
            None => serde_json::from_value(answer).map_err(unreadable)?,
        },
        None => alone(session, &request).await?,
    };

    if args.json {
        println!("{}", serde_json::to_string(&report).map_err(unreadable)?);
    } else {
        print_text(&report);
    }

    Ok(if report.has_differences() {
        ExitCode::from(DIFFERENT)
    } else if report.is_incomplete() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn unreadable(error: serde_json::Error) -> CliError {
    CliError::Failed(format!("the report cannot be read: {error}"))
}

/// Verifies a copy that no replicator holds: this process follows the source meanwhile.
async fn alone(session: Invocation, request: &Request) -> Result<Report, CliError> {
    let target = session.target()?;
    if DuckDb::read_state(&target)?.is_none() {
        return Err(CliError::Failed(format!("{target} is not a copy that rhei made")));
    }

    let (context, progress) = session.context()?;
    let asked_to_stop = session.stop_on_signal();
    let writer = Writer::new(DuckDb::open(&context.options.target)?);

    let stop = CancellationToken::new();
    let (_commands, commands) = mpsc::unbounded_channel();
    let (of_run, writer_of_run, stop_of_run) = (context.clone(), writer.clone(), stop.clone());
    let mut following =
        tokio::spawn(
            async move { engine::run(&of_run, &writer_of_run, commands, &stop_of_run).await },
        );

    let verified = tokio::select! {
        report = verify::verify(&context, &writer, request) => Some(report),
        () = asked_to_stop.cancelled() => None,
        // It ends by itself only with an error.
        ended = &mut following => {
            ended.map_err(|lost| EngineError::lost("following the source", lost))??;
            return Err(stopped());
        }
    };

    stop.cancel();
    following.await.map_err(|lost| EngineError::lost("following the source", lost))??;
    drop(writer);
    drop(context);
    progress.finish().await;
    Ok(verified.ok_or_else(stopped)??)
}

fn stopped() -> CliError {
    CliError::Failed("stopped before the copy was verified".to_owned())
}

fn print_text(report: &Report) {
    for table in &report.tables {
        println!("{}", line(table));
        for difference in table.differences.iter().take(MAX_SHOWN) {
            let kind = match difference.kind {
                RowVerdict::Missing => "missing in the copy",
                RowVerdict::Extra => "only in the copy",
                RowVerdict::Different => "different",
            };
            let columns: Vec<String> = difference.columns.iter().map(column).collect();
            println!("  {kind}: {} {}", difference.key, columns.join(", "));
        }
        if table.differences.len() > MAX_SHOWN {
            println!("  and {} more", table.differences.len() - MAX_SHOWN);
        }
        for (column, reason) in &table.not_compared {
            println!("  column {column} was not compared: {reason}");
        }
        if let Some(repair) = &table.repair {
            println!("  {}", repaired(repair));
        }
    }

    let lsns: BTreeSet<&str> = report.tables.iter().map(|table| table.lsn.as_str()).collect();
    let lsns: Vec<&str> = lsns.into_iter().filter(|lsn| !lsn.is_empty()).collect();
    if !lsns.is_empty() {
        println!("compared at {} in {:.1} s", lsns.join(", "), report.seconds);
    }
}

fn line(table: &TableReport) -> String {
    let reason = table.reason.as_deref().map(|reason| format!(" ({reason})")).unwrap_or_default();
    let part = table.part.map(|part| format!(" of part {} of {}", part.number + 1, part.of));
    let part = part.unwrap_or_default();
    match table.verdict {
        TableVerdict::Equal => format!("{}: equal, {} rows{part}", table.table, table.source_rows),
        TableVerdict::NotVerified => format!("{}: not verified{reason}", table.table),
        TableVerdict::Different => format!(
            "{}: DIFFERENT{reason}: {} rows{part} at the source, {} in the copy; {} missing, {} \
             extra, {} different",
            table.table,
            table.source_rows,
            table.copy_rows,
            table.missing,
            table.extra,
            table.different
        ),
    }
}

fn repaired(repair: &RepairReport) -> String {
    let RepairReport { deleted_rows, inserted_rows, .. } = repair;
    match &repair.reason {
        Some(reason) => format!("not repaired: {reason}"),
        None => format!(
            "repaired: {deleted_rows} rows of the copy were replaced by {inserted_rows} rows of \
             the source; the table is {} now",
            match repair.verdict {
                TableVerdict::Equal => "equal",
                TableVerdict::Different => "still DIFFERENT",
                TableVerdict::NotVerified => "not verified",
            }
        ),
    }
}

fn column(difference: &ColumnDifference) -> String {
    match (&difference.source, &difference.copy) {
        (Some(source), Some(copy)) => format!("{}: {source} | {copy}", difference.column),
        _ => difference.column.clone(),
    }
}
