//! Anything that ends a session.

#![deny(missing_docs)]

use crate::{error::panic_message, olap::TargetError, source::SourceError};
/// Anything that ends a session.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The source cannot be reached, refuses, or sends what cannot be applied.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The target refused a call, whose transaction is rolled back.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// Source, target and settings do not fit together. The text says what the operator can do.
    #[error("{0}")]
    Setup(String),
    /// The publications hold no table that the settings choose. [`run()`](crate::run()) waits for
    /// the first one; other calls fail.
    #[error(
        "no table of the source matches {asked}\ndetail: Publication {publications} holds no such \
         table.\nhint: see [source] \
         tables and exclude, and `SELECT * FROM pg_publication_tables`"
    )]
    NoTable {
        /// The patterns that the settings name, or `any table`.
        asked: String,
        /// The names of the publications, with commas between them.
        publications: String,
    },
    /// Work of rhei panicked or was lost. It is begun again as often as the budget of restarts
    /// allows.
    #[error("{what} met a bug: {why}")]
    Bug {
        /// The work, as `a call to DuckDB`.
        what: &'static str,
        /// The message of the panic, or what became of the work.
        why: String,
    },
    /// The sessions that held the snapshot of a copy are gone. The next round of copies makes a
    /// snapshot of its own.
    #[error("the snapshot of the copy is lost")]
    SnapshotLost,
    /// A part of a large source transaction conflicted with a copy in the target. Nothing of the
    /// transaction is applied; a new session begins it again.
    #[error("a copy was at the same rows of the target")]
    Busy,
}

impl EngineError {
    /// Returns the error for a task that panicked, or that the runtime ended.
    pub(crate) fn lost(what: &'static str, lost: tokio::task::JoinError) -> Self {
        let why = match lost.try_into_panic() {
            Ok(panic) => panic_message(&*panic),
            Err(_) => "it was ended".to_owned(),
        };
        Self::Bug { what, why }
    }
}

macro_rules! from_source {
    ($($error:ty),*) => {$(
        impl From<$error> for EngineError {
            fn from(error: $error) -> Self {
                Self::Source(error.into())
            }
        }
    )*};
}
from_source!(
    crate::source::connection::ConnectError,
    crate::source::wire::WireError,
    crate::source::slot::SlotError,
    crate::source::catalog::CatalogError,
    tokio_postgres::Error
);
