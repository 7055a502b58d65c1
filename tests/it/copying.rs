//! Copies beside the stream: the slot never waits for one, and nothing is lost or trusted wrongly
//! when one breaks off.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use serde_json::Value;

use crate::{
    bed::{Cluster, ClusterOptions, Rhei, Running, assert_same, oracle::query_copy, wait_until},
    following::{Following, from_env},
};

const SOON: Duration = Duration::from_secs(60);

fn status(rhei: &Rhei) -> Value {
    serde_json::from_str(&rhei.run_ok(["status", "--json"]).stdout).unwrap()
}

/// None as long as there is no copy.
fn jobs(rhei: &Rhei) -> Vec<Value> {
    let output = rhei.run(["jobs", "--json"]);
    serde_json::from_str::<Value>(&output.stdout)
        .ok()
        .and_then(|jobs| jobs.as_array().cloned())
        .unwrap_or_default()
}

fn with_status<'a>(jobs: &'a [Value], table: &str, status: &str) -> Vec<&'a Value> {
    jobs.iter().filter(|job| job["payload"]["table"] == table && job["status"] == status).collect()
}

fn rows(jobs: &[&Value]) -> u64 {
    jobs.iter().map(|job| job["rows"].as_u64().unwrap_or_default()).sum()
}

/// A table that takes seconds to copy, in many pieces. Its rows have a TOASTed value each.
fn slowly(name: &str, rows: u32) -> (Following, Rhei) {
    slowly_in(Following::new(name), rows)
}

fn slowly_in(following: Following, rows: u32) -> (Following, Rhei) {
    following.db.execute(&format!(
        "CREATE TABLE large (id int PRIMARY KEY, n int NOT NULL, filler text, doc text) WITH \
         (autovacuum_enabled = off);
         ALTER TABLE large ALTER doc SET STORAGE EXTERNAL; ALTER TABLE large ALTER filler SET \
         STORAGE PLAIN;
         INSERT INTO large SELECT i, 0, repeat(md5(i::text), 20), CASE WHEN i % 10 = 0 THEN \
         repeat(md5((-i)::text), 80) END
         FROM generate_series(1, {rows}) i;
         CREATE TABLE other (id int PRIMARY KEY, v text); INSERT INTO other VALUES (1, 'one')"
    ));
    let rhei = following
        .rhei
        .clone()
        .env("RHEI_BACKFILL_CHUNK_SIZE", "1MB")
        .env("RHEI_BACKFILL_RATE_LIMIT", "3MB");
    (following, rhei)
}

fn wait_for_chunks(rhei: &Rhei, count: usize) {
    wait_until(SOON, "chunks that are done", || {
        with_status(&jobs(rhei), "public.large", "done").len() >= count
    });
}

fn state_of(status: &Value, table: &str) -> String {
    let mut tables = status["tables"].as_array().unwrap().iter();
    let table = tables.find(|stored| stored["source"] == table);
    table.map_or_else(String::new, |table| table["state"].as_str().unwrap().to_owned())
}

/// Tables go live one by one, and the stream does not wait for the large one.
#[test]
fn the_stream_goes_on_while_a_table_is_copied() {
    let (following, rhei) = slowly("beside", 20_000);
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("live table=\"public.other\"", SOON);
    wait_for_chunks(&rhei, 1);
    let before = following.db.wal_lsn();
    following.db.execute(
        "UPDATE other SET v = 'two'; UPDATE large SET n = 1 WHERE id % 3 = 0; DELETE FROM large \
         WHERE id % 7 = 0;
         INSERT INTO large SELECT -i, 2, 'new', 'new' FROM generate_series(1, 100) i;
         UPDATE large SET id = id + 1000000 WHERE id % 20 = 0",
    );
    let slot = following.slot();
    wait_until(SOON, "the slot passes changes of a table that is being copied", || {
        following.db.value(&format!(
            "SELECT confirmed_flush_lsn > '{before}' FROM pg_replication_slots WHERE slot_name = \
             '{slot}'"
        )) == "t"
    });
    let seen = status(&rhei);
    assert_eq!(
        (state_of(&seen, "public.large").as_str(), state_of(&seen, "public.other").as_str()),
        ("copying", "live")
    );
    let large = seen["tables"]
        .as_array()
        .unwrap()
        .iter()
        .find(|table| table["source"] == "public.large")
        .unwrap();
    assert!(
        large["copy"]["rows"].as_u64() > Some(0) && large["copy"]["chunks"].as_u64() > Some(10),
        "{large}"
    );
    assert!(seen["copy"]["megabytes_per_second"].as_f64() > Some(0.0), "{seen}");
    running.wait_for_log("all tables are live", SOON);
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.large", "public.other"]);
    assert_eq!(rows(&with_status(&jobs(&rhei), "public.large", "done")), 20_000);
}

/// Whatever the snapshot holds is gone by then. Either the stream says so, or the catalogs do.
#[test]
fn a_table_that_is_truncated_while_it_is_copied_ends_equal() {
    let (following, rhei) = slowly("truncated_copy", 20_000);
    let mut running = rhei.spawn(["run"]);
    wait_for_chunks(&rhei, 2);
    following.db.execute(
        "TRUNCATE large; INSERT INTO large VALUES (5, 5, 'five', 'five'), (6, 6, 'six', NULL)",
    );
    running.wait_for_log("live table=\"public.large\"", SOON);
    following.db.execute("UPDATE large SET n = 7 WHERE id = 5");
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.large", "public.other"]);
    assert_eq!(state_of(&status(&rhei), "public.large"), "live");
}

/// Tables without a key are multisets; what came and went while they were copied is counted. The
/// target transaction of a reload that is larger than memory keeps the jobs of the copy that it
/// ends, for as long as it takes.
#[test]
fn a_table_that_is_reloaded_by_a_large_transaction_while_it_is_copied_ends_equal() {
    let (following, rhei) = slowly("reloaded_meanwhile", 40_000);
    let rhei = rhei.env("RHEI_SYNC_MEMORY_LIMIT", "64kB");
    let running = rhei.spawn(["run"]);
    wait_for_chunks(&rhei, 1);
    following.db.execute(
        "BEGIN; TRUNCATE large; INSERT INTO large SELECT i, i, repeat('again', 20), 'x' FROM \
         generate_series(1, 20000) i;
         UPDATE large SET n = n + 1 WHERE id % 3 = 0; DELETE FROM large WHERE id % 5 = 0; COMMIT; \
         UPDATE large SET n = -n WHERE id < 100",
    );
    wait_until(SOON, "the table is live", || state_of(&status(&rhei), "public.large") == "live");
    running.stop(SOON).assert_code(0);
    rhei.run_ok(["sync"]);
    following.assert_same(&["public.large"]);
}

#[test]
fn a_table_without_a_key_is_copied_beside_the_stream() {
    let following = Following::new("keyless_copy");
    following.db.execute(
        "CREATE TABLE bag (a int, b text, f float8); ALTER TABLE bag REPLICA IDENTITY FULL;
         INSERT INTO bag SELECT i % 5000, repeat(md5((i % 5000)::text), 10), i % 2 / 2.0 FROM \
         generate_series(1, 20000) i;
         CREATE TABLE log (a int, b text); ALTER TABLE log REPLICA IDENTITY NOTHING;
         INSERT INTO log SELECT i, repeat('x', 300) FROM generate_series(1, 20000) i",
    );
    let rhei = following
        .rhei
        .clone()
        .env("RHEI_BACKFILL_CHUNK_SIZE", "1MB")
        .env("RHEI_BACKFILL_RATE_LIMIT", "3MB");
    let mut running = rhei.spawn(["run"]);
    wait_until(SOON, "chunks that are done", || {
        jobs(&rhei).iter().filter(|job| job["status"] == "done").count() >= 2
    });
    for _ in 0..3 {
        following.db.execute(
            "DELETE FROM bag WHERE ctid IN (SELECT ctid FROM bag WHERE a % 3 = 0 LIMIT 700);
             UPDATE bag SET f = '-0' WHERE a % 11 = 0; INSERT INTO bag SELECT i, 'again', NULL \
             FROM generate_series(1, 50) i;
             INSERT INTO log SELECT i, 'later' FROM generate_series(1, 50) i",
        );
    }
    running.wait_for_log("all tables are live", SOON);
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.bag", "public.log"]);
}

/// Between two snapshots a row moves to another key, its TOASTed value untouched, and another row
/// takes its key: whatever chunk holds that key by then, the value has to be the first one's.
#[test]
fn a_killed_copy_goes_on_where_it_was_whatever_became_of_keys_and_toast() {
    let (following, rhei) = slowly("resumed", 20_000);
    let running = rhei.spawn(["run"]);
    wait_for_chunks(&rhei, 5);
    running.kill9();
    following.db.execute(
        "UPDATE large SET n = n + 1 WHERE id % 50 = 0;
         UPDATE large SET id = id + 1000000 WHERE id % 200 = 0;
         INSERT INTO large SELECT id - 1000000, 9, 'taken over', repeat('other', 1000) FROM large \
         WHERE id > 1000000;
         UPDATE large SET id = -id WHERE id % 130 = 0; DELETE FROM large WHERE id % 170 = 0;
         UPDATE large SET n = 77 WHERE id % 390 = 0 OR id < -15000",
    );
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("the table's copy goes on where it was", SOON);
    running.wait_for_log("all tables are live", SOON);
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.large", "public.other"]);
    let jobs = jobs(&rhei);
    let done = with_status(&jobs, "public.large", "done");
    let snapshots: std::collections::BTreeSet<&str> =
        done.iter().map(|job| job["payload"]["snapshot_lsn"].as_str().unwrap()).collect();
    assert_eq!(snapshots.len(), 2, "{jobs:?}");
    assert!(rows(&done) < 26_000, "{} rows were copied", rows(&done));
}

/// Pages mean nothing any more once the table lies in another file.
#[test]
fn a_rewritten_table_is_never_resumed() {
    let (following, rhei) = slowly("rewritten", 10_000);
    let running = rhei.spawn(["run"]);
    wait_for_chunks(&rhei, 3);
    running.kill9();
    following.db.execute("DELETE FROM large WHERE id % 2 = 0");
    following.db.execute("VACUUM FULL large");
    let fast = following.rhei.clone();
    let output = fast.run_ok(["sync"]);
    assert!(!output.stderr.contains("the table's copy goes on where it was"), "{}", output.stderr);
    following.assert_same(&["public.large", "public.other"]);
}

/// Found when it is planned, or by the catalogs after that; nobody waits for it.
#[test]
fn a_table_that_is_dropped_before_its_copy_goes_on_keeps_nobody_waiting() {
    let cluster = Cluster::start(ClusterOptions::default());
    let (following, rhei) = slowly_in(Following::of(cluster.database("dropped_resume")), 10_000);
    let running = rhei.spawn(["run"]);
    wait_for_chunks(&rhei, 3);
    running.kill9();
    // The slot of the next snapshot waits for this one.
    let open = following.db.session();
    open.execute("BEGIN; INSERT INTO other VALUES (2, 'open')");
    let mut running = rhei.spawn(["sync"]);
    running.wait_for_log("waiting for transactions", SOON);
    following.db.execute("DROP TABLE large");
    open.execute("COMMIT");
    running.wait(SOON).assert_code(0);
    following.assert_same(&["public.other"]);
    assert_eq!(state_of(&status(&rhei), "public.large"), "dropped");
    let left = query_copy(
        following.copy(),
        "SELECT count(*)::VARCHAR FROM duckdb_tables() WHERE table_name LIKE 'pending_%' OR \
         table_name LIKE '%__rhei_shadow'",
    );
    assert_eq!(left, [[Some("0".to_owned())]]);
}

/// Somebody's table under its name is left alone, and concerns no other table.
#[test]
fn a_table_that_cannot_be_copied_does_not_keep_the_others_from_it() {
    let following = Following::new("one_foreign");
    following.db.execute(
        "CREATE TABLE mine (id int PRIMARY KEY); CREATE TABLE good (id int PRIMARY KEY); INSERT \
         INTO good VALUES (1)",
    );
    let copy = duckdb::Connection::open(following.copy()).unwrap();
    copy.execute_batch("CREATE SCHEMA public; CREATE TABLE public.mine AS SELECT 42 AS mine")
        .unwrap();
    drop(copy);
    let output = following.rhei.run(["sync"]);
    output.assert_code(1);
    assert!(
        output.stderr.contains("public.mine") && output.stderr.contains("did not put it there"),
        "{}",
        output.stderr
    );
    following.assert_same(&["public.good"]);
}

/// The snapshot is given back meanwhile, and the stream goes on.
#[test]
fn a_paused_copy_keeps_what_is_done_and_goes_on_when_it_is_resumed() {
    let (following, rhei) = slowly("paused", 20_000);
    let mut running = rhei.spawn(["run"]);
    wait_for_chunks(&rhei, 3);
    rhei.run_ok(["pause"]);
    wait_until(SOON, "the snapshot to be given back", || {
        following.db.value(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND \
             application_name LIKE 'rhei/snapshot%'",
        ) == "0"
    });
    let done = with_status(&jobs(&rhei), "public.large", "done").len();
    following
        .db
        .execute("UPDATE large SET n = 3 WHERE id % 9 = 0; UPDATE other SET v = 'while paused'");
    let end = following.db.wal_lsn();
    let slot = following.slot();
    wait_until(SOON, "the stream to go on", || {
        following.db.value(&format!(
            "SELECT confirmed_flush_lsn >= '{end}' FROM pg_replication_slots WHERE slot_name = \
             '{slot}'"
        )) == "t"
    });
    let seen = status(&rhei);
    assert_eq!(
        (state_of(&seen, "public.large").as_str(), &seen["paused"]),
        ("copying", &Value::Bool(true))
    );
    assert_eq!(with_status(&jobs(&rhei), "public.large", "done").len(), done);
    rhei.run_ok(["resume"]);
    running.wait_for_log("all tables are live", SOON);
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.large", "public.other"]);
    assert!(rows(&with_status(&jobs(&rhei), "public.large", "done")) < 26_000);
    rhei.run(["pause"]).assert_code(1);
}

/// What a writer does until it is told to stop; each line is one transaction.
const WRITES: [&str; 9] = [
    "INSERT INTO large SELECT nextval('moved'), 1, 'inserted', repeat('i', 3000) FROM \
     generate_series(1, 20) i",
    "UPDATE large SET n = n + 1 WHERE id % 97 = (random() * 96)::int",
    "UPDATE large SET id = nextval('moved') WHERE id IN (SELECT id FROM large ORDER BY random() \
     LIMIT 20)",
    "DELETE FROM large WHERE id IN (SELECT id FROM large ORDER BY random() LIMIT 30)",
    "UPDATE large SET doc = repeat('d', 4000) WHERE id IN (SELECT id FROM large ORDER BY random() \
     LIMIT 10)",
    "TRUNCATE churn; INSERT INTO churn SELECT i, 'churn' FROM generate_series(1, 50) i",
    "UPDATE churn SET v = v || '.' WHERE id % 2 = 0; UPDATE packed SET v = v || '!' WHERE id % 3 = \
     0",
    "VACUUM FULL packed",
    "UPDATE other SET v = md5(random()::text)",
];

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Returns how often the copy was killed, and how many pages of the large table were under way
/// then.
fn kill_at_random_moments(following: &Following, rhei: &Rhei, kills: u64, seed: u64) -> (u64, u64) {
    let mut state = seed;
    let (mut killed, mut lost) = (0, 0);
    while killed < kills {
        let mut running: Running = rhei.spawn(["run"]);
        // From when the copy of this start has begun.
        wait_until(SOON, "a copy that has begun, or has ended", || {
            running.logs().contains("live table=\"public.large\"")
                || following.db.value(
                    "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() \
                     AND application_name LIKE 'rhei/copy%' AND query LIKE 'COPY%large%'",
                ) == "t"
        });
        // xorshift: killed after so many more chunks, whatever is under way then.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let done = || with_status(&jobs(rhei), "public.large", "done").len();
        let enough = done() + (state % 5) as usize;
        wait_until(SOON, "chunks that are done", || {
            done() >= enough || running.logs().contains("live table=\"public.large\"")
        });
        let is_over =
            !running.is_running() || running.logs().contains("live table=\"public.large\"");
        running.kill9();
        if is_over {
            break;
        }
        killed += 1;
        let pages = |job: &Value| {
            let [first, next] = [0, 1].map(|at| job["payload"]["pages"][at].as_u64());
            next.zip(first).map_or(0, |(next, first)| next - first)
        };
        lost +=
            with_status(&jobs(rhei), "public.large", "running").into_iter().map(pages).sum::<u64>();
    }
    (killed, lost)
}

/// `RHEI_TEST_KILLS`, `RHEI_TEST_SEED`. What was under way at a kill is copied again, and nothing
/// else.
#[test]
fn a_copy_killed_at_random_moments_under_writes_ends_equal_and_copies_little_twice() {
    let kills = from_env("RHEI_TEST_KILLS", 10);
    let seed = from_env("RHEI_TEST_SEED", 20_261_121);
    println!("RHEI_TEST_KILLS={kills} RHEI_TEST_SEED={seed}");
    const ROWS: u32 = 120_000;
    let (following, rhei) = slowly("killed_copy", ROWS);
    following.db.execute(
        "CREATE SEQUENCE moved START 10000000; CREATE TABLE churn (id int PRIMARY KEY, v text); \
         CREATE TABLE packed (id int PRIMARY KEY, v text);
         INSERT INTO packed SELECT i, 'p' FROM generate_series(1, 500) i",
    );
    let rhei = rhei.env("RHEI_BACKFILL_RATE_LIMIT", "15MB");
    let pages: u64 = following.db.value("SELECT pg_relation_size('large') / 8192").parse().unwrap();
    let stop = AtomicBool::new(false);
    let (killed, lost, transactions) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) {
                following.db.execute(WRITES[number % WRITES.len()]);
                number += 1;
            }
            number
        });
        // Also when an assertion fails: else the writer would go on.
        let stopped = StopAtEnd(&stop);
        let (killed, lost) = kill_at_random_moments(&following, &rhei, kills, seed);
        let mut running = following.rhei.spawn(["run"]);
        running.wait_for_log("all tables are live", SOON * 2);
        drop(stopped);
        let transactions = writer.join().unwrap();
        running.stop(SOON).assert_code(0);
        (killed, lost, transactions)
    });
    following.sync();
    following.assert_same(&["public.large", "public.other", "public.churn", "public.packed"]);
    let jobs = jobs(&following.rhei);
    let done = with_status(&jobs, "public.large", "done");
    let whole = rows(&done);
    let lost_rows = lost * u64::from(ROWS) / pages;
    println!(
        "{killed} kills, {transactions} transactions of a writer; {} chunks done with {whole} \
         rows, {lost} of {pages} pages under \
         way at a kill (about {lost_rows} rows); the table had {ROWS}",
        done.len()
    );
    assert!(
        (whole + lost_rows) * 10 < u64::from(ROWS) * 13,
        "{whole} rows in whole chunks, about {lost_rows} in broken ones"
    );
    let sums = query_copy(
        following.copy(),
        "SELECT count(*)::VARCHAR FROM _rhei.jobs WHERE status = 'running'",
    );
    assert_eq!(sums, [[Some("0".to_owned())]]);
}

/// No value is known that comes so far and is refused then, so failpoints have DuckDB refuse one.
#[test]
fn a_value_that_duckdb_refuses_while_it_is_copied_pauses_its_table_and_no_other() {
    for place in ["load", "finish", "merge"] {
        let following = Following::new(&format!("refused_{place}"));
        following.db.execute(
            "CREATE TABLE bad (id int PRIMARY KEY, v text); CREATE TABLE other (id int PRIMARY KEY);
             INSERT INTO bad VALUES (1, 'a'); INSERT INTO other VALUES (1)",
        );
        let refusing = following
            .rhei
            .clone()
            .env("FAILPOINTS", &format!("{place}.refused=return(public.bad)"));
        let paused = || {
            let of = "SELECT state, error FROM _rhei.tables WHERE source_name = 'bad'";
            let found = query_copy(following.copy(), of).remove(0);
            assert_eq!(found[0].as_deref(), Some("error"), "{place}: {found:?}");
            assert!(
                found[1].as_ref().is_some_and(|reason| reason.contains("on purpose")),
                "{place}: {found:?}"
            );
        };
        let output = refusing.run(["sync"]);
        output.assert_code(1);
        assert!(
            output.stderr.contains("public.bad") && output.stderr.contains("on purpose"),
            "{}",
            output.stderr
        );
        paused();
        following.assert_same(&["public.other"]);

        // And `run` goes on, while it copies as while it follows.
        let mut running = refusing.spawn(["run"]);
        running.wait_for_log("following the source", SOON);
        following.db.execute("INSERT INTO other VALUES (2)");
        refusing.run_ok(["resync", "public.bad"]);
        running.wait_for_log("not copied", SOON);
        following.db.execute("INSERT INTO other VALUES (3)");
        following.wait_until_in_step();
        running.stop(SOON).assert_code(0);
        paused();
        following.assert_same(&["public.other"]);

        // Without a slot, too.
        let plain = refusing.clone().target("plain.duckdb");
        plain.run(["backfill", "--no-slot"]).assert_code(1);
        assert_same(&following.db, plain.target_path(), &["public.other"]);

        following.rhei.run_ok(["backfill", "--table", "public.bad", "--force"]);
        following.assert_same(&["public.bad", "public.other"]);
    }
}

/// Nothing else moves the checkpoint then, since an idle position is saved every ten seconds.
#[test]
fn a_table_that_is_copied_goes_live_at_once_on_an_idle_source() {
    let following = Following::new("idle_live");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    for _ in 0..2 {
        let mark = running.log_mark();
        following.rhei.run_ok(["resync", "public.t"]);
        running.wait_for_log_after(mark, "copied table=", SOON);
        running.wait_for_log_after(mark, "all tables are live", Duration::from_secs(4));
    }
    running.stop(SOON).assert_code(0);
}

/// A copy may take hours. An ALTER that waits for it has every query of its table wait behind it.
#[test]
fn a_copy_locks_no_other_table_while_it_runs() {
    let following = Following::new("copy_locks");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, repeat('x', 200) \
         FROM generate_series(1, 40000) i;
         CREATE TABLE tree (id int PRIMARY KEY) PARTITION BY RANGE (id);
         CREATE TABLE leaf PARTITION OF tree FOR VALUES FROM (0) TO (10);
         CREATE TABLE gone PARTITION OF tree FOR VALUES FROM (10) TO (20); INSERT INTO tree VALUES \
         (1), (11)",
    );
    let rhei = following
        .rhei
        .clone()
        .env("RHEI_BACKFILL_CHUNK_SIZE", "1MB")
        .env("RHEI_BACKFILL_RATE_LIMIT", "2MB");
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("copied table=\"public.tree\"", SOON);
    let locked = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE \
                  l.locktype = 'relation' \
         AND a.datname = current_database() AND a.application_name LIKE 'rhei/%' AND l.relation IN \
         ('tree'::regclass, 'leaf'::regclass, 'gone'::regclass)";
    wait_until(SOON, "the last question about the tree gives its locks back", || {
        following.db.value(locked) == "0"
    });
    following
        .db
        .execute("SET lock_timeout = '5s'; ALTER TABLE tree ADD COLUMN late int; DROP TABLE gone");
    let copied = running.logs().contains("copied table=\"public.t\"");
    assert!(!copied, "the copy was over before:\n{}", running.logs());
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.t", "public.tree"]);
}
