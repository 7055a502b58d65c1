//! A minute, or hours, of everything that goes wrong: rhei, its source and the network between them
//! are killed, stopped, cut and changed while rows and shapes are written. Whatever a reader finds
//! meanwhile is the source at one commit, rhei comes back by itself, and at the end both sides are
//! equal.
//!
//! The plan of faults comes from the seed: `make chaos SECONDS=60 SEED=n`. What it hits, and when,
//! also depends on the machine, so a seed that failed once may have to be run again and again.
//! `RHEI_CHAOS_LINES` says how many lines of rhei's log a failure shows.

pub mod faults;
mod proxy;
mod reader;
mod writer;

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    time::{Duration, Instant},
};

use self::{
    faults::{Heal, Kind, Step},
    proxy::Proxy,
    reader::Readings,
};
use crate::{
    bed::{
        Cluster, ClusterOptions, Cut, Lake, Rhei, Running, compare,
        lake::{self, catalogs},
        oracle::Pair,
        temp_dir,
    },
    following::from_env,
};

const SOON: Duration = Duration::from_secs(120);
const SLOT: &str = "chaos";
const PUBLICATION: &str = "rhei";
const TARGET: &str = "copy.duckdb";
const LAKE_IS_READ_EVERY: Duration = Duration::from_secs(1);

#[test]
fn a_minute_of_faults_leaves_both_sides_equal() {
    chaos(from_env("RHEI_CHAOS_SEED", 1), from_env("RHEI_CHAOS_SECONDS", 60));
}

/// A table that had changed its shape twice while rhei was behind was copied again without end,
/// since a relation from before the copy was described once more after a transaction that came in
/// pieces.
#[test]
fn the_last_seed_that_failed_leaves_both_sides_equal() {
    chaos(2, 25);
}

fn chaos(seed: u64, seconds: u64) {
    println!("RHEI_CHAOS_SEED={seed} RHEI_CHAOS_SECONDS={seconds}");
    let primary = Arc::new(Primary::start());
    let (is_over, committed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writers: Vec<_> = (1..=2)
        .map(|number| {
            let (primary, is_over, committed) =
                (Arc::clone(&primary), Arc::clone(&is_over), Arc::clone(&committed));
            std::thread::spawn(move || {
                writer::write(&primary, seed ^ (number << 32), &is_over, &committed)
            })
        })
        .collect();
    let mut chaos = Chaos::begin(seed, primary);
    let ended = catch_unwind(AssertUnwindSafe(|| chaos.rage(Duration::from_secs(seconds))));
    is_over.store(true, Relaxed);
    for writer in writers {
        writer.join().unwrap();
    }
    let ended = ended.and_then(|()| catch_unwind(AssertUnwindSafe(|| chaos.calm_down())));
    chaos.summarise(committed.load(Relaxed));
    if let Err(panic) = ended {
        chaos.show_logs();
        resume_unwind(panic);
    }
}

/// The server that writes go to.
pub struct Primary(Mutex<Vec<Arc<Cluster>>>);

impl Primary {
    fn start() -> Primary {
        let options = ClusterOptions::durable()
            .conf("synchronous_commit = on")
            .conf("wal_sender_timeout = '3s'")
            .conf("logical_decoding_work_mem = '64kB'");
        let cluster = Cluster::start(options);
        let published = published(cluster.major(), &writer::TABLES);
        cluster.maintenance().execute(writer::SCHEMA);
        cluster.maintenance().execute(&format!("CREATE PUBLICATION {PUBLICATION} FOR {published}"));
        Primary(Mutex::new(vec![Arc::new(cluster)]))
    }

    fn get(&self) -> Arc<Cluster> {
        Arc::clone(self.0.lock().unwrap().last().unwrap())
    }

    fn set(&self, cluster: Cluster) {
        self.0.lock().unwrap().push(Arc::new(cluster));
    }
}

/// Before 15 a publication has no schemas.
fn published(major: u32, tables: &[&str]) -> String {
    let tables = tables.join(", ");
    format!("TABLE {tables}{}", if major >= 15 { ", TABLES IN SCHEMA made" } else { "" })
}

struct Chaos {
    seed: u64,
    primary: Arc<Primary>,
    proxy: Proxy,
    rhei: Rhei,
    running: Option<Running>,
    /// A SIGTERM was sent, and until then rhei should have stopped.
    terminate_by: Option<Instant>,
    heals: Vec<(Instant, Heal)>,
    done: Vec<Step>,
    tally: BTreeMap<Kind, (u64, u64)>,
    starts: u64,
    /// Faults that may have lost the slot.
    losses: u64,
    reconnects: u64,
    could_not_begin: u64,
    exits: Vec<String>,
    log: Vec<String>,
    rows: u64,
    caught_up_in: Option<Duration>,
    pictures: Option<mpsc::Sender<reader::Picture>>,
    reader: Option<std::thread::JoinHandle<()>>,
    readings: Arc<Mutex<Readings>>,
    is_small_disk: bool,
    clock: Option<PathBuf>,
    /// The lake that takes the place of the file, as readers reach it: not through `catalog`.
    lake: Option<Lake>,
    /// Stands between rhei and the catalog of the lake.
    catalog: Option<Cut>,
    read_last: Instant,
    _disk: Option<faults::SmallDisk>,
    folder: tempfile::TempDir,
}

impl Chaos {
    fn begin(seed: u64, primary: Arc<Primary>) -> Chaos {
        let folder = temp_dir();
        let note = |kind: Kind, is_possible: bool| {
            if !is_possible {
                println!("{kind:?} is passed over: this machine has no means for it");
            }
        };
        let is_lake = lake::Kind::of_all_tests().is_some();
        let disk = faults::SmallDisk::mount(folder.path(), if is_lake { 512 } else { 96 });
        note(Kind::DiskFull, disk.is_some());
        // For `make chaos` alone: under this library a process is not quite what it is otherwise.
        let wants_clock = from_env("RHEI_CHAOS_CLOCK", 0) == 1;
        let faketime = faults::faketime().filter(|_| wants_clock);
        note(Kind::JumpClock, faketime.is_some() || !wants_clock);
        let proxy = Proxy::start(primary.get().port());
        let mut rhei = Rhei::new(folder.path())
            .source(format!(
                "postgresql://postgres@127.0.0.1:{}/postgres?sslmode=disable",
                proxy.port()
            ))
            .target(TARGET)
            .deadline(SOON)
            .config(&format!(
                "[source]\nslot = \"{SLOT}\"\npublication = \"{PUBLICATION}\"\non_slot_lost = \
                 \"resync\"\n\
                 [sync]\ninterval = \"100ms\"\ncatalog_interval = \"1s\"\nmemory_limit = \"64MB\"\n"
            ));
        let clock = faketime.map(|library| {
            let file = folder.path().join("clock");
            std::fs::write(&file, "+0s\n").unwrap();
            let shown = [
                ("LD_PRELOAD", library.as_str()),
                ("FAKETIME_TIMESTAMP_FILE", file.to_str().unwrap()),
                ("FAKETIME_CACHE_DURATION", "1"),
                // That one never jumps.
                ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ];
            rhei = shown.iter().fold(rhei.clone(), |rhei, (name, value)| rhei.env(name, value));
            file
        });
        let lake = Lake::at(rhei.target_path());
        let catalog = lake.as_ref().map(|lake| {
            assert!(!lake.database().is_empty(), "the catalog of the lake has to be a server");
            let cut = Cut::before(catalogs().port());
            Lake { catalog: cut.through(&lake.catalog), ..lake.clone() }
                .shared("", rhei.target_path());
            cut
        });
        if is_lake {
            rhei =
                rhei.env("RHEI_TARGET_KEEP_SNAPSHOTS", "5s").env("RHEI_TARGET_CLEAN_AFTER", "20s");
        }
        let readings = Arc::new(Mutex::new(Readings::default()));
        let (pictures, taken) = mpsc::channel();
        let seen = Arc::clone(&readings);
        let reader = std::thread::spawn(move || {
            reader::read_all(&taken, TARGET, |readings| *seen.lock().unwrap() = readings.clone());
        });
        Chaos {
            seed,
            primary,
            proxy,
            rhei,
            running: None,
            terminate_by: None,
            heals: Vec::new(),
            done: Vec::new(),
            tally: BTreeMap::new(),
            starts: 0,
            losses: 0,
            reconnects: 0,
            could_not_begin: 0,
            exits: Vec::new(),
            log: Vec::new(),
            rows: 0,
            caught_up_in: None,
            pictures: Some(pictures),
            reader: Some(reader),
            readings,
            is_small_disk: disk.is_some(),
            clock,
            lake,
            catalog,
            read_last: Instant::now(),
            _disk: disk,
            folder,
        }
    }

    /// Fault after fault, some while others last.
    fn rage(&mut self, time: Duration) {
        self.start_rhei();
        let end = Instant::now() + time;
        for step in faults::plan(self.seed, self.lake.is_some()) {
            let at = Instant::now() + step.after;
            if at > end {
                break;
            }
            self.tend_until("the next fault", at, |_| Instant::now() >= at);
            self.done.push(step);
            let did_hit = self.inject(step);
            let (hit, missed) = self.tally.entry(step.kind).or_default();
            *(if did_hit { hit } else { missed }) += 1;
        }
    }

    /// Nothing goes wrong any more: rhei finds its way by itself, then stops, and its copy is as it
    /// should be.
    fn calm_down(&mut self) {
        let now = Instant::now();
        self.heals.iter_mut().for_each(|(at, _)| *at = now);
        self.tend_until("everything is healed", now + SOON, |chaos| {
            chaos.heals.is_empty() && chaos.running.is_some()
        });
        let db = self.primary.get().maintenance();
        self.tend_until("the server is up", Instant::now() + SOON, |_| {
            db.try_query("SELECT 1").is_ok()
        });
        let end = db.value("SELECT pg_current_wal_lsn()");
        let reached = format!(
            "SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{SLOT}' AND \
             confirmed_flush_lsn >= '{end}'"
        );
        self.tend_until("`rhei run` has caught up by itself", Instant::now() + SOON, |_| {
            db.value(&reached) == "1"
        });
        self.caught_up_in = Some(now.elapsed());
        self.terminate_rhei();
        self.tend_until("`rhei run` has stopped", Instant::now() + SOON, |chaos| {
            chaos.running.is_none()
        });
        let synced = self.rhei.run(["sync"]);
        self.keep(&synced.stderr);
        synced.assert_code(0);

        self.picture("at the end");
        drop(self.pictures.take());
        self.reader.take().unwrap().join().unwrap();
        for writer::Invariant { name, sql, .. } in &writer::INVARIANTS {
            let at_source = db.query(sql);
            assert_eq!(at_source[0][0], at_source[0][1], "at the source itself: {name}");
        }
        let published = db.query(&format!(
            "SELECT schemaname || '.' || tablename FROM pg_publication_tables WHERE pubname = \
             '{PUBLICATION}'"
        ));
        let published: Vec<String> = published.into_iter().flatten().flatten().collect();
        let pairs: Vec<Pair> = published.iter().map(|name| Pair::new(name)).collect();
        let count = |name: &String| {
            db.value(&format!("SELECT count(*) FROM {name}")).parse::<u64>().unwrap()
        };
        self.rows = published.iter().map(count).sum();
        let differences = compare(&db, self.rhei.target_path(), &pairs);
        assert!(
            differences.is_empty(),
            "the copy differs from the source:\n{}",
            differences.join("\n")
        );
        self.rhei.run_ok(["verify"]);
        self.judge();
        assert!(self.exits.is_empty(), "`rhei run` ended by itself:\n{}", self.exits.join("\n"));
    }

    /// Lets time pass: heals what is due, and starts rhei again as a service manager would.
    #[track_caller]
    fn tend_until(
        &mut self,
        what: &str,
        deadline: Instant,
        mut is_done: impl FnMut(&Self) -> bool,
    ) {
        while !is_done(self) {
            assert!(Instant::now() <= deadline, "waited in vain: {what}");
            std::thread::sleep(Duration::from_millis(10));
            let now = Instant::now();
            let (due, later): (Vec<_>, Vec<_>) =
                self.heals.drain(..).partition(|(at, _)| *at <= now);
            self.heals = later;
            for (_, heal) in due {
                if !self.heal(&heal) {
                    self.heal_in(Duration::from_millis(100), heal);
                }
            }
            if self.running.as_mut().is_some_and(|running| !running.is_running()) {
                self.rhei_ended();
            }
            if self.lake.is_some() && self.read_last.elapsed() > LAKE_IS_READ_EVERY {
                self.picture("running");
            }
            assert!(
                self.terminate_by.is_none_or(|by| now < by),
                "`rhei run` did not stop within {SOON:?} of its SIGTERM"
            );
            self.judge();
        }
    }

    fn judge(&self) {
        let broken = self.readings.lock().unwrap().broken.clone();
        assert!(
            broken.is_empty(),
            "the copy was not the source at one commit:\n{}",
            broken.join("\n")
        );
    }

    fn rhei_ended(&mut self) {
        let Some(running) = self.running.take() else { return };
        let ended = running.wait(SOON);
        self.keep(&ended.stderr);
        self.picture("ended");
        let is_asked = self.terminate_by.take().is_some();
        // A SIGTERM that comes before rhei listens for signals ends it at once.
        if is_asked && ended.code().is_none() && ended.stderr.is_empty() {
            self.could_not_begin += 1;
        // A source that cannot be reached at the start is the operator's to mend, so this is an
        // answer.
        } else if ended.code() == Some(1)
            && !ended.stderr.contains("following the source")
            && !ended.stderr.contains("panicked")
        {
            self.could_not_begin += 1;
        } else if !is_asked || ended.code() != Some(0) {
            let words = last_lines(ended.stderr.lines(), 12);
            println!("--- rhei ended with {} (asked: {is_asked}) ---\n{words}", ended.status);
            self.exits.push(words);
        }
        self.heal_in(Duration::from_millis(300), Heal::StartRhei);
    }

    fn start_rhei(&mut self) {
        self.starts += 1;
        self.terminate_by = None;
        self.running = Some(self.rhei.spawn(["run"]));
    }

    /// False when it is being stopped already: a second signal would be something else.
    fn terminate_rhei(&mut self) -> bool {
        let Some(running) = self.running.as_ref().filter(|_| self.terminate_by.is_none()) else {
            return false;
        };
        running.signal("CONT");
        running.sigterm();
        self.terminate_by = Some(Instant::now() + SOON);
        true
    }

    fn heal_in(&mut self, after: Duration, heal: Heal) {
        self.heals.push((Instant::now() + after, heal));
    }

    fn picture(&mut self, moment: &str) {
        let moment = format!(
            "read {} (rhei {moment}, fault {})",
            self.readings.lock().unwrap().reads + 1,
            self.done.len()
        );
        self.read_last = Instant::now();
        if let Some(pictures) = &self.pictures {
            let copy = match &self.lake {
                Some(lake) => reader::ReadFrom::Lake(lake.clone()),
                None => reader::ReadFrom::Files(reader::photograph(self.rhei.target_path())),
            };
            let _ = pictures.send(reader::Picture { moment, copy, may_go_back: self.losses > 0 });
        }
    }

    fn keep(&mut self, stderr: &str) {
        self.reconnects += stderr.matches("the stream broke").count() as u64;
        self.log.push(format!("--- start {} ---", self.starts));
        self.log.extend(stderr.lines().map(str::to_owned));
    }

    fn summarise(&self, transactions: u64) {
        println!("--- seed {} ---", self.seed);
        for (kind, (hit, missed)) in &self.tally {
            println!(
                "{:>20} {hit:>4}{}",
                format!("{kind:?}"),
                if *missed > 0 { format!("  (+{missed} hit nothing)") } else { String::new() }
            );
        }
        let Readings { reads, empty, checked, passed_over, .. } =
            self.readings.lock().unwrap().clone();
        println!(
            "{} faults, {} starts of rhei ({} could not begin), {} ended by itself, {} reconnects\n\
             {reads} reads ({empty} before the first copy): {checked} invariants held, \
             {passed_over} were of tables not live\n\
             {transactions} transactions written, caught up by itself after {:.1?}, {} rows \
             compared",
            self.tally.values().map(|(hit, _)| hit).sum::<u64>(),
            self.starts,
            self.could_not_begin,
            self.exits.len(),
            self.reconnects,
            self.caught_up_in.unwrap_or_default(),
            self.rows,
        );
    }

    fn show_logs(&mut self) {
        println!("--- the plan until then ---");
        self.done.iter().for_each(|step| println!("{step:?}"));
        if let Some(running) = self.running.take() {
            let ended = running.kill9();
            self.keep(&ended.stderr);
        }
        println!(
            "--- rhei's last lines ---\n{}",
            last_lines(
                self.log.iter().map(String::as_str),
                from_env("RHEI_CHAOS_LINES", 60) as usize
            )
        );
        println!(
            "--- the server's last lines ---\n{}",
            last_lines(self.primary.get().log().lines(), 30)
        );
    }
}

fn last_lines<'a>(lines: impl Iterator<Item = &'a str>, count: usize) -> String {
    let lines: Vec<&str> = lines.collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
