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
    source::{
        SourceError,
        catalog::{self, SlotInfo},
        connection::connect_sql,
        wire::WireError,
    },
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
    let may_resync = || context.slot_lost.may_resync(Instant::now());

    match judge(&error, context.options.on_slot_lost, may_resync) {
        SlotVerdict::End => Err(error),
        SlotVerdict::TooOften { found } => Err(too_often(&found)),
        SlotVerdict::StartOver { found } => {
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
        SlotVerdict::AskCatalogs { suspicion, message } => {
            match is_slot_unreadable(context, suspicion).await {
                true => {
                    tracing::warn!(
                        event = "slot_unreadable",
                        error = %message,
                        slot = context.options.slot,
                        "the slot cannot be read"
                    );
                    Ok(Recopy::None)
                }
                false => Err(error),
            }
        }
    }
}

/// What follows from the error that ended a session.
#[derive(Debug, PartialEq, Eq)]
enum SlotVerdict<'a> {
    /// The error is not about the slot, or the settings leave a lost slot to the operator.
    End,
    /// The slot is lost, and starting over has not helped: what was found, in lines without hints.
    TooOften { found: Vec<String> },
    /// The slot is lost: every table is copied again with another slot.
    StartOver { found: Vec<String> },
    /// The server refused to send, perhaps because of the slot.
    AskCatalogs { suspicion: Suspicion, message: &'a str },
}

/// What a refusal of the server lets one suspect of the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Suspicion {
    /// The slot was dropped or invalidated: the catalogs know.
    SlotGone,
    /// WAL is gone that the catalogs take for kept.
    WalGone,
}

/// Judges the error that ended a session. `may_resync` returns whether every table may be copied
/// again, and counts that it is: it is asked only when that would follow.
fn judge<'a>(
    error: &'a EngineError,
    on_slot_lost: OnSlotLost,
    may_resync: impl FnOnce() -> bool,
) -> SlotVerdict<'a> {
    match error {
        EngineError::Source(SourceError::Slot(found)) if found.is_lost() => {
            if on_slot_lost == OnSlotLost::Stop {
                return SlotVerdict::End;
            }

            let found = found.to_string();
            let found: Vec<String> = found
                .lines()
                .filter(|line| !line.starts_with("hint: "))
                .map(str::to_owned)
                .collect();

            if may_resync() {
                SlotVerdict::StartOver { found }
            } else {
                SlotVerdict::TooOften { found }
            }
        }
        EngineError::Source(SourceError::Wire(WireError::Server(message))) => {
            match suspicion_of(&message.code) {
                Some(suspicion) => {
                    SlotVerdict::AskCatalogs { suspicion, message: &message.message }
                }
                None => SlotVerdict::End,
            }
        }
        _ => SlotVerdict::End,
    }
}

fn too_often(found: &[String]) -> EngineError {
    EngineError::Setup(format!(
        "{}\ndetail: Every table was copied again {LIMIT} times within an hour because of such a \
         thing, so this is not tried again.\nhint: find out what takes the slot away \
         (max_slot_wal_keep_size, idle_replication_slot_timeout, another copy with the same \
         [source] slot), then start rhei again",
        found.join("\n")
    ))
}

/// Returns what a refusal with this SQLSTATE lets one suspect. The messages are in the server's
/// language; codes and catalogs are not.
fn suspicion_of(code: &str) -> Option<Suspicion> {
    const NOT_IN_PREREQUISITE_STATE: &str = "55000";
    const UNDEFINED_OBJECT: &str = "42704";
    const UNDEFINED_FILE: &str = "58P01";

    match code {
        NOT_IN_PREREQUISITE_STATE | UNDEFINED_OBJECT => Some(Suspicion::SlotGone),
        UNDEFINED_FILE => Some(Suspicion::WalGone),
        _ => None,
    }
}

/// Returns whether the server's refusal is about the slot, so that attaching again shows what
/// became of the slot.
async fn is_slot_unreadable(context: &Context, suspicion: Suspicion) -> bool {
    let Ok(sql) = connect_sql(&context.options.source, "control").await else { return false };
    let Ok(found) = catalog::slot(&sql, &context.options.slot).await else { return false };

    if suspicion == Suspicion::WalGone {
        context.slot_lost.memory().has_no_wal = true;
        return true;
    }

    is_missing_or_lost(found.as_ref())
}

/// Returns whether nothing can be read from the slot that the catalogs show.
fn is_missing_or_lost(found: Option<&SlotInfo>) -> bool {
    found.is_none_or(|found| found.wal_status.as_deref() == Some("lost"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Lsn,
        pipeline::slot_history::SlotHistory,
        source::{slot::SlotError, wire::ServerMessage},
    };

    fn of_slot(error: SlotError) -> EngineError {
        EngineError::Source(error.into())
    }

    fn lost() -> EngineError {
        of_slot(SlotError::Lost { slot: "s".to_owned() })
    }

    fn refusal(code: &str) -> EngineError {
        let message = ServerMessage {
            code: code.to_owned(),
            message: "no".to_owned(),
            ..ServerMessage::default()
        };
        EngineError::Source(WireError::Server(message).into())
    }

    fn named(verdict: &SlotVerdict<'_>) -> &'static str {
        match verdict {
            SlotVerdict::End => "end",
            SlotVerdict::TooOften { .. } => "too often",
            SlotVerdict::StartOver { .. } => "start over",
            SlotVerdict::AskCatalogs { .. } => "ask",
        }
    }

    #[test]
    fn a_lost_slot_ends_the_command_or_begins_everything_anew_as_the_settings_say() {
        let (slot, two) = (|| "s".to_owned(), || ("1".to_owned(), "2".to_owned()));
        let (confirmed, checkpoint) = (Lsn(2), Lsn(1));

        for (error, when_resync) in [
            (SlotError::Missing { slot: slot(), checkpoint }, "start over"),
            (SlotError::Lost { slot: slot() }, "start over"),
            (SlotError::MovedPast { slot: slot(), confirmed, checkpoint }, "start over"),
            (SlotError::SourceBehind { flush: Lsn(0), checkpoint }, "start over"),
            (
                SlotError::Diverged { known: 1, timeline: 2, switch: Lsn(0), checkpoint },
                "start over",
            ),
            (SlotError::Unrelated { known: 1, timeline: 2 }, "start over"),
            // Trap 35: another cluster is refused whatever the settings say.
            (SlotError::OtherCluster { known: two().0, found: two().1 }, "end"),
            (SlotError::OtherDatabase { known: two().0, found: two().1 }, "end"),
            (SlotError::OldPrimary { known: 2, timeline: 1 }, "end"),
            (SlotError::NotOurs { slot: slot() }, "end"),
            (SlotError::Active { slot: slot(), pid: None }, "end"),
        ] {
            let error = of_slot(error);
            let on = |setting| named(&judge(&error, setting, || true));
            assert_eq!(on(OnSlotLost::Stop), "end", "{error}");
            assert_eq!(on(OnSlotLost::Resync), when_resync, "{error}");
        }
    }

    #[test]
    fn the_fourth_slot_that_is_lost_within_an_hour_ends_the_command() {
        let (history, now, error) = (SlotHistory::default(), Instant::now(), lost());
        let verdicts: Vec<&str> = (0..4)
            .map(|_| named(&judge(&error, OnSlotLost::Resync, || history.may_resync(now))))
            .collect();
        assert_eq!(verdicts, ["start over", "start over", "start over", "too often"]);
    }

    #[test]
    fn only_a_slot_that_is_replaced_counts_towards_the_limit() {
        for (error, setting, is_counted) in [
            (lost(), OnSlotLost::Resync, true),
            (lost(), OnSlotLost::Stop, false),
            (of_slot(SlotError::NotOurs { slot: "s".to_owned() }), OnSlotLost::Resync, false),
            (refusal("55000"), OnSlotLost::Resync, false),
            (EngineError::SnapshotLost, OnSlotLost::Resync, false),
        ] {
            let mut is_asked = false;
            judge(&error, setting, || std::mem::replace(&mut is_asked, true));
            assert_eq!(is_asked, is_counted, "{error} under {setting:?}");
        }
    }

    #[test]
    fn what_was_found_is_told_without_the_hints_for_a_command_that_stops() {
        let error = of_slot(SlotError::SourceBehind { flush: Lsn(1), checkpoint: Lsn(2) });
        let found = vec![
            "the source's WAL ends at 0/1, before this copy's checkpoint 0/2".to_owned(),
            "detail: The source was restored to an earlier moment, so the copy holds what it has \
             forgotten."
                .to_owned(),
        ];
        let verdict = judge(&error, OnSlotLost::Resync, || true);
        assert_eq!(verdict, SlotVerdict::StartOver { found });
    }

    #[test]
    fn the_catalogs_are_asked_about_refusals_that_a_slot_may_have_caused() {
        for (code, suspicion) in [
            ("55000", Some(Suspicion::SlotGone)),
            ("42704", Some(Suspicion::SlotGone)),
            ("58P01", Some(Suspicion::WalGone)),
            ("55006", None),
            ("42501", None),
            ("57P01", None),
            ("", None),
        ] {
            let expected = suspicion.map_or(SlotVerdict::End, |suspicion| {
                SlotVerdict::AskCatalogs { suspicion, message: "no" }
            });
            let (error, may_resync) = (refusal(code), || unreachable!("nothing is lost yet"));
            assert_eq!(judge(&error, OnSlotLost::Resync, may_resync), expected, "{code}");
        }
    }

    #[test]
    fn a_slot_is_unreadable_when_it_is_gone_or_has_lost_its_wal() {
        let slot = |wal_status: Option<&str>| SlotInfo {
            database: None,
            plugin: None,
            active: false,
            active_pid: None,
            temporary: false,
            confirmed_flush_lsn: None,
            wal_status: wal_status.map(str::to_owned),
            held_bytes: None,
        };

        assert!(is_missing_or_lost(None));
        for (wal_status, expected) in [
            (Some("lost"), true),
            (Some("unreserved"), false),
            (Some("extended"), false),
            (Some("reserved"), false),
            (None, false),
        ] {
            let found = slot(wal_status);
            assert_eq!(is_missing_or_lost(Some(&found)), expected, "{wal_status:?}");
        }
    }

    #[test]
    fn what_was_found_last_is_named_first() {
        let found = ["replication slot \"s\" is lost".to_owned()];
        assert_eq!(
            too_often(&found).to_string().lines().next(),
            Some("replication slot \"s\" is lost")
        );
    }
}
