//! The dashboard and the alerts in docs/observe: promtool understands them, the alerts fire when
//! they should, and both use only metrics that a run has.

use std::{collections::BTreeSet, fs};

use serde_json::Value;

use super::{SOON, busy_run, names, promtool};
use crate::{bed::wait_until, tidy::root};

const RULES: &str = "docs/observe/alerts.yml";
const RULE_TESTS: &str = "docs/observe/alerts_test.yml";
const DASHBOARD: &str = "docs/observe/dashboard.json";

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// The values of `"expr"` in the dashboard.
fn expressions() -> Vec<String> {
    fn gather(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("expr").and_then(Value::as_str).map(str::to_owned));
                fields.values().for_each(|value| gather(value, found));
            }
            Value::Array(values) => values.iter().for_each(|value| gather(value, found)),
            _ => {}
        }
    }
    let dashboard: Value = serde_json::from_str(&read(DASHBOARD)).unwrap();
    let mut found = Vec::new();
    gather(&dashboard, &mut found);
    found
}

/// The names of metrics in a text, without the endings of histograms' series.
fn used(text: &str) -> BTreeSet<String> {
    let words = text.split(|sign: char| !sign.is_ascii_alphanumeric() && sign != '_');
    let metrics = words.filter(|word| word.starts_with("rhei_") || word.starts_with("process_"));
    metrics.map(|word| word.trim_end_matches("_bucket").to_owned()).collect()
}

#[test]
fn the_alerts_are_valid_and_each_of_them_fires_when_it_should() {
    let (rules, tests) = (root().join(RULES), root().join(RULE_TESTS));
    promtool(&["check", "rules", rules.to_str().unwrap()], "");
    promtool(&["test", "rules", tests.to_str().unwrap()], "");

    let tests = read(RULE_TESTS);
    for alert in read(RULES).lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        let name = format!("alertname: {alert}\n");
        let fires = tests
            .match_indices(&name)
            .any(|(at, _)| tests[at + name.len()..].trim_start().starts_with("exp_alerts:\n"));
        assert!(fires, "{RULE_TESTS} has no case in which {alert} fires");
    }
}

#[test]
fn every_query_of_the_dashboard_is_valid() {
    let expressions = expressions();
    assert!(expressions.len() > 30, "{expressions:?}");
    let rules: Vec<Value> = expressions
        .iter()
        .map(|expression| expression.replace("$__rate_interval", "5m").replace("$instance", "a"))
        .enumerate()
        .map(|(at, expression)| serde_json::json!({ "record": format!("q:{at}"), "expr": expression }))
        .collect();
    // YAML takes JSON as it is.
    let groups = serde_json::json!({ "groups": [{ "name": "dashboard", "rules": rules }] });

    let file = tempfile::NamedTempFile::with_suffix(".yml").unwrap();
    fs::write(file.path(), groups.to_string()).unwrap();
    promtool(&["check", "rules", file.path().to_str().unwrap()], "");
}

#[test]
fn dashboard_and_alerts_use_only_metrics_that_a_run_has() {
    let (_cluster, observed) = busy_run("observe_used");
    let db = &observed.following.db;
    db.execute("SELECT pg_logical_emit_message(false, 'rhei.test', repeat('x', 100000))");
    wait_until(SOON, "the speed of the WAL and the deleted rows are known", || {
        let metrics = observed.metrics();
        ["rhei_slot_left_seconds", "rhei_file_dead_rows"]
            .iter()
            .all(|name| metrics.contains_key(*name))
    });

    let found = names(&observed.get("/metrics").body);
    let dashboard = expressions().join("\n");
    let rules: String = read(RULES).lines().filter(|line| line.contains("expr:")).collect();
    for (file, text) in [(DASHBOARD, dashboard), (RULES, rules)] {
        let used = used(&text);
        assert!(used.len() > 10, "{file}: {used:?}");
        let unknown: Vec<_> = used.difference(&found).collect();
        assert!(unknown.is_empty(), "{file} uses {unknown:?}, which a run does not have");
    }
    observed.stop();
}
