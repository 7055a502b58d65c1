//! All errors at the source.

#![deny(missing_docs)]

use tokio_postgres::error::SqlState;

use super::{catalog, connection, copy_binary, recording, slot, spool, wire};

/// Any error at the source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No server was reached, or the server did not let rhei in.
    #[error(transparent)]
    Connect(#[from] connection::ConnectError),
    /// The replication connection broke or brought invalid frames, or the server refused there.
    #[error(transparent)]
    Wire(#[from] wire::WireError),
    /// A message of the stream is no valid pgoutput message.
    #[error(transparent)]
    Pgoutput(#[from] crate::pgoutput::message::DecodeError),
    /// The messages of the stream do not form transactions, or take too much memory.
    #[error(transparent)]
    Assemble(#[from] crate::change::assemble::AssembleError),
    /// The rows of a COPY are invalid, or hold a value that rhei cannot store.
    #[error(transparent)]
    Copy(#[from] copy_binary::CopyError),
    /// Source and copy do not fit together, or the source is not set up; the text has the remedy.
    #[error(transparent)]
    Slot(#[from] slot::SlotError),
    /// The catalogs did not answer, or answered in a form that rhei does not know.
    #[error(transparent)]
    Catalog(#[from] catalog::CatalogError),
    /// A query other than to the catalogs failed; without an SQLSTATE the connection is the cause.
    #[error("the source refused a query")]
    Query(#[from] tokio_postgres::Error),
    /// A transaction that has not ended cannot be kept, or its stream is invalid.
    #[error(transparent)]
    Spool(#[from] spool::SpoolError),
    /// A recorded stream cannot be read.
    #[error(transparent)]
    Recorded(#[from] recording::RecordedError),
    /// A publication is missing at the source, which skips its changes from here on. Only a new
    /// copy brings them.
    #[error(
        "the source skips changes: {message}\ndetail: A publication of this pipeline is missing at \
         the source, so changes may be lost from here on.\nhint: restore the publication, then \
         copy again with `rhei backfill --force`"
    )]
    PublicationSkipped {
        /// The warning of the server, in the server's language.
        message: String,
    },
    /// The address leads to another server than the one that was verified. The next session
    /// verifies the server that answers then.
    #[error(
        "another server answers than the one that was verified before (timeline {}, was \
         {timeline}; system identifier {}, was {system_id})\n\
         detail: The address, or one of several, leads to another server since.\n\
         hint: after a failover rhei goes on by itself once all of them lead to the new \
         primary", .found.timeline, .found.system_id
    )]
    AnotherServer {
        /// The system identifier of the server that was verified.
        system_id: String,
        /// The timeline of the server that was verified.
        timeline: u32,
        /// What the server that answered says of itself.
        found: wire::IdentifySystem,
    },
    /// The server ended the stream in good order, as it does when it shuts down.
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
