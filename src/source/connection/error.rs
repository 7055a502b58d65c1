//! Why rhei did not reach a server, or why the server refused the session.

use std::time::Duration;

use super::SourceOptions;
use crate::source::{
    quote::quote_identifier,
    sqlstate::{self, Refusal},
};

/// Rhei cannot reach the source, or the source refuses the session.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error(
        "invalid connection string\ndetail: {reason}\nhint: for example \
         postgresql://rhei@db.example.com/shop?sslmode=verify-full"
    )]
    Invalid { reason: String },
    #[error(
        "no source given\nhint: use --source URL, RHEI_SOURCE_URL, or [source] url in rhei.toml"
    )]
    NoSource,
    #[error(
        "cannot reach the source at {address}\ndetail: {detail}\nhint: check host, port, firewall \
         and listen_addresses"
    )]
    Unreachable { address: String, detail: String },
    #[error("the source at {address} did not answer within {} s\nhint: check host, port and \
             firewall; connect_timeout in the URL changes the limit", .after.as_secs())]
    TimedOut { address: String, after: Duration },
    #[error(
        "password authentication failed for user \"{user}\" at {address}\nhint: give the password \
         in [source] password_file, PGPASSWORD, ~/.pgpass or the URL"
    )]
    Password { user: String, address: String },
    #[error(
        "the source at {address} asks for a password and none was given\nhint: give it in \
         [source] password_file, PGPASSWORD, ~/.pgpass or the URL"
    )]
    NoPassword { address: String },
    #[error(
        "the source at {address} does not let user \"{user}\" in: {message}\nhint: see pg_hba.conf \
         at the source, where a replication connection matches the database's own line, and \
         whether the role may log in: ALTER ROLE {} LOGIN", quote_identifier(.user)
    )]
    NotAllowed { user: String, address: String, message: String },
    #[error(
        "user \"{user}\" may not connect to database \"{database}\" at {address}\nhint: GRANT \
         CONNECT ON DATABASE {} TO {}", quote_identifier(.database), quote_identifier(.user)
    )]
    MayNotConnect { user: String, database: String, address: String },
    #[error(
        "user \"{user}\" may not replicate\nhint: ALTER ROLE {} REPLICATION at the source; at RDS \
         and Aurora: GRANT rds_replication TO {}", quote_identifier(.user), quote_identifier(.user)
    )]
    MayNotReplicate { user: String },
    #[error(
        "a connection pooler answers at {address}, and rhei needs sessions with the server \
         itself\ndetail: {detail}\nhint: name the server's own address in the source URL: its port \
         is usually 5432 where a pooler has 6432 or 6543; at Neon the host without \"-pooler\", at \
         Supabase the direct connection, behind RDS Proxy the instance's or cluster's endpoint"
    )]
    Pooler { address: String, detail: String },
    #[error(
        "database \"{database}\" does not exist at {address}\nhint: check the name in the source \
         URL"
    )]
    NoDatabase { database: String, address: String },
    #[error(
        "TLS with {address} failed\ndetail: {detail}\nhint: a server on another machine has to \
         prove who it is (sslmode=verify-full) unless the URL says otherwise: sslrootcert=FILE \
         names its authority, sslmode=require encrypts without proof, sslmode=disable does not \
         encrypt"
    )]
    Tls { address: String, detail: String },
    #[error("the source at {address} takes no connection now: {message}")]
    Busy { address: String, message: String },
    #[error("the source at {address} refused the connection: {message}")]
    Refused { address: String, message: String },
}

impl ConnectError {
    /// Returns the SQL after which the error is gone, if there is such SQL.
    pub fn sql(&self) -> Option<String> {
        match self {
            Self::MayNotConnect { user, database, .. } => Some(format!(
                "GRANT CONNECT ON DATABASE {} TO {}",
                quote_identifier(database),
                quote_identifier(user)
            )),
            Self::MayNotReplicate { user } => {
                Some(format!("ALTER ROLE {} REPLICATION", quote_identifier(user)))
            }
            _ => None,
        }
    }

    /// Returns whether the role lacks a right that it needs for the session.
    pub fn is_missing_right(&self) -> bool {
        matches!(self, Self::MayNotReplicate { .. })
    }

    /// Returns whether trying again later may help (trap 31).
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::TimedOut { .. } | Self::Busy { .. })
    }
}

pub(in crate::source) fn from_error(
    error: &tokio_postgres::Error,
    source: &SourceOptions,
    address: &str,
) -> ConnectError {
    let address = address.to_owned();
    if let Some(server) = error.as_db_error() {
        return from_sqlstate(server.code().code(), server.message(), source, address);
    }

    let detail = crate::error::error_chain(error);
    if detail.contains("password missing") {
        ConnectError::NoPassword { address }
    } else if detail.to_lowercase().contains("tls") || detail.to_lowercase().contains("certificate")
    {
        ConnectError::Tls { address, detail }
    } else {
        ConnectError::Unreachable { address, detail }
    }
}

/// Translates the SQLSTATE of a refused session into an error.
pub(in crate::source) fn from_sqlstate(
    code: &str,
    message: &str,
    source: &SourceOptions,
    address: String,
) -> ConnectError {
    let (user, message) = (source.user().to_owned(), message.to_owned());

    match code {
        "28P01" => ConnectError::Password { user, address },
        "28000" => ConnectError::NotAllowed { user, address, message },
        "42501" => {
            let database = source.database().to_owned();
            ConnectError::MayNotConnect { user, database, address }
        }
        // PostgreSQL sends it for messages that break the protocol, and rhei sends none.
        "08P01" => ConnectError::Pooler { address, detail: message },
        "3D000" => ConnectError::NoDatabase { database: source.database().to_owned(), address },
        _ => match sqlstate::refusal(code) {
            // A cancel that was meant for a statement can hit a session that is only being opened.
            Refusal::Locked | Refusal::Passing | Refusal::Outage => {
                ConnectError::Busy { address, message }
            }
            Refusal::Data | Refusal::Lasting => ConnectError::Refused { address, message },
        },
    }
}
