//! Messages of a hostile server, through the spool and the assembler as the live stream takes them,
//! until they are Arrow.
#![no_main]

mod common;

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

use libfuzzer_sys::fuzz_target;

use rhei::internals::{
    Lsn,
    change::{
        ChangeBatch, ColumnOrigin, Deletes, Key, SchemaChange, TableSpec, assemble::Assembler,
        followed::SchemaResolution,
    },
    pgoutput::{
        ReplicaIdentity,
        message::{Message, StreamCommit, Streamed},
    },
    source::{
        SourceError,
        spool::{Replay, Routed, Spool},
    },
};

/// Those of the recording, one of many types, one without identity; and what each becomes when its
/// shape changes.
static TABLES: LazyLock<BTreeMap<u32, [Arc<TableSpec>; 2]>> = LazyLock::new(|| {
    let mut tables = Vec::new();
    for bytes in rhei::internals::source::recording::split(common::FIXTURE).unwrap() {
        let Ok(Message::Relation(relation)) = Message::decode(&bytes) else { continue };
        let columns: Vec<(&str, u32)> =
            relation.columns.iter().map(|column| (column.name.as_str(), column.type_oid)).collect();
        let key = if relation.name.name == "whole" { Key::WholeRow } else { Key::Columns(vec![0]) };
        tables.push(common::table(
            relation.oid,
            &relation.name.name,
            relation.replica_identity,
            key,
            &columns,
        ));
    }
    let many = [
        ("id", 23),
        ("at", 1184),
        ("d", 1082),
        ("i", 1186),
        ("u", 2950),
        ("j", 3802),
        ("l", 91_000),
    ];
    let mut many =
        common::table(7, "many", ReplicaIdentity::Index, Key::Columns(vec![1, 0]), &many);
    many.excluded.push("x".to_owned());
    tables.push(many);
    tables.push(common::table(
        8,
        "logged",
        ReplicaIdentity::Nothing,
        Key::AppendOnly,
        &[("id", 23), ("v", 25)],
    ));
    let both = |table: TableSpec| {
        let mut columns: Vec<_> = table.columns.clone();
        let mut added = columns[0].clone();
        (added.name, added.target_name, added.attnum) = ("n".to_owned(), "n".to_owned(), 100);
        columns.push(added);
        let after = TableSpec { columns, epoch: 1, ..table.clone() };
        (table.oid, [Arc::new(table), Arc::new(after)])
    };
    tables.into_iter().map(both).collect()
});

struct Stream {
    assembler: Assembler,
    spool: Spool,
    schema_changes: bool,
    end_lsn: Lsn,
    commits: u64,
    transactions: u64,
    shapes: BTreeMap<u32, usize>,
}

impl Stream {
    fn message(&mut self, bytes: &[u8]) -> Result<(), SourceError> {
        if let Some(commit) = StreamCommit::decode(bytes)? {
            let StreamCommit { xid, commit_lsn, end_lsn, commit_time_us } = commit;
            let mut replay: Replay = self.spool.commit(&commit)?;
            self.push(Message::Begin { commit_lsn, commit_time_us, xid })?;
            while let Some(message) = replay.next_message().expect("what was kept is there") {
                self.push(Message::decode(message)?)?;
            }
            self.push(Message::Commit { commit_lsn, end_lsn, commit_time_us })?;
            for relation in replay.described_later() {
                self.push(Message::decode(&relation)?)?;
            }
            return Ok(());
        }
        if self.spool.take(bytes)? == Routed::Spooled {
            return Ok(());
        }
        self.push(Message::decode(bytes)?)
    }

    fn push(&mut self, message: Message<'_>) -> Result<(), SourceError> {
        let is_commit = matches!(message, Message::Commit { .. });
        self.assembler.push(message)?;
        self.commits += u64::from(is_commit);
        if let Some(question) = self.assembler.schema_query() {
            let oid = question.relation.oid;
            let shape = self.shapes.entry(oid).or_default();
            if self.schema_changes
                && *shape == 0
                && question.relation.columns.len() > TABLES[&oid][0].columns.len()
            {
                *shape = 1;
                let [before, after] = TABLES[&oid].clone();
                let mut columns: Vec<_> =
                    (0..before.columns.len()).map(ColumnOrigin::Kept).collect();
                columns.push(ColumnOrigin::Added(Some("5".to_owned())));
                self.assembler.answer(SchemaResolution::SchemaChange(Box::new(SchemaChange {
                    before,
                    after,
                    columns,
                })));
                if self.assembler.must_end_batch() {
                    self.take();
                }
                self.assembler.continue_after_change();
            } else {
                self.assembler.answer(SchemaResolution::Same);
            }
        }
        Ok(())
    }

    fn take(&mut self) {
        let batch: ChangeBatch = self.assembler.take_batch();
        assert!(batch.end_lsn >= self.end_lsn, "{} after {}", batch.end_lsn, self.end_lsn);
        self.end_lsn = batch.end_lsn;
        self.transactions += batch.source_transactions;
        assert_eq!(batch.commit_times_us.len() as u64, batch.source_transactions);
        for table in &batch.tables {
            let width = table.table.columns.len();
            assert!(
                table.inserts.iter().all(|rows| rows.num_columns() == width && rows.num_rows() > 0)
            );
            if let Some(patch) = &table.patch {
                let mut unchanged = patch.patterns.iter().flatten();
                assert!(patch.patterns.iter().all(|pattern| !pattern.is_empty()));
                assert!(unchanged.all(|&column| column < width));
                let keys = table.table.key_columns().len();
                assert_eq!(patch.rows.num_columns(), width + keys + 1);
            }
            match &table.deletes {
                Deletes::ByKey(keys) => {
                    assert!(
                        keys.iter()
                            .all(|rows| rows.num_columns() == table.table.key_columns().len())
                    );
                }
                Deletes::Rows(rows) => {
                    assert!(rows.iter().all(|rows| rows.num_columns() == width + 1))
                }
            }
            assert!(
                table.truncate.is_none() || table.patch.is_none(),
                "rows of a truncated table have nothing to take values from"
            );
        }
        let _ = self.assembler.take_untracked();
        assert!(self.assembler.pending_rows() == 0 && self.assembler.pending_transactions() == 0);
    }
}

fuzz_target!(
    init: common::write_seeds(seeds),
    |bytes: &[u8]| {
        let mut rest = bytes;
        let (flags, max_rows) = (common::byte(&mut rest), common::byte(&mut rest));
        let max_bytes = if flags & 1 == 0 { usize::MAX } else { 1 + usize::from(max_rows) };
        LazyLock::force(&TABLES);
        common::within_memory(bytes.len(), 8 << 20, 1000, || {
            let tables = TABLES.values().map(|[before, _]| match flags & 8 {
                0 => Arc::clone(before),
                _ => Arc::new(TableSpec { null_unrepresentable: true, ..TableSpec::clone(before) }),
            });
            let mut assembler = Assembler::new(Lsn(1), tables);
            if flags & 2 != 0 {
                assembler = assembler.with_schema_checks();
            }
            let mut stream = Stream {
                assembler,
                spool: Spool::new(std::env::temp_dir()),
                schema_changes: flags & 4 != 0,
                end_lsn: Lsn(1),
                commits: 0,
                transactions: 0,
                shapes: BTreeMap::new(),
            };
            while !rest.is_empty() {
                let message = common::piece(&mut rest);
                // Every reader sees every message, in whatever state the stream is.
                let _ = (Message::decode(message), Streamed::decode(message), Streamed::split(message));
                if let Err(error) = stream.message(message) {
                    assert!(!error.to_string().is_empty());
                    return;
                }
                if stream.assembler.is_due(1 + u64::from(max_rows), max_bytes) {
                    stream.take();
                }
            }
            if stream.assembler.is_between_transactions() {
                stream.take();
                assert!(stream.assembler.has_no_open_work() && stream.transactions <= stream.commits);
            }
        });
    }
);

fn seeds() -> Vec<Vec<u8>> {
    let recorded = rhei::internals::source::recording::split(common::FIXTURE).unwrap();
    // The long values of the recording would only make mutations slow.
    let short = recorded.iter().filter(|message| message.len() < 400).map(Vec::as_slice);
    let mut seeds: Vec<Vec<u8>> = (0..16)
        .map(|flags| [[flags, 2].as_slice(), &common::pieces(short.clone())].concat())
        .collect();
    seeds.extend(
        recorded
            .iter()
            .map(|message| [[0, 0].as_slice(), &common::pieces([message.as_slice()])].concat()),
    );

    let text = |values: &[Option<&str>]| {
        let mut bytes = (values.len() as u16).to_be_bytes().to_vec();
        for value in values {
            match value {
                Some("?") => bytes.push(b'u'),
                Some(value) => {
                    bytes.push(b't');
                    bytes.extend((value.len() as u32).to_be_bytes());
                    bytes.extend(value.as_bytes());
                }
                None => bytes.push(b'n'),
            }
        }
        bytes
    };
    let relation = |table: &TableSpec, identity: u8| {
        let mut bytes = [b"R".as_slice(), &table.oid.to_be_bytes(), b"public\0"].concat();
        bytes.extend(table.source.name.as_bytes());
        bytes.extend([0, identity]);
        bytes.extend((table.columns.len() as u16).to_be_bytes());
        for (at, column) in table.columns.iter().enumerate() {
            bytes.push(u8::from(table.key_columns().contains(&at)));
            bytes.extend(column.name.as_bytes());
            bytes.push(0);
            bytes.extend(column.type_oid.to_be_bytes());
            bytes.extend(column.typmod.to_be_bytes());
        }
        bytes
    };
    let begin = |lsn: u64| [b"B".as_slice(), &lsn.to_be_bytes(), &[0; 8], &[0, 0, 0, 1]].concat();
    let commit = |lsn: u64| {
        [b"C\0".as_slice(), &lsn.to_be_bytes(), &(lsn + 1).to_be_bytes(), &[0; 8]].concat()
    };
    let oid = |oid: u32| oid.to_be_bytes();
    let row = |id| {
        [
            Some(id),
            Some("2024-01-01 00:00:00+00"),
            Some("2024-01-01"),
            Some(
                "1 \
             day",
            ),
            None,
            Some("{}"),
            Some("?"),
        ]
    };
    let whole = |id| {
        let uuid = "ffffffff-ffff-ffff-ffff-ffffffffffff";
        [
            Some(id),
            Some(
                "2024-01-01 \
                         00:00:00+00",
            ),
            Some("infinity"),
            None,
            Some(uuid),
            Some("{}"),
            Some("{1,NULL}"),
        ]
    };
    let many = &TABLES[&7];
    let messages = [
        begin(10),
        relation(&many[0], b'i'),
        [b"I".as_slice(), &oid(7), b"N", &text(&whole("1"))].concat(),
        [b"I".as_slice(), &oid(7), b"N", &text(&whole("2"))].concat(),
        [b"U".as_slice(), &oid(7), b"N", &text(&row("1"))].concat(),
        [b"U".as_slice(), &oid(7), b"K", &text(&row("3")), b"N", &text(&row("4"))].concat(),
        [b"D".as_slice(), &oid(7), b"K", &text(&row("9"))].concat(),
        relation(&many[1], b'i'),
        commit(10),
        begin(20),
        relation(&TABLES[&8][0], b'n'),
        [b"I".as_slice(), &oid(8), b"N", &text(&[Some("1"), Some("x")])].concat(),
        [b"T".as_slice(), &1_u32.to_be_bytes(), b"\0", &oid(8)].concat(),
        [
            b"M\x01".as_slice(),
            &[0; 8],
            b"rhei.ddl\0\0\0\0\x3c",
            br#"{"oid":7,"last_attnum":2,"columns":[]}                      "#,
        ]
        .concat(),
        commit(20),
    ];
    for flags in 0..16 {
        seeds.push(
            [[flags, 1].as_slice(), &common::pieces(messages.iter().map(Vec::as_slice))].concat(),
        );
    }
    let xid =
        |xid: u32, message: &[u8]| [&message[..1], &xid.to_be_bytes(), &message[1..]].concat();
    let mut streamed = vec![b"S\0\0\0\x05\x01".to_vec()];
    streamed.extend(messages[1..7].iter().map(|message| xid(5, message)));
    streamed.push(b"E".to_vec());
    streamed.push(messages[7].clone());
    streamed.push(b"S\0\0\0\x05\0".to_vec());
    streamed.push(xid(6, &messages[2]));
    streamed.push(b"E".to_vec());
    streamed.push(b"A\0\0\0\x05\0\0\0\x06".to_vec());
    streamed.push(
        [b"c\0\0\0\x05\0".as_slice(), &10_u64.to_be_bytes(), &11_u64.to_be_bytes(), &[0; 8]]
            .concat(),
    );
    for flags in 0..16 {
        seeds.push(
            [[flags, 1].as_slice(), &common::pieces(streamed.iter().map(Vec::as_slice))].concat(),
        );
    }
    seeds
}
