//! What a verification found.

use serde::{Deserialize, Serialize};

use crate::Lsn;

/// The result of a verification.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Both sides were compared as of this LSN.
    pub lsn: Lsn,
    pub tables: Vec<TableReport>,
    pub seconds: f64,
}

impl Report {
    /// Returns whether some table differs from its source.
    pub fn has_differences(&self) -> bool {
        self.tables.iter().any(|table| table.verdict == TableVerdict::Different)
    }

    /// Returns whether some table could not be compared.
    pub fn is_incomplete(&self) -> bool {
        self.tables.iter().any(|table| table.verdict == TableVerdict::NotVerified)
    }
}

/// What is known of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TableVerdict {
    Equal,
    Different,
    /// The table was not compared; `reason` says why.
    NotVerified,
}

/// The comparison of one table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TableReport {
    /// The table's name at the source.
    pub table: String,
    pub verdict: TableVerdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Rows at the source and in the copy.
    pub source_rows: u64,
    pub copy_rows: u64,
    /// Rows that the copy lacks.
    pub missing: u64,
    /// Rows that only the copy has.
    pub extra: u64,
    /// Rows of one key that differ in other columns.
    pub different: u64,
    /// The first of these rows.
    pub differences: Vec<RowDifference>,
    /// Columns that were not compared, each with the reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_compared: Vec<(String, String)>,
}

impl TableReport {
    pub(super) fn new(table: String) -> Self {
        Self {
            table,
            verdict: TableVerdict::Equal,
            reason: None,
            source_rows: 0,
            copy_rows: 0,
            missing: 0,
            extra: 0,
            different: 0,
            differences: Vec::new(),
            not_compared: Vec::new(),
        }
    }

    pub(super) fn not_verified(table: String, reason: impl Into<String>) -> Self {
        Self { verdict: TableVerdict::NotVerified, reason: Some(reason.into()), ..Self::new(table) }
    }
}

/// How a row differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowVerdict {
    /// The copy lacks the row.
    Missing,
    /// Only the copy has the row.
    Extra,
    Different,
}

/// One row that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowDifference {
    pub kind: RowVerdict,
    /// `column=value` for each column of the key; empty for a table without one.
    pub key: String,
    /// The columns that differ; of a missing or extra row, none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<ColumnDifference>,
}

/// One column of a row that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnDifference {
    pub column: String,
    /// The values, when they are asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copy: Option<String>,
}
