//! Values and results in the forms of the protocol, held against PostgreSQL itself: the source
//! answers the same query.

use arrow::{array::Array, ipc::reader::StreamReader, record_batch::RecordBatch};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use tokio_postgres::{Client, Config, NoTls, types::Type};

use super::Served;
use crate::bed::Session;

/// Types that the copy holds as a type of the same name, with values at their edges.
const TYPES: [(&str, &[&str]); 20] = [
    ("boolean", &["true", "false"]),
    ("smallint", &["0", "-32768", "32767"]),
    ("integer", &["0", "-2147483648", "2147483647"]),
    ("bigint", &["0", "-9223372036854775808", "9223372036854775807"]),
    ("oid", &["0", "4294967295"]),
    ("real", &["0", "1.5", "-0.1", "NaN", "Infinity", "-Infinity", "1e-45", "3.4028235e+38"]),
    ("double precision", &["0", "0.1", "1e23", "NaN", "-Infinity", "5e-324", "1e15", "123456"]),
    ("numeric(4,1)", &["0", "-0.5", "999.9"]),
    ("numeric(12,2)", &["0", "0.01", "-12345.60", "9999999999.99", "10000"]),
    ("numeric(38,10)", &["0.0000000001", "-9999999999999999999999999999.9999999999", "1000000"]),
    ("text", &["", "x", "a,b", "\"q\"", "back\\slash", "line\nfeed\ttab", "ünï 𝄞", "\\N", "NULL"]),
    ("bytea", &["", "\\x00ff10", "\\x5c22"]),
    ("date", &["2000-01-01", "0044-03-15 BC", "infinity", "-infinity", "9999-12-31"]),
    (
        "timestamp",
        &["2024-02-29 12:34:56.789", "0001-01-01 BC", "infinity", "1969-12-31 23:59:59.5"],
    ),
    ("timestamptz", &["2024-02-29 12:34:56.000001+00", "-infinity", "1900-01-01 00:00:00+00"]),
    ("time", &["00:00:00", "24:00:00", "12:34:56.5"]),
    ("interval", &["0", "1 mon", "-1 mons +2 days -03:04:05.6", "178000000 years", "30 days"]),
    ("uuid", &["00112233-4455-6677-8899-aabbccddeeff", "ffffffff-ffff-ffff-ffff-ffffffffffff"]),
    ("integer[]", &["{}", "{1,NULL,-3}"]),
    ("text[]", &["{}", "{a,\"b c\",NULL,\"NULL\",\"\",\"q\\\"q\",\"x,y\"}"]),
];

fn served(name: &str) -> Served {
    let mut setup = String::new();
    for (number, (of, values)) in TYPES.iter().enumerate() {
        setup.push_str(&format!("CREATE TABLE t{number} (id int PRIMARY KEY, v {of});"));
        let rows: Vec<String> = (1..)
            .zip(*values)
            .map(|(id, value)| format!("({id}, '{}')", value.replace('\'', "''")))
            .collect();
        setup.push_str(&format!("INSERT INTO t{number} VALUES (0, NULL), {};", rows.join(", ")));
    }
    setup.push_str(
        "CREATE TABLE j (id int PRIMARY KEY, v json); INSERT INTO j VALUES (1, '{\"a\" :1}')",
    );
    Served::new(name, &setup, "")
}

const SETTINGS: &str = "SET DateStyle = 'ISO, MDY'; SET IntervalStyle = 'postgres'; SET TimeZone = \
                        'UTC'; SET bytea_output = 'hex'; SET extra_float_digits = 1";

async fn connect(config: &Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

async fn copied(client: &Client, sql: &str) -> Vec<u8> {
    let stream = client.copy_out(sql).await.unwrap();
    let parts: Vec<Bytes> = stream.try_collect().await.unwrap();
    parts.concat()
}

fn source_config(served: &Served) -> Config {
    served.following.db.url().parse().unwrap()
}

/// The bytes are the same: types and values, and what is around them.
#[test]
fn copy_gives_the_bytes_that_the_source_gives_in_each_format() {
    let served = served("serve_copy");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (copy, source) =
            (connect(&served.config()).await, connect(&source_config(&served)).await);
        source.batch_execute(SETTINGS).await.unwrap();
        for (number, (of, _)) in TYPES.iter().enumerate() {
            for format in
                ["", " (FORMAT csv, HEADER)", " (FORMAT binary)", " (FORMAT csv, DELIMITER ';')"]
            {
                let sql =
                    format!("COPY (SELECT id, v FROM t{number} ORDER BY id) TO STDOUT{format}");
                let (ours, theirs) = (copied(&copy, &sql).await, copied(&source, &sql).await);
                let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                assert_eq!(ours, theirs, "{of}{format}:\n{}\n{}", shown(&ours), shown(&theirs));
            }
        }
        for sql in [
            "COPY (SELECT * FROM j) TO STDOUT",
            "COPY j TO STDOUT WITH CSV HEADER",
            "COPY public.t2 (v, id) TO STDOUT",
            "COPY (SELECT 1 WHERE false) TO STDOUT",
            "COPY (SELECT 1 WHERE false) TO STDOUT (FORMAT binary)",
        ] {
            assert_eq!(copied(&copy, sql).await, copied(&source, sql).await, "{sql}");
        }
    });
    served.stop();
}

#[test]
fn rows_of_simple_queries_are_those_of_the_source() {
    let served = served("serve_text");
    let (copy, source) = (served.session(), served.following.db.session());
    source.execute(SETTINGS);
    for (number, (of, _)) in TYPES.iter().enumerate() {
        let sql = format!("SELECT * FROM t{number} ORDER BY id");
        assert_eq!(copy.query(&sql), source.query(&sql), "{of}");
    }
    served.stop();
}

/// A parameter finds the row that has its value, whether it comes as text or in binary.
#[test]
fn a_parameter_of_each_type_finds_its_value() {
    let served = served("serve_params");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = connect(&served.config()).await;
        for (number, (of, values)) in TYPES.iter().enumerate() {
            // NaN is equal to nothing but itself, which is no matter of the protocol.
            for (id, _) in (1..).zip(*values).filter(|(_, value)| **value != "NaN") {
                let binary = Raw::of(&client, number, id).await;
                let sql = format!("SELECT id FROM t{number} WHERE v = $1");
                let statement =
                    client.prepare_typed(&sql, std::slice::from_ref(&binary.of)).await.unwrap();
                let found = client.query(&statement, &[&binary]).await;
                let found: Vec<i32> = found
                    .unwrap_or_else(|e| panic!("{of} {id}: {e:?}"))
                    .iter()
                    .map(|row| row.get(0))
                    .collect();
                assert!(found.contains(&id), "{of}: row {id} is not among {found:?}");
            }
        }
    });
    served.stop();
}

/// A value as it came, in binary.
#[derive(Debug)]
struct Raw {
    of: Type,
    bytes: Vec<u8>,
}

impl Raw {
    async fn of(client: &Client, table: usize, id: i32) -> Raw {
        let sql = format!("SELECT v FROM t{table} WHERE id = {id}");
        let row = client.query_one(&sql, &[]).await.unwrap();
        let RawBytes(bytes) = row.get(0);
        Raw { of: row.columns()[0].type_().clone(), bytes }
    }
}

struct RawBytes(Vec<u8>);

impl<'a> tokio_postgres::types::FromSql<'a> for RawBytes {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(raw.to_vec()))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

impl tokio_postgres::types::ToSql for Raw {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut bytes::BytesMut,
    ) -> Result<tokio_postgres::types::IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.extend_from_slice(&self.bytes);
        Ok(tokio_postgres::types::IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    tokio_postgres::types::to_sql_checked!();
}

#[test]
fn types_that_only_duckdb_has_come_in_a_form_that_clients_know() {
    let served = Served::new("serve_nested", "CREATE TABLE t (id int PRIMARY KEY)", "");
    let session = served.session();
    for (value, text) in [
        ("{'a': 1, 'b': 'x y', 'c': NULL}", "(1,\"x y\",)"),
        ("[{'a': 1}, NULL]", "{(1),NULL}"),
        ("[[1, 2], [3, 4]]", "{{1,2},{3,4}}"),
        ("[1.5, 2.25]::DECIMAL(4,2)[2]", "{1.50,2.25}"),
        ("map {'k': 1, 'l\"': NULL}", "{\"k\": 1, \"l\\\"\": null}"),
        ("'sad'::ENUM('happy', 'sad')", "sad"),
        ("'10110'::BIT", "10110"),
        ("18446744073709551615::UBIGINT", "18446744073709551615"),
        (
            "(-170141183460469231731687303715884105728)::HUGEINT",
            "-170141183460469231731687303715884105728",
        ),
        (
            "340282366920938463463374607431768211455::UHUGEINT",
            "340282366920938463463374607431768211455",
        ),
        ("TIMETZ '12:00:00.5-03:30'", "12:00:00.5-03:30"),
        ("TIMESTAMP_NS '2024-01-01 00:00:00.123456789'", "2024-01-01 00:00:00.123456"),
        ("TIMESTAMP_S '2024-01-01 00:00:01'", "2024-01-01 00:00:01"),
        ("'{\"a\": 1}'::JSON", "{\"a\": 1}"),
        ("123::BIGNUM", "123"),
        ("union_value(n := 5)", "5"),
    ] {
        assert_eq!(session.value(&format!("SELECT {value}")), text, "{value}");
    }
    served.stop();
}

/// A portal that is read in pieces goes on after other statements of its session.
#[test]
fn open_portals_and_cursors_go_on_after_other_statements() {
    let mut served = Served::new(
        "serve_portals",
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 50000)",
        "",
    );
    let config = served.config();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut client = connect(&config).await;
        let transaction = client.transaction().await.unwrap();
        let sql = "SELECT id, repeat('x', 300) FROM t ORDER BY id";
        let portal = transaction.bind(sql, &[]).await.unwrap();
        let mut seen: Vec<i32> = Vec::new();
        loop {
            let rows = transaction.query_portal(&portal, 7_000).await.unwrap();
            if rows.is_empty() {
                break;
            }
            seen.extend(rows.iter().map(|row| row.get::<_, i32>(0)));
            let count: i64 =
                transaction.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get(0);
            assert_eq!(count, 50_000);
        }
        assert_eq!(seen, (1..=50_000).collect::<Vec<_>>());
        transaction.commit().await.unwrap();
    });

    let session = served.session();
    session.execute("BEGIN; DECLARE c CURSOR FOR SELECT id FROM t ORDER BY id");
    served.following.db.execute("DELETE FROM t WHERE id > 10");
    served.settle();
    let ids = |session: &Session, sql: &str| session.query(sql).len();
    assert_eq!(ids(&session, "FETCH 3 FROM c"), 3);
    assert_eq!(session.value("SELECT count(*) FROM t"), "50000", "the transaction's own view");
    assert_eq!(session.value("FETCH FORWARD 1 FROM c"), "4");
    session.execute("MOVE 5 IN c");
    assert_eq!(session.value("FETCH c"), "10");
    assert_eq!(ids(&session, "FETCH ALL FROM c"), 49_990);
    session.execute("COMMIT");
    assert!(session.try_query("FETCH 1 FROM c").unwrap_err().contains("34000"));
    assert_eq!(session.value("SELECT count(*) FROM t"), "10");
    served.stop();
}

/// Ten million rows would be gigabytes: what a client has not read stays with DuckDB.
#[test]
fn a_large_result_is_never_in_memory_whole() {
    let served = Served::new("serve_large", "CREATE TABLE t (id int PRIMARY KEY)", "");
    let before = resident_mib(served.running.pid());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = connect(&served.config()).await;
        let rows = client
            .query_raw("SELECT i, repeat('x', 100) FROM range(3000000) r(i)", Vec::<String>::new())
            .await
            .unwrap();
        let count = rows.fold(0_u64, |count, row| async move {
            row.unwrap();
            count + 1
        });
        assert_eq!(count.await, 3_000_000);
    });
    let grown = resident_mib(served.running.pid()) - before;
    assert!(grown < 200.0, "{grown} MiB of a result of more than 300");
    served.stop();
}

fn resident_mib(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
}

/// Errors have PostgreSQL's codes, and a transaction that failed takes nothing but its end.
#[test]
fn errors_have_codes_and_end_their_transaction() {
    let served = Served::new("serve_errors", "CREATE TABLE t (id int PRIMARY KEY)", "");
    let session = served.session();
    for (sql, code) in [
        ("SELEC 1", "42601"),
        ("SELECT * FROM nope", "42P01"),
        ("SELECT nope FROM t", "42703"),
        ("SELECT nope(1)", "42501"),
        ("SELECT 'x'::INTEGER", "22000"),
        ("INSERT INTO t VALUES (1)", "25006"),
        ("FETCH 1 FROM nope", "34000"),
        ("COPY t FROM STDIN", "25006"),
    ] {
        let error = session.try_query(sql).unwrap_err();
        assert!(error.contains(code), "{sql}: {error}");
    }

    session.execute("BEGIN");
    assert!(session.try_query("SELECT nope").is_err());
    assert!(session.try_query("SELECT 1").unwrap_err().contains("25P02"));
    session.execute("COMMIT");
    assert_eq!(session.value("SELECT 1"), "1");
    served.stop();
}

/// What PostgreSQL's types cannot carry keeps its own type in Arrow.
#[test]
fn copy_as_arrow_has_the_types_and_values_of_duckdb() {
    let served = Served::new(
        "serve_arrow",
        "CREATE TABLE t (id int PRIMARY KEY, v text, n numeric(12, 3), at timestamptz, u uuid, l \
         int[]); INSERT INTO t SELECT i, 'v' || i, i / 8.0, timestamptz 'epoch' + i * interval '1 \
         us', md5(i::text)::uuid, ARRAY[i, NULL] FROM generate_series(1, 5000) i; INSERT INTO t \
         (id) VALUES (0)",
        "",
    );
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let copied = |sql: &str| {
        let bytes: Vec<u8> = runtime.block_on(async {
            let (client, connection) =
                served.config().connect(tokio_postgres::NoTls).await.unwrap();
            tokio::spawn(connection);
            let copy = format!("COPY ({sql}) TO STDOUT (FORMAT arrow)");
            let data = client.copy_out(&copy).await.unwrap();
            data.try_fold(Vec::new(), |mut all, more| async move {
                all.extend_from_slice(&more);
                Ok(all)
            })
            .await
            .unwrap()
        });
        let reader = StreamReader::try_new(std::io::Cursor::new(bytes), None).unwrap();
        let schema = reader.schema();
        let batches: Vec<RecordBatch> = reader.map(Result::unwrap).collect();
        arrow::compute::concat_batches(&schema, &batches).unwrap()
    };

    let sql =
        "SELECT *, id::HUGEINT AS h, {'a': id} AS s, INTERVAL '1 day' AS i FROM t ORDER BY id";
    let batch = copied(sql);
    assert_eq!(batch.num_rows(), 5001);
    let types: Vec<String> =
        batch.schema().fields().iter().map(|field| field.data_type().to_string()).collect();
    assert_eq!(
        types[..5],
        ["Int32", "Utf8", "Decimal128(12, 3)", "Timestamp(µs, \"UTC\")", "FixedSizeBinary(16)"]
    );
    assert_eq!(batch.column(1).null_count(), 1);
    assert_eq!(arrow::util::display::array_value_to_string(batch.column(2), 8).unwrap(), "1.000");
    assert_eq!(copied("SELECT * FROM t WHERE false").num_rows(), 0);
    served.stop();
}
