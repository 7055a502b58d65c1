//! Reaching a server: the connection string, what stands in `~/.pgpass` and `pg_service.conf`,
//! hosts, timeouts, and SQL sessions whose settings are pinned. The replication socket (`wire`)
//! uses the same answers.

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio_postgres::config::{Host, TargetSessionAttrs};

use super::{
    sqlstate::{self, Refusal},
    tls::{self, SslMode, TlsSettings},
};

/// What libpq would read from its surroundings. Empty unless taken from the process.
#[derive(Clone, Default)]
pub struct Environment {
    variables: HashMap<String, String>,
    home: Option<PathBuf>,
}

impl Environment {
    pub fn from_process() -> Self {
        let is_ours = |name: &str| name.starts_with("PG");
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| is_ours(name))
            .collect();
        Self { variables, home: std::env::var_os("HOME").map(PathBuf::from) }
    }

    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.variables.insert(name.to_owned(), value.to_owned());
        self
    }

    #[must_use]
    pub fn with_home(mut self, home: &Path) -> Self {
        self.home = Some(home.to_owned());
        self
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn file(&self, variable: &str, in_home: &str) -> Option<PathBuf> {
        self.get(variable).map(PathBuf::from).or_else(|| Some(self.home.as_ref()?.join(in_home)))
    }
}

/// Where the source is and how to get in. Never prints its password.
#[derive(Clone)]
pub struct SourceOptions {
    config: tokio_postgres::Config,
    pub(super) tls: TlsSettings,
}

impl fmt::Debug for SourceOptions {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_tuple("SourceOptions").field(&self.redacted()).finish()
    }
}

/// One address to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Address {
    Tcp { host: String, connect_to: String, port: u16 },
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port, .. } => write!(out, "{host}:{port}"),
            Self::Unix(path) => write!(out, "{}", path.display()),
        }
    }
}

/// The source cannot be reached, or does not let us in.
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
         in PGPASSWORD, ~/.pgpass or the URL"
    )]
    Password { user: String, address: String },
    #[error(
        "the source at {address} asks for a password and none was given\nhint: give it in \
         PGPASSWORD, ~/.pgpass or the URL"
    )]
    NoPassword { address: String },
    #[error(
        "the source at {address} does not let user \"{user}\" in: {message}\nhint: see pg_hba.conf \
         at the source; a replication connection matches the database's own line"
    )]
    NotAllowed { user: String, address: String, message: String },
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
    /// Whether trying again later may help (trap 31).
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::TimedOut { .. } | Self::Busy { .. })
    }
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

// Of all connections. libpq's default idle time is hours; a dead peer should be noticed within a
// minute (trap 27).
pub(super) const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
pub(super) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
pub(super) const TCP_USER_TIMEOUT: Duration = Duration::from_secs(60);

impl SourceOptions {
    /// Reads a libpq URL or `key=value` string, with what the environment adds.
    ///
    /// # Errors
    /// The string or a file it names makes no sense; the message never shows the password.
    pub fn parse(text: &str, environment: &Environment) -> Result<Self, ConnectError> {
        let text = text.trim();
        let (mut rest, mut ours) = split_settings(text)?;
        if let Some(service) =
            ours.remove("service").or_else(|| environment.get("PGSERVICE").map(str::to_owned))
        {
            let (service_rest, service_ours) =
                split_settings(&read_service(&service, environment)?)?;
            // What is said directly stands before what the service says.
            if rest.is_empty() {
                rest = service_rest;
            } else if !is_url(&rest) {
                rest = format!("{service_rest} {rest}");
            }
            for (key, value) in service_ours {
                ours.entry(key).or_insert(value);
            }
        }
        if rest.is_empty() && environment.get("PGHOST").is_none() {
            return Err(ConnectError::NoSource);
        }
        let mut config: tokio_postgres::Config =
            rest.parse().map_err(|error: tokio_postgres::Error| {
                // The cause names the key, never the value.
                ConnectError::Invalid { reason: crate::error::with_causes(&error) }
            })?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            match environment.get("PGHOST") {
                Some(host) => config.host(host),
                None => config.host("localhost"),
            };
        }
        let is_torn = |host: &Host| matches!(host, Host::Tcp(host) if host.contains(['@', '/']));
        if config.get_hosts().iter().any(is_torn) {
            // Part of the password, perhaps: it is not shown.
            let reason =
                "the host holds an @ or a /; in a URL's password they are written as %40 and %2F"
                    .to_owned();
            return Err(ConnectError::Invalid { reason });
        }
        if config.get_ports().is_empty()
            && let Some(port) = environment.get("PGPORT").and_then(|port| port.parse().ok())
        {
            config.port(port);
        }
        if config.get_user().is_none() {
            match environment.get("PGUSER").or_else(|| environment.get("USER")) {
                Some(user) => config.user(user),
                None => {
                    config.user(std::env::var("USER").unwrap_or_else(|_| "postgres".to_owned()))
                }
            };
        }
        if config.get_dbname().is_none() {
            let database =
                environment.get("PGDATABASE").or(config.get_user()).unwrap_or_default().to_owned();
            config.dbname(database);
        }
        if config.get_password().is_none()
            && let Some(password) = environment.get("PGPASSWORD")
        {
            config.password(password);
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        let mut setting = |key: &str, variable: &str| {
            ours.remove(key)
                .or_else(|| environment.get(variable).map(str::to_owned))
                .filter(|value| !value.is_empty())
        };
        let mode = setting("sslmode", "PGSSLMODE");
        let passfile = setting("passfile", "PGPASSFILE").map(PathBuf::from);
        let root_certificate = setting("sslrootcert", "PGSSLROOTCERT");
        let is_system = root_certificate.as_deref() == Some("system");
        let tls = TlsSettings {
            mode: match mode {
                Some(text) => SslMode::parse(&text).ok_or_else(|| ConnectError::Invalid {
                    reason: format!(
                        "sslmode \"{text}\" is unknown; expected disable, allow, prefer, require, \
                         verify-ca or verify-full"
                    ),
                })?,
                None if is_system || goes_elsewhere(&config) => SslMode::VerifyFull,
                None => SslMode::Prefer,
            },
            root_certificate,
            certificate: setting("sslcert", "PGSSLCERT").map(PathBuf::from),
            key: setting("sslkey", "PGSSLKEY").map(PathBuf::from),
        };
        // Anybody can have a certificate of a public authority: without the name it proves nothing.
        if is_system && tls.mode != SslMode::VerifyFull {
            let reason =
                "sslrootcert=system goes with sslmode=verify-full only, as with libpq".to_owned();
            return Err(ConnectError::Invalid { reason });
        }
        config.ssl_mode(match tls.mode {
            SslMode::Disable => tokio_postgres::config::SslMode::Disable,
            SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => {
                tokio_postgres::config::SslMode::Require
            }
        });
        if config.get_password().is_none() {
            let file = passfile.or_else(|| environment.file("PGPASSFILE", ".pgpass"));
            if let Some(password) = file.and_then(|file| password_from(&file, &config)) {
                config.password(password);
            }
        }
        Ok(Self { config, tls })
    }

    /// `user@host:port/database`, for logs and messages.
    pub fn redacted(&self) -> String {
        let addresses: Vec<String> = self.addresses().iter().map(ToString::to_string).collect();
        format!("{}@{}/{}", self.user(), addresses.join(","), self.database())
    }

    /// A `key=value` string that leads to the same place, without the password.
    pub fn url_without_password(&self) -> String {
        let quoted = |text: &str| format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"));
        let (mut hosts, mut ports) = (Vec::new(), Vec::new());
        for address in self.addresses() {
            match address {
                Address::Tcp { host, port, .. } => {
                    hosts.push(host);
                    ports.push(port.to_string());
                }
                Address::Unix(path) => {
                    let port = path.extension().map_or_else(
                        || "5432".to_owned(),
                        |port| port.to_string_lossy().into_owned(),
                    );
                    hosts.push(
                        path.parent()
                            .map_or_else(String::new, |folder| folder.display().to_string()),
                    );
                    ports.push(port);
                }
            }
        }
        let mode = match self.tls.mode {
            SslMode::Disable => "disable",
            SslMode::Prefer => "prefer",
            SslMode::Require => "require",
            SslMode::VerifyCa => "verify-ca",
            SslMode::VerifyFull => "verify-full",
        };
        let mut text = format!(
            "host={} port={} user={} dbname={} sslmode={mode}",
            quoted(&hosts.join(",")),
            ports.join(","),
            quoted(self.user()),
            quoted(self.database())
        );
        if let Some(root) = &self.tls.root_certificate {
            text.push_str(&format!(" sslrootcert={}", quoted(root)));
        }
        for (key, file) in [("sslcert", &self.tls.certificate), ("sslkey", &self.tls.key)] {
            if let Some(file) = file {
                text.push_str(&format!(" {key}={}", quoted(&file.display().to_string())));
            }
        }
        text
    }

    pub fn user(&self) -> &str {
        self.config.get_user().unwrap_or_default()
    }

    pub fn database(&self) -> &str {
        self.config.get_dbname().unwrap_or_default()
    }

    pub(super) fn password(&self) -> Option<&[u8]> {
        self.config.get_password()
    }

    pub(super) fn options(&self) -> Option<&str> {
        self.config.get_options()
    }

    pub(super) fn connect_timeout(&self) -> Duration {
        self.config.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT)
    }

    pub(super) fn channel_binding(&self) -> tokio_postgres::config::ChannelBinding {
        self.config.get_channel_binding()
    }

    pub(super) fn tcp_user_timeout(&self) -> Option<Duration> {
        self.config.get_tcp_user_timeout().copied()
    }

    pub(super) fn keepalives(&self) -> Option<(Duration, Option<Duration>)> {
        self.config
            .get_keepalives()
            .then(|| (self.config.get_keepalives_idle(), self.config.get_keepalives_interval()))
    }

    /// The addresses to try, in order.
    pub(super) fn addresses(&self) -> Vec<Address> {
        let ports = self.config.get_ports();
        let port = |at: usize| ports.get(at).or_else(|| ports.first()).copied().unwrap_or(5432);
        let (hosts, numbers) = (self.config.get_hosts(), self.config.get_hostaddrs());
        (0..hosts.len().max(numbers.len()))
            .map(|at| match (hosts.get(at), numbers.get(at)) {
                (Some(Host::Unix(folder)), _) => {
                    Address::Unix(folder.join(format!(".s.PGSQL.{}", port(at))))
                }
                (Some(Host::Tcp(host)), number) => Address::Tcp {
                    host: host.clone(),
                    connect_to: number.map_or_else(|| host.clone(), ToString::to_string),
                    port: port(at),
                },
                (None, number) => {
                    let number = number.map(ToString::to_string).unwrap_or_default();
                    Address::Tcp { host: number.clone(), connect_to: number, port: port(at) }
                }
            })
            .collect()
    }
}

/// Whether a connection may leave this machine.
fn goes_elsewhere(config: &tokio_postgres::Config) -> bool {
    use std::net::IpAddr;
    let (hosts, numbers) = (config.get_hosts(), config.get_hostaddrs());
    (0..hosts.len().max(numbers.len())).any(|at| match (hosts.get(at), numbers.get(at)) {
        (Some(Host::Unix(_)), _) => false,
        (_, Some(number)) => !number.is_loopback(),
        (Some(Host::Tcp(host)), None) => {
            !host.eq_ignore_ascii_case("localhost")
                && !host.parse::<IpAddr>().is_ok_and(|number| number.is_loopback())
        }
        (None, None) => false,
    })
}

fn is_url(text: &str) -> bool {
    text.starts_with("postgres://") || text.starts_with("postgresql://")
}

/// Keys that tokio-postgres does not know, or not all values of.
const OURS: [&str; 6] = ["sslmode", "sslrootcert", "sslcert", "sslkey", "service", "passfile"];

type Split = (String, HashMap<String, String>);

/// Takes our keys out of a connection string.
fn split_settings(text: &str) -> Result<Split, ConnectError> {
    let mut ours = HashMap::new();
    if is_url(text) {
        let Some((base, query)) = text.split_once('?') else { return Ok((text.to_owned(), ours)) };
        let mut kept = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some((key, value)) if OURS.contains(&key) => {
                    ours.insert(key.to_owned(), percent_decoded(value)?);
                }
                _ => kept.push(pair),
            }
        }
        let query = if kept.is_empty() { String::new() } else { format!("?{}", kept.join("&")) };
        return Ok((format!("{base}{query}"), ours));
    }
    let mut kept = Vec::new();
    for (key, value) in pairs(text)? {
        if OURS.contains(&key.as_str()) {
            ours.insert(key, value);
        } else {
            kept.push(format!("{key}='{}'", value.replace('\\', "\\\\").replace('\'', "\\'")));
        }
    }
    Ok((kept.join(" "), ours))
}

fn percent_decoded(text: &str) -> Result<String, ConnectError> {
    let invalid =
        || ConnectError::Invalid { reason: "a percent escape in the URL is broken".to_owned() };
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte == b'%' {
            let (digits, after) = rest.split_at_checked(2).ok_or_else(invalid)?;
            let digits = std::str::from_utf8(digits).map_err(|_| invalid())?;
            bytes.push(u8::from_str_radix(digits, 16).map_err(|_| invalid())?);
            rest = after;
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).map_err(|_| invalid())
}

/// `key = value` pairs, values bare or in single quotes with backslash escapes.
fn pairs(text: &str) -> Result<Vec<(String, String)>, ConnectError> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let Some((key, after)) = rest.split_once('=') else {
            return Err(ConnectError::Invalid {
                reason: "expected key=value pairs or a URL".to_owned(),
            });
        };
        // It may be a URL that is misspelt, with a password in it.
        if !key
            .trim()
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        {
            let reason =
                "expected key=value pairs, or a URL that begins with postgresql://".to_owned();
            return Err(ConnectError::Invalid { reason });
        }
        let after = after.trim_start();
        let is_quoted = after.starts_with('\'');
        let mut value = String::new();
        let mut characters = after.char_indices().skip(usize::from(is_quoted));
        let mut end = after.len();
        let mut is_closed = !is_quoted;
        while let Some((at, character)) = characters.next() {
            match character {
                '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
                '\'' if is_quoted => {
                    (end, is_closed) = (at + 1, true);
                    break;
                }
                blank if !is_quoted && blank.is_whitespace() => {
                    end = at;
                    break;
                }
                other => value.push(other),
            }
        }
        if !is_closed {
            return Err(ConnectError::Invalid {
                reason: format!("the value of {} has no closing quote", key.trim()),
            });
        }
        found.push((key.trim().to_owned(), value));
        rest = after.get(end..).unwrap_or_default().trim_start();
    }
    Ok(found)
}

fn read_service(service: &str, environment: &Environment) -> Result<String, ConnectError> {
    let invalid = |reason: String| ConnectError::Invalid { reason };
    let file = environment.file("PGSERVICEFILE", ".pg_service.conf").ok_or_else(|| {
        invalid(format!(
            "service \"{service}\" is named, but there is no home folder to look it up"
        ))
    })?;
    let text = std::fs::read_to_string(&file).map_err(|error| {
        invalid(format!("service \"{service}\": cannot read {}: {error}", file.display()))
    })?;
    let mut is_inside = false;
    let mut found: Option<Vec<String>> = None;
    for line in
        text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            is_inside = name == service;
            if is_inside {
                found.get_or_insert_default();
            }
        } else if let (true, Some((key, value))) = (is_inside, line.split_once('=')) {
            let value = value.trim().replace('\\', "\\\\").replace('\'', "\\'");
            found.get_or_insert_default().push(format!("{}='{value}'", key.trim()));
        }
    }
    let settings = found
        .ok_or_else(|| invalid(format!("service \"{service}\" is not in {}", file.display())))?;
    Ok(settings.join(" "))
}

/// The first line of a password file that fits. A file that others can read is not used, as with
/// libpq.
fn password_from(file: &Path, config: &tokio_postgres::Config) -> Option<String> {
    let data = std::fs::metadata(file).ok()?;
    if std::os::unix::fs::MetadataExt::mode(&data) & 0o077 != 0 {
        tracing::warn!(file = %file.display(), "password file ignored: others can read it; chmod \
             600 mends that");
        return None;
    }
    let text = std::fs::read_to_string(file).ok()?;
    let host = match config.get_hosts().first()? {
        Host::Tcp(host) => host.clone(),
        Host::Unix(_) => "localhost".to_owned(),
    };
    let port = config.get_ports().first().copied().unwrap_or(5432).to_string();
    let wanted = [host.as_str(), &port, config.get_dbname()?, config.get_user()?];
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = password_fields(line);
        let (password, keys) = fields.split_last()?;
        let fits = keys.len() == 4
            && keys.iter().zip(wanted).all(|(field, wanted)| field == "*" || field == wanted);
        fits.then(|| password.clone())
    })
}

fn password_fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            // The password itself may hold colons.
            ':' if fields.len() < 5 => fields.push(String::new()),
            '\\' => fields.last_mut().into_iter().for_each(|field| field.extend(characters.next())),
            other => fields.last_mut().into_iter().for_each(|field| field.push(other)),
        }
    }
    fields
}

/// Settings that shape the text of values, and timeouts that must not end a long copy (traps 11,
/// 73). Given at startup, they win over those of the role and the database.
pub(super) const PINNED: [(&str, &str); 14] = [
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
    // Questions to the catalogs look expensive to the planner, and compiling one takes longer than
    // to answer it.
    ("jit", "off"),
];

/// A timeout that only newer servers have.
pub(super) const UNTIMED: &str = "SELECT pg_catalog.set_config(name, '0', false) FROM \
                                  pg_catalog.pg_settings WHERE name = 'transaction_timeout'";

/// A SQL session; its connection ends with it.
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
    // Of several servers the primary; when there is none, whichever answers says why that will not
    // do.
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
        Ok(connected) => connected.map_err(|error| explain(&error, source, &address()))?,
    };
    let connection = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(error = %error, "a SQL session ended");
        }
    });
    let client = SqlClient { client, connection };
    let mut pins = String::new();
    for (name, value) in PINNED {
        pins.push_str(&format!("SET {name} = '{value}'; "));
    }
    pins.push_str(UNTIMED);
    client.batch_execute(&pins).await.map_err(|error| explain(&error, source, &address()))?;
    Ok(client)
}

fn explain(error: &tokio_postgres::Error, source: &SourceOptions, address: &str) -> ConnectError {
    let address = address.to_owned();
    if let Some(server) = error.as_db_error() {
        return refusal(server.code().code(), server.message(), source, address);
    }
    let detail = crate::error::with_causes(error);
    if detail.contains("password missing") {
        ConnectError::NoPassword { address }
    } else if detail.to_lowercase().contains("tls") || detail.to_lowercase().contains("certificate")
    {
        ConnectError::Tls { address, detail }
    } else {
        ConnectError::Unreachable { address, detail }
    }
}

/// What it means that the server did not let us in, by its SQLSTATE.
pub(super) fn refusal(
    code: &str,
    message: &str,
    source: &SourceOptions,
    address: String,
) -> ConnectError {
    let (user, message) = (source.user().to_owned(), message.to_owned());
    match code {
        "28P01" => ConnectError::Password { user, address },
        "28000" | "42501" => ConnectError::NotAllowed { user, address, message },
        "3D000" => ConnectError::NoDatabase { database: source.database().to_owned(), address },
        _ => match sqlstate::refusal(code) {
            // A cancel that was meant for a statement can meet a session that is only being opened.
            Refusal::Locked | Refusal::Passing | Refusal::Outage => {
                ConnectError::Busy { address, message }
            }
            Refusal::Data | Refusal::Lasting => ConnectError::Refused { address, message },
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_password_is_never_printed() {
        let options =
            SourceOptions::parse("postgresql://u:hush@h:1/d", &Environment::default()).unwrap();
        assert_eq!(format!("{options:?}"), "SourceOptions(\"u@h:1/d\")");
        let broken = SourceOptions::parse("postgresql://u:hush@h:port/d", &Environment::default())
            .unwrap_err();
        assert!(!format!("{broken} {broken:?}").contains("hush"));
    }

    #[test]
    fn a_refusal_that_passes_by_itself_is_told_from_one_that_lasts() {
        let options = SourceOptions::parse("postgresql://u@h/d", &Environment::default()).unwrap();
        let refused = |code| refusal(code, "why", &options, "h:5432".to_owned());
        for code in ["53300", "57P03", "57014", "40P01", "XX000", "58030", "08006", "55P03"] {
            assert!(refused(code).is_transient(), "{code}");
        }
        for code in ["28P01", "28000", "3D000", "42501", "42704", "22023", "0A000", "XX001"] {
            assert!(!refused(code).is_transient(), "{code}");
        }
    }

    /// Wrong in ways that are easily typed.
    #[test]
    fn a_broken_connection_string_is_refused_without_its_password() {
        for text in [
            "postgresq://u:hush@h/d?sslmode=require",
            "postgresql:/u:hush@h/d",
            "u:hush@h/d",
            "postgresql://u:x@hush@h/d",
            "postgresql://u:hush@h/d?sslmode=strict",
            "postgresql://u:hush@h/d?unknown=1",
            "postgresql://u:hush@h:/d?port=many",
            "host=h user=u password='hush",
            "host=h user=u password=hush connect_timeout=soon",
            "host=h user=u pass word=hush",
        ] {
            match SourceOptions::parse(text, &Environment::default()) {
                Ok(options) => panic!("{text} is taken for {}", options.redacted()),
                Err(error) => {
                    assert!(
                        !format!("{error} {error:?} {}", crate::error::with_causes(&error))
                            .contains("hush")
                    );
                }
            }
        }
    }

    #[test]
    fn without_sslmode_a_server_on_another_machine_has_to_prove_who_it_is() {
        let mode =
            |text: &str| SourceOptions::parse(text, &Environment::default()).unwrap().tls.mode;
        for text in [
            "postgresql://u@db.example.com/d",
            "postgresql://u@10.0.0.1/d",
            "postgresql://u@localhost.example.com/d",
            "postgresql://u@localhost,db.example.com/d",
            "host=localhost hostaddr=10.0.0.1 user=u",
            "host='2001:db8::1' user=u",
        ] {
            assert_eq!(mode(text), SslMode::VerifyFull, "{text}");
            assert_eq!(
                mode(
                    &text
                        .replace("user=u", "user=u sslmode=prefer")
                        .replace("/d", "/d?sslmode=prefer")
                ),
                SslMode::Prefer
            );
        }
        for text in [
            "postgresql://u@localhost/d",
            "postgresql://u@127.0.0.1/d",
            "postgresql://u@127.8.0.1/d",
            "postgresql://u@[::1]/d",
            "postgresql:///d?host=/var/run/postgresql",
            "host=db.example.com hostaddr=127.0.0.1 user=u",
            "user=u",
        ] {
            assert_eq!(mode(text), SslMode::Prefer, "{text}");
        }
        let environment =
            Environment::default().with("PGSSLMODE", "require").with("PGHOST", "db.example.com");
        assert_eq!(
            SourceOptions::parse("user=u", &environment).unwrap().tls.mode,
            SslMode::Require
        );
        let environment = Environment::default().with("PGHOST", "db.example.com");
        assert_eq!(
            SourceOptions::parse("user=u", &environment).unwrap().tls.mode,
            SslMode::VerifyFull
        );
    }

    /// As with libpq.
    #[test]
    fn the_authorities_of_the_system_go_with_verify_full_only() {
        let parsed = |rest: &str| {
            let text = format!("postgresql://u@localhost/d?sslrootcert=system{rest}");
            SourceOptions::parse(&text, &Environment::default()).map(|options| options.tls.mode)
        };
        assert_eq!(parsed("").ok(), Some(SslMode::VerifyFull));
        assert_eq!(parsed("&sslmode=verify-full").ok(), Some(SslMode::VerifyFull));
        for mode in ["disable", "allow", "prefer", "require", "verify-ca"] {
            let refused = parsed(&format!("&sslmode={mode}"));
            assert!(matches!(refused, Err(ConnectError::Invalid { .. })), "{mode}: {refused:?}");
        }
        let environment =
            Environment::default().with("PGSSLROOTCERT", "system").with("PGSSLMODE", "require");
        assert!(SourceOptions::parse("postgresql://u@localhost/d", &environment).is_err());
    }

    #[test]
    fn urls_and_pairs_say_the_same() {
        let url =
            "postgresql://u@a,b:7/d?sslmode=verify-full&sslrootcert=%2Fca.pem&connect_timeout=3";
        let pairs = "user=u host='a,b' port=5432,7 dbname=d sslmode=verify-full \
                     sslrootcert=/ca.pem connect_timeout=3";
        for text in [url, pairs] {
            let options = SourceOptions::parse(text, &Environment::default()).unwrap();
            assert_eq!(options.redacted(), "u@a:5432,b:7/d", "{text}");
            assert_eq!(options.tls.mode, SslMode::VerifyFull);
            assert_eq!(options.tls.root_certificate.as_deref(), Some("/ca.pem"));
            assert_eq!(options.connect_timeout(), Duration::from_secs(3));
        }
    }

    #[test]
    fn the_password_comes_from_the_url_then_the_environment_then_the_password_file() {
        use std::os::unix::fs::PermissionsExt;
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join(".pgpass");
        std::fs::write(&file, "# comment\nother:*:*:*:no\nh:5432:*:u:from\\:file:x\n").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let environment = Environment::default().with_home(home.path());
        let password = |text: &str, environment: &Environment| {
            let options = SourceOptions::parse(text, environment).unwrap();
            options.password().map(|bytes| String::from_utf8(bytes.to_vec()).unwrap())
        };
        assert_eq!(password("postgresql://u@h/d", &environment).as_deref(), Some("from:file:x"));
        assert_eq!(password("postgresql://u@elsewhere/d", &environment), None);
        let environment = environment.with("PGPASSWORD", "from env");
        assert_eq!(password("postgresql://u@h/d", &environment).as_deref(), Some("from env"));
        assert_eq!(password("postgresql://u:url@h/d", &environment).as_deref(), Some("url"));
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(
            password("postgresql://u@h/d", &Environment::default().with_home(home.path())),
            None
        );
    }

    #[test]
    fn a_service_is_looked_up() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(
            home.path().join(".pg_service.conf"),
            "[a]\nhost=x\n[shop]\nhost=db\nuser=me\ndbname=d\nsslmode=require\n",
        )
        .unwrap();
        let environment = Environment::default().with_home(home.path());
        let options = SourceOptions::parse("service=shop", &environment).unwrap();
        assert_eq!(
            (options.redacted().as_str(), options.tls.mode),
            ("me@db:5432/d", SslMode::Require)
        );
        assert!(SourceOptions::parse("service=none", &environment).is_err());
    }
}
