//! Random values of every type, edge values weighted: what COPY and the stream bring is the source,
//! cell by cell.
//!
//! RHEI_TEST_VALUES rows per type (10,000 unless told); RHEI_TEST_SEED replays a run. Each table
//! has a generator of its own, seeded by its number, so a type's values do not depend on the types
//! before it.

use std::{
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    ops::Range,
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{
    bed::{Cluster, Session, oracle::query_copy},
    following::Following,
};

/// Types that the tables use. Domains and composites as they nest in practice.
pub const SETUP: &str = "
    CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy', 'it''s', 'a, \"b\"', 'ünï', '');
    CREATE DOMAIN dom_int AS int4 CHECK (value >= -1000000000);
    CREATE DOMAIN dom_of_dom AS dom_int CHECK (value <= 1000000000);
    CREATE DOMAIN dom_text AS text CHECK (value <> 'forbidden');
    CREATE DOMAIN dom_numeric AS numeric(8,3);
    CREATE DOMAIN dom_mood AS mood;
    CREATE DOMAIN dom_list AS int4[];
    CREATE TYPE inner_pair AS (n int4, t text);
    CREATE TYPE outer_row AS (a int4, b text, c inner_pair, d numeric(10,2));";

pub const SETTINGS: &str =
    "SET datestyle = 'ISO, YMD'; SET timezone = 'UTC'; SET intervalstyle = 'postgres'";

/// Added to ids when values move, far above those that count the rows.
const COPIED_ID: u32 = 500_000_000;
const MOVED_ID: u32 = 1_000_000_000;

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What a server must have for a type.
#[derive(Debug, Clone, Copy)]
pub enum Needs {
    Nothing,
    Major(u32),
    Extension(&'static str),
    Libxml,
}

/// A type, and how its values are made: in the text form that its input function reads.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub sql: &'static str,
    needs: Needs,
    pub edges: &'static [&'static str],
    random: fn(&mut StdRng) -> String,
}

fn kind(
    sql: &'static str,
    edges: &'static [&'static str],
    random: fn(&mut StdRng) -> String,
) -> Kind {
    Kind { sql, needs: Needs::Nothing, edges, random }
}

impl Kind {
    fn needs(mut self, needs: Needs) -> Kind {
        self.needs = needs;
        self
    }

    /// Whether this server has the type. Its extension is installed by that.
    pub fn is_there(&self, cluster: &Cluster, session: &Session) -> bool {
        match self.needs {
            Needs::Nothing => true,
            Needs::Major(major) => cluster.major() >= major,
            Needs::Extension(name) => {
                session.try_query(&format!("CREATE EXTENSION {name}")).is_ok()
            }
            Needs::Libxml => session.try_query("SELECT '<a/>'::xml").is_ok(),
        }
    }

    pub fn value(&self, r: &mut StdRng) -> Option<String> {
        match r.random_range(0..100) {
            0..5 => None,
            5..25 if !self.edges.is_empty() => Some(pick(r, self.edges).to_owned()),
            _ => Some((self.random)(r)),
        }
    }

    /// As an SQL expression of the type.
    fn literal(&self, r: &mut StdRng) -> String {
        match self.value(r) {
            Some(text) => format!("'{}'::{}", text.replace('\'', "''"), self.sql),
            None => format!("NULL::{}", self.sql),
        }
    }
}

/// A type's table while the test writes to it.
struct Table<'a> {
    session: &'a Session,
    name: String,
    kind: Kind,
    rng: StdRng,
}

impl Table<'_> {
    fn create(&self) {
        self.session.execute(&format!(
            "CREATE TABLE {} (id int4 PRIMARY KEY, v {})",
            self.name, self.kind.sql
        ));
    }

    /// By COPY, from a file in the server's folder.
    fn copy_in(&mut self, cluster: &Cluster, ids: Range<u64>) {
        let mut lines = String::new();
        for id in ids {
            let value = match self.kind.value(&mut self.rng) {
                Some(text) => copy_escaped(&text),
                None => "\\N".to_owned(),
            };
            lines.push_str(&format!("{id}\t{value}\n"));
        }
        let file = format!("every_value_{}_{}.copy", std::process::id(), self.name);
        cluster.write_data_file(&file, &lines);
        let path = cluster.data().join(&file);
        self.session.execute(&format!("COPY {} FROM '{}'", self.name, path.display()));
        fs::remove_file(path).unwrap();
    }

    fn insert(&mut self, ids: Range<u64>) {
        let ids: Vec<u64> = ids.collect();
        for batch in ids.chunks(1000) {
            let rows = self.rows(batch);
            self.session.execute(&format!("INSERT INTO {} VALUES {rows}", self.name));
        }
    }

    /// Gives about one row in five of `ids` a new value.
    fn update(&mut self, ids: Range<u64>) {
        let ids: Vec<u64> = ids.filter(|_| self.rng.random_bool(0.2)).collect();
        for batch in ids.chunks(1000) {
            let (rows, name) = (self.rows(batch), &self.name);
            self.session.execute(&format!(
                "UPDATE {name} t SET v = n.v FROM (VALUES {rows}) n(id, v) WHERE t.id = n.id"
            ));
        }
    }

    /// Changes in which the values come from the table: wide ones that an UPDATE leaves alone are
    /// not in the stream.
    fn shuffle(&self) {
        let name = &self.name;
        self.session.execute(&format!(
            "INSERT INTO {name} SELECT id + {COPIED_ID}, v FROM {name} WHERE id % 20 = 3; \
             UPDATE {name} SET v = v WHERE id % 25 = 8; \
             UPDATE {name} SET id = id + {MOVED_ID} WHERE id % 25 = 7; \
             DELETE FROM {name} WHERE id % 20 = 11"
        ));
    }

    fn rows(&mut self, ids: &[u64]) -> String {
        let rows: Vec<String> =
            ids.iter().map(|id| format!("({id},{})", self.kind.literal(&mut self.rng))).collect();
        rows.join(",")
    }
}

fn copy_escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\t', "\\t").replace('\n', "\\n").replace('\r', "\\r")
}

/// Type names hold what identifiers may not.
fn table_name(number: usize, sql: &str) -> String {
    let plain: String =
        sql.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    format!("v_{number}_{plain}")
}

#[test]
fn random_values_of_every_type_arrive_unchanged_by_copy_and_by_stream() {
    let count = from_env("RHEI_TEST_VALUES", 10_000);
    let seed = from_env("RHEI_TEST_SEED", 20_261_120);
    println!("RHEI_TEST_VALUES={count} RHEI_TEST_SEED={seed}");
    let cluster = Cluster::shared();
    let mut following = Following::new("every_value");
    following.rhei = following.rhei.deadline(Duration::from_secs(120 + count / 20));
    let session = following.db.session();
    session.execute(SETTINGS);
    session.execute(SETUP);

    let mut tables = Vec::new();
    for (number, kind) in kinds().into_iter().enumerate() {
        if kind.is_there(cluster, &session) {
            let rng = StdRng::seed_from_u64(seed.wrapping_add(number as u64));
            tables.push(Table { session: &session, name: table_name(number, kind.sql), kind, rng });
        }
    }
    let names: Vec<String> = tables.iter().map(|table| format!("public.{}", table.name)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();

    let (half, three_quarters) = (count / 2, count / 4 * 3);
    for table in &mut tables {
        table.create();
        table.copy_in(cluster, 0..half);
    }
    following.sync();
    following.assert_same(&names);

    for table in &mut tables {
        table.insert(half..three_quarters);
        table.copy_in(cluster, three_quarters..count);
        table.update(0..count);
        table.shuffle();
    }
    following.sync();
    following.assert_same(&names);
}

/// A value that PostgreSQL allows in the type and the copy's type has no place for.
struct Unrepresentable {
    sql: &'static str,
    good: &'static str,
    /// `good` as the copy prints it.
    shown: &'static str,
    bad: &'static str,
    since: u32,
}

const UNREPRESENTABLE: &[Unrepresentable] = &[
    Unrepresentable {
        sql: "int4[]",
        good: "{5,6}",
        shown: "[5, 6]",
        bad: "{{1,2},{3,4}}",
        since: 0,
    },
    Unrepresentable { sql: "numeric(5,2)", good: "1.50", shown: "1.50", bad: "NaN", since: 0 },
    Unrepresentable {
        sql: "timestamp",
        good: "2024-01-02 03:04:05",
        shown: "2024-01-02 03:04:05",
        bad: "294276-12-31",
        since: 0,
    },
    Unrepresentable {
        sql: "interval",
        good: "3 days",
        shown: "3 days",
        bad: "infinity",
        since: 17,
    },
];

fn unrepresentable() -> impl Iterator<Item = &'static Unrepresentable> {
    UNREPRESENTABLE.iter().filter(|case| Cluster::shared().major() >= case.since)
}

#[test]
fn a_value_that_a_column_type_cannot_hold_names_the_row_and_the_way_out() {
    for Unrepresentable { sql, good, bad, .. } in unrepresentable() {
        let following = Following::new("cannot_hold");
        following.db.execute(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, held {sql}); CREATE TABLE other (id int PRIMARY \
             KEY, held {sql})"
        ));
        following.sync();
        following.db.execute(&format!(
            "INSERT INTO t VALUES (1, '{good}'), (7, '{bad}'), (8, '{good}'); INSERT INTO other \
             VALUES (1, '{good}')"
        ));
        let output = following.rhei.run(["sync"]);
        output.assert_code(1);
        for word in ["public.t", "\"held\"", "id=7", "VARCHAR"] {
            assert!(
                output.stderr.contains(word),
                "{bad} in {sql}: expected {word:?} in:\n{}",
                output.stderr
            );
        }
        following.assert_same(&["public.other"]);
    }
}

#[test]
fn with_on_unrepresentable_null_the_value_becomes_null_and_is_counted() {
    for Unrepresentable { sql, good, shown, bad, .. } in unrepresentable() {
        let mut following = Following::new("null_instead");
        let settings = format!(
            "[source]\nslot = \"{}\"\n[sync]\ninterval = \"50ms\"\non_unrepresentable = \"null\"\n",
            following.slot()
        );
        following.rhei = following.rhei.config(&settings);
        let good_row = |id: u32| vec![Some(id.to_string()), Some((*shown).to_owned())];
        let null_row = |id: u32| vec![Some(id.to_string()), None];
        let mut expected = Vec::new();
        following.db.execute(&format!("CREATE TABLE t (id int PRIMARY KEY, held {sql})"));
        // The first copy, then the stream.
        for first in [1, 5] {
            following.db.execute(&format!(
                "INSERT INTO t VALUES ({first}, '{good}'), ({}, '{bad}'), ({}, '{bad}'), ({}, \
                 '{good}')",
                first + 1,
                first + 2,
                first + 3
            ));
            let output = following.sync();
            let is_warning = |line: &str| {
                let mut words = line.split(|c: char| !c.is_ascii_alphanumeric());
                line.contains("public.t")
                    && line.contains("\"held\"")
                    && words.any(|word| word == "2")
            };
            assert!(
                output.stderr.lines().any(is_warning),
                "{bad} in {sql}: expected one line with public.t, \"held\" and 2 in:\n{}",
                output.stderr
            );
            expected.extend([
                good_row(first),
                null_row(first + 1),
                null_row(first + 2),
                good_row(first + 3),
            ]);
            let found = query_copy(
                following.copy(),
                "SELECT id::VARCHAR, held::VARCHAR FROM public.t ORDER BY t.id",
            );
            assert_eq!(found, expected, "{bad} in {sql}");
        }
    }
}

pub fn kinds() -> Vec<Kind> {
    let mut kinds = numbers();
    kinds.extend(texts());
    kinds.extend(moments());
    kinds.extend(documents());
    kinds.extend(networks_and_shapes());
    kinds.extend(ranges());
    kinds.extend(of_the_system());
    kinds.extend(made_by_users());
    kinds.extend(arrays());
    kinds
}

fn numbers() -> Vec<Kind> {
    vec![
        kind("bool", &["true", "false"], |r| r.random_bool(0.5).to_string()),
        kind("int2", &["-32768", "32767", "0", "-1"], |r| whole(r, 16).to_string()),
        kind("int4", &["-2147483648", "2147483647", "0", "-1"], int4),
        kind("int8", &["-9223372036854775808", "9223372036854775807", "0", "-1"], int8),
        kind(
            "float4",
            &["NaN", "Infinity", "-Infinity", "-0", "1e-45", "3.4028235e38", "0.1", "16777217"],
            float4,
        ),
        kind(
            "float8",
            &["NaN", "Infinity", "-Infinity", "-0", "5e-324", "1.7976931348623157e308", "0.1"],
            float8,
        ),
        kind("numeric(10,2)", &["0", "-99999999.99", "99999999.99", "0.01", "-0.01"], |r| {
            decimal(r, 8, 2)
        }),
        kind(
            "numeric(38,10)",
            &[
                "-9999999999999999999999999999.9999999999",
                "9999999999999999999999999999.9999999999",
                "1e-10",
                "0",
            ],
            |r| decimal(r, 28, 10),
        ),
        kind(
            "numeric(38,0)",
            &[
                "-99999999999999999999999999999999999999",
                "99999999999999999999999999999999999999",
                "0",
            ],
            |r| decimal(r, 38, 0),
        ),
        kind("numeric(38,38)", &["-0.99999999999999999999999999999999999999", "1e-38", "0"], |r| {
            decimal(r, 0, 38)
        }),
        kind("numeric(18,6)", &["-999999999999.999999", "0.000001"], |r| decimal(r, 12, 6)),
        kind("numeric(19,1)", &["-999999999999999999.9", "999999999999999999.9"], |r| {
            decimal(r, 18, 1)
        }),
        kind("numeric(4,0)", &["9999", "-9999", "0"], |r| decimal(r, 4, 0)),
        kind("numeric(5,-2)", &["9999900", "-9999900", "49", "50", "0"], |r| decimal(r, 6, 2))
            .needs(Needs::Major(15)),
        kind("numeric(3,5)", &["0.00999", "-0.00999", "0.00001", "0"], |r| {
            format!("{}0.00{:03}", pick(r, &["", "-"]), r.random_range(0..1000))
        })
        .needs(Needs::Major(15)),
        kind(
            "numeric",
            &[
                "NaN",
                "Infinity",
                "-Infinity",
                "1.500",
                "0.000",
                "-0",
                "1e500",
                "-1e-500",
                "1e5000",
                "123456789e-30",
            ],
            |r| decimal(r, 60, 45),
        ),
        kind("numeric(60,20)", &["NaN", "-1e39", "1e-20", "0"], |r| decimal(r, 40, 20)),
        kind("money", &["-92233720368547758.08", "92233720368547758.07", "0", "-0.01"], |r| {
            let cents = whole(r, 64);
            let (sign, size) = (if cents < 0 { "-" } else { "" }, cents.unsigned_abs());
            format!("{sign}{}.{:02}", size / 100, size % 100)
        }),
        kind("oid", &["0", "4294967295", "2147483648"], |r| r.random::<u32>().to_string()),
        kind("xid", &["0", "4294967295", "2147483648"], |r| r.random::<u32>().to_string()),
        kind("cid", &["0", "4294967295"], |r| r.random::<u32>().to_string()),
        kind("xid8", &["0", "18446744073709551615", "9223372036854775808"], |r| {
            r.random::<u64>().to_string()
        }),
    ]
}

fn texts() -> Vec<Kind> {
    const EDGES: &[&str] = &[
        "",
        " ",
        "NULL",
        "null",
        "\\N",
        "\\.",
        "\\",
        "'",
        "\"",
        "\t",
        "\n",
        "\r\n",
        "{}",
        "ä€𝄞",
        "e\u{301}",
        "\u{feff}x",
        "\u{202e}abc",
        "\u{10ffff}",
        "\u{1}\u{7f}",
        "E'\\x00'",
        "trailing  ",
    ];
    vec![
        kind("text", EDGES, text),
        kind("varchar(10)", &["", "abc  ", "ä€𝄞ä€𝄞ä€𝄞ä", "\\N", "NULL"], |r| {
            limited(r, 10)
        }),
        kind("varchar", EDGES, text),
        kind("char(5)", &["", "ab", "ab   ", "ä€𝄞xy", "    x"], |r| limited(r, 5)),
        kind("char(1)", &["", " ", "𝄞"], |r| limited(r, 1)),
        kind("name", &["", "a name", "\"quoted\""], |r| limited(r, 15)),
        kind("\"char\"", &["", "x", " ", "\\", "'", "\""], |r| {
            char::from(r.random_range(b' '..=b'~')).to_string()
        }),
        kind("bytea", &["\\x", "\\x00", "\\xff", "\\x00ff80", "\\x5c783030", "\\x27"], bytes),
        kind("bit(3)", &["000", "111"], |r| bits(r, 3)),
        kind("bit(65)", &[], |r| bits(r, 65)),
        kind("varbit", &["", "0", "1", "00000000", "111111111"], |r| {
            let size = r.random_range(0..100);
            bits(r, size)
        }),
        kind("citext", EDGES, text).needs(Needs::Extension("citext")),
    ]
}

fn moments() -> Vec<Kind> {
    vec![
        kind("date", DATE_EDGES, date),
        kind("time", &["00:00:00", "24:00:00", "23:59:59.999999", "00:00:00.000001"], clock),
        kind("time(0)", &["24:00:00"], clock),
        kind(
            "timetz",
            &["24:00:00+00", "23:59:59.999999+15:59:59", "00:00:00-15:59:59", "00:00:00-03"],
            |r| clock(r) + &offset(r),
        ),
        kind(
            "timestamp",
            &[
                "infinity",
                "-infinity",
                "1970-01-01 00:00:00",
                "1969-12-31 23:59:59.999999",
                "1970-01-01 00:00:00.000001",
                "4713-01-01 00:00:00 BC",
                "0001-12-31 23:59:59.999999 BC",
                "0001-01-01 00:00:00",
                "2000-02-29 24:00:00",
                "290000-12-31 23:59:59.999999",
            ],
            |r| {
                let (day, era) = day(day_number(r, 105_000_000));
                format!("{day} {}{era}", clock(r))
            },
        ),
        kind("timestamp(3)", &["2024-01-01 00:00:00.9996"], |r| {
            let (day, era) = day(day_number(r, 105_000_000));
            format!("{day} {}{era}", clock(r))
        }),
        kind(
            "timestamptz",
            &[
                "infinity",
                "-infinity",
                "1970-01-01 00:00:00+00",
                "2024-06-01 12:00:00.5+05:30",
                "0001-01-01 00:00:00+00 BC",
                "4713-01-02 00:00:00-15:59 BC",
                "1900-01-01 00:00:00+00:19:32",
                "290000-12-31 23:59:59.999999+00",
            ],
            timestamptz,
        ),
        kind("interval", INTERVAL_EDGES, interval),
        kind(
            "uuid",
            &["00000000000000000000000000000000", "ffffffffffffffffffffffffffffffff"],
            uuid,
        ),
    ]
}

const DATE_EDGES: &[&str] = &[
    "infinity",
    "-infinity",
    "4714-11-24 BC",
    "0001-12-31 BC",
    "0001-01-01",
    "1969-12-31",
    "1970-01-01",
    "2000-02-29",
    "9999-12-31",
    "10000-01-01",
    "5874897-12-31",
];

const INTERVAL_EDGES: &[&str] = &[
    "0",
    "1 mon -2 days +03:04:05.6",
    "-1 mon 2 days -03:04:05.6",
    "-178000000 years",
    "178000000 years",
    "2147483647 days",
    "-2147483648 days",
    "2000000000:00:00",
    "-2000000000:59:59.999999",
    "-00:00:00.000001",
    "1 year 2 mons",
    "-1 year 2 mons",
    "24:00:00",
    "1 day",
    "30 days",
    "1 mon",
];

fn documents() -> Vec<Kind> {
    vec![
        kind(
            "json",
            &[
                "\"\\ud800\"",
                "{\"a\": 1, \"a\":  2}",
                "\"\\u0000\"",
                "1e400",
                "-0",
                "0.10",
                "null",
                "true",
                "\"\"",
                "[]",
                "{}",
                " [ 1 ,\n\t2 ] ",
                "{\"\": {\"\": null}}",
                "\"\\/\\b\\u00e4ä\"",
                "12345678901234567890123456789012345678901234567890",
            ],
            json,
        ),
        kind(
            "jsonb",
            &[
                "null",
                "true",
                "\"\"",
                "[]",
                "{}",
                "1.50",
                "-0",
                "1e400",
                "1e-400",
                "{\"b\": [1, null], \"a\": \"ü\"}",
            ],
            json,
        ),
        kind(
            "xml",
            &[
                "",
                "<a/>",
                "only text",
                "<a>b</a><c/>",
                "<?xml version=\"1.0\" encoding=\"UTF-8\" standalone=\"yes\"?><a/>",
                "<?xml version=\"1.0\"?>\n<a>\n</a>",
                "<a><![CDATA[<&\"']]></a>",
                "<!-- a comment --><a b='c' d=\"&lt;\">ä€𝄞</a>",
            ],
            |r| {
                let (tag, inner) = (label(r), label(r));
                format!(
                    "<{tag} n=\"{}\">{inner} &amp; {}</{tag}>",
                    whole(r, 20),
                    pick(r, &["ü", "<b/>", "\n", "'"])
                )
            },
        )
        .needs(Needs::Libxml),
        kind(
            "tsvector",
            &["", "a:1 fat:2 cat:3", "'it''s':1A,2B", "'a b' '\\\\'", "x:16383"],
            |r| {
                let size = r.random_range(0..6);
                let words = (0..size).map(|_| match r.random_bool(0.5) {
                    true => format!("'{}'", label(r)),
                    false => format!(
                        "{}:{}{}",
                        label(r),
                        r.random_range(1..16384),
                        pick(r, &["", "A", "B", "C", "D"])
                    ),
                });
                words.collect::<Vec<_>>().join(" ")
            },
        ),
        kind(
            "tsquery",
            &["fat & cat", "!a | (b <-> c)", "a:*", "a:AB", "a <3> b", "'it''s'"],
            |r| {
                let operator = pick(r, &["&", "|", "<->", "<2>", "& !"]);
                format!(
                    "{} {operator} {}{}",
                    label(r),
                    label(r),
                    pick(r, &["", ":*", ":A", ":BC*"])
                )
            },
        ),
        kind("jsonpath", &["$", "strict $.a[*]", "$.a[*] ? (@ > 1)", "$.\"a b\".size()"], |r| {
            format!(
                "$.{}[{}] ? (@.{} > {})",
                label(r),
                r.random_range(0..100),
                label(r),
                whole(r, 20).unsigned_abs()
            )
        }),
        kind(
            "hstore",
            &["", "a=>NULL", "a=>\"NULL\"", "\"\"=>\"\"", "\"a b\"=>\"q\\\"q\", \"c\"=>\"\\\\\""],
            |r| {
                let size = r.random_range(0..5);
                let pairs = (0..size).map(|_| {
                    let value =
                        if r.random_bool(0.2) { "NULL".to_owned() } else { quoted(&limited(r, 8)) };
                    format!("{}=>{value}", quoted(&limited(r, 4)))
                });
                pairs.collect::<Vec<_>>().join(", ")
            },
        )
        .needs(Needs::Extension("hstore")),
        kind("ltree", &["", "Top", "Top.Science.Astronomy", "a_b.c1"], |r| {
            let size = r.random_range(0..6);
            (0..size).map(|_| label(r)).collect::<Vec<_>>().join(".")
        })
        .needs(Needs::Extension("ltree")),
    ]
}

fn networks_and_shapes() -> Vec<Kind> {
    vec![
        kind(
            "inet",
            &["10.0.0.1", "10.0.0.0/8", "0.0.0.0/0", "::1", "::", "::ffff:1.2.3.4", "fe80::1/64"],
            inet,
        ),
        kind(
            "cidr",
            &["10.0.0.0/8", "0.0.0.0/0", "192.168.1.1/32", "::/0", "2001:db8::/32"],
            |r| {
                if r.random_bool(0.5) {
                    let size = r.random_range(0..=32_u32);
                    let mask = u32::MAX.checked_shl(32 - size).unwrap_or(0);
                    format!("{}/{size}", Ipv4Addr::from(r.random::<u32>() & mask))
                } else {
                    let size = r.random_range(0..=128_u32);
                    let mask = u128::MAX.checked_shl(128 - size).unwrap_or(0);
                    format!("{}/{size}", Ipv6Addr::from(r.random::<u128>() & mask))
                }
            },
        ),
        kind("macaddr", &["00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "0800-2b01-0203"], |r| {
            format!("{:012x}", r.random::<u64>() >> 16)
        }),
        kind("macaddr8", &["00:00:00:00:00:00:00:00", "08:00:2b:01:02:03"], |r| {
            format!("{:016x}", r.random::<u64>())
        }),
        kind("point", &["(1,2.5)", "(NaN,Infinity)", "(-0,1e-300)", "(-Infinity,0)"], point),
        kind("line", &["{1,2,3}", "{0,-1,0.5}", "{1,0,0}"], |r| {
            format!("{{{},{},{}}}", r.random_range(1..1000), coordinate(r), coordinate(r))
        }),
        kind("lseg", &["[(0,0),(0,0)]"], |r| format!("[{},{}]", point(r), point(r))),
        kind("box", &["(3,4),(1,2)", "(0,0),(0,0)"], box_text),
        kind("path", &["[(0,0)]", "((0,0))"], |r| match r.random_bool(0.5) {
            true => format!("[{}]", points(r)),
            false => format!("({})", points(r)),
        }),
        kind("polygon", &["((0,0))"], |r| format!("({})", points(r))),
        kind("circle", &["<(0,0),0>"], |r| format!("<{},{}>", point(r), r.random_range(0..1000))),
    ]
}

fn ranges() -> Vec<Kind> {
    const INTEGERS: &[&str] = &["empty", "(,)", "(,3)", "[1,)", "[1,5]", "(1,2)", "[7,7]"];
    vec![
        kind("int4range", INTEGERS, |r| span(r, 1_000_000_000, |n| n.to_string())),
        kind("int8range", INTEGERS, |r| span(r, 1_000_000_000_000_000, |n| n.to_string())),
        kind(
            "numrange",
            &["empty", "(,)", "[1.50,1.5]", "(0.1,1e30]", "[-Infinity,Infinity]"],
            number_span,
        ),
        kind(
            "tsrange",
            &["empty", "(,)", "[2024-01-01,infinity)", "(-infinity,2024-01-01]"],
            |r| span(r, 58_000_000_000, moment),
        ),
        kind("tstzrange", &["empty", "(,)", "[2024-01-01 00:00+02,infinity)"], |r| {
            span(r, 58_000_000_000, |n| moment(n) + "+03:30")
        }),
        kind(
            "daterange",
            &["empty", "(,)", "[2024-02-28,2024-02-29]", "[2024-01-01,infinity)"],
            date_span,
        ),
        kind("int4multirange", &["{}", "{(,)}", "{[1,3),[3,5),[9,9]}"], |r| {
            several(r, |r| span(r, 1_000_000, |n| n.to_string()))
        }),
        kind("nummultirange", &["{}", "{(,)}", "{[1.0,1.5],(2,3]}"], |r| several(r, number_span)),
        kind("datemultirange", &["{}", "{[2024-01-01,2024-01-02],[2025-01-01,)}"], |r| {
            several(r, date_span)
        }),
    ]
}

fn of_the_system() -> Vec<Kind> {
    vec![
        kind("pg_lsn", &["0/0", "FFFFFFFF/FFFFFFFF", "16/B374D848"], |r| {
            format!("{:X}/{:X}", r.random::<u32>(), r.random::<u32>())
        }),
        kind("tid", &["(0,0)", "(4294967295,65535)"], |r| {
            format!("({},{})", r.random::<u32>(), r.random::<u16>())
        }),
        kind("pg_snapshot", &["1:1:", "10:20:10,14,15"], |r| {
            let low = r.random_range(1..1_000_000_000_000_u64);
            let high = low + r.random_range(0..20_u64);
            let running: Vec<String> = (low..high)
                .filter(|_| r.random_bool(0.3))
                .map(|transaction| transaction.to_string())
                .collect();
            format!("{low}:{high}:{}", running.join(","))
        }),
        kind(
            "regtype",
            &["int4", "text[]", "timestamp with time zone", "-", "mood", "outer_row", "999999"],
            |r| {
                pick(r, &["int8", "numeric", "varchar", "bytea", "uuid", "dom_int", "\"char\""])
                    .to_owned()
            },
        ),
        kind(
            "regclass",
            &["pg_class", "-", "pg_type", "information_schema.tables", "999999", "1259"],
            |r| {
                pick(
                    r,
                    &[
                        "pg_proc",
                        "pg_attribute",
                        "pg_index",
                        "pg_toast.pg_toast_1255",
                        "pg_stat_activity",
                    ],
                )
                .to_owned()
            },
        ),
        kind("oidvector", &["", "0", "1 2 3", "4294967295"], |r| {
            let size = r.random_range(0..8);
            (0..size).map(|_| r.random::<u32>().to_string()).collect::<Vec<_>>().join(" ")
        }),
        kind("int2vector", &["", "0", "-32768 32767"], |r| {
            let size = r.random_range(0..8);
            (0..size).map(|_| whole(r, 16).to_string()).collect::<Vec<_>>().join(" ")
        }),
    ]
}

fn made_by_users() -> Vec<Kind> {
    vec![
        kind("mood", &["", "it's", "a, \"b\""], mood),
        kind("dom_int", &["-1000000000", "2147483647", "0"], |r| whole(r, 30).to_string()),
        kind("dom_of_dom", &["-1000000000", "1000000000"], |r| whole(r, 30).to_string()),
        kind("dom_text", &["", "NULL", "\\N"], text),
        kind("dom_numeric", &["99999.999", "-99999.999", "0"], |r| decimal(r, 5, 3)),
        kind("dom_mood", &["", "ünï"], mood),
        kind("dom_list", &["{}", "{NULL}", "{-2147483648,2147483647}"], |r| array(r, ",", int4)),
        kind("outer_row", ROW_EDGES, outer_row),
    ]
}

const ROW_EDGES: &[&str] = &[
    "(,,,)",
    "(1,\"\",,)",
    "(1,\"x,y\",\"(2,\"\"q\"\"\"\"q\"\")\",1.5)",
    "(,\" \",\"(,)\",)",
    "(0,NULL,,0)",
];

fn arrays() -> Vec<Kind> {
    vec![
        kind("int2[]", &["{}", "{NULL}", "{-32768,32767}"], |r| {
            array(r, ",", |r| whole(r, 16).to_string())
        }),
        kind("int4[]", &["{}", "{NULL}", "{1,NULL,-3}"], |r| array(r, ",", int4)),
        kind("int8[]", &["{}", "{NULL,NULL}", "{-9223372036854775808}"], |r| array(r, ",", int8)),
        kind("bool[]", &["{}", "{t,f,NULL}"], |r| {
            array(r, ",", |r| r.random_bool(0.5).to_string())
        }),
        kind("float4[]", &["{}", "{NaN,-Infinity,1e-45}"], |r| array(r, ",", float4)),
        kind("float8[]", &["{}", "{NaN,Infinity,-0}"], |r| array(r, ",", float8)),
        kind(
            "text[]",
            &["{}", "{\"NULL\",NULL,\"a,b\",\"q\\\"q\",\"\"}", "{\"\\\\\",\"{}\",\" \"}"],
            |r| array(r, ",", text),
        ),
        kind("varchar(5)[]", &["{}", "{\"\"}"], |r| array(r, ",", |r| limited(r, 5))),
        kind("char(3)[]", &["{}", "{ab,\"\"}"], |r| array(r, ",", |r| limited(r, 3))),
        kind("numeric(10,3)[]", &["{}", "{1.5,NULL,-0.001}"], |r| {
            array(r, ",", |r| decimal(r, 7, 3))
        }),
        kind("numeric[]", &["{}", "{NaN,1.500,1e100}"], |r| array(r, ",", |r| decimal(r, 20, 20))),
        kind("timestamptz[]", &["{}", "{\"2024-01-01 00:00:00+00\",infinity}"], |r| {
            array(r, ",", timestamptz)
        }),
        kind("date[]", &["{}", "{infinity,-infinity,\"0044-03-15 BC\"}"], |r| array(r, ",", date)),
        kind("time[]", &["{}", "{24:00:00}"], |r| array(r, ",", clock)),
        kind("interval[]", &["{}", "{\"1 day\",NULL,\"-1 mon\"}"], |r| array(r, ",", interval)),
        kind("uuid[]", &["{}"], |r| array(r, ",", uuid)),
        kind("bytea[]", &["{}", "{\"\\\\x\",NULL}"], |r| array(r, ",", bytes)),
        kind("json[]", &["{}", "{null,\"null\"}"], |r| array(r, ",", json)),
        kind("jsonb[]", &["{}", "{NULL,\"null\",\"\\\"\\\"\"}"], |r| array(r, ",", json)),
        kind("inet[]", &["{}", "{10.0.0.1,::1/64}"], |r| array(r, ",", inet)),
        kind("int4range[]", &["{}", "{empty,\"[1,5]\"}"], |r| {
            array(r, ",", |r| span(r, 1_000_000, |n| n.to_string()))
        }),
        kind("mood[]", &["{}", "{\"\",NULL}"], |r| array(r, ",", mood)),
        kind("outer_row[]", &["{}", "{\"(,,,)\",NULL}"], |r| array(r, ",", outer_row)),
        kind("dom_int[]", &["{}", "{NULL,1}"], |r| array(r, ",", |r| whole(r, 30).to_string())),
        kind("dom_numeric[]", &["{}", "{NULL,1}"], |r| array(r, ",", |r| decimal(r, 5, 3))),
        kind("box[]", &["{}", "{(3,4),(1,2);NULL}"], |r| array(r, ";", box_text)),
        kind("int4[][]", &["{}", "{{1,2},{3,4}}", "{{NULL},{NULL}}"], |r| matrix(r, int4)),
        kind("text[][]", &["{}", "{{\"\",NULL},{\"NULL\",\"}\"}}"], |r| {
            matrix(r, |r| limited(r, 6))
        }),
        kind("float8[][]", &["{}", "{{NaN,NULL}}"], |r| matrix(r, float8)),
    ]
}

fn pick<T: Copy>(r: &mut StdRng, from: &[T]) -> T {
    from[r.random_range(0..from.len())]
}

/// Of every size up to `bits`, small ones as often as large ones.
fn whole(r: &mut StdRng, bits: u32) -> i64 {
    let shift: u32 = r.random_range(64 - bits..64);
    r.random::<i64>() >> shift
}

fn int4(r: &mut StdRng) -> String {
    whole(r, 32).to_string()
}

fn int8(r: &mut StdRng) -> String {
    whole(r, 64).to_string()
}

fn float4(r: &mut StdRng) -> String {
    let value = if r.random_bool(0.5) {
        f32::from_bits(r.random::<u32>())
    } else {
        r.random_range(-1e6_f32..1e6_f32)
    };
    float_text(value.is_nan(), value.is_infinite(), format!("{value:e}"))
}

fn float8(r: &mut StdRng) -> String {
    let value = if r.random_bool(0.5) {
        f64::from_bits(r.random::<u64>())
    } else {
        r.random_range(-1e9_f64..1e9_f64)
    };
    float_text(value.is_nan(), value.is_infinite(), format!("{value:e}"))
}

fn float_text(is_nan: bool, is_infinite: bool, text: String) -> String {
    match (is_nan, is_infinite) {
        (true, _) => "NaN".to_owned(),
        (_, true) => "Infinity".to_owned(),
        _ => text,
    }
}

/// At most so many digits before and after the point.
fn decimal(r: &mut StdRng, before: usize, after: usize) -> String {
    let (before, after) = (r.random_range(0..=before), r.random_range(0..=after));
    let (before, after) = (digits(r, before), digits(r, after));
    format!("{}0{before}.{after}", pick(r, &["", "", "-"]))
}

fn digits(r: &mut StdRng, size: usize) -> String {
    (0..size).map(|_| char::from(r.random_range(b'0'..=b'9'))).collect()
}

fn bits(r: &mut StdRng, size: usize) -> String {
    (0..size).map(|_| pick(r, &['0', '1'])).collect()
}

/// Now and then so long that the server stores it outside the row.
fn text(r: &mut StdRng) -> String {
    if r.random_bool(0.01) {
        let size = r.random_range(3_000..12_000);
        return (0..size).map(|_| character(r)).collect();
    }
    limited(r, 24)
}

fn limited(r: &mut StdRng, longest: usize) -> String {
    let size = r.random_range(0..=longest);
    (0..size).map(|_| character(r)).collect()
}

fn character(r: &mut StdRng) -> char {
    const ODD: &[char] = &[
        '\'', '"', '\\', '\t', '\n', '\r', ' ', ',', ';', '{', '}', '(', ')', '%', '$', '\u{1}',
        '\u{7f}', 'ä', '€', '𝄞', '\u{301}',
    ];
    match r.random_range(0..6) {
        0 => pick(r, ODD),
        1 => char::from_u32(r.random_range(0xA0..0xD800)).unwrap_or('x'),
        _ => char::from(r.random_range(b'!'..=b'~')),
    }
}

/// Letters only: a word that every small language takes for a name.
fn label(r: &mut StdRng) -> String {
    let size = r.random_range(1..8);
    (0..size).map(|_| char::from(r.random_range(b'a'..=b'z'))).collect()
}

fn bytes(r: &mut StdRng) -> String {
    let size =
        if r.random_bool(0.01) { r.random_range(2_500..5_000) } else { r.random_range(0..24) };
    (0..size).fold("\\x".to_owned(), |text, _| text + &format!("{:02x}", r.random::<u8>()))
}

/// Year, month and day of a day counted from 1970-01-01, and the era that is written after them.
fn day(number: i64) -> (String, &'static str) {
    // Howard Hinnant's civil_from_days.
    let shifted = number + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    if year > 0 {
        (format!("{year:04}-{month:02}-{day:02}"), "")
    } else {
        (format!("{:04}-{month:02}-{day:02}", 1 - year), " BC")
    }
}

/// Mostly of our time, at times from 4713 BC to `last`.
fn day_number(r: &mut StdRng, last: i64) -> i64 {
    match r.random_range(0..10) {
        0 => r.random_range(-2_440_000..0),
        1..7 => r.random_range(-36_500..73_000),
        7 | 8 => r.random_range(-719_162..2_932_896),
        _ => r.random_range(0..last),
    }
}

fn date(r: &mut StdRng) -> String {
    let (day, era) = day(day_number(r, 2_145_000_000));
    day + era
}

fn clock(r: &mut StdRng) -> String {
    let seconds = clock_of(r.random_range(0..86_400));
    if r.random_bool(0.3) {
        seconds
    } else {
        format!("{seconds}.{:06}", r.random_range(0..1_000_000))
    }
}

fn clock_of(second: i64) -> String {
    format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

fn offset(r: &mut StdRng) -> String {
    let text = format!(
        "{}{:02}:{:02}",
        pick(r, &["+", "-"]),
        r.random_range(0..15),
        r.random_range(0..60)
    );
    if r.random_bool(0.1) { format!("{text}:{:02}", r.random_range(0..60)) } else { text }
}

fn timestamptz(r: &mut StdRng) -> String {
    let (day, era) = day(day_number(r, 105_000_000));
    format!("{day} {}{}{era}", clock(r), offset(r))
}

/// A second counted from 1970, in the years that need no era.
fn moment(second: i64) -> String {
    let (day, era) = day(second.div_euclid(86_400));
    format!("{day} {}{era}", clock_of(second.rem_euclid(86_400)))
}

fn interval(r: &mut StdRng) -> String {
    let (years, months) = (r.random_range(-5_000..=5_000), r.random_range(-30..=30));
    let longest = pick(r, &[23, 100, 1_000_000]);
    let (days, hours) = (whole(r, 20), r.random_range(0..=longest));
    let (sign, minute, second) =
        (pick(r, &["", "-"]), r.random_range(0..60), r.random_range(0..60));
    let micros = if r.random_bool(0.5) { 0 } else { r.random_range(0..1_000_000) };
    match r.random_range(0..4) {
        0 => format!("{months} mons"),
        1 => format!("{days} days"),
        2 => format!("{sign}{hours:02}:{minute:02}:{second:02}.{micros:06}"),
        _ => format!(
            "{years} years {months} mons {days} days \
             {sign}{hours:02}:{minute:02}:{second:02}.{micros:06}"
        ),
    }
}

fn uuid(r: &mut StdRng) -> String {
    format!("{:032x}", r.random::<u128>())
}

/// Valid as jsonb too. Keys repeat, spaces are odd.
fn json(r: &mut StdRng) -> String {
    json_value(r, 3)
}

fn json_value(r: &mut StdRng, depth: u32) -> String {
    let space = pick(r, &["", "", " ", "\n\t", "  "]);
    match r.random_range(0..if depth == 0 { 4 } else { 6 }) {
        0 => pick(r, &["null", "true", "false", "1e400", "1.50", "-0.0", "1E+2"]).to_owned(),
        1 => format!("{}{space}", whole(r, 64)),
        2 => format!("{space}{}", decimal(r, 0, 12) + "5"),
        3 => serde_json::to_string(&limited(r, 10)).unwrap(),
        4 => {
            let size = r.random_range(0..4);
            let items: Vec<String> = (0..size).map(|_| json_value(r, depth - 1)).collect();
            format!("[{space}{}]", items.join(&format!("{space},")))
        }
        _ => {
            let size = r.random_range(0..4);
            let fields = (0..size).map(|_| {
                let key =
                    pick(r, &["\"a\"", "\"b\"", "\"\"", "\"a b\"", "\"\\u00e4\"", "\"\\\"\""]);
                format!("{key}{space}:{}", json_value(r, depth - 1))
            });
            let fields: Vec<String> = fields.collect();
            format!("{{{space}{}{space}}}", fields.join(", "))
        }
    }
}

fn inet(r: &mut StdRng) -> String {
    let (address, longest) = match r.random_bool(0.5) {
        true => (Ipv4Addr::from(r.random::<u32>()).to_string(), 32),
        // Shifted, so that runs of zeros come on both sides.
        false => {
            let (left, right) = (r.random_range(0..64_u32), r.random_range(0..64_u32));
            (Ipv6Addr::from((r.random::<u128>() >> right) << left).to_string(), 128)
        }
    };
    if r.random_bool(0.5) { address } else { format!("{address}/{}", r.random_range(0..=longest)) }
}

fn coordinate(r: &mut StdRng) -> String {
    match r.random_range(0..10) {
        0 => pick(r, &["0", "-0", "1e300", "-1e-300"]).to_owned(),
        1..5 => whole(r, 20).to_string(),
        _ => format!("{:e}", r.random_range(-1e4_f64..1e4_f64)),
    }
}

fn point(r: &mut StdRng) -> String {
    format!("({},{})", coordinate(r), coordinate(r))
}

fn points(r: &mut StdRng) -> String {
    let size = r.random_range(1..6);
    (0..size).map(|_| point(r)).collect::<Vec<_>>().join(",")
}

fn box_text(r: &mut StdRng) -> String {
    format!("{},{}", point(r), point(r))
}

/// A range between two of the numbers up to `most`, shown by `show`.
fn span(r: &mut StdRng, most: i64, show: fn(i64) -> String) -> String {
    if r.random_bool(0.05) {
        return "empty".to_owned();
    }
    let low = r.random_range(-most..=most);
    let high = r.random_range(low..=most);
    let (open, close) = (pick(r, &['[', '(']), pick(r, &[']', ')']));
    let mut bound = |number: i64| {
        if r.random_bool(0.1) { String::new() } else { format!("\"{}\"", show(number)) }
    };
    let (low, high) = (bound(low), bound(high));
    format!("{open}{low},{high}{close}")
}

fn number_span(r: &mut StdRng) -> String {
    span(r, 1_000_000_000, |n| format!("{n}e-3"))
}

fn date_span(r: &mut StdRng) -> String {
    span(r, 1_000_000, |n| {
        let (day, era) = day(n);
        day + era
    })
}

fn several(r: &mut StdRng, one: fn(&mut StdRng) -> String) -> String {
    let size = r.random_range(0..4);
    format!("{{{}}}", (0..size).map(|_| one(r)).collect::<Vec<_>>().join(","))
}

fn mood(r: &mut StdRng) -> String {
    pick(r, &["sad", "ok", "happy", "it's", "a, \"b\"", "ünï"]).to_owned()
}

/// Inside arrays, composites and hstore.
pub fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// A composite; an empty field is NULL, `""` is the empty string.
fn record(fields: &[Option<String>]) -> String {
    let fields: Vec<String> =
        fields.iter().map(|field| field.as_deref().map(quoted).unwrap_or_default()).collect();
    format!("({})", fields.join(","))
}

fn outer_row(r: &mut StdRng) -> String {
    let mut fields = Vec::new();
    for number in 0..4 {
        let field = match number {
            _ if r.random_bool(0.2) => None,
            0 => Some(int4(r)),
            1 => Some(limited(r, 8)),
            2 => Some(record(&[Some(int4(r)), r.random_bool(0.8).then(|| limited(r, 6))])),
            _ => Some(decimal(r, 8, 2)),
        };
        fields.push(field);
    }
    record(&fields)
}

fn element_of(r: &mut StdRng, element: fn(&mut StdRng) -> String) -> String {
    if r.random_bool(0.1) { "NULL".to_owned() } else { quoted(&element(r)) }
}

fn array(r: &mut StdRng, delimiter: &str, element: fn(&mut StdRng) -> String) -> String {
    let size = r.random_range(0..6);
    let items: Vec<String> = (0..size).map(|_| element_of(r, element)).collect();
    format!("{{{}}}", items.join(delimiter))
}

/// Two dimensions, all rows of one width.
fn matrix(r: &mut StdRng, element: fn(&mut StdRng) -> String) -> String {
    let (height, width) = (r.random_range(1..4), r.random_range(1..4));
    let rows = (0..height).map(|_| {
        let items: Vec<String> = (0..width).map(|_| element_of(r, element)).collect();
        format!("{{{}}}", items.join(","))
    });
    let rows: Vec<String> = rows.collect();
    format!("{{{}}}", rows.join(","))
}
