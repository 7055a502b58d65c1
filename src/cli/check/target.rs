//! The DuckDB file, and whether slot and cluster belong to it.

use std::path::Path;

use super::finding::{Findings, error, failure, ok, warning};
use crate::{
    change::Remedy,
    cli::CliError,
    control,
    engine::attach,
    olap::{DuckDb, StoredState, TableState, TargetError, TargetOptions},
    pipeline::{Context, EngineError, options::TablePattern},
    source::{
        SourceError,
        catalog::readiness,
        connection::SqlClient,
        slot::SlotError,
        wire::{ReplicationClient, WireError},
    },
};

/// Checks the file, and the replication session that would follow the source into it.
pub(super) async fn check(
    client: &SqlClient,
    context: Option<&Context>,
    accepted: &[TablePattern],
    findings: &mut Findings,
) -> Result<(), CliError> {
    let Some(context) = context else {
        findings.add(
            warning("target", "no DuckDB file is given").hint("Use --target, or [target] path."),
        );
        return Ok(());
    };

    let target = &context.options.target;
    if control::request(&target.path, "status").await.is_some() {
        let what = format!("a replicator runs and follows the source into {target}");
        findings.add(ok("target", what));
        return Ok(());
    }

    let stored = match read_state(target, findings) {
        Ok(stored) => stored,
        Err(()) => return Ok(()),
    };

    if target.lake.is_none() {
        check_disk(client, &target.path, findings).await?;
    }
    check_paused(context, stored.as_ref(), accepted, findings);
    check_replication(context, stored.as_ref(), findings).await;
    Ok(())
}

/// Reads the state of the file, if it is there. An error is a finding already.
fn read_state(target: &TargetOptions, findings: &mut Findings) -> Result<Option<StoredState>, ()> {
    let path = &target.path;
    if target.lake.is_none() && !path.exists() {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        let may_write = rustix::fs::access(folder, rustix::fs::Access::WRITE_OK);

        if let Err(refused) = may_write {
            let what = format!("{} cannot be made: {refused}", path.display());
            findings.add(error("target", what).hint("Make its folder, for rhei's user to write."));
            return Err(());
        }
        findings.add(ok("target", format!("{} will be made", path.display())));
        return Ok(None);
    }

    match DuckDb::read_state(target) {
        Ok(Some((state, _))) => {
            let at = state.pipeline.checkpoint.lsn;
            findings.add(ok("target", format!("{target} is a copy at {at}")));
            Ok(Some(state))
        }
        Ok(None) => {
            findings.add(ok("target", format!("rhei has not written to {target} yet")));
            Ok(None)
        }
        // The next start makes it.
        Err(TargetError::NoLake { lake }) => match DuckDb::refuse_to_make(target) {
            Ok(()) => {
                findings.add(ok("target", format!("lake {lake} will be made")));
                Ok(None)
            }
            Err(refused) => {
                findings.add(failure("target", &refused));
                Err(())
            }
        },
        Err(refused) => {
            findings.add(failure("target", &refused));
            Err(())
        }
    }
}

async fn check_disk(
    client: &SqlClient,
    path: &Path,
    findings: &mut Findings,
) -> Result<(), CliError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let Ok(disk) = rustix::fs::statvfs(folder.unwrap_or(Path::new("."))) else { return Ok(()) };

    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let source = readiness::database_bytes(client).await?;
    let shown = |bytes: u64| indicatif::HumanBytes(bytes).to_string();

    // A copy takes less than its source, most often a third of it.
    findings.add(if path.exists() || free > source / 2 {
        ok("disk", format!("{} are free beside the copy", shown(free)))
    } else {
        let what = format!(
            "{} are free beside the copy, and the source's database has {}",
            shown(free),
            shown(source)
        );
        warning("disk", what)
    });
    Ok(())
}

/// Reports tables that an earlier start has paused, and that the next one leaves paused.
fn check_paused(
    context: &Context,
    stored: Option<&StoredState>,
    accepted: &[TablePattern],
    findings: &mut Findings,
) {
    for table in stored.into_iter().flat_map(|state| &state.tables) {
        let TableState::Error(pause) = &table.state else { continue };

        // A table that could not be planned is planned again.
        let is_tried_again = table.columns.is_empty()
            || match pause.remedy {
                Remedy::NextStart => true,
                Remedy::AllowNulls => context.options.null_unrepresentable,
                Remedy::Operator | Remedy::CopyAgain | Remedy::CopyAltered => false,
            };
        if is_tried_again {
            continue;
        }

        let what = format!("is paused: {}", pause.reason.lines().next().unwrap_or_default());
        let subject = table.source.to_string();
        let is_accepted = accepted.iter().any(|pattern| pattern.matches(&table.source));
        findings.add(if is_accepted {
            warning(subject, what)
        } else {
            error(subject, what).hint("[sync] accept names tables that may stay paused.")
        });
    }
}

/// Opens a replication session, and compares slot and cluster with the file.
async fn check_replication(
    context: &Context,
    stored: Option<&StoredState>,
    findings: &mut Findings,
) {
    const SUBJECT: &str = "replication";

    let replication = match ReplicationClient::connect(&context.options.source, "check").await {
        Ok(replication) => replication,
        // The role has its own finding.
        Err(WireError::Connect(refused)) if refused.is_missing_right() => return,
        Err(refused) => {
            findings.add(failure(SUBJECT, &refused));
            return;
        }
    };

    match Box::pin(attach::examine(context, replication, stored)).await {
        Ok(()) => findings.add(ok("slot", format!("\"{}\" is this copy's", context.options.slot))),
        // The server and its settings have their own findings.
        Err(EngineError::Source(SourceError::Slot(
            SlotError::WalLevel { .. }
            | SlotError::TooOld { .. }
            | SlotError::InRecovery
            | SlotError::NoFailover { .. },
        ))) => {}
        Err(EngineError::Source(SourceError::Slot(refused))) => {
            findings.add(failure("slot", &refused).mended_by(refused.sql()));
        }
        Err(refused) => findings.add(failure(SUBJECT, &refused)),
    }
}
