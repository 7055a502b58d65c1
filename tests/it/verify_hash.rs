//! The sum of row hashes that the source computes is that which rhei computes over the copy.
//!
//! RHEI_TEST_SEED replays a run.

use std::{fs, path::Path};

use duckdb::Connection;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{
    bed::{Cluster, Db, Session},
    every_value::{self, Kind},
    following::{Following, from_env},
};
use rhei::internals::{
    Lsn,
    change::{ColumnSpec, Key, TableSpec},
    olap::names,
    pgoutput::{QualifiedName, ReplicaIdentity},
    source::{
        catalog,
        connection::{Environment, SourceOptions, SqlClient, connect_sql},
    },
    types::TypeCatalog,
    verify::{HashSum, RuleKind, SourceTypes, TableRule},
};

/// A session as rhei opens it, with the settings that it pins.
struct Source {
    runtime: tokio::runtime::Runtime,
    client: SqlClient,
    is_utf8: bool,
}

impl Source {
    fn open(db: &Db) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = runtime.block_on(async {
            let source = SourceOptions::parse(&db.url(), &Environment::default()).unwrap();
            connect_sql(&source, "test").await.unwrap()
        });
        let mut source = Self { runtime, client, is_utf8: true };
        source.is_utf8 = source.row("SHOW server_encoding") == ["UTF8"];
        source
    }

    fn row(&self, sql: &str) -> Vec<String> {
        let messages = self.runtime.block_on(self.client.simple_query(sql));
        let messages = messages.unwrap_or_else(|error| panic!("{error:?}\nin: {sql}"));
        let rows = messages.iter().filter_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        let rows: Vec<_> = rows.collect();
        let [row] = rows.as_slice() else { panic!("{} rows from {sql}", rows.len()) };
        (0..row.len()).map(|at| row.get(at).unwrap_or_default().to_owned()).collect()
    }

    fn types(&self, spec: &TableSpec) -> TypeCatalog {
        let oids: Vec<u32> = spec.columns.iter().map(|column| column.type_oid).collect();
        self.runtime.block_on(catalog::types(&self.client, &oids)).unwrap()
    }

    fn sum(&self, spec: &TableSpec, rule: &TableRule) -> HashSum {
        let table = format!("\"{}\".\"{}\"", spec.source.schema, spec.source.name);
        let row = self.row(&format!("SELECT {} FROM {table}", rule.source_sum()));
        HashSum { count: row[0].parse().unwrap(), sum: row[1].parse().unwrap() }
    }
}

/// The file of a copy, in a session of the settings of a reader, whose others must not matter.
fn open(file: &Path, is_writable: bool) -> Connection {
    let copy = Connection::open_in_memory().unwrap();
    let mode = if is_writable { "" } else { "(READ_ONLY)" };
    copy.execute_batch(&format!(
        "SET GLOBAL TimeZone = 'America/New_York'; SET arrow_lossless_conversion = true; ATTACH '{}' AS {} {mode}",
        file.display(),
        names::CATALOG
    ))
    .unwrap();
    copy
}

/// A table as the copy describes it.
fn spec_of(copy: &Connection, table: &str, null_unrepresentable: bool) -> TableSpec {
    let sql = format!(
        "SELECT c.name, c.attnum, c.type_oid, c.typmod, c.not_null, c.target_name, c.mapping, \
         c.key_position, t.oid FROM {0}._rhei.columns c JOIN {0}._rhei.tables t ON t.oid = \
         c.table_oid WHERE t.source_name = '{table}' ORDER BY c.attnum",
        names::CATALOG
    );
    let (mut columns, mut key, mut oid) = (Vec::new(), Vec::new(), 0);
    let mut statement = copy.prepare(&sql).unwrap();
    let mut rows = statement.query([]).unwrap();
    while let Some(row) = rows.next().unwrap() {
        if row.get::<_, Option<u32>>(7).unwrap().is_some() {
            key.push(columns.len());
        }
        oid = row.get(8).unwrap();
        columns.push(ColumnSpec {
            name: row.get(0).unwrap(),
            attnum: row.get(1).unwrap(),
            type_oid: row.get(2).unwrap(),
            typmod: row.get(3).unwrap(),
            not_null: row.get(4).unwrap(),
            target_name: row.get(5).unwrap(),
            mapping: serde_json::from_str(&row.get::<_, String>(6).unwrap()).unwrap(),
        });
    }
    assert!(!columns.is_empty(), "the copy knows no table {table}");
    let name = QualifiedName::new("public", table);
    TableSpec {
        oid,
        source: name.clone(),
        target: name,
        epoch: 0,
        replica_identity: ReplicaIdentity::Default,
        key: if key.is_empty() { Key::AppendOnly } else { Key::Columns(key) },
        columns,
        excluded: Vec::new(),
        fingerprint: String::new(),
        null_unrepresentable,
        copy_lsn: Lsn(1),
        copy_xids: None,
    }
}

fn copy_sum(copy: &Connection, spec: &TableSpec, rule: &TableRule) -> HashSum {
    let sql = format!("SELECT {} FROM {}", rule.copy_select(), names::table(&spec.target));
    let mut statement = copy.prepare(&sql).unwrap_or_else(|error| panic!("{error}\nin: {sql}"));
    let (mut sum, mut hashes) = (HashSum::default(), Vec::new());
    for batch in statement.stream_arrow([]).unwrap() {
        sum += rule.hash(&batch, &mut hashes).unwrap_or_else(|error| {
            panic!("{error}: {:?}\nin: {sql}", std::error::Error::source(&error))
        });
    }
    sum
}

/// The rules of a table: of all its columns, and of each column with the key.
struct Rules {
    spec: TableSpec,
    whole: TableRule,
    of_columns: Vec<(String, TableRule)>,
}

impl Rules {
    fn of(source: &Source, spec: TableSpec) -> Self {
        let catalog = source.types(&spec);
        let types = SourceTypes { catalog: &catalog, is_utf8: source.is_utf8 };
        let others = (0..spec.columns.len()).filter(|at| !spec.key_columns().contains(at));
        let of_columns = others.map(|at| {
            let mut columns = spec.key_columns().to_vec();
            columns.push(at);
            (spec.columns[at].name.clone(), TableRule::of_columns(&spec, &columns, types))
        });
        let of_columns = of_columns.collect();
        Self { whole: TableRule::new(&spec, types), spec, of_columns }
    }

    /// Source and copy have the same sums, column by column and for whole rows.
    #[track_caller]
    fn assert_equal(&self, source: &Source, copy: &Connection) {
        let mut different = Vec::new();
        let whole = ("whole rows".to_owned(), self.whole.clone());
        for (name, rule) in self.of_columns.iter().chain([&whole]) {
            let (at_source, in_copy) =
                (source.sum(&self.spec, rule), copy_sum(copy, &self.spec, rule));
            assert!(at_source.count > 0, "{} is empty", self.spec.source);
            if at_source != in_copy {
                different.push(format!(
                    "{name}: {at_source:?} at the source, {in_copy:?} in the copy, by {:.300}",
                    rule.source_hash()
                ));
            }
        }
        assert!(different.is_empty(), "the sums differ:\n{}", different.join("\n"));
    }
}

/// Types beside those that the random values know.
const MORE_TYPES: &[(&str, &[&str])] = &[
    ("money[]", &["{}", "{-0.01,NULL}", "{92233720368547758.07,1234.5}"]),
    ("oid[]", &["{4294967295,NULL}"]),
    ("xid8[]", &["{18446744073709551615}"]),
    ("\"char\"[]", &["{a,\"\"}"]),
    ("interval[][]", &["{{\"1 mon\",\"30 days\"},{\"-00:00:00.5\",NULL}}"]),
    ("uuid[][]", &["{{00000000000000000000000000000000},{NULL}}"]),
    ("timestamp[]", &["{-infinity,\"0001-12-31 23:59:59.999999 BC\"}"]),
    ("name[]", &["{a,\"b c\"}"]),
    (
        "float8[]",
        &[
            "{1e23,2e23,-2e23,4e23,1e15,1e14,1e-5,1e-4}",
            "{9007199254740993,18014398509481984,36028797018963968,5e-324}",
            "{9.5367431640625e-07,0.3,1e22,8.41e+21,9.5e+20,2.2250738585072014e-308}",
        ],
    ),
    ("float4[]", &["{1e6,123456,1e-5,16777216,33554432,8.5899346e9,67108864,4e10,3.3554430e7}"]),
    ("reg_domain", &["pg_class"]),
    ("numeric(5,5)", &["0.00001", "-0.99999"]),
    ("interval(0)", &["1 day 00:00:01"]),
    ("time(3)", &["24:00:00"]),
    ("dom_bpchar", &["a", "a  ", ""]),
    ("dom_varchar", &["a", "a  ", ""]),
    ("dom_array_of_text", &["{a,NULL}", "[3:4]={x,\"y z\"}"]),
    ("text COLLATE \"POSIX\"", &["a", "A"]),
    ("text COLLATE nondeterministic", &["a", "A", "á", ""]),
];

const MORE_SETUP: &[&str] = &[
    "CREATE DOMAIN reg_domain AS regclass",
    "CREATE DOMAIN dom_bpchar AS char(4)",
    "CREATE DOMAIN dom_varchar AS varchar(4)",
    "CREATE DOMAIN dom_array_of_text AS text[]",
    "CREATE COLLATION nondeterministic (provider = icu, locale = 'und-u-ks-level1', deterministic \
     = false)",
];

/// A column of the wide table.
struct Wide {
    name: String,
    sql: String,
    edges: Vec<String>,
    random: Option<Kind>,
}

impl Wide {
    fn value(&self, number: usize, r: &mut StdRng) -> String {
        let text = match (self.edges.get(number), &self.random) {
            (Some(edge), _) => Some(edge.clone()),
            (None, Some(kind)) => kind.value(r),
            (None, None) if r.random_bool(0.1) => None,
            (None, None) => Some(self.edges[r.random_range(0..self.edges.len())].clone()),
        };
        let bare = self.sql.split(" COLLATE").next().unwrap();
        match text {
            Some(text) => format!("'{}'::{bare}", text.replace('\'', "''")),
            None => format!("NULL::{bare}"),
        }
    }
}

/// All types that this server has.
fn wide(cluster: &Cluster, session: &Session) -> Vec<Wide> {
    let mut columns = Vec::new();
    let mut push = |sql: &str, edges: Vec<String>, random: Option<Kind>| {
        let plain = |sign: char| if sign.is_ascii_alphanumeric() { sign } else { '_' };
        let name: String = sql.chars().map(plain).collect();
        columns.push(Wide {
            name: format!("c{}_{name}", columns.len()),
            sql: sql.to_owned(),
            edges,
            random,
        });
    };
    for kind in every_value::kinds() {
        if kind.is_there(cluster, session) {
            let edges = kind.edges.iter().map(|&edge| edge.to_owned()).collect();
            push(kind.sql, edges, Some(kind));
        } else {
            println!("this server has no {}", kind.sql);
        }
    }
    for statement in MORE_SETUP {
        let _ = session.try_query(statement);
    }
    for (sql, edges) in MORE_TYPES {
        let is_there =
            session.try_query(&format!("CREATE TABLE probe (c {sql}); DROP TABLE probe"));
        match is_there {
            Ok(_) => push(sql, edges.iter().map(|&edge| edge.to_owned()).collect(), None),
            Err(error) => println!("this server has no {sql}: {error}"),
        }
    }
    columns
}

/// Rows of values, the first of which hold the edges of all types.
fn insert(session: &Session, columns: &[Wide], ids: std::ops::Range<usize>, r: &mut StdRng) {
    for id in ids {
        let values: Vec<String> = columns.iter().map(|column| column.value(id % 100, r)).collect();
        session.execute(&format!("INSERT INTO wide VALUES ({id}, {})", values.join(", ")));
    }
}

fn update(session: &Session, columns: &[Wide], id: usize, r: &mut StdRng) {
    let values = columns.iter().map(|column| {
        let number = r.random_range(0..200);
        format!("\"{}\" = {}", column.name, column.value(number, r))
    });
    let values: Vec<String> = values.collect();
    session.execute(&format!("UPDATE wide SET {} WHERE id = {id}", values.join(", ")));
}

#[test]
fn every_type_has_one_hash_on_both_sides_by_copy_and_by_stream() {
    let seed = from_env("RHEI_TEST_SEED", 20_261_129);
    println!("RHEI_TEST_SEED={seed}");
    let mut r = StdRng::seed_from_u64(seed);
    let following = Following::new("verify_hash");
    let session = following.db.session();
    session.execute(every_value::SETTINGS);
    session.execute(every_value::SETUP);
    let columns = wide(Cluster::shared(), &session);
    let declared: Vec<String> =
        columns.iter().map(|column| format!("\"{}\" {}", column.name, column.sql)).collect();
    session.execute(&format!("CREATE TABLE wide (id int8 PRIMARY KEY, {})", declared.join(", ")));

    insert(&session, &columns, 0..150, &mut r);
    following.sync();
    let source = Source::open(&following.db);
    let copy = open(following.copy(), false);
    let rules = Rules::of(&source, spec_of(&copy, "wide", false));
    assert_eq!(rules.of_columns.len(), columns.len());
    let undecidable: Vec<_> = rules.whole.undecidable().collect();
    assert!(undecidable.is_empty(), "{undecidable:?}");
    rules.assert_equal(&source, &copy);
    drop(copy);

    insert(&session, &columns, 200..350, &mut r);
    for id in (0..350).step_by(3) {
        update(&session, &columns, id, &mut r);
    }
    session.execute(
        "UPDATE wide SET id = id + 4294967296 WHERE id % 7 = 1; DELETE FROM wide WHERE id % 7 = 2",
    );
    following.sync();
    let copy = open(following.copy(), false);
    rules.assert_equal(&source, &copy);
    drop(copy);

    assert_changes_are_found(&following, &rules);
}

/// Gives rows of the copy another value in one column. An UPDATE would do nothing where DuckDB
/// takes the values for equal: a month for 30 days.
fn replace(copy: &Connection, table: &str, column: &str, value: &str, ids: &str) -> usize {
    copy.execute_batch(&format!(
        "CREATE OR REPLACE TEMP TABLE changed AS SELECT * REPLACE ({value} AS {column}) FROM \
         {table} WHERE id IN ({ids}); DELETE FROM {table} WHERE id IN (SELECT id FROM changed)"
    ))
    .unwrap();
    copy.execute(&format!("INSERT INTO {table} FROM changed"), []).unwrap()
}

/// In each column: one value becomes NULL, two values change places, and a NULL becomes a value.
fn assert_changes_are_found(following: &Following, rules: &Rules) {
    let file = following.folder.path().join("changed.duckdb");
    fs::copy(following.copy(), &file).unwrap();
    let copy = open(&file, true);
    let all = names::table(&rules.spec.target);
    let spec = TableSpec { target: QualifiedName::new("public", "changed"), ..rules.spec.clone() };
    let table = names::table(&spec.target);
    let mut missed = Vec::new();

    for (name, rule) in &rules.of_columns {
        let column = names::quoted(name);
        copy.execute_batch(&format!(
            "CREATE OR REPLACE TABLE {table} AS SELECT id, {column} FROM {all}"
        ))
        .unwrap();
        let before = copy_sum(&copy, &spec, rule);
        let some =
            format!("(SELECT id FROM {table} WHERE {column} IS NOT NULL ORDER BY id LIMIT 1)");
        let other = format!(
            "(SELECT max(id) FROM {table} WHERE {column}::VARCHAR <> (SELECT {column}::VARCHAR \
             FROM {table} WHERE id = {some}))"
        );
        let value_of = |id: &str| format!("(SELECT {column} FROM {table} WHERE id = {id})");
        let first_null = format!("(SELECT min(id) FROM {table} WHERE {column} IS NULL)");
        let swapped =
            format!("CASE id WHEN {some} THEN {} ELSE {} END", value_of(&other), value_of(&some));
        let changes = [
            ("a value became NULL", "NULL".to_owned(), some.clone()),
            ("two values changed places", swapped, format!("{some}, {other}")),
            ("NULL became a value", value_of(&some), first_null),
        ];
        for (what, value, ids) in changes {
            copy.execute_batch("BEGIN").unwrap();
            let changed = replace(&copy, &table, &column, &value, &ids);
            let after = copy_sum(&copy, &spec, rule);
            copy.execute_batch("ROLLBACK").unwrap();
            if changed == 0 || after == before {
                missed.push(format!("{name}: {what} ({changed} rows)"));
            }
        }
    }
    assert!(missed.is_empty(), "not found:\n{}", missed.join("\n"));
}

/// Values that a hash of the type takes for equal, or that look equal when printed.
const NEAR: &[(&str, &str, &str)] = &[
    ("int8", "-1", "4294967295"),
    ("int8", "1", "4294967296"),
    ("numeric(10,2)", "1.50", "-1.50"),
    ("numeric(10,2)", "100.00", "0.01"),
    ("numeric", "1.5", "1.50"),
    ("numeric", "NaN", "Infinity"),
    ("interval", "1 mon", "30 days"),
    ("interval", "1 day", "24:00:00"),
    ("text", "a", "a "),
    ("text", "", "\u{0301}"),
    ("char(5)", "a", "b"),
    ("bytea", "\\x00", "\\x0000"),
    ("bit(2)", "01", "10"),
    ("varbit", "0", "00"),
    ("timestamp", "2024-01-01 00:00:00", "2024-01-01 00:00:00.000001"),
    ("timestamptz", "infinity", "-infinity"),
    ("date", "0001-01-01", "0001-01-01 BC"),
    ("time", "00:00:00", "24:00:00"),
    ("timetz", "12:00:00+00", "13:00:00+01"),
    ("jsonb", "1.0", "1.00"),
    ("json", "{\"a\":1}", "{\"a\": 1}"),
    ("inet", "10.0.0.1", "10.0.0.1/8"),
    ("xid8", "18446744073709551615", "4294967295"),
    ("money", "0.01", "-0.01"),
    ("bool", "true", "false"),
    ("float8", "0", "5e-324"),
    ("mood", "sad", "ok"),
    ("int4[]", "{1,2}", "{2,1}"),
    ("text[]", "{NULL}", "{\"NULL\"}"),
    ("interval[]", "{\"1 mon\"}", "{\"30 days\"}"),
    ("float8[]", "{0}", "{NULL}"),
    ("int4[][]", "{{1,2}}", "{{1},{2}}"),
];

#[test]
fn values_that_are_nearly_equal_have_other_sums() {
    let following = Following::new("verify_near");
    let session = following.db.session();
    session.execute(every_value::SETTINGS);
    session.execute(every_value::SETUP);
    let columns = |at: usize| {
        let declared = NEAR.iter().enumerate().map(|(number, (sql, one, other))| {
            let value = [sql, one, other][at];
            let value = if at == 0 { value.to_string() } else { format!("'{value}'") };
            if at == 0 { format!("c{number} {value}") } else { value }
        });
        declared.collect::<Vec<_>>().join(", ")
    };
    session.execute(&format!(
        "CREATE TABLE near (id int PRIMARY KEY, {}); INSERT INTO near VALUES (1, {}), (2, {})",
        columns(0),
        columns(1),
        columns(2)
    ));
    following.sync();

    let source = Source::open(&following.db);
    let file = following.folder.path().join("changed.duckdb");
    fs::copy(following.copy(), &file).unwrap();
    let copy = open(&file, true);
    let rules = Rules::of(&source, spec_of(&copy, "near", false));
    rules.assert_equal(&source, &copy);

    let table = names::table(&rules.spec.target);
    let mut missed = Vec::new();
    for ((name, rule), near) in rules.of_columns.iter().zip(NEAR) {
        copy.execute_batch("BEGIN").unwrap();
        let other = format!("(SELECT {name} FROM {table} WHERE id = 2)");
        assert_eq!(replace(&copy, &table, name, &other, "1"), 1);
        if source.sum(&rules.spec, rule) == copy_sum(&copy, &rules.spec, rule) {
            missed.push(format!("{near:?}"));
        }
        copy.execute_batch("ROLLBACK").unwrap();
    }
    assert!(missed.is_empty(), "not found:\n{}", missed.join("\n"));
}

#[test]
fn types_on_request_have_a_hash_or_a_reason() {
    let mut following = Following::new("verify_on_request");
    let requested = [
        ("timetz", "TIMETZ", RuleKind::Native, "'24:00:00-15:59:59', '00:00:00.5+05:30'"),
        ("timetz", "VARCHAR", RuleKind::Text, "'24:00:00-15:59:59', '00:00:00.5+05:30'"),
        ("numeric", "DECIMAL(20,4)", RuleKind::Native, "'1.5', '-0.00010'"),
        ("numeric(10,2)", "VARCHAR", RuleKind::Text, "'1.5', 'NaN'"),
        ("int8", "VARCHAR", RuleKind::Text, "'1', '-5'"),
        ("bool", "VARCHAR", RuleKind::Text, "'true', 'false'"),
        ("float4", "VARCHAR", RuleKind::Text, "'0.1', '-0'"),
        ("money", "VARCHAR", RuleKind::Text, "'1234.5', '-1'"),
        ("interval", "VARCHAR", RuleKind::Text, "'1 mon', '-1 day 00:00:01'"),
        ("date", "VARCHAR", RuleKind::Text, "'0044-03-15 BC', 'infinity'"),
        ("bytea", "VARCHAR", RuleKind::Text, "'\\x00', 'a'"),
        ("jsonb", "VARCHAR", RuleKind::Text, "'{\"a\": [1]}', 'null'"),
        ("int4[]", "VARCHAR", RuleKind::Text, "'[0:1]={5,6}', '{}'"),
        ("text[]", "VARCHAR", RuleKind::Text, "'{a,NULL}', '{{b},{c}}'"),
        ("numeric", "DOUBLE", RuleKind::Undecidable("rounded"), "'1.5', '1e400'"),
        ("int4range", "STRUCT", RuleKind::Undecidable("STRUCT"), "'[1,5)', 'empty'"),
        ("outer_row", "STRUCT", RuleKind::Undecidable("STRUCT"), "'(1,a,,)', '(,,,)'"),
        ("jsonb", "VARIANT", RuleKind::Undecidable("VARIANT"), "'1', '{}'"),
        ("hstore", "MAP", RuleKind::Text, "'a=>1, \"b \\\"c\"=>NULL, ccc=>\"NULL\"', ''"),
    ];
    let session = following.db.session();
    session.execute(every_value::SETTINGS);
    session.execute(every_value::SETUP);
    let has_hstore = session.try_query("CREATE EXTENSION hstore").is_ok();
    let is_there = |sql: &str| sql != "hstore" || has_hstore;

    let mut settings =
        format!("[source]\nslot = \"{}\"\n[tables.\"public.asked\"]\n", following.slot());
    let (mut declared, mut values) = (Vec::new(), [Vec::new(), Vec::new()]);
    for (number, (sql, wanted, _, both)) in requested.iter().enumerate() {
        if !is_there(sql) {
            println!("this server has no {sql}");
            continue;
        }
        settings.push_str(&format!("columns.c{number}.type = \"{wanted}\"\n"));
        declared.push(format!("c{number} {sql}"));
        let (one, other) = both.rsplit_once(", '").unwrap();
        values[0].push(one.to_owned());
        values[1].push(format!("'{other}"));
    }
    following.rhei = following.rhei.config(&settings);
    let [one, other] = values.map(|values| values.join(", "));
    session.execute(&format!(
        "CREATE TABLE asked (id int PRIMARY KEY, {}); INSERT INTO asked VALUES (1, {one}), (2, \
         {other}); INSERT INTO asked VALUES (3)",
        declared.join(", ")
    ));
    following.sync();
    session.execute(&format!("INSERT INTO asked VALUES (4, {other}), (5, {one})"));
    following.sync();

    let source = Source::open(&following.db);
    let copy = open(following.copy(), false);
    let rules = Rules::of(&source, spec_of(&copy, "asked", false));
    rules.assert_equal(&source, &copy);
    for (number, (sql, wanted, expected, _)) in requested.iter().enumerate() {
        let name = format!("c{number}");
        let Some(rule) = rules.whole.columns.iter().find(|rule| rule.column == name) else {
            assert!(!is_there(sql));
            continue;
        };
        let is_expected = match (rule.kind, expected) {
            (RuleKind::Undecidable(reason), RuleKind::Undecidable(word)) => reason.contains(word),
            (found, expected) => found == *expected,
        };
        assert!(is_expected, "{sql} as {wanted}: {:?}", rule.kind);
    }
}

#[test]
fn values_that_became_null_are_no_difference_and_are_counted() {
    let mut following = Following::new("verify_nulled");
    let settings = format!(
        "[source]\nslot = \"{}\"\n[sync]\non_unrepresentable = \"null\"\n\
         [tables.\"public.nulled\"]\ncolumns.c2.type = \"DECIMAL(6,2)\"\n",
        following.slot()
    );
    following.rhei = following.rhei.config(&settings);
    let session = following.db.session();
    session.execute(every_value::SETTINGS);
    let is_17 = Cluster::shared().major() >= 17;
    let infinite = if is_17 { "infinity" } else { "1 day" };
    let bad = format!(
        "'NaN', '1.234', '294247-01-10 04:00:54.775807', '294247-01-10 04:00:54.775807+00', \
         '{infinite}', '{{{{1,2}},{{3,4}}}}', '{{1,NaN}}', 'infinity'"
    );
    let good = "'-1.5', '-9999.99', '294247-01-10 04:00:54.775806', \
                '294247-01-10 04:00:54.775806+00', '1 mon', '[4:5]={1,NULL}', '{1,NULL}', \
                '-infinity'";
    session.execute(&format!(
        "CREATE TABLE nulled (id int PRIMARY KEY, c1 numeric(5,2), c2 numeric, c3 timestamp, c4 \
         timestamptz, c5 interval, c6 int4[], c7 numeric(5,2)[], c8 date);
         INSERT INTO nulled VALUES (1, {bad}), (2, {good});
         INSERT INTO nulled (id, c2) VALUES (3, '1e4'), (4, 'Infinity'), (5, 'NaN'), (6, '0.1000')"
    ));
    following.sync();
    session.execute(&format!("INSERT INTO nulled VALUES (11, {bad}), (12, {good})"));
    following.sync();

    let source = Source::open(&following.db);
    let copy = open(following.copy(), false);
    let rules = Rules::of(&source, spec_of(&copy, "nulled", true));
    rules.assert_equal(&source, &copy);
    let expected = [
        ("c1", 2),
        ("c2", 5),
        ("c3", 2),
        ("c4", 2),
        ("c5", if is_17 { 2 } else { 0 }),
        ("c6", 2),
        ("c7", 2),
    ];
    let mut found = Vec::new();
    for rule in &rules.whole.columns {
        let Some(condition) = &rule.is_nulled else { continue };
        let row =
            source.row(&format!("SELECT count(*) FILTER (WHERE {condition}) FROM public.nulled"));
        found.push((rule.column.as_str(), row[0].parse().unwrap()));
    }
    assert_eq!(found, expected);
}

/// The source hashes text as it stores it, and the copy holds UTF-8.
#[test]
fn text_of_other_encodings_is_hashed_as_utf8() {
    let cluster = Cluster::shared();
    for encoding in ["LATIN1", "SQL_ASCII"] {
        let name = format!("verify_{}", encoding.to_lowercase());
        cluster.maintenance().execute(&format!(
            "CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' \
             LC_CTYPE 'C'"
        ));
        let following = Following::of(cluster.named(&name));
        following.db.execute(
            "CREATE TYPE colour AS ENUM ('grün'); CREATE TABLE texts (id int PRIMARY KEY, c1 text, \
             c2 char(9), c3 colour, c4 text[], c5 jsonb, c6 bytea, c7 varchar);
             INSERT INTO texts VALUES (1, 'äöü', 'ß', 'grün', '{é,NULL}', '{\"à\": 1}', '\\xe4', \
             ''), (2, NULL, NULL, NULL, NULL, NULL, NULL, NULL)",
        );
        following.sync();
        following
            .db
            .execute("INSERT INTO texts SELECT 3, c1 || 'ÿ', c2, c3, c4 FROM texts WHERE id = 1");
        following.sync();

        let source = Source::open(&following.db);
        assert!(!source.is_utf8, "{encoding}");
        let copy = open(following.copy(), false);
        let rules = Rules::of(&source, spec_of(&copy, "texts", false));
        rules.assert_equal(&source, &copy);

        let slot = following.slot();
        following.db.execute(&format!("SELECT pg_drop_replication_slot('{slot}')"));
        cluster.maintenance().execute(&format!("DROP DATABASE {name} WITH (FORCE)"));
    }
}

/// Each column has two elements, so that a row has more of them than a record may have.
#[test]
fn a_row_with_more_elements_than_a_record_may_have_is_hashed_in_parts() {
    let following = Following::new("verify_parts");
    let columns: Vec<String> = (0..900).map(|number| format!("c{number} int8")).collect();
    let values: Vec<String> = (0..900).map(|number| format!("{number}::int8 * id")).collect();
    following.db.execute(&format!(
        "CREATE TABLE parts (id int PRIMARY KEY, {}); INSERT INTO parts SELECT id, {} FROM \
         generate_series(1, 5) id",
        columns.join(", "),
        values.join(", ")
    ));
    following.sync();
    let source = Source::open(&following.db);
    let copy = open(following.copy(), false);
    let spec = spec_of(&copy, "parts", false);
    let catalog = source.types(&spec);
    let rule = TableRule::new(&spec, SourceTypes { catalog: &catalog, is_utf8: source.is_utf8 });
    assert!(rule.source_hash().contains("ROW(pg_catalog.int8send("));
    assert_eq!(source.sum(&spec, &rule), copy_sum(&copy, &spec, &rule));
}
