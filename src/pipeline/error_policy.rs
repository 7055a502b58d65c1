//! What an error leads to: the one place that says whether rhei waits for the end of the error,
//! tries again, or tells the operator.

use std::time::Duration;

use super::EngineError;
use crate::{
    Lsn,
    olap::TargetError,
    source::{
        SourceError,
        catalog::CatalogError,
        connection::ConnectError,
        copy_binary::CopyError,
        spool::SpoolError,
        sqlstate::{Refusal, refusal},
        wire::WireError,
    },
};

/// What rhei does about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The source is away: rhei connects again with growing, jittered pauses, without end.
    Outage,
    /// The source answers, and the obstacle is gone by the next time. This is like an outage, but
    /// worth another attempt also when nothing has streamed yet.
    Passing,
    /// The cause is a bug, too little memory, or a commit that failed for neither: rhei tries again
    /// as often as the budget of restarts allows.
    Restart,
    /// A disk of the replicator does not take what is written. The target is opened again until the
    /// disk does.
    Disk,
    /// The error concerns the rows of one table: that table is paused or copied again, and the
    /// other tables go on. Where no table is known, the operator has to act.
    Table,
    /// Only a change of settings, privileges or objects helps.
    Operator,
}

impl Policy {
    /// Returns whether the same operation may succeed later without help from the operator.
    pub fn is_waited_for(self) -> bool {
        matches!(self, Self::Outage | Self::Passing)
    }
}

pub fn policy(error: &EngineError) -> Policy {
    match error {
        EngineError::Source(error) => of_source(error),
        EngineError::Target(error) => of_target(error),
        EngineError::Bug { .. } => Policy::Restart,
        // Another round of copies makes a snapshot of its own, or comes when the other copy is
        // over.
        EngineError::SnapshotLost | EngineError::Busy => Policy::Passing,
        EngineError::Setup(_) | EngineError::NoTable { .. } => Policy::Operator,
    }
}

pub fn of_source(error: &SourceError) -> Policy {
    match error {
        SourceError::Connect(error) => of_connecting(error),
        SourceError::Wire(error) => match error {
            WireError::Connect(error) => of_connecting(error),
            WireError::Io(_) | WireError::Closed | WireError::Silent(_) => Policy::Outage,
            WireError::Server(message) => of_refusal(&message.code),
            WireError::TooLong { .. }
            | WireError::LongAnswer { .. }
            | WireError::BadLength(_)
            | WireError::Unexpected { .. }
            | WireError::Short { .. }
            | WireError::Authentication(_)
            | WireError::Unproven => Policy::Operator,
        },
        // An error without a code concerns the connection, or a NULL where an object was dropped
        // during the question about it.
        SourceError::Query(error) | SourceError::Catalog(CatalogError::Query(error)) => {
            match error.code() {
                Some(code) if !error.is_closed() => of_refusal(code.code()),
                _ => Policy::Outage,
            }
        }
        SourceError::Slot(error) if error.is_transient() => Policy::Outage,
        // The next session verifies the server that answers then.
        SourceError::AnotherServer { .. } | SourceError::StreamEnded => Policy::Outage,
        SourceError::Spool(SpoolError::Io { .. }) => Policy::Disk,
        SourceError::Copy(CopyError::Value { .. }) => Policy::Table,
        SourceError::Slot(_)
        | SourceError::Spool(_)
        | SourceError::Copy(_)
        | SourceError::Catalog(CatalogError::UnexpectedAnswer { .. })
        | SourceError::Pgoutput(_)
        | SourceError::Assemble(_)
        | SourceError::Recorded(_)
        | SourceError::PublicationSkipped { .. } => Policy::Operator,
    }
}

fn of_connecting(error: &ConnectError) -> Policy {
    if error.is_transient() { Policy::Outage } else { Policy::Operator }
}

/// Returns the policy for a refusal of the server with this `sqlstate`.
fn of_refusal(sqlstate: &str) -> Policy {
    match refusal(sqlstate) {
        Refusal::Locked | Refusal::Passing => Policy::Passing,
        Refusal::Outage => Policy::Outage,
        Refusal::Data => Policy::Table,
        Refusal::Lasting => Policy::Operator,
    }
}

fn of_target(error: &TargetError) -> Policy {
    // The transaction of a reader ends at its timeout, and the file can be opened again then.
    if error.is_of_disk() || matches!(error, TargetError::ReaderStays) {
        Policy::Disk
    } else if error.is_invalidated() {
        // Opening the file again does not help: `rhei run` has to start itself again.
        Policy::Operator
    } else if error.is_conflict() || error.is_internal() || error.wants_reopening() {
        Policy::Restart
    } else if error.table().is_some() || error.is_diverged() {
        Policy::Table
    } else {
        Policy::Operator
    }
}

/// Counts ends of the stream that come again and again before the stream has brought anything: a
/// server that crashes over what it decodes does so for each connection, and takes all its other
/// sessions down.
#[derive(Debug, Default)]
pub struct Standstill {
    position: Lsn,
    ends: u32,
}

impl Standstill {
    /// This number of ends in a row is no accident.
    const TOO_MANY: u32 = 3;
    const FIRST_PAUSE: Duration = Duration::from_secs(20);
    const MAX_PAUSE: Duration = Duration::from_secs(600);
    /// A stream that lasted longer than this has not ended because of what comes next.
    const LASTING: Duration = Duration::from_secs(20);

    /// Counts an end of the stream. Returns how long the source is to be left alone.
    pub fn ended(&mut self, position: Lsn, lasted: Duration) -> Option<Duration> {
        if position != self.position || lasted > Self::LASTING {
            *self = Self { position, ends: 0 };
        }
        self.ends += 1;
        let before = self.ends.checked_sub(Self::TOO_MANY)?;
        Some((Self::FIRST_PAUSE * 3_u32.saturating_pow(before.min(10))).min(Self::MAX_PAUSE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{slot::SlotError, wire::ServerMessage};

    fn refused(code: &str) -> EngineError {
        SourceError::Wire(WireError::Server(ServerMessage {
            code: code.to_owned(),
            ..ServerMessage::default()
        }))
        .into()
    }

    fn of_duckdb(text: &str) -> EngineError {
        TargetError::saying(text).into()
    }

    #[test]
    fn each_kind_of_error_has_its_policy() {
        let slot = "s".to_owned();
        let io = || std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        let connect = |error: ConnectError| EngineError::Source(error.into());
        let address = || "db:5432".to_owned();
        let cases: Vec<(EngineError, Policy)> = vec![
            (
                connect(ConnectError::Unreachable { address: address(), detail: String::new() }),
                Policy::Outage,
            ),
            (
                connect(ConnectError::TimedOut { address: address(), after: Duration::ZERO }),
                Policy::Outage,
            ),
            (connect(ConnectError::NoSource), Policy::Operator),
            (
                connect(ConnectError::Password { user: "u".to_owned(), address: address() }),
                Policy::Operator,
            ),
            (SourceError::Wire(WireError::Io(io())).into(), Policy::Outage),
            (SourceError::Wire(WireError::Closed).into(), Policy::Outage),
            (SourceError::Wire(WireError::Silent(Duration::ZERO)).into(), Policy::Outage),
            (SourceError::Wire(WireError::Unproven).into(), Policy::Operator),
            (SourceError::Wire(WireError::BadLength(-1)).into(), Policy::Operator),
            (SourceError::StreamEnded.into(), Policy::Outage),
            (
                SourceError::Slot(SlotError::Active { slot: slot.clone(), pid: None }).into(),
                Policy::Outage,
            ),
            (SourceError::Slot(SlotError::InRecovery).into(), Policy::Outage),
            (
                SourceError::Slot(SlotError::OldPrimary { known: 2, timeline: 1 }).into(),
                Policy::Outage,
            ),
            (SourceError::Slot(SlotError::Lost { slot }).into(), Policy::Operator),
            (
                SourceError::Spool(SpoolError::Io { folder: "spool".to_owned(), source: io() })
                    .into(),
                Policy::Disk,
            ),
            (
                SourceError::Catalog(CatalogError::UnexpectedAnswer {
                    what: "an LSN",
                    found: "?".to_owned(),
                })
                .into(),
                Policy::Operator,
            ),
            (EngineError::SnapshotLost, Policy::Passing),
            (EngineError::Busy, Policy::Passing),
            (EngineError::Bug { what: "a copy", why: "it panicked".to_owned() }, Policy::Restart),
            (EngineError::Setup("no".to_owned()), Policy::Operator),
            (of_duckdb("IO Error: Could not write file: No space left on device"), Policy::Disk),
            (
                of_duckdb("Out of Memory Error: failed to pin block of size 256.0 KiB"),
                Policy::Restart,
            ),
            (of_duckdb("INTERNAL Error: Attempted to access index 1"), Policy::Restart),
            (
                of_duckdb(
                    "FATAL Error: Failed: database has been invalidated because of a previous \
                     fatal error. Original error: \"INTERNAL Error: an index\"",
                ),
                Policy::Operator,
            ),
            (of_duckdb("TransactionContext Error: Conflict on update!"), Policy::Restart),
            (of_duckdb("Catalog Error: Table with name t does not exist!"), Policy::Operator),
        ];
        for (error, expected) in cases {
            assert_eq!(policy(&error), expected, "{error:?}");
        }

        let of_codes = [
            ("40P01", Policy::Passing),
            ("55P03", Policy::Passing),
            ("57014", Policy::Passing),
            ("XX000", Policy::Passing),
            ("53100", Policy::Outage),
            ("57P01", Policy::Outage),
            ("58030", Policy::Outage),
            ("08006", Policy::Outage),
            ("22012", Policy::Table),
            ("XX001", Policy::Table),
            ("42501", Policy::Operator),
            ("28P01", Policy::Operator),
        ];
        for (code, expected) in of_codes {
            assert_eq!(policy(&refused(code)), expected, "{code}");
        }
    }

    #[test]
    fn a_source_that_ends_at_one_position_is_left_alone_for_longer_and_longer() {
        let (second, mut standstill) = (Duration::from_secs(1), Standstill::default());
        let paused: Vec<_> =
            (0..8).map(|_| standstill.ended(Lsn(7), second).map(|pause| pause.as_secs())).collect();
        assert_eq!(
            paused,
            [None, None, Some(20), Some(60), Some(180), Some(540), Some(600), Some(600)]
        );

        // The stream has moved on, or has lasted long.
        assert_eq!(standstill.ended(Lsn(8), second), None);
        assert_eq!(standstill.ended(Lsn(8), second), None);
        assert_eq!(standstill.ended(Lsn(8), second * 100), None);
        assert_eq!(standstill.ended(Lsn(8), second), None);
        assert!(standstill.ended(Lsn(8), second).is_some());
    }
}
