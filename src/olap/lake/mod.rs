//! A lake as the target: DuckLake keeps the tables as Parquet files in a folder or a bucket, and
//! what they are in a catalog: a PostgreSQL database, a SQLite file or a DuckDB file.
//!
//! A commit to the lake is one transaction of its catalog, over all tables: rows, state and
//! checkpoint reach it together, as they reach a file. What differs from a file is here:
//!
//! - `attach` opens the lake at its `address`: extensions (`extensions`), credentials (`secrets`),
//!   options;
//! - `fence`: one process writes, without a lock that a dead process could leave behind or a live
//!   one could lose unnoticed; and the outcome of a commit whose answer was lost is read back;
//! - `layout`: partitions and order of tables, and what the lake can change in place;
//! - `inlining`: which tables keep small additions in the catalog; `options` sets what DuckLake
//!   keeps in the lake of such things;
//! - `writer`: begins and commits transactions; `lost_files` finds what a failed commit has lost;
//! - `upkeep`: small files are merged, old snapshots expire, files that none needs are deleted;
//!   `files` is which of them, `maintain` is when the writer does that.

pub mod address;
mod attach;
mod extensions;
mod fence;
mod files;
pub(super) mod inlining;
mod layout;
mod lost_files;
mod maintain;
mod open_transactions;
mod options;
mod secrets;
mod upkeep;
mod writer;

use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

pub use address::CatalogKind;
pub(super) use attach::{data_path, open, reattach, refuse_to_make};
pub use extensions::folders as extension_folders;
pub(super) use fence::{Fence, Outcome, shown, writer};
pub use layout::{LayoutKey, RESERVED, can_alter};
pub(super) use layout::{create_shadow, of_schemas};
use lost_files::{know_folder, tables_with_lost_files};
pub use upkeep::LakeSpace;
pub(super) use upkeep::space;
pub use writer::may_open_later;
pub(super) use writer::{Lake, Shared, is_conflict_of_lake, may_pass_later};

use super::connection::Dialect;
use crate::pgoutput::QualifiedName;

/// Where a lake is, and how it is kept.
#[derive(Clone, PartialEq, Eq)]
pub struct LakeOptions {
    /// The address of the catalog, as DuckDB's ATTACH takes it: `ducklake:postgres:dbname=lake`,
    /// `ducklake:sqlite:lake.sqlite` or `ducklake:lake.ducklake`. It may hold a password.
    pub catalog: String,
    /// The password of the catalog, if its address has none.
    pub password: Option<String>,
    /// The folder of the data, or its address in a store: `s3://bucket/prefix`.
    pub data_path: Option<String>,
    /// What the names of all schemas of this copy begin with, so that several copies share a lake.
    pub schema_prefix: String,
    /// How long snapshots are kept, for queries of the past and for readers that take long.
    pub keep_snapshots: Duration,
    /// How long a file is left that no snapshot needs: a reader may still read it, and a
    /// transaction of another writer may be about to name it.
    pub clean_after: Duration,
    /// The size that data files should have, in bytes.
    pub file_bytes: u64,
    /// A store that speaks S3.
    pub s3: S3Options,
    /// The folders where the extensions of DuckDB are looked for, in this order.
    pub extension_folders: Vec<PathBuf>,
    /// How single tables lie in the lake, by their names at the source.
    pub layouts: BTreeMap<QualifiedName, Layout>,
}

/// A store that speaks S3, and the credentials for it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct S3Options {
    /// The host, and port, of a store that is not Amazon's; with `http://` before it for one
    /// without TLS.
    pub endpoint: Option<String>,
    /// The region of the bucket.
    pub region: Option<String>,
    /// The id and the secret of the access key, and the token of a session. Without a key the aws
    /// extension looks for credentials.
    pub key: Option<(String, String, Option<String>)>,
}

/// How a table lies in the lake.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    /// What tells the files of the table apart.
    pub partition_by: Vec<LayoutKey>,
    /// By what the rows of a file are sorted.
    pub sort_by: Vec<LayoutKey>,
}

impl LakeOptions {
    /// Returns what keeps the catalog. The settings refuse an address of another kind.
    pub fn catalog_kind(&self) -> CatalogKind {
        CatalogKind::of(&self.catalog).unwrap_or(CatalogKind::DuckDb)
    }

    /// Returns how statements address this lake.
    pub(super) fn dialect(&self) -> Dialect {
        Dialect { state: format!("{}_rhei", self.schema_prefix), is_lake: true }
    }
}

#[cfg(test)]
impl LakeOptions {
    /// A lake in no place, for tests.
    fn sample() -> Self {
        Self {
            catalog: "ducklake:lake.ducklake".to_owned(),
            password: None,
            data_path: None,
            schema_prefix: String::new(),
            keep_snapshots: Duration::from_secs(86_400),
            clean_after: Duration::from_secs(86_400),
            file_bytes: 128 << 20,
            s3: S3Options::default(),
            extension_folders: Vec::new(),
            layouts: BTreeMap::new(),
        }
    }
}

/// Shows no password.
impl fmt::Display for LakeOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&address::shown(&self.catalog))
    }
}

impl fmt::Debug for LakeOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LakeOptions")
            .field("catalog", &address::shown(&self.catalog))
            .field("data_path", &self.data_path)
            .field("schema_prefix", &self.schema_prefix)
            .finish_non_exhaustive()
    }
}
