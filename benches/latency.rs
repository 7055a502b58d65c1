//! From a commit at the source until a reader of the copy can see it: `make bench-latency`
//! (RHEI_BENCH_SECONDS, default 120).
//!
//! 1,000 transactions of one row a second against `rhei run` with an interval of 100 ms, measured
//! by rhei itself from commit timestamps. Each batch holds what came since the one before it, so
//! half an interval and an apply are what to expect.
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

use std::time::{Duration, Instant};

use bed::{Cluster, ClusterOptions, Load, Pgbench, Rhei, assert_same, temp_dir};
use measure::{Report, peak_mib, process_cpu};

const SCRIPT: &str = "\\set id random(1, 1000000)
UPDATE t SET qty = qty + 1, at = now() WHERE id = :id;
";

fn main() {
    let seconds: u32 =
        std::env::var("RHEI_BENCH_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(120);
    let cluster = Cluster::start(ClusterOptions::default().conf("max_wal_size = 4GB"));
    let db = cluster.database("latency");
    db.execute(
        "CREATE TABLE t (id bigint PRIMARY KEY, name text, qty int, at timestamptz);
         INSERT INTO t SELECT i, 'customer number ' || i % 5000, i % 97, now() FROM \
         generate_series(1, 1000000) i",
    );
    db.execute("VACUUM ANALYZE t");
    let folder = temp_dir();
    let rhei = Rhei::new(folder.path())
        .source(db.url())
        .target("copy.duckdb")
        .config("[source]\nslot = \"latency\"\n[sync]\ninterval = \"100ms\"\n");
    rhei.run_ok(["sync"]);
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("following the source", Duration::from_secs(60));
    let pid = running.pid();
    let (started, cpu) = (Instant::now(), process_cpu(&pid.to_string()).unwrap());
    let transactions =
        Pgbench::start(&db, &Load::seconds(seconds).clients(4).rate(1000).script(SCRIPT))
            .wait(Duration::from_secs(3600));
    let wall = started.elapsed().as_secs_f64();
    let cpu = process_cpu(&pid.to_string()).unwrap() - cpu;
    let peak = peak_mib(pid).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let status: serde_json::Value =
        serde_json::from_str(&rhei.run_ok(["status", "--json"]).stdout).unwrap();
    running.stop(Duration::from_secs(60)).assert_code(0);
    rhei.run_ok(["sync"]);
    assert_same(&db, rhei.target_path(), &["public.t"]);
    let figures = &status["commit_to_visible"]["since_start"];
    let mut report = Report::default();
    report.say(format!(
        "{transactions} transactions in {wall:.0} s, {:.0} a second, interval 100 ms",
        transactions as f64 / wall
    ));
    report.say(format!(
        "commit to visible: p50 {:.0} ms (wanted 150), p90 {:.0} ms, p99 {:.0} ms (wanted 500), at \
         most {:.0} ms",
        figures["p50_ms"].as_f64().unwrap(),
        figures["p90_ms"].as_f64().unwrap(),
        figures["p99_ms"].as_f64().unwrap(),
        figures["max_ms"].as_f64().unwrap()
    ));
    let all = figures["transactions"].as_u64().unwrap().max(1);
    for bucket in figures["buckets"].as_array().unwrap() {
        let count = bucket["transactions"].as_u64().unwrap();
        let bar = "#".repeat((count * 60).div_ceil(all) as usize);
        let up_to = bucket["up_to_ms"].as_u64().map_or("more".to_owned(), |ms| format!("{ms} ms"));
        report.say(format!("{up_to:>9} {count:8} {bar}"));
    }
    report.say(format!("rhei took {:.0} % of a core, peak {peak:.0} MiB", 100.0 * cpu / wall));
    report.write("From commit to visible", &db.value("SHOW server_version"));
}
