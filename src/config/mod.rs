//! Makes one checked [`Config`] from rhei.toml, the environment and the flags.
//!
//! [`Settings`] is the content of the file; unknown keys are errors. A later source of a setting
//! overrides an earlier one: file, `RHEI_*`, flags. `validate` names the values that are refused.

mod password_file;
#[cfg(test)]
mod reference;
mod settings;
mod validate;

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, de};

use crate::observe::{Address, ObserveOptions};
use crate::olap::PublishOptions;
use crate::pipeline::{
    options::{AddTables, OnSlotLost, Supervision, TablePattern, defaults},
    schedule::{Share, VerificationSchedule, Window},
};
use crate::serve::{Listen, ServeOptions};

pub use password_file::read_password;
pub use settings::{
    BackfillSettings, ColumnSection, Often, OnUnrepresentable, Once, Publications, Restart,
    Settings, SourceSettings, SupervisorSettings, SyncSettings, TableSection, TargetSettings,
    VerifySettings,
};

/// A setting that cannot be understood. The exit code is 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The settings file cannot be read as text, or is missing although `--config` names it.
    #[error(
        "cannot read {path}: {reason}\nhint: --config names the settings file; `rhei init` writes \
         one"
    )]
    Read {
        /// The path of the settings file.
        path: String,
        /// The error of the operating system.
        reason: String,
    },
    /// A key is unknown, or its value is malformed or refused. A refused value may come from the
    /// environment or a flag as well as from the file.
    #[error("invalid setting in {path}{place}: {reason}")]
    Invalid {
        /// The path of the settings file: `rhei.toml` unless `--config` names another one.
        path: String,
        /// The line and the key, as `, line 3, sync.interval`; empty when `reason` names the key.
        place: String,
        /// What is wrong, with the nearest known key as a hint when a key is unknown.
        reason: String,
    },
    /// A variable of the environment, or the URL of the source, cannot be understood.
    #[error("invalid {variable}: {reason}")]
    Environment {
        /// The name of the variable, as `RHEI_SYNC_INTERVAL`, or `source URL`.
        variable: String,
        /// What is wrong with the value. The text never holds a password.
        reason: String,
    },
    /// The file that holds the password of the source cannot be used.
    #[error(
        "the password file {} {reason}\nhint: the file holds the password alone, and only the \
         user of rhei may read it: chmod 600 {}", .path.display(), .path.display()
    )]
    PasswordFile {
        /// The path, as the setting names it.
        path: PathBuf,
        /// What is wrong with the file.
        reason: String,
    },
    /// The command needs a DuckDB file, and neither a flag, the environment nor the file names one.
    #[error(
        "no target given\nhint: use --target PATH, RHEI_TARGET_PATH, or [target] path in rhei.toml"
    )]
    NoTarget,
    /// The command needs a source, and neither a setting nor libpq's environment (`PGHOST`,
    /// `PGSERVICE`) names one.
    #[error(
        "no source given\nhint: use --source URL, RHEI_SOURCE_URL, or [source] url in rhei.toml"
    )]
    NoSource,
}

/// a text that is never printed
#[derive(Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Takes a text that `Debug` does not show.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Returns the text, for code that connects.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("\"(hidden)\"")
    }
}

macro_rules! from_text {
    ($name:ident, $expecting:literal, $example:literal) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl de::Visitor<'_> for Text {
                    type Value = $name;

                    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                        out.write_str($expecting)
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(|reason| E::custom(format!("{text:?} is not {}: \
                             {reason}", $expecting)))
                    }
                }
                deserializer.deserialize_str(Text)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({
                    "type": "string",
                    "description": $expecting,
                    "examples": [$example]
                })
            }
        }
    };
}

from_text!(TablePattern, "a table pattern like \"public.*\"", "public.*");

/// A length of time, as `200ms`, `5s`, `1m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match humantime::parse_duration(text) {
            Ok(span) if span.is_zero() => Err("it must be more than nothing".to_owned()),
            Ok(span) => Ok(Self(span)),
            Err(error) => Err(error.to_string()),
        }
    }
}

from_text!(Share, "a share like \"5%\"", "5%");
from_text!(Window, "a time of the day in UTC like \"02:00-05:00\"", "02:00-05:00");

from_text!(Listen, "an address like \"127.0.0.1:5439\" or a folder", "127.0.0.1:5439");

from_text!(Address, "an address like \"127.0.0.1:9187\"", "127.0.0.1:9187");

from_text!(Span, "a duration like \"200ms\", \"5s\" or \"1m\"", "1s");

/// A number of bytes, as `512MB`, `1GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub usize);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let split = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let number: usize =
            number.parse().map_err(|_| "it has to begin with a whole number".to_owned())?;

        let factor: usize = match unit.trim().to_ascii_lowercase().as_str() {
            "b" => 1,
            "kb" => 1000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "kib" => 1 << 10,
            "mib" => 1 << 20,
            "gib" => 1 << 30,
            _ => return Err("its unit has to be B, KB, MB, GB, KiB, MiB or GiB".to_owned()),
        };

        number.checked_mul(factor).map(Self).ok_or_else(|| "it is too large".to_owned())
    }
}

from_text!(ByteSize, "a size like \"512MB\" or \"1GiB\"", "512MB");

/// The settings, resolved and checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// The libpq URL or `key=value` string of the source; `None` leaves it to the environment of
    /// libpq.
    pub source_url: Option<Secret>,
    /// The file that holds the password of the source, for a URL without one.
    pub source_password_file: Option<PathBuf>,
    /// The names of the publications, which are followed as one; default `rhei` alone.
    pub publications: Vec<String>,
    /// The name of the replication slot at the source; default `rhei`.
    pub slot: String,
    /// What happens when the slot can no longer serve the copy; default [`OnSlotLost::Stop`].
    pub on_slot_lost: OnSlotLost,
    /// Whether standbys keep the slot too (PostgreSQL 17 and newer); default `false`.
    pub failover_slot: bool,
    /// See [`SourceSettings::add_tables`].
    pub add_tables: AddTables,
    /// The patterns of the tables to follow; an empty list means all tables of the publications.
    pub tables: Vec<TablePattern>,
    /// The patterns of tables that are left out although `tables` chooses them.
    pub exclude: Vec<TablePattern>,
    /// The path of the DuckDB file; `None` when no setting names one.
    pub target_path: Option<PathBuf>,
    /// The lake that takes the place of the file.
    pub lake: Option<LakeSettings>,
    /// The memory that DuckDB may use; `None` means DuckDB's default, 80 % of the machine's memory.
    pub duckdb_memory_limit: Option<ByteSize>,
    /// The most threads that DuckDB may use; `None` means all cores.
    pub threads: Option<u32>,
    /// The time between the beginnings of two cycles of `rhei run` that keeps up; default 1 s.
    pub interval: Duration,
    /// The row changes after which a batch ends at the next source commit; default 100,000.
    pub max_batch_rows: u64,
    /// The memory of rhei's own buffers, beside that of DuckDB; default 512 MB.
    pub memory_limit: ByteSize,
    /// What happens to a value that DuckDB has no room for; default [`OnUnrepresentable::Error`].
    pub on_unrepresentable: OnUnrepresentable,
    /// Whether a rewrite that widened a number (int to bigint) is taken for a plain cast, so that
    /// the table is not copied again; default `false`.
    pub trust_widening: bool,
    /// The time between looks at the source's catalogs for what the stream never mentions; default
    /// 10 s.
    pub catalog_interval: Duration,
    /// See [`SyncSettings::accept`].
    pub accept: Vec<TablePattern>,
    /// The number of connections that copy at the same time; default 2.
    pub workers: usize,
    /// The bytes per second that all workers together take from the source at most; `None` means no
    /// limit.
    pub rate_limit: Option<ByteSize>,
    /// The size at the source of the chunks of a copy; `None` means 16 to 128 MiB, by the size of
    /// the table.
    pub chunk_size: Option<ByteSize>,
    /// How long a copy may hold its snapshot before the log warns about it; default 1 h.
    pub snapshot_warning: Duration,
    /// The restarts, the grace period and the watch over the slot's WAL.
    pub supervision: Supervision,
    /// When `rhei run` verifies its copy by itself; default: never.
    pub verification: VerificationSchedule,
    /// Where copies for other tools are published, and how often; default: nowhere.
    pub publication: Option<(PublishOptions, Option<Duration>)>,
    /// How readers are served; default: not at all.
    pub serve: Option<ServeOptions>,
    /// Where metrics, health and the status page are served; default: nowhere.
    pub observe: Option<ObserveOptions>,
    /// The settings of single tables, by the `schema.table` name at the source.
    pub table_settings: BTreeMap<String, TableSection>,
}

/// A lake that takes the place of the file, as the settings describe it.
#[derive(Debug, Clone)]
pub struct LakeSettings {
    /// The address of the catalog.
    pub catalog: Secret,
    /// See [`TargetSettings::data_path`].
    pub data_path: Option<String>,
    /// See [`TargetSettings::state_path`].
    pub state_path: PathBuf,
    /// See [`TargetSettings::schema_prefix`].
    pub schema_prefix: String,
    /// See [`TargetSettings::keep_snapshots`]; default 7 days.
    pub keep_snapshots: Duration,
    /// See [`TargetSettings::clean_after`]; default 24 hours.
    pub clean_after: Duration,
    /// See [`TargetSettings::file_size`].
    pub file_size: ByteSize,
    /// See [`TargetSettings::s3_endpoint`].
    pub s3_endpoint: Option<String>,
    /// See [`TargetSettings::s3_region`].
    pub s3_region: Option<String>,
}

impl LakeSettings {
    /// How long snapshots are kept by default.
    const KEEP: Duration = Duration::from_secs(7 * 86_400);
    /// How long files are left that no snapshot needs, by default.
    const CLEAN: Duration = Duration::from_secs(86_400);
    /// The size of data files by default.
    const FILE_SIZE: ByteSize = ByteSize(128 << 20);

    fn of(target: &TargetSettings) -> Option<Self> {
        let catalog = target.lake.clone()?;
        let schema_prefix = target.schema_prefix.clone().unwrap_or_default();
        let state_path = target.state_path.clone().unwrap_or_else(|| {
            let address = catalog.expose().trim_start_matches("ducklake:");
            let path = match address.split_once(':') {
                None => address,
                Some(("sqlite" | "duckdb", file)) => file,
                Some(_) => "rhei-lake",
            };
            let mut path = std::ffi::OsString::from(path);
            path.push(&schema_prefix);
            path.into()
        });

        Some(Self {
            catalog,
            data_path: target.data_path.as_deref().map(absolute),
            state_path,
            schema_prefix,
            keep_snapshots: target.keep_snapshots.map_or(Self::KEEP, |span| span.0),
            clean_after: target.clean_after.map_or(Self::CLEAN, |span| span.0),
            file_size: target.file_size.unwrap_or(Self::FILE_SIZE),
            s3_endpoint: target.s3_endpoint.clone(),
            s3_region: target.s3_region.clone(),
        })
    }
}

/// Returns the place of a lake's data for every process, whatever folder it was started in.
fn absolute(path: &str) -> String {
    if path.contains("://") {
        return path.to_owned();
    }
    match std::path::absolute(path) {
        Ok(path) => path.display().to_string(),
        Err(_) => path.to_owned(),
    }
}

/// The sources of the settings.
#[derive(Debug, Clone, Default)]
pub struct Inputs {
    /// The path of `--config`; without that flag `rhei.toml` is read if it exists.
    pub file: Option<PathBuf>,
    /// The value of `--source`, which overrides the environment and the file.
    pub source: Option<Secret>,
    /// The value of `--target`, which overrides the environment and the file.
    pub target: Option<PathBuf>,
    /// The variables `RHEI_*` of the environment.
    pub environment: BTreeMap<String, String>,
}

impl Config {
    /// Reads the settings from all sources.
    ///
    /// # Errors
    /// The error names the key, and the line of the key.
    pub fn load(inputs: &Inputs) -> Result<Self, ConfigError> {
        let mut settings = inputs.read_file()?;
        override_from(&mut settings, &inputs.environment)?;

        if let Some(source) = &inputs.source {
            settings.source.url = Some(source.clone());
        }
        if let Some(target) = &inputs.target {
            settings.target.name(target.clone());
        }

        settings.validate().map_err(|reason| ConfigError::Invalid {
            path: inputs.path().display().to_string(),
            place: String::new(),
            reason,
        })?;

        Ok(Self::resolve(settings))
    }

    /// Fills in the default of each setting that the file, the environment and the flags leave out.
    fn resolve(settings: Settings) -> Self {
        let Settings { source, target, sync, backfill, supervisor, verify, .. } = settings;
        let Settings { serve, publish, observe, tables, .. } = settings;
        let span_or = |span: Option<Span>, default| span.map_or(default, |span| span.0);

        Self {
            source_url: source.url,
            source_password_file: source.password_file,
            publications: source.publication.unwrap_or_default().into_names(),
            slot: source.slot.unwrap_or_else(|| defaults::SLOT.to_owned()),
            on_slot_lost: source.on_slot_lost.unwrap_or_default(),
            failover_slot: source.failover_slot.unwrap_or(false),
            add_tables: source.add_tables.unwrap_or_default(),
            tables: source.tables,
            exclude: source.exclude,
            lake: LakeSettings::of(&target),
            target_path: target.path,
            duckdb_memory_limit: target.duckdb_memory_limit,
            threads: target.threads,
            interval: span_or(sync.interval, defaults::INTERVAL),
            max_batch_rows: sync.max_batch_rows.unwrap_or(defaults::MAX_BATCH_ROWS),
            memory_limit: sync.memory_limit.unwrap_or(ByteSize(defaults::MEMORY_LIMIT_BYTES)),
            on_unrepresentable: sync.on_unrepresentable.unwrap_or_default(),
            trust_widening: sync.trust_widening.unwrap_or(false),
            catalog_interval: span_or(sync.catalog_interval, defaults::CATALOG_INTERVAL),
            accept: sync.accept,
            workers: backfill.workers.unwrap_or(defaults::WORKERS),
            rate_limit: backfill.rate_limit,
            chunk_size: backfill.chunk_size,
            snapshot_warning: span_or(backfill.snapshot_warning, defaults::SNAPSHOT_WARNING),
            supervision: supervisor.resolve(),
            verification: verify.resolve(),
            publication: publish.resolve(),
            serve: serve.resolve(),
            observe: observe.resolve(),
            table_settings: tables,
        }
    }
}

impl Inputs {
    fn path(&self) -> &Path {
        self.file.as_deref().unwrap_or(Path::new("rhei.toml"))
    }

    /// Reads the settings file as a table, without judging its keys.
    ///
    /// # Errors
    /// The file cannot be read, or is no TOML.
    pub fn read_table(&self) -> Result<toml::Table, ConfigError> {
        let path = self.path();
        let refused =
            |reason: String| ConfigError::Read { path: path.display().to_string(), reason };
        match std::fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text).map_err(|error| refused(error.message().to_owned())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && self.file.is_none() => {
                Ok(toml::Table::new())
            }
            Err(error) => Err(refused(error.to_string())),
        }
    }

    /// Reads the settings file. A file that no flag names may be missing.
    fn read_file(&self) -> Result<Settings, ConfigError> {
        let path = self.path();
        match std::fs::read_to_string(path) {
            Ok(text) => parse(&text, path),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && self.file.is_none() => {
                Ok(Settings::default())
            }
            Err(error) => Err(ConfigError::Read {
                path: path.display().to_string(),
                reason: error.to_string(),
            }),
        }
    }
}

/// Parses the text of rhei.toml.
pub fn parse(text: &str, path: &Path) -> Result<Settings, ConfigError> {
    toml::from_str(text).map_err(|error: toml::de::Error| {
        let line = error
            .span()
            .map(|span| text.get(..span.start).unwrap_or_default().matches('\n').count() + 1);

        // The reason is only the message: the text around the place could hold a password.
        let mut reason = error.message().to_owned();
        if let Some(hint) = nearest(&reason) {
            reason = format!("{reason}\nhint: did you mean `{hint}`?");
        }

        let key = line
            .and_then(|line| key_at(text, line))
            .map(|key| format!(", {key}"))
            .unwrap_or_default();

        ConfigError::Invalid {
            path: path.display().to_string(),
            place: line.map(|line| format!(", line {line}{key}")).unwrap_or_default(),
            reason,
        }
    })
}

/// Returns the `section.key` of a line, for messages about its value.
fn key_at(text: &str, line: usize) -> Option<String> {
    let lines: Vec<&str> = text.lines().take(line).map(str::trim).collect();
    let (key, _) = lines.last()?.split_once('=')?;
    let section = lines.iter().rev().find_map(|line| line.strip_prefix('[')?.strip_suffix(']'));
    Some(
        section
            .map_or_else(|| key.trim().to_owned(), |section| format!("{section}.{}", key.trim())),
    )
}

/// Returns, for ``unknown field `intervall`, expected one of `interval`, ..``, the expected name
/// that is closest.
fn nearest(reason: &str) -> Option<String> {
    let mut names = reason.strip_prefix("unknown field ")?.split('`').skip(1).step_by(2);
    let wrong = names.next()?;
    let (distance, name) = names.map(|name| (distance(wrong, name), name)).min()?;
    (distance <= 3).then(|| name.to_owned())
}

/// Returns the number of edits from one name to the other.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();

    for (at, character) in one.chars().enumerate() {
        let mut next = vec![at + 1];
        for (before, (&wanted, pair)) in other.iter().zip(row.windows(2)).enumerate() {
            let [diagonal, above] = *pair else { continue };
            let left = next.get(before).copied().unwrap_or_default();
            next.push((diagonal + usize::from(character != wanted)).min(above + 1).min(left + 1));
        }

        row = next;
    }

    row.last().copied().unwrap_or_default()
}

/// Overrides each scalar key with its variable `RHEI_SECTION_KEY`.
fn override_from(
    settings: &mut Settings,
    environment: &BTreeMap<String, String>,
) -> Result<(), ConfigError> {
    if let Some(url) = environment.get("RHEI_SOURCE_URL").filter(|url| !url.is_empty()) {
        settings.source.url = Some(Secret::new(url.clone()));
    }

    read(environment, "RHEI_SOURCE_PASSWORD_FILE", &mut settings.source.password_file)?;
    read(environment, "RHEI_SOURCE_PUBLICATION", &mut settings.source.publication)?;
    read(environment, "RHEI_SOURCE_SLOT", &mut settings.source.slot)?;
    read(environment, "RHEI_SOURCE_ON_SLOT_LOST", &mut settings.source.on_slot_lost)?;
    read(environment, "RHEI_SOURCE_FAILOVER_SLOT", &mut settings.source.failover_slot)?;
    read(environment, "RHEI_SOURCE_ADD_TABLES", &mut settings.source.add_tables)?;

    read(environment, "RHEI_TARGET_PATH", &mut settings.target.path)?;
    if let Some(lake) = environment.get("RHEI_TARGET_LAKE").filter(|lake| !lake.is_empty()) {
        settings.target.lake = Some(Secret::new(lake.clone()));
    }
    read(environment, "RHEI_TARGET_DATA_PATH", &mut settings.target.data_path)?;
    read(environment, "RHEI_TARGET_STATE_PATH", &mut settings.target.state_path)?;
    read(environment, "RHEI_TARGET_SCHEMA_PREFIX", &mut settings.target.schema_prefix)?;
    read(environment, "RHEI_TARGET_KEEP_SNAPSHOTS", &mut settings.target.keep_snapshots)?;
    read(environment, "RHEI_TARGET_CLEAN_AFTER", &mut settings.target.clean_after)?;
    read(environment, "RHEI_TARGET_FILE_SIZE", &mut settings.target.file_size)?;
    read(environment, "RHEI_TARGET_S3_ENDPOINT", &mut settings.target.s3_endpoint)?;
    read(environment, "RHEI_TARGET_S3_REGION", &mut settings.target.s3_region)?;
    read(environment, "RHEI_TARGET_DUCKDB_MEMORY_LIMIT", &mut settings.target.duckdb_memory_limit)?;
    read(environment, "RHEI_TARGET_THREADS", &mut settings.target.threads)?;

    read(environment, "RHEI_SYNC_INTERVAL", &mut settings.sync.interval)?;
    read(environment, "RHEI_SYNC_MAX_BATCH_ROWS", &mut settings.sync.max_batch_rows)?;
    read(environment, "RHEI_SYNC_MEMORY_LIMIT", &mut settings.sync.memory_limit)?;
    read(environment, "RHEI_SYNC_ON_UNREPRESENTABLE", &mut settings.sync.on_unrepresentable)?;
    read(environment, "RHEI_SYNC_TRUST_WIDENING", &mut settings.sync.trust_widening)?;
    read(environment, "RHEI_SYNC_CATALOG_INTERVAL", &mut settings.sync.catalog_interval)?;

    read(environment, "RHEI_BACKFILL_RATE_LIMIT", &mut settings.backfill.rate_limit)?;
    read(environment, "RHEI_BACKFILL_CHUNK_SIZE", &mut settings.backfill.chunk_size)?;
    read(environment, "RHEI_BACKFILL_SNAPSHOT_WARNING", &mut settings.backfill.snapshot_warning)?;
    read(environment, "RHEI_BACKFILL_WORKERS", &mut settings.backfill.workers)?;

    read(environment, "RHEI_SUPERVISOR_GRACE", &mut settings.supervisor.grace)?;
    read(environment, "RHEI_SUPERVISOR_LAG_INTERVAL", &mut settings.supervisor.lag_interval)?;
    read(environment, "RHEI_SUPERVISOR_LAG_WARNING", &mut settings.supervisor.lag_warning)?;

    read(environment, "RHEI_VERIFY_INTERVAL", &mut settings.verify.interval)?;
    read(environment, "RHEI_VERIFY_SAMPLE", &mut settings.verify.sample)?;
    read(environment, "RHEI_VERIFY_WINDOW", &mut settings.verify.window)?;
    read(environment, "RHEI_VERIFY_RATE_LIMIT", &mut settings.verify.rate_limit)?;

    override_readers(settings, environment)
}

/// Reads a variable of the environment, if it is set.
fn read<T: FromStr>(
    environment: &BTreeMap<String, String>,
    variable: &str,
    place: &mut Option<T>,
) -> Result<(), ConfigError>
where
    T::Err: fmt::Display,
{
    if let Some(text) = environment.get(variable).filter(|text| !text.is_empty()) {
        *place = Some(text.parse().map_err(|error: T::Err| ConfigError::Environment {
            variable: variable.to_owned(),
            reason: error.to_string(),
        })?);
    }
    Ok(())
}

/// Works as [`override_from`], for what concerns those who read the copy or watch over it.
fn override_readers(
    settings: &mut Settings,
    environment: &BTreeMap<String, String>,
) -> Result<(), ConfigError> {
    read(environment, "RHEI_PUBLISH_PATH", &mut settings.publish.path)?;
    read(environment, "RHEI_PUBLISH_INTERVAL", &mut settings.publish.interval)?;
    read(environment, "RHEI_PUBLISH_KEEP", &mut settings.publish.keep)?;
    read(environment, "RHEI_PUBLISH_FORMAT", &mut settings.publish.format)?;

    read(environment, "RHEI_OBSERVE_LISTEN", &mut settings.observe.listen)?;
    read(environment, "RHEI_OBSERVE_READY_LAG", &mut settings.observe.ready_lag)?;

    read(environment, "RHEI_SERVE_LISTEN", &mut settings.serve.listen)?;
    read(environment, "RHEI_SERVE_TLS_CERT", &mut settings.serve.tls_cert)?;
    read(environment, "RHEI_SERVE_TLS_KEY", &mut settings.serve.tls_key)?;
    read(environment, "RHEI_SERVE_MAX_CONNECTIONS", &mut settings.serve.max_connections)?;
    read(environment, "RHEI_SERVE_MAX_STATEMENTS", &mut settings.serve.max_statements)?;
    read(environment, "RHEI_SERVE_STATEMENT_TIMEOUT", &mut settings.serve.statement_timeout)?;
    read(
        environment,
        "RHEI_SERVE_IDLE_IN_TRANSACTION_TIMEOUT",
        &mut settings.serve.idle_in_transaction_timeout,
    )?;
    read(environment, "RHEI_SERVE_TRANSACTION_TIMEOUT", &mut settings.serve.transaction_timeout)?;
    read(environment, "RHEI_SERVE_SPOOL_LIMIT", &mut settings.serve.spool_limit)?;
    read(environment, "RHEI_SERVE_NICE", &mut settings.serve.nice)
}

/// Returns the JSON Schema of rhei.toml.
pub fn json_schema() -> String {
    let schema = schemars::schema_for!(Settings);
    serde_json::to_string_pretty(&schema).map(|text| text + "\n").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> String {
        parse(text, Path::new("rhei.toml")).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_the_nearest_one() {
        assert_eq!(
            parsed("[sync]\nintervall = \"1s\"\n"),
            "invalid setting in rhei.toml, line 2, sync.intervall: unknown field `intervall`, \
             expected one of `interval`, `max_batch_rows`, `memory_limit`, `on_unrepresentable`, \
             `trust_widening`, `catalog_interval`, `accept`\nhint: did you mean `interval`?"
        );
    }

    #[test]
    fn wrong_values_say_what_was_expected() {
        for (text, words) in [
            ("[sync]\ninterval = \"soon\"", "\"soon\" is not a duration like \"200ms\""),
            ("[sync]\ninterval = 1", "a duration like \"200ms\""),
            ("[sync]\nmemory_limit = \"12 apples\"", "its unit has to be B, KB"),
            ("[supervisor]\nrestart = \"twice\"", "expected \"once\" or { max = 5"),
            ("[source]\ntables = [\"orders\"]", "expected \"schema.table\""),
        ] {
            let error = parsed(text);
            assert!(error.contains(words) && error.contains("line 2"), "{error}");
        }
    }

    #[test]
    fn a_secret_is_never_printed() {
        let inputs =
            Inputs { source: Some(Secret::new("postgresql://u:hush@h/d")), ..Inputs::default() };
        let inputs = Inputs { file: Some("rhei.toml.example".into()), ..inputs };
        assert!(!format!("{:?}", Config::load(&inputs).unwrap()).contains("hush"));
    }

    #[test]
    fn the_environment_stands_above_the_file_and_below_the_flags() {
        let environment = [
            ("RHEI_TARGET_PATH", "env.duckdb"),
            ("RHEI_SYNC_INTERVAL", "2s"),
            ("RHEI_PUBLISH_PATH", "lake"),
            ("RHEI_PUBLISH_FORMAT", "parquet"),
        ];
        let environment =
            environment.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let mut inputs =
            Inputs { file: Some("rhei.toml.example".into()), environment, ..Inputs::default() };

        let config = Config::load(&inputs).unwrap();
        assert_eq!(config.target_path, Some("env.duckdb".into()));
        assert_eq!(config.interval, Duration::from_secs(2));
        let (published, _) = config.publication.unwrap();
        assert_eq!(published.format, crate::olap::PublishFormat::Parquet);

        inputs.target = Some("flag.duckdb".into());
        assert_eq!(Config::load(&inputs).unwrap().target_path, Some("flag.duckdb".into()));

        inputs.environment.insert("RHEI_SYNC_INTERVAL".to_owned(), "soon".to_owned());
        assert!(
            Config::load(&inputs)
                .unwrap_err()
                .to_string()
                .starts_with("invalid RHEI_SYNC_INTERVAL")
        );
    }

    /// The test reads the example as it is, and with every key switched on.
    #[test]
    fn the_example_parses() {
        let example = std::fs::read_to_string("rhei.toml.example").unwrap();
        parse(&example, Path::new("rhei.toml.example")).unwrap();

        let all: String = example
            .lines()
            .map(|line| line.strip_prefix("#: ").unwrap_or(line).to_owned() + "\n")
            .collect();

        let settings = parse(&all, Path::new("rhei.toml.example")).unwrap();
        assert!(
            settings.target.threads.is_some() && !settings.tables.is_empty(),
            "nothing was switched on"
        );
    }

    #[test]
    fn the_json_schema_is_not_stale() {
        let path = "schemas/rhei.schema.json";
        if std::env::var_os("RHEI_BLESS").is_some() {
            std::fs::write(path, json_schema()).unwrap();
        }
        let is_current = std::fs::read_to_string(path).unwrap_or_default() == json_schema();
        assert!(is_current, "{path} is stale: run the tests with RHEI_BLESS=1");
    }
}
