//! The endpoint of readers: PostgreSQL's protocol over the copy, while the replicator writes it.
//!
//! A connection (`listen`) is greeted by `startup`; `handlers` turns messages into calls of its
//! `session`. A session understands what a statement asks for (`command`, over `tokens`), has
//! PostgreSQL's catalogs put into DuckDB's words (`rewrite`, `catalog`), lets `guard` decide
//! whether the statement may run, and has its own thread run it (`reader`). Rows travel through a
//! bounded queue (`rows`) in the form that the client wants (`output`, by `encode` and `copy_out`;
//! `pg_type` maps types, `params` reads parameters). `control` ends statements, and `turns` lets
//! only some run at once. `settings` are those that a client makes.
//!
//! Readers cannot write, in four layers: DuckDB's settings (`olap::SharedFile`), transactions that
//! are READ ONLY, statements that are one SELECT, and names that are known (`guard`).

mod catalog;
mod command;
mod control;
mod copy_out;
mod encode;
mod error;
mod guard;
mod handlers;
mod judge;
mod listen;
mod output;
mod params;
mod pg_type;
mod reader;
mod rewrite;
mod rows;
mod session;
mod settings;
mod startup;
mod tokens;
mod turns;

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    num::NonZero,
    path::PathBuf,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use pgwire::messages::startup::SecretKey;
use tokio_util::sync::CancellationToken;

use crate::{olap::SharedFile, pipeline::meter::Meter};

use self::{
    catalog::Catalog, control::Control, error::SqlError, guard::Guard, rows::SpoolSpace,
    session::Session, turns::Turns,
};

pub use judge::Judge;
pub use listen::{Endpoint, ServeError};
pub use startup::Users;

/// Where clients connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    Tcp(SocketAddr),
    /// A folder, which gets a socket of the name that clients of PostgreSQL expect for this port.
    Unix {
        folder: PathBuf,
        port: u16,
    },
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('/') {
            return Ok(Self::Unix { folder: text.into(), port: 5432 });
        }
        let address = text.replace("localhost:", "127.0.0.1:");
        address.parse().map(Self::Tcp).map_err(|_| "it needs an address and a port".to_owned())
    }
}

/// How readers are served.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    pub listen: Listen,
    /// Who may connect; without any, everybody who can reach the address.
    pub users: Users,
    /// The certificate and the key of TLS, as PEM files.
    pub tls: Option<(PathBuf, PathBuf)>,
    pub max_connections: usize,
    /// How many statements run at once.
    pub max_statements: usize,
    pub statement_timeout: Option<Duration>,
    pub idle_in_transaction_timeout: Option<Duration>,
    /// How long a transaction may stay open, whatever it does. An old one keeps DuckDB from writing
    /// its log into the file, and from freeing rows.
    pub transaction_timeout: Option<Duration>,
    /// The room for open results that have to wait for their clients, all together, in bytes.
    pub spool_limit: u64,
    /// The niceness of the threads that read.
    pub nice: i32,
}

impl ServeOptions {
    /// Returns the defaults for an address.
    pub fn on(listen: Listen) -> Self {
        const TIMEOUT: Duration = Duration::from_secs(60);
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        Self {
            listen,
            users: Users::default(),
            tls: None,
            max_connections: 50,
            max_statements: cores.saturating_sub(1).max(1),
            statement_timeout: Some(TIMEOUT),
            idle_in_transaction_timeout: Some(TIMEOUT),
            transaction_timeout: Some(Duration::from_secs(3600)),
            spool_limit: 4 << 30,
            nice: 10,
        }
    }
}

/// What all sessions share.
pub struct Shared {
    file: SharedFile,
    options: ServeOptions,
    guard: Guard,
    catalog: Catalog,
    /// The names in [`catalog::DATABASE`].
    names: HashSet<String>,
    meter: Meter,
    turns: Arc<Turns>,
    spools: Arc<SpoolSpace>,
    sessions: Mutex<HashMap<i32, Registered>>,
    /// DuckDB takes no statement any more.
    broken: CancellationToken,
    /// Each thread of a reader holds one more reference.
    readers: Arc<()>,
}

/// A session, for those who may end it.
struct Registered {
    key: SecretKey,
    control: Arc<Control>,
    /// Ends the connection, for this reason.
    closed: Closed,
}

/// Ends a connection from outside.
#[derive(Clone, Default)]
struct Closed {
    token: CancellationToken,
    reason: Arc<Mutex<Option<SqlError>>>,
}

impl Closed {
    fn close(&self, reason: SqlError) {
        let mut stored = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        stored.get_or_insert(reason);
        self.token.cancel();
    }

    fn reason(&self) -> SqlError {
        let stored = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        stored.clone().unwrap_or_else(stopping)
    }
}

fn stopping() -> SqlError {
    SqlError::fatal("57P01", "terminating connection: the replicator stops")
}

impl Shared {
    fn new(file: SharedFile, options: ServeOptions, meter: Meter) -> Arc<Self> {
        let names = catalog::names();
        Arc::new(Self {
            guard: Guard::new(&names),
            turns: Turns::new(options.max_statements),
            spools: SpoolSpace::new(file.folder().to_owned(), options.spool_limit),
            catalog: Catalog::default(),
            sessions: Mutex::default(),
            broken: CancellationToken::new(),
            readers: Arc::default(),
            meter,
            names,
            file,
            options,
        })
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<i32, Registered>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, pid: i32, key: SecretKey, session: &Session) {
        let control = Arc::clone(session.control());
        let registered = Registered { key, control, closed: Closed::default() };
        self.sessions().insert(pid, registered);
        self.meter.readers().open();
    }

    /// Cancels what a session runs, if the key is its own.
    fn cancel(&self, pid: i32, key: &SecretKey) {
        let sessions = self.sessions();
        if let Some(session) = sessions.get(&pid).filter(|session| session.key.eq_value(key)) {
            let reason = SqlError::new("57014", "canceling statement due to user request");
            session.control.end(reason);
        }
    }

    /// Ends statements and sessions whose time is over.
    fn tick(&self) {
        for session in self.sessions().values() {
            let ages = session.control.tick();
            let is_over = |age: Option<Duration>, limit: Option<Duration>| {
                age.zip(limit).is_some_and(|(age, limit)| age > limit)
            };
            if is_over(ages.idle, self.options.idle_in_transaction_timeout) {
                let reason = "terminating connection due to idle-in-transaction timeout";
                session.closed.close(SqlError::fatal("25P03", reason));
            }
            if is_over(ages.open, self.options.transaction_timeout) {
                let reason = "terminating connection due to transaction timeout";
                session.closed.close(
                    SqlError::fatal("25P04", reason)
                        .hint("rhei.toml, [serve] transaction_timeout, sets the limit"),
                );
            }
        }
    }
}
