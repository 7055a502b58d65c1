//! `_rhei.verifications`: the results of `rhei verify`.

use duckdb::params;

use super::{StoredVerification, TargetError, connection::TargetConnection, state::PIPELINE_ID};
use crate::pgoutput::QualifiedName;

/// How long results are kept.
const RETENTION: &str = "INTERVAL 90 DAYS";

/// Adds results, which were all finished now, and drops old ones. The last result of each table
/// stays, however old it is.
pub(super) fn put(
    connection: &TargetConnection,
    rows: &[StoredVerification],
) -> Result<(), TargetError> {
    let mut insert = connection.prepare(&connection.sql(
        "INSERT INTO _rhei.verifications VALUES (now(), ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, \
         ?)",
    ))?;

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
        &connection.sql(&format!(
            "DELETE FROM _rhei.verifications v WHERE finished_at < now() - {RETENTION} AND \
             EXISTS (FROM _rhei.verifications later WHERE later.source_schema = v.source_schema \
             AND later.source_name = v.source_name AND later.finished_at > v.finished_at)"
        )),
        [],
    )?;
    Ok(())
}

/// Returns the last result of each table.
pub(super) fn last(connection: &TargetConnection) -> Result<Vec<StoredVerification>, TargetError> {
    let mut statement = connection.prepare(&connection.sql(
        "SELECT source_schema, source_name, epoch_us(finished_at), lsn, verdict, reason, part, \
         parts, source_rows, copy_rows, missing, extra, different, repaired, seconds \
         FROM _rhei.verifications QUALIFY row_number() OVER (PARTITION BY source_schema, \
         source_name ORDER BY finished_at DESC) = 1 ORDER BY ALL",
    ))?;

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

/// Returns which of `parts` parts was compared last, of each table of which one was. Results of
/// other numbers of parts, or of a table that could not be compared, do not count.
pub(super) fn last_parts(
    connection: &TargetConnection,
    parts: u32,
) -> Result<Vec<(QualifiedName, u32)>, TargetError> {
    let mut statement = connection.prepare(&connection.sql(
        "SELECT source_schema, source_name, arg_max(part, finished_at) FROM _rhei.verifications \
         WHERE parts = ? AND verdict <> 'not_verified' GROUP BY ALL",
    ))?;

    let mut rows = statement.query([parts])?;
    let mut last = Vec::new();
    while let Some(row) = rows.next()? {
        let (schema, name): (String, String) = (row.get(0)?, row.get(1)?);
        last.push((QualifiedName::new(&schema, &name), row.get(2)?));
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::{super::state, *};

    fn result(verdict: &str, part: u32, parts: u32) -> StoredVerification {
        StoredVerification {
            table: QualifiedName::new("public", "t"),
            finished_at_us: None,
            lsn: "0/1".to_owned(),
            verdict: verdict.to_owned(),
            reason: None,
            part,
            parts,
            source_rows: 1,
            copy_rows: 1,
            missing: 0,
            extra: 0,
            different: 0,
            repaired: 0,
            seconds: 0.1,
        }
    }

    #[test]
    fn neither_a_whole_verification_nor_a_failed_one_disturbs_the_turns_of_the_parts() {
        let connection = TargetConnection::in_memory();
        state::create(&connection).unwrap();
        assert!(last_parts(&connection, 4).unwrap().is_empty());

        for stored in [
            result("equal", 0, 4),
            result("different", 1, 4),
            result("equal", 0, 1),
            result("equal", 6, 7),
            result("not_verified", 0, 1),
            result("not_verified", 3, 4),
        ] {
            put(&connection, &[stored]).unwrap();
        }

        let table = QualifiedName::new("public", "t");
        assert_eq!(last_parts(&connection, 4).unwrap(), [(table.clone(), 1)]);
        assert_eq!(last_parts(&connection, 7).unwrap(), [(table, 6)]);
        assert_eq!(last(&connection).unwrap()[0].verdict, "not_verified");
    }
}
