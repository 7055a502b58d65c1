//! Every built-in type: what the first copy brings and what the stream brings are the same, and
//! equal to the source.

use crate::{
    bed::{lake::Kind, oracle::query_copy},
    following::Following,
};

/// Column type, and values as SQL. Edge values of each type: the least, the greatest, the odd.
const TYPES: &[(&str, &[&str])] = &[
    ("bool", &["true", "false"]),
    ("int2", &["-32768", "32767"]),
    ("int4", &["-2147483648", "2147483647"]),
    ("int8", &["-9223372036854775808", "9223372036854775807"]),
    ("oid", &["0", "4294967295"]),
    ("xid8", &["'18446744073709551615'"]),
    ("float4", &["'NaN'", "'Infinity'", "'-Infinity'", "'-0'", "1e-45", "0.1"]),
    (
        "float8",
        &["'NaN'", "'Infinity'", "'-Infinity'", "'-0'", "5e-324", "0.1::float8 + 0.2", "1e308"],
    ),
    ("numeric(10,2)", &["0", "-12345678.91", "99999999.99", "0.01"]),
    ("numeric(38,10)", &["-9999999999999999999999999999.9999999999", "1"]),
    ("numeric(4,0)", &["9999"]),
    ("numeric", &["'NaN'", "1.500", "1e100", "-0.000000000000000000000000000000000000000001"]),
    ("money", &["-1234.56", "'92233720368547758.07'"]),
    ("text", &["''", "'ä€𝄞'", "E'tab\\tnewline\\nquote\\'back\\\\slash'", "repeat('x', 10000)"]),
    ("varchar(10)", &["'abc  '"]),
    ("char(5)", &["'ab'"]),
    ("name", &["'a name'"]),
    ("\"char\"", &["'x'"]),
    ("bytea", &["''", "'\\x00ff80'"]),
    (
        "date",
        &[
            "'0001-01-01'",
            "'4713-01-01 BC'",
            "'infinity'",
            "'-infinity'",
            "'9999-12-31'",
            "'10000-01-01'",
        ],
    ),
    ("time", &["'00:00:00'", "'24:00:00'", "'23:59:59.999999'"]),
    ("timetz", &["'23:59:59.5+15:59:59'", "'00:00:00-03'"]),
    (
        "timestamp",
        &[
            "'1970-01-01 00:00:00.000001'",
            "'0044-03-15 12:00:00 BC'",
            "'infinity'",
            "'-infinity'",
            "'20000-01-01'",
        ],
    ),
    (
        "timestamptz",
        &["'2024-06-01 12:00:00.5+02'", "'0001-01-01 00:00:00+00 BC'", "'infinity'", "'-infinity'"],
    ),
    (
        "interval",
        &[
            "'1 mon -2 days +03:04:05.6'",
            "'0'",
            "'-178000000 years'",
            "'-00:00:00.000001'",
            "'1 year 2 mons'",
        ],
    ),
    ("uuid", &["'00000000-0000-0000-0000-000000000000'", "'ffffffff-ffff-ffff-ffff-ffffffffffff'"]),
    ("oidvector", &["'1 2 3'"]),
    ("json", &["'\"\\ud800\"'", "'{\"a\": 1, \"a\":  2}'", "'\"\\u0000\"'", "'1e400'", "'null'"]),
    ("jsonb", &["'{\"b\": [1, null], \"a\": \"ü\"}'", "'1.50'", "'\"\"'"]),
    ("xml", &["'<a>b</a>'"]),
    ("bit(3)", &["B'101'"]),
    ("varbit", &["B''", "B'1'"]),
    ("inet", &["'10.0.0.1'", "'10.0.0.0/8'", "'::1'"]),
    ("cidr", &["'10.0.0.0/8'"]),
    ("macaddr", &["'08:00:2b:01:02:03'"]),
    ("point", &["'(1,2.5)'"]),
    ("box", &["'((1,2),(3,4))'"]),
    ("tsvector", &["'a:1 fat:2 cat:3'"]),
    ("int4range", &["'[1,5]'", "'empty'", "'(,3)'"]),
    ("pg_lsn", &["'16/B374D848'"]),
    ("int4[]", &["'{}'", "'{1,NULL,-3}'"]),
    ("text[]", &["'{\"NULL\",NULL,\"a,b\",\"q\\\"q\",\"\"}'"]),
    ("numeric(6,2)[]", &["'{1.50,NULL}'"]),
    ("timestamptz[]", &["'{\"2024-01-01 00:00:00+00\",infinity}'"]),
    ("interval[]", &["'{\"1 day\",NULL,\"-1 mon\"}'"]),
    ("int4[][]", &["'{{1,2},{3,4}}'", "'{}'"]),
];

/// Traps 22, 73, 77. The role's own settings must not shape the text.
#[test]
fn the_copy_and_the_stream_bring_the_same_value_of_every_type() {
    let following = Following::new("values");
    let (mut schema, mut rows, mut tables) = (String::new(), String::new(), Vec::new());
    for (number, (kind, values)) in TYPES.iter().enumerate() {
        schema.push_str(&format!("CREATE TABLE v{number} (id serial PRIMARY KEY, v {kind});\n"));
        for value in *values {
            rows.push_str(&format!("INSERT INTO v{number} (v) VALUES (({value})::{kind});\n"));
        }
        rows.push_str(&format!("INSERT INTO v{number} (v) VALUES (NULL);\n"));
        tables.push(format!("public.v{number}"));
    }
    let tables: Vec<&str> = tables.iter().map(String::as_str).collect();
    let db = following.db.name().to_owned();
    following.db.execute(&format!(
        "ALTER DATABASE \"{db}\" SET datestyle = 'German, DMY'; ALTER DATABASE \"{db}\" SET \
         timezone = 'Asia/Kolkata';
         ALTER DATABASE \"{db}\" SET extra_float_digits = -3; ALTER DATABASE \"{db}\" SET \
         bytea_output = 'escape';
         ALTER DATABASE \"{db}\" SET intervalstyle = 'iso_8601'"
    ));
    following.db.execute(&format!("SET datestyle = ISO; SET timezone = UTC; {schema} {rows}"));
    following.sync();
    following.assert_same(&tables);
    following.db.execute(&format!("SET datestyle = ISO; SET timezone = UTC; {rows}"));
    following.sync();
    following.assert_same(&tables);
    for (number, (kind, values)) in TYPES.iter().enumerate() {
        let copied = values.len() + 1;
        let differ = query_copy(
            following.copy(),
            &format!(
                "SELECT count(*)::VARCHAR FROM public.v{number} a JOIN public.v{number} b ON b.id \
                 = a.id + {copied} \
                 WHERE a.v IS DISTINCT FROM b.v"
            ),
        );
        assert_eq!(differ, [[Some("0".to_owned())]], "{kind}: copy and stream differ");
    }
}

/// NaN fits numeric(5,2) in PostgreSQL and no DECIMAL: that table is paused by name, the others go
/// on.
#[test]
fn a_value_that_cannot_be_kept_pauses_its_table_and_no_other() {
    let following = Following::new("not_representable");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n numeric(5,2)); CREATE TABLE other (id int \
                  PRIMARY KEY)",
    );
    following.sync();
    following.db.execute("INSERT INTO t VALUES (1, 1.5), (7, 'NaN'); INSERT INTO other VALUES (1)");
    let output = following.rhei.run(["sync"]);
    output.assert_code(1);
    for word in ["public.t", "\"n\"", "id=7", "NaN", "VARCHAR"] {
        assert!(output.stderr.contains(word), "expected {word:?} in:\n{}", output.stderr);
    }
    following.assert_same(&["public.other"]);
}

/// The page for operators says what each type becomes.
#[test]
fn each_type_becomes_what_the_documentation_says() {
    let page: &'static str = include_str!("../../docs/types.md");
    let lines_of = |text: &'static str| {
        text.lines()
            .filter_map(|line| line.strip_prefix("| `")?.split_once("` | "))
            .map(|(kind, rest)| (kind, rest.split(" |").next().unwrap()))
    };
    let (page, in_lake) = page.split_once("## In a lake").unwrap();
    let mut lines: Vec<(&str, &str)> = lines_of(page).collect();
    assert!(lines.len() > 50, "{} lines were found", lines.len());
    if Kind::of_all_tests().is_some() {
        for (kind, becomes) in lines_of(in_lake) {
            lines.iter_mut().find(|line| line.0 == kind).unwrap().1 = becomes;
        }
    }
    let following = Following::new("documented_types");
    following.db.execute(
        "CREATE TYPE an_enum AS ENUM ('a'); CREATE DOMAIN a_domain AS int CHECK (VALUE > 0); \
         CREATE TYPE a_composite AS (a int, b text)",
    );
    let columns: Vec<String> =
        lines.iter().enumerate().map(|(at, (kind, _))| format!("c{at} {kind}")).collect();
    following.db.execute(&format!(
        "CREATE TABLE t (id int PRIMARY KEY, {}); INSERT INTO t VALUES (1)",
        columns.join(", ")
    ));
    following.sync();
    following.assert_same(&["public.t"]);
    let found = query_copy(
        following.copy(),
        "SELECT data_type FROM duckdb_columns() WHERE schema_name = 'public' AND column_name LIKE \
         'c%' ORDER BY column_index",
    );
    let found: Vec<&str> = found.iter().map(|row| row[0].as_deref().unwrap()).collect();
    let documented: Vec<&str> = lines.iter().map(|(_, kind)| *kind).collect();
    assert_eq!(found, documented);
}
