//! From pgoutput bytes to a committed DuckDB transaction, without a server: what each of rhei's own
//! parts costs.
//!
//! `frames` cuts the bytes of a socket into messages and decodes them, `columns` reduces them to
//! their net effect and builds Arrow columns, `apply` brings finished batches into a DuckDB file.
//! Each prints rows per second and, from the second run on, how that differs from the run before.
#![allow(clippy::unwrap_used, reason = "a benchmark that fails may as well stop")]

#[path = "../tests/it/pipeline.rs"]
mod pipeline;

use std::{sync::Arc, time::Duration};

use criterion::{BatchSize, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use pipeline::begin_empty_copies;

use rhei::internals::{
    Checkpoint, Lsn,
    change::{ChangeBatch, ColumnSpec, Key, TableSpec},
    olap::{ApplyTarget, CopyTarget, DuckDb, TargetOptions},
    pgoutput::{QualifiedName, ReplicaIdentity, message::Message},
    source::{
        BatchLimits, CdcConsumer, Delivery,
        recorded_consumer::RecordedConsumer,
        wire::{FrameReader, stream::StreamMessage},
    },
    types::{ColumnType, TypeCatalog, map_column},
};

const COLUMNS: [(&str, u32); 5] =
    [("id", 20), ("name", 25), ("quantity", 23), ("ordered_at", 1184), ("doc", 3802)];
/// What a socket gives at a time.
const READ_BYTES: usize = 64 << 10;

fn spec(oid: u32) -> Arc<TableSpec> {
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
        oid,
        source: QualifiedName::new("public", format!("orders_{oid}")),
        target: QualifiedName::new("public", format!("orders_{oid}")),
        epoch: 0,
        replica_identity: ReplicaIdentity::Default,
        key: Key::Columns(vec![0]),
        columns: COLUMNS.into_iter().enumerate().map(column).collect(),
        excluded: Vec::new(),
        fingerprint: String::new(),
        null_unrepresentable: false,
        copy_lsn: Lsn::ZERO,
        copy_xids: None,
    })
}

/// Messages of source transactions, as pgoutput writes them.
#[derive(Default)]
struct Recording {
    messages: Vec<Vec<u8>>,
    rows: u64,
    tables: u32,
    commits: u64,
}

impl Recording {
    fn new(tables: u32) -> Self {
        Self { tables, ..Self::default() }
    }

    /// One transaction; `rows` gives table, tag and id of each of its rows.
    fn transaction(mut self, rows: impl Iterator<Item = (u32, u8, u64)>) -> Self {
        let commit = (self.commits + 1) * 1000;
        self.messages.push(
            [b"B".as_slice(), &commit.to_be_bytes(), &0_i64.to_be_bytes(), &1_u32.to_be_bytes()]
                .concat(),
        );
        if self.commits == 0 {
            (1..=self.tables).for_each(|oid| self.messages.push(relation(oid)));
        }
        for (oid, tag, id) in rows {
            self.messages.push(row(oid, tag, id));
            self.rows += 1;
        }
        let end = commit + 500;
        self.messages.push(
            [b"C\0".as_slice(), &commit.to_be_bytes(), &end.to_be_bytes(), &0_i64.to_be_bytes()]
                .concat(),
        );
        self.commits += 1;
        self
    }

    fn specs(&self) -> Vec<Arc<TableSpec>> {
        (1..=self.tables).map(spec).collect()
    }

    /// As they come out of a socket.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for message in &self.messages {
            bytes.push(b'd');
            bytes.extend((4 + 25 + message.len() as u32).to_be_bytes());
            bytes.push(b'w');
            bytes.extend([0; 24]);
            bytes.extend(message);
        }
        bytes
    }

    /// All batches that it makes; `each` gets every one.
    fn replay(
        messages: Vec<Vec<u8>>,
        specs: Vec<Arc<TableSpec>>,
        max_rows: u64,
        mut each: impl FnMut(ChangeBatch),
    ) {
        let mut consumer = RecordedConsumer::new(messages, Lsn(1), specs);
        let (linger, until) = (Duration::ZERO, None);
        let limits = BatchLimits {
            max_rows,
            max_bytes: usize::MAX,
            linger,
            until,
            stop_after_one: false,
            request_keepalives: false,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            while let Delivery::Batch(batch) = consumer.next_batch(&limits).await.unwrap() {
                each(batch);
            }
        });
    }
}

fn relation(oid: u32) -> Vec<u8> {
    let name = format!("orders_{oid}");
    let mut relation =
        [b"R".as_slice(), &oid.to_be_bytes(), b"public\0", name.as_bytes(), b"\0d"].concat();
    relation.extend((COLUMNS.len() as u16).to_be_bytes());
    for (at, (name, oid)) in COLUMNS.into_iter().enumerate() {
        relation.push(u8::from(at == 0));
        relation
            .extend([name.as_bytes(), b"\0", &oid.to_be_bytes(), &(-1_i32).to_be_bytes()].concat());
    }
    relation
}

/// `tag` is I or U.
fn row(oid: u32, tag: u8, id: u64) -> Vec<u8> {
    let mut row =
        [&[tag][..], &oid.to_be_bytes(), b"N", &(COLUMNS.len() as u16).to_be_bytes()].concat();
    let values = [
        id.to_string(),
        format!("customer number {}", id % 5000),
        (id % 97).to_string(),
        format!("2026-11-{:02} 12:{:02}:07.25+00", 1 + id % 28, id % 60),
        format!("{{\"tier\": \"gold\", \"points\": {}}}", id % 1000),
    ];
    for value in values {
        row.push(b't');
        row.extend((value.len() as u32).to_be_bytes());
        row.extend(value.as_bytes());
    }
    row
}

const ROWS: u64 = 100_000;

fn inserts() -> Recording {
    (0..ROWS / 1000).fold(Recording::new(1), |recording, transaction| {
        recording.transaction((0..1000).map(|row| (1, b'I', transaction * 1000 + row)))
    })
}

/// Random rows of those that [`inserts`] made.
fn updates() -> Recording {
    (0..50).fold(Recording::new(1), |recording, transaction| {
        recording
            .transaction((0..1000).map(|row| (1, b'U', (transaction * 1000 + row) * 7919 % ROWS)))
    })
}

fn frames(bytes: &[u8]) {
    let mut frames = FrameReader::default();
    for read in bytes.chunks(READ_BYTES) {
        frames.buffer().extend_from_slice(read);
        while let Some(frame) = frames.next_frame().unwrap() {
            let Some(StreamMessage::Data { payload }) = StreamMessage::read(frame).unwrap() else {
                unreachable!()
            };
            std::hint::black_box(Message::decode(&payload).unwrap());
        }
    }
}

fn decoding(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    group.sample_size(20);
    for (name, recording) in [("inserts", inserts()), ("updates", updates())] {
        group.throughput(Throughput::Elements(recording.rows));
        let (bytes, specs) = (recording.bytes(), recording.specs());
        group.bench_function(format!("frames/{name}"), |bencher| bencher.iter(|| frames(&bytes)));
        group.bench_function(format!("columns/{name}"), |bencher| {
            bencher.iter_batched(
                || (recording.messages.clone(), specs.clone()),
                |(messages, specs)| {
                    Recording::replay(messages, specs, ROWS, |batch| {
                        assert!(batch.failed.is_empty())
                    })
                },
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

/// A file that holds what `before` brings.
fn target(folder: &std::path::Path, specs: &[Arc<TableSpec>], before: &[ChangeBatch]) -> DuckDb {
    let path = folder.join("bench.duckdb");
    let mut target = DuckDb::open(&TargetOptions { path, ..TargetOptions::default() }).unwrap();
    begin_empty_copies(&mut target, Lsn(1), specs);
    for spec in specs {
        target.finish_loads(std::slice::from_ref(spec)).unwrap();
        assert!(!target.merge(std::slice::from_ref(spec), 1).unwrap().is_empty());
    }
    apply(&mut target, before);
    target
}

fn apply(target: &mut DuckDb, batches: &[ChangeBatch]) {
    for batch in batches {
        let checkpoint = Checkpoint {
            lsn: batch.end_lsn,
            commit_time_us: batch.commit_times_us.last().copied(),
        };
        target.apply(batch, &checkpoint).unwrap();
    }
}

fn batches(recording: &Recording, max_rows: u64) -> Vec<ChangeBatch> {
    let mut batches = Vec::new();
    Recording::replay(recording.messages.clone(), recording.specs(), max_rows, |batch| {
        batches.push(batch)
    });
    batches
}

fn applying(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("apply");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    // Each transaction is a batch of its own, of five rows in each table.
    let many = (0..6).fold(Recording::new(200), |recording, transaction| {
        recording.transaction(
            (1..=200)
                .flat_map(move |oid| (0..5).map(move |row| (oid, b'I', transaction * 5 + row))),
        )
    });
    // The first one makes what is kept for each table.
    let (mut first, mut rest) = (batches(&many, 1), Vec::new());
    rest.extend(first.drain(1..));
    let later = |mut batches: Vec<ChangeBatch>| {
        // Their recording began anew.
        batches.iter_mut().for_each(|batch| batch.end_lsn = Lsn(batch.end_lsn.0 + 1_000_000));
        batches
    };
    let workloads = [
        ("inserts, 100,000 rows a batch", vec![], batches(&inserts(), ROWS), 1, ROWS),
        (
            "updates, 50,000 rows a batch",
            batches(&inserts(), ROWS),
            later(batches(&updates(), ROWS)),
            1,
            50_000,
        ),
        (
            "updates, 1,000 rows a batch",
            batches(&inserts(), ROWS),
            later(batches(&updates(), 1000)),
            1,
            50_000,
        ),
        ("200 tables, 5 rows of each a batch", first, rest, 200, many.rows * 5 / 6),
    ];
    for (name, before, batches, tables, rows) in workloads {
        group.throughput(Throughput::Elements(rows));
        let specs: Vec<Arc<TableSpec>> = (1..=tables).map(spec).collect();
        group.bench_function(name, |bencher| {
            bencher.iter_batched(
                || {
                    let folder = tempfile::tempdir().unwrap();
                    (target(folder.path(), &specs, &before), folder)
                },
                |(mut target, folder)| {
                    apply(&mut target, &batches);
                    // Closing is not measured.
                    (target, folder)
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, decoding, applying);
criterion_main!(benches);
