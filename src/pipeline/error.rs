//! Anything that ends a session.

use crate::{error::panic_message, olap::TargetError, source::SourceError};
/// Anything that ends a session.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error("{0}")]
    Setup(String),
    #[error(
        "no table of the source matches {asked}\ndetail: Publication {publications} holds no such \
         table.\nhint: see [source] \
         tables and exclude, and `SELECT * FROM pg_publication_tables`"
    )]
    NoTable { asked: String, publications: String },
    #[error("{what} met a bug: {why}")]
    Bug { what: &'static str, why: String },
    #[error("the snapshot of the copy is lost")]
    SnapshotLost,
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
