//! The options of a connection: the connection string, the settings in `~/.pgpass` and
//! `pg_service.conf`, hosts, timeouts, and SQL sessions whose settings are pinned. The replication
//! socket (`wire`) uses the same options.

#![deny(missing_docs)]

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio_postgres::config::Host;

use super::{
    ConnectError,
    conninfo::{is_url, password_from, read_service, split_settings},
    tls::{SslMode, TlsSettings},
};

/// The settings that libpq would read from its surroundings, empty unless taken from the process.
#[derive(Clone, Default)]
pub struct Environment {
    variables: HashMap<String, String>,
    home: Option<PathBuf>,
}

impl Environment {
    /// Takes the variables of this process whose names begin with `PG`, and its home folder.
    pub fn from_process() -> Self {
        let is_ours = |name: &str| name.starts_with("PG");
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| is_ours(name))
            .collect();
        Self { variables, home: std::env::var_os("HOME").map(PathBuf::from) }
    }

    /// Sets a variable, such as `PGHOST`; an empty value counts as none.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.variables.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Sets the folder in which `.pgpass` and `.pg_service.conf` are looked for.
    #[must_use]
    pub fn with_home(mut self, home: &Path) -> Self {
        self.home = Some(home.to_owned());
        self
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub(super) fn file(&self, variable: &str, in_home: &str) -> Option<PathBuf> {
        self.get(variable).map(PathBuf::from).or_else(|| Some(self.home.as_ref()?.join(in_home)))
    }
}

/// The address of the source and the credentials for it. Its output never shows the password.
#[derive(Clone)]
pub struct SourceOptions {
    pub(super) config: tokio_postgres::Config,
    pub(in crate::source) tls: TlsSettings,
}

impl fmt::Debug for SourceOptions {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_tuple("SourceOptions").field(&self.redacted()).finish()
    }
}

/// One address to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::source) enum Address {
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

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

// These apply to all connections. libpq's default idle time is hours; rhei should notice a dead
// peer within a minute (trap 27).
pub(in crate::source) const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
pub(in crate::source) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
pub(in crate::source) const TCP_USER_TIMEOUT: Duration = Duration::from_secs(60);

impl SourceOptions {
    /// Reads a libpq URL or `key=value` string, and adds the settings of the environment.
    ///
    /// # Errors
    /// The string or a file it names is invalid; the message never shows the password.
    pub fn parse(text: &str, environment: &Environment) -> Result<Self, ConnectError> {
        let settings = Settings::read(text.trim(), environment)?;

        let mut config = settings.config()?;
        fill_from_environment(&mut config, environment);
        refuse_torn_host(&config)?;

        let tls = settings.tls(&config)?;
        config.ssl_mode(sql_ssl_mode(tls.mode));

        if config.get_password().is_none()
            && let Some(password) = settings.password_from_file(&config)
        {
            config.password(password);
        }

        Ok(Self { config, tls })
    }

    /// Returns `user@host:port/database`, for logs and messages.
    pub fn redacted(&self) -> String {
        let addresses: Vec<String> = self.addresses().iter().map(ToString::to_string).collect();
        format!("{}@{}/{}", self.user(), addresses.join(","), self.database())
    }

    /// Returns a `key=value` string that leads to the same server, without the password.
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

    /// Returns the name of the role that connects.
    pub fn user(&self) -> &str {
        self.config.get_user().unwrap_or_default()
    }

    /// Returns the name of the database: that of the role when no setting names another one.
    pub fn database(&self) -> &str {
        self.config.get_dbname().unwrap_or_default()
    }

    pub(in crate::source) fn password(&self) -> Option<&[u8]> {
        self.config.get_password()
    }

    pub(in crate::source) fn options(&self) -> Option<&str> {
        self.config.get_options()
    }

    pub(in crate::source) fn connect_timeout(&self) -> Duration {
        self.config.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT)
    }

    pub(in crate::source) fn channel_binding(&self) -> tokio_postgres::config::ChannelBinding {
        self.config.get_channel_binding()
    }

    pub(in crate::source) fn tcp_user_timeout(&self) -> Option<Duration> {
        self.config.get_tcp_user_timeout().copied()
    }

    pub(in crate::source) fn keepalives(&self) -> Option<(Duration, Option<Duration>)> {
        self.config
            .get_keepalives()
            .then(|| (self.config.get_keepalives_idle(), self.config.get_keepalives_interval()))
    }

    /// Returns the addresses to try, in order.
    pub(in crate::source) fn addresses(&self) -> Vec<Address> {
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

/// A connection string with the settings of its service, before the environment is added.
struct Settings<'a> {
    /// The part that tokio-postgres reads.
    rest: String,
    /// The values of the keys that rhei reads itself.
    ours: HashMap<String, String>,
    environment: &'a Environment,
}

impl<'a> Settings<'a> {
    fn read(text: &str, environment: &'a Environment) -> Result<Self, ConnectError> {
        let (mut rest, mut ours) = split_settings(text)?;
        if let Some(service) =
            ours.remove("service").or_else(|| environment.get("PGSERVICE").map(str::to_owned))
        {
            let (service_rest, service_ours) =
                split_settings(&read_service(&service, environment)?)?;
            // A setting in the string overrides the same setting of the service.
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

        Ok(Self { rest, ours, environment })
    }

    fn config(&self) -> Result<tokio_postgres::Config, ConnectError> {
        self.rest.parse().map_err(|error: tokio_postgres::Error| {
            // The cause names the key, never the value.
            ConnectError::Invalid { reason: crate::error::error_chain(&error) }
        })
    }

    /// Returns the value of a key that rhei reads itself, or that of its variable.
    fn get(&self, key: &str, variable: &str) -> Option<String> {
        self.ours
            .get(key)
            .map(String::as_str)
            .or_else(|| self.environment.get(variable))
            .filter(|value| !value.is_empty())
            .map(str::to_owned)
    }

    fn tls(&self, config: &tokio_postgres::Config) -> Result<TlsSettings, ConnectError> {
        let root_certificate = self.get("sslrootcert", "PGSSLROOTCERT");
        let is_system = root_certificate.as_deref() == Some("system");

        let mode = match self.get("sslmode", "PGSSLMODE") {
            Some(text) => SslMode::parse(&text).ok_or_else(|| ConnectError::Invalid {
                reason: format!(
                    "sslmode \"{text}\" is unknown; expected disable, allow, prefer, require, \
                     verify-ca or verify-full"
                ),
            })?,
            None if is_system || may_leave_host(config) => SslMode::VerifyFull,
            None => SslMode::Prefer,
        };

        // Anyone can get a certificate of a public authority: the certificate proves nothing
        // without the name.
        if is_system && mode != SslMode::VerifyFull {
            let reason =
                "sslrootcert=system goes with sslmode=verify-full only, as with libpq".to_owned();
            return Err(ConnectError::Invalid { reason });
        }

        Ok(TlsSettings {
            mode,
            root_certificate,
            certificate: self.get("sslcert", "PGSSLCERT").map(PathBuf::from),
            key: self.get("sslkey", "PGSSLKEY").map(PathBuf::from),
        })
    }

    fn password_from_file(&self, config: &tokio_postgres::Config) -> Option<String> {
        let file = self
            .get("passfile", "PGPASSFILE")
            .map(PathBuf::from)
            .or_else(|| self.environment.file("PGPASSFILE", ".pgpass"))?;
        password_from(&file, config)
    }
}

/// Adds what the connection string leaves out.
fn fill_from_environment(config: &mut tokio_postgres::Config, environment: &Environment) {
    if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
        config.host(environment.get("PGHOST").unwrap_or("localhost"));
    }

    if config.get_ports().is_empty()
        && let Some(port) = environment.get("PGPORT").and_then(|port| port.parse().ok())
    {
        config.port(port);
    }

    if config.get_user().is_none() {
        match environment.get("PGUSER").or_else(|| environment.get("USER")) {
            Some(user) => config.user(user),
            None => config.user(std::env::var("USER").unwrap_or_else(|_| "postgres".to_owned())),
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
}

/// Refuses a host that a URL with an unescaped password leads to.
fn refuse_torn_host(config: &tokio_postgres::Config) -> Result<(), ConnectError> {
    let is_torn = |host: &Host| matches!(host, Host::Tcp(host) if host.contains(['@', '/']));
    if config.get_hosts().iter().any(is_torn) {
        // The host may be part of the password, so the message does not show it.
        let reason =
            "the host holds an @ or a /; in a URL's password they are written as %40 and %2F"
                .to_owned();
        return Err(ConnectError::Invalid { reason });
    }
    Ok(())
}

/// Translates a mode for tokio-postgres, which only decides whether to ask for TLS; `tls` decides
/// how the server is verified.
fn sql_ssl_mode(mode: SslMode) -> tokio_postgres::config::SslMode {
    match mode {
        SslMode::Disable => tokio_postgres::config::SslMode::Disable,
        SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => {
            tokio_postgres::config::SslMode::Require
        }
    }
}

/// Returns whether a connection may leave this machine.
fn may_leave_host(config: &tokio_postgres::Config) -> bool {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::connection::error::from_sqlstate;

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
        let refused = |code| from_sqlstate(code, "why", &options, "h:5432".to_owned());
        for code in ["53300", "57P03", "57014", "40P01", "XX000", "58030", "08006", "55P03"] {
            assert!(refused(code).is_transient(), "{code}");
        }
        for code in ["28P01", "28000", "3D000", "42501", "42704", "22023", "0A000", "XX001"] {
            assert!(!refused(code).is_transient(), "{code}");
        }
    }

    /// These strings are malformed in ways that are easily typed.
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
                        !format!("{error} {error:?} {}", crate::error::error_chain(&error))
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

    /// The rule is the same as with libpq.
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
