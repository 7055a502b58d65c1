//! rhei.toml as it is written.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use schemars::JsonSchema;
use serde::Deserialize;

use super::{ByteSize, FromStr, Secret, Span};
use crate::{
    observe::{Address, ObserveOptions},
    olap::{PublishFormat, PublishOptions, lake::LayoutKey},
    pipeline::{
        options::{AddTables, Budget, OnSlotLost, Supervision, TablePattern, defaults},
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

/// The PostgreSQL database that is copied.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SourceSettings {
    /// The address of the source, as a libpq URL or `key=value` string. The password may also come
    /// from `PGPASSWORD`, `~/.pgpass` or a service file. Without `sslmode` a server on another
    /// machine has to prove who it is (`verify-full`). Default: what libpq's variables (`PGHOST`,
    /// `PGSERVICE`) say.
    pub url: Option<Secret>,
    /// A file that holds the password and nothing else, for a URL without one. Nobody but the user
    /// of rhei may read it. Default: none.
    pub password_file: Option<PathBuf>,
    /// The publication that is followed. It is made when it is missing and the role owns the
    /// tables; it then holds the tables that `tables` and `exclude` choose, partition trees by
    /// their roots. A list of names follows several publications as one; all of them have to be
    /// there. Default: `"rhei"`.
    pub publication: Option<Publications>,
    /// The replication slot at the source, which rhei makes. It belongs to this copy alone: two
    /// files need two slots. Lower-case letters, digits and underscores, 63 at most. Default:
    /// `"rhei"`.
    pub slot: Option<String>,
    /// What happens when the slot can no longer serve the copy: it was dropped, invalidated or made
    /// again, or the source is on another history after a failover. Another cluster is refused
    /// whatever this says. Default: `"stop"`.
    pub on_slot_lost: Option<OnSlotLost>,
    /// Has standbys keep the slot too, so that a failover to one of them loses nothing
    /// (docs/operating.md). It takes PostgreSQL 17 or newer. Default: `false`.
    pub failover_slot: Option<bool>,
    /// What happens to a new table that the settings choose, where rhei made the publication:
    /// `"auto"` adds the table to the publication if the role owns the table and the table has a
    /// key, `"warn"` only says so, with the SQL that publishes it. Default: `"auto"`.
    pub add_tables: Option<AddTables>,
    /// The tables to copy, as patterns of `schema.table`; `*` stands for any characters within a
    /// part. Default: all tables of the publication.
    pub tables: Vec<TablePattern>,
    /// The tables that are left out although `tables` chooses them, as such patterns. Default:
    /// none.
    pub exclude: Vec<TablePattern>,
}

/// a name, or a list of names
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

/// The DuckDB file or the lake, and what DuckDB may use for it.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TargetSettings {
    /// The DuckDB file. It is made when it is missing; its folder has to be there. `public.orders`
    /// at the source is `public.orders` in the file. Default: none; each command needs one, here or
    /// by `--target`.
    pub path: Option<PathBuf>,
    /// A lake that takes the place of `path` (docs/lake.md): the address of its catalog, as
    /// DuckDB's ATTACH takes it. `"ducklake:postgres:dbname=lake host=db"` for many machines,
    /// `"ducklake:sqlite:lake.sqlite"` or `"ducklake:lake.ducklake"` for one. The password may also
    /// come from `RHEI_LAKE_PASSWORD`. Default: none.
    pub lake: Option<Secret>,
    /// Where the lake keeps its data: a folder, or `"s3://bucket/prefix"`, with the credentials
    /// that AWS clients read (`AWS_ACCESS_KEY_ID` and so on). Use this place for one lake alone:
    /// `rhei compact` deletes Parquet files there that the lake does not know. Those who may read
    /// the folder may read the files in it. Default: none; required to make a lake (a DuckDB-file
    /// catalog has a folder of its own), and for a lake in a bucket.
    pub data_path: Option<String>,
    /// What rhei keeps on this machine for a copy in a lake (a socket, a lock, spilled data) is
    /// named after this path. Commands look there for a running replicator, so an absolute path
    /// serves them from every folder. Default: the file of the catalog, or `rhei-lake` in this
    /// folder, with the prefix of the schemas.
    pub state_path: Option<PathBuf>,
    /// What the names of all schemas of this copy in a lake begin with, so that several copies
    /// share a lake: with `"shop_"`, `public.orders` is `shop_public.orders`. Default: `""`.
    pub schema_prefix: Option<String>,
    /// How long rhei keeps snapshots of a lake for queries of the past. While a transaction is
    /// open, snapshots made since it began stay longer, up to `clean_after`. Default: `"7d"`.
    pub keep_snapshots: Option<Span>,
    /// How long rhei keeps a file of a lake that no snapshot refers to, or that an unfinished
    /// transaction left behind. Set it longer than the longest query, and than the longest
    /// transaction of any other writer of the lake. Default: `"24h"`.
    pub clean_after: Option<Span>,
    /// The size that data files of a lake should have. A file is written again as a whole when many
    /// of its rows are deleted, and the stream waits meanwhile. At least `"100KB"`. Default:
    /// `"128MiB"`.
    pub file_size: Option<ByteSize>,
    /// The host, and port, of a store that speaks S3 and is not Amazon's; `http://` before it for
    /// one without TLS. Default: none.
    pub s3_endpoint: Option<String>,
    /// The region of the bucket. Default: what `AWS_REGION` says.
    pub s3_region: Option<String>,
    /// The memory that DuckDB may use, beside rhei's own (`sync.memory_limit`). Default: DuckDB's
    /// own, 80 % of the machine.
    pub duckdb_memory_limit: Option<ByteSize>,
    /// The most threads that DuckDB may use: for copies, file checkpoints and batches that take
    /// long. Other batches take one. Default: all cores.
    pub threads: Option<u32>,
}

impl TargetSettings {
    /// Returns whether a setting is there that only a lake has.
    pub(super) fn describes_lake(&self) -> bool {
        self.data_path.is_some()
            || self.state_path.is_some()
            || self.schema_prefix.is_some()
            || self.keep_snapshots.is_some()
            || self.clean_after.is_some()
            || self.file_size.is_some()
            || self.s3_endpoint.is_some()
            || self.s3_region.is_some()
    }

    /// Takes a target by its name: the path of a file, or the address of a lake.
    pub(super) fn name(&mut self, target: PathBuf) {
        match target.to_str().filter(|name| name.starts_with("ducklake:")) {
            Some(lake) => (self.lake, self.path) = (Some(Secret::new(lake)), None),
            None => (self.lake, self.path) = (None, Some(target)),
        }
    }
}

/// How changes are followed.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SyncSettings {
    /// The least time between the beginnings of two cycles of `rhei run`. After a pause a change is
    /// applied at once, whatever this says; under load it is about how old the copy is. Shorter:
    /// fresher, and more small commits. Longer: fewer and larger ones. Default: `"1s"`.
    pub interval: Option<Span>,
    /// The number of row changes after which a batch ends, at the next commit of the source. At
    /// least 1. Default: `100000`.
    pub max_batch_rows: Option<u64>,
    /// The memory of rhei's own buffers, beside DuckDB's. A source transaction that is larger goes
    /// into DuckDB in parts and is committed whole. At least `"64kB"`. Default: `"512MB"`.
    pub memory_limit: Option<ByteSize>,
    /// What happens to a value that DuckDB has no room for, such as NaN in `numeric(5,2)`
    /// (docs/types.md). Values in keys always pause their table. Default: `"error"`.
    pub on_unrepresentable: Option<OnUnrepresentable>,
    /// Takes a rewrite of a table that widened a number (`int` to `bigint`) for the plain cast that
    /// it most often is, and does not copy the table again. That is wrong if a `USING` clause
    /// changed the values as well. Default: `false`.
    pub trust_widening: Option<bool>,
    /// How often `rhei run` looks at the source's catalogs for what the stream never mentions: new
    /// tables, rewrites, partitions. Default: `"10s"`.
    pub catalog_interval: Option<Span>,
    /// The tables that may be paused without `rhei sync`, `rhei backfill` and `rhei check` failing
    /// because of them, as patterns of `schema.table`. Default: none.
    pub accept: Vec<TablePattern>,
}

/// How tables are copied: at first, and again.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BackfillSettings {
    /// The number of connections that copy at the same time, and of tables that `rhei verify`
    /// compares at the same time. At least 1. Default: `2`.
    pub workers: Option<usize>,
    /// The most bytes a second that all copies together take from the source. At least `"100kB"`.
    /// Default: no limit.
    pub rate_limit: Option<ByteSize>,
    /// The size at the source of the pieces in which tables are copied. After a crash at most one
    /// piece for each worker is copied again. At least `"1MB"`. Default: 16 to 128 MiB, by the size
    /// of the table.
    pub chunk_size: Option<ByteSize>,
    /// How long a copy may hold its snapshot before the log warns of it. Until a copy ends, VACUUM
    /// at the source cannot remove rows that the snapshot still sees. Default: `"1h"`.
    pub snapshot_warning: Option<Span>,
}

/// How `rhei run` is kept alive, and what it warns about.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SupervisorSettings {
    /// How often `rhei run` goes on after a bug of its own before it stops with the error: once, or
    /// so many times within a time. A source that is away and a disk that is full are waited for,
    /// and do not count. Default: `{ max = 5, within = "1m" }`.
    pub restart: Option<Restart>,
    /// How long a stop waits for pieces of copies and other work that has begun. Default: `"10s"`.
    pub grace: Option<Span>,
    /// How often `rhei run` looks at how much WAL its slot holds at the source. Default: `"30s"`.
    pub lag_interval: Option<Span>,
    /// The WAL that the slot may hold without a warning in the log, which comes again each time
    /// that the amount has doubled. Default: `"1GB"`.
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

/// When `rhei run` compares its copy with the source by itself (docs/verify.md).
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VerifySettings {
    /// The time from the end of one verification to the beginning of the next. Default: never;
    /// `rhei verify` asks for one.
    pub interval: Option<Span>,
    /// The share of each table's rows that one verification compares: the next share each time.
    /// Default: `"100%"`.
    pub sample: Option<Share>,
    /// The time of the day, in UTC, at which a verification may begin. Default: any time.
    pub window: Option<Window>,
    /// The most bytes of tables a second that the source reads for a verification. At least
    /// `"100kB"`. Default: no limit.
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

/// How readers are let in, by `rhei run` and by `rhei serve` (docs/reading.md).
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ServeSettings {
    /// The address at which readers connect with PostgreSQL's protocol, or a folder for a unix
    /// socket. An address that other machines reach needs `users`, `tls_cert` and `tls_key`.
    /// Default: nowhere.
    pub listen: Option<Listen>,
    /// The users who may connect, and their passwords (SCRAM-SHA-256), as `[serve.users]`. Default:
    /// everybody who reaches the address, which then has to be a loopback address or a unix socket.
    pub users: BTreeMap<String, Secret>,
    /// The certificate that the endpoint shows, as a PEM file. It goes with `tls_key`. Default: no
    /// TLS.
    pub tls_cert: Option<PathBuf>,
    /// The key of the certificate, as a PEM file. Default: no TLS.
    pub tls_key: Option<PathBuf>,
    /// The number of readers that may be connected at the same time. At least 1. Default: `50`.
    pub max_connections: Option<usize>,
    /// The number of statements that run at the same time; others wait. At least 1. Default: one
    /// less than there are cores.
    pub max_statements: Option<usize>,
    /// How long a statement may work, not counting the time in which its client does not read.
    /// Default: `"60s"`.
    pub statement_timeout: Option<Span>,
    /// How long a transaction may stay open while nothing runs in it. Default: `"60s"`.
    pub idle_in_transaction_timeout: Option<Span>,
    /// How long a transaction may stay open whatever it does: an old snapshot keeps DuckDB from
    /// writing its log into the file. Default: `"1h"`.
    pub transaction_timeout: Option<Span>,
    /// The room in the folder of the copy for results that their clients have not read yet, all
    /// together. Default: `"4GiB"`.
    pub spool_limit: Option<ByteSize>,
    /// The niceness of the threads that read, 0 to 19: the replicator goes first. Default: `10`.
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

/// Copies of the copy, for tools that want a file (docs/reading.md).
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PublishSettings {
    /// Where a copy of the copy is published: a DuckDB file, or a folder of Parquet files. Default:
    /// none; `rhei publish --path` names one too.
    pub path: Option<PathBuf>,
    /// How often `rhei run` publishes, if something has changed. Default: only `rhei publish` does.
    pub interval: Option<Span>,
    /// The number of versions that stay, with the newest. At least 1. Default: `1`.
    pub keep: Option<usize>,
    /// What is written. Default: `"duckdb"`.
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

/// Metrics for Prometheus, health, and a status page, which `rhei run` serves over HTTP
/// (docs/observing.md).
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ObserveSettings {
    /// Where `rhei run` serves metrics, health and a status page over HTTP. Default: nowhere.
    pub listen: Option<Address>,
    /// How far the copy may be behind for `/readyz` to say that it is ready. Default: `"30s"`.
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

/// `"once"`, or a table like `{ max = 5, within = "1m" }`
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

/// The settings of one table, `[tables."schema.table"]`, by its name at the source.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TableSection {
    /// The name of the table in DuckDB, as `schema.table`. Default: its name at the source.
    pub target: Option<String>,
    /// The columns that are not copied. A column of the key cannot be left out. Default: `[]`.
    pub exclude_columns: Vec<String>,
    /// In a lake: the columns, or the functions of a column (`year`, `month`, `day`, `hour`,
    /// `bucket`), by whose values the table is divided into files: `["month(created_at)"]`. They
    /// take effect with the next copy of the table. Default: `[]`.
    pub partition_by: Vec<LayoutKey>,
    /// In a lake: the columns by which rows are sorted within files. They take effect with the next
    /// copy of the table. Default: `[]`.
    pub sort_by: Vec<LayoutKey>,
    /// Tables with a higher number are copied first; equal ones by size, the smallest first.
    /// Default: `0`.
    #[serde(default)]
    pub copy_priority: i32,
    /// The settings of single columns, by their names at the source.
    pub columns: BTreeMap<String, ColumnSection>,
}

/// The settings of one column.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ColumnSection {
    /// The type of the column in DuckDB: `VARCHAR` always works; `numeric` also takes `DOUBLE` and
    /// `DECIMAL(p,s)`, composites and ranges `STRUCT`, hstore `MAP`, json and jsonb `VARIANT`,
    /// timetz `TIMETZ` (docs/types.md). A table whose types change is copied again. Default: the
    /// one that docs/types.md names.
    #[serde(rename = "type")]
    pub duckdb_type: Option<String>,
}
