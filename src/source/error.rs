//! All errors at the source.

use tokio_postgres::error::SqlState;

use super::{catalog, connection, copy_binary, recording, slot, spool, wire};

/// Any error at the source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error(transparent)]
    Connect(#[from] connection::ConnectError),
    #[error(transparent)]
    Wire(#[from] wire::WireError),
    #[error(transparent)]
    Pgoutput(#[from] crate::pgoutput::message::DecodeError),
    #[error(transparent)]
    Assemble(#[from] crate::change::assemble::AssembleError),
    #[error(transparent)]
    Copy(#[from] copy_binary::CopyError),
    #[error(transparent)]
    Slot(#[from] slot::SlotError),
    #[error(transparent)]
    Catalog(#[from] catalog::CatalogError),
    #[error("the source refused a query")]
    Query(#[from] tokio_postgres::Error),
    #[error(transparent)]
    Spool(#[from] spool::SpoolError),
    #[error(transparent)]
    Recorded(#[from] recording::RecordedError),
    #[error(
        "the source skips changes: {message}\ndetail: A publication of this pipeline is missing at \
         the source, so changes may be lost from here on.\nhint: restore the publication, then \
         copy again with `rhei backfill --force`"
    )]
    PublicationSkipped { message: String },
    #[error(
        "another server answers than the one that was verified before (timeline {}, was \
         {timeline}; system identifier {}, was {system_id})\n\
         detail: The address, or one of several, leads to another server since.\n\
         hint: after a failover rhei goes on by itself once all of them lead to the new \
         primary", .found.timeline, .found.system_id
    )]
    AnotherServer { system_id: String, timeline: u32, found: wire::IdentifySystem },
    #[error("the source ended the stream")]
    StreamEnded,
}

impl SourceError {
    /// Returns whether the statement waited for the lock of another session as long as
    /// `lock_timeout` allows.
    pub fn is_locked(&self) -> bool {
        match self {
            Self::Catalog(error) => error.is_locked(),
            Self::Query(error) => error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE),
            Self::Wire(wire::WireError::Server(message)) => {
                message.code == SqlState::LOCK_NOT_AVAILABLE.code()
            }
            _ => false,
        }
    }

    /// Returns whether the error is about a legal value that the target cannot represent.
    pub fn is_unrepresentable(&self) -> bool {
        match self {
            Self::Copy(copy_binary::CopyError::Value { source, .. }) => source.is_unrepresentable(),
            _ => false,
        }
    }

    /// Returns whether the error is about the contents of a table, so that other tables can
    /// continue.
    pub fn is_about_values(&self) -> bool {
        matches!(self, Self::Copy(copy_binary::CopyError::Value { .. }))
    }
}
