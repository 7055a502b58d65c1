//! What is done when the slot can no longer serve the copy (`[source] on_slot_lost`): stop, or
//! start over with another slot.
//!
//! A slot that is gone, invalidated, remade or on another history leaves a gap that only another
//! copy of every table fills (traps 33, 34, 36, 38). Another cluster is never such a case: it is
//! refused whatever the settings say (trap 35).

use std::time::Instant;

use super::{attach::Recopy, copies::CopyScheduler};
use crate::{
    olap::OlapEngine,
    pipeline::{Context, EngineError, options::OnSlotLost, slot_history::LIMIT},
    source::{SourceError, catalog, connection::connect_sql, wire::WireError},
};

/// Judges the error that ended a session, and returns how the next session has to begin.
///
/// # Errors
/// The same error, when it is not about the slot, or when it is to end the command.
pub async fn recover<T: OlapEngine + 'static>(
    context: &Context,
    error: EngineError,
    copies: &mut CopyScheduler<T>,
) -> Result<Recopy, EngineError> {
    match &error {
        EngineError::Source(SourceError::Slot(found)) if found.is_lost() => {
            if context.options.on_slot_lost == OnSlotLost::Stop {
                return Err(error);
            }

            let found = found.to_string();
            let found: Vec<&str> =
                found.lines().filter(|line| !line.starts_with("hint: ")).collect();

            if !context.slot_lost.may_resync(Instant::now()) {
                return Err(too_often(&found));
            }

            tracing::warn!(
                event = "slot_lost",
                found = found.join("; "),
                slot = context.options.slot,
                "this copy cannot go on with its slot: every table is copied again with a new one, \
                 as [source] on_slot_lost = \"resync\" says; the old copies stay readable until \
                 then"
            );

            // The rows that a round copies belong to the time of the old slot.
            copies.reset().await;
            Ok(Recopy::AllOfSameCluster)
        }
        EngineError::Source(SourceError::Wire(WireError::Server(message))) => {
            match is_slot_unreadable(context, &message.code).await {
                true => {
                    tracing::warn!(
                        event = "slot_unreadable",
                        error = %message.message,
                        slot = context.options.slot,
                        "the slot cannot be read"
                    );
                    Ok(Recopy::None)
                }
                false => Err(error),
            }
        }
        _ => Err(error),
    }
}

fn too_often(found: &[&str]) -> EngineError {
    EngineError::Setup(format!(
        "{}\ndetail: Every table was copied again {LIMIT} times within an hour because of such a \
         thing, so this is not tried again.\nhint: find out what takes the slot away \
         (max_slot_wal_keep_size, idle_replication_slot_timeout, another copy with the same \
         [source] slot), then start rhei again",
        found.join("\n")
    ))
}

/// Returns whether the server's refusal is about the slot, so that attaching again shows what
/// became of the slot. The messages are in the server's language; codes and catalogs are not.
async fn is_slot_unreadable(context: &Context, code: &str) -> bool {
    const NOT_IN_PREREQUISITE_STATE: &str = "55000";
    const UNDEFINED_OBJECT: &str = "42704";
    const UNDEFINED_FILE: &str = "58P01";

    if ![NOT_IN_PREREQUISITE_STATE, UNDEFINED_OBJECT, UNDEFINED_FILE].contains(&code) {
        return false;
    }

    let Ok(sql) = connect_sql(&context.options.source, "control").await else { return false };
    let Ok(found) = catalog::slot(&sql, &context.options.slot).await else { return false };

    if code == UNDEFINED_FILE {
        context.slot_lost.memory().has_no_wal = true;
        return true;
    }

    found.is_none_or(|found| found.wal_status.as_deref() == Some("lost"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_last_is_named_first() {
        assert_eq!(
            too_often(&["replication slot \"s\" is lost"]).to_string().lines().next(),
            Some("replication slot \"s\" is lost")
        );
    }
}
