//! What a running replicator is asked to do.

#![deny(missing_docs)]

use crate::pgoutput::QualifiedName;
/// What the running session is asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Copy this table again.
    Resync(QualifiedName),
    /// Begin no more chunks and give the snapshot back, or go on.
    Pause(bool),
}
