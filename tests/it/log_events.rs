//! docs/logs.md lists every event of the log with its level, its fields and its message, as the
//! code writes them. `RHEI_BLESS=1` writes the list again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use super::tidy::{root, sources};
use crate::following::Following;

/// One call of `tracing::info!`, `warn!` or `error!`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct LogEvent {
    place: String,
    level: &'static str,
    name: Option<String>,
    fields: BTreeSet<String>,
    message: String,
}

/// Splits the arguments of a macro, without its parentheses, at the commas between them. Returns
/// the arguments and the length of their text.
fn arguments(text: &str) -> (Vec<String>, usize) {
    let (mut found, mut current) = (Vec::new(), String::new());
    let (mut depth, mut in_text, mut is_escaped) = (0, false, false);

    for (at, sign) in text.char_indices() {
        match sign {
            _ if is_escaped => is_escaped = false,
            '\\' if in_text => is_escaped = true,
            '"' => in_text = !in_text,
            _ if in_text => {}
            '(' | '[' | '{' => depth += 1,
            ')' if depth == 0 => {
                found.push(current);
                return (found, at);
            }
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                found.push(std::mem::take(&mut current));
                continue;
            }
            _ => {}
        }
        current.push(sign);
    }
    panic!("a macro without an end: {text:.60}");
}

/// The text of a string literal that goes over several lines.
fn literal(argument: &str) -> Option<String> {
    let text = argument.strip_prefix('"')?.strip_suffix('"')?;
    let lines: Vec<&str> = text.split("\\\n").map(str::trim_start).collect();
    Some(lines.concat().replace("\\\"", "\""))
}

fn log_events() -> Vec<LogEvent> {
    let mut found = Vec::new();

    for (file, text) in sources(&root().join("src")) {
        for level in ["error", "warn", "info"] {
            let call = format!("tracing::{level}!(");
            for (at, _) in text.match_indices(&call) {
                let line = text[..at].lines().count() + 1;
                let (arguments, _) = arguments(&text[at + call.len()..]);
                let mut event = LogEvent {
                    place: format!("{file}:{line}"),
                    level,
                    name: None,
                    fields: BTreeSet::new(),
                    message: String::new(),
                };

                for argument in arguments.iter().map(|argument| argument.trim()) {
                    if let Some(message) = literal(argument) {
                        event.message = message;
                        // What follows are the values of the message.
                        break;
                    }
                    match argument.split_once(" = ") {
                        Some(("event", name)) => event.name = literal(name),
                        Some((field, _)) => {
                            event.fields.insert(field.to_owned());
                        }
                        None => {
                            event.fields.insert(argument.trim_start_matches(['%', '?']).to_owned());
                        }
                    }
                }
                found.push(event);
            }
        }
    }
    found
}

/// The lines of the table in docs/logs.md.
fn listed(events: &[LogEvent]) -> String {
    let mut rows: BTreeMap<String, Vec<&LogEvent>> = BTreeMap::new();
    for event in events {
        rows.entry(event.name.clone().unwrap()).or_default().push(event);
    }

    let mut table = String::from("| event | level | fields | message |\n|---|---|---|---|\n");
    for (name, events) in rows {
        let of = |part: fn(&LogEvent) -> String| {
            let parts: BTreeSet<String> = events.iter().map(|event| part(event)).collect();
            parts.into_iter().collect::<Vec<_>>().join("; ")
        };
        let fields: Vec<String> =
            events[0].fields.iter().map(|field| format!("`{field}`")).collect();
        let message = of(|event| event.message.clone()).replace('|', "\\|");
        table += &format!(
            "| `{name}` | {} | {} | {message} |\n",
            of(|event| event.level.to_owned()),
            fields.join(", ")
        );
    }
    table
}

#[test]
fn every_log_line_has_a_stable_name_and_is_listed_in_docs_logs() {
    const BEGIN: &str = "<!-- events -->\n";
    const END: &str = "<!-- end of events -->\n";

    let events = log_events();
    assert!(events.len() > 50, "only {} calls were found", events.len());

    let unnamed: Vec<&String> =
        events.iter().filter(|event| event.name.is_none()).map(|event| &event.place).collect();
    assert!(unnamed.is_empty(), "log lines without an event = \"..\": {unnamed:?}");

    for event in &events {
        let name = event.name.as_ref().unwrap();
        let is_plain = name.chars().all(|sign| sign.is_ascii_lowercase() || sign == '_');
        assert!(is_plain, "{}: {name}", event.place);
        assert!(!event.message.is_empty(), "{}: {name} has no message", event.place);

        let same = events.iter().find(|other| other.name == event.name).unwrap();
        assert_eq!(
            same.fields, event.fields,
            "{name} has other fields at {} than at {}",
            same.place, event.place
        );
    }

    let path = root().join("docs/logs.md");
    let document = fs::read_to_string(&path).unwrap();
    let (before, rest) = document.split_once(BEGIN).unwrap();
    let (table, after) = rest.split_once(END).unwrap();

    if std::env::var_os("RHEI_BLESS").is_some() {
        fs::write(&path, [before, BEGIN, &listed(&events), END, after].concat()).unwrap();
        return;
    }
    assert_eq!(table, listed(&events), "docs/logs.md is not as the code: run with RHEI_BLESS=1");
}

#[test]
fn json_lines_carry_their_names_and_text_lines_do_without() {
    let following = Following::new("log_formats");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");

    let json = following.rhei.run_ok(["sync", "--log-format", "json"]);
    let lines: Vec<serde_json::Value> =
        json.stderr.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let names: Vec<&str> =
        lines.iter().map(|line| line["fields"]["event"].as_str().unwrap()).collect();
    assert!(names.contains(&"table_copied") && names.contains(&"caught_up"), "{names:?}");

    following.db.execute("INSERT INTO t VALUES (2)");
    let text = following.sync();
    let line = text.stderr.lines().find(|line| line.contains("INFO applied")).unwrap();
    assert!(line.contains("transactions=1") && !line.contains("event"), "{line}");
}
