//! From pgoutput bytes to a committed DuckDB transaction, without a server: what rhei's own part costs.
//!
//! Prints rows per second of decoding alone, of decoding with net effect and Arrow columns, and of the whole with the
//! apply, all measured in one run, and the ratios between them.

#![allow(clippy::unwrap_used, reason = "a benchmark that fails may as well stop")]

#[path = "../tests/it/pipeline.rs"]
mod pipeline;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rhei::{
    Checkpoint, Lsn,
    change::{ColumnSpec, Key, QualifiedName, ReplicaIdentity, TableSpec},
    source::{BatchLimits, CdcConsumer, Delivery, pgoutput::Message, recorded::RecordedConsumer},
    target::{DuckDb, OlapEngine, duckdb::TargetOptions},
    types::{ColumnType, TypeCatalog, map_column},
};

use pipeline::begin_empty_copies;

const ROWS: u32 = 500_000;
const ROWS_PER_TRANSACTION: u32 = 1000;
const COLUMNS: [(&str, u32); 5] = [("id", 20), ("name", 25), ("quantity", 23), ("ordered_at", 1184), ("doc", 3802)];

fn spec() -> Arc<TableSpec> {
    let column = |(at, (name, type_oid)): (usize, (&str, u32))| {
        let column = ColumnType { type_oid, typmod: -1, ndims: 0, override_type: None };
        let mapping = map_column(&column, &TypeCatalog::default()).unwrap();
        ColumnSpec {
            name: name.to_owned(),
            attnum: at as i16 + 1,
            type_oid,
            typmod: -1,
            not_null: false,
            target_name: name.to_owned(),
            mapping,
        }
    };
    Arc::new(TableSpec {
        oid: 7,
        source: QualifiedName::new("public", "orders"),
        target: QualifiedName::new("public", "orders"),
        epoch: 0,
        replica_identity: ReplicaIdentity::Default,
        key: Key::Columns(vec![0]),
        columns: COLUMNS.into_iter().enumerate().map(column).collect(),
        excluded: Vec::new(),
        fingerprint: String::new(),
        null_unrepresentable: false,
        copy_lsn: Lsn::ZERO,
    })
}

fn messages() -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    let mut relation = [b"R".as_slice(), &7_u32.to_be_bytes(), b"public\0orders\0d"].concat();
    relation.extend((COLUMNS.len() as u16).to_be_bytes());
    for (at, (name, oid)) in COLUMNS.into_iter().enumerate() {
        relation.push(u8::from(at == 0));
        relation.extend([name.as_bytes(), b"\0", &oid.to_be_bytes(), &(-1_i32).to_be_bytes()].concat());
    }
    for transaction in 0..ROWS / ROWS_PER_TRANSACTION {
        let commit = u64::from(transaction + 1) * 1000;
        messages.push([b"B".as_slice(), &commit.to_be_bytes(), &0_i64.to_be_bytes(), &1_u32.to_be_bytes()].concat());
        if transaction == 0 {
            messages.push(relation.clone());
        }
        for row in 0..ROWS_PER_TRANSACTION {
            let id = transaction * ROWS_PER_TRANSACTION + row;
            let mut insert =
                [b"I".as_slice(), &7_u32.to_be_bytes(), b"N", &(COLUMNS.len() as u16).to_be_bytes()].concat();
            let values = [
                id.to_string(),
                format!("customer number {}", id % 5000),
                (id % 97).to_string(),
                format!("2026-11-{:02} 12:{:02}:07.25+00", 1 + id % 28, id % 60),
                format!("{{\"tier\": \"gold\", \"points\": {}}}", id % 1000),
            ];
            for value in values {
                insert.push(b't');
                insert.extend((value.len() as u32).to_be_bytes());
                insert.extend(value.as_bytes());
            }
            messages.push(insert);
        }
        let end = commit + 500;
        messages.push([b"C\0".as_slice(), &commit.to_be_bytes(), &end.to_be_bytes(), &0_i64.to_be_bytes()].concat());
    }
    messages
}

/// Replays everything; `each` gets every batch.
async fn replay(messages: &[Vec<u8>], mut each: impl FnMut(&rhei::change::ChangeBatch)) -> Duration {
    let mut consumer = RecordedConsumer::new(messages.to_vec(), Lsn(1), vec![spec()]);
    let limits = BatchLimits {
        max_rows: 100_000,
        max_bytes: usize::MAX,
        linger: Duration::ZERO,
        until: None,
        any: false,
        hurry: false,
    };
    let started = Instant::now();
    while let Delivery::Batch(batch) = consumer.next_batch(&limits).await.unwrap() {
        each(&batch);
    }
    started.elapsed()
}

fn target(folder: &std::path::Path) -> DuckDb {
    let mut target =
        DuckDb::open(&TargetOptions { path: folder.join("bench.duckdb"), ..TargetOptions::default() }).unwrap();
    let spec = spec();
    begin_empty_copies(&mut target, Lsn(1), &[Arc::clone(&spec)]);
    target.finish_load(&spec).unwrap();
    assert!(target.merge(&spec, 1).unwrap());
    target
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let messages = messages();
    let started = Instant::now();
    for bytes in &messages {
        std::hint::black_box(Message::decode(bytes).unwrap());
    }
    let decoding = started.elapsed();
    let columns = replay(&messages, |batch| assert!(batch.failed.is_empty())).await;
    let folder = tempfile::tempdir().unwrap();
    let mut target = target(folder.path());
    let whole = replay(&messages, |batch| {
        let checkpoint = Checkpoint { lsn: batch.end_lsn, commit_time_us: batch.commit_times_us.last().copied() };
        target.apply(batch, &checkpoint).unwrap();
    })
    .await;
    println!("{ROWS} inserts in transactions of {ROWS_PER_TRANSACTION}, batches of 100000 rows");
    for (what, took) in [("decode", decoding), ("decode, net effect, Arrow", columns), ("all of it and apply", whole)] {
        println!(
            "{what:26} {:8.0} rows/s   {:5.2} of decoding alone",
            f64::from(ROWS) / took.as_secs_f64(),
            decoding.as_secs_f64() / took.as_secs_f64()
        );
    }
}
