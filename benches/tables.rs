//! Many small tables: what a first copy and each `sync` after it cost, beside what PostgreSQL and
//! DuckDB alone take for as many tables in the same run: `make bench-tables`.
//!
//! RHEI_BENCH_TABLES names how many (default "100 1000"; 10,000 takes minutes). Each has ten rows
//! of four columns. CPU-seconds of the server are the whole machine's less those of the client.
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
    io::Write,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use bed::{Cluster, ClusterOptions, Db, Rhei, Running, temp_dir, wait_until};
use measure::{GLANCE, Report, family_cpu, machine_cpu, peak_mib, process_cpu};

const ROWS: u32 = 10;

/// `catalog_interval`, in seconds: its default.
const LOOK: u32 = 10;

/// How many of these a replicator is watched for.
const LOOKS: u32 = 3;

/// What DuckDB may use, in MB: as much for each table with 10,000 as with 1,000.
fn duckdb_mb(tables: usize) -> usize {
    (tables / 2).max(512)
}

struct Measured {
    wall: f64,
    cpu: f64,
    machine: f64,
    peak_mib: f64,
}

/// Runs work that says what the client took: CPU-seconds and memory in MiB.
fn measured(work: impl FnOnce() -> (f64, f64)) -> Measured {
    let (machine, started) = (machine_cpu(), Instant::now());
    let (cpu, peak_mib) = work();
    Measured {
        wall: started.elapsed().as_secs_f64(),
        cpu,
        machine: machine_cpu() - machine,
        peak_mib,
    }
}

impl Measured {
    fn line(&self, what: &str) -> String {
        let server = (self.machine - self.cpu).max(0.0);
        format!(
            "{what:<26} {:>8.2} s  {:>7.2}  {server:>7.2}  {:>6.0}",
            self.wall, self.cpu, self.peak_mib
        )
    }
}

fn synced(rhei: &Rhei) -> (f64, f64) {
    let mut running = rhei.spawn(["sync"]);
    let (mut cpu, mut peak) = (0.0, 0.0);
    while running.is_running() {
        cpu = process_cpu(&running.pid().to_string()).unwrap_or(cpu);
        peak = peak_mib(running.pid()).unwrap_or(peak);
        std::thread::sleep(GLANCE);
    }
    running.wait(Duration::from_secs(1)).assert_code(0);
    (cpu, peak)
}

/// CPU-seconds and memory in MiB of a process that has to end well.
fn until_ended(mut child: Child) -> (f64, f64) {
    let (mut cpu, mut peak) = (0.0, 0.0);
    while child.try_wait().unwrap().is_none() {
        cpu = process_cpu(&child.id().to_string()).unwrap_or(cpu);
        peak = peak_mib(child.id()).unwrap_or(peak);
        std::thread::sleep(GLANCE);
    }
    assert!(child.wait().unwrap().success());
    (cpu, peak)
}

fn dumped(cluster: &Cluster, db: &Db, file: &Path) -> (f64, f64) {
    let mut command = Command::new(cluster.bin().join("pg_dump"));
    command.args(["--format=custom", "--dbname"]).arg(db.url()).arg("--file").arg(file);
    until_ended(command.stdout(Stdio::null()).spawn().unwrap())
}

/// One psql copies each table to nothing, as a script would.
fn copied_by_psql(cluster: &Cluster, db: &Db, tables: usize) -> (f64, f64) {
    let copies: String = (1..=tables).map(|table| format!("COPY t{table} TO STDOUT;\n")).collect();
    let mut command = Command::new(cluster.bin().join("psql"));
    command.args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--dbname"]).arg(db.url());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(copies.as_bytes()).unwrap();
    until_ended(child)
}

/// What `rhei run` takes while no published table changes: its share of a core, and the server's
/// CPU-seconds for each look at the catalogs. `meanwhile`: what others do, once a second.
fn at_rest(cluster: &Cluster, rhei: &Rhei, meanwhile: impl Fn()) -> (f64, f64) {
    let mut running = rhei.spawn(["run"]);
    wait_until(Duration::from_secs(60), "the replicator answers", || {
        assert!(running.is_running(), "{}", running.logs());
        rhei.status().is_some()
    });
    let postmaster = cluster.postmaster_pid().unwrap();
    let used = |running: &Running| {
        (process_cpu(&running.pid().to_string()).unwrap(), family_cpu(postmaster))
    };
    let rest = |seconds: u32| {
        (0..seconds).for_each(|_| {
            meanwhile();
            std::thread::sleep(Duration::from_secs(1));
        })
    };
    rest(LOOK);
    let before = used(&running);
    rest(LOOK * LOOKS);
    let after = used(&running);
    running.stop(Duration::from_secs(60)).assert_code(0);
    ((after.0 - before.0) / f64::from(LOOK * LOOKS), (after.1 - before.1) / f64::from(LOOKS))
}

/// DuckDB makes and fills as many tables in one transaction.
fn made_by_duckdb(tables: usize, file: &Path) -> (f64, f64) {
    let before = process_cpu("self").unwrap();
    let connection = duckdb::Connection::open(file).unwrap();
    connection.execute_batch("BEGIN").unwrap();
    for table in 1..=tables {
        connection
            .execute_batch(&format!("CREATE TABLE t{table} (id INTEGER, n INTEGER, v VARCHAR)"))
            .unwrap();
        let mut appender = connection.appender(&format!("t{table}")).unwrap();
        for row in 1..=ROWS {
            appender.append_row(duckdb::params![row, row, format!("row {row}")]).unwrap();
        }
        appender.flush().unwrap();
    }
    connection.execute_batch("COMMIT").unwrap();
    drop(connection);
    (process_cpu("self").unwrap() - before, peak_mib(std::process::id()).unwrap_or_default())
}

fn each(db: &Db, tables: usize, statement: &str) {
    db.execute(&format!(
        "DO $$ BEGIN FOR i IN 1..{tables} LOOP EXECUTE format('{}', i); END LOOP; END $$",
        statement.replace('\'', "''")
    ));
}

fn main() {
    let sizes = std::env::var("RHEI_BENCH_TABLES").unwrap_or_else(|_| "100 1000".to_owned());
    let cluster = Cluster::start(
        ClusterOptions::default().conf("max_locks_per_transaction = 2000").conf("autovacuum = off"),
    );
    let mut report = Report::default();
    for tables in sizes.split_whitespace().map(|size| size.parse::<usize>().unwrap()) {
        let db = cluster.database("tables");
        each(&db, tables, "CREATE TABLE t%1$s (id int PRIMARY KEY, n int, v text)");
        each(
            &db,
            tables,
            &format!(
                "INSERT INTO t%1$s SELECT i, i, 'row ' || i FROM generate_series(1, {ROWS}) i"
            ),
        );
        let folder = temp_dir();
        let slot = format!("bench_tables_{tables}");
        let rhei = Rhei::new(folder.path())
            .source(db.url())
            .target("copy.duckdb")
            .deadline(Duration::from_secs(900))
            .config(&format!(
                "[source]\nslot = \"{slot}\"\n[target]\nduckdb_memory_limit = \"{}MB\"\n",
                duckdb_mb(tables)
            ));
        report.say(format!(
            "{tables} tables                      wall  client s  server s  peak MiB (DuckDB may \
             use {} MB)",
            duckdb_mb(tables)
        ));
        let dump = measured(|| dumped(&cluster, &db, &folder.path().join("dump")));
        report.say(dump.line("pg_dump"));
        let made = measured(|| made_by_duckdb(tables, &folder.path().join("made.duckdb")));
        report.say(made.line("DuckDB, one transaction"));
        let psql = measured(|| copied_by_psql(&cluster, &db, tables));
        report.say(psql.line("psql, a COPY of each"));
        let first = measured(|| synced(&rhei));
        report.say(first.line("rhei: first copy"));
        let question = Instant::now();
        db.value("SELECT count(*) FROM pg_publication_tables");
        let question = question.elapsed().as_secs_f64();
        let nothing = measured(|| synced(&rhei));
        report.say(nothing.line("rhei: nothing to do"));
        db.execute("INSERT INTO t1 VALUES (1001, 1, 'one')");
        let one = measured(|| synced(&rhei));
        report.say(one.line("rhei: a row in one table"));
        each(&db, tables, "INSERT INTO t%1$s VALUES (1002, 1, 'each')");
        report.say(measured(|| synced(&rhei)).line("rhei: a row in each"));
        each(&db, tables, "ALTER TABLE t%1$s ALTER n TYPE bigint");
        report.say(measured(|| synced(&rhei)).line("rhei: all retyped"));
        db.execute("CREATE UNLOGGED TABLE IF NOT EXISTS elsewhere (n int)");
        let session = db.session();
        for (what, meanwhile) in
            [("nothing happens", "SELECT 1"), ("others commit", "INSERT INTO elsewhere VALUES (1)")]
        {
            let (core, server) = at_rest(&cluster, &rhei, || session.execute(meanwhile));
            report.say(format!(
                "rhei run, {what}: {:.1} % of a core; the server takes {:.0} ms for each look at \
                 the catalogs",
                core * 100.0,
                server * 1000.0
            ));
        }
        report.say(format!(
            "first copy: {:.2} of pg_dump and DuckDB; nothing to do: {:.2} s, the publications' \
             tables are counted in {question:.2} s",
            first.wall / (dump.wall + made.wall),
            nothing.wall,
        ));
        report.say(String::new());
        db.query(&format!("SELECT pg_drop_replication_slot('{slot}')"));
    }
    report.write("Many small tables", &cluster.major().to_string());
}
