//! Checks the copy at moments that nobody chose: whatever a kill leaves must be the source at one
//! commit.
//!
//! The files are copied while nobody writes them (rhei was killed or is stopped), and the copy is
//! opened: what is read is what a crash at that moment would have left, and the original is never
//! touched. A lake is read as it is, also while rhei writes it.

use std::{collections::BTreeSet, fs, path::Path, sync::mpsc};

use super::writer::{INVARIANTS, Invariant};
use crate::bed::{Lake, lake, temp_dir};

#[derive(Debug, Default, Clone)]
pub struct Readings {
    pub reads: u64,
    /// Before there was anything to read.
    pub empty: u64,
    pub checked: u64,
    /// Invariants of tables that were not live.
    pub passed_over: u64,
    pub broken: Vec<String>,
    checkpoint: u64,
}

/// The files of the target as they are now.
pub fn photograph(target: &Path) -> tempfile::TempDir {
    let folder = temp_dir();
    let name = target.file_name().unwrap().to_str().unwrap();
    for entry in fs::read_dir(target.parent().unwrap()).unwrap().flatten() {
        let file = entry.file_name();
        // Beside the database: its WAL, and what a checkpoint has under way.
        if file.to_str().is_some_and(|file| file.starts_with(name)) && entry.path().is_file() {
            fs::copy(entry.path(), folder.path().join(file)).unwrap();
        }
    }
    folder
}

/// Where the copy of one moment is read.
pub enum ReadFrom {
    Files(tempfile::TempDir),
    Lake(Lake),
}

impl ReadFrom {
    /// Opens the copy as anybody would, not as rhei does. `None`: there is no copy yet.
    fn open(&self, name: &str) -> duckdb::Result<Option<duckdb::Connection>> {
        match self {
            ReadFrom::Files(folder) => {
                let file = folder.path().join(name);
                if file.exists() { duckdb::Connection::open(file).map(Some) } else { Ok(None) }
            }
            ReadFrom::Lake(copy) => {
                let catalog = lake::catalogs().named(copy.database());
                let made = catalog.value(
                    "SELECT count(*) FROM pg_tables WHERE tablename = 'ducklake_schema_versions'",
                );
                if made == "1" { copy.open().map(Some) } else { Ok(None) }
            }
        }
    }
}

/// One look at the copy.
pub struct Picture {
    pub moment: String,
    pub copy: ReadFrom,
    /// The slot may have been lost: a new one on another history may begin before the old one
    /// ended.
    pub may_go_back: bool,
}

/// Until the sender is gone.
pub fn read_all(pictures: &mpsc::Receiver<Picture>, name: &str, seen: impl Fn(&Readings)) {
    let mut readings = Readings::default();
    for Picture { moment, copy, may_go_back } in pictures {
        readings.reads += 1;
        if may_go_back {
            readings.checkpoint = 0;
        }
        if let Err(error) = copy.open(name).and_then(|copy| readings.read(&moment, copy)) {
            readings.broken.push(format!("{moment}: cannot be read: {error}"));
        }
        seen(&readings);
    }
}

impl Readings {
    fn read(&mut self, moment: &str, copy: Option<duckdb::Connection>) -> duckdb::Result<()> {
        let Some(copy) = copy else {
            self.empty += 1;
            return Ok(());
        };
        copy.execute_batch("BEGIN TRANSACTION READ ONLY")?;
        let column = |sql: &str| -> duckdb::Result<Vec<String>> {
            let mut statement = copy.prepare(sql)?;
            statement.query_map([], |row| row.get(0))?.collect()
        };
        if column(
            "SELECT table_name FROM duckdb_tables() WHERE schema_name = '_rhei' AND \
                   table_name = 'pipeline'",
        )?
        .is_empty()
        {
            self.empty += 1;
            return Ok(());
        }
        for text in column("SELECT checkpoint_lsn FROM _rhei.pipeline")? {
            let checkpoint = lsn(&text);
            if checkpoint < self.checkpoint {
                self.broken.push(format!(
                    "{moment}: the checkpoint went back to {text} from {:X}",
                    self.checkpoint
                ));
            }
            self.checkpoint = checkpoint;
        }
        let live = column(
            "SELECT source_name FROM _rhei.tables WHERE state = 'live' AND source_schema = \
             'public'",
        )?;
        let live: BTreeSet<String> = live.into_iter().collect();
        for Invariant { name, tables, sql } in &INVARIANTS {
            if !tables.iter().all(|table| live.contains(*table)) {
                self.passed_over += 1;
                continue;
            }
            self.checked += 1;
            let text = |row: &duckdb::Row<'_>, at| row.get::<_, Option<String>>(at);
            let (found, expected) =
                copy.query_row(sql, [], |row| Ok((text(row, 0)?, text(row, 1)?)))?;
            if found != expected {
                self.broken.push(format!("{moment}: {name}: {found:?}, not {expected:?}"));
            }
        }
        Ok(())
    }
}

fn lsn(text: &str) -> u64 {
    let (high, low) = text.split_once('/').unwrap();
    let part = |text| u64::from_str_radix(text, 16).unwrap();
    (part(high) << 32) | part(low)
}
