//! What both sides hash for each column of a table.
//!
//! A rule consists of an SQL expression at the source, an SQL expression of DuckDB, and the hash of
//! what the latter returns. The source hashes a value itself where its hash depends on all of the
//! value, with a second element where it does not; else it hashes the bytes that the type's send
//! function gives, or the text that its output function prints. `row_hash::CellHash` lists the
//! elements.
//!
//! No rule compares the sign of a floating-point zero: DuckDB does not keep it (docs/types.md).
//! A hash of PostgreSQL has 64 bits, but that of a time or a timestamp depends on 32 bits that its
//! two halves are folded into. So where two tables differ in one timestamp and nothing else, an
//! accident of 1 in 2^32 hides it; in general it is 1 in 2^64.

use arrow::{array::ArrayRef, datatypes::DataType, record_batch::RecordBatch};

use super::{
    lookup3::{combine, hash_bytes, hash_row},
    row_hash::{CellHash, HashError, HashSum, add_column},
};
use crate::{
    change::{ColumnSpec, TableSpec},
    olap::names,
    source::quote::quote_identifier,
    types::TypeCatalog,
};

/// How a column is compared by hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleKind {
    /// Both sides hash the value, or its binary form.
    Native,
    /// Both sides hash the same text.
    Text,
    /// The column has no common form, for this reason. It has no part in the hashes: the caller
    /// compares its cells.
    Undecidable(&'static str),
}

/// What rules depend on at the source.
#[derive(Debug, Clone, Copy)]
pub struct SourceTypes<'a> {
    /// The types of the table's columns (`source::catalog::types`).
    pub catalog: &'a TypeCatalog,
    /// Whether the encoding of the source's database is UTF-8. Other text is converted before it is
    /// hashed.
    pub is_utf8: bool,
}

/// The rule of one column.
#[derive(Debug, Clone)]
pub struct ColumnRule {
    /// The column's name at the source.
    pub column: String,
    pub kind: RuleKind,
    /// Where the settings turn values that the copy cannot represent into NULL, the condition at
    /// the source under which a value is one of them. The rule takes such a value for NULL, and
    /// `count(*) FILTER (WHERE ..)` counts them.
    pub is_nulled: Option<String>,
    /// The elements of `ROW(..)`.
    source: Vec<String>,
    copy: String,
    hash: Option<CellHash>,
}

/// The rules of a table, in the order of its columns.
#[derive(Debug, Clone)]
pub struct TableRule {
    pub columns: Vec<ColumnRule>,
    /// The hash at the source of the only column, which stands for the hash of the row.
    direct: Option<String>,
}

/// `ROW(..)` has at most 1664 elements (`MaxTupleAttributeNumber` of `access/htup_details.h`), of
/// which a column may need two. A table with more elements is hashed in parts.
const MAX_ELEMENTS: usize = 1_600;

impl TableRule {
    /// Returns the rules of all columns.
    pub fn new(spec: &TableSpec, source: SourceTypes<'_>) -> Self {
        let all: Vec<usize> = (0..spec.columns.len()).collect();
        Self::of_columns(spec, &all, source)
    }

    /// Returns the rules of some columns, by their indexes.
    pub fn of_columns(spec: &TableSpec, columns: &[usize], source: SourceTypes<'_>) -> Self {
        let rule = |&at: &usize| {
            // A value in a key pauses its table, whatever the settings are.
            let may_be_nulled = spec.null_unrepresentable && !spec.key_columns().contains(&at);
            Some(ColumnRule::new(spec.columns.get(at)?, source, may_be_nulled))
        };
        Self { columns: columns.iter().filter_map(rule).collect(), direct: None }
    }

    /// Returns the rule of the key. A key of one column of a common type is hashed by the type's
    /// own function, which takes a third of the time. Such a hash tells all keys of 32 bits apart;
    /// of longer ones, two may have the same hash, as with any hash.
    pub fn of_key(spec: &TableSpec, source: SourceTypes<'_>) -> Self {
        let mut rule = Self::of_columns(spec, spec.key_columns(), source);
        let [only] = spec.key_columns() else { return rule };
        let Some(column) = spec.columns.get(*only) else { return rule };
        let [of_column] = rule.columns.as_mut_slice() else { return rule };

        let name = quote_identifier(&column.name);
        rule.direct = match (source.catalog.leaf_of(column.type_oid), of_column.hash) {
            (INT2 | INT4, Some(CellHash::Word)) => {
                Some(format!("pg_catalog.hashint4extended({name}::int4, 0)"))
            }
            (INT8, Some(CellHash::Long)) => {
                of_column.hash = Some(CellHash::Folded);
                Some(format!("pg_catalog.hashint8extended({name}, 0)"))
            }
            (UUID, Some(CellHash::Uuid)) => {
                Some(format!("pg_catalog.uuid_hash_extended({name}, 0)"))
            }
            (TEXT, Some(CellHash::Bytes)) if source.is_utf8 => {
                Some(format!("pg_catalog.hashtextextended({name} COLLATE pg_catalog.\"C\", 0)"))
            }
            _ => None,
        };
        rule
    }

    /// Returns the hash of a row as the source computes it, a `bigint` that is never NULL. It is a
    /// hash of `hash_record_extended`: `lookup3::hash_row` says why.
    pub fn source_hash(&self) -> String {
        if let Some(direct) = &self.direct {
            return format!("coalesce({direct}, 0)");
        }
        format!("pg_catalog.hashint4extended(0, {})", hash_of(&self.source_row()))
    }

    /// Returns the aggregates of the source that are a [`HashSum`]: the number of rows, and the sum
    /// of their hashes as `numeric`.
    pub fn source_sum(&self) -> String {
        format!("count(*), coalesce(sum({}), 0)", self.source_hash())
    }

    fn source_row(&self) -> String {
        let row = |part: &[&ColumnRule]| {
            let elements: Vec<&str> =
                part.iter().flat_map(|rule| rule.source.iter().map(String::as_str)).collect();
            format!("ROW({})", elements.join(", "))
        };

        match self.parts().as_slice() {
            [] => "ROW()".to_owned(),
            [part] => row(part),
            parts => {
                // A record inside a record has no hash, so the outer one has the bytes of hashes.
                let hashed = |part: &Vec<&ColumnRule>| {
                    format!("pg_catalog.int8send({})", hash_of(&row(part)))
                };
                let parts: Vec<String> = parts.iter().map(hashed).collect();
                format!("ROW({})", parts.join(", "))
            }
        }
    }

    /// Returns the list of columns that DuckDB selects; [`Self::hash`] takes batches of them.
    pub fn copy_select(&self) -> String {
        let columns: Vec<&str> = self.hashed().map(|rule| rule.copy.as_str()).collect();
        // A list cannot be empty, and the batch has to count the rows.
        if columns.is_empty() { "NULL".to_owned() } else { columns.join(", ") }
    }

    /// Returns the number of columns of [`Self::copy_select`].
    pub fn width(&self) -> usize {
        self.hashed().count().max(1)
    }

    /// Returns the columns that have no part in the hashes.
    pub fn undecidable(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.columns.iter().filter_map(|rule| match rule.kind {
            RuleKind::Undecidable(reason) => Some((rule.column.as_str(), reason)),
            RuleKind::Native | RuleKind::Text => None,
        })
    }

    /// Writes the hash of each row of a batch into `hashes`, and returns their sum.
    ///
    /// # Errors
    /// The batch is not of the columns that [`Self::copy_select`] lists.
    pub fn hash(&self, batch: &RecordBatch, hashes: &mut Vec<u64>) -> Result<HashSum, HashError> {
        let (found, expected) = (batch.num_columns(), self.width());
        if found != expected {
            return Err(HashError::Columns { found, expected });
        }

        hashes.clear();
        hashes.resize(batch.num_rows(), 0);
        let mut arrays = batch.columns().iter();
        let parts = self.parts();

        if let [part] = parts.as_slice() {
            add_part(hashes, part, &mut arrays)?;
        } else {
            for part in parts {
                let mut of_part = vec![0; batch.num_rows()];
                add_part(&mut of_part, &part, &mut arrays)?;
                for (row, part) in hashes.iter_mut().zip(of_part) {
                    *row = combine(*row, hash_bytes(&part.to_be_bytes()));
                }
            }
        }

        if self.direct.is_none() {
            hashes.iter_mut().for_each(|row| *row = hash_row(*row));
        }
        Ok(HashSum::of(hashes))
    }

    fn hashed(&self) -> impl Iterator<Item = &ColumnRule> {
        self.columns.iter().filter(|rule| rule.hash.is_some())
    }

    /// Returns the hashed columns, cut where the elements of a row would be too many.
    fn parts(&self) -> Vec<Vec<&ColumnRule>> {
        let mut parts: Vec<Vec<&ColumnRule>> = Vec::new();
        let mut elements = MAX_ELEMENTS;

        for rule in self.hashed() {
            elements += rule.source.len();
            match parts.last_mut() {
                Some(part) if elements <= MAX_ELEMENTS => part.push(rule),
                _ => {
                    elements = rule.source.len();
                    parts.push(vec![rule]);
                }
            }
        }
        parts
    }
}

fn hash_of(record: &str) -> String {
    format!("pg_catalog.hash_record_extended({record}, 0)")
}

fn add_part<'a>(
    rows: &mut [u64],
    part: &[&ColumnRule],
    arrays: &mut impl Iterator<Item = &'a ArrayRef>,
) -> Result<(), HashError> {
    for (rule, array) in part.iter().zip(arrays) {
        let Some(hash) = rule.hash else { continue };
        add_column(rows, array.as_ref(), hash)
            .map_err(|source| HashError::Column { column: rule.column.clone(), source })?;
    }
    Ok(())
}

/// A column at the source while its rule is made.
struct Column<'a> {
    spec: &'a ColumnSpec,
    source: SourceTypes<'a>,
    /// The type without its domains and arrays.
    leaf_oid: u32,
}

const INT8: u32 = 20;
const INT2: u32 = 21;
const INT4: u32 = 23;
const TEXT: u32 = 25;
const VARCHAR: u32 = 1043;
const FLOAT4: u32 = 700;
const FLOAT8: u32 = 701;
const NUMERIC: u32 = 1700;
const MONEY: u32 = 790;
const UUID: u32 = 2950;

/// What both sides hash: the elements of `ROW(..)`, DuckDB's expression, and its hash.
type Forms = (RuleKind, Vec<String>, String, CellHash);

impl ColumnRule {
    fn new(spec: &ColumnSpec, source: SourceTypes<'_>, may_be_nulled: bool) -> Self {
        let leaf_oid = source.catalog.leaf_of(spec.type_oid);
        let column = Column { spec, source, leaf_oid };
        let name = quote_identifier(&spec.name);
        let is_nulled = column.unrepresentable(&name).filter(|_| may_be_nulled);

        let value = match &is_nulled {
            Some(condition) => format!("(CASE WHEN {condition} THEN NULL ELSE {name} END)"),
            None => name,
        };

        match column.forms(&value) {
            Ok((kind, source, copy, hash)) => {
                Self { column: spec.name.clone(), kind, is_nulled, source, copy, hash: Some(hash) }
            }
            Err(reason) => Self {
                column: spec.name.clone(),
                kind: RuleKind::Undecidable(reason),
                is_nulled: None,
                source: Vec::new(),
                copy: String::new(),
                hash: None,
            },
        }
    }
}

impl Column<'_> {
    /// Returns what both sides hash where `value` is the column's value at the source, or why there
    /// is nothing.
    fn forms(&self, value: &str) -> Result<Forms, &'static str> {
        let stored = names::quoted(&self.spec.target_name);
        let native = |elements: Vec<String>, copy: String, hash: CellHash| {
            Ok((RuleKind::Native, elements, copy, hash))
        };

        let with_second = |second: &str| vec![value.to_owned(), format!("{value} {second}")];
        let sent = |function: &str| vec![format!("pg_catalog.{function}({value})")];
        let itself = vec![value.to_owned()];

        match self.spec.mapping.arrow_type() {
            DataType::Boolean => native(itself, stored, CellHash::Bool),
            DataType::Int16 | DataType::Int32 | DataType::UInt32 => {
                native(itself, stored, CellHash::Word)
            }
            DataType::Int64 => native(with_second(">> 32"), stored, CellHash::Long),
            DataType::UInt64 => native(sent("xid8send"), stored, CellHash::Xid8),
            DataType::Float32 | DataType::Float64 if self.is_float() => {
                native(with_second("= 0"), stored, CellHash::Float)
            }
            DataType::Float64 => Err("the copy holds a number that was rounded to DOUBLE"),
            DataType::Decimal128(..) if self.leaf_oid == MONEY => {
                native(sent("cash_send"), stored, CellHash::Money)
            }
            DataType::Decimal128(..) => native(with_second("< 0"), stored, CellHash::Numeric),
            DataType::Date32 => native(itself, stored, CellHash::Date),
            DataType::Timestamp(..) => native(itself, stored, CellHash::Timestamp),
            DataType::Time64(_) => native(itself, stored, CellHash::Time),
            DataType::FixedSizeBinary(_) => native(itself, stored, CellHash::Uuid),
            DataType::Binary => native(itself, stored, CellHash::Bytes),
            DataType::Struct(_) if self.target_type() == "INTERVAL" => {
                native(sent("interval_send"), interval_parts(&stored), CellHash::Interval)
            }
            DataType::Struct(_) => Err("a STRUCT does not keep the text of the source"),
            DataType::Utf8 => self.text_forms(value, &stored),
            DataType::List(_) => self.list_forms(value, &stored),
            _ => Err("rhei has no rule for the type of the copy"),
        }
    }

    /// Columns that are staged as text.
    fn text_forms(&self, value: &str, stored: &str) -> Result<Forms, &'static str> {
        // An array stored as VARCHAR has a text for a leaf, and no binary form.
        let is_text = self.spec.mapping.has_binary() && [TEXT, VARCHAR].contains(&self.leaf_oid);

        match self.target_type() {
            "VARIANT" => Err("a VARIANT does not keep the text of the source"),
            "TIME WITH TIME ZONE" => {
                let source = vec![format!("pg_catalog.timetz_send({value})")];
                Ok((RuleKind::Native, source, as_varchar(stored), CellHash::TimeTz))
            }
            "VARCHAR" if is_text => {
                let source = vec![self.as_utf8(value)];
                Ok((RuleKind::Native, source, stored.to_owned(), CellHash::Bytes))
            }
            _ => {
                let source = vec![self.printed(value, value)];
                Ok((RuleKind::Text, source, as_varchar(stored), CellHash::Bytes))
            }
        }
    }

    /// Columns that are staged as lists: arrays, and an hstore stored as MAP.
    fn list_forms(&self, value: &str, stored: &str) -> Result<Forms, &'static str> {
        if self.target_type().starts_with("MAP") {
            let source = vec![self.printed(value, value)];
            let entries = format!("map_entries({stored})");
            return Ok((RuleKind::Text, source, entries, CellHash::Hstore));
        }

        let (leaf, depth) = self.leaf();
        if leaf.starts_with("STRUCT") {
            return Err("a STRUCT does not keep the text of the source");
        }

        // A slice without bounds begins at 1 in all dimensions (`array_get_slice` of
        // `utils/adt/arrayfuncs.c`), like a LIST.
        let slice = format!("({value})[:]");
        let printable = if self.leaf_oid == MONEY { format!("{slice}::numeric[]") } else { slice };

        let copy = match leaf {
            "INTERVAL" => transformed(stored, depth, &interval_parts("item")),
            "UUID" => transformed(stored, depth, &as_varchar("item")),
            _ => stored.to_owned(),
        };

        let catalog = self.source.catalog;
        let delimiter = catalog.types.get(&self.leaf_oid).map_or(b',', |leaf| leaf.delimiter);
        let source = vec![self.printed(value, &printable)];
        Ok((RuleKind::Text, source, copy, CellHash::Array { delimiter }))
    }

    fn target_type(&self) -> &str {
        &self.spec.mapping.target_type
    }

    /// Returns the type in the lists of the copy, and how many lists are around it.
    fn leaf(&self) -> (&str, usize) {
        let leaf = self.target_type().trim_end_matches("[]");
        (leaf, (self.target_type().len() - leaf.len()) / 2)
    }

    fn is_float(&self) -> bool {
        [FLOAT4, FLOAT8].contains(&self.leaf_oid)
    }

    /// Returns the text that the type's output function prints for `printable`: `concat` calls that
    /// function, a cast to text would not (trap 22). It is NULL where `value` is NULL; `IS NULL`
    /// would also be true of a row of NULLs.
    fn printed(&self, value: &str, printable: &str) -> String {
        self.as_utf8(&format!(
            "(CASE WHEN {value} IS NOT DISTINCT FROM NULL THEN NULL ELSE \
             pg_catalog.concat({printable}) END)"
        ))
    }

    /// Returns a text as its bytes in UTF-8. A collation may be nondeterministic: then equal texts
    /// need not have equal bytes, and the hash depends on its version.
    fn as_utf8(&self, text: &str) -> String {
        match self.source.is_utf8 {
            true => format!("{text} COLLATE pg_catalog.\"C\""),
            false => format!("pg_catalog.convert_to({text}, 'UTF8')"),
        }
    }

    /// Returns the condition under which the copy cannot represent a value, or none when it
    /// represents every value (docs/types.md, "What cannot be kept").
    fn unrepresentable(&self, value: &str) -> Option<String> {
        let (leaf, depth) = self.leaf();
        let of_leaf = |value: &str| self.unrepresentable_leaf(leaf, value);

        if depth == 0 {
            return of_leaf(value);
        }

        // An empty array has no dimensions, and every LIST can be empty.
        let other_dimensions = format!("pg_catalog.array_ndims({value}) <> {depth}");
        Some(match of_leaf("item") {
            Some(condition) => format!(
                "({other_dimensions} OR EXISTS (SELECT FROM pg_catalog.unnest({value}) AS \
                 items(item) WHERE {condition}))"
            ),
            None => other_dimensions,
        })
    }

    fn unrepresentable_leaf(&self, leaf: &str, value: &str) -> Option<String> {
        /// The greatest timestamp of DuckDB; the next number is its infinity.
        const LAST_TIMESTAMP: &str = "'294247-01-10 04:00:54.775806+00'";

        match leaf {
            "INTERVAL" => Some(format!("NOT pg_catalog.isfinite({value})")),
            "TIMESTAMP" | "TIMESTAMP WITH TIME ZONE" => {
                Some(format!("({value} > {LAST_TIMESTAMP} AND pg_catalog.isfinite({value}))"))
            }
            _ if self.leaf_oid == NUMERIC => {
                let (precision, scale) = decimal(leaf)?;
                let whole_digits = precision.checked_sub(scale)?;
                // NaN is greater than all numbers; it and the infinities have no scale.
                Some(format!(
                    "NOT (pg_catalog.abs({value}) < 1e{whole_digits} AND \
                     pg_catalog.min_scale({value}) <= {scale})"
                ))
            }
            _ => None,
        }
    }
}

/// Returns precision and scale of `DECIMAL(p,s)`.
fn decimal(target_type: &str) -> Option<(u32, u32)> {
    let inner = target_type.strip_prefix("DECIMAL(")?.strip_suffix(')')?;
    let (precision, scale) = inner.split_once(',')?;
    Some((precision.parse().ok()?, scale.parse().ok()?))
}

fn as_varchar(stored: &str) -> String {
    format!("CAST({stored} AS VARCHAR)")
}

/// Returns months, days and microseconds of an interval of DuckDB, whose text and Arrow form do not
/// keep them apart or have no room for them.
fn interval_parts(stored: &str) -> String {
    format!(
        "CASE WHEN {stored} IS NULL THEN NULL ELSE struct_pack(\
         months := datepart('year', {stored}) * 12 + datepart('month', {stored}), \
         days := datepart('day', {stored}), \
         micros := datepart('hour', {stored}) * 3600000000 + \
         datepart('minute', {stored}) * 60000000 + datepart('microsecond', {stored})) END"
    )
}

/// Returns a LIST of lists, `depth` deep, with `expression` for each `item`.
fn transformed(stored: &str, depth: usize, expression: &str) -> String {
    let innermost = format!("lambda item: {expression}");
    let lambda = (1..depth).fold(innermost, |inner, level| {
        format!("lambda list{level}: list_transform(list{level}, {inner})")
    });
    format!("list_transform({stored}, {lambda})")
}
