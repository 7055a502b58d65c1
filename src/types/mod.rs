//! One Postgres type = one row of the mapping + one decoder.
//!
//! [`map_column`] decides, from the catalog's description of a type and an optional override, how a column is
//! staged (Arrow), stored (DuckDB) and decoded (text from the stream, binary from COPY). [`ColumnBuilder`] decodes
//! one column; both formats give the same cell.

use std::collections::HashMap;

use arrow::{array::ArrayRef, datatypes::Field};

/// `pg_type`, as far as a value's text and binary form depend on it.
#[derive(Debug, Clone)]
pub struct TypeInfo {
    pub oid: u32,
    pub schema: String,
    pub name: String,
    /// `typtype`: `b` base, `c` composite, `d` domain, `e` enum, `p` pseudo, `r` range, `m` multirange.
    pub kind: u8,
    /// `typcategory`; `A` for arrays.
    pub category: u8,
    /// `typelem` of a true array type (`typsubscript = array_subscript_handler`), else 0.
    pub element_oid: u32,
    /// `typdelim` of this type as an element (`;` for box, `,` for all others).
    pub delimiter: u8,
    /// `typbasetype` of a domain, else 0.
    pub base_oid: u32,
    /// `typtypmod` of a domain, else -1.
    pub base_typmod: i32,
    /// `typndims` of a domain over an array, else 0.
    pub base_ndims: i32,
}

/// The types that the published columns use, and all that those are made of.
#[derive(Debug, Clone, Default)]
pub struct TypeCatalog {
    pub types: HashMap<u32, TypeInfo>,
    /// Digits after the point of `money` under the pinned `lc_monetary=C` (2).
    pub money_scale: u8,
}

/// How one column is staged, stored and decoded.
#[derive(Debug, Clone)]
pub struct Mapping {
    /// The column's type in DuckDB, as it is written in CREATE TABLE.
    pub target_type: String,
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum ValueError {}

/// Decodes the values of one column into one Arrow array.
#[derive(Debug)]
pub struct ColumnBuilder {}

/// What `map_column` needs to know of a column.
#[derive(Debug, Clone, Copy)]
pub struct ColumnType<'a> {
    pub type_oid: u32,
    pub typmod: i32,
    /// `attndims`: declared dimensions, 0 when the column is no array.
    pub ndims: i32,
    /// `columns.NAME.type` of the settings: a DuckDB type.
    pub override_type: Option<&'a str>,
}

impl Mapping {
    /// The Arrow field under which values are staged.
    pub fn field(&self, _name: &str) -> Field {
        unimplemented!()
    }
}

impl ColumnBuilder {
    pub fn finish(&mut self) -> ArrayRef {
        unimplemented!()
    }
}
