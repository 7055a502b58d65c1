//! What a statement asks for: a query goes to DuckDB, everything else is answered here.

use super::{
    error::SqlError,
    settings::Scope,
    tokens::{Kind, Token, text},
};

/// What a client asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    Query(Vec<Token>),
    Begin,
    Commit,
    Rollback,
    /// A setting of the session. It is taken, or answered with what holds anyway.
    Set {
        name: String,
        value: String,
        scope: Scope,
    },
    Show(String),
    /// Brings one setting back, or all of them.
    Reset {
        name: Option<String>,
        tag: &'static str,
    },
    /// A statement that changes nothing here, by its command tag.
    Nothing(&'static str),
    CopyOut {
        query: Vec<Token>,
        format: CopyFormat,
    },
    Declare {
        name: String,
        query: Vec<Token>,
        is_held: bool,
    },
    Fetch {
        name: String,
        count: Count,
        moves_only: bool,
    },
    /// A cursor, or all of them.
    Close(Option<String>),
    /// A prepared statement of SQL, or all of them.
    Deallocate,
}

/// How many rows a FETCH returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    Rows(u64),
    All,
}

/// The format of COPY .. TO STDOUT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyFormat {
    pub kind: CopyKind,
    pub has_header: bool,
    pub delimiter: u8,
    pub null: String,
    pub quote: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyKind {
    Text,
    Csv,
    Binary,
    /// A stream of Arrow's IPC format, which PostgreSQL has not.
    Arrow,
}

impl Default for CopyFormat {
    fn default() -> Self {
        Self::of(CopyKind::Text)
    }
}

impl CopyFormat {
    fn of(kind: CopyKind) -> Self {
        let (delimiter, null) = match kind {
            CopyKind::Csv => (b',', ""),
            CopyKind::Text | CopyKind::Binary | CopyKind::Arrow => (b'\t', "\\N"),
        };
        Self { kind, has_header: false, delimiter, null: null.to_owned(), quote: b'"' }
    }
}

fn refused<R>(code: &'static str, message: impl Into<String>) -> Result<R, SqlError> {
    Err(SqlError::new(code, message))
}

impl Command {
    /// Returns what a statement asks for. The statement is not empty.
    pub fn of(statement: Vec<Token>) -> Result<Self, SqlError> {
        let word = |at: usize| {
            statement
                .get(at)
                .filter(|token| token.kind == Kind::Word)
                .map_or_else(String::new, |token| token.text.to_ascii_lowercase())
        };

        match (word(0).as_str(), word(1).as_str()) {
            ("begin" | "start", _) => Ok(Self::Begin),
            ("commit" | "end", "prepared") => {
                refused("0A000", "there are no prepared transactions")
            }
            ("commit" | "end", _) => Ok(Self::Commit),
            ("rollback", "to") => Ok(Self::Nothing("ROLLBACK")),
            ("rollback" | "abort", _) => Ok(Self::Rollback),
            ("savepoint", _) => Ok(Self::Nothing("SAVEPOINT")),
            ("release", _) => Ok(Self::Nothing("RELEASE")),
            ("set", _) => set(&statement),
            ("reset", name) => Ok(Self::Reset {
                name: (name != "all")
                    .then(|| text(statement.get(1..).unwrap_or_default()))
                    .map(|name| name.to_lowercase()),
                tag: "RESET",
            }),
            ("discard", "all") => Ok(Self::Reset { name: None, tag: "DISCARD ALL" }),
            ("discard", _) => Ok(Self::Nothing("DISCARD")),
            ("deallocate", _) => Ok(Self::Deallocate),
            ("listen" | "unlisten", _) => Ok(Self::Nothing("LISTEN")),
            ("lock", _) => Ok(Self::Nothing("LOCK TABLE")),
            ("show", "tables" | "databases" | "schemas") => Ok(Self::Query(statement)),
            ("show", _) => Ok(Self::Show(show(&statement))),
            ("copy", _) => copy(&statement),
            ("declare", _) => declare(&statement),
            ("fetch", _) => fetch(&statement, false),
            ("move", _) => fetch(&statement, true),
            ("close", "all") => Ok(Self::Close(None)),
            ("close", _) => Ok(Self::Close(statement.get(1).and_then(Token::name))),
            _ => Ok(Self::Query(statement)),
        }
    }
}

/// `SET [SESSION | LOCAL] name {TO | =} value`, and the forms of it with words.
fn set(statement: &[Token]) -> Result<Command, SqlError> {
    let mut rest = statement.get(1..).unwrap_or_default();
    let is_local = rest.first().is_some_and(|first| first.is("local"));
    let scope = if is_local { Scope::Transaction } else { Scope::Session };
    while let [first, after @ ..] = rest
        && (first.is("session") || first.is("local"))
    {
        rest = after;
    }

    let Some(first) = rest.first() else {
        return refused("42601", "SET needs the name of a setting");
    };
    if first.is("transaction") || first.is("characteristics") {
        return Ok(Command::Nothing("SET"));
    }
    if first.is("time") && rest.get(1).is_some_and(|token| token.is("zone")) {
        let value = rest.get(2).map(value_of).unwrap_or_default();
        return Ok(Command::Set { name: "timezone".to_owned(), value, scope });
    }

    let name_len = rest.iter().position(|token| token.is_sign("=") || token.is("to"));
    let Some(name_len) = name_len else { return Ok(Command::Nothing("SET")) };
    let name = text(rest.get(..name_len).unwrap_or_default()).to_lowercase();
    let given = rest.get(name_len + 1..).unwrap_or_default();
    if let [value] = given
        && value.is("default")
    {
        return Ok(Command::Reset { name: Some(name), tag: "SET" });
    }

    // A list of names is read again, so that a name in quotes keeps them.
    let is_list = name == "search_path";
    let value = |token: &Token| match token.kind {
        Kind::Quoted if is_list => token.text.clone(),
        _ => value_of(token),
    };
    let given = given.iter().filter(|token| !token.is_sign(","));
    let values: Vec<String> = given.map(value).collect();
    Ok(Command::Set { name, value: values.join(", "), scope })
}

fn value_of(token: &Token) -> String {
    token.text_value().or_else(|| token.name()).unwrap_or_else(|| token.text.clone())
}

fn show(statement: &[Token]) -> String {
    let words: Vec<String> =
        statement.iter().skip(1).map(|token| token.name().unwrap_or_default()).collect();
    match words.join(" ").as_str() {
        "transaction isolation level" => "transaction_isolation".to_owned(),
        "time zone" => "timezone".to_owned(),
        "session authorization" => "session_authorization".to_owned(),
        other => other.replace(' ', "."),
    }
}

/// `COPY { table [(columns)] | (query) } TO STDOUT [[WITH] (options)]`
fn copy(statement: &[Token]) -> Result<Command, SqlError> {
    let wrong = "this endpoint reads: COPY table or (SELECT ..) TO STDOUT";
    let mut depth = 0_i32;
    let to = statement.iter().position(|token| {
        depth += i32::from(token.is_sign("(")) - i32::from(token.is_sign(")"));
        depth == 0 && (token.is("to") || token.is("from"))
    });
    let Some(to) = to.filter(|&to| statement.get(to).is_some_and(|token| token.is("to"))) else {
        return refused("25006", wrong);
    };
    if !statement.get(to + 1).is_some_and(|token| token.is("stdout")) {
        return refused("42501", wrong);
    }

    let source = statement.get(1..to).unwrap_or_default();
    let query = match source {
        [open, inner @ .., close] if open.is_sign("(") && close.is_sign(")") => inner.to_vec(),
        _ => {
            let name_len =
                source.iter().position(|token| token.is_sign("(")).unwrap_or(source.len());
            let (name, columns) = source.split_at(name_len);
            let columns = columns.get(1..columns.len().saturating_sub(1)).unwrap_or_default();
            let mut query = vec![Token::new(Kind::Word, "SELECT")];
            if columns.is_empty() {
                query.push(Token::new(Kind::Sign, "*"));
            } else {
                query.extend(columns.iter().cloned().map(spaced));
            }
            query.push(Token::new(Kind::Word, "FROM"));
            query.extend(name.iter().cloned());
            query
        }
    };

    let format = copy_format(statement.get(to + 2..).unwrap_or_default())?;
    Ok(Command::CopyOut { query, format })
}

fn spaced(token: Token) -> Token {
    Token { is_spaced: true, ..token }
}

/// Both the options in parentheses and the older ones in a row.
fn copy_format(options: &[Token]) -> Result<CopyFormat, SqlError> {
    let mut words = options
        .iter()
        .filter(|token| !(token.is_sign("(") || token.is_sign(")") || token.is_sign(",")))
        .peekable();
    let mut kind = CopyKind::Text;
    let (mut has_header, mut delimiter, mut null, mut quote) = (false, None, None, None);

    while let Some(word) = words.next() {
        match value_of(word).to_ascii_lowercase().as_str() {
            "with" | "format" | "as" => {}
            "text" => kind = CopyKind::Text,
            "csv" => kind = CopyKind::Csv,
            "binary" => kind = CopyKind::Binary,
            "arrow" => kind = CopyKind::Arrow,
            "header" => {
                let value = words.peek().map(|token| value_of(token).to_lowercase());
                let is_value =
                    |value: &&str| matches!(*value, "true" | "false" | "on" | "off" | "1" | "0");
                let value = value.as_deref().filter(is_value);
                has_header = !matches!(value, Some("false" | "off" | "0"));
                if value.is_some() {
                    words.next();
                }
            }
            "delimiter" => delimiter = words.next().map(value_of),
            "null" => null = words.next().map(value_of),
            "quote" => quote = words.next().map(value_of),
            "encoding" => {
                words.next();
            }
            other => return refused("0A000", format!("COPY has no option {other} here")),
        }
    }

    let mut format = CopyFormat { has_header, ..CopyFormat::of(kind) };
    let byte = |text: Option<String>, default| match text.as_deref().map(str::as_bytes) {
        None => Ok(default),
        Some([byte]) => Ok(*byte),
        Some(_) => refused("22023", "a delimiter or quote of COPY is one byte"),
    };
    format.delimiter = byte(delimiter, format.delimiter)?;
    format.quote = byte(quote, format.quote)?;
    format.null = null.unwrap_or(format.null);
    Ok(format)
}

/// `DECLARE name .. CURSOR [WITH HOLD] FOR query`
fn declare(statement: &[Token]) -> Result<Command, SqlError> {
    let wrong = "DECLARE needs a name and a query: DECLARE c CURSOR FOR SELECT ..";
    let name = statement.get(1).and_then(Token::name);
    let start = statement.iter().position(|token| token.is("for"));
    let (Some(name), Some(start)) = (name, start) else { return refused("42601", wrong) };

    let (head, query) = statement.split_at(start);
    if head.iter().any(|token| token.is("scroll")) && !head.iter().any(|token| token.is("no")) {
        return refused("0A000", "cursors only move forward here: leave out SCROLL");
    }
    let is_held = head.windows(2).any(|two| two[0].is("with") && two[1].is("hold"));
    let query = query.get(1..).unwrap_or_default().to_vec();
    if query.is_empty() {
        return refused("42601", wrong);
    }
    Ok(Command::Declare { name, query, is_held })
}

/// `FETCH [NEXT | FORWARD [n | ALL] | n | ALL] [FROM | IN] name`
fn fetch(statement: &[Token], moves_only: bool) -> Result<Command, SqlError> {
    let Some(name) = statement.last().filter(|_| statement.len() > 1).and_then(Token::name) else {
        return refused("42601", "FETCH needs the name of a cursor");
    };

    let mut count = Count::Rows(1);
    for token in statement.get(1..statement.len() - 1).unwrap_or_default() {
        if token.is("all") {
            count = Count::All;
        } else if token.kind == Kind::Number {
            count = match token.text.parse() {
                Ok(rows) => Count::Rows(rows),
                Err(_) => return refused("22023", format!("{} is no number of rows", token.text)),
            };
        } else if !["next", "forward", "from", "in"].iter().any(|word| token.is(word)) {
            return refused("0A000", "cursors only move forward here: FETCH FORWARD n FROM c");
        }
    }
    Ok(Command::Fetch { name, count, moves_only })
}
