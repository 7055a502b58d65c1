//! Compares source with copy, value by value, independent of the code under test.
//!
//! Both sides are read as text in one canonical form per type, chosen from the source's catalog and
//! the type of the column in the copy. Where the copy keeps a value as VARCHAR, PostgreSQL's own
//! text must be there, byte for byte. Rows are compared as multisets, so tables without a key are
//! no special case; a key only names the rows in messages.

use std::{collections::BTreeMap, path::Path};

use duckdb::Connection;

use super::{
    cluster::{Db, Session, quote},
    lake::Lake,
};

type Row = Vec<Option<String>>;

/// A table and the name of its copy.
#[derive(Debug, Clone)]
pub struct Pair {
    pub source: (String, String),
    pub target: (String, String),
    /// Columns that the copy leaves out on purpose.
    pub excluded: Vec<String>,
}

impl Pair {
    /// `schema.table`, of the same name in the copy.
    pub fn new(name: &str) -> Pair {
        let (schema, table) = name.split_once('.').unwrap_or(("public", name));
        let name = (schema.to_owned(), table.to_owned());
        Pair { source: name.clone(), target: name, excluded: Vec::new() }
    }

    pub fn target(mut self, name: &str) -> Pair {
        self.target = Pair::new(name).source;
        self
    }

    pub fn exclude(mut self, column: &str) -> Pair {
        self.excluded.push(column.to_owned());
        self
    }
}

/// The copy at `file` must hold exactly the rows of these tables. No other process may have the
/// file open for writing.
#[track_caller]
pub fn assert_same(db: &Db, file: &Path, tables: &[&str]) {
    let pairs: Vec<Pair> = tables.iter().map(|name| Pair::new(name)).collect();
    assert_same_pairs(db, file, &pairs);
}

#[track_caller]
pub fn assert_same_pairs(db: &Db, file: &Path, pairs: &[Pair]) {
    let differences = compare(db, file, pairs);
    assert!(
        differences.is_empty(),
        "the copy differs from the source:\n{}",
        differences.join("\n")
    );
}

/// What differs, in words; empty when nothing does. The source is read in one snapshot.
#[track_caller]
pub fn compare(db: &Db, file: &Path, pairs: &[Pair]) -> Vec<String> {
    let copy = match open_copy(file) {
        Ok(copy) => copy,
        Err(error) => return vec![format!("{}: cannot be opened: {error}", file.display())],
    };
    let source = db.session();
    source.execute(
        "SET search_path = pg_catalog; SET TimeZone = 'UTC'; SET DateStyle = 'ISO, YMD'; SET \
         IntervalStyle = 'postgres'; \
         SET bytea_output = 'hex'; SET extra_float_digits = 1; SET lc_monetary = 'C'; \
         SET max_parallel_workers_per_gather = 0; SET row_security = off; \
         BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
    );
    pairs.iter().flat_map(|pair| compare_table(&source, &copy, pair)).collect()
}

/// Rows of a query on the copy, as text.
#[track_caller]
pub fn query_copy(file: &Path, sql: &str) -> Vec<Row> {
    let copy = open_copy(file).unwrap();
    read_copy(&copy, sql).unwrap_or_else(|error| panic!("{error}\nin: {sql}"))
}

pub fn open_copy(file: &Path) -> duckdb::Result<Connection> {
    if let Some(lake) = Lake::at(file) {
        return lake.open();
    }
    let copy = Connection::open_in_memory()?;
    let path = file.display().to_string().replace('\'', "''");
    // As on a machine of another time zone: its connections replay DuckDB's log there, and the copy
    // must be the same.
    copy.execute_batch("SET GLOBAL TimeZone = 'America/New_York'")?;
    copy.execute_batch(&format!(
        "ATTACH '{path}' AS copied (READ_ONLY); USE copied; SET TimeZone = 'UTC'"
    ))?;
    Ok(copy)
}

/// Every column of `sql` must be VARCHAR.
fn read_copy(copy: &Connection, sql: &str) -> duckdb::Result<Vec<Row>> {
    let mut statement = copy.prepare(sql)?;
    let mut rows = statement.query([])?;
    let width = rows.as_ref().map_or(0, |statement| statement.column_count());
    let mut result = Vec::new();
    while let Some(row) = rows.next()? {
        result.push(
            (0..width)
                .map(|i| row.get::<_, Option<String>>(i))
                .collect::<duckdb::Result<Vec<_>>>()?,
        );
    }
    Ok(result)
}

/// A column on both sides.
#[derive(Debug)]
struct Column {
    name: String,
    /// The type below all domains.
    source_type: String,
    /// For arrays, the element type below all domains.
    element: Option<String>,
    target_type: String,
    in_key: bool,
}

fn compare_table(source: &Session, copy: &Connection, pair: &Pair) -> Vec<String> {
    let label = format!("{}.{}", pair.source.0, pair.source.1);
    let (columns, mut differences) = match columns_of(source, copy, pair) {
        Ok(found) => found,
        Err(message) => return vec![format!("{label}: {message}")],
    };
    if columns.is_empty() {
        differences.push(format!("{label}: no column to compare"));
    }
    if !differences.is_empty() {
        return differences;
    }
    let forms: Vec<Form> = columns.iter().map(Form::of).collect();
    let list = |side: fn(&Form) -> &str| forms.iter().map(side).collect::<Vec<_>>().join(", ");
    let qualified = |name: &(String, String)| format!("{}.{}", quote(&name.0), quote(&name.1));
    let source_rows = source.try_query(&format!(
        "SELECT {} FROM {}",
        list(|f| &f.source),
        qualified(&pair.source)
    ));
    // With the database in front: a schema may be called `temp`, or like the file.
    let copy_rows = read_copy(
        copy,
        &format!("SELECT {} FROM copied.{}", list(|f| &f.target), qualified(&pair.target)),
    );
    let (source_rows, copy_rows) = match (source_rows, copy_rows) {
        (Ok(source_rows), Ok(copy_rows)) => (source_rows, copy_rows),
        (Err(error), _) => return vec![format!("{label}: reading the source: {error}")],
        (_, Err(error)) => return vec![format!("{label}: reading the copy: {error}")],
    };
    let canonical = |rows: Vec<Row>, side: Side| -> Vec<Row> {
        let rows = rows.into_iter().map(|row| {
            let values = row.into_iter().zip(&forms).zip(&columns);
            values
                .map(|((value, form), column)| {
                    value.map(|text| form.shape.finish(text, column, side))
                })
                .collect()
        });
        let mut rows: Vec<_> = rows.collect();
        rows.sort_unstable();
        rows
    };
    let (source_rows, copy_rows) =
        (canonical(source_rows, Side::Source), canonical(copy_rows, Side::Target));
    difference_of_rows(&label, &columns, &source_rows, &copy_rows)
}

/// Both sides sorted: one walk finds what only one of them has.
fn difference_of_rows(
    label: &str,
    columns: &[Column],
    source: &[Row],
    copy: &[Row],
) -> Vec<String> {
    let (mut missing, mut extra) = (Vec::new(), Vec::new());
    let (mut s, mut c) = (source.iter().peekable(), copy.iter().peekable());
    loop {
        match (s.peek(), c.peek()) {
            (None, None) => break,
            (Some(a), Some(b)) if a == b => {
                s.next();
                c.next();
            }
            (Some(a), Some(b)) if a < b => missing.extend(s.next()),
            (Some(_), None) => missing.extend(s.next()),
            _ => extra.extend(c.next()),
        }
    }
    if missing.is_empty() && extra.is_empty() {
        return Vec::new();
    }
    const SHOWN: usize = 8;
    let key_of = |row: &[Option<String>]| -> Row {
        let key = row.iter().zip(columns).filter(|(_, column)| column.in_key);
        key.map(|(value, _)| value.clone()).collect()
    };
    let mut by_key: BTreeMap<Row, (Vec<&Row>, Vec<&Row>)> = BTreeMap::new();
    missing.iter().for_each(|row| by_key.entry(key_of(row)).or_default().0.push(row));
    extra.iter().for_each(|row| by_key.entry(key_of(row)).or_default().1.push(row));
    let has_key = columns.iter().any(|column| column.in_key);

    let (mut different, mut only_source, mut only_copy) = (Vec::new(), Vec::new(), Vec::new());
    for (missing, extra) in by_key.into_values() {
        match (missing.as_slice(), extra.as_slice()) {
            ([source], [copy]) if has_key => {
                different.push(describe_difference(columns, source, copy))
            }
            _ => {
                only_source.extend(missing.iter().map(|row| describe(columns, row)));
                only_copy.extend(extra.iter().map(|row| describe(columns, row)));
            }
        }
    }
    let mut lines = vec![format!(
        "{label}: {} rows in the source, {} in the copy; {} only in the source, {} only in the \
         copy, {} different",
        source.len(),
        copy.len(),
        only_source.len(),
        only_copy.len(),
        different.len()
    )];
    for (word, rows) in [
        ("different", different),
        ("only in the source", only_source),
        ("only in the copy", only_copy),
    ] {
        lines.extend(rows.iter().take(SHOWN).map(|row| format!("  {word}: {row}")));
    }
    lines
}

fn shorten(value: &Option<String>) -> String {
    match value {
        None => "NULL".to_owned(),
        Some(text) if text.chars().count() <= 120 => format!("{text:?}"),
        Some(text) => {
            format!("{:?}... ({} bytes)", text.chars().take(100).collect::<String>(), text.len())
        }
    }
}

fn describe(columns: &[Column], row: &[Option<String>]) -> String {
    let values = columns
        .iter()
        .zip(row)
        .map(|(column, value)| format!("{}={}", column.name, shorten(value)));
    values.collect::<Vec<_>>().join(" ")
}

fn describe_difference(
    columns: &[Column],
    source: &[Option<String>],
    copy: &[Option<String>],
) -> String {
    let mut words = Vec::new();
    for ((column, source), copy) in columns.iter().zip(source).zip(copy) {
        if column.in_key {
            words.push(format!("{}={}", column.name, shorten(source)));
        } else if source != copy {
            words.push(format!(
                "{}: source {} copy {}",
                column.name,
                shorten(source),
                shorten(copy)
            ));
        }
    }
    words.join(" ")
}

/// The columns that both sides have, and a line for each that one lacks.
fn columns_of(
    source: &Session,
    copy: &Connection,
    pair: &Pair,
) -> Result<(Vec<Column>, Vec<String>), String> {
    let label = format!("{}.{}", pair.source.0, pair.source.1);
    let text = |value: &str| format!("'{}'", value.replace('\'', "''"));
    let (schema, table) = (text(&pair.source.0), text(&pair.source.1));
    // Domains are followed down to their base; an array's element likewise.
    let found = source.try_query(&format!(
        "WITH RECURSIVE
         down(oid, base) AS (
             SELECT oid, CASE WHEN typtype = 'd' THEN typbasetype ELSE oid END FROM pg_type
             UNION
             SELECT d.oid, t.typbasetype FROM down d JOIN pg_type t ON t.oid = d.base WHERE \
             t.typtype = 'd'
         ),
         base AS (
             SELECT d.oid, t.typname, t.typelem, t.typsubscript FROM down d JOIN pg_type t ON \
             t.oid = d.base
             WHERE t.typtype <> 'd'
         )
         SELECT a.attname, b.typname,
                CASE WHEN b.typsubscript = 'array_subscript_handler'::regproc THEN e.typname END,
                a.attgenerated <> '',
                EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND a.attnum = ANY \
                (i.indkey)
                        AND (i.indisreplident OR (i.indisprimary AND c.relreplident = 'd')))
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
         JOIN base b ON b.oid = a.atttypid LEFT JOIN base e ON e.oid = b.typelem
         WHERE n.nspname = {schema} AND c.relname = {table} ORDER BY a.attnum"
    ))?;
    if found.is_empty() {
        return Err("no such table in the source".to_owned());
    }
    let in_copy = read_copy(
        copy,
        &format!(
            "SELECT column_name, data_type FROM duckdb_columns() WHERE NOT internal AND \
             database_name = current_database() \
             AND schema_name = {} AND table_name = {} ORDER BY column_index",
            text(&pair.target.0),
            text(&pair.target.1)
        ),
    )
    .map_err(|error| error.to_string())?;
    if in_copy.is_empty() {
        return Err("no such table in the copy".to_owned());
    }
    let cell = |row: &[Option<String>], i: usize| row.get(i).cloned().flatten();
    let mut in_copy: BTreeMap<String, String> = in_copy
        .iter()
        .map(|row| (cell(row, 0).unwrap_or_default(), cell(row, 1).unwrap_or_default()))
        .collect();
    let has_generated =
        source.try_query("SELECT current_setting('server_version_num')::int >= 180000")?;
    let has_generated = has_generated == [[Some("t".to_owned())]];
    let (mut columns, mut differences) = (Vec::new(), Vec::new());
    for row in &found {
        let name = cell(row, 0).unwrap_or_default();
        let excluded = pair.excluded.contains(&name);
        let is_generated = cell(row, 3).as_deref() == Some("t");
        match in_copy.remove(&name) {
            Some(_) if is_generated && !has_generated => {
                differences.push(format!(
                    "{label}: column {name} is in the copy, and the stream never has it"
                ));
            }
            Some(_) if excluded => {
                differences.push(format!("{label}: column {name} is in the copy, but was excluded"))
            }
            Some(target_type) => columns.push(Column {
                name,
                source_type: cell(row, 1).unwrap_or_default(),
                element: cell(row, 2),
                target_type,
                in_key: cell(row, 4).as_deref() == Some("t"),
            }),
            // Generated columns are not in the stream before version 18.
            None if excluded || is_generated => {}
            None => differences.push(format!("{label}: column {name} is missing in the copy")),
        }
    }
    differences.extend(
        in_copy.into_keys().map(|name| format!("{label}: column {name} is only in the copy")),
    );
    Ok((columns, differences))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Target,
}

/// How a column is read on both sides so that equal values give equal text.
#[derive(Debug)]
struct Form {
    source: String,
    target: String,
    shape: Shape,
}

/// What is left to do in Rust once the text is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Plain,
    Float4,
    Float8,
    /// Elements as JSON strings; the source sends them flat, with the dimensions in front.
    List(Scalar),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scalar {
    Plain,
    Float4,
    Float8,
}

impl Form {
    fn of(column: &Column) -> Form {
        let name = quote(&column.name);
        let depth = column.target_type.matches("[]").count();
        match &column.element {
            Some(element) if depth > 0 => {
                let leaf = column.target_type.trim_end_matches("[]");
                let (source, target, scalar) = scalar_form(element, leaf, "e", "x", true);
                // Declared dimensions are lists of lists: the transformation goes one list deeper
                // for each.
                let lambda = (1..depth).fold(format!("lambda x: {target}"), |inner, level| {
                    format!("lambda x{level}: list_transform(x{level}, {inner})")
                });
                Form {
                    source: format!(
                        "CASE WHEN {name} IS NOT NULL THEN coalesce(array_dims({name}), '') || ' ' \
                         || \
                         (SELECT coalesce(json_agg({source} ORDER BY i)::text, '[]') \
                          FROM (SELECT e, row_number() OVER () AS i FROM (SELECT unnest({name}) AS \
                          e) f) u) END"
                    ),
                    target: format!(
                        "CASE WHEN {name} IS NOT NULL THEN CAST(to_json(list_transform({name}, \
                         {lambda})) AS VARCHAR) END"
                    ),
                    shape: Shape::List(scalar),
                }
            }
            _ => {
                let (source, target, scalar) =
                    scalar_form(&column.source_type, &column.target_type, &name, &name, false);
                let shape = match scalar {
                    Scalar::Plain => Shape::Plain,
                    Scalar::Float4 => Shape::Float4,
                    Scalar::Float8 => Shape::Float8,
                };
                Form { source, target, shape }
            }
        }
    }
}

/// SQL on both sides for a value of this type. `as_text`: the source's expression must have type
/// text, which a cast does not give truly for every type (bpchar loses its padding, inet gains a
/// netmask); format() uses the output function.
fn scalar_form(
    source_type: &str,
    target_type: &str,
    s: &str,
    t: &str,
    as_text: bool,
) -> (String, String, Scalar) {
    let raw = || match as_text {
        true => format!("CASE WHEN num_nulls({s}) = 0 THEN format('%s', {s}) END"),
        false => s.to_owned(),
    };
    let varchar = format!("CAST({t} AS VARCHAR)");
    let plain = |source: String, target: String| (source, target, Scalar::Plain);
    match (source_type, target_type) {
        ("bool", "BOOLEAN") => {
            plain(format!("CASE {s} WHEN true THEN 'true' WHEN false THEN 'false' END"), varchar)
        }
        ("float4", "FLOAT") => (raw(), varchar, Scalar::Float4),
        ("float8", "DOUBLE") => (raw(), varchar, Scalar::Float8),
        ("money", decimal) if decimal.starts_with("DECIMAL") => {
            plain(format!("({s}::numeric)::text"), varchar)
        }
        ("bytea", "BLOB") => plain(format!("encode({s}, 'hex')"), format!("lower(hex({t}))")),
        ("date", "DATE") => plain(
            format!(
                "CASE WHEN isfinite({s}) THEN ({s} - date '1970-01-01')::text ELSE {s}::text END"
            ),
            format!(
                "CASE WHEN isfinite({t}) THEN CAST(date_diff('day', DATE '1970-01-01', {t}) AS \
                 VARCHAR) ELSE {varchar} END"
            ),
        ),
        ("timestamp", "TIMESTAMP") | ("timestamptz", "TIMESTAMP WITH TIME ZONE") => plain(
            format!(
                "CASE WHEN isfinite({s}) THEN ((extract(epoch FROM {s}) * 1000000)::bigint)::text \
                 ELSE {s}::text END"
            ),
            format!(
                "CASE WHEN isfinite({t}) THEN CAST(epoch_us({t}) AS VARCHAR) ELSE {varchar} END"
            ),
        ),
        ("time", "TIME") => plain(
            format!("((extract(epoch FROM {s}) * 1000000)::bigint)::text"),
            format!("CAST(epoch_us({t}) AS VARCHAR)"),
        ),
        // Equal as (months, days, microseconds): 24 hours are not a day.
        ("interval", "INTERVAL") => plain(
            format!(
                "CASE WHEN {s} IS NULL THEN NULL WHEN NOT isfinite({s}) THEN {s}::text ELSE \
                 (extract(year FROM {s})::bigint * 12 + extract(month FROM {s})::bigint)::text || \
                 ' ' || \
                 (extract(day FROM {s})::bigint)::text || ' ' || (extract(hour FROM {s})::bigint * \
                 3600000000 + \
                 extract(minute FROM {s})::bigint * 60000000 + extract(microseconds FROM \
                 {s})::bigint)::text END"
            ),
            format!(
                "(datepart('year', {t}) * 12 + datepart('month', {t})) || ' ' || datepart('day', \
                 {t}) || ' ' || \
                 (datepart('hour', {t}) * 3600000000 + datepart('minute', {t}) * 60000000 + \
                 datepart('microsecond', {t}))"
            ),
        ),
        _ => plain(raw(), varchar),
    }
}

impl Shape {
    fn finish(self, text: String, column: &Column, side: Side) -> String {
        match self {
            Shape::Plain if column.target_type.starts_with("DECIMAL") => leading_zero(text),
            Shape::Plain => text,
            Shape::Float4 => Scalar::Float4.finish(text),
            Shape::Float8 => Scalar::Float8.finish(text),
            Shape::List(scalar) => list(scalar, &text, side).unwrap_or(text),
        }
    }
}

impl Scalar {
    /// Floats by their bits, so that only the value counts and not how it is printed. All NaNs are
    /// one.
    fn finish(self, text: String) -> String {
        match self {
            Scalar::Plain => text,
            Scalar::Float4 => match text.parse::<f32>() {
                Ok(value) if value.is_nan() => "NaN".to_owned(),
                Ok(value) => format!("{value:e}"),
                Err(_) => text,
            },
            Scalar::Float8 => match text.parse::<f64>() {
                Ok(value) if value.is_nan() => "NaN".to_owned(),
                Ok(value) => format!("{value:e}"),
                Err(_) => text,
            },
        }
    }
}

/// `.5` and `0.5` are one number.
fn leading_zero(text: String) -> String {
    match text.strip_prefix('-') {
        Some(rest) if rest.starts_with('.') => format!("-0{rest}"),
        None if text.starts_with('.') => format!("0{text}"),
        _ => text,
    }
}

/// The source sends `[1:2][1:3] ["a",..]` (nothing before the space when empty), the copy nested
/// JSON. A lower bound other than 1 cannot live in a list: it stays in the text, and so differs.
fn list(scalar: Scalar, text: &str, side: Side) -> Option<String> {
    let (dimensions, json) = match side {
        Side::Source => text.split_once(' ')?,
        Side::Target => ("", text),
    };
    let mut value: serde_json::Value = serde_json::from_str(json).ok()?;
    finish_leaves(scalar, &mut value);
    let mut bounds = Vec::new();
    for part in dimensions.split(['[', ']']).filter(|part| !part.is_empty()) {
        let (low, high) = part.split_once(':')?;
        let (low, high) = (low.parse::<i64>().ok()?, high.parse::<i64>().ok()?);
        if low != 1 {
            return Some(format!("lower bound in {dimensions} {value}"));
        }
        bounds.push(usize::try_from(high).ok()?);
    }
    for size in bounds.iter().skip(1).rev() {
        let items = value.as_array()?;
        value = items.chunks(*size).map(|chunk| serde_json::Value::from(chunk.to_vec())).collect();
    }
    Some(value.to_string())
}

fn finish_leaves(scalar: Scalar, value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Array(items) => {
            items.iter_mut().for_each(|item| finish_leaves(scalar, item))
        }
        serde_json::Value::String(text) => {
            *text = leading_zero_of_number(scalar.finish(std::mem::take(text)))
        }
        _ => {}
    }
}

/// Inside lists the element's declared scale is the same on both sides; only a bare `.5` needs
/// care.
fn leading_zero_of_number(text: String) -> String {
    let digits = text.trim_start_matches('-');
    match digits.strip_prefix('.') {
        Some(rest) if !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()) => {
            leading_zero(text)
        }
        _ => text,
    }
}
