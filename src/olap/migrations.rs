//! Brings `_rhei` of a file that an older rhei wrote into the layout of this one.
//!
//! `schemas/state.sql` is the layout of a new file. Each file of `schemas/migrations` leads from
//! one format to the next one, and their sum leads to the same layout, column by column. A
//! migration only adds: it holds ALTERs, and no DELETE or UPDATE before them, since DuckDB refuses
//! the COMMIT of an ALTER after a DELETE in one transaction.

use duckdb::params;

use super::{TargetError, connection::TargetConnection, state};
use crate::failpoint::reached;

/// The version of the layout of `_rhei` that this rhei writes. A newer version is refused, since
/// its meaning is not known here.
pub const FORMAT_VERSION: i32 = 9;

/// The oldest format that is brought to [`FORMAT_VERSION`].
pub const OLDEST_FORMAT: i32 = 3;

/// SQL that leads to each format from the one before it.
const MIGRATIONS: [(i32, &str); (FORMAT_VERSION - OLDEST_FORMAT) as usize] = [
    (4, include_str!("../../schemas/migrations/4_remedy.sql")),
    (5, include_str!("../../schemas/migrations/5_copy_xids.sql")),
    (6, include_str!("../../schemas/migrations/6_truncated_by.sql")),
    (7, include_str!("../../schemas/migrations/7_pipeline_id.sql")),
    (8, include_str!("../../schemas/migrations/8_verifications.sql")),
    (9, include_str!("../../schemas/migrations/9_writer.sql")),
];

/// Brings an older `_rhei` to [`FORMAT_VERSION`], in one transaction: a crash leaves the old format
/// or the new one. Returns the format that was found when it was an older one. Does nothing to a
/// file without `_rhei`.
///
/// # Errors
/// The format is newer than this rhei, or older than [`OLDEST_FORMAT`], or DuckDB refuses.
pub fn run(connection: &TargetConnection) -> Result<Option<i32>, TargetError> {
    let Some((found, written_by)) = state::format(connection)? else { return Ok(None) };

    match found {
        FORMAT_VERSION => return Ok(None),
        OLDEST_FORMAT..FORMAT_VERSION => {}
        _ => return Err(unreadable(found, written_by)),
    }

    connection.execute_batch("BEGIN")?;
    let migrated = migrate(connection, found).and_then(|()| {
        reached("migration.written");
        connection.commit()
    });

    if migrated.is_err() {
        // The error that came first says more.
        let _ = connection.execute_batch("ROLLBACK");
    }
    migrated.map(|()| Some(found))
}

/// Returns the error for a file in a format that this rhei does not read as it is.
pub fn unreadable(found: i32, written_by: String) -> TargetError {
    match found {
        OLDEST_FORMAT..FORMAT_VERSION => {
            TargetError::NotMigrated { found, written_by, known: FORMAT_VERSION }
        }
        i32::MIN..OLDEST_FORMAT => TargetError::OlderFormat { found, written_by },
        _ => TargetError::NewerFormat { found, written_by, known: FORMAT_VERSION },
    }
}

fn migrate(connection: &TargetConnection, found: i32) -> Result<(), TargetError> {
    for (_, sql) in MIGRATIONS.iter().filter(|(format, _)| *format > found) {
        connection.execute_batch(&connection.sql(sql))?;
    }

    // An UPDATE of this row would keep CHECKPOINT waiting under an open reader.
    connection.execute_batch(&connection.sql(
        "CREATE TEMP TABLE _rhei_pipeline AS SELECT * FROM _rhei.pipeline; \
         DELETE FROM _rhei.pipeline;",
    ))?;
    connection.execute(
        &connection.sql(
            "INSERT INTO _rhei.pipeline SELECT * REPLACE (? AS format_version, ? AS rhei_version) \
             FROM _rhei_pipeline",
        ),
        params![FORMAT_VERSION, env!("CARGO_PKG_VERSION")],
    )?;
    Ok(connection.execute_batch("DROP TABLE _rhei_pipeline")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The layout of format 3, as rhei 0.1 wrote it.
    const FORMAT_3: &str = include_str!("../../fixtures/state/format_3.sql");

    fn open() -> TargetConnection {
        TargetConnection::in_memory()
    }

    fn layout(connection: &TargetConnection) -> Vec<String> {
        let mut statement = connection
            .prepare(
                "SELECT concat_ws(' ', table_name, column_index, column_name, data_type, \
                 is_nullable, column_default) FROM duckdb_columns() \
                 WHERE schema_name = '_rhei' ORDER BY table_name, column_index",
            )
            .unwrap();
        let rows = statement.query_map([], |row| row.get(0)).unwrap();
        rows.map(Result::unwrap).collect()
    }

    #[test]
    fn each_migration_leads_to_the_next_format_and_the_last_one_to_this_one() {
        let formats: Vec<i32> = MIGRATIONS.iter().map(|(format, _)| *format).collect();
        assert_eq!(formats, (OLDEST_FORMAT + 1..=FORMAT_VERSION).collect::<Vec<_>>());
    }

    #[test]
    fn a_migrated_file_has_the_layout_of_a_new_one() {
        let (old, new) = (open(), open());
        old.execute_batch(FORMAT_3).unwrap();
        state::create(&new).unwrap();

        assert_ne!(layout(&old), layout(&new));
        assert_eq!(run(&old).unwrap(), Some(3));
        assert_eq!(layout(&old), layout(&new));
        assert_eq!(state::format(&old).unwrap().unwrap().0, FORMAT_VERSION);
        assert_eq!(run(&old).unwrap(), None);
    }

    #[test]
    fn a_migration_keeps_the_rows_and_gives_each_its_pipeline() {
        let old = open();
        old.execute_batch(FORMAT_3).unwrap();
        run(&old).unwrap();

        for table in ["pipeline", "tables", "columns", "cycles", "jobs"] {
            let counted: (i64, i64) = old
                .query_row(
                    &format!(
                        "SELECT count(*), count(*) FILTER (pipeline_id = 1) FROM _rhei.{table}"
                    ),
                    [],
                    |row| Ok((row.get(0)?, row.get(1)?)),
                )
                .unwrap();
            assert!(counted.0 > 0 && counted.0 == counted.1, "{table}: {counted:?}");
        }

        let state = state::read(&old).unwrap().unwrap();
        assert!(!state.tables.is_empty());
    }

    #[test]
    fn a_format_that_is_not_known_is_refused_and_the_file_stays_as_it_is() {
        for (format, expected) in [
            (1, "which this rhei no longer reads"),
            (2, "which this rhei no longer reads"),
            (FORMAT_VERSION + 1, "knows formats up to"),
        ] {
            let file = open();
            file.execute_batch(FORMAT_3).unwrap();
            file.execute("UPDATE _rhei.pipeline SET format_version = ?", params![format]).unwrap();

            let before = layout(&file);
            let refused = run(&file).unwrap_err().to_string();
            assert!(refused.contains(expected), "{format}: {refused}");
            assert_eq!(layout(&file), before);
        }
    }

    #[test]
    fn a_migration_that_fails_leaves_the_old_format() {
        let file = open();
        file.execute_batch(FORMAT_3).unwrap();
        file.execute_batch("ALTER TABLE _rhei.jobs ADD COLUMN pipeline_id UINTEGER").unwrap();

        let before = layout(&file);
        assert!(run(&file).is_err());
        assert_eq!(layout(&file), before);
        assert_eq!(state::format(&file).unwrap().unwrap().0, 3);
    }
}
