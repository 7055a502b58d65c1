//! The messages of a logical replication stream, pure: bytes to messages, no I/O, nothing of what
//! they lead to.
//!
//! `message` reads the messages of the pgoutput plugin, `tuple` the rows in them, `relation` is
//! what a Relation message says of a table, and `table_description` what the optional event trigger
//! at the source says.

pub mod message;
pub mod relation;
pub mod table_description;
pub mod tuple;

pub use relation::{QualifiedName, ReplicaIdentity};
