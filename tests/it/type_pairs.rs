//! Every change of a column's type that a server makes without writing the table anew, against what
//! rhei decides about it: what goes through in place must leave in DuckDB what a new copy would.
//!
//! RHEI_TEST_SEED replays a run. RHEI_BLESS=1 writes the table of docs/schema-changes.md anew.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    sync::Arc,
};

use arrow::{
    array::{ArrayRef, Int32Array},
    datatypes::{DataType, Field, Schema},
    record_batch::RecordBatch,
};
use rand::{SeedableRng, rngs::StdRng};

use crate::{
    bed::{Cluster, Db, Session},
    every_value::{self, quoted},
    following::from_env,
};
use rhei::internals::{
    Lsn,
    change::{ColumnOrigin, ColumnSpec, Key, SchemaChange, TableSpec},
    olap::names,
    pgoutput::{QualifiedName, ReplicaIdentity},
    source::{
        catalog,
        connection::{Environment, SourceOptions, connect_sql},
    },
    types::{
        ColumnBuilder, ColumnType, InPlace, Mapping, TypeCatalog, Typed, in_place, map_column,
    },
};

const ROWS: usize = 1000;

/// Types beside those that the random values know: lengths, precisions, domains, and arrays of
/// them.
const VARIANTS: &[&str] = &[
    "varchar(3)",
    "varchar(9)",
    "char(3)",
    "char(9)",
    "bpchar",
    "numeric(5,2)",
    "numeric(9,2)",
    "numeric(9,4)",
    "numeric(5,0)",
    "numeric(2,2)",
    "numeric(3,2)",
    "numeric(38,2)",
    "numeric(38,37)",
    "numeric(39,2)",
    "numeric(1000,2)",
    "numeric(7,-2)",
    "numeric(5,5)",
    "numeric(5,7)",
    "bit(9)",
    "varbit(3)",
    "varbit(9)",
    "time(3)",
    "time(6)",
    "timetz(0)",
    "timetz(3)",
    "timestamp(0)",
    "timestamp(6)",
    "timestamptz(0)",
    "timestamptz(3)",
    "timestamptz(6)",
    "interval(0)",
    "interval(3)",
    "interval(6)",
    "interval year",
    "interval year to month",
    "interval day to second",
    "interval day to second(3)",
    "interval hour to minute",
    "free_text",
    "free_varchar",
    "short_varchar",
    "free_citext",
    "free_numeric",
    "narrow_numeric",
    "free_timestamp",
    "free_list",
    "free_matrix",
    "domain_of_free",
    "varchar(3)[]",
    "varchar(9)[]",
    "char(9)[]",
    "numeric(5,2)[]",
    "numeric(9,2)[]",
    "bit(3)[]",
    "varbit(9)[]",
    "timestamp(3)[]",
    "timestamptz(3)[]",
    "interval(3)[]",
    "text[][]",
    "text[][][]",
    "varchar[][]",
    "varchar(3)[][]",
    "numeric[][]",
    "timestamp[][]",
    "timestamptz[][]",
    "short_varchar[]",
    "free_text[]",
    "free_numeric[]",
    "narrow_numeric[]",
    "free_timestamp[]",
];

/// Each may fail where an extension is missing.
const DOMAINS: &[&str] = &[
    "CREATE DOMAIN free_text AS text",
    "CREATE DOMAIN free_varchar AS varchar",
    "CREATE DOMAIN short_varchar AS varchar(3)",
    "CREATE DOMAIN free_citext AS citext",
    "CREATE DOMAIN free_numeric AS numeric",
    "CREATE DOMAIN narrow_numeric AS numeric(5,2)",
    "CREATE DOMAIN free_timestamp AS timestamp",
    "CREATE DOMAIN free_list AS text[]",
    "CREATE DOMAIN free_matrix AS text[][]",
    "CREATE DOMAIN domain_of_free AS free_text",
];

/// What the server does with an empty table of a type, for each of these types: nothing (no row),
/// or whether it writes the table anew. Nothing is left of it.
const PAIRS_OF: &str = "
    CREATE FUNCTION public.pairs_of(t regclass, targets text[]) RETURNS TABLE (target text, \
    rewritten bool)
    LANGUAGE plpgsql AS $$
    DECLARE file oid;
    BEGIN
        FOREACH target IN ARRAY targets LOOP
            BEGIN
                file := pg_relation_filenode(t);
                EXECUTE format('ALTER TABLE %s ALTER c TYPE %s', t, target);
                rewritten := pg_relation_filenode(t) <> file;
                RAISE EXCEPTION USING ERRCODE = 'RX001';
            EXCEPTION WHEN SQLSTATE 'RX001' THEN RETURN NEXT;
                WHEN OTHERS THEN NULL;
            END;
        END LOOP;
    END $$;
    CREATE FUNCTION public.fill(t regclass, type text, candidates text[]) RETURNS void LANGUAGE \
    plpgsql AS $$
    DECLARE candidate text;
    BEGIN
        FOREACH candidate IN ARRAY candidates LOOP
            BEGIN
                EXECUTE format('INSERT INTO %s (c) SELECT %L::%s', t, candidate, type);
            EXCEPTION WHEN OTHERS THEN NULL;
            END;
        END LOOP;
    END $$;";

/// A type that a column can have.
#[derive(Debug, Clone)]
struct Type {
    /// As it is declared.
    sql: String,
    oid: u32,
    typmod: i32,
    ndims: i32,
    /// Below all domains.
    base: u32,
    /// Of an array, else 0.
    element: u32,
}

/// Of a source database, one empty table for each type.
struct Types {
    all: Vec<Type>,
    catalog: TypeCatalog,
    /// Text of values, by base type.
    values: HashMap<u32, Vec<String>>,
    /// Text that may be a value of a type nobody wrote values for.
    pool: Vec<String>,
}

fn table_of(number: usize) -> String {
    format!("public.t{number}")
}

fn literal(text: &str) -> String {
    names::literal(text)
}

fn array_of(texts: impl Iterator<Item = String>) -> String {
    let texts: Vec<String> = texts.map(|text| literal(&text)).collect();
    format!("ARRAY[{}]::text[]", texts.join(", "))
}

impl Types {
    fn make(cluster: &Cluster, db: &Db, session: &Session, seed: u64) -> Self {
        session.execute(every_value::SETTINGS);
        session.execute(every_value::SETUP);
        let kinds: Vec<_> = every_value::kinds()
            .into_iter()
            .filter(|kind| kind.is_there(cluster, session))
            .collect();
        for domain in DOMAINS {
            let _ = session.try_query(domain);
        }
        session.execute(PAIRS_OF);

        let mut spelled: Vec<String> = kinds.iter().map(|kind| kind.sql.to_owned()).collect();
        spelled.extend(VARIANTS.iter().map(|&sql| sql.to_owned()));
        let named = session.query(
            "SELECT format_type(t.oid, NULL) FROM pg_type t
             WHERE t.typisdefined AND (t.typtype IN ('b', 'r', 'm', 'e', 'd')
                   OR t.typtype = 'c' AND t.typnamespace = 'public'::regnamespace)
             ORDER BY t.oid",
        );
        spelled.extend(named.into_iter().flatten().flatten());

        let mut all: Vec<Type> = Vec::new();
        for sql in spelled {
            let name = table_of(all.len());
            let create =
                format!("CREATE TABLE {name} (id serial, c {sql}) WITH (autovacuum_enabled = off)");
            if session.try_query(&create).is_err() {
                continue;
            }
            let declared = described(session, &name, &sql);
            let is_known = all.iter().any(|known| {
                (known.oid, known.typmod, known.ndims)
                    == (declared.oid, declared.typmod, declared.ndims)
            });
            match is_known {
                true => session.execute(&format!("DROP TABLE {name}")),
                false => all.push(declared),
            }
        }

        let mut values: HashMap<u32, Vec<String>> = HashMap::new();
        let mut pool = Vec::new();
        for (number, kind) in kinds.iter().enumerate() {
            let mut rng = StdRng::seed_from_u64(seed.wrapping_add(number as u64));
            let edges = kind.edges.iter().map(|&edge| edge.to_owned());
            pool.extend(edges.clone());
            let Some(of) = all.iter().find(|known| known.sql == kind.sql) else { continue };
            let texts = values.entry(of.base).or_default();
            texts.extend(edges.chain((0..ROWS).filter_map(|_| kind.value(&mut rng))));
        }
        let oids: Vec<u32> = all.iter().map(|known| known.oid).collect();
        let catalog = catalog_of(db, &oids);
        Self { all, catalog, values, pool }
    }

    /// Candidates, of which the type's input function takes what it can.
    fn candidates(&self, of: &Type) -> Vec<String> {
        let of_elements = || {
            let items = self.values.get(&of.element).unwrap_or(&self.pool);
            let lists = items.chunks(2).map(|items| {
                let items: Vec<String> = items.iter().map(|item| quoted(item)).collect();
                format!("{{{}}}", items.join(","))
            });
            let one_by_one = items.iter().take(200).map(|item| format!("{{{}}}", quoted(item)));
            let odd = ["{}", "{NULL}", "{{\"1\",\"2\"},{\"3\",NULL}}", "[0:0]={\"1\"}"]
                .map(str::to_owned);
            odd.into_iter().chain(lists).chain(one_by_one).collect::<Vec<_>>()
        };
        match self.values.get(&of.base) {
            Some(texts) => {
                // Types of one name in several lengths share values; some of each kind of them.
                let step = (texts.len() / (ROWS + ROWS / 2)).max(1);
                let edges = texts.iter().take(40);
                edges.chain(texts.iter().step_by(step)).cloned().collect()
            }
            None if of.element != 0 => of_elements(),
            None => self.pool.clone(),
        }
    }

    /// Fills the type's table. Values are repeated, until there are enough.
    fn fill(&self, session: &Session, number: usize) {
        let (name, of) = (table_of(number), &self.all[number]);
        let candidates = array_of(self.candidates(of).into_iter());
        session
            .execute(&format!("SELECT public.fill('{name}', {}, {candidates})", literal(&of.sql)));
        session.execute(&format!(
            "INSERT INTO {name} (c) SELECT NULL FROM generate_series(1, 20);
             INSERT INTO {name} (c) SELECT c FROM {name}, generate_series(0, {ROWS} / (SELECT \
             count(*) FROM {name})) again
             LIMIT greatest(0, {ROWS} - (SELECT count(*) FROM {name}))"
        ));
    }
}

fn described(session: &Session, table: &str, sql: &str) -> Type {
    let found = session.query(&format!(
        "WITH RECURSIVE down(oid) AS (SELECT atttypid FROM pg_attribute WHERE attrelid = \
         '{table}'::regclass AND attname = 'c'
           UNION SELECT t.typbasetype FROM down JOIN pg_type t ON t.oid = down.oid WHERE t.typtype \
           = 'd')
         SELECT a.atttypid, a.atttypmod, a.attndims, t.oid,
                CASE WHEN t.typsubscript = 'array_subscript_handler'::regproc THEN t.typelem ELSE \
                0 END
         FROM pg_attribute a, down JOIN pg_type t ON t.oid = down.oid AND t.typtype <> 'd'
         WHERE a.attrelid = '{table}'::regclass AND a.attname = 'c'"
    ));
    let cell = |at: usize| found[0][at].clone().unwrap();
    Type {
        sql: sql.to_owned(),
        oid: cell(0).parse().unwrap(),
        typmod: cell(1).parse().unwrap(),
        ndims: cell(2).parse().unwrap(),
        base: cell(3).parse().unwrap(),
        element: cell(4).parse().unwrap(),
    }
}

/// As rhei reads it.
fn catalog_of(db: &Db, oids: &[u32]) -> TypeCatalog {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let source = SourceOptions::parse(&db.url(), &Environment::default()).unwrap();
        let client = connect_sql(&source, "test").await.unwrap();
        catalog::types(&client, oids).await.unwrap()
    })
}

type Texts = Vec<Option<String>>;

/// What the server prints, as it does for rhei.
const PRINTED: &str =
    "SELECT CASE WHEN c IS NOT DISTINCT FROM NULL THEN NULL ELSE format('%s', c) END FROM";

fn printed(session: &Session, table: &str) -> Texts {
    let rows = session.query(&format!(
        "BEGIN; SET LOCAL search_path = pg_catalog; SET LOCAL TimeZone = 'UTC'; {PRINTED} {table} \
         ORDER BY id; COMMIT"
    ));
    rows.into_iter().map(|mut row| row.remove(0)).collect()
}

/// What the server prints once the column has another type, and whether the table is in another
/// file by then.
fn printed_after(session: &Session, table: &str, sql: &str) -> (bool, Texts) {
    let mut rows = session.query(&format!(
        "BEGIN; SELECT pg_relation_filenode('{table}'); ALTER TABLE {table} ALTER c TYPE {sql};
         SELECT pg_relation_filenode('{table}'); SET LOCAL search_path = pg_catalog; SET LOCAL \
         TimeZone = 'UTC';
         {PRINTED} {table} ORDER BY id; ROLLBACK"
    ));
    let texts = rows.split_off(2).into_iter().map(|mut row| row.remove(0)).collect();
    (rows[0] != rows[1], texts)
}

/// A column as rhei decodes it from the server's text, and which values it has room for; the others
/// are NULL.
fn decoded(mapping: &Mapping, texts: &Texts) -> (ArrayRef, Vec<bool>) {
    let mut builder = ColumnBuilder::new(mapping, texts.len());
    let mut has_room = Vec::with_capacity(texts.len());
    for text in texts {
        let pushed = builder.push_text(text.as_deref().map(str::as_bytes));
        has_room.push(pushed.is_ok());
        if let Err(error) = pushed {
            assert!(error.is_unrepresentable(), "{text:?} as {}: {error}", mapping.target_type);
        }
    }
    (builder.finish(), has_room)
}

/// A database as rhei has it open, in a session whose settings must not matter.
fn open_copy() -> duckdb::Connection {
    let copy = duckdb::Connection::open_in_memory().unwrap();
    let attach = format!("ATTACH ':memory:' AS {}", names::CATALOG);
    copy.execute_batch(&format!("SET GLOBAL TimeZone = 'America/New_York'; {attach}")).unwrap();
    copy.execute_batch(&format!("CREATE SCHEMA {}.public", names::CATALOG)).unwrap();
    copy
}

/// A table with one column `c` of this type, and the rows in it for which `is_wanted`.
fn put(
    copy: &duckdb::Connection,
    name: &str,
    mapping: &Mapping,
    array: &ArrayRef,
    is_wanted: &[bool],
) {
    let table = names::table(&QualifiedName::new("public", name));
    let ids: Int32Array = (0..array.len() as i32).collect();
    let fields = vec![Field::new("id", DataType::Int32, false), mapping.field("c")];
    let rows =
        RecordBatch::try_new(Arc::new(Schema::new(fields)), vec![Arc::new(ids), Arc::clone(array)])
            .unwrap();
    copy.execute_batch(&format!(
        "CREATE OR REPLACE TEMP TABLE stage (id INTEGER, c {})",
        mapping.stage_type()
    ))
    .unwrap();
    let mut appender = copy.appender_to_catalog_and_db("stage", "temp", "main").unwrap();
    appender.append_record_batch(rows).unwrap();
    drop(appender);
    let left_out = is_wanted.iter().enumerate().filter(|(_, is_wanted)| !**is_wanted);
    let left_out: Vec<String> = left_out.map(|(id, _)| id.to_string()).collect();
    let wanted = if left_out.is_empty() {
        "true".to_owned()
    } else {
        format!("id NOT IN ({})", left_out.join(", "))
    };
    copy.execute_batch(&format!(
        "CREATE OR REPLACE TABLE {table} (id INTEGER, c {}); INSERT INTO {table} SELECT id, {} \
         FROM stage s WHERE {wanted}",
        mapping.target_type,
        mapping.stage_expr("s.c")
    ))
    .unwrap();
}

fn spec(declared: &Type, mapping: &Mapping) -> Arc<TableSpec> {
    let name = QualifiedName::new("public", "altered");
    let column = ColumnSpec {
        name: "c".to_owned(),
        attnum: 1,
        type_oid: declared.oid,
        typmod: declared.typmod,
        not_null: false,
        target_name: "c".to_owned(),
        mapping: mapping.clone(),
    };
    Arc::new(TableSpec {
        oid: 1,
        source: name.clone(),
        target: name,
        epoch: 0,
        replica_identity: ReplicaIdentity::Full,
        key: Key::WholeRow,
        columns: vec![column],
        excluded: Vec::new(),
        fingerprint: String::new(),
        null_unrepresentable: false,
        copy_lsn: Lsn(1),
        copy_xids: None,
    })
}

/// A change of type, with what the server printed before and after it.
struct Change<'a> {
    before: &'a Type,
    after: &'a Type,
    old: &'a Texts,
    new: &'a Texts,
}

impl Change<'_> {
    /// What is wrong with the decision that this goes through in place.
    fn check(
        &self,
        copy: &duckdb::Connection,
        (from, to): (&Mapping, &Mapping),
        found: InPlace,
        has_nulled: bool,
    ) -> Option<String> {
        // The source prints rows of the old type as those of the new one; or not, and then says so.
        let is_printed_alike = self.old == self.new;
        if from == to && is_printed_alike {
            return None;
        }
        let (stored, has_room) = decoded(from, self.old);
        // A value without room stops its table, unless it becomes NULL.
        let wanted: Vec<bool> = has_room.iter().map(|has_room| has_nulled || *has_room).collect();
        put(copy, "altered", from, &stored, &wanted);
        let (copied, still_has_room) = decoded(to, self.new);
        if let Some(at) =
            (0..wanted.len()).find(|&at| wanted[at] && !has_nulled && !still_has_room[at])
        {
            return Some(format!("{:?} has no room any more as {:?}", self.old[at], self.new[at]));
        }
        put(copy, "copied", to, &copied, &wanted);
        let reshape = SchemaChange {
            before: spec(self.before, from),
            after: spec(self.after, to),
            columns: vec![ColumnOrigin::Kept(0)],
        };
        for statement in rhei::internals::olap::reshape::alter_statements(&reshape, false, |_| None)
        {
            if let Err(error) = copy.execute_batch(&statement) {
                return Some(format!("{error}\nin {statement}"));
            }
        }
        let mut difference = differing(copy, "altered", "copied");
        if difference.is_none() && found != InPlace::Reprinted && !is_printed_alike {
            // Rows that an open transaction changed before are read as rows of the new type.
            let mut builder = ColumnBuilder::new(to, self.old.len());
            let is_read = self.old.iter().zip(&wanted).all(|(text, wanted)| {
                !*wanted || builder.push_text(text.as_deref().map(str::as_bytes)).is_ok()
            });
            let early = decoded(to, self.old).0;
            put(copy, "early", to, &early, &wanted);
            difference = match is_read {
                true => differing(copy, "early", "copied"),
                false => Some("rows before the change cannot be read as rows after it".to_owned()),
            };
        }
        difference
    }
}

/// The first row in which two tables differ, or their types.
fn differing(copy: &duckdb::Connection, one: &str, other: &str) -> Option<String> {
    let [one, other] = [one, other].map(|name| names::table(&QualifiedName::new("public", name)));
    let sql = format!(
        "SELECT concat_ws(' ', count(*), min(concat_ws(' ', coalesce(a.c::VARCHAR, 'NULL'), 'is \
         not', coalesce(b.c::VARCHAR, 'NULL'))))
         FROM {one} a FULL JOIN {other} b USING (id)
         WHERE a.id IS NULL OR b.id IS NULL OR typeof(a.c) <> typeof(b.c) OR a.c IS DISTINCT FROM \
         b.c
            OR a.c::VARCHAR IS DISTINCT FROM b.c::VARCHAR"
    );
    let found: String = copy.query_row(&sql, [], |row| row.get(0)).unwrap();
    (found != "0").then_some(found)
}

/// Settings of a column that may be the same before and after.
const OVERRIDES: &[Option<&str>] = &[
    None,
    Some("VARCHAR"),
    Some("DOUBLE"),
    Some("DECIMAL(20,4)"),
    Some("DECIMAL(4,2)"),
    Some("TIMETZ"),
    Some("VARIANT"),
    Some("STRUCT"),
    Some("MAP"),
];

/// How many pairs of types a server lets through, and what becomes of them.
#[derive(Debug, Default)]
struct Seen {
    in_place: BTreeMap<(String, String), InPlace>,
    not_proven: BTreeSet<(String, String)>,
    rewritten: usize,
    wrong: Vec<String>,
}

impl Seen {
    /// All pairs with one of `types` before, in a session of this time zone.
    fn play(
        &mut self,
        types: &Types,
        session: &Session,
        zone: &str,
        numbers: impl Iterator<Item = usize>,
    ) {
        session.execute(&format!("SET TimeZone = '{zone}'"));
        let copy = open_copy();
        let targets = array_of(types.all.iter().map(|known| known.sql.clone()));
        for number in numbers {
            let (before, table) = (&types.all[number], table_of(number));
            session.execute(&format!("TRUNCATE {table}"));
            let pairs = session.query(&format!(
                "SELECT target, rewritten FROM public.pairs_of('{table}', {targets})"
            ));
            let is_rewritten = |row: &Vec<Option<String>>| row[1].as_deref() == Some("t");
            self.rewritten += pairs.iter().filter(|row| is_rewritten(row)).count();
            let kept: Vec<&Type> = pairs
                .iter()
                .filter(|row| !is_rewritten(row) && row[0].as_deref() != Some(&before.sql))
                .filter_map(|row| {
                    types.all.iter().find(|known| row[0].as_deref() == Some(&known.sql))
                })
                .collect();
            if kept.is_empty() {
                continue;
            }
            types.fill(session, number);
            let old = printed(session, &table);
            assert!(old.len() >= ROWS, "{}: {} values", before.sql, old.len());
            for after in kept {
                let (is_rewritten, new) = printed_after(session, &table, &after.sql);
                assert!(
                    !is_rewritten,
                    "{} to {}: rewritten only when there are rows",
                    before.sql, after.sql
                );
                self.judge(types, &copy, &Change { before, after, old: &old, new: &new });
            }
        }
    }

    #[track_caller]
    fn say(&self, types: &Types) {
        println!(
            "of {} types: {} pairs in place, {} rewritten by the server and copied, {} copied \
             since that is not proven",
            types.all.len(),
            self.in_place.len(),
            self.rewritten,
            self.not_proven.len()
        );
        assert!(
            self.wrong.is_empty(),
            "{} are wrong:\n{}",
            self.wrong.len(),
            self.wrong.join("\n")
        );
    }

    fn judge(&mut self, types: &Types, copy: &duckdb::Connection, change: &Change<'_>) {
        let pair = (change.before.sql.clone(), change.after.sql.clone());
        for wanted in OVERRIDES {
            let mapped = |of: &Type| {
                let column = ColumnType {
                    type_oid: of.oid,
                    typmod: of.typmod,
                    ndims: of.ndims,
                    override_type: *wanted,
                };
                map_column(&column, &types.catalog).ok()
            };
            let (Some(from), Some(to)) = (mapped(change.before), mapped(change.after)) else {
                continue;
            };
            for has_nulled in [false, true] {
                let was = Typed { type_oid: change.before.oid, mapping: &from };
                let is = Typed { type_oid: change.after.oid, mapping: &to };
                let found = in_place(was, is, &types.catalog, has_nulled);
                if wanted.is_none() && !has_nulled {
                    match found {
                        Some(found) => drop(self.in_place.insert(pair.clone(), found)),
                        None => drop(self.not_proven.insert(pair.clone())),
                    }
                }
                let Some(found) = found else { continue };
                if let Some(difference) = change.check(copy, (&from, &to), found, has_nulled) {
                    self.wrong.push(format!(
                        "{} to {} as {wanted:?}, {found:?}, unrepresentable values as NULL \
                         {has_nulled}: {difference}",
                        pair.0, pair.1
                    ));
                }
            }
        }
    }
}

/// That these go through in place is what the page for operators promises, and must not get lost.
const KNOWN: &[(&str, &str, InPlace)] = &[
    ("varchar(3)", "varchar(9)", InPlace::AsStored),
    ("varchar(3)", "varchar", InPlace::AsStored),
    ("varchar(3)", "text", InPlace::AsStored),
    ("varchar", "text", InPlace::AsStored),
    ("text", "varchar", InPlace::AsStored),
    ("citext", "text", InPlace::AsStored),
    ("text", "citext", InPlace::AsStored),
    ("bit(3)", "varbit", InPlace::AsStored),
    ("varbit(3)", "varbit(9)", InPlace::AsStored),
    ("numeric(5,2)", "numeric(9,2)", InPlace::Converted),
    ("numeric(5,2)", "numeric", InPlace::Converted),
    ("numeric(2,2)", "numeric", InPlace::Converted),
    ("numeric(5,2)", "numeric(39,2)", InPlace::Converted),
    ("timestamp", "timestamptz", InPlace::Reprinted),
    ("timestamptz", "timestamp", InPlace::Reprinted),
    ("timestamp(0)", "timestamp(3)", InPlace::AsStored),
    ("interval(0)", "interval(3)", InPlace::AsStored),
    ("time(0)", "time(3)", InPlace::AsStored),
    ("dom_int", "int4", InPlace::AsStored),
    ("domain_of_free", "free_text", InPlace::AsStored),
    ("dom_text", "text", InPlace::AsStored),
    ("short_varchar", "text", InPlace::AsStored),
    ("text", "free_text", InPlace::AsStored),
    ("dom_mood", "mood", InPlace::AsStored),
    ("dom_list", "int4[]", InPlace::AsStored),
    ("varchar[]", "text[]", InPlace::AsStored),
];

/// What changes with the time zone of the session that alters the table.
const MOMENTS: [u32; 4] = [1114, 1115, 1184, 1185];

#[test]
fn a_type_that_changes_in_place_leaves_what_a_new_copy_would() {
    let seed = from_env("RHEI_TEST_SEED", 20_261_121);
    println!("RHEI_TEST_SEED={seed}");
    let cluster = Cluster::shared();
    let db = cluster.database("type_pairs");
    let session = db.session();
    let types = Types::make(cluster, &db, &session, seed);

    let mut seen = Seen::default();
    seen.play(&types, &session, "UTC", 0..types.all.len());
    seen.say(&types);
    let is_there = |sql: &str| types.all.iter().any(|known| known.sql == sql);
    for (before, after, how) in KNOWN {
        if is_there(before) && is_there(after) {
            let found = seen.in_place.get(&((*before).to_owned(), (*after).to_owned()));
            assert_eq!(found, Some(how), "{before} to {after}");
        }
    }
    assert!(seen.in_place.len() > 300, "{} pairs are in place", seen.in_place.len());
    // Other servers may lack a type.
    if is_there("citext") {
        assert_documented(&documented(&types, &session, &seen.in_place));
    }

    for (zone, is_utc) in [("Europe/Berlin", false), ("America/New_York", false), ("GMT", true)] {
        let mut seen = Seen::default();
        let moments =
            (0..types.all.len()).filter(|&number| MOMENTS.contains(&types.all[number].base));
        seen.play(&types, &session, zone, moments);
        seen.say(&types);
        let pair = |before: &str, after: &str| (before.to_owned(), after.to_owned());
        assert!(seen.in_place.contains_key(&pair("timestamp(3)", "timestamp")), "{zone}");
        assert_eq!(seen.in_place.contains_key(&pair("timestamp", "timestamptz")), is_utc, "{zone}");
    }
}

const DOCS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/schema-changes.md");
const BEGIN: &str = "<!-- generated by tests/it/type_pairs.rs: begin -->\n";
const END: &str = "<!-- generated by tests/it/type_pairs.rs: end -->\n";

#[track_caller]
fn assert_documented(wanted: &str) {
    let page = fs::read_to_string(DOCS).unwrap();
    let (before, rest) = page.split_once(BEGIN).unwrap();
    let (found, after) = rest.split_once(END).unwrap();
    if std::env::var_os("RHEI_BLESS").is_some() {
        fs::write(DOCS, format!("{before}{BEGIN}{wanted}{END}{after}")).unwrap();
        return;
    }
    assert!(
        found == wanted,
        "docs/schema-changes.md differs (RHEI_BLESS=1 writes it anew); wanted is\n{wanted}"
    );
}

/// The decisions as a table: a line for each type that a column may have had, with letters for
/// lengths.
fn documented(
    types: &Types,
    session: &Session,
    in_place: &BTreeMap<(String, String), InPlace>,
) -> String {
    let named: HashMap<&str, (String, bool)> =
        types.all.iter().map(|of| (of.sql.as_str(), named(types, session, of))).collect();
    let name_of = |sql: &String| &named[sql.as_str()];
    let mut pairs: BTreeMap<(String, String), BTreeSet<&str>> = BTreeMap::new();
    let mut below_domains = BTreeSet::new();
    for ((before, after), how) in in_place {
        let ((before, was_domain), (after, is_domain)) = (name_of(before), name_of(after));
        let how = match how {
            InPlace::AsStored => "stays as it is",
            InPlace::Converted => "DuckDB converts it",
            InPlace::Reprinted => {
                "DuckDB converts it, unless rows had changed before in the same transaction"
            }
        };
        let pair = match (was_domain, is_domain) {
            (false, false) if before == after && !before.contains('(') => continue,
            (true, _) if before == after => ("a domain".to_owned(), "the type below it".to_owned()),
            (_, true) if before == after => {
                ("any type".to_owned(), "a domain over it without constraints".to_owned())
            }
            (false, false) => (before.clone(), after.clone()),
            _ => {
                below_domains.insert((before.clone(), after.clone()));
                continue;
            }
        };
        pairs.entry(pair).or_default().insert(how);
    }
    for pair in below_domains {
        assert!(pairs.contains_key(&pair), "{pair:?} only where they are below domains");
    }
    let mut lines: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    for ((before, after), how) in pairs {
        let how: Vec<&str> = how.into_iter().collect();
        lines.entry((before, how.join(", or "))).or_default().push(after);
    }
    let mut table = "| from | to | what happens |\n|---|---|---|\n".to_owned();
    for ((before, how), after) in lines {
        table.push_str(&format!("| {before} | {} | {how} |\n", after.join(", ")));
    }
    table
}

/// A type's short name, with letters for lengths, and whether it is a domain, which has the name of
/// what is below it.
fn named(types: &Types, session: &Session, of: &Type) -> (String, bool) {
    let (mut oid, mut typmod) = (of.oid, of.typmod);
    let mut ndims = of.ndims;
    let mut is_domain = false;
    while let Some(info) = types.catalog.types.get(&oid).filter(|info| info.kind == b'd') {
        (oid, typmod, ndims, is_domain) = (info.base_oid, info.base_typmod, info.base_ndims, true);
    }
    let is_enum = |oid: u32| types.catalog.types.get(&oid).is_some_and(|info| info.kind == b'e');
    let mut name = if is_enum(oid) {
        "an enum".to_owned()
    } else {
        session.value(&format!("SELECT format_type({oid}, {typmod})"))
    };
    for (long, short) in
        [("character varying", "varchar"), ("bit varying", "varbit"), ("character", "char")]
    {
        name = name.replace(long, short);
    }
    for base in ["timestamp", "time"] {
        if name.starts_with(&format!("{base} ")) || name.starts_with(&format!("{base}(")) {
            let zone = if name.contains(" with time zone") { "tz" } else { "" };
            let rest =
                name[base.len()..].replace(" with time zone", "").replace(" without time zone", "");
            name = format!("{base}{zone}{}", rest.trim_start());
        }
    }
    if let (Some(open), Some(close)) = (name.find('('), name.find(')')) {
        let letters = if name[open..close].contains(',') { "(p,s)" } else { "(n)" };
        name.replace_range(open..=close, letters);
    }
    (1..ndims).for_each(|_| name.push_str("[]"));
    (name, is_domain)
}
