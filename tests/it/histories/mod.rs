//! Random histories of rows and schemas: whatever the source does, the copy is equal after each
//! `sync`, and at each settled position of a `run`, which is stopped and killed on the way and
//! never followed by a `sync`.
//!
//! A model of the schema (`model`), and only of the schema, says which statements are valid
//! (`play`); which rows they hit is decided at the server. The same seed gives the same statements.
//! What fails prints its script, and is played alone by `RHEI_TEST_SEED=base RHEI_TEST_HISTORY=n
//! make test TEST=random_histories`.

mod model;
mod play;

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};

use self::model::{MOOD, Publishing, World};
use crate::{
    bed::{
        Cluster, ClusterOptions, Db, Rhei, Running, Session, compare,
        oracle::{Pair, query_copy},
        temp_dir, wait_until,
    },
    following,
};

const SOON: Duration = Duration::from_secs(120);
const SEED: u64 = 20_261_127;
const PUBLICATION: &str = "histories";
const LEAVES: &str = "histories_of_leaves";

#[test]
fn random_histories_are_equal_after_every_sync() {
    each_history("RHEI_TEST_HISTORIES", 100, |cluster, seed| {
        History::new(cluster, seed).play_by_sync()
    });
}

/// What the stream loses, no copy heals: there is no `sync`, and copies are counted.
#[test]
fn random_histories_are_equal_while_run_follows() {
    let copies = AtomicU64::new(0);
    each_history("RHEI_TEST_RUN_HISTORIES", 60, |cluster, seed| {
        let copied = History::new(cluster, seed).play_by_run();
        println!("seed {seed}: {copied} copies");
        copies.fetch_add(copied, Ordering::Relaxed);
    });
    println!("{} copies in all", copies.into_inner());
}

fn each_history(count: &str, default: u64, play: impl Fn(&Cluster, u64) + Sync) {
    let histories = following::from_env(count, default);
    let seed = following::from_env("RHEI_TEST_SEED", SEED);
    let only = std::env::var("RHEI_TEST_HISTORY").ok().and_then(|text| text.parse::<u64>().ok());
    let range = only.map_or(0..histories, |only| only..only + 1);
    println!("{count}={histories} RHEI_TEST_SEED={seed}: histories {range:?}");
    // Of its own, because autovacuum moves rows at moments that no seed decides.
    let cluster = Cluster::start(ClusterOptions::default().conf("autovacuum = off"));
    let next = AtomicU64::new(range.start);
    let failed: Mutex<Vec<String>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let history = next.fetch_add(1, Ordering::Relaxed);
                    // The scripts of a few tell more than those of all.
                    if history >= range.end || failed.lock().unwrap().len() >= 3 {
                        break;
                    }
                    if let Err(panic) =
                        catch_unwind(AssertUnwindSafe(|| play(&cluster, seed + history)))
                    {
                        let why = panic
                            .downcast_ref::<String>()
                            .map_or("a panic without a message", String::as_str);
                        failed.lock().unwrap().push(format!("RHEI_TEST_HISTORY={history}: {why}"));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    // What failed is said at the end once more: whole scripts are long.
    assert!(
        failed.is_empty(),
        "replay with RHEI_TEST_SEED={seed} and one of these:\n{}",
        failed.join("\n")
    );
}

/// A deadlock with the replicator took our transaction.
struct Lost;

type Done = Result<(), Lost>;

struct History {
    seed: u64,
    major: u32,
    dice: Xoshiro256PlusPlus,
    world: World,
    publishing: Publishing,
    via_root: bool,
    has_trigger: bool,
    in_background: bool,
    /// Every statement so far, and what became of the replicator.
    script: Vec<String>,
    session: Session,
    rhei: Rhei,
    running: Option<Running>,
    copies: u64,
    slot: String,
    // A new database costs less than a tenth of a history, and leaves nothing of a failed one.
    db: Db,
    _folder: tempfile::TempDir,
}

impl Drop for History {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { seed, publishing, via_root, has_trigger, .. } = self;
            let logs = self.running.as_ref().map(Running::logs).unwrap_or_default();
            eprintln!(
                "--- history of seed {seed}, {publishing:?}, via_root = {via_root}, has_trigger = \
                 {has_trigger} ---\n\
                 {};\n{logs}\n--- end of {seed} ---",
                self.script.join(";\n")
            );
        }
    }
}

impl History {
    fn new(cluster: &Cluster, seed: u64) -> History {
        let mut dice = Xoshiro256PlusPlus::seed_from_u64(seed);
        let major = cluster.major();
        let mut publishing = Publishing::ALL[dice.random_range(0..Publishing::ALL.len())];
        if publishing == Publishing::Schemas && major < 15 {
            publishing = Publishing::All;
        }
        let via_root = publishing.has_two() || dice.random_range(0..2) == 0;
        let has_trigger = dice.random_range(0..4) == 0;
        let folder = temp_dir();
        let db = cluster.database("history");
        let slot = db.name().to_owned();
        if dice.random_range(0..2) == 0 {
            set_strangely(&db);
        }
        // Every other one has transactions that are larger than memory, at the source as well as
        // here.
        let is_small = seed % 2 == 1;
        let mut url = db.url();
        if is_small {
            url.push_str("&options=-c%20logical_decoding_work_mem%3D64kB");
            if major >= 16 {
                url.push_str("%20-c%20debug_logical_replication_streaming%3Dimmediate");
            }
        }
        let publication = if publishing.has_two() {
            format!("[\"{PUBLICATION}\", \"{LEAVES}\"]")
        } else {
            format!("\"{PUBLICATION}\"")
        };
        // Nothing of its surroundings may show in the copy.
        fs::write(
            folder.path().join(".duckdbrc"),
            "SET TimeZone = 'Asia/Tokyo';\nSET default_order = 'DESC';\n",
        )
        .unwrap();
        let rhei = Rhei::new(folder.path())
            .source(url)
            .target("copy.duckdb")
            .config(&format!(
                "[source]\nslot = \"{slot}\"\npublication = {publication}\n\
                 [sync]\ninterval = \"50ms\"\ncatalog_interval = \"100ms\"\nmemory_limit = \
                 \"{}\"\n",
                if is_small { "64kB" } else { "512MB" }
            ))
            .env("TZ", "America/New_York")
            .env("LC_ALL", "de_DE.UTF-8")
            .env("LANG", "tr_TR.UTF-8");
        let session = db.session();
        session.execute(
            "SET TimeZone = 'UTC'; SET DateStyle = 'ISO, YMD'; SET IntervalStyle = 'postgres'; SET \
             extra_float_digits = 1; \
             SET bytea_output = 'hex'; SET lock_timeout = '60s'; SET client_min_messages = warning",
        );
        History {
            seed,
            major,
            dice,
            world: World::default(),
            publishing,
            via_root,
            has_trigger,
            in_background: false,
            script: Vec::new(),
            session,
            rhei,
            running: None,
            copies: 0,
            slot,
            db,
            _folder: folder,
        }
    }

    fn play_by_sync(mut self) {
        self.begin();
        self.sync();
        let transactions = self.between(12..26);
        let syncs: Vec<usize> = (0..self.pick(4)).map(|_| self.pick(transactions)).collect();
        for number in 0..transactions {
            self.transaction();
            if syncs.contains(&number) {
                self.sync();
            }
        }
        self.sync();
        self.leave();
    }

    /// Returns how many copies there were.
    fn play_by_run(mut self) -> u64 {
        self.in_background = true;
        self.begin();
        self.start();
        if self.chance(70) {
            self.running.as_mut().unwrap().wait_for_log("all tables are live", SOON);
        }
        let transactions = if self.chance(10) { 60 } else { self.between(12..26) };
        let breaks: Vec<usize> = (0..self.between(1..4)).map(|_| self.pick(transactions)).collect();
        for number in 0..transactions {
            self.transaction();
            if breaks.contains(&number) {
                self.interrupt();
            }
        }
        self.settle();
        self.verify();
        if self.chance(50) {
            self.kill()
        } else {
            self.stop()
        }
        self.compare();
        self.leave();
        self.copies
    }

    /// One of the ways to end a `run`, and the next one.
    fn interrupt(&mut self) {
        match self.pick(5) {
            0 => self.kill(),
            1 => self.stop(),
            2 => {
                self.settle();
                self.stop();
                self.compare();
            }
            // Before DuckDB's next file checkpoint: whoever opens the file replays the statements
            // in its log.
            _ => {
                self.change_shapes();
                self.settle();
                self.kill();
                self.compare();
            }
        }
        self.start();
    }

    fn start(&mut self) {
        self.script.push("-- run".to_owned());
        self.running = Some(self.rhei.spawn(["run"]));
    }

    fn kill(&mut self) {
        self.script.push("-- kill -9".to_owned());
        let ended = self.running.take().unwrap().kill9();
        self.ended(&ended.stderr);
    }

    fn stop(&mut self) {
        self.script.push("-- SIGTERM".to_owned());
        let ended = self.running.take().unwrap().stop(SOON);
        self.ended(&ended.stderr);
        // One that has hardly begun does not listen to signals yet.
        let is_killed = ended.code().is_none() && ended.stderr.is_empty();
        assert!(is_killed || ended.code() == Some(0), "seed {}: {ended:?}", self.seed);
    }

    fn ended(&mut self, log: &str) {
        self.copies += u64::try_from(crate::bed::rhei::copies_in(log.lines()).len()).unwrap();
        self.script.extend(log.lines().map(|line| format!("-- {line}")));
    }

    /// Whatever was done until now is in the copy.
    #[track_caller]
    fn settle(&mut self) {
        self.script.push("-- settled".to_owned());
        let running = self.running.as_mut().unwrap();
        let Err(message) = self.rhei.try_settle(running, &self.db.wal_lsn(), SOON) else { return };
        assert!(message.contains(STUMBLE), "seed {}: {message}", self.seed);
        self.kill();
        self.copy_if_nobody_can_decode();
        self.start();
        self.rhei.wait_settled(self.running.as_mut().unwrap(), &self.db.wal_lsn(), SOON);
    }

    /// A few tables with rows, before anybody follows.
    fn begin(&mut self) {
        assert!(self.try_begin().is_ok(), "a deadlock with nobody");
        if self.has_trigger {
            self.rhei.run_ok(["check", "--install-ddl-trigger"]);
        }
    }

    fn try_begin(&mut self) -> Done {
        self.run("CREATE SCHEMA side".to_owned())?;
        self.run(format!("CREATE TYPE {MOOD} AS ENUM ('sad', 'ok', 'glad')"))?;
        self.run("CREATE DOMAIN public.small AS int CHECK (VALUE >= 0)".to_owned())?;
        self.run("CREATE DOMAIN public.words AS text[]".to_owned())?;
        let what = match self.publishing {
            Publishing::All => " FOR ALL TABLES",
            Publishing::Schemas => " FOR TABLES IN SCHEMA public, side",
            _ => "",
        };
        self.run(format!(
            "CREATE PUBLICATION {PUBLICATION}{what} WITH (publish_via_partition_root = {})",
            self.via_root
        ))?;
        match self.publishing {
            Publishing::RootsAndNamedLeaves => self.run(format!("CREATE PUBLICATION {LEAVES}"))?,
            Publishing::RootsAndAll => {
                self.run(format!("CREATE PUBLICATION {LEAVES} FOR ALL TABLES"))?
            }
            _ => {}
        }
        self.run("SELECT setseed(0.25)".to_owned())?;
        self.world.labels = ["sad", "ok", "glad"].map(str::to_owned).to_vec();
        for _ in 0..self.between(2..4) {
            self.create()?;
            self.insert_into(self.world.tables.len() - 1)?;
        }
        Ok(())
    }

    /// The copy must equal every table that is published now.
    #[track_caller]
    fn sync(&mut self) {
        self.script.push("-- sync".to_owned());
        let synced = self.rhei.run(["sync"]);
        if synced.code() == Some(1) && synced.stderr.contains(STUMBLE) {
            self.copy_if_nobody_can_decode();
            self.rhei.run_ok(["sync"]);
        } else {
            synced.assert_code(0);
        }
        self.compare();
    }

    /// No excuse for what [`STUMBLE`] says, unless the server fails in the same way without rhei.
    fn copy_if_nobody_can_decode(&self) {
        let peek = format!(
            "SELECT count(*) FROM pg_logical_slot_peek_binary_changes('{}', NULL, NULL, \
             'proto_version', '1', \
             'publication_names', '{PUBLICATION}')",
            self.slot
        );
        self.wait_for_slot();
        if self.db.try_query(&peek).is_err_and(|error| error.contains(STUMBLE)) {
            println!(
                "seed {}: the server cannot decode its own WAL; everything is copied again",
                self.seed
            );
            self.rhei.run_ok(["backfill", "--force"]);
        }
    }

    /// The program's own proof has to agree with the oracle.
    #[track_caller]
    fn verify(&self) {
        let verified = self.rhei.run(["verify"]);
        // Making the slot of its snapshot decodes WAL as well.
        let has_stumbled = verified.code() == Some(1) && verified.stderr.contains(STUMBLE);
        assert!(
            verified.code() == Some(0) || has_stumbled,
            "seed {}: {}\n{}{}",
            self.seed,
            verified.stdout,
            verified.stderr,
            self.rhei.run(["status"]).stdout
        );
    }

    /// What is published, and what the copy says is followed, are the same tables with the same
    /// rows.
    #[track_caller]
    fn compare(&mut self) {
        let publications =
            if self.publishing.has_two() { vec![PUBLICATION, LEAVES] } else { vec![PUBLICATION] };
        let names =
            publications.iter().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ");
        // A partition comes as its root wherever one of the publications says so of the root.
        let published = self.db.query(&format!(
            "WITH listed AS (
                 SELECT p.schemaname, p.tablename, format('%I.%I', p.schemaname, \
                 p.tablename)::regclass AS oid, o.pubviaroot
                 FROM pg_publication_tables p JOIN pg_publication o USING (pubname) WHERE \
                 p.pubname IN ({names}))
             SELECT DISTINCT schemaname, tablename FROM listed l WHERE NOT EXISTS (
                 SELECT FROM pg_partition_ancestors(l.oid) a JOIN listed r ON r.oid = a.relid AND \
                 r.pubviaroot
                 WHERE a.relid <> l.oid)"
        ));
        let followed = query_copy(
            self.rhei.target_path(),
            "SELECT source_schema, source_name, target_schema, target_name FROM _rhei.tables WHERE \
             state = 'live'",
        );
        let cells = |row: Vec<Option<String>>| -> Vec<String> {
            row.into_iter().map(|cell| cell.expect("a name")).collect()
        };
        let mut pairs: Vec<Pair> = Vec::new();
        for row in followed.into_iter().map(cells) {
            let [schema, name, target_schema, target] = <[String; 4]>::try_from(row).unwrap();
            pairs.push(Pair {
                source: (schema, name),
                target: (target_schema, target),
                excluded: Vec::new(),
            });
        }
        for row in published.into_iter().map(cells) {
            let [schema, name] = <[String; 2]>::try_from(row).unwrap();
            let source = (schema, name);
            if !pairs.iter().any(|pair| pair.source == source) {
                pairs.push(Pair { source: source.clone(), target: source, excluded: Vec::new() });
            }
        }
        let differences = compare(&self.db, self.rhei.target_path(), &pairs);
        assert!(
            differences.is_empty(),
            "seed {}: the copy differs:\n{}",
            self.seed,
            differences.join("\n")
        );
    }

    /// The server frees a slot a moment after its client has gone.
    fn wait_for_slot(&self) {
        let slot = &self.slot;
        wait_until(SOON, "the slot is free", || {
            self.db.value(&format!(
                "SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{slot}' AND active"
            )) == "0"
        });
    }

    /// A database is dropped more quickly when its slot is free.
    fn leave(&self) {
        self.wait_for_slot();
    }
}

/// PostgreSQL itself stumbles now and then over what a transaction rewrote and took back (XX000):
/// docs/operating.md.
const STUMBLE: &str = "unexpected duplicate for tablespace";

/// For whoever connects and says nothing else.
fn set_strangely(db: &Db) {
    let mut settings = vec![
        ("DateStyle", "German".to_owned()),
        ("IntervalStyle", "sql_standard".to_owned()),
        ("TimeZone", "Asia/Kolkata".to_owned()),
        ("extra_float_digits", "-3".to_owned()),
        ("bytea_output", "escape".to_owned()),
    ];
    let locales =
        Command::new("locale").arg("-a").output().map(|output| output.stdout).unwrap_or_default();
    let locales = String::from_utf8_lossy(&locales).into_owned();
    let other = locales
        .lines()
        .find(|name| ["de_DE", "fr_FR", "es_ES"].iter().any(|word| name.starts_with(word)));
    settings.extend(other.map(|name| ("lc_messages", name.to_owned())));
    for (name, value) in settings {
        db.execute(&format!("ALTER DATABASE \"{}\" SET {name} = '{value}'", db.name()));
    }
}
