//! What readers get while a replicator writes, and what they cost it: `make bench-serve`.
//!
//! RHEI_BENCH_ROWS names the rows of the table that is read (default 2,000,000, of ten columns).
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
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use bed::{
    Cluster, ClusterOptions, Db, Load, Pgbench, Rhei, Running, Session, temp_dir, wait_until,
};
use futures_util::{StreamExt, TryStreamExt};
use measure::{Report, resident_mib};
use tokio_postgres::{Client, Config, NoTls};

const SLOT: &str = "bench_serve";
const SOON: Duration = Duration::from_secs(600);
const CHANGES: u64 = 1_200_000;
const TRANSACTIONS: u64 = 600;

/// The check of TPC-B: both sums have to be the same in one commit.
const SUMS: &str = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(bbalance) FROM \
                    pgbench_branches), (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT \
                    coalesce(sum(delta), 0) FROM pgbench_history)";

struct Bench {
    db: Db,
    rhei: Rhei,
    folder: tempfile::TempDir,
}

impl Bench {
    fn run(&self, settings: &str) -> Running {
        let rhei = self.rhei.clone().config(&config(self.folder.path(), settings));
        let mut running = rhei.spawn(["run"]);
        running.wait_for_log("following the source", SOON);
        running
    }

    fn reader(&self) -> Config {
        let mut config = Config::new();
        config.host_path(self.folder.path()).user("reader").dbname("copy");
        config
    }

    /// The seconds in which a replicator catches up with changes that were made while it slept,
    /// beside readers that loop; and how many times they read.
    fn caught_up(&self, settings: &str, readers: usize) -> (f64, u64) {
        let mut running = self.run(settings);
        let (is_over, reads) = (AtomicBool::new(false), AtomicU64::new(0));
        let seconds = std::thread::scope(|scope| {
            for _ in 0..readers {
                scope.spawn(|| {
                    let session = Session::open(&self.reader()).unwrap();
                    while !is_over.load(Ordering::Relaxed) {
                        let row = session.query(SUMS);
                        let is_whole = row[0].iter().all(|sum| sum.as_deref() == Some("t"));
                        assert!(is_whole, "a torn read: {row:?}");
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            wait_until(SOON, "the readers read", || {
                reads.load(Ordering::Relaxed) >= readers as u64
            });

            let pid = running.pid().to_string();
            signal(&pid, "STOP");
            self.db.execute(&format!("CALL change({TRANSACTIONS}, {})", CHANGES / TRANSACTIONS));
            let end = self.db.value("SELECT pg_current_wal_lsn() - '0/0'").parse::<u64>().unwrap();
            let before = reads.load(Ordering::Relaxed);
            let started = Instant::now();
            signal(&pid, "CONT");
            wait_until(SOON, "the copy has all changes", || {
                assert!(running.is_running(), "{}", running.logs());
                checkpoint(&self.rhei) >= end
            });
            let seconds = started.elapsed().as_secs_f64();
            is_over.store(true, Ordering::Relaxed);
            (seconds, reads.load(Ordering::Relaxed) - before)
        });
        running.stop(SOON).assert_code(0);
        seconds
    }
}

fn config(folder: &Path, settings: &str) -> String {
    format!(
        "[source]\nslot = \"{SLOT}\"\n[sync]\ninterval = \"100ms\"\n[serve]\nlisten = \"{}\"\n\
         {settings}\n",
        folder.display()
    )
}

fn checkpoint(rhei: &Rhei) -> u64 {
    let status = rhei.status().unwrap_or_default();
    let lsn = status["checkpoint"]["lsn"].as_str().unwrap_or("0/0").to_owned();
    let (high, low) = lsn.split_once('/').unwrap();
    let number = |part| u64::from_str_radix(part, 16).unwrap();
    number(high) << 32 | number(low)
}

fn signal(pid: &str, name: &str) {
    let done = std::process::Command::new("kill").args([&format!("-{name}"), pid]).status();
    assert!(done.unwrap().success());
}

async fn connect(config: &Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The median and the 99th percentile of many runs of one statement, in milliseconds.
async fn latency(client: &Client, sql: &str, times: usize) -> (f64, f64) {
    let statement = client.prepare(sql).await.unwrap();
    let mut taken = Vec::with_capacity(times);
    for number in 0..times {
        let id = (number as i64 * 7919) % 1_000_000 + 1;
        let started = Instant::now();
        if statement.params().is_empty() {
            client.query(&statement, &[]).await.unwrap();
        } else {
            client.query(&statement, &[&id]).await.unwrap();
        }
        taken.push(started.elapsed().as_secs_f64() * 1000.0);
    }
    taken.sort_by(f64::total_cmp);
    (taken[times / 2], taken[times * 99 / 100])
}

/// Rates and latencies of one reader, with nothing else going on.
fn alone(bench: &Bench, rows: u64, report: &mut Report) {
    let running = bench.run("");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = connect(&bench.reader()).await;
        for (what, sql) in
            [("SELECT 1", "SELECT 1"), ("one row by its key", "SELECT * FROM wide WHERE id = $1")]
        {
            latency(&client, sql, 100).await;
            let (median, p99) = latency(&client, sql, 1_000).await;
            report.say(format!("{what:<44} median {median:.2} ms, p99 {p99:.2} ms"));
        }

        let started = Instant::now();
        let lines = client.copy_out("COPY wide TO STDOUT (FORMAT binary)").await.unwrap();
        let mut lines = std::pin::pin!(lines);
        let mut bytes = 0;
        while let Some(line) = lines.try_next().await.unwrap() {
            bytes += line.len();
        }
        let seconds = started.elapsed().as_secs_f64();
        report.say(format!(
            "COPY binary of {rows} rows of ten columns     {seconds:.2} s, {:.0} MB/s, {:.2} million \
             rows/s",
            bytes as f64 / 1e6 / seconds,
            rows as f64 / 1e6 / seconds
        ));

        let before = resident_mib(running.pid()).unwrap();
        let mut most = before;
        let sql = "SELECT i, 'customer number ' || i, i * 0.5 FROM range(10000000) r(i)";
        let rows = client.query_raw(sql, Vec::<String>::new()).await.unwrap();
        let mut rows = std::pin::pin!(rows);
        let (started, mut count) = (Instant::now(), 0_u64);
        while let Some(row) = rows.next().await {
            row.unwrap();
            count += 1;
            if count % 100_000 == 0 {
                most = most.max(resident_mib(running.pid()).unwrap());
            }
        }
        report.say(format!(
            "{count} rows streamed                      {:.2} s; memory {before:.0} MiB before, at \
             most {most:.0} MiB",
            started.elapsed().as_secs_f64()
        ));
    });
    running.stop(SOON).assert_code(0);
}

/// From a commit until readers can see it, beside four readers: at so many transactions a second,
/// or as many as the source makes.
fn freshness(bench: &Bench, rate: Option<u32>, report: &mut Report) {
    let running = bench.run("");
    let (is_over, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let session = Session::open(&bench.reader()).unwrap();
                while !is_over.load(Ordering::Relaxed) {
                    let row = session.query(SUMS);
                    let is_whole = row[0].iter().all(|sum| sum.as_deref() == Some("t"));
                    assert!(is_whole, "a torn read: {row:?}");
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut load = Load::seconds(60).clients(4);
        if let Some(rate) = rate {
            load = load.rate(rate);
        }
        let transactions = Pgbench::start(&bench.db, &load).wait(Duration::from_secs(3600));
        is_over.store(true, Ordering::Relaxed);
        let status = bench.rhei.status().unwrap();
        let figures = &status["commit_to_visible"]["since_start"];
        report.say(format!(
            "{transactions} transactions of TPC-B in 60 s beside 4 looping readers: {} reads, none \
             torn; commit to visible p50 {:.0} ms, p99 {:.0} ms",
            reads.load(Ordering::Relaxed),
            figures["p50_ms"].as_f64().unwrap(),
            figures["p99_ms"].as_f64().unwrap()
        ));
    });
    running.stop(SOON).assert_code(0);
}

fn main() {
    let rows: u64 =
        std::env::var("RHEI_BENCH_ROWS").map_or(2_000_000, |rows| rows.parse().unwrap());
    let cluster = Cluster::start(
        ClusterOptions::default().conf("shared_buffers = '512MB'").conf("max_wal_size = '8GB'"),
    );
    let db = cluster.database("serve");
    Pgbench::init(&db, 10);
    db.execute(&format!(
        "ALTER TABLE pgbench_history ADD COLUMN id bigserial PRIMARY KEY;
         CREATE TABLE wide (id bigint PRIMARY KEY, n int, big bigint, name text, price numeric(12, \
         2), moment timestamptz, day date, flag boolean, who uuid, f float8);
         INSERT INTO wide SELECT i, i % 1000, i * 7919, 'customer ' || i, i * 0.01, \
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

    let folder = temp_dir();
    let rhei = Rhei::new(folder.path())
        .source(db.url())
        .target("copy.duckdb")
        .deadline(SOON)
        .config(&config(folder.path(), ""));
    rhei.run_ok(["sync"]);
    let bench = Bench { db, rhei, folder };

    let mut report = Report::default();
    alone(&bench, rows, &mut report);

    // Before the copy has the dead rows of many large updates, which its next file checkpoint frees.
    freshness(&bench, Some(1000), &mut report);
    freshness(&bench, None, &mut report);

    report.say(format!("catching up with {CHANGES} updates in {TRANSACTIONS} transactions, beside readers that loop over four sums"));
    for nice in [10, 0] {
        let settings = format!("nice = {nice}");
        let (none, _) = bench.caught_up(&settings, 0);
        report.say(format!("nice {nice:>2}, no reader                       {none:>7.2} s"));
        for (readers, at_once) in [(1, 1), (4, 1), (4, 4)] {
            let settings = format!("{settings}\nmax_statements = {at_once}");
            let (seconds, reads) = bench.caught_up(&settings, readers);
            report.say(format!(
                "nice {nice:>2}, {readers} readers, {at_once} statements at once   {seconds:>7.2} s: \
                 {:.2} of the throughput; {:.0} reads/s",
                none / seconds,
                reads as f64 / seconds
            ));
        }
    }

    bench.db.query(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
    report.write("Reading while it runs", &cluster.major().to_string());
}
