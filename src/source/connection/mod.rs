//! Reaching a server: what the connection string says, TLS, and sessions for SQL.

pub mod conninfo;
pub mod error;
pub mod options;
pub mod sql;
pub mod tls;

pub use error::ConnectError;
pub use options::{Environment, SourceOptions};
pub use sql::{SqlClient, connect_sql};
