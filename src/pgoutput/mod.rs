//! The messages of a logical replication stream. The module is pure: it turns bytes into messages,
//! does no I/O, and knows nothing of the effect of the messages.
//!
//! `message` reads the messages of the pgoutput plugin, `tuple` the rows in them, `relation` holds
//! the description of a table in a Relation message, and `table_description` the description that
//! the optional event trigger at the source sends.

pub mod message;
pub mod relation;
pub mod table_description;
pub mod tuple;

pub use relation::{QualifiedName, ReplicaIdentity};
