//! New tables of the source join the publication that rhei made.

use super::attach::warn_when_stalled;
use crate::{
    pgoutput::QualifiedName,
    pipeline::{Context, EngineError, options::AddTables, tables::selection::is_wanted},
    source::{
        catalog::{self, PublicationRights, UnpublishedTable},
        connection::SqlClient,
        slot,
        sqlstate::{Refusal, refusal},
    },
};

/// Adds the tables that the settings choose to the publication, where rhei made it and may alter
/// it. The other tables that the settings name are recorded, with the SQL that publishes them.
/// Returns whether any table was added.
///
/// Must not be called inside a transaction.
pub(super) async fn add_new_tables(
    context: &Context,
    sql: &SqlClient,
) -> Result<bool, EngineError> {
    let options = &context.options;
    let Some((rights, mut missing)) = catalog::unpublished(sql, &options.publications).await?
    else {
        return Ok(false);
    };
    missing.retain(|table| is_wanted(options, &table.name));

    let name = options.publications.first().map_or("", String::as_str);
    let mut added = Vec::new();
    let mut left_out = Vec::new();

    for table in missing {
        let reason = match obstacle(options.add_tables, &rights, &table) {
            None => match add(sql, name, &table.name).await? {
                Added::Yes => {
                    added.push(table.name.to_string());
                    continue;
                }
                // The next look comes to the table.
                Added::Locked => continue,
                Added::Refused => "the source refuses to add it",
            },
            Some(reason) => reason,
        };

        // Without patterns, the publication says what is copied, unless rhei made it.
        if rights.is_made_by_rhei || !options.tables.is_empty() {
            let sql = slot::add_table_sql(name, &table.name);
            left_out.push((table.name, reason, sql));
        }
    }

    context.unpublished.set(left_out);
    if !added.is_empty() {
        tracing::info!(
            event = "tables_added",
            publication = name,
            tables = added.join(", "),
            "new tables were added to the publication, and will be copied"
        );
    }
    Ok(!added.is_empty())
}

/// Returns why rhei does not add a table by itself, if it does not.
fn obstacle(
    add_tables: AddTables,
    rights: &PublicationRights,
    table: &UnpublishedTable,
) -> Option<&'static str> {
    if !rights.is_made_by_rhei {
        Some("rhei did not make the publication")
    } else if add_tables == AddTables::Warn {
        Some("[source] add_tables is \"warn\"")
    } else if !rights.may_alter || !table.is_own {
        Some("publishing it takes the owner of the table and of the publication")
    } else if !table.has_identity {
        // The application could not update its own table any more.
        Some("it has no key: once it is published, PostgreSQL refuses UPDATE and DELETE of it")
    } else {
        None
    }
}

enum Added {
    Yes,
    /// Another session holds a lock on the table.
    Locked,
    Refused,
}

async fn add(
    sql: &SqlClient,
    publication: &str,
    table: &QualifiedName,
) -> Result<Added, EngineError> {
    let statement = slot::add_table_sql(publication, table);
    let batch = format!("BEGIN; SET LOCAL lock_timeout = '2s'; {statement}; COMMIT");

    let what = "adding a table to the publication waits for a lock of another session";
    let Err(error) = warn_when_stalled(what, sql.batch_execute(&batch)).await else {
        return Ok(Added::Yes);
    };

    let Some(code) = error.code().map(|code| code.code().to_owned()) else {
        return Err(error.into());
    };
    sql.batch_execute("ROLLBACK").await?;

    Ok(match refusal(&code) {
        Refusal::Locked | Refusal::Passing => Added::Locked,
        Refusal::Outage => return Err(error.into()),
        Refusal::Data | Refusal::Lasting => Added::Refused,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_added_only_where_nobody_is_hurt_by_it() {
        let rights = PublicationRights { is_made_by_rhei: true, may_alter: true };
        let table = || UnpublishedTable {
            name: QualifiedName::new("public", "t"),
            is_own: true,
            has_identity: true,
        };

        let cases: &[(&str, AddTables, PublicationRights, UnpublishedTable, bool)] = &[
            ("a plain table", AddTables::Auto, rights, table(), true),
            ("switched off", AddTables::Warn, rights, table(), false),
            (
                "a publication of others",
                AddTables::Auto,
                PublicationRights { is_made_by_rhei: false, ..rights },
                table(),
                false,
            ),
            (
                "a publication that rhei may not alter",
                AddTables::Auto,
                PublicationRights { may_alter: false, ..rights },
                table(),
                false,
            ),
            (
                "a table of another role",
                AddTables::Auto,
                rights,
                UnpublishedTable { is_own: false, ..table() },
                false,
            ),
            (
                "a table without a key",
                AddTables::Auto,
                rights,
                UnpublishedTable { has_identity: false, ..table() },
                false,
            ),
        ];

        for (name, add_tables, rights, table, is_added) in cases {
            assert_eq!(obstacle(*add_tables, rights, table).is_none(), *is_added, "{name}");
        }
    }
}
