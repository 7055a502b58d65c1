//! rhei.toml as it is written.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use schemars::JsonSchema;
use serde::Deserialize;

use super::{ByteSize, FromStr, Secret, Span};
use crate::{
    observe::{Address, ObserveOptions},
    olap::{PublishFormat, PublishOptions},
    pipeline::{
        options::{Budget, OnSlotLost, Supervision, TablePattern, defaults},
        schedule::{Share, VerificationSchedule, Window},
    },
    serve::{Listen, ServeOptions, Users},
};

/// rhei.toml as it is written.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    pub source: SourceSettings,
    pub target: TargetSettings,
    pub sync: SyncSettings,
    pub backfill: BackfillSettings,
    pub supervisor: SupervisorSettings,
    pub verify: VerifySettings,
    pub serve: ServeSettings,
    pub publish: PublishSettings,
    pub observe: ObserveSettings,
    /// Per table, by `schema.table`.
    pub tables: BTreeMap<String, TableSection>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SourceSettings {
    /// A libpq URL or key=value string.
    pub url: Option<Secret>,
    /// Made when it is missing and the role may. Default "rhei". Several are followed as one.
    pub publication: Option<Publications>,
    /// Made for this copy. Default "rhei".
    pub slot: Option<String>,
    /// What to do when the slot can no longer serve the copy: "stop" (the default) or "resync".
    pub on_slot_lost: Option<OnSlotLost>,
    /// Has standbys keep the slot, for failovers (PostgreSQL 17 and newer). Default false.
    pub failover_slot: Option<bool>,
    /// Which tables; default: the publication's.
    pub tables: Vec<TablePattern>,
    /// Which of those not.
    pub exclude: Vec<TablePattern>,
}

/// One name, or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Publications {
    One(String),
    Many(Vec<String>),
}

impl Default for Publications {
    fn default() -> Self {
        Self::One(defaults::PUBLICATION.to_owned())
    }
}

impl Publications {
    pub(super) fn into_names(self) -> Vec<String> {
        match self {
            Self::One(name) => vec![name],
            Self::Many(names) => names,
        }
    }
}

impl FromStr for Publications {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self::One(text.to_owned()))
    }
}

/// What happens to a value that DuckDB has no room for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnUnrepresentable {
    /// Its table is paused, with the row named.
    #[default]
    Error,
    /// It becomes NULL, with a warning that counts.
    Null,
}

impl FromStr for OnUnrepresentable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "error" => Ok(Self::Error),
            "null" => Ok(Self::Null),
            other => Err(format!("\"{other}\" is neither \"error\" nor \"null\"")),
        }
    }
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TargetSettings {
    /// The DuckDB file.
    pub path: Option<PathBuf>,
    /// DuckDB's own memory. Default: DuckDB's, 80 % of the machine.
    pub duckdb_memory_limit: Option<ByteSize>,
    /// The most threads that DuckDB may use: for copies, file checkpoints and batches that take
    /// long. Others take one. Default: all cores.
    pub threads: Option<u32>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SyncSettings {
    /// A cycle of `rhei run`. Default "1s".
    pub interval: Option<Span>,
    /// Row changes after which a batch ends at the next source commit. Default 100000.
    pub max_batch_rows: Option<u64>,
    /// rhei's own buffers. Default "512MB".
    pub memory_limit: Option<ByteSize>,
    /// A value that DuckDB has no room for pauses its table ("error", the default) or becomes NULL
    /// ("null").
    pub on_unrepresentable: Option<OnUnrepresentable>,
    /// Takes a rewrite of a table that widened a number (int to bigint) for the plain cast that it
    /// most often is, and does not copy the table again. Default false.
    pub trust_widening: Option<bool>,
    /// How often `rhei run` looks for what the stream never mentions: new tables, rewrites,
    /// partitions. Default "10s".
    pub catalog_interval: Option<Span>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BackfillSettings {
    /// Connections that copy at the same time. Default 2.
    pub workers: Option<usize>,
    /// Bytes a second that all of them together take from the source at most. Default: no limit.
    pub rate_limit: Option<ByteSize>,
    /// Size of the pieces in which tables are copied; 16 to 128 MB unless set.
    pub chunk_size: Option<ByteSize>,
    /// A copy that holds its snapshot for longer is warned about: until it ends, VACUUM at the
    /// source cannot remove what the snapshot still sees. Default "1h".
    pub snapshot_warning: Option<Span>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SupervisorSettings {
    /// How often `rhei run` goes on after a bug of its own, before it stops: "once", or so often
    /// within a time. Default { max = 5, within = "1m" }.
    pub restart: Option<Restart>,
    /// How long a stop waits for what has begun. Default "10s".
    pub grace: Option<Span>,
    /// How often `rhei run` looks at how much WAL the slot holds at the source. Default "30s".
    pub lag_interval: Option<Span>,
    /// From how much on it warns. Default "1GB".
    pub lag_warning: Option<ByteSize>,
}

impl SupervisorSettings {
    /// Fills in the default of each setting that the section leaves out.
    pub(super) fn resolve(self) -> Supervision {
        let defaults = Supervision::default();
        Supervision {
            restart: self.restart.map_or(defaults.restart, Restart::into_budget),
            grace: self.grace.map_or(defaults.grace, |span| span.0),
            lag_interval: self.lag_interval.map_or(defaults.lag_interval, |span| span.0),
            lag_warning_bytes: self
                .lag_warning
                .map_or(defaults.lag_warning_bytes, |size| size.0 as u64),
        }
    }
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VerifySettings {
    /// How long after a verification `rhei run` begins the next one by itself. Default: never.
    pub interval: Option<Span>,
    /// The share of each table's rows that one such verification compares, the next share each
    /// time. Default "100%".
    pub sample: Option<Share>,
    /// The time of the day, in UTC, at which such a verification may begin. Default: any time.
    pub window: Option<Window>,
    /// The most bytes of tables that the source reads for it in a second. Default: no limit.
    pub rate_limit: Option<ByteSize>,
}

impl VerifySettings {
    /// Fills in the default of each setting that the section leaves out.
    pub(super) fn resolve(self) -> VerificationSchedule {
        VerificationSchedule {
            interval: self.interval.map(|span| span.0),
            sample: self.sample.unwrap_or_default(),
            window: self.window,
            rate_limit_bytes: self.rate_limit.map(|limit| limit.0 as u64),
        }
    }
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ServeSettings {
    /// Where `rhei run` lets readers connect with PostgreSQL's protocol: an address, or a folder
    /// for a unix socket. Default: nowhere.
    pub listen: Option<Listen>,
    /// Users and their passwords. Default: everybody who reaches the address, which has to be a
    /// loopback address then.
    pub users: BTreeMap<String, Secret>,
    /// The certificate of TLS, and its key, as PEM files.
    pub tls_cert: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    /// Connections at the same time. Default 50.
    pub max_connections: Option<usize>,
    /// Statements that run at the same time; others wait. Default: one less than there are cores.
    pub max_statements: Option<usize>,
    /// How long a statement may work. Default "60s".
    pub statement_timeout: Option<Span>,
    /// How long a transaction may stay open while nothing runs in it. Default "60s".
    pub idle_in_transaction_timeout: Option<Span>,
    /// How long a transaction may stay open, whatever it does. Default "1h".
    pub transaction_timeout: Option<Span>,
    /// The room in the folder of the copy for results that wait for their clients, all together.
    /// Default "4GB".
    pub spool_limit: Option<ByteSize>,
    /// The niceness of the threads that read, 0 to 19. Default 10.
    pub nice: Option<u8>,
}

impl ServeSettings {
    /// Fills in the default of each setting that the section leaves out. Returns `None` when
    /// readers are not served.
    pub(super) fn resolve(self) -> Option<ServeOptions> {
        let defaults = ServeOptions::on(self.listen?);
        let users = self.users.iter();
        let users = users.map(|(user, password)| (user.clone(), password.expose().to_owned()));
        let timeout = |span: Option<Span>, default| span.map(|span| span.0).or(default);

        Some(ServeOptions {
            users: Users::new(users.collect()),
            tls: self.tls_cert.zip(self.tls_key),
            max_connections: self.max_connections.unwrap_or(defaults.max_connections),
            max_statements: self.max_statements.unwrap_or(defaults.max_statements),
            statement_timeout: timeout(self.statement_timeout, defaults.statement_timeout),
            idle_in_transaction_timeout: timeout(
                self.idle_in_transaction_timeout,
                defaults.idle_in_transaction_timeout,
            ),
            transaction_timeout: timeout(self.transaction_timeout, defaults.transaction_timeout),
            spool_limit: self.spool_limit.map_or(defaults.spool_limit, |limit| limit.0 as u64),
            nice: self.nice.map_or(defaults.nice, i32::from),
            ..defaults
        })
    }
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PublishSettings {
    /// Where copies for other tools are published: a DuckDB file, or a folder of Parquet files.
    pub path: Option<PathBuf>,
    /// How often `rhei run` publishes what has changed. Default: only `rhei publish` does.
    pub interval: Option<Span>,
    /// How many versions stay, with the newest. Default 1.
    pub keep: Option<usize>,
    /// "duckdb" (the default) or "parquet".
    pub format: Option<PublishFormat>,
}

impl PublishSettings {
    pub(super) fn resolve(self) -> Option<(PublishOptions, Option<Duration>)> {
        let options = PublishOptions {
            path: self.path?,
            format: self.format.unwrap_or_default(),
            keep: self.keep.unwrap_or(1),
        };
        Some((options, self.interval.map(|interval| interval.0)))
    }
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ObserveSettings {
    /// Where `rhei run` serves metrics, health and a status page over HTTP. Default: nowhere.
    pub listen: Option<Address>,
    /// How far the copy may be behind for `/readyz` to say that it is ready. Default "30s".
    pub ready_lag: Option<Span>,
}

impl ObserveSettings {
    pub(super) fn resolve(self) -> Option<ObserveOptions> {
        let defaults = ObserveOptions::on(self.listen?.0);
        Some(ObserveOptions {
            ready_lag: self.ready_lag.map_or(defaults.ready_lag, |span| span.0),
            ..defaults
        })
    }
}

/// A budget of restarts.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected \"once\" or { max = 5, within = \"1m\" }")]
pub enum Restart {
    /// "once"
    Named(Once),
    Often(Often),
}

impl Restart {
    fn into_budget(self) -> Budget {
        match self {
            Self::Named(Once::Once) => Budget { max: 1, within: None },
            Self::Often(Often { max, within }) => Budget { max, within: Some(within.0) },
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Often {
    pub max: u32,
    pub within: Span,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Once {
    Once,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TableSection {
    /// Its name in DuckDB, as `schema.table`.
    pub target: Option<String>,
    /// Columns that are not copied.
    pub exclude_columns: Vec<String>,
    /// Tables with a higher one are copied first; 0 unless set.
    #[serde(default)]
    pub copy_priority: i32,
    /// Per column.
    pub columns: BTreeMap<String, ColumnSection>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ColumnSection {
    /// Its type in DuckDB.
    #[serde(rename = "type")]
    pub duckdb_type: Option<String>,
}
