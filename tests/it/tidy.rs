//! The walls of the house: what may know whom, and whether ARCHITECTURE.md still tells the truth.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

pub fn sources(folder: &Path) -> Vec<(String, String)> {
    files(folder, &["rs"])
}

/// Names and texts of the files in a folder, and in those below it, that have one of these endings.
fn files(folder: &Path, endings: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, endings));
        } else if path.extension().is_some_and(|it| endings.iter().any(|ending| it == *ending)) {
            let name = path.strip_prefix(root()).unwrap().display().to_string();
            found.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
    found
}

/// The folders and files of `src`, top down: each imports only from those after it. `source` and
/// `olap` are on one level: they never name each other.
const LEVELS: [&[&str]; 19] = [
    &["main", "lib"],
    &["cli"],
    &["config"],
    &["observe"],
    &["control"],
    &["engine"],
    &["serve"],
    &["verify"],
    &["backfill"],
    &["pipeline"],
    &["source", "olap"],
    &["change"],
    &["types"],
    &["pgoutput"],
    &["checkpoint"],
    &["lsn"],
    &["conninfo"],
    &["error"],
    &["failpoint"],
];

/// The first name of each path after `crate::` in code, comments aside.
fn imported(text: &str) -> Vec<String> {
    let code: Vec<&str> =
        text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let code = code.join("\n");
    let mut names = Vec::new();
    let first_name = |path: &str| -> String {
        path.chars().take_while(|&sign| sign.is_alphanumeric() || sign == '_').collect()
    };
    for (_, rest) in
        code.match_indices("crate::").map(|(at, found)| (at, &code[at + found.len()..]))
    {
        let Some(list) = rest.strip_prefix('{') else {
            names.push(first_name(rest));
            continue;
        };
        let (mut depth, mut is_first) = (0, true);
        for (at, sign) in list.char_indices() {
            if is_first && !sign.is_whitespace() {
                names.push(first_name(&list[at..]));
                is_first = false;
            }
            match sign {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => is_first = true,
                _ => {}
            }
        }
    }
    names
}

#[test]
fn a_folder_imports_only_from_those_below_it() {
    let level = |name: &str| LEVELS.iter().position(|level| level.contains(&name));
    for (file, text) in sources(&root().join("src")) {
        let own = file["src/".len()..].split(['/', '.']).next().unwrap();
        let own_level = level(own).unwrap_or_else(|| panic!("{file} is in no level"));
        for name in imported(&text) {
            let Some(other) = level(&name) else { continue };
            assert!(name == own || other > own_level, "{file} imports {name}");
        }
    }
}

#[test]
fn what_has_no_io_has_no_runtime_and_no_database() {
    let walls = [
        ("src/olap/", ["tokio"].as_slice()),
        ("src/change/", ["tokio", "duckdb::"].as_slice()),
        ("src/types/", ["tokio", "duckdb::"].as_slice()),
        ("src/pgoutput/", ["tokio", "duckdb::"].as_slice()),
        ("src/lsn.rs", ["tokio", "duckdb"].as_slice()),
        ("src/checkpoint.rs", ["tokio", "duckdb"].as_slice()),
        ("src/source/", ["duckdb::"].as_slice()),
    ];
    for (file, text) in sources(&root().join("src")) {
        for (folder, words) in walls {
            let names = |word: &&&str| {
                text.lines()
                    .any(|line| !line.trim_start().starts_with("//") && line.contains(**word))
            };
            let broken: Vec<_> = words.iter().filter(names).collect();
            assert!(!file.starts_with(folder) || broken.is_empty(), "{file} names {broken:?}");
        }
    }
}

#[test]
fn no_file_is_too_long_and_nothing_is_left_open() {
    const MAX_LINES: usize = 900;
    for (file, text) in sources(&root().join("src")) {
        assert!(
            text.lines().count() <= MAX_LINES,
            "{file} has more than {MAX_LINES} lines: look for the second noun"
        );
        for word in ["todo!", "unimplemented!", "dbg!", "FIXME", "allow(dead_code"] {
            assert!(!text.contains(word), "{file} holds {word}");
        }
    }
}

#[test]
fn no_line_is_longer_than_100_columns() {
    for (file, text) in sources(&root().join("src")) {
        let long = text.lines().position(|line| line.chars().count() > 100);
        assert!(long.is_none(), "{file}:{}: longer than 100 columns", long.unwrap_or_default() + 1);
    }
}

/// The longest function, in lines, without an entry in [`LONG_FUNCTIONS`].
const MAX_FUNCTION_LINES: usize = 70;

/// Longer functions: one match over all types, or one table of cases, reads better whole. The list
/// may only shrink.
const LONG_FUNCTIONS: [&str; 3] = [
    "src/pipeline/error_policy.rs each_kind_of_error_has_its_policy",
    "src/types/builder.rs push_binary_value",
    "src/types/builder.rs push_text_value",
];

/// Names and lengths of the functions of a file, as rustfmt sets them: the last line of a function
/// is a brace at the indentation of its first line.
fn function_lengths(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();

    for (at, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let is_function = !code.starts_with("//")
            && (code.starts_with("fn ") || code.contains(" fn ") && !code.contains('"'));
        let Some(name) = code.split("fn ").nth(1).filter(|_| is_function) else { continue };
        let name: String =
            name.chars().take_while(|&sign| sign.is_alphanumeric() || sign == '_').collect();

        let indent = &line[..line.len() - code.len()];
        let end = lines[at..].iter().position(|line| *line == format!("{indent}}}"));
        let has_body = lines[at..]
            .iter()
            .take_while(|line| !line.ends_with(';'))
            .any(|line| line.ends_with('{'));
        if let Some(end) = end.filter(|_| has_body && !name.is_empty()) {
            found.push((name, end + 1));
        }
    }
    found
}

#[test]
fn no_function_is_longer_than_70_lines() {
    let mut long = BTreeSet::new();
    for (file, text) in sources(&root().join("src")) {
        for (name, lines) in function_lengths(&text) {
            if lines > MAX_FUNCTION_LINES {
                long.insert(format!("{file} {name}"));
            }
        }
    }
    let listed: BTreeSet<String> = LONG_FUNCTIONS.iter().map(|&name| name.to_owned()).collect();
    assert!(listed.len() <= 8);
    assert_eq!(long, listed, "functions over {MAX_FUNCTION_LINES} lines, and the list of them");
}

/// Names that were given up for those of the field: for each of them there is a plainer one in use.
#[rustfmt::skip]
const RETIRED_NAMES: [&str; 95] = [
    "Told", "hold_first", "Closing", "FirstSlot", "Board", "kept_rows", "lost_loader",
    "on_thread", "patiently", "News", "begin_anew", "ANEW", "RACES", "start_over",
    "or_everything", "IN_A_ROW", "BREAKS", "STEADY", "CALM", "begin_rounds", "panic_text",
    "Catalogs", "Looked", "Settling", "Verdict", "judge_slot", "judge_server", "SlotLost",
    "could_not_read", "pause_and_read_again", "is_worth_a_commit", "copy_it", "with_causes",
    "in_time", "wants_whole", "Asked", "LONGEST_QUESTION", "gather", "hurry", "TURN", "is_clean",
    "read_back", "PINNED", "UNTIMED", "OURS", "goes_elsewhere", "in_its_encoding", "begin_moment",
    "end_moment", "break_moment", "knows_details", "only_element", "SlotKeep", "until_ready",
    "Taken", "tails", "go_on", "Reshape", "ValueNowhere", "KeyTaken", "note_shapes", "give_way",
    "set_ours", "be_attached", "attach_again", "keep_for_later", "close_open_values",
    "forget_staged", "bring_into_shape", "set_aside", "bring_back", "write_anew", "Lent",
    "FEWEST", "MOST", "LONGEST", "LARGEST", "DEEPEST", "PATIENCE", "GLANCE", "PAUSE", "rendered",
    "HURRIED_ROWS", "CALM_THRESHOLD", "is_worth_it", "open_keys", "Watermark", "Member",
    "blockers", "Followed", "is_calm_after", "no_tables", "unplanned", "arrival", "Question",
];

#[test]
fn no_retired_name_comes_back() {
    for (file, text) in sources(&root().join("src")) {
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        for (at, line) in code.enumerate() {
            let mut words = line.split(|sign: char| !sign.is_alphanumeric() && sign != '_');
            let retired = words.find(|word| {
                RETIRED_NAMES.iter().any(|name| {
                    // A retired constant was called by a superlative and a unit.
                    let is_prefix = name.len() > 3 && name.chars().all(char::is_uppercase);
                    word == name || is_prefix && word.starts_with(&format!("{name}_"))
                })
            });
            assert!(retired.is_none(), "{file}, line {at} of its code: {retired:?} is retired");
        }
    }
}

/// Only `cli` prints, only `main` and `cli` decide how the process ends.
#[test]
fn only_the_command_line_prints() {
    for (file, text) in sources(&root().join("src")) {
        let prints = ["println!", "process::exit"].iter().any(|word| text.contains(word));
        assert!(!prints || file.starts_with("src/cli/"), "{file} prints or exits");
    }
}

/// Each `path/like.this` and each `Type::function` in code spans must exist.
#[test]
fn architecture_names_only_what_exists() {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let all: String = sources(&root().join("src")).into_iter().map(|(_, text)| text).collect();
    for span in page.split('`').skip(1).step_by(2) {
        if span.starts_with("src/") {
            assert!(root().join(span).exists(), "ARCHITECTURE.md names {span}, which is gone");
        } else if let Some((kind, function)) = span.split_once("::")
            && !function.contains(' ')
        {
            let defines = |word: &str, name: &str| {
                let (open, generic) = (format!("{word} {name}("), format!("{word} {name}<"));
                all.contains(&open) || all.contains(&generic)
            };
            let is_known = defines("fn", function) || all.contains(&format!("pub {function}:"));
            assert!(is_known, "ARCHITECTURE.md names {span}, and there is no {function}");
            let is_module = kind.chars().next().is_some_and(char::is_lowercase);
            let is_type = ["struct", "enum", "trait"]
                .iter()
                .any(|word| all.contains(&format!("{word} {kind}")));
            assert!(is_module || is_type, "ARCHITECTURE.md names {span}, and there is no {kind}");
        }
    }
}

/// What is named as a trap, by one number, a list ("and" and commas) or a range, also across lines
/// of a comment.
fn named_traps(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut is_list = false;
    for word in text.split_whitespace().filter(|word| !["//", "///", "//!"].contains(word)) {
        let bare = word.trim_matches(|sign: char| !sign.is_ascii_alphanumeric());
        if ["trap", "traps"].contains(&bare.to_ascii_lowercase().as_str()) {
            is_list = true;
            continue;
        }
        if !is_list || word == "and" {
            continue;
        }
        if !bare.starts_with(|sign: char| sign.is_ascii_digit()) {
            is_list = false;
            continue;
        }
        let number = |text: &str| text.parse::<u32>().ok();
        let ends = bare.split_once('-').and_then(|(one, two)| Some((number(one)?, number(two)?)));
        if let Some((first, last)) = ends {
            found.extend((first..=last).map(|number| number.to_string()));
        } else {
            found.insert(bare.chars().take_while(char::is_ascii_alphanumeric).collect());
        }
        is_list = word.ends_with(|sign: char| sign == ',' || sign.is_ascii_alphanumeric());
    }
    found
}

/// Numbers are as good as the page that says what they stand for, and that page must be in the
/// project.
#[test]
fn every_trap_that_is_named_is_in_docs_traps() {
    const PAGE: &str = "docs/traps.md";
    let page = fs::read_to_string(root().join(PAGE)).unwrap();
    let mut texts: Vec<(String, String)> = ["src", "tests", "benches", "docs"]
        .iter()
        .flat_map(|folder| files(&root().join(folder), &["rs", "md"]))
        .filter(|(file, _)| file != PAGE)
        .collect();
    let map = "ARCHITECTURE.md";
    texts.push((map.to_owned(), fs::read_to_string(root().join(map)).unwrap()));
    let mut named = BTreeSet::new();
    for (file, text) in &texts {
        for trap in named_traps(text) {
            let heading = format!("### {trap}. ");
            let is_there = page.lines().any(|line| line.starts_with(&heading));
            assert!(is_there, "{file} names trap {trap}, which {PAGE} does not have");
            named.insert(trap);
        }
    }
    assert!(named.len() > 50, "only {} traps are found", named.len());

    let papers = [concat!("postgres", ".md"), concat!("duckdb", ".md")];
    for folder in ["src", "tests"] {
        for (file, text) in files(&root().join(folder), &["rs", "md", "sql", "py", "toml", "sh"]) {
            for paper in papers {
                assert!(!text.contains(paper), "{file} names {paper}, which is not in the project");
            }
        }
    }
}
