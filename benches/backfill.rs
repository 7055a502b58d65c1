//! The first copy against its floor, side by side in one run: `make bench-backfill`.
//!
//! One mixed table (RHEI_BENCH_ROWS, default 2,000,000 rows). Measured: COPY BINARY to nothing with
//! as many connections as rhei has workers; DuckDB loading the same rows from memory, decoded
//! before; rhei; and, where it was fetched, DuckDB's own postgres extension. CPU-seconds are the
//! whole machine's, the server's share included, so keep it quiet.
//!
//! With RHEI_BENCH_LARGE=1 also what takes minutes: a table of ten times as many rows is copied
//! beside 20 MB/s of writes to another one, and measured are rhei's memory and the WAL that the
//! slot holds.
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
#[allow(dead_code, reason = "as above")]
#[path = "../tests/it/pipeline.rs"]
mod pipeline;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use arrow::record_batch::RecordBatch;
use bed::{Cluster, ClusterOptions, Db, Rhei, temp_dir};
use measure::{GLANCE, machine_cpu, peak_mib, process_cpu};

use rhei::internals::{
    Lsn,
    change::{ColumnSpec, Key, TableSpec},
    olap::{
        Compaction, CopyLoader, CopyTarget, DuckDb, FileMaintenance, NewCopy, NewJob,
        TargetOptions, TargetState,
    },
    pgoutput::{QualifiedName, ReplicaIdentity},
    source::copy_binary::CopyReader,
    types::{ColumnType, TypeCatalog, map_column, schema_of},
};

const WORKERS: u64 = 2;

struct Measured {
    what: &'static str,
    wall: f64,
    cpu: f64,
    client: Client,
}

/// What the client's process took of it.
#[derive(Default)]
struct Client {
    cpu: f64,
    peak_mb: Option<f64>,
}

/// Runs work of this process.
fn here(work: impl FnOnce()) -> Client {
    let before = process_cpu("self").unwrap();
    work();
    Client { cpu: process_cpu("self").unwrap() - before, peak_mb: None }
}

fn measured(what: &'static str, work: impl FnOnce() -> Client) -> Measured {
    let (cpu, started) = (machine_cpu(), Instant::now());
    let client = work();
    Measured { what, wall: started.elapsed().as_secs_f64(), cpu: machine_cpu() - cpu, client }
}

fn copy_queries(db: &Db) -> Vec<String> {
    let pages: u64 = db.value("SELECT pg_relation_size('t') / 8192").parse().unwrap();
    let size = (pages / (WORKERS * 4)).clamp(2048, 16384);
    (0..pages.div_ceil(size))
        .map(|at| {
            format!(
                "COPY (SELECT * FROM t WHERE ctid >= '({},0)' AND ctid < '({},0)') TO STDOUT \
                 (FORMAT binary)",
                at * size,
                (at + 1) * size
            )
        })
        .collect()
}

/// Runs the queries over as many connections as rhei has workers; returns what they print.
fn copied(db: &Db, keep: bool) -> Vec<Vec<u8>> {
    let queries = Arc::new(std::sync::Mutex::new(copy_queries(db)));
    let threads: Vec<_> = (0..WORKERS)
        .map(|_| {
            let (queries, url) = (Arc::clone(&queries), db.url());
            std::thread::spawn(move || {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async move {
                    let (client, connection) =
                        tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
                    tokio::spawn(connection);
                    let mut kept = Vec::new();
                    loop {
                        let Some(query) = queries.lock().unwrap().pop() else { return kept };
                        let mut stream = Box::pin(client.copy_out(&query).await.unwrap());
                        let mut all = Vec::new();
                        while let Some(piece) = futures_util::StreamExt::next(&mut stream).await {
                            let piece = piece.unwrap();
                            if keep {
                                all.extend_from_slice(&piece);
                            }
                        }
                        kept.push(all);
                    }
                })
            })
        })
        .collect();
    threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
}

fn spec() -> TableSpec {
    let columns = [
        ("id", 20, -1),
        ("name", 25, -1),
        ("status", 1043, 24),
        ("qty", 23, -1),
        ("amount", 1700, (12 << 16 | 2) + 4),
        ("at", 1184, -1),
        ("ok", 16, -1),
        ("doc", 3802, -1),
        ("u", 2950, -1),
        ("d", 701, -1),
    ];
    let column = |(at, (name, type_oid, typmod)): (usize, (&str, u32, i32))| ColumnSpec {
        name: name.to_owned(),
        attnum: at as i16 + 1,
        type_oid,
        typmod,
        not_null: false,
        target_name: name.to_owned(),
        mapping: map_column(
            &ColumnType { type_oid, typmod, ndims: 0, override_type: None },
            &TypeCatalog::default(),
        )
        .unwrap(),
    };
    TableSpec {
        oid: 1,
        source: QualifiedName::new("public", "t"),
        target: QualifiedName::new("public", "t"),
        epoch: 0,
        replica_identity: ReplicaIdentity::Default,
        key: Key::Columns(vec![0]),
        columns: columns.into_iter().enumerate().map(column).collect(),
        excluded: Vec::new(),
        fingerprint: String::new(),
        null_unrepresentable: false,
        copy_lsn: Lsn(1),
        copy_xids: None,
    }
}

fn decode(spec: &Arc<TableSpec>, bytes: &[u8]) -> Vec<RecordBatch> {
    let schema =
        schema_of(spec.columns.iter().map(|column| (column.target_name.as_str(), &column.mapping)));
    let mut reader = CopyReader::new(Arc::clone(spec));
    let mut batches = Vec::new();
    for piece in bytes.chunks(65_536) {
        reader.push(piece).unwrap();
        if reader.rows() >= 122_880 {
            batches.push(reader.take_batch(&schema).unwrap());
        }
    }
    reader.finish().unwrap();
    batches.push(reader.take_batch(&schema).unwrap());
    batches
}

/// By as many loaders at a time as rhei has workers.
fn load(spec: &Arc<TableSpec>, chunks: Vec<Vec<RecordBatch>>, path: std::path::PathBuf) {
    let mut target = DuckDb::open(&TargetOptions { path, ..TargetOptions::default() }).unwrap();
    target.put_state(&pipeline::pipeline(Lsn(1)), &[]).unwrap();
    let new = |_: &Vec<RecordBatch>| NewJob {
        kind: "copy_chunk",
        payload: serde_json::json!({}),
        priority: 0,
    };
    let jobs = chunks.iter().map(new).collect();
    let mut jobs = target
        .begin_copies(&[NewCopy {
            spec: Arc::clone(spec),
            is_resumed: false,
            long_columns: Default::default(),
            jobs,
        }])
        .unwrap();
    let jobs = jobs.remove(0).unwrap();
    let queue: Arc<std::sync::Mutex<Vec<_>>> =
        Arc::new(std::sync::Mutex::new(jobs.into_iter().zip(chunks).collect()));
    let threads: Vec<_> = (0..WORKERS)
        .map(|_| {
            let (mut loader, queue, spec) =
                (target.loader().unwrap(), Arc::clone(&queue), Arc::clone(spec));
            std::thread::spawn(move || {
                loop {
                    let Some((job, batches)) = queue.lock().unwrap().pop() else { return };
                    loader.load(&spec, job, Box::new(batches.into_iter().map(Ok))).unwrap();
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    target.finish_loads(std::slice::from_ref(spec)).unwrap();
    assert!(!target.merge(std::slice::from_ref(spec), 1).unwrap().is_empty());
    target.checkpoint_file(Compaction::Skip).unwrap();
}

fn with_rhei(rhei: &Rhei) -> Client {
    let mut running = rhei.spawn(["backfill"]);
    let (mut peak_mb, mut cpu) = (None, 0.0);
    while running.is_running() {
        peak_mb = peak_mib(running.pid()).or(peak_mb);
        cpu = process_cpu(&running.pid().to_string()).unwrap_or(cpu);
        std::thread::sleep(GLANCE);
    }
    running.wait(Duration::from_secs(60)).assert_code(0);
    Client { cpu, peak_mb }
}

/// In a process of its own, as the extension's copy of libpq is.
fn with_extension(db: &Db, extension: &str, path: &std::path::Path) {
    let copy = duckdb::Connection::open(path).unwrap();
    copy.execute_batch(&format!(
        "LOAD '{extension}'; SET threads = {WORKERS}; ATTACH '{}' AS source (TYPE postgres, \
         READ_ONLY);
         CREATE TABLE t AS FROM source.public.t; CHECKPOINT;",
        db.url()
    ))
    .unwrap();
}

/// Writes about so many bytes of WAL a second to a table of its own, until it is told to stop.
fn write_wal(db: &Db, bytes_per_second: u64, stop: &AtomicBool) -> u64 {
    let (started, begin) = (Instant::now(), db.wal_lsn());
    let written = || {
        db.value(&format!("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '{begin}')::bigint"))
            .parse()
            .unwrap()
    };
    while !stop.load(Ordering::Relaxed) {
        let due = (started.elapsed().as_secs_f64() * bytes_per_second as f64) as u64;
        if written() < due {
            db.execute(
                "INSERT INTO written SELECT nextval('written_ids'), repeat(md5(random()::text), \
                 30) FROM generate_series(1, 500)",
            );
        } else {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    written()
}

/// A copy of many rows, for its memory; then the same beside 20 MB/s of writes to another table,
/// for the WAL that the slot holds.
fn large(cluster: &Cluster, rows: u64) {
    const MEMORY_MB: u64 = 256;
    const DUCKDB_MB: u64 = 512;
    let db = cluster.database("bench_large");
    create(&db, rows);
    let folder = temp_dir();
    let settings = |slot: &str| {
        format!(
            "[backfill]\nworkers = {WORKERS}\n[source]\nslot = \"{slot}\"\n[sync]\nmemory_limit = \
             \"{MEMORY_MB}MB\"\n\
             [target]\nduckdb_memory_limit = \"{DUCKDB_MB}MB\"\n"
        )
    };
    let rhei = Rhei::new(folder.path())
        .source(db.url())
        .target("alone.duckdb")
        .config(&settings("bench_alone"));
    let alone = measured("alone", || with_rhei(&rhei));
    println!(
        "{rows} rows alone: {:.1} s ({:.0} rows/s), peak {:.0} MB with memory_limit = {MEMORY_MB} \
         MB and DuckDB limited to \
         {DUCKDB_MB} MB",
        alone.wall,
        rows as f64 / alone.wall,
        alone.client.peak_mb.unwrap_or_default()
    );
    db.execute("SELECT pg_drop_replication_slot('bench_alone')");
    db.execute("CREATE TABLE written (id bigint PRIMARY KEY, v text); CREATE SEQUENCE written_ids");
    db.execute("DROP PUBLICATION rhei");
    let rhei = Rhei::new(folder.path())
        .source(db.url())
        .target("beside.duckdb")
        .config(&settings("bench_beside"));
    let stop = AtomicBool::new(false);
    let (mut unconfirmed, mut held, mut peak_mb) = (0_u64, 0_u64, 0.0_f64);
    let (wall, written) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_wal(&db, 20_000_000, &stop));
        let started = Instant::now();
        let mut running = rhei.spawn(["run"]);
        while running.is_running() && !running.logs().contains("all tables are live") {
            let now = db.value(
                "SELECT coalesce(max(pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)), \
                 0)::bigint || ' ' || \
                 coalesce(max(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)), 0)::bigint \
                 FROM pg_replication_slots WHERE slot_name = 'bench_beside'",
            );
            let (not_confirmed, not_free) = now.split_once(' ').unwrap();
            unconfirmed = unconfirmed.max(not_confirmed.parse().unwrap());
            held = held.max(not_free.parse().unwrap());
            peak_mb = peak_mib(running.pid()).unwrap_or(peak_mb);
            std::thread::sleep(Duration::from_millis(50));
        }
        let wall = started.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        running.stop(Duration::from_secs(120)).assert_code(0);
        (wall, writer.join().unwrap())
    });
    let mb = |bytes: u64| bytes as f64 / 1e6;
    println!(
        "beside {:.1} MB/s of WAL of another table: {wall:.1} s ({:.0} rows/s), peak {:.0} MB; WAL \
         that was not confirmed: at \
         most {:.1} MB; that the server kept for the slot, which it frees when it logs running \
         transactions, every 15 s: at \
         most {:.1} MB",
        mb(written) / wall,
        rows as f64 / wall,
        peak_mb,
        mb(unconfirmed),
        mb(held)
    );
}

fn create(db: &Db, rows: u64) {
    db.execute(
        "CREATE TABLE t (id bigint PRIMARY KEY, name text, status varchar(20), qty int, amount \
         numeric(12,2), at timestamptz, \
         ok bool, doc jsonb, u uuid, d double precision)",
    );
    for statement in [
        format!(
            "INSERT INTO t SELECT i, 'customer number ' || i % 5000, \
             (ARRAY['new','paid','shipped','returned'])[1 + i % 4], i % 97, \
             (i * 7 % 1000000) / 100.0, timestamptz '2026-01-01' + i * interval '1 second', i % 3 \
             = 0, \
             jsonb_build_object('tier', 'gold', 'points', i % 1000, 'tags', jsonb_build_array('a', \
             i % 7)), md5(i::text)::uuid, sqrt(i) \
             FROM generate_series(1, {rows}) i"
        ),
        "VACUUM ANALYZE t".to_owned(),
        "CHECKPOINT".to_owned(),
    ] {
        db.execute(&statement);
    }
}

fn main() {
    let rows: u64 = std::env::var("RHEI_BENCH_ROWS")
        .ok()
        .and_then(|rows| rows.parse().ok())
        .unwrap_or(2_000_000);
    let cluster = Cluster::start(
        ClusterOptions::default().conf("max_wal_size = 8GB").conf("autovacuum = off"),
    );
    let db = cluster.database("bench_backfill");
    create(&db, rows);
    let folder = temp_dir();
    let spec = Arc::new(spec());
    // Warm the caches of the server.
    copied(&db, false);
    let mut all = Vec::new();
    all.push(measured("COPY BINARY to nothing", || here(|| drop(copied(&db, false)))));
    let chunks: Vec<Vec<RecordBatch>> =
        copied(&db, true).iter().map(|bytes| decode(&spec, bytes)).collect();
    all.push(measured("DuckDB loads the same Arrow", || {
        here(|| load(&spec, chunks, folder.path().join("load.duckdb")))
    }));
    let rhei = Rhei::new(folder.path())
        .source(db.url())
        .target("rhei.duckdb")
        .config(&format!("[backfill]\nworkers = {WORKERS}\n[source]\nslot = \"bench_backfill\"\n"));
    all.push(measured("rhei backfill", || with_rhei(&rhei)));
    if let Ok(extension) = std::env::var("RHEI_POSTGRES_EXTENSION") {
        all.push(measured("DuckDB's postgres extension", || {
            here(|| with_extension(&db, &extension, &folder.path().join("extension.duckdb")))
        }));
    }
    let size = db.value("SELECT pg_size_pretty(pg_relation_size('t'))");
    println!("{rows} rows, {size} of heap, {WORKERS} workers");
    for Measured { what, wall, cpu, client } in &all {
        let peak = client.peak_mb.map_or_else(String::new, |peak| format!("   peak {peak:.0} MB"));
        println!(
            "{what:28} {wall:6.2} s {:9.0} rows/s {cpu:6.2} CPU-s, of which {:5.2} in the \
             client{peak}",
            rows as f64 / wall,
            client.cpu
        );
    }
    let cores = std::thread::available_parallelism().map_or(2.0, |cores| cores.get() as f64);
    let floor = (all[0].cpu + all[1].cpu) / cores;
    println!(
        "floor: {floor:.2} s ((CPU of COPY + CPU of the load) / cores); rhei takes {:.2} of it",
        all[2].wall / floor
    );
    if let Some(extension) = all.get(3) {
        println!(
            "the extension takes {:.2} of rhei's time, rhei {:.2} of the bare COPY's",
            extension.wall / all[2].wall,
            all[2].wall / all[0].wall
        );
    }
    if std::env::var_os("RHEI_BENCH_LARGE").is_some() {
        drop(db);
        large(&cluster, rows * 10);
    }
}
