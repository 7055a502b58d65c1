//! The lake that takes the place of a DuckDB file: for a test that asks for one, and for every test
//! where `RHEI_TEST_TARGET` is `lake`, `lake-sqlite`, `lake-duckdb` or `lake-s3`.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use duckdb::Connection;

use super::cluster::{Cluster, ClusterOptions};

/// What keeps the catalog, and what the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// PostgreSQL, and a folder.
    Postgres,
    /// PostgreSQL, and a store that speaks S3.
    S3,
    /// A SQLite file, and a folder.
    Sqlite,
    /// A DuckDB file, and a folder.
    DuckDb,
}

impl Kind {
    /// What every test is to use instead of a file, if anything.
    pub fn of_all_tests() -> Option<Kind> {
        match std::env::var("RHEI_TEST_TARGET").ok()?.as_str() {
            "lake" => Some(Kind::Postgres),
            "lake-s3" => Some(Kind::S3),
            "lake-sqlite" => Some(Kind::Sqlite),
            "lake-duckdb" => Some(Kind::DuckDb),
            "file" | "" => None,
            other => panic!("RHEI_TEST_TARGET={other} is neither a file nor a lake"),
        }
    }
}

/// A lake that stands for the file at some path.
#[derive(Debug, Clone)]
pub struct Lake {
    pub kind: Kind,
    /// The address of the catalog.
    pub catalog: String,
    pub data_path: String,
    /// What the names of the copy's schemas begin with.
    pub prefix: String,
}

/// The lakes, by the paths of the files that they stand for.
fn registered() -> &'static Mutex<HashMap<PathBuf, Lake>> {
    static REGISTERED: OnceLock<Mutex<HashMap<PathBuf, Lake>>> = OnceLock::new();
    REGISTERED.get_or_init(Mutex::default)
}

/// The role that has to give its password at the server of the catalogs.
pub const LOCKED: &str = "locked";

/// The server of all catalogs. It is not the cluster of the sources: tests stop that one.
pub fn catalogs() -> &'static Cluster {
    static CATALOGS: OnceLock<Cluster> = OnceLock::new();
    CATALOGS.get_or_init(|| {
        let hba = format!(
            "local all all trust\nhost all {LOCKED} 127.0.0.1/32 scram-sha-256\nhost all all \
             127.0.0.1/32 trust\n"
        );
        let options = ClusterOptions { hba: Some(hba), ..ClusterOptions::default() };
        Cluster::start(options.conf("max_connections = 500"))
    })
}

impl Lake {
    /// Puts a new lake in the place of the file at `path`.
    pub fn new(kind: Kind, path: &Path) -> Lake {
        let beside = |ending: &str| format!("{}{ending}", path.display());
        let catalog = match kind {
            Kind::Postgres | Kind::S3 => {
                static NUMBER: AtomicU32 = AtomicU32::new(0);
                let name = format!("lake_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
                // It goes with its cluster.
                catalogs().maintenance().execute(&format!("CREATE DATABASE {name}"));
                let port = catalogs().port();
                format!("ducklake:postgres:host=127.0.0.1 port={port} user=postgres dbname={name}")
            }
            Kind::Sqlite => format!("ducklake:sqlite:{}", beside(".sqlite")),
            Kind::DuckDb => format!("ducklake:{}", beside(".ducklake")),
        };
        let data_path = match kind {
            Kind::S3 => super::s3::new_bucket(),
            _ => beside(".data"),
        };
        Lake { kind, catalog, data_path, prefix: String::new() }.register(path)
    }

    /// The same lake with schemas of another prefix, in the place of the file at `path`.
    pub fn shared(&self, prefix: &str, path: &Path) -> Lake {
        Lake { prefix: prefix.to_owned(), ..self.clone() }.register(path)
    }

    fn register(self, path: &Path) -> Lake {
        registered().lock().unwrap().insert(path.to_owned(), self.clone());
        self
    }

    /// The lake that stands for the file at `path`, if one does.
    pub fn at(path: &Path) -> Option<Lake> {
        registered().lock().unwrap().get(path).cloned()
    }

    /// The name of the catalog's database, at [`catalogs`].
    pub fn database(&self) -> &str {
        self.catalog.rsplit_once("dbname=").map_or("", |(_, name)| name)
    }

    /// What a process has to know of the lake. `path`: of the file that it stands for.
    pub fn environment(&self, path: &Path) -> BTreeMap<String, String> {
        let mut variables = BTreeMap::from([
            ("RHEI_TARGET_LAKE".to_owned(), self.catalog.clone()),
            ("RHEI_TARGET_DATA_PATH".to_owned(), self.data_path.clone()),
            ("RHEI_TARGET_STATE_PATH".to_owned(), path.display().to_string()),
            ("RHEI_EXTENSIONS".to_owned(), extensions()),
        ]);
        if !self.prefix.is_empty() {
            variables.insert("RHEI_TARGET_SCHEMA_PREFIX".to_owned(), self.prefix.clone());
        }
        if self.kind == Kind::S3 {
            variables.extend(super::s3::environment());
        }
        variables
    }

    /// The statements that open the lake for reading, as `copied`, in a process of our own.
    pub fn opening(&self) -> Vec<String> {
        let mut statements = vec![
            "SET autoinstall_known_extensions = false; SET autoload_known_extensions = false"
                .to_owned(),
        ];
        for name in ["ducklake", "postgres_scanner", "sqlite_scanner", "httpfs"] {
            statements.push(format!("LOAD '{}/{name}.duckdb_extension'", extensions()));
        }
        if self.kind == Kind::S3 {
            statements.push(super::s3::secret());
        }
        statements.push(format!(
            "SET GLOBAL TimeZone = 'America/New_York'; ATTACH '{}' AS copied (READ_ONLY); \
             USE copied; SET TimeZone = 'UTC'",
            self.catalog.replace('\'', "''")
        ));
        statements
    }

    /// The number of snapshots that the catalog has.
    pub fn snapshots(&self) -> u32 {
        let count = "SELECT count(*) FROM ducklake_snapshot";
        catalogs().named(self.database()).value(count).parse().unwrap()
    }

    /// Opens the lake for reading, as `copied`.
    pub fn open(&self) -> duckdb::Result<Connection> {
        self.open_with("")
    }

    /// The same with the secret of another store.
    pub fn open_with(&self, secret: &str) -> duckdb::Result<Connection> {
        let copy = Connection::open_in_memory()?;
        let mut opening = self.opening();
        opening.insert(opening.len() - 1, secret.to_owned());
        for statement in opening {
            copy.execute_batch(&statement)?;
        }
        Ok(copy)
    }
}

/// The folder of DuckDB's extensions.
fn extensions() -> String {
    std::env::var("RHEI_EXTENSIONS").expect("scripts/env.sh sets RHEI_EXTENSIONS")
}
