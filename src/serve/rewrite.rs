//! Brings what clients write of PostgreSQL's catalogs and casts into a form that DuckDB parses.
//! Nothing else is changed: the dialect is DuckDB's.
//!
//! `schemas/pg_catalog.sql` makes the views and macros that these names lead to.

use std::collections::HashSet;

use super::{
    catalog,
    tokens::{Kind, Token},
};

/// Returns the statement in the words of DuckDB. `ours` are the names in [`catalog::DATABASE`].
pub fn rewrite(statement: Vec<Token>, ours: &HashSet<String>) -> Vec<Token> {
    let is_of_sequences = statement.iter().any(|token| token.is("pg_sequence"));
    let mut rewriter =
        Rewriter { input: statement, at: 0, output: Vec::new(), ours, is_of_sequences, calls: 0 };
    while rewriter.at < rewriter.input.len() {
        if !rewriter.step() {
            rewriter.take(1);
        }
    }
    rewriter.output
}

/// Types that are text here: names of objects, and what only PostgreSQL itself reads.
const TEXT_TYPES: [&str; 14] = [
    "regclass",
    "regtype",
    "regproc",
    "regprocedure",
    "regnamespace",
    "regrole",
    "regoper",
    "name",
    "cstring",
    "pg_node_tree",
    "int2vector",
    "oidvector",
    "bpchar",
    "citext",
];

/// Functions of PostgreSQL that DuckDB has not, or has with another meaning.
const FUNCTIONS: [&str; 20] = [
    "version",
    "current_database",
    "current_catalog",
    "set_config",
    "current_setting",
    "to_char",
    "array_upper",
    "array_lower",
    "array_remove",
    "format_type",
    "obj_description",
    "col_description",
    "shobj_description",
    "quote_ident",
    "parse_ident",
    "to_regtype",
    "to_regclass",
    "_pg_expandarray",
    "json_build_object",
    "getdatabaseencoding",
];

/// Words that may follow a table function without being its alias.
const NO_ALIAS: [&str; 29] = [
    "as",
    "where",
    "join",
    "left",
    "right",
    "full",
    "on",
    "order",
    "limit",
    "group",
    "cross",
    "inner",
    "union",
    "from",
    "with",
    "offset",
    "except",
    "intersect",
    "natural",
    "asof",
    "positional",
    "semi",
    "anti",
    "having",
    "window",
    "using",
    "qualify",
    "tablesample",
    "fetch",
];

struct Rewriter<'a> {
    input: Vec<Token>,
    at: usize,
    output: Vec<Token>,
    ours: &'a HashSet<String>,
    /// The statement asks about sequences, of which there are none.
    is_of_sequences: bool,
    /// How many calls were looked at closely.
    calls: u32,
}

impl Rewriter<'_> {
    fn peek(&self, ahead: usize) -> Option<&Token> {
        self.input.get(self.at + ahead)
    }

    fn name(&self, ahead: usize) -> String {
        self.peek(ahead).and_then(Token::name).unwrap_or_default()
    }

    fn is_word(&self, ahead: usize, word: &str) -> bool {
        self.peek(ahead).is_some_and(|token| token.is(word))
    }

    fn is_sign(&self, ahead: usize, sign: &str) -> bool {
        self.peek(ahead).is_some_and(|token| token.is_sign(sign))
    }

    /// Copies tokens to the output.
    fn take(&mut self, count: usize) {
        self.output.extend(self.input.iter().skip(self.at).take(count).cloned());
        self.at += count;
    }

    fn put(&mut self, kind: Kind, text: impl Into<String>) {
        self.output.push(Token::new(kind, text));
    }

    fn follows_dot(&self) -> bool {
        self.output.last().is_some_and(|token| token.is_sign("."))
    }

    /// Rewrites what begins here, if anything does.
    fn step(&mut self) -> bool {
        self.operator()
            || self.collation()
            || self.cast()
            || self.cast_function()
            || self.qualified_name()
            || self.plain_name()
            || self.function_as_table()
            || self.series()
            || self.no_function()
            || self.vector_item()
    }

    /// `indkey[0]` is the first item: PostgreSQL counts those of its vectors from 0.
    fn vector_item(&mut self) -> bool {
        const VECTORS: [&str; 4] = ["indkey", "indclass", "indcollation", "indoption"];
        if !VECTORS.contains(&self.name(0).as_str()) || !self.is_sign(1, "[") {
            return false;
        }
        // A slice is DuckDB's own.
        let inside = (2..).map_while(|ahead| self.peek(ahead)).take_while(|t| !t.is_sign("]"));
        if inside.take(100).any(|token| token.is_sign(":")) {
            return false;
        }
        self.take(2);
        for token in [(Kind::Number, "1"), (Kind::Sign, "+")] {
            self.put(token.0, token.1);
        }
        true
    }

    /// `typreceive != 0`: names of functions are text here, and `-` says that there is none.
    fn no_function(&mut self) -> bool {
        const COLUMNS: [&str; 4] = ["typreceive", "typsend", "typinput", "typoutput"];
        if !COLUMNS.contains(&self.name(0).as_str()) {
            return false;
        }
        let len = match (self.peek(1), self.peek(2)) {
            (Some(one), Some(two))
                if (one.is_sign("!") || one.is_sign("<"))
                    && (two.is_sign("=") || two.is_sign(">")) =>
            {
                3
            }
            (Some(one), _) if one.is_sign("=") => 2,
            _ => return false,
        };
        if self.peek(len).is_none_or(|token| token.text != "0") {
            return false;
        }
        self.take(len);
        self.put(Kind::Text, "'-'");
        self.at += 1;
        true
    }

    /// `OPERATOR(pg_catalog.~)` is `~`.
    fn operator(&mut self) -> bool {
        if !(self.is_word(0, "operator") && self.is_sign(1, "(")) {
            return false;
        }
        let start = if self.name(2) == "pg_catalog" { 4 } else { 2 };
        let Some(len) = (start..).find(|&ahead| self.peek(ahead).is_none_or(|t| t.is_sign(")")))
        else {
            return false;
        };

        let signs: String = (start..len)
            .filter_map(|ahead| self.peek(ahead).map(|token| token.text.as_str()))
            .collect();
        self.put(Kind::Sign, signs);
        self.at += len + 1;
        true
    }

    /// Collations of PostgreSQL's catalogs; the order of text is that of its bytes here.
    fn collation(&mut self) -> bool {
        if !self.is_word(0, "collate") {
            return false;
        }
        let (name, len) = if self.is_sign(2, ".") { (self.name(3), 4) } else { (self.name(1), 2) };
        if !["default", "c", "posix", "ucs_basic"].contains(&name.to_lowercase().as_str()) {
            return false;
        }
        self.at += len;
        true
    }

    /// `x::pg_catalog.regclass` and other types that DuckDB has under another name, or not.
    fn cast(&mut self) -> bool {
        if !self.is_sign(0, "::") {
            return false;
        }
        let len = if self.name(1) == "pg_catalog" && self.is_sign(2, ".") { 3 } else { 1 };
        let to = self.name(len);

        if to == "regclass" && self.looks_up_last() {
            self.at += len + 1;
            return true;
        }
        match self.other_type(len) {
            Some(other) => {
                self.take(1);
                self.put(Kind::Word, other);
                self.at += len;
            }
            None if len == 3 => {
                self.take(1);
                self.at += 2;
            }
            None => return false,
        }
        true
    }

    /// `CAST(x AS regclass)`
    fn cast_function(&mut self) -> bool {
        if !self.is_word(0, "as") {
            return false;
        }
        let len = if self.name(1) == "pg_catalog" && self.is_sign(2, ".") { 3 } else { 1 };
        if !self.is_sign(len + 1, ")") {
            return false;
        }
        let Some(other) = self.other_type(len) else { return false };
        self.take(1);
        self.put(Kind::Word, other);
        self.at += len;
        true
    }

    /// Returns the type that stands for the one at a place.
    fn other_type(&self, ahead: usize) -> Option<&'static str> {
        let token = self.peek(ahead)?;
        let name = token.name()?;
        match name.as_str() {
            "jsonb" => Some("JSON"),
            "oid" | "xid" | "cid" => Some("UINTEGER"),
            "char" if token.kind == Kind::Quoted => Some("VARCHAR"),
            name if TEXT_TYPES.contains(&name) => Some("VARCHAR"),
            _ => None,
        }
    }

    /// `'public.t'::regclass` and `$1::regclass` are looked up: such a cast gives an oid.
    fn looks_up_last(&mut self) -> bool {
        let Some(last) =
            self.output.pop_if(|last| matches!(last.kind, Kind::Text | Kind::Parameter))
        else {
            return false;
        };
        self.put(Kind::Word, format!("{}.regclass(", catalog::DATABASE));
        self.output.push(last);
        self.output.push(Token { is_spaced: false, ..Token::new(Kind::Sign, ")") });
        true
    }

    /// `pg_catalog.x` is ours, or else found without its schema; `information_schema.x` likewise.
    fn qualified_name(&mut self) -> bool {
        let schema = self.name(0);
        if schema == "_rhei" && self.is_sign(1, ".") && self.name(2) == "freshness" {
            self.put(Kind::Word, format!("{}.freshness", catalog::DATABASE));
            self.at += 3;
            return true;
        }
        if !["pg_catalog", "information_schema"].contains(&schema.as_str())
            || !self.is_sign(1, ".")
            || self.follows_dot()
        {
            return false;
        }

        let name = self.name(2);
        if schema == "information_schema" {
            let ours = format!("information_schema_{name}");
            if self.ours.contains(&ours) {
                self.put(Kind::Word, format!("{}.{ours}", catalog::DATABASE));
                self.at += 3;
                return true;
            }
            if !self.ours.contains(&name) {
                return false;
            }
        }

        if self.ours.contains(&name) {
            self.put(Kind::Word, format!("{}.{name}", catalog::DATABASE));
            self.at += 3;
        } else {
            let is_spaced = self.peek(0).is_some_and(|token| token.is_spaced);
            self.at += 2;
            if let Some(name) = self.input.get_mut(self.at) {
                name.is_spaced = is_spaced;
            }
        }
        true
    }

    /// Tables and functions of PostgreSQL's catalogs are found without their schema.
    fn plain_name(&mut self) -> bool {
        let Some(token) = self.peek(0).filter(|token| token.kind == Kind::Word) else {
            return false;
        };
        let name = token.text.to_lowercase();
        if ["json_build_object", "jsonb_build_object"].contains(&name.as_str())
            && self.is_sign(1, "(")
            && !self.is_of_sequences
        {
            self.put(Kind::Word, "json_object");
            self.at += 1;
            return true;
        }
        if self.follows_dot() || self.is_sign(1, ".") || !self.ours.contains(&name) {
            return false;
        }

        let is_function = self.is_sign(1, "(");
        if name == "current_catalog" && !is_function {
            self.put(Kind::Word, format!("{}.current_database()", catalog::DATABASE));
            self.at += 1;
            return true;
        }
        if !(name.starts_with("pg_") || is_function && FUNCTIONS.contains(&name.as_str())) {
            return false;
        }
        self.put(Kind::Word, format!("{}.{name}", catalog::DATABASE));
        self.at += 1;
        true
    }

    /// Returns the keyword whose list the place is in; none within a call.
    fn clause(&self) -> Option<&'static str> {
        const CLAUSES: [&str; 9] =
            ["select", "from", "join", "where", "on", "having", "by", "lateral", "in"];
        let mut depth = 0;
        for (at, token) in self.output.iter().enumerate().rev() {
            depth += i32::from(token.is_sign(")")) - i32::from(token.is_sign("("));
            if depth < 0 {
                return None;
            }
            // `IS DISTINCT FROM` and `DISTINCT ON` begin no list.
            let before = at.checked_sub(1).and_then(|at| self.output.get(at));
            if depth == 0
                && let Some(clause) = CLAUSES.into_iter().find(|word| token.is(word))
                && !(["from", "on"].contains(&clause) && before.is_some_and(|t| t.is("distinct")))
            {
                return Some(clause);
            }
        }
        None
    }

    /// Counts a call that may have to be rewritten. Returns `false` when there were too many: each
    /// is looked up in the whole statement, which takes time that no timeout ends.
    fn count_call(&mut self) -> bool {
        const MAX_CALLS: u32 = 100;
        self.calls += 1;
        self.calls <= MAX_CALLS
    }

    /// Returns how far the parenthesis that ends the call is away, which begins here.
    fn end_of_call(&self) -> Option<usize> {
        let mut depth = 0;
        let end = (1..).find(|&ahead| {
            let Some(token) = self.peek(ahead) else { return true };
            depth += i32::from(token.is_sign("(")) - i32::from(token.is_sign(")"));
            depth == 0
        })?;
        self.peek(end).is_some().then_some(end)
    }

    /// Returns the alias behind what ends at a place, and where it is.
    fn alias_behind(&self, end: usize) -> Option<(usize, Token)> {
        let at = if self.is_word(end + 1, "as") { end + 2 } else { end + 1 };
        let alias = self.peek(at)?;
        let is_alias = alias.name().is_some_and(|name| !NO_ALIAS.contains(&name.as_str()))
            && !self.is_sign(at + 1, "(");
        is_alias.then(|| (at, alias.clone()))
    }

    /// Repeats an alias as the name of the one column: `s` becomes `s(s)`.
    fn name_column(&mut self, (ahead, alias): (usize, Token)) {
        let at = self.at + ahead + 1;
        let close = |sign| Token { is_spaced: false, ..Token::new(Kind::Sign, sign) };
        let column = Token { is_spaced: false, ..alias };
        self.input.splice(at..at, [close("("), column, close(")")]);
    }

    /// Returns whether a call of `generate_series` begins here that asks as only PostgreSQL is
    /// asked: for the places of an array.
    fn is_series_of_array(&self) -> bool {
        self.is_word(0, "generate_series") && self.is_sign(1, "(") && self.name(2) == "array_lower"
    }

    /// `FROM string_to_array('a,b', ',') s`: any function may stand for a table in PostgreSQL. So
    /// may a series whose ends are subqueries here.
    fn function_as_table(&mut self) -> bool {
        let is_series = self.is_series_of_array();
        let is_array = self.name(0) == "string_to_array" && self.is_sign(1, "(");
        let is_item = self
            .output
            .last()
            .is_some_and(|last| last.is_sign(",") || last.is("from") || last.is("join"));
        if !(is_item && (is_series || is_array) && self.count_call()) {
            return false;
        }
        if !matches!(self.clause(), Some("from" | "join")) {
            return false;
        }
        let Some(end) = self.end_of_call() else { return false };
        let Some(alias) = self.alias_behind(end) else { return false };

        self.name_column(alias);
        self.put(Kind::Sign, "(");
        self.put(Kind::Word, "SELECT");
        let at = self.at + end + 1;
        self.input.insert(at, Token { is_spaced: false, ..Token::new(Kind::Sign, ")") });
        if is_series {
            self.take_series()
        } else {
            self.take(1)
        }
        true
    }

    /// Replaces `generate_series` by the macro that gives a row for each number in a select list.
    fn take_series(&mut self) {
        self.put(Kind::Word, format!("{}.series_of_array", catalog::DATABASE));
        self.at += 1;
    }

    /// `generate_series(1, 3) s`: the alias names a value in PostgreSQL, a row in DuckDB. In a
    /// select list it is DuckDB's own, which makes a list, unless it begins with a function that
    /// only PostgreSQL has: drivers want a row for each item of an array then.
    fn series(&mut self) -> bool {
        if !(self.is_word(0, "generate_series") && self.is_sign(1, "(") && self.count_call()) {
            return false;
        }
        let Some(end) = self.end_of_call() else { return false };

        if self.clause() == Some("select") {
            let is_of_array = self.is_series_of_array();
            if is_of_array {
                self.take_series();
            }
            return is_of_array;
        }

        // What is inside the parentheses may need rewriting too, so only the alias is doubled.
        let Some(alias) = self.alias_behind(end) else { return false };
        self.name_column(alias);
        self.take(1);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::tokens::{text, tokens};

    fn rewritten(sql: &str) -> String {
        let ours = ["pg_class", "pg_get_expr", "version", "information_schema_tables"];
        text(&rewrite(tokens(sql), &ours.map(str::to_owned).into()))
    }

    /// Each of them is looked up in the whole statement.
    #[test]
    fn only_some_calls_of_one_statement_are_rewritten() {
        let calls = (0..500).map(|at| format!("string_to_array('a', ',') s{at}"));
        let sql = format!("SELECT 1 FROM {}", calls.collect::<Vec<_>>().join(", "));
        assert_eq!(rewritten(&sql).matches("( SELECT").count(), 100);
    }

    #[test]
    fn names_of_the_catalogs_lead_to_our_views() {
        for (sql, expected) in [
            ("SELECT * FROM pg_catalog.pg_class c", "SELECT * FROM _pg.pg_class c"),
            ("SELECT pg_class.oid FROM pg_class", "SELECT pg_class.oid FROM _pg.pg_class"),
            ("SELECT version()", "SELECT _pg.version()"),
            ("SELECT version FROM t", "SELECT version FROM t"),
            ("SELECT pg_catalog.lower('A')", "SELECT lower('A')"),
            ("CASE ELSE pg_catalog.lower('A')", "CASE ELSE lower('A')"),
            ("FROM information_schema.tables", "FROM _pg.information_schema_tables"),
            ("FROM information_schema.other", "FROM information_schema.other"),
            ("SELECT 'pg_catalog.pg_class'", "SELECT 'pg_catalog.pg_class'"),
        ] {
            assert_eq!(rewritten(sql), expected);
        }
    }

    #[test]
    fn casts_and_operators_become_those_of_duckdb() {
        for (sql, expected) in [
            ("a OPERATOR(pg_catalog.~) 'x'", "a ~ 'x'"),
            ("x::pg_catalog.text", "x::text"),
            ("'public.t'::regclass", "_pg.regclass('public.t')"),
            ("$1::pg_catalog.regclass", "_pg.regclass($1)"),
            ("c.oid::regclass", "c.oid:: VARCHAR"),
            ("x::jsonb", "x:: JSON"),
            ("CAST(x AS regtype)", "CAST(x AS VARCHAR)"),
            ("x COLLATE pg_catalog.default", "x"),
            ("x::\"char\"", "x:: VARCHAR"),
            ("FROM generate_series(1, 3) s", "FROM generate_series(1, 3) s(s)"),
            ("FROM generate_series(1, 3) WHERE", "FROM generate_series(1, 3) WHERE"),
            (
                "SELECT s[1] FROM t AS i, string_to_array('a', ',') s",
                "SELECT s[1] FROM t AS i, ( SELECT string_to_array('a', ',')) s(s)",
            ),
            (
                "SELECT a IS DISTINCT FROM b AS c, string_to_array('a', ',') s",
                "SELECT a IS DISTINCT FROM b AS c, string_to_array('a', ',') s",
            ),
            ("FROM generate_series(1, 3) EXCEPT", "FROM generate_series(1, 3) EXCEPT"),
            ("SELECT indkey[0], indkey[0:1]", "SELECT indkey[ 1 +0], indkey[0:1]"),
            ("SELECT string_to_array('a', ',') s", "SELECT string_to_array('a', ',') s"),
            ("SELECT a, generate_series(1, 3) AS s", "SELECT a, generate_series(1, 3) AS s"),
            (
                "SELECT (b), generate_series(array_lower(k, 1), 3) AS i FROM t",
                "SELECT (b), _pg.series_of_array(array_lower(k, 1), 3) AS i FROM t",
            ),
        ] {
            assert_eq!(rewritten(sql), expected);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_statement_is_rewritten_without_a_panic(sql in "[a-z_.:()' $\"1]{0,60}") {
            let _ = rewritten(&sql);
        }
    }
}
