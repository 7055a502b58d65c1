//! `rhei backfill`: copy, then stop.

use std::process::ExitCode;

use clap::Args;

use super::{CliError, Session};
use crate::{
    change::QualifiedName,
    engine::{
        Writer,
        attach::{CopyAgain, attach, plain_copy},
    },
    target::{DuckDb, OlapEngine},
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
    /// A plain copy under an ordinary snapshot: needs no slot and no logical WAL, and nothing follows it
    #[arg(long, conflicts_with_all = ["tables", "force"])]
    pub no_slot: bool,
}

fn qualified_name(text: &str) -> Result<QualifiedName, String> {
    match text.split_once('.') {
        Some((schema, name)) if !schema.is_empty() && !name.is_empty() => Ok(QualifiedName::new(schema, name)),
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

/// `rhei resync`: a running replicator is asked to copy a table again; without one it is done here.
pub async fn resync(session: Session, args: ResyncArgs) -> Result<ExitCode, CliError> {
    let path = session.target()?.path;
    match crate::control::ask(&path, &format!("resync {}", args.table)).await {
        Some(answer) => match answer["error"].as_str() {
            Some(error) => Err(CliError::Failed(error.to_owned())),
            None => {
                println!("the running replicator copies {} again; see `rhei status`", args.table);
                Ok(ExitCode::SUCCESS)
            }
        },
        None => run(session, BackfillArgs { tables: vec![args.table], force: true, no_slot: false }).await,
    }
}

/// Runs the command.
pub async fn run(session: Session, args: BackfillArgs) -> Result<ExitCode, CliError> {
    let (options, progress) = session.options()?;
    let stop = session.stop_on_signal();
    let again = match (args.tables.is_empty(), args.force) {
        (false, _) => CopyAgain::Tables(args.tables),
        (true, true) => CopyAgain::Everything,
        (true, false) => CopyAgain::Nothing,
    };
    let work = async {
        let writer = Writer::new(DuckDb::open(&options.target)?);
        let in_error = if args.no_slot {
            plain_copy(&options, &writer).await?;
            Vec::new()
        } else {
            attach(&options, &writer, &again).await?.in_error
        };
        writer.call(|target| target.tidy(false)).await?;
        Ok::<_, CliError>(in_error)
    };
    let ended = tokio::select! {
        () = stop.cancelled() => {
            eprintln!("stopped; tables that were not finished are copied again by the next backfill, sync or run");
            return Ok(ExitCode::from(1));
        }
        ended = work => ended,
    };
    drop(options);
    progress.finish().await;
    let in_error: Vec<_> = ended?.into_iter().map(|(_, table, reason)| (table.to_string(), reason)).collect();
    println!("copied");
    super::report_paused(&in_error)
}
