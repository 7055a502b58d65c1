//! What proving a copy costs: `rhei verify` beside PostgreSQL's own hash of the rows as text, and
//! catching up while the copy is verified again and again: `make bench-verify`.
//!
//! RHEI_BENCH_ROWS names the number of rows (default 10,000,000), of ten columns.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failing unwrap is a failing benchmark"
)]

#[allow(dead_code, reason = "the bed offers more than a benchmark needs")]
#[path = "../tests/it/bed/mod.rs"]
mod bed;
#[allow(dead_code, reason = "as above")]
mod measure;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bed::{Cluster, ClusterOptions, Db, Rhei, Running, temp_dir, wait_until};
use measure::{Report, family_cpu, process_cpu, resident_mib};

const SLOT: &str = "bench_verify";
const SOON: Duration = Duration::from_secs(600);

/// What DuckDB may use: it keeps what it has read for as long as there is room.
const DUCKDB: &str = "128MB";

/// The changes that a replicator catches up with, and in how many transactions they were made.
const CHANGES: u64 = 2_400_000;
const TRANSACTIONS: u64 = 600;

/// What one of the two ways to hash a table took.
struct Taken {
    wall: f64,
    server: f64,
    client: f64,
}

impl Taken {
    fn line(&self, what: &str) -> String {
        format!("{what:<44} {:>7.2} s  {:>7.2}  {:>7.2}", self.wall, self.server, self.client)
    }
}

fn taken(cluster: &Cluster, pid: Option<u32>, work: impl FnOnce()) -> Taken {
    let postmaster = cluster.postmaster_pid().unwrap();
    let client = || pid.and_then(|pid| process_cpu(&pid.to_string())).unwrap_or_default();
    let (server, before, started) = (family_cpu(postmaster), client(), Instant::now());
    work();
    let wall = started.elapsed().as_secs_f64();
    // The server's process of a session that has just ended is waited for.
    std::thread::sleep(Duration::from_millis(300));
    Taken { wall, server: family_cpu(postmaster) - server, client: client() - before }
}

/// Runs `work`, and returns the most memory that a process had meanwhile, in MiB.
fn most_memory(pid: u32, work: impl FnOnce()) -> f64 {
    let is_over = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&is_over);
    let watching = std::thread::spawn(move || {
        let mut most: f64 = 0.0;
        while !stop.load(Ordering::Relaxed) {
            most = most.max(resident_mib(pid).unwrap_or_default());
            std::thread::sleep(Duration::from_millis(20));
        }
        most
    });
    work();
    is_over.store(true, Ordering::Relaxed);
    watching.join().unwrap()
}

fn following(rhei: &Rhei) -> Running {
    let mut running = rhei.spawn(["run"]);
    wait_until(SOON, "the replicator answers", || {
        assert!(running.is_running(), "{}", running.logs());
        rhei.status().is_some()
    });
    running
}

/// What a replicator took for changes that were made while it followed.
struct Followed {
    /// The seconds until the source had made all changes, and those until the copy had them.
    made: f64,
    followed: f64,
    /// The seconds in which the replicator caught up with as many changes, which were made before.
    caught_up: f64,
}

/// Changes rows in many transactions while a replicator follows, beside a verification of all
/// tables or alone.
fn followed(db: &Db, rhei: &Rhei, is_verified: bool) -> Followed {
    let mut running = following(rhei);
    let (made, all) = while_verified(db, rhei, is_verified, || {
        let started = Instant::now();
        let end = make_changes(db);
        let made = started.elapsed().as_secs_f64();
        wait_for(rhei, &mut running, end);
        (made, started.elapsed().as_secs_f64())
    });

    // The replicator sleeps until all changes are made, and the verification with it.
    let caught_up = while_verified(db, rhei, is_verified, || {
        let pid = running.pid().to_string();
        signal(&pid, "STOP");
        let end = make_changes(db);
        let started = Instant::now();
        signal(&pid, "CONT");
        wait_for(rhei, &mut running, end);
        started.elapsed().as_secs_f64()
    });

    running.stop(SOON).assert_code(0);
    Followed { made, followed: all, caught_up }
}

/// Runs `work`, with a verification of all tables going on from its begin to its end if
/// `is_verified`.
fn while_verified<R>(db: &Db, rhei: &Rhei, is_verified: bool, work: impl FnOnce() -> R) -> R {
    if !is_verified {
        return work();
    }

    let verification = rhei.spawn(["verify"]);
    let is_reading = || {
        db.value(
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'rhei/verify' AND \
             state = 'active'",
        ) == "t"
    };
    wait_until(SOON, "the verification reads", is_reading);
    let done = work();

    let mut verification = verification;
    assert!(verification.is_running(), "the verification ended before the work: more rows");
    verification.wait(SOON).assert_code(0);
    done
}

/// Returns the position at which all changes are committed.
fn make_changes(db: &Db) -> u64 {
    db.execute(&format!("CALL change({TRANSACTIONS}, {})", CHANGES / TRANSACTIONS));
    db.value("SELECT pg_current_wal_lsn() - '0/0'").parse().unwrap()
}

fn wait_for(rhei: &Rhei, running: &mut Running, end: u64) {
    wait_until(SOON, "the copy has all changes", || {
        assert!(running.is_running(), "{}", running.logs());
        let status = rhei.status().unwrap_or_default();
        let lsn = status["checkpoint"]["lsn"].as_str().unwrap_or("0/0").to_owned();
        let (high, low) = lsn.split_once('/').unwrap();
        let number = |part| u64::from_str_radix(part, 16).unwrap();
        number(high) << 32 | number(low) >= end
    });
}

fn signal(pid: &str, name: &str) {
    let done = std::process::Command::new("kill").args([&format!("-{name}"), pid]).status();
    assert!(done.unwrap().success());
}

fn main() {
    let rows: u64 =
        std::env::var("RHEI_BENCH_ROWS").map_or(10_000_000, |rows| rows.parse().unwrap());
    let cluster = Cluster::start(
        ClusterOptions::default()
            .conf("autovacuum = off")
            .conf("shared_buffers = '512MB'")
            .conf("max_wal_size = '8GB'"),
    );
    let db = cluster.database("verify");
    db.execute(&format!(
        "CREATE TABLE t (id bigint PRIMARY KEY, n int, big bigint, name text, price numeric(12, \
         2), moment timestamptz, day date, flag boolean, who uuid, f float8);
         INSERT INTO t SELECT i, i % 1000, i * 7919, 'customer ' || i, i * 0.01, \
         timestamptz '2024-01-01Z' + i * interval '1 second', date '2024-01-01' + (i % 365)::int, \
         i % 2 = 0, md5(i::text)::uuid, i * 0.5 FROM generate_series(1::bigint, {rows}) i;
         CREATE TABLE changing (id bigint PRIMARY KEY, n int, v text);
         INSERT INTO changing SELECT i, i, 'v' FROM generate_series(1::bigint, {CHANGES}) i;
         CREATE PROCEDURE change(transactions int, each int) LANGUAGE plpgsql AS $$ BEGIN
         FOR i IN 0..transactions - 1 LOOP
         UPDATE changing SET n = n + 1, v = md5(n::text) WHERE id > i * each AND id <= (i + 1) * \
         each; COMMIT; END LOOP; END $$"
    ));
    db.execute("VACUUM (ANALYZE)");
    db.execute("CHECKPOINT");

    let folder = temp_dir();
    let rhei =
        Rhei::new(folder.path()).source(db.url()).target("copy.duckdb").deadline(SOON).config(
            &format!("[source]\nslot = \"{SLOT}\"\n[target]\nduckdb_memory_limit = \"{DUCKDB}\"\n"),
        );
    rhei.run_ok(["sync"]);

    let mut report = Report::default();
    report.say(format!("{rows} rows of ten columns                      wall   server s   rhei s"));
    let by_text = || {
        taken(&cluster, None, || {
            db.value("SELECT concat(count(*), sum(hashtextextended(t::text, 0))) FROM t");
        })
    };

    let running = following(&rhei);
    let pid = running.pid();
    let resting = resident_mib(pid).unwrap();
    let (mut texts, mut proofs, mut most): (Vec<Taken>, Vec<Taken>, f64) = Default::default();
    for _ in 0..3 {
        texts.push(by_text());
        most = most.max(most_memory(pid, || {
            proofs.push(taken(&cluster, Some(pid), || {
                rhei.run(["verify", "--table", "public.t"]).assert_code(0);
            }));
        }));
    }
    running.stop(SOON).assert_code(0);

    let best = |all: &[Taken]| {
        let walls = all.iter().enumerate().min_by(|a, b| a.1.wall.total_cmp(&b.1.wall));
        walls.map_or(0, |(at, _)| at)
    };
    let (text, proof) = (&texts[best(&texts)], &proofs[best(&proofs)]);
    report.say(text.line("source: sum(hashtextextended(t::text, 0))"));
    report.say(proof.line("rhei verify, both sides"));
    report.say(format!("verify: {:.2} of the source's own hash of text", proof.wall / text.wall));
    report.say(format!(
        "memory of the replicator, of which DuckDB may use {DUCKDB}: {resting:.0} MiB at rest, \
         {most:.0} MiB while it verifies"
    ));

    let (mut alone, mut beside): (Vec<Followed>, Vec<Followed>) = Default::default();
    for _ in 0..2 {
        alone.push(followed(&db, &rhei, false));
        beside.push(followed(&db, &rhei, true));
    }
    let least = |all: &[Followed], part: fn(&Followed) -> f64| {
        all.iter().map(part).fold(f64::INFINITY, f64::min)
    };
    report.say(format!(
        "{CHANGES} updates in {TRANSACTIONS} transactions{:>21} beside a verification",
        "alone"
    ));
    for (what, part) in [
        ("made at the source", (|all| all.made) as fn(&Followed) -> f64),
        ("made and followed", |all| all.followed),
        ("caught up with", |all| all.caught_up),
    ] {
        let (alone, beside) = (least(&alone, part), least(&beside, part));
        report.say(format!(
            "{what:<44} {alone:>7.2} s  {beside:>7.2} s: {:.2} of the throughput",
            alone / beside
        ));
    }

    db.query(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
    report.write("Proving a copy", &cluster.major().to_string());
}
