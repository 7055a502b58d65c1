//! SQL sessions in which every setting that changes results is pinned.

use tokio_postgres::config::TargetSessionAttrs;

use super::{
    ConnectError, SourceOptions,
    error::from_error,
    options::{KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, TCP_USER_TIMEOUT},
    tls,
};

/// Settings that shape the text of values, and timeouts that must not end a long copy (traps 11,
/// 73). Given at startup, they override the settings of the role and the database.
pub(in crate::source) const SESSION_SETTINGS: [(&str, &str); 15] = [
    ("DateStyle", "ISO"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("lc_monetary", "C"),
    ("search_path", "pg_catalog"),
    ("row_security", "off"),
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
    ("client_min_messages", "warning"),
    // Of a role that only reads by default; making a publication is a write.
    ("default_transaction_read_only", "off"),
    // The planner estimates catalog queries as expensive, and compiling such a query takes longer
    // than running it.
    ("jit", "off"),
];

/// A timeout that only newer servers have.
pub(in crate::source) const DISABLE_TRANSACTION_TIMEOUT: &str = "\
    SELECT pg_catalog.set_config(name, '0', false) \
    FROM pg_catalog.pg_settings WHERE name = 'transaction_timeout'";

/// A SQL session whose connection ends with the session.
pub struct SqlClient {
    client: tokio_postgres::Client,
    connection: tokio::task::JoinHandle<()>,
}

impl std::ops::Deref for SqlClient {
    type Target = tokio_postgres::Client;

    fn deref(&self) -> &tokio_postgres::Client {
        &self.client
    }
}

impl Drop for SqlClient {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Opens a SQL session with pinned settings. `purpose` becomes part of `application_name`.
pub async fn connect_sql(source: &SourceOptions, purpose: &str) -> Result<SqlClient, ConnectError> {
    let connector = tls::connector(&source.tls)?;

    let mut config = source.config.clone();
    config.application_name(format!("rhei/{purpose}"));
    if let Some((idle, interval)) = source.keepalives() {
        config.keepalives_idle(idle.min(KEEPALIVE_IDLE));
        config.keepalives_interval(interval.unwrap_or(KEEPALIVE_INTERVAL));
    }

    config.tcp_user_timeout(source.tcp_user_timeout().unwrap_or(TCP_USER_TIMEOUT));

    let connect = |config: tokio_postgres::Config| {
        let connector = connector.clone();
        let connecting = async move { config.connect(connector).await };
        tokio::time::timeout(source.connect_timeout() * 2, Box::pin(connecting))
    };

    let mut primary = config.clone();
    primary.target_session_attrs(TargetSessionAttrs::ReadWrite);
    let is_choice = source.addresses().len() > 1
        && config.get_target_session_attrs() == TargetSessionAttrs::Any;

    // Of several servers the session takes the primary; when none is a primary, the server that
    // answers gives the reason for the refusal.
    let connected = match if is_choice { connect(primary).await.ok() } else { None } {
        Some(Ok(connected)) => Ok(Ok(connected)),
        _ => connect(config).await,
    };

    let address =
        || source.addresses().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");

    let (client, connection) = match connected {
        Err(_) => {
            return Err(ConnectError::TimedOut {
                address: address(),
                after: source.connect_timeout(),
            });
        }
        Ok(connected) => connected.map_err(|error| from_error(&error, source, &address()))?,
    };

    let connection = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(error = %error, "a SQL session ended");
        }
    });

    let client = SqlClient { client, connection };

    let mut pins = String::new();
    for (name, value) in SESSION_SETTINGS {
        pins.push_str(&format!("SET {name} = '{value}'; "));
    }
    pins.push_str(DISABLE_TRANSACTION_TIMEOUT);

    client.batch_execute(&pins).await.map_err(|error| from_error(&error, source, &address()))?;
    Ok(client)
}

/// Returns whether a pooler gives the statements of one session to several sessions of the server.
/// Then the settings of a session do not last, and what rhei reads may differ from what is stored
/// (trap 85).
///
/// A pooler that gives a server's session back after each transaction lets a second session have
/// it, or gives the first one another when the second one keeps it.
pub async fn is_pooled_by_transaction(source: &SourceOptions) -> Result<bool, ConnectError> {
    let refused = |error: tokio_postgres::Error| {
        let address = source.addresses().first().map(ToString::to_string).unwrap_or_default();
        from_error(&error, source, &address)
    };
    let pid_of = async |client: &SqlClient| -> Result<i32, tokio_postgres::Error> {
        client.query_one("SELECT pg_backend_pid()", &[]).await?.try_get(0)
    };

    let (one, other) = (connect_sql(source, "check").await?, connect_sql(source, "check").await?);
    let before = pid_of(&one).await.map_err(refused)?;

    other.batch_execute("BEGIN").await.map_err(refused)?;
    let of_other = pid_of(&other).await.map_err(refused)?;
    let after = pid_of(&one).await.map_err(refused)?;
    other.batch_execute("COMMIT").await.map_err(refused)?;

    Ok(before == of_other || before != after)
}
