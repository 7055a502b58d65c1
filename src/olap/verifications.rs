//! `_rhei.verifications`: the results of `rhei verify`.

use duckdb::{Connection, params};

use super::{StoredVerification, TargetError, state::PIPELINE_ID};
use crate::pgoutput::QualifiedName;

/// How long results are kept.
const RETENTION: &str = "INTERVAL 90 DAYS";

/// Adds results, which were all finished now, and drops old ones. The last result of each table
/// stays, however old it is.
pub(super) fn put(connection: &Connection, rows: &[StoredVerification]) -> Result<(), TargetError> {
    let mut insert = connection.prepare(
        "INSERT INTO _rhei.verifications VALUES (now(), ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, \
         ?)",
    )?;

    for row in rows {
        insert.execute(params![
            row.lsn,
            row.table.schema,
            row.table.name,
            row.verdict,
            row.reason,
            row.part,
            row.parts,
            row.source_rows,
            row.copy_rows,
            row.missing,
            row.extra,
            row.different,
            row.repaired,
            row.seconds,
            PIPELINE_ID,
        ])?;
    }

    connection.execute(
        &format!(
            "DELETE FROM _rhei.verifications v WHERE finished_at < now() - {RETENTION} AND \
             EXISTS (FROM _rhei.verifications later WHERE later.source_schema = v.source_schema \
             AND later.source_name = v.source_name AND later.finished_at > v.finished_at)"
        ),
        [],
    )?;
    Ok(())
}

/// Returns the last result of each table.
pub(super) fn last(connection: &Connection) -> Result<Vec<StoredVerification>, TargetError> {
    let mut statement = connection.prepare(
        "SELECT source_schema, source_name, epoch_us(finished_at), lsn, verdict, reason, part, \
         parts, source_rows, copy_rows, missing, extra, different, repaired, seconds \
         FROM _rhei.verifications QUALIFY row_number() OVER (PARTITION BY source_schema, \
         source_name ORDER BY finished_at DESC) = 1 ORDER BY ALL",
    )?;

    let mut rows = statement.query([])?;
    let mut last = Vec::new();
    while let Some(row) = rows.next()? {
        let (schema, name): (String, String) = (row.get(0)?, row.get(1)?);
        last.push(StoredVerification {
            table: QualifiedName::new(&schema, &name),
            finished_at_us: row.get(2)?,
            lsn: row.get(3)?,
            verdict: row.get(4)?,
            reason: row.get(5)?,
            part: row.get(6)?,
            parts: row.get(7)?,
            source_rows: row.get(8)?,
            copy_rows: row.get(9)?,
            missing: row.get(10)?,
            extra: row.get(11)?,
            different: row.get(12)?,
            repaired: row.get(13)?,
            seconds: row.get(14)?,
        });
    }
    Ok(last)
}
