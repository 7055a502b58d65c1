//! Which statements a reader may run: one SELECT that names only what is known to be harmless.
//!
//! DuckDB serialises a SELECT, and only a SELECT, as JSON. Each table and each function in it has
//! to be allowed: `functions_allowed.txt` holds the functions, and a test holds it to DuckDB's own
//! list. What is not allowed writes, reaches outside of the file, changes settings, runs text as
//! SQL (which hides names from this check), or takes memory or time that no limit sees.

use std::collections::HashSet;

use serde_json::Value;

use super::{catalog, error::SqlError};
use crate::olap::names;

/// The functions that readers may call, one in a line.
const ALLOWED: &str = include_str!("functions_allowed.txt");

/// The functions that may stand for a table. None of them reads a file, or takes the name of a
/// table as text.
const TABLE_FUNCTIONS: [&str; 18] = [
    "duckdb_columns",
    "duckdb_constraints",
    "duckdb_functions",
    "duckdb_indexes",
    "duckdb_keywords",
    "duckdb_schemas",
    "duckdb_sequences",
    "duckdb_tables",
    "duckdb_types",
    "duckdb_views",
    "generate_series",
    "icu_calendar_names",
    "json_each",
    "json_tree",
    "pg_timezone_names",
    "pragma_version",
    "range",
    "unnest",
];

/// Databases and schemas of this process that readers may not name.
const HIDDEN: [&str; 6] = ["memory", "temp", "system", "rhei_next", "rhei_publish", "pg_catalog"];

/// The most that DuckDB has to plan: nothing ends a planning before its time.
const MAX_JSON_BYTES: usize = 4 << 20;
const MAX_SET_OPERATIONS: u32 = 300;
/// Select lists with several stars; each may double the columns of the one before.
const MAX_DOUBLED_LISTS: u32 = 10;

/// Wildcards of a pattern that mixes those of any length with those of one sign: matching takes
/// time that grows with the text to the power of their number.
const MAX_WILDCARDS: usize = 3;

const PATTERN_FUNCTIONS: [&str; 10] = [
    "~~",
    "!~~",
    "~~*",
    "!~~*",
    "~~~",
    "like_escape",
    "not_like_escape",
    "ilike_escape",
    "not_ilike_escape",
    "glob",
];

/// The longest text that a function of padding or repetition makes: DuckDB makes it in one step,
/// which nothing can end.
const MAX_PADDING: u64 = 10_000;

/// The error for a pattern of LIKE that DuckDB could match for hours, in a step that no interrupt
/// ends.
pub const PATTERN_REFUSED: &str = "this pattern of LIKE is refused: with more than three % beside \
                                   a _, or made from columns, matching it could take hours";
pub const PATTERN_HINT: &str = "use regexp_matches, contains or starts_with, or a simpler pattern";

/// Decides what readers may run.
pub struct Guard {
    functions: HashSet<String>,
}

impl Guard {
    /// `ours` are the functions of [`catalog::DATABASE`].
    pub fn new(ours: &HashSet<String>) -> Self {
        let allowed = ALLOWED.lines().filter(|line| !line.is_empty());
        // What DuckDB's binder knows without a function of the name.
        let allowed = allowed.chain(["unnest"]).map(str::to_owned);
        Self { functions: allowed.chain(ours.iter().cloned()).collect() }
    }

    /// Checks a statement that DuckDB has serialised. `exists` tells whether the copy has a table
    /// of this name.
    ///
    /// # Errors
    /// The statement is no SELECT, or it names something that is not allowed.
    pub fn check(&self, json: &str, exists: &dyn Fn(&str) -> bool) -> Result<(), SqlError> {
        let refused = |code, message: &str| Err(SqlError::new(code, message));
        if json.len() > MAX_JSON_BYTES {
            return refused("54001", "the statement is too complex");
        }
        let Ok(tree) = serde_json::from_str::<Value>(json) else {
            return refused("54001", "the statement is nested too deeply");
        };

        if tree["error"] == true {
            let message = tree["error_message"].as_str().unwrap_or_default();
            return match tree["error_type"].as_str() {
                Some("not implemented") => refused(
                    "25006",
                    "this copy is read-only: only SELECT, and one statement at a time",
                ),
                _ => refused("42601", message),
            };
        }
        if tree["statements"].as_array().is_none_or(|statements| statements.len() != 1) {
            return refused("42601", "one statement at a time");
        }
        let mut size = Size::default();
        size.measure(&tree);
        if size.set_operations > MAX_SET_OPERATIONS || size.doubled_lists > MAX_DOUBLED_LISTS {
            return refused("54001", "the statement is too complex");
        }
        self.walk(&tree, exists)
    }

    fn walk(&self, node: &Value, exists: &dyn Fn(&str) -> bool) -> Result<(), SqlError> {
        match node {
            Value::Object(fields) => {
                let text = |name: &str| fields.get(name).and_then(Value::as_str);
                match text("type") {
                    // A table by its name, also that of DESCRIBE and SHOW.
                    Some("BASE_TABLE" | "SHOW_REF") => table(node, exists)?,
                    Some("TABLE_FUNCTION") => {
                        return self.table_function(fields, exists);
                    }
                    _ => {}
                }
                if let Some(name) = text("function_name") {
                    self.function(name, node)?;
                }
                // A state of an aggregate is memory that a reader could write, and making a VARIANT
                // of text goes as deep as the text says.
                if node["export_state"] == true || text("id") == Some("VARIANT") {
                    return Err(SqlError::new(
                        "42501",
                        "permission denied for EXPORT_STATE and casts to VARIANT",
                    ));
                }
                fields.values().try_for_each(|field| self.walk(field, exists))
            }
            Value::Array(items) => items.iter().try_for_each(|item| self.walk(item, exists)),
            _ => Ok(()),
        }
    }

    /// Checks a function in the place of a table, and what it is called with.
    fn table_function(
        &self,
        fields: &serde_json::Map<String, Value>,
        exists: &dyn Fn(&str) -> bool,
    ) -> Result<(), SqlError> {
        let function = fields.get("function").unwrap_or(&Value::Null);
        let name = function["function_name"].as_str().unwrap_or_default().to_lowercase();
        let is_plain = ["schema", "catalog"]
            .iter()
            .all(|part| ["", "main"].contains(&function[*part].as_str().unwrap_or_default()));
        if !is_plain || !TABLE_FUNCTIONS.contains(&name.as_str()) {
            return Err(SqlError::new(
                "42501",
                format!("permission denied for table function {name}"),
            ));
        }

        let others = fields.iter().filter(|(name, _)| *name != "function");
        let mut inside: Vec<&Value> = others.map(|(_, field)| field).collect();
        if let Value::Object(call) = function {
            inside.extend(call.iter().filter(|(name, _)| *name != "function_name").map(|(_, v)| v));
        }
        inside.into_iter().try_for_each(|field| self.walk(field, exists))
    }

    fn function(&self, name: &str, node: &Value) -> Result<(), SqlError> {
        let lower = name.to_lowercase();
        let refused = |message: String| Err(SqlError::new("42501", message));

        let schema = node["schema"].as_str().unwrap_or_default();
        let catalog = node["catalog"].as_str().unwrap_or_default();
        let is_ours = [schema, catalog].contains(&catalog::DATABASE);
        if !(is_ours || [schema, catalog].iter().all(|part| ["", "main"].contains(part))) {
            return refused(format!("permission denied for function {schema}.{name}"));
        }
        if !self.functions.contains(&lower) {
            return refused(format!("permission denied for function {name}"));
        }

        let is_bounded = match lower.as_str() {
            "lpad" | "rpad" => is_small_number(&node["children"][1]),
            "repeat" => {
                node["children"][0]["class"] == "CONSTANT" && is_small_number(&node["children"][1])
            }
            "format" | "printf" => is_plain_format(&node["children"][0]),
            _ => true,
        };
        if PATTERN_FUNCTIONS.contains(&lower.as_str()) && !is_plain_pattern(&node["children"][1]) {
            return Err(SqlError::new("42501", PATTERN_REFUSED).hint(PATTERN_HINT));
        }
        if is_bounded {
            return Ok(());
        }
        refused(format!(
            "function {name} needs a constant of at most {MAX_PADDING} here: what it makes in one \
             step cannot be ended"
        ))
    }
}

/// Checks a table that a statement names.
fn table(node: &Value, exists: &dyn Fn(&str) -> bool) -> Result<(), SqlError> {
    let part = |name: &str| node[name].as_str().unwrap_or_default().to_lowercase();
    let (catalog, schema, name) = (part("catalog_name"), part("schema_name"), part("table_name"));

    let is_of_duckdb = name.starts_with("duckdb_") || name.starts_with("pragma_");
    if is_of_duckdb && !TABLE_FUNCTIONS.contains(&name.as_str()) {
        return Err(SqlError::new("42501", format!("permission denied for relation {name}")));
    }

    let is_known = ["", names::CATALOG, catalog::DATABASE].contains(&catalog.as_str());
    if !is_known || HIDDEN.contains(&schema.as_str()) {
        let parts = [catalog, schema, name].into_iter().filter(|part| !part.is_empty());
        let relation = parts.collect::<Vec<_>>().join(".");
        let message = format!("permission denied for relation {relation}");
        return Err(SqlError::new("42501", message));
    }

    // DuckDB takes such a name for a file, if it is none of a table.
    let is_file_like = name.contains(['.', '/', '\\', '*', '?', ':']);
    if is_file_like && !exists(&name) {
        return Err(SqlError::new("42P01", format!("relation \"{name}\" does not exist")));
    }
    Ok(())
}

fn is_small_number(node: &Value) -> bool {
    let value = &node["value"]["value"];
    node["class"] == "CONSTANT" && value.as_u64().is_some_and(|value| value <= MAX_PADDING)
}

/// A format whose widths have at most four digits, and are no values, as in `{:{}}`.
fn is_plain_format(node: &Value) -> bool {
    let Some(format) = node["value"]["value"].as_str() else { return false };
    let (mut digits, mut depth) = (0, 0);
    node["class"] == "CONSTANT"
        && format.chars().all(|sign| {
            digits = if sign.is_ascii_digit() { digits + 1 } else { 0 };
            depth += i32::from(sign == '{') - i32::from(sign == '}');
            digits <= 4 && sign != '*' && depth <= 1
        })
}

/// A pattern that is put together from constants and at most two parameters. The values of
/// parameters are checked when they come ([`is_plain_text`]).
fn is_plain_pattern(node: &Value) -> bool {
    const MAX_PARAMETERS: usize = 2;
    let (mut constants, mut parameters) = (String::new(), 0);
    gather_pattern(node, &mut constants, &mut parameters)
        && is_plain_text(&constants)
        && parameters <= MAX_PARAMETERS
}

/// Appends the constants of a pattern, and counts its parameters. Returns `false` when the pattern
/// is made of anything else.
fn gather_pattern(node: &Value, constants: &mut String, parameters: &mut usize) -> bool {
    match node["class"].as_str() {
        Some("CONSTANT") => {
            constants.push_str(node["value"]["value"].as_str().unwrap_or_default());
            true
        }
        Some("PARAMETER") => {
            *parameters += 1;
            true
        }
        Some("CAST") => gather_pattern(&node["child"], constants, parameters),
        Some("FUNCTION")
            if ["||", "concat"].contains(&node["function_name"].as_str().unwrap_or_default()) =>
        {
            let parts = node["children"].as_array().map(Vec::as_slice).unwrap_or_default();
            !parts.is_empty()
                && parts.iter().all(|part| gather_pattern(part, constants, parameters))
        }
        _ => false,
    }
}

/// Returns whether a text is matched soon when it is a pattern.
pub fn is_plain_text(pattern: &str) -> bool {
    let count = |sign: char| pattern.matches(sign).count();
    (count('_') == 0 || count('%') <= MAX_WILDCARDS)
        && (count('?') == 0 || count('*') <= MAX_WILDCARDS)
}

/// How much there is to plan.
#[derive(Default)]
struct Size {
    set_operations: u32,
    doubled_lists: u32,
}

impl Size {
    fn measure(&mut self, node: &Value) {
        match node {
            Value::Object(fields) => {
                self.set_operations += u32::from(node["type"] == "SET_OPERATION_NODE");
                let selected = fields.get("select_list").and_then(Value::as_array);
                let stars = selected.map_or(0, |list| {
                    list.iter().filter(|column| column["class"] == "STAR").count()
                });
                self.doubled_lists += u32::from(stars > 1);
                fields.values().for_each(|field| self.measure(field));
            }
            Value::Array(items) => items.iter().for_each(|item| self.measure(item)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Functions that readers may not call. Each changes something, waits, shows settings, runs
    /// text as SQL, reads memory that a text describes, or allocates in one uninterruptible step
    /// as much as its argument says.
    const REFUSED: [&str; 35] = [
        "aggregate",
        "array_resize",
        "bitstring",
        "cast_to_type",
        "combine",
        "current_query",
        "current_setting",
        "currval",
        "damerau_levenshtein",
        "finalize",
        "from_json",
        "from_json_strict",
        "generate_series",
        "getvariable",
        "json_contains",
        "json_deserialize_sql",
        "json_group_structure",
        "json_merge_patch",
        "json_serialize_plan",
        "json_serialize_sql",
        "json_structure",
        "json_transform",
        "json_transform_strict",
        "list_resize",
        "make_type",
        "nextval",
        "parse_duckdb_log_message",
        "pg_sleep",
        "range",
        "replace_type",
        "setseed",
        "sleep_ms",
        "variant_bytes_to_variant",
        "variant_normalize",
        "variant_to_parquet_variant",
    ];

    fn column(sql: &str) -> Vec<String> {
        let connection = duckdb::Connection::open_in_memory().unwrap();
        let mut statement = connection.prepare(sql).unwrap();
        let rows = statement.query_map([], |row| row.get(0)).unwrap();
        rows.map(Result::unwrap).collect()
    }

    #[test]
    fn every_function_of_duckdb_is_allowed_or_refused() {
        let all = column(
            "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_type IN \
             ('scalar', 'aggregate', 'macro')",
        );
        let guard = Guard::new(&HashSet::new());
        let is_unknown = |name: &&String| {
            let is_refused = REFUSED.contains(&name.as_str())
                || name.as_str() == "write_log"
                || name.starts_with("__internal");
            guard.functions.contains(*name) == is_refused
        };
        let unknown: Vec<_> = all.iter().filter(is_unknown).collect();
        assert!(unknown.is_empty(), "neither allowed nor refused, or both: {unknown:?}");
    }

    fn judged(sql: &str) -> Result<(), String> {
        let literal = sql.replace('\'', "''");
        let json = column(&format!("SELECT json_serialize_sql('{literal}'::VARCHAR)::VARCHAR"));
        let guard = Guard::new(&["pg_get_expr".to_owned()].into());
        guard.check(&json[0], &|name| name == "a.b").map_err(|error| error.code.to_owned())
    }

    #[test]
    fn selects_of_known_names_pass() {
        for sql in [
            "SELECT x LIKE '%' || $1 || '%', x ILIKE 'a_%b%', x LIKE 'a%b%c%d%' FROM t",
            "SELECT count(*), sum(x + 1) FROM public.t WHERE y LIKE 'a%' GROUP BY ALL",
            "WITH q AS (SELECT 1 AS x) SELECT * FROM q",
            "SELECT lpad('x', 10, '0'), repeat('x', 3), format('{:05d}', 1)",
            "SELECT * FROM generate_series(1, 3) s(s), unnest([1, 2])",
            "SELECT _pg.pg_get_expr(1, 2)",
            "SELECT * FROM _pg.pg_class",
            "SELECT * FROM rhei_target.public.t",
            "SELECT * FROM \"a.b\"",
            "DESCRIBE public.t",
            "SELECT x::INTEGER, [y, z], {'a': 1}, CASE WHEN a THEN b END FROM t",
            "SELECT row_number() OVER (PARTITION BY a ORDER BY b) FROM t",
        ] {
            assert_eq!(judged(sql), Ok(()), "{sql}");
        }
    }

    #[test]
    fn what_reaches_further_is_refused() {
        for sql in [
            "SELECT * FROM read_csv('/etc/passwd')",
            "SELECT * FROM '/etc/passwd'",
            "SELECT * FROM 'x.parquet'",
            "SELECT * FROM query('SELECT 1')",
            "SELECT * FROM query_table('t')",
            "SELECT * FROM memory.main.rhei_rows_0",
            "SELECT * FROM memory.rhei_rows_0",
            "SELECT * FROM system.main.duckdb_settings",
            "SELECT * FROM duckdb_settings()",
            "SELECT * FROM histogram('t', 'x')",
            "SELECT nextval('s')",
            "SELECT repeat('x', 4000000000)",
            "SELECT repeat('x', n) FROM t",
            "SELECT lpad('x', 1000000000, 'y')",
            "SELECT format('{:1000000000}', 1)",
            "SELECT format('{:{}}', 'x', 1000000000)",
            "SELECT format('{:>{}}', 'x', 1000000000)",
            "SELECT repeat(repeat('x', 10000), 10000)",
            "SELECT repeat('a', 300) LIKE '%a_%a_%a_%a_%b'",
            "SELECT x LIKE y FROM t",
            "SELECT repeat('a', 300) LIKE '%a_' || '%a_' || '%a_' || '%a_'",
            "SELECT x LIKE $1 || $2 || $3 FROM t",
            "SELECT finalize(first('a') EXPORT_STATE)",
            "SELECT first('a') EXPORT_STATE",
            "SELECT json_transform('{}', x) FROM t",
            "SELECT x::VARIANT FROM t",
            "SELECT * FROM \"PG_CATALOG\".pg_settings",
            "SELECT * FROM duckdb_logs",
            "SELECT printf('%*d', 1000000000, 1)",
            "SELECT range(100000000000)",
            "SELECT (SELECT 1 FROM range(pg_sleep(1)))",
            "SELECT list_transform([1], x -> sleep_ms(x))",
            "SELECT sum(x) FILTER (WHERE sleep_ms(1) IS NULL) FROM t",
            "SELECT x FROM t ORDER BY sleep_ms(1)",
            "SELECT x FROM t LIMIT sleep_ms(1)",
            "SELECT * FROM t JOIN u ON sleep_ms(1) IS NULL",
            "WITH q AS MATERIALIZED (SELECT sleep_ms(1)) SELECT 1",
            "SELECT system.main.sleep_ms(1)",
            "INSERT INTO t VALUES (1)",
            "CREATE TABLE x AS SELECT 1",
            "SELECT 1; SELECT 2",
            "COPY t TO 'x'",
            "SUMMARIZE read_csv('x')",
            "SELEC 1",
        ] {
            assert!(judged(sql).is_err(), "{sql}");
        }
    }
}
