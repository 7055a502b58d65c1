//! The pages for users say what the code says: each error text has an entry in
//! docs/troubleshooting.md, and each link of a page leads somewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use super::tidy::{root, sources};

const TROUBLESHOOTING: &str = "docs/troubleshooting.md";

/// What stands before the text of an error that a user, or a reader of the endpoint, sees.
const OPENINGS: [&str; 8] = [
    "#[error(",
    "Setup(",
    "Failed(",
    "failed(",
    "refused(",
    "SqlError::new(",
    "NotCompacted { reason:",
    "NotPublished { reason:",
];

/// Returns the string literal at the beginning of a text, its lines joined, and what follows it.
fn literal(text: &str) -> Option<(String, &str)> {
    let text = text.trim_start();
    let text = text.strip_prefix("format!(").unwrap_or(text).trim_start().strip_prefix('"')?;

    let mut is_escaped = false;
    let end = text.find(|sign| {
        let is_end = sign == '"' && !is_escaped;
        is_escaped = sign == '\\' && !is_escaped;
        is_end
    })?;
    Some((joined(&text[..end]), &text[end + 1..]))
}

/// Returns code with its string literals on one line, as they are printed.
fn joined(code: &str) -> String {
    let mut lines = code.split("\\\n");
    let first = lines.next().unwrap_or_default().to_owned();
    let text = lines.fold(first, |text, line| text + line.trim_start());
    text.replace("\\\"", "\"")
}

/// Returns the first line of the error text that follows an opening. A SQLSTATE comes before it.
fn error_text(after: &str) -> Option<String> {
    let (mut text, rest) = literal(after)?;
    let is_code = text.len() == 5 && text.chars().all(|sign| sign.is_ascii_alphanumeric());
    if is_code && !text.chars().any(char::is_lowercase) {
        (text, _) = literal(rest.trim_start().strip_prefix(',')?)?;
    }
    text.split("\\n").next().map(str::to_owned)
}

/// Returns a text with `{}` for each of its placeholders.
fn pattern(text: &str) -> String {
    let mut parts = text.split('{');
    let mut pattern = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        pattern += "{}";
        pattern += part.split_once('}').map_or("", |(_, rest)| rest);
    }
    pattern
}

/// Returns whether anything is left of a pattern beside its placeholders.
fn says_something(pattern: &str) -> bool {
    pattern.replace("{}", "").chars().any(char::is_alphabetic)
}

/// Returns the patterns of the error texts in the code, with the places of each.
fn error_texts() -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();

    for (file, text) in sources(&root().join("src")) {
        let is_test = file.ends_with("tests.rs") || file.ends_with("memory_target.rs");
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        for opening in OPENINGS.iter().filter(|_| !is_test) {
            for (at, _) in code.match_indices(opening) {
                let text = error_text(&code[at + opening.len()..]);
                let Some(pattern) = text.map(|text| pattern(&text)) else { continue };
                if says_something(&pattern) {
                    found.entry(pattern).or_default().insert(file.clone());
                }
            }
        }
    }
    found
}

/// Returns the patterns that the page has entries for: what stands between two backquotes in the
/// first cell of a row.
fn entries(page: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in page.lines() {
        let Some(cell) = line.strip_prefix("| ").and_then(|row| row.split(" | ").next()) else {
            continue;
        };
        found.extend(cell.split("``").skip(1).step_by(2).map(|span| pattern(span.trim())));
    }
    found
}

#[test]
fn every_error_text_has_an_entry_in_docs_troubleshooting() {
    let texts = error_texts();
    assert!(texts.len() > 200, "only {} error texts were found", texts.len());

    let page = fs::read_to_string(root().join(TROUBLESHOOTING)).unwrap();
    let entries = entries(&page);

    let code: String = sources(&root().join("src")).iter().map(|(_, text)| joined(text)).collect();
    let is_in_code = |entry: &String| {
        let longest = entry.split("{}").max_by_key(|part| part.len());
        texts.contains_key(entry) || longest.is_some_and(|part| code.contains(part))
    };

    let missing: Vec<String> = texts
        .iter()
        .filter(|(text, _)| !entries.contains(*text))
        .map(|(text, files)| format!("{text}    ({files:?})"))
        .collect();
    let stale: Vec<&String> = entries.iter().filter(|entry| !is_in_code(entry)).collect();

    assert!(
        missing.is_empty() && stale.is_empty(),
        "{TROUBLESHOOTING} has no entry for\n{}\nand entries for texts that the code does not \
         have:\n{stale:#?}",
        missing.join("\n")
    );
}

/// The pages that people read, with their texts.
fn pages() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for folder in ["", "docs"] {
        for entry in fs::read_dir(root().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|ending| ending == "md") {
                let name = path.strip_prefix(root()).unwrap().display().to_string();
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found
}

/// Returns the lines of a page that are not in a block of code.
fn prose(page: &str) -> impl Iterator<Item = &str> {
    let mut is_code = false;
    page.lines().filter(move |line| {
        if line.starts_with("```") {
            is_code = !is_code;
            return false;
        }
        !is_code
    })
}

/// Returns the anchors of a page, as GitHub makes them of its headings.
fn anchors(page: &str) -> BTreeSet<String> {
    let headings = prose(page).filter_map(|line| {
        let heading = line.trim_start_matches('#');
        (heading.len() < line.len()).then(|| heading.strip_prefix(' ')).flatten()
    });
    let mut found = BTreeSet::new();
    for heading in headings {
        let kept = heading.trim().to_lowercase();
        let kept = kept.chars().filter(|sign| sign.is_alphanumeric() || " -_".contains(*sign));
        let anchor = kept.collect::<String>().replace(' ', "-");
        let numbered = (1..).map(|number| format!("{anchor}-{number}"));
        let mut candidates = std::iter::once(anchor.clone()).chain(numbered);
        found.insert(candidates.find(|anchor| !found.contains(anchor)).unwrap());
    }
    found
}

/// Returns the targets of the links and pictures of a page, code spans aside.
fn links(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in prose(page) {
        let text: String = line.split('`').step_by(2).collect();
        for (at, _) in text.match_indices("](") {
            let target = text[at + 2..].split([')', ' ']).next().unwrap();
            found.push(target.to_owned());
        }
    }
    found
}

#[test]
fn every_link_of_a_page_leads_somewhere() {
    let mut broken = Vec::new();
    let mut count = 0;

    for (file, text) in pages() {
        for link in links(&text).iter().filter(|link| !link.contains("://")) {
            count += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let path = match path {
                "" => root().join(&file),
                path => root().join(Path::new(&file).parent().unwrap()).join(path),
            };
            let is_there = path.exists()
                && (anchor.is_empty()
                    || fs::read_to_string(&path).is_ok_and(|it| anchors(&it).contains(anchor)));
            if !is_there {
                broken.push(format!("{file}: {link}"));
            }
        }
    }

    assert!(count > 30, "only {count} links were found");
    assert!(broken.is_empty(), "links that lead nowhere: {broken:#?}");
}

#[test]
fn texts_are_found_as_the_code_writes_them() {
    assert_eq!(error_text("\n  \"a \\\"b\\\" \\\n     c\\nhint: d\")").unwrap(), "a \"b\" c");
    assert_eq!(error_text("\n \"0A000\",\n  format!(\"no {x}\"))").unwrap(), "no {x}");
    assert_eq!(error_text("text)"), None);
    assert_eq!(pattern("{} of {path:?}: {"), "{} of {}: {}");
    assert!(!says_something(&pattern("{what}: {0}")) && says_something("DuckDB: {}"));

    let page = "| message | what |\n|---|---|\n| ``a {b}`` ``c`` | ``no`` |\n``no``\n";
    assert_eq!(entries(page), BTreeSet::from(["a {}".to_owned(), "c".to_owned()]));

    let page = "# A `b.c`, d!\n```\n# no [x](y)\n```\n## A b\n[x](y#z) `[x](no)` ![p](q)\n";
    assert_eq!(anchors(page), BTreeSet::from(["a-bc-d".to_owned(), "a-b".to_owned()]));
    assert_eq!(links(page), ["y#z", "q"]);
}
