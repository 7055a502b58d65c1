//! What `rhei check` found, and how it is shown.

use std::{error::Error, process::ExitCode};

use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    Ok,
    Warning,
    /// The next `rhei sync` or `rhei run` would fail.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Finding {
    pub level: Level,
    /// The table, or what else the finding is about.
    pub subject: String,
    pub what: String,
    /// The statements that mend it at the source, in their order.
    pub sql: Vec<String>,
    /// What else helps, or what to know before the statements are run.
    pub hint: Option<String>,
}

impl Finding {
    pub fn sql(mut self, sql: impl Into<String>) -> Self {
        self.sql.push(sql.into());
        self
    }

    pub fn sqls(mut self, sqls: impl IntoIterator<Item = String>) -> Self {
        self.sql.extend(sqls);
        self
    }

    /// Takes the SQL of an error instead of its hint, which says the same, if there is such SQL.
    pub fn mended_by(mut self, sql: Option<String>) -> Self {
        if let Some(sql) = sql {
            self.sql.push(sql);
            self.hint = None;
        }
        self
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

pub(super) fn ok(subject: impl Into<String>, what: impl Into<String>) -> Finding {
    finding(Level::Ok, subject, what)
}

pub(super) fn warning(subject: impl Into<String>, what: impl Into<String>) -> Finding {
    finding(Level::Warning, subject, what)
}

pub(super) fn error(subject: impl Into<String>, what: impl Into<String>) -> Finding {
    finding(Level::Error, subject, what)
}

fn finding(level: Level, subject: impl Into<String>, what: impl Into<String>) -> Finding {
    Finding { level, subject: subject.into(), what: what.into(), sql: Vec::new(), hint: None }
}

/// Makes a finding of an error that ends a command; its hints are those of the finding.
pub(super) fn failure(subject: impl Into<String>, error: &dyn Error) -> Finding {
    let text = super::super::report::render(error);
    let lines = || text.lines();
    let part = |start: &'static str| lines().filter_map(move |line| line.strip_prefix(start));

    let primary: Vec<&str> = part("error: ").chain(part("detail: ")).collect();
    let hints: Vec<&str> = part("hint: ").collect();

    let found = finding(Level::Error, subject, primary.join(": "));
    if hints.is_empty() { found } else { found.hint(hints.join("; ")) }
}

#[derive(Debug, Default)]
pub(super) struct Findings(Vec<Finding>);

impl Findings {
    pub fn add(&mut self, finding: Finding) {
        self.0.push(finding);
    }

    /// Prints the findings, and returns 1 when there is an error among them.
    pub fn print(&self, is_json: bool) -> ExitCode {
        let count = |level| self.0.iter().filter(|finding| finding.level == level).count();
        let (errors, warnings) = (count(Level::Error), count(Level::Warning));

        if is_json {
            let all = serde_json::json!({
                "errors": errors, "warnings": warnings, "findings": self.0,
            });
            println!("{all}");
        } else {
            self.0.iter().for_each(print_text);
            println!("{errors} errors, {warnings} warnings");
        }

        if errors == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) }
    }
}

fn print_text(finding: &Finding) {
    let level = match finding.level {
        Level::Ok => "ok     ",
        Level::Warning => "warning",
        Level::Error => "ERROR  ",
    };

    println!("{level}  {}: {}", finding.subject, finding.what);
    for sql in &finding.sql {
        println!("         {sql};");
    }
    if let Some(hint) = &finding.hint {
        println!("         {hint}");
    }
}
