//! JSON as VARIANT, on request: it holds what the source does, or says that it cannot.

use std::time::Duration;

use crate::{bed::oracle::query_copy, following::Following};

const SOON: Duration = Duration::from_secs(60);

/// As they are written, and as they are the same to jsonb.
const KEPT: [&str; 14] = [
    "[-9223372036854775808, 9223372036854775807, 18446744073709551615, 100000000000000000000]",
    "[0.1, 1.10, 100.00, 1E+2, 1e22, 1e23, 5e-324, 1.7976931348623157e308, 0.30000000000000004, \
     123456789012345.6]",
    "[-0.0, 0e5, -0, 9007199254740993]",
    "{\"b\": 1, \"a\": {\"a\": [], \"é\": 1, \"É\": {}}, \"\": null}",
    "[1, -1, 1.5, \"x\", null, true, {\"a\": \"1e400\"}, [\"a\", \"a\"]]",
    "\"\\ud83d\\ude00 \\\" \\\\ \\/ \\n\"",
    "1",
    "-1",
    "1.5",
    "\"1.50\"",
    "null",
    "{\"a\": 1}",
    "{\"a\": \"1\"}",
    "[{\"a\": null}, {\"a\": [1.25]}]",
];

fn refused() -> Vec<String> {
    let mut refused: Vec<String> = [
        "1e400",
        "[1e-400]",
        "{\"k\": 123456789012345678901234567890123456789012}",
        "18446744073709551616",
        "0.1234567890123456789",
        "{\"a\": 1, \"a\": 2}",
        "{\"a\": 1, \"A\": 2}",
        "\"\\ud800\"",
    ]
    .map(str::to_owned)
    .to_vec();
    // Some thousand more, and DuckDB overflows its stack.
    refused.push(format!("{}1{}", "{\"a\":".repeat(3000), "}".repeat(3000)));
    refused
}

/// With these values, each in a row of its own.
fn insert(from: usize, values: &[String]) -> String {
    let rows = values.iter().enumerate().map(|(at, json)| format!("({}, '{json}')", from + at));
    format!("INSERT INTO t VALUES {}", rows.collect::<Vec<_>>().join(", "))
}

/// On COPY and in the stream alike.
#[test]
fn a_variant_holds_json_exactly_or_not_at_all() {
    let following = Following::new("variants");
    let kept: Vec<String> = KEPT.map(str::to_owned).to_vec();
    let refused = refused();
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY, j json)");
    following.db.execute(&insert(100, &kept));
    following.db.execute(&insert(200, &refused));
    let rhei = following.rhei.clone().env("RHEI_SYNC_ON_UNREPRESENTABLE", "null").config(&format!(
        "[source]\nslot = \"{}\"\n[tables.\"public.t\".columns]\nj.type = \"VARIANT\"\n",
        following.slot()
    ));
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);
    following.db.execute(&insert(1100, &kept));
    following.db.execute(&insert(1200, &refused));
    following.wait_until_in_step();
    running.stop(SOON).assert_code(0);

    let of = |from: usize| {
        query_copy(
            following.copy(),
            &format!(
                "SELECT j::JSON::VARCHAR, (j IS NULL)::VARCHAR FROM public.t WHERE id BETWEEN \
                 {from} AND {from} + 99
                 ORDER BY id"
            ),
        )
    };
    for from in [100, 1100] {
        let found = of(from);
        assert_eq!(found.len(), kept.len());
        for (json, row) in kept.iter().zip(found) {
            let read = row[0].clone().unwrap_or_default().replace('\'', "''");
            let is_same = following.db.value(&format!("SELECT '{read}'::jsonb = '{json}'::jsonb"));
            assert_eq!(is_same, "t", "{json} became {read}");
        }
        let nulls = of(from + 100);
        assert_eq!(nulls.len(), refused.len());
        for (json, row) in refused.iter().zip(nulls) {
            let shown = json.get(..60).unwrap_or(json);
            assert_eq!(row[1].as_deref(), Some("true"), "{shown} became {row:?}");
        }
    }
}

#[test]
fn json_that_no_variant_holds_pauses_its_table_and_no_other() {
    let following = Following::new("no_variant");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, j jsonb); CREATE TABLE other (id int PRIMARY KEY);
         INSERT INTO t VALUES (1, '{\"a\": 1}')",
    );
    let rhei = following.rhei.clone().config(&format!(
        "[source]\nslot = \"{}\"\n[tables.\"public.t\".columns]\nj.type = \"VARIANT\"\n",
        following.slot()
    ));
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);
    following
        .db
        .execute("INSERT INTO t VALUES (2, '{\"n\": 1e400}'); INSERT INTO other VALUES (1)");
    following.wait_until_in_step();
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.other"]);
    let paused = "SELECT state, error FROM _rhei.tables WHERE source_name = 't'";
    let reason = "of JSON cannot be stored as VARIANT";
    let found = query_copy(following.copy(), paused).remove(0);
    assert_eq!(found[0].as_deref(), Some("error"));
    assert!(
        found[1].as_ref().is_some_and(|found| found.contains(reason) && found.contains("id=2")),
        "{found:?}"
    );

    // Copied again, it is no better, and the others go on.
    following.db.execute("INSERT INTO other VALUES (2)");
    let output = rhei.run(["backfill", "--table", "public.t", "--force"]);
    assert!(output.assert_code(1).stderr.contains(reason), "{}", output.stderr);
    following.assert_same(&["public.other"]);
    following.db.execute("DELETE FROM t WHERE id = 2");
    rhei.run_ok(["backfill", "--table", "public.t", "--force"]);
    let rows = query_copy(following.copy(), "SELECT id::VARCHAR, j::JSON::VARCHAR FROM public.t");
    assert_eq!(rows, [[Some("1".to_owned()), Some("{\"a\":1}".to_owned())]]);
}
