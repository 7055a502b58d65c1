//! The settings of a pipeline.

#![deny(missing_docs)]

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

use schemars::JsonSchema;
use serde::Deserialize;

use super::schedule::VerificationSchedule;
use crate::{
    olap::{PublishOptions, TargetOptions, lake::Layout},
    pgoutput::QualifiedName,
    source::connection::SourceOptions,
};

/// The part of the settings that a pipeline needs.
#[derive(Debug, Clone)]
pub struct Options {
    /// The address of the source and the credentials for it.
    pub source: SourceOptions,
    /// The DuckDB file, and the resources that DuckDB may use.
    pub target: TargetOptions,
    /// The names of the publications, which are followed as one.
    pub publications: Vec<String>,
    /// The name of the replication slot at the source.
    pub slot: String,
    /// Whether standbys keep the slot too (PostgreSQL 17 and newer).
    pub failover_slot: bool,
    /// What happens when the slot can no longer serve the copy.
    pub on_slot_lost: OnSlotLost,
    /// What happens to a new table that the settings choose, where rhei made the publication.
    pub add_tables: AddTables,
    /// The patterns of the tables to follow; an empty list means all tables of the publications.
    pub tables: Vec<TablePattern>,
    /// The patterns of tables that are left out although `tables` chooses them.
    pub exclude: Vec<TablePattern>,
    /// The settings of single tables, by the `schema.table` name at the source.
    pub table_settings: BTreeMap<String, TableSettings>,
    /// The time between the beginnings of two cycles of a run that keeps up; for a feed, how long
    /// changes are collected for a batch.
    pub interval: Duration,
    /// The row changes after which a batch ends at the next source commit.
    pub max_batch_rows: u64,
    /// The memory of rhei's own buffers, beside that of DuckDB.
    pub memory_limit_bytes: usize,
    /// `[sync] on_unrepresentable = "null"`.
    pub null_unrepresentable: bool,
    /// Whether a rewrite that widened a number (int to bigint) is taken for a plain cast, so that
    /// the table is not copied again.
    pub trust_widening: bool,
    /// How often a session looks at the catalogs.
    pub catalog_interval: Duration,
    /// The number of connections that copy at the same time.
    pub workers: usize,
    /// The most bytes a second that all copy workers together take from the source.
    pub rate_limit_bytes: Option<u64>,
    /// Heap bytes of one chunk; none: the size of the table decides.
    pub chunk_bytes: Option<u64>,
    /// How long a snapshot may be held before the log warns about it.
    pub snapshot_warning: Duration,
    /// The restarts, the grace period and the watch over the slot's WAL.
    pub supervision: Supervision,
    /// When a long run verifies its copy by itself.
    pub verification: VerificationSchedule,
    /// Where copies for other tools are published, and how often; none without an interval.
    pub publication: Option<(PublishOptions, Option<Duration>)>,
}

/// The values of settings that are left out.
pub mod defaults {
    use std::time::Duration;

    /// The default of [`Options::publications`](super::Options::publications), which holds this
    /// name alone.
    pub const PUBLICATION: &str = "rhei";
    /// The default of [`Options::slot`](super::Options::slot).
    pub const SLOT: &str = "rhei";
    /// The default of [`Options::interval`](super::Options::interval).
    pub const INTERVAL: Duration = Duration::from_secs(1);
    /// The default of [`Options::max_batch_rows`](super::Options::max_batch_rows).
    pub const MAX_BATCH_ROWS: u64 = 100_000;
    /// The default of [`Options::memory_limit_bytes`](super::Options::memory_limit_bytes).
    pub const MEMORY_LIMIT_BYTES: usize = 512_000_000;
    /// The default of [`Options::catalog_interval`](super::Options::catalog_interval).
    pub const CATALOG_INTERVAL: Duration = Duration::from_secs(10);
    /// The default of [`Options::workers`](super::Options::workers).
    pub const WORKERS: usize = 2;
    /// The default of [`Options::snapshot_warning`](super::Options::snapshot_warning).
    pub const SNAPSHOT_WARNING: Duration = Duration::from_secs(3600);
}

impl Options {
    /// Creates the settings of a pipeline from `source` to `target`, with every other setting at
    /// its default.
    pub fn new(source: SourceOptions, target: TargetOptions) -> Self {
        Self {
            source,
            target,
            publications: vec![defaults::PUBLICATION.to_owned()],
            slot: defaults::SLOT.to_owned(),
            failover_slot: false,
            on_slot_lost: OnSlotLost::default(),
            add_tables: AddTables::default(),
            tables: Vec::new(),
            exclude: Vec::new(),
            table_settings: BTreeMap::new(),
            interval: defaults::INTERVAL,
            max_batch_rows: defaults::MAX_BATCH_ROWS,
            memory_limit_bytes: defaults::MEMORY_LIMIT_BYTES,
            null_unrepresentable: false,
            trust_widening: false,
            catalog_interval: defaults::CATALOG_INTERVAL,
            workers: defaults::WORKERS,
            rate_limit_bytes: None,
            chunk_bytes: None,
            snapshot_warning: defaults::SNAPSHOT_WARNING,
            supervision: Supervision::default(),
            verification: VerificationSchedule::default(),
            publication: None,
        }
    }
}

#[cfg(test)]
impl Options {
    /// Settings with every default, for tests that connect to no server.
    pub(crate) fn sample() -> Self {
        let url = "postgres://rhei@localhost/shop";
        let source = SourceOptions::parse(url, &crate::source::connection::Environment::default());
        Self::new(source.unwrap(), TargetOptions::new("shop.duckdb"))
    }
}

/// `schema.table`, where `*` stands for any characters within a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablePattern {
    schema: String,
    name: String,
}

impl TablePattern {
    /// Returns whether the schema and the name both match, letter case included.
    pub fn matches(&self, table: &QualifiedName) -> bool {
        matches_part(&self.schema, &table.schema) && matches_part(&self.name, &table.name)
    }
}

fn matches_part(pattern: &str, text: &str) -> bool {
    let Some((before, after)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut rest) = text.strip_prefix(before) else { return false };

    let (middle, end) = after.rsplit_once('*').unwrap_or(("", after));
    // The first place where a part between two stars fits leaves the most for the parts that
    // follow.
    for part in middle.split('*') {
        let Some((_, after)) = rest.split_once(part) else { return false };
        rest = after;
    }

    rest.ends_with(end)
}

impl FromStr for TablePattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (schema, name) =
            text.split_once('.').ok_or("expected \"schema.table\"; * matches within a part")?;
        if schema.is_empty() || name.is_empty() || name.contains('.') {
            return Err("expected \"schema.table\"; * matches within a part".to_owned());
        }
        Ok(Self { schema: schema.to_owned(), name: name.to_owned() })
    }
}

impl fmt::Display for TablePattern {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{}", self.schema, self.name)
    }
}

/// What happens when the slot is dropped, invalidated, remade, or on another history after a
/// failover.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnSlotLost {
    /// An error says what was found; the copy stays as it is.
    #[default]
    Stop,
    /// Every table is copied again with a new slot, three times an hour at most.
    Resync,
}

impl FromStr for OnSlotLost {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "stop" => Ok(Self::Stop),
            "resync" => Ok(Self::Resync),
            other => Err(format!("\"{other}\" is neither \"stop\" nor \"resync\"")),
        }
    }
}

/// What happens to a new table that the settings choose, where rhei made the publication.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AddTables {
    /// rhei adds the table to the publication if the role may, and warns where it may not.
    #[default]
    Auto,
    /// rhei warns, with the SQL that adds the table.
    Warn,
}

impl FromStr for AddTables {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "warn" => Ok(Self::Warn),
            other => Err(format!("\"{other}\" is neither \"auto\" nor \"warn\"")),
        }
    }
}

/// How often work that met a bug of rhei may begin again, before rhei stops with the error
/// (`[supervisor] restart`). A source that is away and a disk that is full do not count: rhei waits
/// for those.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// The number of restarts; 0 means that the first bug ends rhei.
    pub max: u32,
    /// None: the budget holds for the whole life of the work.
    pub within: Option<Duration>,
}

/// How a long run is kept alive and watched.
#[derive(Debug, Clone, Copy)]
pub struct Supervision {
    /// The budget for bugs: sessions have one, and rounds of copies have another of the same size.
    pub restart: Budget,
    /// How long a stop waits for work that has begun.
    pub grace: Duration,
    /// How often the supervisor looks at the slot,
    pub lag_interval: Duration,
    /// and how much WAL it may hold without a warning.
    pub lag_warning_bytes: u64,
}

impl Default for Supervision {
    fn default() -> Self {
        Self {
            restart: Budget { max: 5, within: Some(Duration::from_secs(60)) },
            grace: Duration::from_secs(10),
            lag_interval: Duration::from_secs(30),
            lag_warning_bytes: 1_000_000_000,
        }
    }
}

/// `[tables."schema.table"]` of the settings.
#[derive(Debug, Clone, Default)]
pub struct TableSettings {
    /// Name in the target, as `schema.table` or `table`.
    pub target: Option<QualifiedName>,
    /// The names of the source's columns that are not copied. A column of the key cannot be left
    /// out.
    pub exclude_columns: Vec<String>,
    /// The DuckDB type of a column, by the name of the column.
    pub column_types: BTreeMap<String, String>,
    /// Tables with a higher priority are copied first.
    pub copy_priority: i32,
    /// How the table lies in a lake, which does not hold every type, nor change every column in
    /// place; none in a file.
    pub in_lake: Option<Layout>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_within_a_part() {
        let pattern: TablePattern = "pub*.or*s".parse().unwrap();
        assert!(pattern.matches(&QualifiedName::new("public", "orders")));
        assert!(pattern.matches(&QualifiedName::new("pub", "ors")));
        assert!(!pattern.matches(&QualifiedName::new("public", "order")));
        assert!(!pattern.matches(&QualifiedName::new("other", "orders")));

        let matches = |name: &str, text: &str| matches_part(name, text);
        for (name, text) in [
            ("*", ""),
            ("**", "a"),
            ("*b*c*", "abxcb"),
            ("a*a", "aa"),
            ("*ab*ab", "abxabab"),
            ("ä*", "äö"),
        ] {
            assert!(matches(name, text), "{name} and {text}");
        }
        for (name, text) in
            [("a*a", "a"), ("*b*b*", "abc"), ("a*b*", "ba"), ("*ab*ab", "xab"), ("", "a")]
        {
            assert!(!matches(name, text), "{name} and {text}");
        }
    }

    #[test]
    fn a_pattern_of_many_stars_takes_no_time() {
        let pattern = format!("public.{}b", "*a".repeat(30));
        let pattern: TablePattern = pattern.parse().unwrap();
        assert!(!pattern.matches(&QualifiedName::new("public", "a".repeat(63))));
    }
}
