//! Hours of an ordinary day: `make bench-soak` (RHEI_BENCH_MINUTES, default 30).
//!
//! A mixed load runs against `rhei run` at a steady rate: inserts, updates and deletes of random
//! rows, small transactions and now and then a large one. Each minute prints rhei's memory and the
//! size of the file; the end compares the file, and how long a group-by of it takes, with a fresh
//! copy of the same rows.
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
    path::Path,
    time::{Duration, Instant},
};

use bed::{Cluster, ClusterOptions, Load, Pgbench, Rhei, assert_same, temp_dir};
use measure::{Report, process_cpu, resident_mib};

const ROWS: u64 = 1_000_000;
/// Transactions a second, of four row changes each.
const RATE: u32 = 1200;

const SCRIPT: &str = "\\set id random(1, 1000000)
\\set fresh random(1000001, 1000000000)
BEGIN;
UPDATE t SET qty = qty + 1, amount = amount + 0.5, at = now() WHERE id = :id;
INSERT INTO t SELECT :fresh, 'customer number ' || :id % 5000, 'new', :id % 97, :id / 7.0, now(), \
true ON CONFLICT DO NOTHING;
UPDATE t SET status = 'paid' WHERE id = (SELECT id FROM t WHERE id > :fresh ORDER BY id LIMIT 1);
DELETE FROM t WHERE id = (SELECT id FROM t WHERE id > :fresh ORDER BY id OFFSET 1 LIMIT 1);
COMMIT;
";

/// The median of five.
fn group_by_seconds(file: &Path) -> f64 {
    let connection = duckdb::Connection::open_in_memory().unwrap();
    connection
        .execute_batch(&format!("ATTACH '{}' AS copied (READ_ONLY); USE copied", file.display()))
        .unwrap();
    let mut times: Vec<f64> = (0..5)
        .map(|_| {
            let started = Instant::now();
            let sql =
                "SELECT count(*) FROM (SELECT status, qty, sum(amount), max(\"at\"), min(name) \
                 FROM public.t GROUP BY ALL)";
            let groups: u64 = connection.query_row(sql, [], |row| row.get(0)).unwrap();
            assert!(groups > 0);
            started.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[2]
}

fn mb(path: &Path) -> f64 {
    std::fs::metadata(path).map_or(0.0, |file| file.len() as f64 / 1e6)
}

fn main() {
    let minutes: u64 =
        std::env::var("RHEI_BENCH_MINUTES").ok().and_then(|text| text.parse().ok()).unwrap_or(30);
    let cluster = Cluster::start(
        ClusterOptions::default().conf("synchronous_commit = off").conf("max_wal_size = 4GB"),
    );
    let db = cluster.database("soak");
    db.execute(&format!(
        "CREATE TABLE t (id bigint PRIMARY KEY, name text, status varchar(20), qty int, amount \
         numeric(12,2), at timestamptz, ok bool);
         INSERT INTO t SELECT i, 'customer number ' || i % 5000, 'new', i % 97, i / 7.0, now(), \
         true FROM generate_series(1, {ROWS}) i"
    ));
    db.execute("VACUUM ANALYZE t");
    let folder = temp_dir();
    let rhei = Rhei::new(folder.path()).source(db.url()).target("copy.duckdb").config(
        "[source]\nslot = \"soak\"\n[sync]\nmemory_limit = \
         \"256MB\"\n[target]\nduckdb_memory_limit = \"512MB\"\n",
    );
    rhei.run_ok(["sync"]);
    let running = rhei.spawn(["run"]);
    let pid = running.pid();
    let seconds = u32::try_from(minutes * 60).unwrap();
    let mut load =
        Pgbench::start(&db, &Load::seconds(seconds).clients(2).rate(RATE).script(SCRIPT));
    let started = Instant::now();
    let mut memory = Vec::new();
    println!("minute   resident MiB   file MB   log MB   CPU-s of rhei");
    while load.is_running() {
        std::thread::sleep(Duration::from_secs(60));
        if started.elapsed().as_secs() % 600 < 60 {
            db.execute("UPDATE t SET qty = qty + 1 WHERE id BETWEEN 1 AND 100000");
        }
        memory.push(resident_mib(pid).unwrap());
        println!(
            "{:6} {:14.0} {:9.1} {:8.1} {:15.1}",
            started.elapsed().as_secs() / 60,
            memory.last().unwrap(),
            mb(rhei.target_path()),
            mb(&rhei.target_path().with_extension("duckdb.wal")),
            process_cpu(&pid.to_string()).unwrap()
        );
    }
    let transactions = load.wait(Duration::from_secs(60));
    running.stop(Duration::from_secs(120)).assert_code(0);
    let grown = (mb(rhei.target_path()), group_by_seconds(rhei.target_path()));
    rhei.run_ok(["sync"]);
    let compacted = (mb(rhei.target_path()), group_by_seconds(rhei.target_path()));
    assert_same(&db, rhei.target_path(), &["public.t"]);
    rhei.run_ok(["verify"]);
    let fresh = rhei.clone().target("fresh.duckdb");
    fresh.run_ok(["backfill", "--no-slot"]);
    let fresh = (mb(fresh.target_path()), group_by_seconds(fresh.target_path()));
    // Memory rises with DuckDB's log until that is written into the file, every five minutes or so:
    // each third has two such peaks.
    let third = memory.len().div_ceil(3);
    let peak = |part: &[f64]| part.iter().copied().fold(0.0, f64::max);
    let peaks: Vec<String> =
        memory.chunks(third).map(|part| format!("{:.0}", peak(part))).collect();
    let mut report = Report::default();
    report.say(format!(
        "{transactions} transactions in {minutes} minutes; resident memory at most {} MiB in the \
         three thirds of that time",
        peaks.join(", ")
    ));
    for (what, (size, seconds)) in
        [("after the run", grown), ("after a sync", compacted), ("fresh", fresh)]
    {
        report.say(format!(
            "{what:14} file {size:7.1} MB ({:.2} of a fresh copy), group-by {:.1} ms ({:.2})",
            size / fresh.0,
            seconds * 1e3,
            seconds / fresh.1
        ));
    }
    report.write("An ordinary day", &db.value("SHOW server_version"));
}
