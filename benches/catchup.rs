//! The whole way, from a live Postgres into a DuckDB file: `make bench`.
//!
//! Each workload writes a backlog; then `pg_recvlogical` reads it to nothing, `rhei sync` catches
//! up with it, and `pg_recvlogical` reads it once more, with or without streaming of open
//! transactions, whichever is quicker. Its mean is what a walsender can give on this machine, and
//! rhei's figures are set against it. RHEI_BENCH_PERF=folder has perf write a profile of each
//! catching up there, and RHEI_BENCH_LOG=1 shows its log. RHEI_BENCH_ONLY=name,name runs some of
//! the workloads, RHEI_BENCH_SCALE=0.1 makes them smaller, and RHEI_BENCH_DOCS names a file one
//! section of which is replaced by the results.
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
    collections::BTreeMap,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bed::{Cluster, ClusterOptions, Db, Rhei, cluster::installed, temp_dir};
use measure::{GLANCE, peak_mib, process_cpu};

const MEMORY_MB: u64 = 256;
const DUCKDB_MB: u64 = 512;

/// A backlog to catch up with.
struct Workload {
    name: &'static str,
    what: String,
    /// Before the first copy; may end with a VACUUM of its own.
    before: Vec<String>,
    /// The backlog.
    changes: Vec<String>,
    /// Row changes in it.
    rows: u64,
    /// How much of pg_recvlogical's rate rhei is to reach.
    wanted: Option<f64>,
    /// How many times pg_recvlogical's time a whole `rhei sync` is to take at most, from the start
    /// of its process to the end.
    wanted_whole: Option<f64>,
    /// A query that gives the same on both sides.
    check: String,
}

fn scaled(rows: u64) -> u64 {
    let scale: f64 =
        std::env::var("RHEI_BENCH_SCALE").ok().and_then(|scale| scale.parse().ok()).unwrap_or(1.0);
    ((rows as f64 * scale) as u64).max(1000)
}

/// Ten columns of as many kinds, about 230 bytes a row on the wire.
const COLUMNS: &str = "id bigint PRIMARY KEY, name text, status varchar(20), qty int, amount \
                       numeric(12,2), at timestamptz, \
                       ok bool, doc jsonb, u uuid, d double precision";

fn row(id: &str) -> String {
    format!(
        "{id}, 'customer number ' || {id} % 5000, (ARRAY['new','paid','shipped','returned'])[1 + \
         {id} % 4], {id} % 97, \
         ({id} * 7 % 1000000) / 100.0, timestamptz '2026-01-01' + {id} * interval '1 second', {id} \
         % 3 = 0, \
         jsonb_build_object('tier', 'gold', 'points', {id} % 1000), md5({id}::text)::uuid, \
         sqrt({id})"
    )
}

fn filled(rows: u64) -> Vec<String> {
    vec![
        format!("CREATE TABLE t ({COLUMNS})"),
        format!("INSERT INTO t SELECT {} FROM generate_series(1, {rows}) i", row("i")),
        "VACUUM ANALYZE t".to_owned(),
    ]
}

/// `statement` for k = 1 to `transactions`, each in a transaction of its own.
fn in_transactions(transactions: u64, statement: &str) -> String {
    format!("DO $$ BEGIN FOR k IN 1..{transactions} LOOP {statement}; COMMIT; END LOOP; END $$")
}

const CHECK: &str =
    "SELECT count(*)::text || ' ' || sum(qty)::text || ' ' || sum(amount)::text FROM public.t";

fn updates(name: &'static str, table_rows: u64, wanted: Option<f64>) -> Workload {
    let (table_rows, changes) = (scaled(table_rows), scaled(300_000));
    // Distinct within a transaction, random over the table.
    let keys = format!(
        "SELECT 1 + (hashint8extended(k * 1000 + i, 7) & 9007199254740991) % {table_rows} FROM \
         generate_series(1, 1000) i"
    );
    let update =
        format!("UPDATE t SET qty = qty + 1, amount = amount + 1, at = now() WHERE id IN ({keys})");
    Workload {
        name,
        what: format!(
            "about {changes} updates of random rows out of {table_rows}, 1,000 a transaction"
        ),
        before: filled(table_rows),
        changes: vec![in_transactions(changes / 1000, &update)],
        rows: changes,
        wanted,
        wanted_whole: Some(1.25),
        check: CHECK.to_owned(),
    }
}

fn workloads() -> Vec<Workload> {
    let inserts = scaled(500_000);
    let mixed = scaled(300_000);
    let single = scaled(100_000);
    let large = scaled(5_000_000);
    let wide = scaled(20_000);
    let tables = 200;
    let rounds = scaled(20_000) / 1000;
    let mixed_table = scaled(2_000_000);
    let wide_row = "SELECT i, abs(i) % 97, i / 7.0, (SELECT string_agg(md5((i * 1000 + j)::text), \
                    '') FROM generate_series(1, 500) j)";
    let random =
        format!("1 + (hashint8extended(k * 1000 + i, 7) & 9007199254740991) % {mixed_table}");
    vec![
        Workload {
            name: "inserts",
            what: format!("{inserts} inserts, 1,000 a transaction"),
            before: vec![format!("CREATE TABLE t ({COLUMNS})")],
            changes: vec![in_transactions(
                inserts / 1000,
                &format!(
                    "INSERT INTO t SELECT {} FROM generate_series(k * 1000, k * 1000 + 999) \
                          i",
                    row("i")
                ),
            )],
            rows: inserts,
            wanted: Some(0.8),
            wanted_whole: Some(1.25),
            check: CHECK.to_owned(),
        },
        updates("updates-2m", 2_000_000, Some(0.8)),
        updates("updates-10m", 10_000_000, None),
        Workload {
            name: "mixed",
            what: format!(
                "{mixed} changes on {mixed_table} rows: half inserts, a quarter updates, \
                           a quarter deletes, 1,000 a transaction"
            ),
            before: filled(mixed_table),
            changes: vec![in_transactions(
                mixed / 1000,
                &format!(
                    "INSERT INTO t SELECT {} FROM generate_series({mixed_table} + k * 500, \
                     {mixed_table} + k * 500 + 499) i; \
                     UPDATE t SET qty = qty + 1, at = now() WHERE id IN (SELECT {random} FROM \
                     generate_series(1, 250) i); \
                     DELETE FROM t WHERE id IN (SELECT {random} FROM generate_series(251, 500) i)",
                    row("i")
                ),
            )],
            rows: mixed,
            wanted: None,
            wanted_whole: None,
            check: CHECK.to_owned(),
        },
        Workload {
            name: "single",
            what: format!("{single} transactions of one insert"),
            before: vec![format!("CREATE TABLE t ({COLUMNS})")],
            changes: vec![in_transactions(single, &format!("INSERT INTO t SELECT {}", row("k")))],
            rows: single,
            wanted: Some(0.9),
            wanted_whole: None,
            check: CHECK.to_owned(),
        },
        Workload {
            name: "tpcb",
            what: format!(
                "{} TPC-B transactions: three updates of one row each and an \
                           insert",
                single / 2
            ),
            before: vec![
                "CREATE TABLE accounts (id int PRIMARY KEY, branch int, balance int, filler \
                 char(84));
                 CREATE TABLE tellers (id int PRIMARY KEY, branch int, balance int, filler \
                 char(84));
                 CREATE TABLE branches (id int PRIMARY KEY, balance int, filler char(88));
                 CREATE TABLE history (id bigint PRIMARY KEY, teller int, branch int, account int, \
                 delta int, at timestamp, filler char(22));
                 INSERT INTO accounts SELECT i, 1 + i % 10, 0, '' FROM generate_series(1, 1000000) \
                 i;
                 INSERT INTO tellers SELECT i, 1 + i % 10, 0, '' FROM generate_series(1, 100) i;
                 INSERT INTO branches SELECT i, 0, '' FROM generate_series(1, 10) i"
                    .to_owned(),
                "VACUUM ANALYZE accounts".to_owned(),
            ],
            changes: vec![in_transactions(
                single / 2,
                "UPDATE accounts SET balance = balance + k % 97 WHERE id = 1 + \
                 (hashint8(k)::bigint + 2147483648) % 1000000; \
                 UPDATE tellers SET balance = balance + k % 97 WHERE id = 1 + k % 100; \
                 UPDATE branches SET balance = balance + k % 97 WHERE id = 1 + k % 10; \
                 INSERT INTO history VALUES (k, 1 + k % 100, 1 + k % 10, 1 + (hashint8(k)::bigint \
                 + 2147483648) % 1000000, k % 97, now(), '')",
            )],
            rows: single / 2 * 4,
            wanted: Some(0.9),
            wanted_whole: None,
            check: "SELECT (SELECT sum(balance)::text FROM public.accounts) || ' ' || (SELECT \
                    sum(balance)::text FROM public.tellers) || ' ' \
                    || (SELECT sum(balance)::text FROM public.branches) || ' ' || (SELECT \
                    sum(delta)::text FROM public.history)"
                .to_owned(),
        },
        Workload {
            name: "large",
            what: format!("one transaction of {large} inserts"),
            before: vec![format!("CREATE TABLE t ({COLUMNS})")],
            changes: vec![format!(
                "INSERT INTO t SELECT {} FROM generate_series(1, {large}) \
                                   i",
                row("i")
            )],
            rows: large,
            wanted: Some(0.8),
            wanted_whole: Some(1.25),
            check: CHECK.to_owned(),
        },
        Workload {
            name: "wide",
            what: format!(
                "{wide} rows of 16 kB inserted beside 1,000 of them, then updated beside their \
                 unchanged TOAST values, 100 a transaction"
            ),
            before: vec![
                "CREATE TABLE t (id bigint PRIMARY KEY, qty int, amount numeric(12,2), doc \
                 text)"
                    .to_owned(),
                format!("INSERT INTO t {} FROM generate_series(-1000, -1) i", wide_row),
            ],
            changes: vec![
                in_transactions(
                    wide / 100,
                    &format!(
                        "INSERT INTO t {} FROM generate_series(k * 100, k * 100 + 99) \
                              i",
                        wide_row
                    ),
                ),
                in_transactions(
                    wide / 100,
                    "UPDATE t SET qty = qty + 1 WHERE id BETWEEN k * 100 \
                     AND k * 100 + 99",
                ),
            ],
            rows: wide * 2,
            wanted: None,
            wanted_whole: None,
            check: "SELECT count(*)::text || ' ' || sum(qty)::text || ' ' || \
                    sum(length(doc))::text || ' ' || max(md5(doc)) FROM public.t"
                .to_owned(),
        },
        Workload {
            name: "tables",
            what: format!(
                "{tables} tables, {rounds} rounds of 5 rows into each, one table a \
                           transaction"
            ),
            before: vec![format!(
                "DO $$ BEGIN FOR n IN 1..{tables} LOOP EXECUTE format('CREATE TABLE t%s (id bigint \
                 PRIMARY KEY, v text, qty int)', n); END LOOP; END $$"
            )],
            changes: vec![format!(
                "DO $$ BEGIN FOR k IN 1..{rounds} LOOP FOR n IN 1..{tables} LOOP EXECUTE \
                 format('INSERT INTO t%s \
                 SELECT %s * 5 + i, md5(i::text), i FROM generate_series(0, 4) i', n, k); COMMIT; \
                 END LOOP; END LOOP; END $$"
            )],
            rows: tables * rounds * 5,
            wanted: None,
            wanted_whole: None,
            check: "SELECT count(*)::text || ' ' || sum(qty)::text FROM public.t1".to_owned(),
        },
    ]
}

/// What one reading of a backlog took.
#[derive(Debug, Clone, Copy, Default)]
struct Reading {
    /// Until the reader had all of it.
    wall: f64,
    client_cpu: f64,
    /// Until its process had ended: rhei compacts the file.
    whole_wall: f64,
    whole_cpu: f64,
    walsender_cpu: f64,
    peak_mib: f64,
}

/// What a process is up to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Reading,
    Done,
    Ended,
}

/// Watches a process that reads a slot until it ends.
fn watch(db: &Db, slot: &str, pid: u32, mut phase: impl FnMut() -> Phase) -> Reading {
    let session = db.session();
    let started = Instant::now();
    let (mut reading, mut walsenders) = (Reading::default(), BTreeMap::new());
    let mut asked = Instant::now() - Duration::from_secs(1);
    loop {
        let phase = phase();
        if phase != Phase::Reading && reading.wall == 0.0 {
            (reading.wall, reading.client_cpu) =
                (started.elapsed().as_secs_f64(), reading.whole_cpu);
        }
        if phase == Phase::Ended {
            break;
        }
        // Rarely, since it takes time itself; a walsender lives as long as the connection.
        if asked.elapsed() > Duration::from_millis(if walsenders.is_empty() { 10 } else { 1000 }) {
            asked = Instant::now();
            let sql = format!(
                "SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{slot}' AND active"
            );
            for row in session.query(&sql) {
                walsenders.entry(row[0].clone().unwrap()).or_insert(0.0);
            }
        }
        for (pid, cpu) in &mut walsenders {
            *cpu = process_cpu(pid).unwrap_or(*cpu);
        }
        reading.whole_cpu = process_cpu(&pid.to_string()).unwrap_or(reading.whole_cpu);
        reading.peak_mib = peak_mib(pid).unwrap_or(reading.peak_mib);
        std::thread::sleep(GLANCE);
    }
    reading.whole_wall = started.elapsed().as_secs_f64();
    reading.walsender_cpu = walsenders.values().sum();
    reading
}

fn recvlogical() -> PathBuf {
    let folders = std::iter::once(bed::cluster::bin_dir().to_owned())
        .chain(installed().into_iter().rev().map(|(_, bin)| bin));
    let mut programs = folders.map(|folder| folder.join("pg_recvlogical"));
    programs
        .find(|program| program.exists())
        .expect("pg_recvlogical is installed with the Postgres server")
}

/// Both readers come the same way: by TCP, as from another machine, or with RHEI_BENCH_SOCKET by
/// the unix socket.
fn host(cluster: &Cluster) -> String {
    match std::env::var_os("RHEI_BENCH_SOCKET") {
        Some(_) => cluster.folder().display().to_string(),
        None => "127.0.0.1".to_owned(),
    }
}

/// How the server is asked to decode for pg_recvlogical: after a large transaction has ended, or
/// while it is still written.
const MODES: [&[&str]; 2] = [&["proto_version=1"], &["proto_version=2", "streaming=on"]];

/// Reads a slot to nothing. Returns the bytes that came too.
fn to_nothing(cluster: &Cluster, db: &Db, slot: &str, end: &str, mode: &[&str]) -> (Reading, u64) {
    let mut child = Command::new(recvlogical())
        .args([
            "--start",
            "--no-loop",
            "-f",
            "/dev/null",
            "-U",
            "postgres",
            "-d",
            db.name(),
            "-S",
            slot,
        ])
        .args(["-h", &host(cluster), "-p", &cluster.port().to_string()])
        .args([&format!("--endpos={end}"), "-o", "publication_names=rhei"])
        .args(mode.iter().flat_map(|option| ["-o", *option]))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let (pid, mut bytes) = (child.id(), 0);
    let reading = watch(db, slot, pid, || {
        let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
        bytes =
            io.lines().find_map(|line| line.strip_prefix("wchar: ")?.parse().ok()).unwrap_or(bytes);
        if child.try_wait().unwrap().is_some() { Phase::Ended } else { Phase::Reading }
    });
    assert!(child.wait().unwrap().success());
    (reading, bytes)
}

/// Catches up.
fn with_rhei(db: &Db, rhei: &Rhei, slot: &str, profile: Option<&str>) -> Reading {
    let mut running = rhei.clone().env("RHEI_LOG", "rhei=debug").spawn(["sync"]);
    let pid = running.pid();
    let perf = profile.zip(std::env::var_os("RHEI_BENCH_PERF")).map(|(name, folder)| {
        let path = PathBuf::from(folder).join(format!("{name}.perf"));
        let mut perf = Command::new("perf");
        perf.args(["record", "-q", "-a", "-g", "-F", "499", "-o"]).arg(path).spawn().unwrap()
    });
    let reading = watch(db, slot, pid, || match running.is_running() {
        false => Phase::Ended,
        true if running.logs().contains("caught up") => Phase::Done,
        true => Phase::Reading,
    });
    if let Some(mut perf) = perf {
        // It writes what it has when it is interrupted.
        bed::cluster::shell(&format!("kill -INT {}", perf.id()));
        perf.wait().unwrap();
    }
    let output = running.wait(Duration::from_secs(60));
    output.assert_code(0);
    if let (true, Some(name)) = (std::env::var_os("RHEI_BENCH_LOG").is_some(), profile) {
        println!("{name}\n{}", output.stderr);
    }
    reading
}

struct Outcome {
    workload: Workload,
    bytes: u64,
    /// The mean of two readings by pg_recvlogical, in the mode that was quicker at first.
    bare: Reading,
    rhei: Reading,
    /// A `rhei sync` that finds nothing to do.
    idle: f64,
}

fn run(cluster: &Cluster, workload: Workload) -> Outcome {
    let db = cluster.database("bench");
    workload.before.iter().for_each(|statement| db.execute(statement));
    let folder = temp_dir();
    let source =
        if std::env::var_os("RHEI_BENCH_SOCKET").is_some() { db.socket_url() } else { db.url() };
    let settings = format!(
        "[source]\nslot = \"bench_rhei\"\n[sync]\nmemory_limit = \"{MEMORY_MB}MB\"\n\
         [target]\nduckdb_memory_limit = \"{DUCKDB_MB}MB\"\n"
    );
    let rhei = Rhei::new(folder.path()).source(source).target("copy.duckdb").config(&settings);
    let rhei = rhei.deadline(Duration::from_secs(3600));
    rhei.run_ok(["sync"]);
    let slots = ["bench_first", "bench_streamed", "bench_second"];
    for slot in slots {
        db.execute(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"));
    }
    let idle = with_rhei(&db, &rhei, "bench_rhei", None).wall;
    workload.changes.iter().for_each(|statement| db.execute(statement));
    db.execute("CHECKPOINT");
    let end = db.wal_lsn();
    db.execute("SELECT pg_logical_emit_message(true, 'bench', 'the end')");
    let (first, bytes) = to_nothing(cluster, &db, slots[0], &end, MODES[0]);
    let (streamed, _) = to_nothing(cluster, &db, slots[1], &end, MODES[1]);
    let (first, mode) =
        if streamed.wall < first.wall { (streamed, MODES[1]) } else { (first, MODES[0]) };
    let caught_up = with_rhei(&db, &rhei, "bench_rhei", Some(workload.name));
    let (second, _) = to_nothing(cluster, &db, slots[2], &end, mode);
    let mean = |of: fn(&Reading) -> f64| (of(&first) + of(&second)) / 2.0;
    let bare = Reading {
        wall: mean(|reading| reading.wall),
        client_cpu: mean(|reading| reading.client_cpu),
        walsender_cpu: mean(|reading| reading.walsender_cpu),
        ..Reading::default()
    };
    let copied =
        bed::oracle::query_copy(rhei.target_path(), &workload.check.replace("::text", "::VARCHAR"));
    assert_eq!(copied, db.query(&workload.check), "{}", workload.name);
    Outcome { workload, bytes, bare, rhei: caught_up, idle }
}

fn main() {
    let only = std::env::var("RHEI_BENCH_ONLY").unwrap_or_default();
    let is_wanted = |name: &str| only.is_empty() || only.split(',').any(|wanted| wanted == name);
    let cluster = Cluster::start(
        ClusterOptions::default()
            .conf("max_wal_size = 16GB")
            .conf("autovacuum = off")
            .conf("synchronous_commit = off")
            .conf("shared_buffers = 512MB"),
    );
    let mut lines = vec![
        format!(
            "`pg_recvlogical` writes the same backlog to nothing, before and after rhei, by {}, in \
             its quicker mode. A whole sync is all of the process, from its start to its end. \
             CPU-seconds are rhei's (and, \
             behind the plus, its compaction of the file when it has caught up), its walsender's, \
             and the walsender's of \
             pg_recvlogical. `memory_limit` is {MEMORY_MB} MB, DuckDB's limit {DUCKDB_MB} MB.\n",
            if std::env::var_os("RHEI_BENCH_SOCKET").is_some() { "the unix socket" } else { "TCP" }
        ),
        "| backlog | row changes/s | of pg_recvlogical's rate | whole sync, of its time | CPU-s: \
         rhei | its walsender | pg_recvlogical's \
         | peak MiB | MB on the wire |"
            .to_owned(),
        "|---|---|---|---|---|---|---|---|---|".to_owned(),
    ];
    for workload in workloads().into_iter().filter(|workload| is_wanted(workload.name)) {
        let Outcome { workload, bytes, bare, rhei, idle } = run(&cluster, workload);
        let rate = workload.rows as f64 / rhei.wall;
        let ratio = bare.wall / rhei.wall;
        let whole = rhei.whole_wall / bare.wall;
        let wanted = |limit: Option<f64>, word| {
            limit.map_or_else(String::new, |limit| format!(" (wanted: at {word} {limit})"))
        };
        println!(
            "{:12} {rate:8.0} rows/s ({:.2} s, {:.2} s of it also with nothing to do, and {:.2} s \
             for compaction), {ratio:.2} of pg_recvlogical's {:.0} ({:.2} s){}; \
             the whole sync took {whole:.2} of its time{}; CPU-s: rhei {:.2} (and {:.2} for \
             compaction), its \
             walsender {:.2}, pg_recvlogical's {:.2}; peak {:.0} MB; {:.0} MB on the \
             wire\n             {}",
            workload.name,
            rhei.wall,
            idle,
            rhei.whole_wall - rhei.wall,
            workload.rows as f64 / bare.wall,
            bare.wall,
            wanted(workload.wanted, "least"),
            wanted(workload.wanted_whole, "most"),
            rhei.client_cpu,
            rhei.whole_cpu - rhei.client_cpu,
            rhei.walsender_cpu,
            bare.walsender_cpu,
            rhei.peak_mib,
            bytes as f64 / 1e6,
            workload.what,
        );
        lines.push(format!(
            "| {} | {rate:.0} | {ratio:.2} | {whole:.2} | {:.2} + {:.2} | {:.2} | {:.2} | {:.0} | \
             {:.0} |",
            workload.what,
            rhei.client_cpu,
            rhei.whole_cpu - rhei.client_cpu,
            rhei.walsender_cpu,
            bare.walsender_cpu,
            rhei.peak_mib,
            bytes as f64 / 1e6
        ));
    }
    let server = cluster.maintenance().value("SHOW server_version");
    let title = match std::env::var_os("RHEI_BENCH_SOCKET") {
        Some(_) => "Catching up, by the unix socket",
        None => "Catching up",
    };
    measure::write_section(title, &server, &lines);
}
