//! Connecting to a server: the connection string, TLS, and SQL sessions.

pub mod conninfo;
pub mod error;
pub mod options;
pub mod sql;
pub mod tls;

pub use error::ConnectError;
pub use options::{Environment, SourceOptions};
pub use sql::{SqlClient, connect_sql, is_pooled_by_transaction};
