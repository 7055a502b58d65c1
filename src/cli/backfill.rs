//! `rhei backfill`: copies tables, then stops.

use std::process::ExitCode;

use clap::Args;

use super::{CliError, Invocation};
use crate::{
    backfill::plain_copy,
    engine::{attach::Recopy, sync},
    olap::{Compaction, DuckDb, engine::FileMaintenance},
    pgoutput::QualifiedName,
    pipeline::Writer,
};

/// Flags of `rhei backfill`.
#[derive(Debug, Clone, Default, Args)]
pub struct BackfillArgs {
    /// Copy this table again (schema.table); may be given several times
    #[arg(long = "table", value_name = "SCHEMA.TABLE", value_parser = qualified_name)]
    pub tables: Vec<QualifiedName>,
    /// Copy again what is already here; without --table everything, with a new slot
    #[arg(long)]
    pub force: bool,
    /// A plain copy under an ordinary snapshot: needs no slot and no logical WAL, and nothing
    /// follows it
    #[arg(long, conflicts_with_all = ["tables", "force"])]
    pub no_slot: bool,
}

fn qualified_name(text: &str) -> Result<QualifiedName, String> {
    match text.split_once('.') {
        Some((schema, name)) if !schema.is_empty() && !name.is_empty() => {
            Ok(QualifiedName::new(schema, name))
        }
        _ => Err("expected schema.table".to_owned()),
    }
}

/// Flags of `rhei resync`.
#[derive(Debug, Clone, Args)]
pub struct ResyncArgs {
    /// The table at the source
    #[arg(value_name = "SCHEMA.TABLE", value_parser = qualified_name)]
    pub table: QualifiedName,
}

/// Runs `rhei resync`: a running replicator copies the table again; without one this process does.
pub async fn resync(session: Invocation, args: ResyncArgs) -> Result<ExitCode, CliError> {
    let path = session.target()?.path;
    match crate::control::request(&path, &format!("resync {}", args.table)).await {
        Some(answer) => match answer["error"].as_str() {
            Some(error) => Err(CliError::Failed(error.to_owned())),
            None => {
                println!("the running replicator copies {} again; see `rhei status`", args.table);
                Ok(ExitCode::SUCCESS)
            }
        },
        None => {
            Box::pin(run(
                session,
                BackfillArgs { tables: vec![args.table], force: true, no_slot: false },
            ))
            .await
        }
    }
}

/// Runs `rhei pause` and `rhei resume`: only a running replicator has copies that can be paused.
pub async fn pause(session: Invocation, is_paused: bool) -> Result<ExitCode, CliError> {
    let path = session.target()?.path;
    let question = if is_paused { "pause" } else { "resume" };

    if crate::control::request(&path, question).await.is_none() {
        return Err(CliError::Failed(format!(
            "no replicator of {} is running\nhint: start one with `rhei run`",
            path.display()
        )));
    }

    println!(
        "{}",
        if is_paused { "copies are paused; `rhei resume` goes on" } else { "copies go on" }
    );
    Ok(ExitCode::SUCCESS)
}

/// Runs the command.
pub async fn run(session: Invocation, args: BackfillArgs) -> Result<ExitCode, CliError> {
    let (context, progress) = session.context()?;
    let stop = session.stop_on_signal();

    let again = match (args.tables.is_empty(), args.force) {
        (false, _) => Recopy::Tables(args.tables),
        (true, true) => Recopy::All,
        (true, false) => Recopy::None,
    };

    let copied = if args.no_slot {
        let writer = Writer::new(DuckDb::open(&context.options.target)?);
        let copied = plain_copy(&context, &writer, &stop).await;
        writer.call(|target| target.checkpoint_file(Compaction::Skip)).await?;
        copied.map_err(CliError::from)
    } else {
        sync(&context, again, &stop).await.map(|report| report.in_error).map_err(CliError::from)
    };

    drop(context);
    progress.finish().await;

    let in_error = copied?;

    if stop.is_cancelled() {
        eprintln!(
            "stopped; what is copied stays, and the next backfill, sync or run goes on from there"
        );
        return Ok(ExitCode::from(1));
    }

    println!("copied");
    session.report_paused(&in_error)
}
