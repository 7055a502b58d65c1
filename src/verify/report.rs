//! What a verification found.

use serde::{Deserialize, Serialize};

use super::Part;
use crate::{
    olap::{Repaired, StoredVerification},
    pgoutput::QualifiedName,
};

/// The result of a verification.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    pub tables: Vec<TableReport>,
    pub seconds: f64,
}

impl Report {
    /// Returns whether some table differs from its source, also after its repair.
    pub fn has_differences(&self) -> bool {
        self.tables.iter().any(TableReport::is_different)
    }

    /// Logs the result, with no values in it.
    pub(super) fn log(&self) {
        for table in self.tables.iter().filter(|table| table.verdict == TableVerdict::Different) {
            tracing::error!(
                event = "verification_found_differences",
                table = table.table,
                lsn = table.lsn,
                missing = table.missing,
                extra = table.extra,
                different = table.different,
                repaired = table.repair.as_ref().is_some_and(RepairReport::is_complete),
                "the copy of a table differs from its source"
            );
        }

        let count = |verdict| self.tables.iter().filter(|table| table.verdict == verdict).count();
        tracing::info!(
            event = "verified",
            equal = count(TableVerdict::Equal),
            different = count(TableVerdict::Different),
            not_verified = count(TableVerdict::NotVerified),
            seconds = self.seconds,
            "the copy was compared with its source"
        );
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

impl TableVerdict {
    fn as_str(self) -> &'static str {
        match self {
            Self::Equal => "equal",
            Self::Different => "different",
            Self::NotVerified => "not_verified",
        }
    }
}

/// The comparison of one table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TableReport {
    /// The table's name at the source.
    pub table: String,
    /// Both sides were compared as of this LSN.
    pub lsn: String,
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
    /// The part of the rows that was compared; none: all rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
    pub seconds: f64,
    /// What was done about the rows that differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repair: Option<RepairReport>,
}

/// The repair of one table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RepairReport {
    /// Rows that were deleted from the copy.
    pub deleted_rows: u64,
    /// Rows of the source that were inserted.
    pub inserted_rows: u64,
    /// The result of comparing the table again.
    pub verdict: TableVerdict,
    /// Why nothing was repaired.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl RepairReport {
    pub(super) fn new(repaired: Repaired) -> Self {
        let Repaired { deleted_rows, inserted_rows } = repaired;
        Self { deleted_rows, inserted_rows, verdict: TableVerdict::NotVerified, reason: None }
    }

    pub(super) fn refused(reason: String) -> Self {
        let verdict = TableVerdict::NotVerified;
        Self { deleted_rows: 0, inserted_rows: 0, verdict, reason: Some(reason) }
    }

    /// Returns whether the table was found equal after its repair.
    pub fn is_complete(&self) -> bool {
        self.reason.is_none() && self.verdict == TableVerdict::Equal
    }
}

impl TableReport {
    pub(super) fn new(table: String) -> Self {
        Self {
            table,
            lsn: String::new(),
            verdict: TableVerdict::Equal,
            reason: None,
            source_rows: 0,
            copy_rows: 0,
            missing: 0,
            extra: 0,
            different: 0,
            differences: Vec::new(),
            not_compared: Vec::new(),
            part: None,
            seconds: 0.0,
            repair: None,
        }
    }

    /// Returns whether the table differs from its source, also after its repair.
    pub fn is_different(&self) -> bool {
        self.verdict == TableVerdict::Different
            && !self.repair.as_ref().is_some_and(RepairReport::is_complete)
    }

    /// Returns the number of rows that a repair replaced, inserted or deleted, after which the
    /// table was found equal.
    pub fn repaired_rows(&self) -> u64 {
        let complete = self.repair.as_ref().filter(|repair| repair.is_complete());
        complete.map_or(0, |repair| repair.deleted_rows.max(repair.inserted_rows))
    }

    /// Returns what the target keeps of the result for the table of this name.
    pub(super) fn stored(&self, table: QualifiedName) -> StoredVerification {
        let Part { number, of } = self.part.unwrap_or(Part { number: 0, of: 1 });
        StoredVerification {
            table,
            finished_at_us: None,
            lsn: self.lsn.clone(),
            verdict: self.verdict.as_str().to_owned(),
            reason: self.reason.clone(),
            part: number,
            parts: of,
            source_rows: self.source_rows,
            copy_rows: self.copy_rows,
            missing: self.missing,
            extra: self.extra,
            different: self.different,
            repaired: self.repaired_rows(),
            seconds: self.seconds,
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
