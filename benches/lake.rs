//! A lake against a DuckDB file, side by side in one run; then tables of several sizes in a lake
//! (RHEI_BENCH_MILLIONS, default "10"), and a mixed load on one for as long as RHEI_BENCH_MINUTES
//! says (default 40): `make bench-lake`.
//!
//! The catalog is a PostgreSQL of its own, the data a folder. "Apply" is the time that rhei itself
//! measures for a batch: no decoding, no waiting. Reads are those of another process.
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

use bed::{
    Cluster, ClusterOptions, Db, Lake, Load, Pgbench, Rhei, Running, assert_same, lake::Kind,
    temp_dir, wait_until,
};
use measure::{Report, resident_mib};
use serde_json::Value;

const ROWS: u64 = 1_000_000;
/// Rows of the table whose copy is timed, with the start of rhei.
const COPIED_ROWS: u64 = 5_000_000;
/// Batches of [`CHANGES`] that are measured, after two that are not.
const BATCHES: u64 = 20;
const CHANGES: u64 = 10_000;
/// Transactions a second of the mixed load, of four row changes each.
const RATE: u32 = 300;
const SOON: Duration = Duration::from_secs(600);

const SCRIPT: &str = "\\set id random(1, 1000000)
\\set fresh random(10000001, 1000000000)
BEGIN;
UPDATE t SET qty = qty + 1, amount = amount + 0.5, at = now() WHERE id = :id;
INSERT INTO t SELECT :fresh, 'customer number ' || :id % 5000, 'new', :id % 97, :id / 7.0, now(), \
true ON CONFLICT DO NOTHING;
UPDATE t SET status = 'paid' WHERE id = (SELECT id FROM t WHERE id > :fresh ORDER BY id LIMIT 1);
DELETE FROM t WHERE id = (SELECT id FROM t WHERE id > :fresh ORDER BY id OFFSET 1 LIMIT 1);
COMMIT;
";

/// What is measured of one target.
#[derive(Debug, Clone, Copy)]
struct Figures {
    copy_rows_a_second: f64,
    apply_ms: f64,
    catch_up_changes_a_second: f64,
    group_by_ms: f64,
}

fn make_source(cluster: &Cluster, name: &str, rows: u64) -> Db {
    let db = cluster.database(name);
    db.execute(&format!(
        "CREATE TABLE t (id bigint PRIMARY KEY, name text, status varchar(20), qty int, amount \
         numeric(12,2), at timestamptz, ok bool);
         INSERT INTO t SELECT i, 'customer number ' || i % 5000, 'new', i % 97, i / 7.0, now(), \
         true FROM generate_series(1, {rows}) i"
    ));
    db.execute("VACUUM ANALYZE t");
    db
}

/// A half of updates, a quarter of inserts, a quarter of deletes, in one transaction.
fn change(db: &Db, rows: u64, round: u64) {
    let (quarter, fresh) = (CHANGES / 4, 2 * rows + round * CHANGES);
    let spread = rows / CHANGES;
    db.execute(&format!(
        "BEGIN; UPDATE t SET qty = qty + 1 WHERE id IN \
         (SELECT i * {spread} + {round} FROM generate_series(1, {CHANGES} / 2) i);
         INSERT INTO t SELECT {fresh} + i, 'fresh', 'new', 1, 1, now(), true \
         FROM generate_series(1, {quarter}) i;
         DELETE FROM t WHERE id IN (SELECT (i + {CHANGES} / 2) * {spread} + {round} \
         FROM generate_series(1, {quarter}) i); COMMIT;"
    ));
}

/// The median of five, by a process that has the copy open.
fn group_by_ms(file: &Path) -> f64 {
    let copy = bed::oracle::open_copy(file).unwrap();
    let mut times: Vec<f64> = (0..5)
        .map(|_| {
            let started = Instant::now();
            let groups: u64 = copy
                .query_row(
                    "SELECT count(*) FROM (SELECT status, qty, sum(amount), max(\"at\"), \
                     min(name) FROM public.t GROUP BY ALL)",
                    [],
                    |row| row.get(0),
                )
                .unwrap();
            assert_ne!(groups, 0);
            started.elapsed().as_secs_f64() * 1000.0
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[2]
}

fn apply_ms(rhei: &Rhei) -> f64 {
    let status = rhei.status().unwrap();
    status["commit_pause"]["last_minutes"]["p50_ms"].as_f64().unwrap()
}

fn wait_for(rhei: &Rhei, running: &mut Running, db: &Db) {
    let end = db.wal_lsn();
    let reached = |status: &Value| {
        let lsn = status["checkpoint"]["lsn"].as_str().unwrap_or("0/0").to_owned();
        bed::rhei::wal_bytes(&lsn) >= bed::rhei::wal_bytes(&end)
    };
    wait_until(SOON, "the copy has what was committed", || {
        assert!(running.is_running(), "{}", running.logs());
        // Asking takes a process, which must not stand in the way of what is measured.
        std::thread::sleep(Duration::from_millis(500));
        db.execute("SELECT pg_logical_emit_message(true, 'bench', 'go on')");
        rhei.status().as_ref().is_some_and(reached)
    });
}

fn rhei_of(db: &Db, folder: &Path, name: &str, kind: Option<Kind>) -> Rhei {
    let rhei = Rhei::new(folder)
        .source(db.url())
        .target("copy.duckdb")
        .deadline(SOON)
        .config(&format!("[source]\nslot = \"{name}\"\n[sync]\ninterval = \"100ms\"\n"));
    match kind {
        Some(kind) => rhei.lake(kind),
        None => rhei,
    }
}

fn copy_rows_a_second(cluster: &Cluster, name: &str, kind: Option<Kind>) -> f64 {
    let db = make_source(cluster, name, COPIED_ROWS);
    let folder = temp_dir();
    let rhei = rhei_of(&db, folder.path(), name, kind);
    let started = Instant::now();
    rhei.run_ok(["sync"]);
    COPIED_ROWS as f64 / started.elapsed().as_secs_f64()
}

fn measure(cluster: &Cluster, name: &str, kind: Option<Kind>) -> Figures {
    let copy_rows_a_second = copy_rows_a_second(cluster, &format!("{name}_copied"), kind);

    let db = make_source(cluster, name, ROWS);
    let folder = temp_dir();
    let rhei = rhei_of(&db, folder.path(), name, kind);
    rhei.run_ok(["sync"]);

    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("following the source", SOON);
    for round in 0..BATCHES + 2 {
        change(&db, ROWS, round);
        wait_for(&rhei, &mut running, &db);
    }
    let apply_ms = apply_ms(&rhei);
    running.stop(SOON).assert_code(0);

    let transactions = 20_000;
    Pgbench::start(&db, &Load::transactions(transactions).clients(2).script(SCRIPT)).wait(SOON);
    let started = Instant::now();
    rhei.run_ok(["sync"]);
    let catch_up = started.elapsed().as_secs_f64();
    let group_by_ms = group_by_ms(rhei.target_path());

    assert_same(&db, rhei.target_path(), &["public.t"]);
    Figures {
        copy_rows_a_second,
        apply_ms,
        catch_up_changes_a_second: f64::from(transactions) * 4.0 / catch_up,
        group_by_ms,
    }
}

fn side_by_side(cluster: &Cluster, report: &mut Report) {
    let file = measure(cluster, "of_file", None);
    let lake = measure(cluster, "of_lake", Some(Kind::Postgres));
    report.say(format!("{:44} {:>10} {:>10} {:>8}", "", "file", "lake", "ratio"));
    let mut line = |what: &str, file: f64, lake: f64| {
        report.say(format!("{what:44} {file:10.0} {lake:10.0} {:8.2}", lake / file));
    };
    line("first sync, rows a second (5M rows)", file.copy_rows_a_second, lake.copy_rows_a_second);
    line("apply of 10,000 mixed changes, ms", file.apply_ms, lake.apply_ms);
    line(
        "catching up, changes a second",
        file.catch_up_changes_a_second,
        lake.catch_up_changes_a_second,
    );
    line("group by of another process, ms", file.group_by_ms, lake.group_by_ms);
}

/// Tables of this number of millions of rows, in a lake.
fn by_size(cluster: &Cluster, sizes: &[u64], report: &mut Report) {
    report.say(format!(
        "{:>12} {:>10} {:>14} {:>8} {:>9} {:>10} {:>12}",
        "million rows", "sync s", "rows a second", "files", "data MB", "apply ms", "group by ms"
    ));
    for &millions in sizes {
        let rows = millions * 1_000_000;
        let name = format!("sized_{millions}");
        let db = make_source(cluster, &name, rows);
        let folder = temp_dir();
        let rhei = rhei_of(&db, folder.path(), &name, Some(Kind::Postgres));
        let started = Instant::now();
        rhei.run_ok(["sync"]);
        let seconds = started.elapsed().as_secs_f64();

        let mut running = rhei.spawn(["run"]);
        running.wait_for_log("following the source", SOON);
        for round in 0..BATCHES {
            change(&db, rows, round);
            wait_for(&rhei, &mut running, &db);
        }
        let apply = apply_ms(&rhei);
        let lake = rhei.status().unwrap()["file"].clone();
        running.stop(SOON).assert_code(0);
        report.say(format!(
            "{millions:12} {seconds:10.0} {:14.0} {:>8} {:9.0} {apply:10.0} {:12.0}",
            rows as f64 / seconds,
            lake["lake"]["files"].to_string(),
            lake["file_bytes"].as_f64().unwrap_or(f64::NAN) / 1e6,
            group_by_ms(rhei.target_path())
        ));
        // Too many rows to compare one by one.
        let sums = "SELECT concat_ws(' ', count(*), sum(id), sum(qty), sum(amount), count(name)) \
                    FROM public.t";
        let found = bed::oracle::query_copy(rhei.target_path(), sums);
        assert_eq!(found[0][0].as_deref(), Some(db.value(sums).as_str()));
        db.execute("DROP TABLE t");
    }
    report.say(String::new());
}

fn under_load(cluster: &Cluster, minutes: u64, report: &mut Report) {
    let db = make_source(cluster, "loaded", ROWS);
    let folder = temp_dir();
    let rhei = Rhei::new(folder.path())
        .source(db.url())
        .target("copy.duckdb")
        .deadline(SOON)
        .config("[source]\nslot = \"loaded\"\n[sync]\ninterval = \"1s\"\n")
        .env("RHEI_TARGET_KEEP_SNAPSHOTS", "5m")
        .env("RHEI_TARGET_CLEAN_AFTER", "5m")
        .lake(Kind::Postgres);
    rhei.run_ok(["sync"]);
    let running = rhei.spawn(["run"]);
    let pid = running.pid();

    let seconds = u32::try_from(minutes.max(1) * 60).unwrap();
    let mut load =
        Pgbench::start(&db, &Load::seconds(seconds).clients(2).rate(RATE).script(SCRIPT));
    let started = Instant::now();
    report.say(
        "minute  files  delete files  old files  snapshots  data MB  catalog MB  apply p50 ms  \
         group by ms  rhei MiB"
            .to_owned(),
    );
    while load.is_running() {
        std::thread::sleep(Duration::from_secs(60));
        let Some(status) = rhei.status() else { continue };
        let (file, lake) = (&status["file"], &status["file"]["lake"]);
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        report.say(format!(
            "{:6} {:6.0} {:13.0} {:10.0} {:10.0} {:8.1} {:11.1} {:13.0} {:12.0} {:9.0}",
            started.elapsed().as_secs() / 60,
            number(&lake["files"]),
            number(&lake["delete_files"]),
            number(&lake["old_files"]),
            number(&lake["snapshots"]),
            number(&file["file_bytes"]) / 1e6,
            number(&lake["catalog_bytes"]) / 1e6,
            number(&status["commit_pause"]["last_minutes"]["p50_ms"]),
            group_by_ms(rhei.target_path()),
            resident_mib(pid).unwrap_or(f64::NAN),
        ));
    }
    let transactions = load.wait(SOON);
    running.stop(SOON).assert_code(0);
    rhei.run_ok(["sync"]);
    assert_same(&db, rhei.target_path(), &["public.t"]);
    rhei.run_ok(["compact"]);
    let lake = Lake::at(rhei.target_path()).unwrap();
    report.say(format!(
        "{transactions} transactions of four changes; equal to the source; group by after `rhei \
         compact`: {:.0} ms ({:?} catalog)",
        group_by_ms(rhei.target_path()),
        lake.kind
    ));
}

fn main() {
    let minutes: u64 =
        std::env::var("RHEI_BENCH_MINUTES").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    let cluster = Cluster::start(
        ClusterOptions::default().conf("synchronous_commit = off").conf("max_wal_size = 4GB"),
    );
    let mut report = Report::default();
    side_by_side(&cluster, &mut report);
    report.say(String::new());
    let sizes = std::env::var("RHEI_BENCH_MILLIONS").unwrap_or_else(|_| "10".to_owned());
    let sizes: Vec<u64> =
        sizes.split_whitespace().map(|millions| millions.parse().unwrap()).collect();
    by_size(&cluster, &sizes, &mut report);
    under_load(&cluster, minutes, &mut report);
    report.write("A lake", &cluster.major().to_string());
}
