//! Rows without a key that DuckDB calls equal and the source does not, or that are nearly equal:
//! whichever goes at the source goes in the copy.
//!
//! RHEI_TEST_SEED replays a run. Left out is what docs/types.md says of 0 and -0: where rows that
//! stand side by side have nothing else, DuckDB keeps one of the two in the file. So floats are
//! compared without the sign of zeros; that a row with one of them goes when the other is there
//! does not stop a table, which is tested.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{
    bed::{
        Cluster, Running,
        lake::Kind,
        oracle::{Pair, compare, query_copy},
        wait_until,
    },
    following::{Following, from_env},
};

const SOON: Duration = Duration::from_secs(180);

const SETUP: &str = "
    CREATE TYPE mood AS ENUM ('', 'sad', 'Sad');
    CREATE DOMAIN span AS interval;
    CREATE DOMAIN label AS text;
    CREATE TYPE duo AS (a int, b text);
    CREATE TYPE near AS (i interval, f float8, z timetz, n numeric);";

/// A table of one column, in which each value, and NULL, stands twice.
#[derive(Debug, Clone, Copy)]
struct Case {
    sql: &'static str,
    values: &'static [&'static str],
    /// `type` of its settings.
    setting: Option<&'static str>,
    extension: Option<&'static str>,
    /// It has both zeros.
    has_zeros: bool,
}

const fn case(sql: &'static str, values: &'static [&'static str]) -> Case {
    Case { sql, values, setting: None, extension: None, has_zeros: false }
}

impl Case {
    const fn set(mut self, setting: &'static str) -> Case {
        self.setting = Some(setting);
        self
    }

    const fn of(mut self, extension: &'static str) -> Case {
        self.extension = Some(extension);
        self
    }

    const fn zeros(mut self) -> Case {
        self.has_zeros = true;
        self
    }

    fn is_read_by_oracle(&self) -> bool {
        self.setting.is_none() && !self.has_zeros
    }
}

const FLOATS: &[&str] = &["1.5", "0", "-0", "NaN", "Infinity", "-Infinity", "1", "1e-40"];
const INTERVALS: &[&str] = &[
    "30 days",
    "1 mon",
    "720:00:00",
    "29 days 24:00:00",
    "1 mon -1 days 24:00:00",
    "0",
    "1 day",
    "24:00:00",
    "-1 mon",
    "-30 days",
    "1 mon -30 days",
    "12 mons",
    "360 days",
];
const ZONED: &[&str] =
    &["12:00+00", "13:00+01", "07:00-05", "12:00-00:00:01", "24:00+00", "00:00+00", "23:00-01"];
const JSONS: &[&str] = &[
    "1",
    "1.0",
    "1e0",
    "\"1\"",
    "{\"a\":1}",
    "{\"a\": 1.0}",
    "[1.0]",
    "[1]",
    "[]",
    "{}",
    "[null]",
];
const NUMBERS: &[&str] = &["1", "1.0", "1.00", "0", "0.0", "-1", "NaN"];
const WORDS: &[&str] = &["a", "A", "a ", " a", "", " ", "NULL", "ä", "a\u{308}", "\\N"];
const DUOS: &[&str] = &["(,)", "(1,)", "(,\"\")", "(1,\"\")", "(1,NULL)", "(1,a)", "(1,A)"];
const NEARS: &[&str] = &[
    "(30 days,1.5,12:00+00,1)",
    "(1 mon,1.5,12:00+00,1)",
    "(720:00:00,0,12:00+00,1)",
    "(720:00:00,-0,12:00+00,1)",
    "(1 mon,1.5,13:00+01,1)",
    "(1 mon,1.5,13:00+01,1.0)",
    "(1 mon,NaN,,1.00)",
    "(,,,)",
];
const PAIRS: &[&str] = &["", "a=>NULL", "a=>\"NULL\"", "a=>1", "a=>\"\"", "b=>1", "a=>1,b=>2"];
const NUMBER_SPANS: &[&str] =
    &["[1,2]", "[1.0,2]", "[1,2.0]", "(1,2)", "[1,2)", "empty", "(,)", "[1,)"];
const MOMENT_SPANS: &[&str] = &[
    "[2024-01-01,2024-01-02)",
    "[2024-01-01 01:00+01,2024-01-02)",
    "empty",
    "(,)",
    "[2024-01-01,infinity)",
];

const CASES: &[Case] = &[
    case("bool", &["t", "f"]),
    case("int4", &["0", "1", "-1"]),
    case("int8", &["0", "9007199254740993", "9007199254740992"]),
    case("float4", FLOATS).zeros(),
    case("float8", FLOATS).zeros(),
    case("numeric", NUMBERS),
    case("numeric(10,2)", &["1", "1.01", "0", "-0.01"]),
    case("numeric(40,2)", &["1", "1.01", "0", "NaN"]),
    case("money", &["1", "1.01", "0"]),
    case("oid", &["0", "1", "4294967295"]),
    case("text", WORDS),
    case("varchar(5)", WORDS),
    case("char(5)", &["a", "A", " a", "", "ä"]),
    case("bpchar", &["a", "a ", "A", ""]),
    case("name", &["a", "A", ""]),
    case("label", WORDS),
    case("citext", WORDS).of("citext"),
    case("ltree", &["", "a", "A", "a.b"]).of("ltree"),
    case("bytea", &["\\x", "\\x00", "\\x0000", "\\x61"]),
    case("bit(3)", &["000", "001"]),
    case("varbit", &["", "0", "00", "000"]),
    case("date", &["2024-01-01", "infinity", "-infinity", "0001-01-01 BC"]),
    case("time", &["00:00", "24:00", "12:00"]),
    case("timetz", ZONED),
    case("timestamp", &["2024-01-01", "2024-01-01 00:00:00.000001", "infinity", "-infinity"]),
    case(
        "timestamptz",
        &["2024-01-01 00:00+00", "2024-01-01 00:00:00.000001+00", "infinity", "-infinity"],
    ),
    case("interval", INTERVALS),
    case("span", INTERVALS),
    case("uuid", &["00000000-0000-0000-0000-000000000000", "00000000-0000-0000-0000-000000000001"]),
    case("json", JSONS),
    case(
        "json",
        &[
            "{\"a\":1,\"a\":1}",
            "{\"a\":1}",
            "{\"a\": 1}",
            " {\"a\":1}",
            "\"\\u00e4\"",
            "\"ä\"",
            "null",
        ],
    ),
    case("jsonb", JSONS),
    case("jsonb", &["null", "1.00", "{\"a\": 1.00}", "{\"b\": 1, \"a\": 1}"]),
    case("tsvector", &["", "a", "a:1", "a:1A", "A"]),
    case("tsquery", &["a", "!a", "a & b", "a | b"]),
    case("inet", &["10.0.0.1", "10.0.0.1/24", "::1", "::ffff:10.0.0.1"]),
    case("cidr", &["10.0.0.0/8", "10.0.0.0/16", "::/0"]),
    case("macaddr", &["00:00:00:00:00:00", "00:00:00:00:00:01"]),
    case("point", &["(0,0)", "(-0,0)", "(NaN,0)", "(0.0000001,0)"]),
    case("box", &["(1,1),(0,0)", "(1,1),(0,-0)"]),
    case("path", &["[(0,0),(1,1)]", "((0,0),(1,1))"]),
    case("circle", &["<(0,0),1>", "<(-0,0),1>"]),
    case("pg_lsn", &["0/0", "0/1"]),
    case("tid", &["(0,0)", "(0,1)"]),
    case("int4range", &["[1,2]", "[1,4)", "empty", "(,)"]),
    case("numrange", NUMBER_SPANS),
    case("tstzrange", MOMENT_SPANS),
    case("nummultirange", &["{}", "{[1,2]}", "{[1.0,2]}", "{(,)}"]),
    case("mood", &["", "sad", "Sad"]),
    case("duo", DUOS),
    case("near", NEARS),
    case("hstore", PAIRS).of("hstore"),
    case("int4[]", &["{}", "{NULL}", "{1}", "{1,NULL}", "{NULL,1}", "{1,1}"]),
    case("int4[][]", &["{}", "{{1,2}}", "{{1},{2}}", "{{NULL}}"]),
    case("text[]", &["{}", "{NULL}", "{\"NULL\"}", "{\"\"}", "{a}", "{A}", "{\"a \"}"]),
    case("char(3)[]", &["{}", "{a}", "{A}", "{\"\"}"]),
    case("float8[]", &["{1.5,0}", "{0}", "{-0}", "{NaN}", "{0,-0}", "{}", "{NULL}"]).zeros(),
    case("numeric[]", &["{1}", "{1.0}", "{1.00}", "{NaN}", "{}"]),
    case("numeric(10,2)[]", &["{1}", "{1.01}", "{NULL}", "{}"]),
    case(
        "interval[]",
        &[
            "{30 days}",
            "{1 mon}",
            "{720:00:00}",
            "{}",
            "{NULL}",
            "{1 mon,30 days}",
            "{30 days,1 mon}",
        ],
    ),
    case("span[]", &["{30 days}", "{1 mon}", "{720:00:00}"]),
    case("timetz[]", &["{12:00+00}", "{13:00+01}", "{}", "{NULL}"]),
    case("time[]", &["{00:00}", "{24:00}"]),
    case("json[]", &["{1}", "{1.0}", "{NULL}", "{null}", "{}", "{\"null\"}"]),
    case("jsonb[]", &["{1}", "{1.0}", "{1.00}", "{NULL}", "{\"null\"}", "{}"]),
    case("duo[]", &["{}", "{NULL}", "{\"(,)\"}", "{\"(1,)\"}"]),
    case("bytea[]", &["{}", "{NULL}", "{\"\\\\x\"}", "{\"\\\\x00\"}"]),
    // As the settings say.
    case("float8", FLOATS).set("VARCHAR"),
    case("numeric", &["1", "1.0", "1.00", "0.1", "NaN", "Infinity", "0"]).set("DOUBLE"),
    case("numeric", &["1", "1.0", "1.01"]).set("DECIMAL(10,2)"),
    case("interval", INTERVALS).set("VARCHAR"),
    case("int4[]", &["{}", "{NULL}", "{1}", "{{1}}"]).set("VARCHAR"),
    case("timetz", ZONED).set("TIMETZ"),
    case("json", JSONS).set("VARIANT"),
    case("jsonb", JSONS).set("VARIANT"),
    case(
        "json",
        &[
            "[1, 2]",
            "[1, 2.0]",
            "[1,2]",
            "{\"a\":{\"b\":1}}",
            "{\"a\":{\"b\":1.0}}",
            "\"1\"",
            "true",
            "\"true\"",
        ],
    )
    .set("VARIANT"),
    case("duo", DUOS).set("STRUCT"),
    case("near", NEARS).set("STRUCT").zeros(),
    case("numrange", NUMBER_SPANS).set("STRUCT"),
    case("tstzrange", MOMENT_SPANS).set("STRUCT"),
    case("hstore", PAIRS).of("hstore").set("MAP"),
];

struct Table {
    name: String,
    case: Case,
}

impl Table {
    fn random(&self, rng: &mut StdRng) -> String {
        let at = rng.random_range(0..=self.case.values.len());
        self.case.values.get(at).map_or_else(|| "NULL".to_owned(), |value| self.literal(value))
    }

    fn literal(&self, value: &str) -> String {
        format!("'{}'::{}", value.replace('\'', "''"), self.case.sql)
    }

    fn create(&self, times: u32) -> String {
        let Table { name, case } = self;
        let mut values: Vec<String> =
            case.values.iter().map(|value| format!("({})", self.literal(value))).collect();
        values.push(format!("(NULL::{})", case.sql));
        format!(
            "CREATE TABLE {name} (v {}); ALTER TABLE {name} REPLICA IDENTITY FULL;
             INSERT INTO {name} SELECT v FROM (VALUES {}) r(v), generate_series(1, {times})",
            case.sql,
            values.join(", ")
        )
    }

    /// One row, whichever.
    fn one(&self, rng: &mut StdRng) -> String {
        let name = &self.name;
        format!(
            "ctid = (SELECT ctid FROM {name} ORDER BY md5(ctid::text || '{}') LIMIT 1)",
            rng.random::<u32>()
        )
    }

    /// One row of every other value: those that DuckDB calls equal to another have it in front of
    /// them.
    fn delete_some(&self) -> String {
        let name = &self.name;
        let values = self.case.values.iter().skip(1).step_by(2);
        let statements = values.map(|value| {
            let literal = self.literal(value);
            format!(
                "DELETE FROM {name} WHERE ctid = (SELECT min(ctid) FROM {name} \
                 WHERE v IS DISTINCT FROM NULL AND format('%s', v) = format('%s', {literal}))"
            )
        });
        statements.collect::<Vec<_>>().join("; ")
    }

    fn change(&self, rng: &mut StdRng) -> String {
        let (name, one) = (&self.name, self.one(rng));
        match rng.random_range(0..10) {
            0..4 => format!("DELETE FROM {name} WHERE {one}"),
            4..7 => format!("UPDATE {name} SET v = {} WHERE {one}", self.random(rng)),
            7 => format!("UPDATE {name} SET v = v WHERE {one}"),
            _ => format!("INSERT INTO {name} VALUES ({})", self.random(rng)),
        }
    }
}

/// A table for each type that this server has, and the settings that some of them need.
struct Tables {
    following: Following,
    all: Vec<Table>,
    rng: StdRng,
    fresh: u32,
}

impl Tables {
    fn new(name: &str, times: u32) -> Self {
        let seed = from_env("RHEI_TEST_SEED", 20_261_122);
        println!("RHEI_TEST_SEED={seed}");
        let mut following = Following::of(Cluster::shared().database(name));
        following.db.execute(SETUP);
        let mut settings =
            format!("[source]\nslot = \"{}\"\n[sync]\ninterval = \"50ms\"\n", following.slot());
        let mut all = Vec::new();
        for (number, &case) in CASES.iter().enumerate() {
            // `near` has an interval.
            let is_refused = matches!(
                (case.sql, case.setting),
                (_, Some("TIMETZ" | "VARIANT")) | ("near", Some("STRUCT"))
            );
            if is_refused && Kind::of_all_tests().is_some() {
                continue;
            }
            let extension =
                case.extension.map(|name| format!("CREATE EXTENSION IF NOT EXISTS {name}"));
            if extension.is_some_and(|create| following.db.try_query(&create).is_err()) {
                continue;
            }
            let table = Table { name: format!("e{number}"), case };
            following.db.execute(&table.create(times));
            if let Some(setting) = case.setting {
                settings.push_str(&format!(
                    "[tables.\"public.e{number}\".columns]\nv.type = \"{setting}\"\n"
                ));
            }
            all.push(table);
        }
        following.rhei = following.rhei.config(&settings);
        Self { following, all, rng: StdRng::seed_from_u64(seed), fresh: 0 }
    }

    /// A few changes of each table, in transactions of several.
    fn change(&mut self, times: usize) {
        let session = self.following.db.session();
        for _ in 0..times {
            for table in &self.all {
                let several = self.rng.random_range(1..4);
                let changes: Vec<String> =
                    (0..several).map(|_| table.change(&mut self.rng)).collect();
                session.execute(&changes.join("; "));
            }
        }
    }

    fn delete_some(&self) {
        let session = self.following.db.session();
        self.all.iter().for_each(|table| session.execute(&table.delete_some()));
    }

    fn read_by_oracle(&self, is_wanted: bool) -> impl Iterator<Item = &Table> {
        self.all.iter().filter(move |table| table.case.is_read_by_oracle() == is_wanted)
    }

    /// Against the source; where the settings ask for another type, against a new copy.
    #[track_caller]
    fn assert_same(&mut self) {
        let pairs: Vec<Pair> = self
            .read_by_oracle(true)
            .map(|table| Pair::new(&format!("public.{}", table.name)))
            .collect();
        let mut wrong = compare(&self.following.db, self.following.copy(), &pairs);

        self.fresh += 1;
        let fresh = self.following.rhei.clone().deadline(SOON);
        let fresh = fresh.target(format!("fresh{}.duckdb", self.fresh));
        fresh.run_ok(["backfill", "--no-slot"]);
        for Table { name, case } in self.read_by_oracle(false) {
            let text = match case.setting {
                Some("VARIANT") => "v::JSON::VARCHAR",
                _ if case.has_zeros => "replace(v::VARCHAR, '-0.0', '0.0')",
                _ => "v::VARCHAR",
            };
            let sql = format!(
                "SELECT {text}, count(*)::VARCHAR FROM public.{name} GROUP BY 1 ORDER BY 1"
            );
            let [found, expected] =
                [&self.following.rhei, &fresh].map(|copy| query_copy(copy.target_path(), &sql));
            if found != expected {
                wrong.push(format!(
                    "{name} {} as {:?}: {found:?} is not {expected:?}",
                    case.sql, case.setting
                ));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    fn run(&self) -> Running {
        self.following.rhei.spawn(["run"])
    }

    fn states(&self, state: &str) -> usize {
        let status = self.following.rhei.status().unwrap_or_default();
        let tables = status["tables"].as_array().cloned().unwrap_or_default();
        tables.iter().filter(|table| table["state"] == state).count()
    }
}

#[test]
fn whichever_of_equal_rows_goes_at_the_source_goes_in_the_copy() {
    let mut tables = Tables::new("equal_values", 2);
    for round in 0..4 {
        let mut running = tables.run();
        running.wait_for_log(
            if round == 0 { "all tables are live" } else { "following the source" },
            SOON,
        );
        let copies = running.copies().len();
        if round == 0 {
            tables.delete_some();
        } else {
            tables.change(2);
        }
        tables.following.wait_settled(&mut running);
        assert_eq!(running.copies().len(), copies, "a table was copied again\n{}", running.logs());
        if round % 2 == 0 {
            running.stop(SOON).assert_code(0);
        } else {
            running.kill9();
        }
        tables.assert_same();
    }
}

#[test]
fn whichever_of_equal_rows_goes_while_a_table_is_copied_is_missing_in_its_copy() {
    // Many seconds at that rate; the changes take a second on a machine that has nothing else to do.
    let mut tables = Tables::new("equal_copied", 300);
    tables.following.rhei = tables.following.rhei.clone().env("RHEI_BACKFILL_RATE_LIMIT", "100kB");
    let count = tables.all.len();
    let mut running = tables.run();
    wait_until(SOON, "the copies have begun", || {
        assert!(running.is_running(), "{}", running.logs());
        tables.states("copying") > 0
    });
    // Some are done by then; of most the changes are kept until their copies are.
    tables.delete_some();
    tables.change(1);
    tables.following.wait_until_in_step();
    let copying = tables.states("copying");
    assert!(
        copying > count / 2,
        "{copying} of {count} tables are being copied\n{}",
        running.logs()
    );
    running.wait_for_log("all tables are live", SOON);
    tables.change(1);
    tables.following.wait_settled(&mut running);
    assert_eq!(running.copies().len(), count, "a table was copied again\n{}", running.logs());
    running.stop(SOON).assert_code(0);
    tables.assert_same();
}
