//! A database, a target file and the settings that tie them: what most tests begin with.

use std::{path::Path, time::Duration};

use crate::bed::{
    Cluster, Db, Output, Rhei, Running, assert_same,
    lake::Kind,
    oracle::{Pair, assert_same_pairs},
    temp_dir, wait_until,
};

/// Slots are of the whole cluster, so each test's is named like its database.
pub struct Following {
    slot: String,
    pub db: Db,
    pub rhei: Rhei,
    pub folder: tempfile::TempDir,
}

impl Following {
    pub fn new(name: &str) -> Self {
        Self::of(Cluster::shared().database(name))
    }

    /// As [`Self::new`], with a lake in the place of the file.
    pub fn in_lake(name: &str, kind: Kind) -> Self {
        let following = Self::new(name);
        Self { rhei: following.rhei.clone().lake(kind), ..following }
    }

    pub fn of(db: Db) -> Self {
        let folder = temp_dir();
        let name = db.name();
        let slot = name.get(name.len().saturating_sub(40)..).unwrap_or(name).to_owned();
        let rhei = Rhei::new(folder.path())
            .source(db.url())
            .target("copy.duckdb")
            .config(&format!("[source]\nslot = \"{slot}\"\n[sync]\ninterval = \"50ms\"\n"));
        Self { slot, db, rhei, folder }
    }

    pub fn slot(&self) -> &str {
        &self.slot
    }

    pub fn copy(&self) -> &Path {
        self.rhei.target_path()
    }

    #[track_caller]
    pub fn sync(&self) -> Output {
        self.rhei.run_ok(["sync"])
    }

    pub fn run(&self) -> Running {
        self.rhei.spawn(["run"])
    }

    /// Whatever the source has committed until now is in the copy.
    #[track_caller]
    pub fn wait_settled(&self, running: &mut Running) {
        self.rhei.wait_settled(running, &self.db.wal_lsn(), Duration::from_secs(120));
    }

    #[track_caller]
    pub fn assert_same(&self, tables: &[&str]) {
        assert_same(&self.db, self.copy(), tables);
    }

    /// Every published table must be the same.
    #[track_caller]
    pub fn assert_all_same(&self) {
        let published = self
            .db
            .query("SELECT schemaname || '.' || tablename FROM pg_publication_tables ORDER BY 1");
        let pairs: Vec<Pair> =
            published.iter().map(|row| Pair::new(row[0].as_deref().unwrap())).collect();
        assert_same_pairs(&self.db, self.copy(), &pairs);
    }

    /// Until all that is committed at the source by now is in the copy of a replicator that runs.
    #[track_caller]
    pub fn wait_until_in_step(&self) {
        let (slot, end) = (self.slot(), self.db.wal_lsn());
        wait_until(Duration::from_secs(60), "the slot passes all of it", || {
            self.db.execute("SELECT pg_logical_emit_message(false, 'rhei.test', 'go on')");
            self.db.value(&format!(
                "SELECT confirmed_flush_lsn >= '{end}'::pg_lsn FROM pg_replication_slots WHERE \
                 slot_name = '{slot}'"
            )) == "t"
        });
    }

    /// In step, then `changes` at the source, then in step again.
    #[track_caller]
    pub fn follows(schema: &str, tables: &[&str], changes: &[&str]) -> Self {
        let name = std::thread::current()
            .name()
            .unwrap_or("test")
            .rsplit("::")
            .next()
            .unwrap_or("test")
            .to_owned();
        let following = Self::new(&name);
        following.db.execute(schema);
        following.sync();
        following.assert_same(tables);
        for change in changes {
            following.db.execute(change);
        }
        following.sync();
        following.assert_same(tables);
        following
    }
}

pub fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}
