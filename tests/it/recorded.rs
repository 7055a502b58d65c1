//! Golden streams: real bytes of a real server, recorded under `fixtures/`, decoded and replayed.
//!
//! `RHEI_BLESS=1` records them again from the server under test.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use crate::{
    bed::{Cluster, oracle::query_copy, temp_dir},
    pipeline::begin_empty_copies,
};
use rhei::internals::{
    Checkpoint, Lsn,
    change::{ColumnSpec, Key, TableSpec},
    olap::{ApplyTarget, CopyTarget, DuckDb, StoredTable, TableState, TargetOptions, TargetState},
    pgoutput::{
        QualifiedName, ReplicaIdentity,
        message::{Message, OldTuple},
    },
    source::{
        BatchLimits, CdcConsumer, Delivery, recorded_consumer::RecordedConsumer, recording::split,
    },
    types::{ColumnType, TypeCatalog, map_column},
};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/streams").join(name)
}

/// Every message kind that protocol 1 knows.
const WRITES: &str = "
    CREATE TYPE mood AS ENUM ('sad', 'ok');
    CREATE TABLE plain (id int PRIMARY KEY, v text, doc text);
    ALTER TABLE plain ALTER doc SET STORAGE EXTERNAL;
    CREATE TABLE whole (a int, b text); ALTER TABLE whole REPLICA IDENTITY FULL;
    CREATE TABLE felt (id int PRIMARY KEY, m mood);
    CREATE PUBLICATION all_of_it FOR TABLE plain, whole, felt;";

const CHANGES: &[&str] = &[
    "INSERT INTO plain VALUES (1, 'a', repeat('d', 3000)), (2, NULL, ''), (3, 'c', NULL)",
    "UPDATE plain SET v = 'b' WHERE id = 1",
    "UPDATE plain SET id = 10 WHERE id = 1",
    "DELETE FROM plain WHERE id = 2",
    "INSERT INTO whole VALUES (1, 'x'), (1, 'x'), (2, NULL)",
    "UPDATE whole SET b = 'y' WHERE a = 2",
    "DELETE FROM whole WHERE ctid = (SELECT min(ctid) FROM whole WHERE a = 1)",
    "INSERT INTO felt VALUES (1, 'ok')",
    "SELECT pg_logical_emit_message(true, 'rhei', 'hello')",
    "BEGIN; INSERT INTO felt VALUES (2, 'sad'); TRUNCATE felt; INSERT INTO felt VALUES (3, 'ok'); \
     COMMIT",
    "SELECT pg_replication_origin_session_setup('rhei_recorded'); BEGIN; INSERT INTO plain VALUES \
     (4, 'origin', NULL); COMMIT;
     SELECT pg_replication_origin_session_reset()",
];

/// The bytes that the server under test sends for [`CHANGES`]; recorded once per run.
fn recorded() -> Vec<u8> {
    static RECORDED: OnceLock<Vec<u8>> = OnceLock::new();
    RECORDED.get_or_init(record).clone()
}

fn record() -> Vec<u8> {
    let db = Cluster::shared().database("recorded");
    db.execute(WRITES);
    let slot = "recorded_golden";
    db.query(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"));
    db.query("SELECT pg_replication_origin_create('rhei_recorded')");
    for change in CHANGES {
        db.execute(change);
    }
    let rows = db.query(&format!(
        "SELECT encode(data, 'hex') FROM pg_logical_slot_get_binary_changes('{slot}', NULL, NULL, \
         'proto_version', '1', \
         'publication_names', 'all_of_it', 'messages', 'true')"
    ));
    db.query("SELECT pg_replication_origin_drop('rhei_recorded')");
    db.query(&format!("SELECT pg_drop_replication_slot('{slot}')"));
    let mut recording = Vec::new();
    for row in rows {
        let hex = row[0].clone().unwrap();
        let bytes: Vec<u8> = (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
            .collect();
        recording.extend((bytes.len() as u32).to_be_bytes());
        recording.extend(bytes);
    }
    recording
}

fn golden() -> Vec<u8> {
    let path = fixture("every_kind.pgoutput");
    if std::env::var_os("RHEI_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, recorded()).unwrap();
    }
    std::fs::read(path).unwrap()
}

/// One letter per message, with the old tuple's kind.
fn outline(recording: &[u8]) -> String {
    let word = |message: Message<'_>| match message {
        Message::Begin { .. } => "B",
        Message::Commit { .. } => "C",
        Message::Origin { .. } => "O",
        Message::Relation(_) => "R",
        Message::Type { .. } => "Y",
        Message::Insert { .. } => "I",
        Message::Update { old: OldTuple::Absent, .. } => "U",
        Message::Update { old: OldTuple::Key(_), .. } => "Uk",
        Message::Update { old: OldTuple::Full(_), .. } => "Uo",
        Message::Delete { old: OldTuple::Full(_), .. } => "Do",
        Message::Delete { .. } => "Dk",
        Message::Truncate { .. } => "T",
        Message::Logical { .. } => "M",
    };
    let messages = split(recording).unwrap();
    let words: Vec<&str> =
        messages.iter().map(|bytes| word(Message::decode(bytes).unwrap())).collect();
    words.join(" ")
}

const OUTLINE: &str = "B R I I I C B U C B Uk C B Dk C B R I I I C B Uo C B Do C B Y R I C B M C B \
                       I Y R T I C B O I C";

#[test]
fn the_recorded_stream_holds_every_message_kind() {
    assert_eq!(outline(&golden()), OUTLINE);
}

/// On every major that `make test-matrix` runs. Relation and Type may be sent again at will (trap
/// 63), so they are left out, and so are the empty transactions that 14 sends (trap 10).
#[test]
fn the_server_under_test_sends_the_same_kinds() {
    let rows_only = |outline: &str| {
        outline.replace(" R", "").replace(" Y", "").replace("B C", "").replace("  ", " ")
    };
    assert_eq!(rows_only(&outline(&recorded())).trim(), rows_only(OUTLINE));
}

fn spec(
    oid: u32,
    name: &str,
    identity: ReplicaIdentity,
    key: Key,
    columns: &[(&str, u32)],
) -> Arc<TableSpec> {
    let column = |(at, &(name, type_oid)): (usize, &(&str, u32))| ColumnSpec {
        name: name.to_owned(),
        attnum: at as i16 + 1,
        type_oid,
        typmod: -1,
        not_null: false,
        target_name: name.to_owned(),
        mapping: map_column(
            &ColumnType { type_oid, typmod: -1, ndims: 0, override_type: None },
            &TypeCatalog::default(),
        )
        .unwrap(),
    };
    Arc::new(TableSpec {
        oid,
        source: QualifiedName::new("public", name),
        target: QualifiedName::new("public", name),
        epoch: 0,
        replica_identity: identity,
        key,
        columns: columns.iter().enumerate().map(column).collect(),
        excluded: Vec::new(),
        fingerprint: String::new(),
        null_unrepresentable: false,
        copy_lsn: Lsn::ZERO,
        copy_xids: None,
    })
}

/// The oids are those of the recording, read from its Relation messages.
fn tables(recording: &[u8]) -> Vec<Arc<TableSpec>> {
    let mut tables: Vec<Arc<TableSpec>> = Vec::new();
    for bytes in split(recording).unwrap() {
        let Message::Relation(relation) = Message::decode(&bytes).unwrap() else { continue };
        if tables.iter().any(|table| table.oid == relation.oid) {
            continue;
        }
        let columns: Vec<(&str, u32)> =
            relation.columns.iter().map(|column| (column.name.as_str(), column.type_oid)).collect();
        let key = if relation.name.name == "whole" { Key::WholeRow } else { Key::Columns(vec![0]) };
        tables.push(spec(
            relation.oid,
            &relation.name.name,
            relation.replica_identity,
            key,
            &columns,
        ));
    }
    tables
}

/// What a crash would leave now: the file and its log as they are. DuckDB does not write every
/// transaction into its log in an order that it can replay.
fn opens_after_a_crash(path: &std::path::Path) {
    let folder = temp_dir();
    for ending in ["", ".wal"] {
        let name = format!("{}{ending}", path.display());
        if std::path::Path::new(&name).exists() {
            std::fs::copy(name, folder.path().join(format!("crashed.duckdb{ending}"))).unwrap();
        }
    }
    let path = folder.path().join("crashed.duckdb");
    DuckDb::open(&TargetOptions { path, ..TargetOptions::default() })
        .unwrap()
        .state()
        .unwrap()
        .unwrap();
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Before,
    Between,
    After,
}

/// Replays in batches of at least `max_rows` row changes, stopping and starting again from the
/// file's checkpoint after each batch; returns what the three tables hold. Tables go live before
/// the replay, in the middle of it, or after it: until then what changes is kept beside their
/// shadows.
async fn replayed(max_rows: u64, max_bytes: usize, live: When) -> Vec<Vec<Option<String>>> {
    let recording = golden();
    let folder = temp_dir();
    let path = folder.path().join("copy.duckdb");
    let options = TargetOptions { path: path.clone(), ..TargetOptions::default() };
    let specs = tables(&recording);
    let mut target = DuckDb::open(&options).unwrap();
    begin_empty_copies(&mut target, Lsn(1), &specs);
    let go_live = |target: &mut DuckDb| {
        for spec in &specs {
            let one = std::slice::from_ref(spec);
            target.finish_loads(one).unwrap();
            while target.merge(one, 1).unwrap().is_empty() {}
        }
        opens_after_a_crash(&path);
    };
    if live == When::Before {
        go_live(&mut target);
    }
    drop(target);
    for number in 0.. {
        let mut target = DuckDb::open(&options).unwrap();
        if number == 2 && live == When::Between {
            go_live(&mut target);
        }
        let checkpoint = target.state().unwrap().unwrap().pipeline.checkpoint;
        let mut consumer =
            RecordedConsumer::new(split(&recording).unwrap(), checkpoint.lsn, specs.clone());
        let limits = BatchLimits {
            max_rows,
            max_bytes,
            linger: std::time::Duration::ZERO,
            until: None,
            stop_after_one: false,
            request_keepalives: false,
        };
        let mut delivery = consumer.next_batch(&limits).await.unwrap();
        // Parts of a transaction are for one target transaction, which a stop in between would take
        // back.
        while let Delivery::Batch(part) = &delivery
            && part.is_part
        {
            assert!(part.failed.is_empty(), "{:?}", part.failed);
            let durable = target.apply(part, &checkpoint).unwrap().durable;
            assert_eq!(durable.lsn(), checkpoint.lsn, "a part is not durable");
            delivery = consumer.next_batch(&limits).await.unwrap();
        }
        let Delivery::Batch(batch) = delivery else {
            if live == When::After || (live == When::Between && number <= 2) {
                go_live(&mut target);
            }
            break;
        };
        assert!(batch.failed.is_empty(), "{:?}", batch.failed);
        let checkpoint = Checkpoint {
            lsn: batch.end_lsn,
            commit_time_us: batch.commit_times_us.last().copied(),
        };
        consumer.acknowledge(target.apply(&batch, &checkpoint).unwrap().durable);
        assert_eq!(consumer.position().acknowledged, batch.end_lsn);
        opens_after_a_crash(&path);
    }
    query_copy(
        &path,
        "SELECT 'plain', id::VARCHAR, v, left(doc, 3) FROM public.plain UNION ALL SELECT 'whole', \
         a::VARCHAR, b, NULL FROM public.whole \
         UNION ALL SELECT 'felt', id::VARCHAR, m, NULL FROM public.felt ORDER BY 1, 2, 3",
    )
}

/// A table that was dropped and the next one of its name share a name in the copy, until that one
/// is copied.
#[test]
fn the_kept_copy_of_a_dropped_table_does_not_go_with_a_namesake_that_is_renamed() {
    let folder = temp_dir();
    let path = folder.path().join("copy.duckdb");
    let specs = tables(&golden());
    let dropped = &specs[..1];
    let mut target =
        DuckDb::open(&TargetOptions { path: path.clone(), ..TargetOptions::default() }).unwrap();
    begin_empty_copies(&mut target, Lsn(1), dropped);
    target.finish_loads(dropped).unwrap();
    assert_eq!(target.merge(dropped, 1).unwrap().len(), 1);

    let kept = StoredTable::of(&dropped[0], TableState::Dropped);
    let namesake = StoredTable { oid: 99, state: TableState::Pending, ..kept.clone() };
    target.put_tables(&[kept, namesake.clone()]).unwrap();
    let name = namesake.target.clone();
    let renamed = QualifiedName::new(name.schema.clone(), "renamed");
    target.rename(&[(name.clone(), StoredTable { target: renamed, ..namesake })]).unwrap();

    drop(target);
    let names = query_copy(
        &path,
        "SELECT table_name FROM duckdb_tables() WHERE schema_name = 'public' ORDER BY 1",
    );
    assert_eq!(names, [[Some(name.name)]]);
}

/// Whatever the batches are, the outcome is one; also when it was stopped after each.
#[tokio::test]
async fn the_recorded_stream_replays_to_the_same_rows_in_batches_of_any_size() {
    let row = |values: [Option<&str>; 4]| values.map(|value| value.map(str::to_owned)).to_vec();
    let expected = [
        row([Some("felt"), Some("3"), Some("ok"), None]),
        row([Some("plain"), Some("10"), Some("b"), Some("ddd")]),
        row([Some("plain"), Some("3"), Some("c"), None]),
        row([Some("plain"), Some("4"), Some("origin"), None]),
        row([Some("whole"), Some("1"), Some("x"), None]),
        row([Some("whole"), Some("2"), Some("y"), None]),
    ];
    for max_rows in [1, 2, 5, 1000] {
        for live in [When::Before, When::Between, When::After] {
            for max_bytes in [1, usize::MAX] {
                let what =
                    format!("batches of {max_rows} rows and {max_bytes} bytes, live {live:?}");
                assert_eq!(replayed(max_rows, max_bytes, live).await, expected, "{what}");
            }
        }
    }
}

/// What the apply relies on: a table that is made anew in a transaction has the rows of that
/// transaction after a crash.
#[test]
fn rows_of_a_table_that_was_replaced_in_their_transaction_survive_a_crash() {
    let folder = temp_dir();
    let path = folder.path().join("replaced.duckdb");
    let connection = duckdb::Connection::open(&path).unwrap();
    connection.execute_batch("CREATE TABLE t (a int); INSERT INTO t VALUES (1), (2)").unwrap();
    connection
        .execute_batch(
            "BEGIN; DROP TABLE t; CREATE TABLE t (a int, b int); INSERT INTO t VALUES \
                        (3, 4); DELETE FROM t WHERE a = 1; COMMIT",
        )
        .unwrap();
    let copy = folder.path().join("crashed.duckdb");
    std::fs::copy(&path, &copy).unwrap();
    std::fs::copy(
        folder.path().join("replaced.duckdb.wal"),
        folder.path().join("crashed.duckdb.wal"),
    )
    .unwrap();
    assert_eq!(
        query_copy(&copy, "SELECT a::VARCHAR, b::VARCHAR FROM t"),
        [[Some("3".to_owned()), Some("4".to_owned())]]
    );
}

/// A row of pgoutput: text, or nothing for a TOASTed value that did not change.
fn row(values: [Option<&str>; 2]) -> Vec<u8> {
    let mut bytes = vec![0, 2];
    for value in values {
        match value {
            Some(text) => {
                bytes.push(b't');
                bytes.extend((text.len() as u32).to_be_bytes());
                bytes.extend(text.as_bytes());
            }
            None => bytes.push(b'u'),
        }
    }
    bytes
}

/// The copy of a table ends with its TRUNCATE, also when that is in a part of a transaction that is
/// not the last: rows that are merged step by step are then in the shadow, where open values are
/// looked for.
#[tokio::test]
async fn a_table_that_is_truncated_in_a_part_of_a_large_transaction_keeps_its_unchanged_values() {
    let oid = 7_u32.to_be_bytes();
    let begin = |lsn: u64| [b"B".as_slice(), &lsn.to_be_bytes(), &[0; 8], &[0, 0, 0, 1]].concat();
    let commit = |lsn: u64| {
        [b"C\0".as_slice(), &lsn.to_be_bytes(), &(lsn + 1).to_be_bytes(), &[0; 8]].concat()
    };
    let insert =
        |id: &str| [b"I".as_slice(), &oid, b"N", &row([Some(id), Some("toasted")])].concat();
    let mut relation = [b"R".as_slice(), &oid, b"public\0t\0d\0\x02"].concat();
    relation.extend([b"\x01id\0".as_slice(), &23_u32.to_be_bytes(), &[255; 4]].concat());
    relation.extend([b"\0doc\0".as_slice(), &25_u32.to_be_bytes(), &[255; 4]].concat());
    let truncate = [b"T".as_slice(), &1_u32.to_be_bytes(), b"\0", &oid].concat();
    let update = |id: &str| [b"U".as_slice(), &oid, b"N", &row([Some(id), None])].concat();
    let large = [begin(10), relation, truncate, insert("1"), insert("2"), insert("3"), commit(10)];
    let small = [begin(20), update("1"), update("2"), update("3"), commit(20)];

    let folder = temp_dir();
    let path = folder.path().join("copy.duckdb");
    let columns = [("id", 23), ("doc", 25)];
    let table = spec(7, "t", ReplicaIdentity::Default, Key::Columns(vec![0]), &columns);
    let mut target =
        DuckDb::open(&TargetOptions { path: path.clone(), ..TargetOptions::default() }).unwrap();
    begin_empty_copies(&mut target, Lsn(1), std::slice::from_ref(&table));
    let mut consumer = RecordedConsumer::new(
        [large.as_slice(), &small].concat(),
        Lsn(1),
        vec![Arc::clone(&table)],
    );
    let limits = |max_bytes| BatchLimits {
        max_rows: 1,
        max_bytes,
        linger: std::time::Duration::ZERO,
        until: None,
        stop_after_one: false,
        request_keepalives: false,
    };
    let mut parts = 0;
    loop {
        let Delivery::Batch(batch) = consumer.next_batch(&limits(1)).await.unwrap() else {
            panic!("no batch")
        };
        target.apply(&batch, &Checkpoint { lsn: batch.end_lsn, commit_time_us: None }).unwrap();
        assert_eq!(batch.continues, parts > 0);
        if !batch.is_part {
            break;
        }
        parts += 1;
    }
    assert!(parts > 2, "{parts} parts");
    // Some rows are merged, some are not, and then all of them change.
    let one = std::slice::from_ref(&table);
    assert!(target.merge(one, 2).unwrap().is_empty());
    let Delivery::Batch(batch) = consumer.next_batch(&limits(usize::MAX)).await.unwrap() else {
        panic!("no batch")
    };
    target.apply(&batch, &Checkpoint { lsn: batch.end_lsn, commit_time_us: None }).unwrap();
    while target.merge(one, 2).unwrap().is_empty() {}
    drop(target);
    let rows = query_copy(&path, "SELECT id::VARCHAR, doc FROM public.t ORDER BY id");
    let expected = ["1", "2", "3"].map(|id| vec![Some(id.to_owned()), Some("toasted".to_owned())]);
    assert_eq!(rows, expected);
}

/// Whoever took back the beginning of a large transaction must read it again.
#[tokio::test]
async fn the_end_of_a_transaction_whose_beginning_was_taken_back_is_refused() {
    let recording = golden();
    let folder = temp_dir();
    let path = folder.path().join("copy.duckdb");
    let specs = tables(&recording);
    let mut target = DuckDb::open(&TargetOptions { path, ..TargetOptions::default() }).unwrap();
    begin_empty_copies(&mut target, Lsn(1), &specs);
    let mut consumer = RecordedConsumer::new(split(&recording).unwrap(), Lsn(1), specs);
    let limits = BatchLimits {
        max_rows: 1,
        max_bytes: 1,
        linger: std::time::Duration::ZERO,
        until: None,
        stop_after_one: false,
        request_keepalives: false,
    };
    let mut was_part = false;
    loop {
        let Delivery::Batch(batch) = consumer.next_batch(&limits).await.unwrap() else {
            panic!("no part")
        };
        if was_part {
            target.roll_back().unwrap();
            let error = target
                .apply(&batch, &Checkpoint { lsn: batch.end_lsn, commit_time_us: None })
                .unwrap_err();
            assert!(error.to_string().contains("taken back"), "{error}");
            return;
        }
        target.apply(&batch, &Checkpoint { lsn: batch.end_lsn, commit_time_us: None }).unwrap();
        was_part = batch.is_part;
    }
}
