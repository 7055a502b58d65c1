use super::*;
use crate::{
    change::{ColumnSpec, Deletes, Key},
    pgoutput::{QualifiedName, ReplicaIdentity, relation::RelationColumn, tuple::Field},
    types::{ColumnType, TypeCatalog, map_column},
};

const COLUMNS: [(&str, u32); 3] = [("id", 23), ("v", 25), ("doc", 25)];

fn relation(oid: u32) -> Relation {
    let column = |(name, type_oid): (&str, u32)| RelationColumn {
        name: name.to_owned(),
        type_oid,
        typmod: -1,
        is_key: name == "id",
    };
    let columns = COLUMNS.into_iter().map(column).collect();
    Relation {
        oid,
        name: QualifiedName::new("public", "t"),
        replica_identity: ReplicaIdentity::Default,
        columns,
    }
}

fn table() -> Arc<TableSpec> {
    let column = |(at, (name, type_oid)): (usize, (&str, u32))| {
        let column = ColumnType { type_oid, typmod: -1, ndims: 0, override_type: None };
        ColumnSpec {
            name: name.to_owned(),
            attnum: 1 + at as i16,
            type_oid,
            typmod: -1,
            not_null: false,
            target_name: name.to_owned(),
            mapping: map_column(&column, &TypeCatalog::default()).unwrap(),
        }
    };
    Arc::new(TableSpec {
        oid: 7,
        source: QualifiedName::new("public", "t"),
        target: QualifiedName::new("public", "t"),
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

fn row(fields: [Field<'_>; 3]) -> Vec<u8> {
    let mut bytes = Vec::new();
    fields.into_iter().for_each(|field| write_field(&mut bytes, field));
    bytes
}

/// Each update copied the long value that it left out, and all copies stayed in memory until
/// the batch was taken.
#[test]
fn many_updates_beside_a_long_value_do_not_keep_a_copy_of_it_each() {
    const LONG: usize = 1 << 20;
    let doc = vec![b'x'; LONG];
    let mut assembler = Assembler::new(Lsn(1), [table()]);
    assembler.push(Message::Begin { commit_lsn: Lsn(10), commit_time_us: 0, xid: 1 }).unwrap();
    assembler.push(Message::Relation(relation(7))).unwrap();
    for id in ["1", "2"] {
        let bytes = row([Field::Text(id.as_bytes()), Field::Text(b"0"), Field::Text(&doc)]);
        assembler.push(Message::Insert { relation: 7, new: Tuple::trusted(&bytes, 3) }).unwrap();
    }
    for number in 1..=200 {
        let value = number.to_string();
        let bytes = row([Field::Text(b"1"), Field::Text(value.as_bytes()), Field::Unchanged]);
        let new = Tuple::trusted(&bytes, 3);
        assembler.push(Message::Update { relation: 7, old: OldTuple::Absent, new }).unwrap();
    }
    assembler
        .push(Message::Commit { commit_lsn: Lsn(10), end_lsn: Lsn(11), commit_time_us: 0 })
        .unwrap();
    assert!(assembler.bytes() < 40 * LONG, "{} bytes for two rows", assembler.bytes());
    let batch = assembler.take_batch();
    let inserts = &batch.tables[0].inserts[0];
    let values = inserts.column(1).as_any().downcast_ref::<arrow::array::StringArray>().unwrap();
    assert_eq!(inserts.num_rows(), 2);
    assert!(matches!(&batch.tables[0].deletes, Deletes::ByKey(keys) if keys.is_empty()));
    assert_eq!(values.iter().flatten().max(), Some("200"));
    let docs = inserts.column(2).to_data();
    assert_eq!(docs.buffers()[1].len(), 2 * LONG);
}

#[test]
fn relations_without_end_are_refused() {
    let mut assembler = Assembler::new(Lsn(1), [table()]);
    assembler.described_limit = 10_000;
    // A relation that is described again takes no more memory.
    for _ in 0..1000 {
        assembler.push(Message::Relation(relation(7))).unwrap();
    }
    let refused =
        (100..1000).find_map(|oid| assembler.push(Message::Relation(relation(oid))).err());
    assert_eq!(refused, Some(AssembleError::TooManyRelations { limit: 10_000 }));
}

/// The server repeats a relation after a transaction that arrived in pieces. A question about
/// it would mean another copy each time.
#[test]
fn an_old_shape_that_is_described_again_before_the_copy_is_no_question() {
    for (copy_lsn, is_question) in [(100, false), (50, true)] {
        let copied = TableSpec { copy_lsn: Lsn(copy_lsn), ..(*table()).clone() };
        let mut assembler = Assembler::new(Lsn(10), [Arc::new(copied)]).with_schema_checks();
        let (commit_lsn, end_lsn) = (Lsn(50), Lsn(51));
        assembler.push(Message::Begin { commit_lsn, commit_time_us: 0, xid: 7 }).unwrap();
        assembler.push(Message::Commit { commit_lsn, end_lsn, commit_time_us: 0 }).unwrap();
        let mut older = relation(7);
        older.columns[1].name = "older".to_owned();
        assembler.push(Message::Relation(older)).unwrap();
        assert_eq!(assembler.schema_query().is_some(), is_question, "copied at {copy_lsn}");
    }
}
