//! Each table: rights, key, types, names, text.

use std::collections::{BTreeMap, BTreeSet};

use super::finding::{Findings, error, failure, warning};
use crate::{
    cli::CliError,
    olap::DuckDb,
    pgoutput::{QualifiedName, ReplicaIdentity},
    pipeline::{
        Options,
        tables::{
            plan::{PlanOptions, TablePlanError, plan, refuse_unknown_layout},
            selection::{names_of, table_settings, target_names, types_of},
        },
    },
    source::{
        catalog::{
            self, SourceKey, SourceTable,
            readiness::{self, Obstacle, TextCheck},
        },
        connection::SqlClient,
        quote::{quote_identifier, quote_table},
    },
};

pub(super) async fn check(
    client: &SqlClient,
    options: &Options,
    tables: &[SourceTable],
    findings: &mut Findings,
) -> Result<(), CliError> {
    check_rights(client, options, tables, findings).await?;
    for table in tables {
        check_key(table, findings);
    }

    check_plans(client, options, tables, findings).await?;

    let server = catalog::server(client).await?;
    if server.encoding == "SQL_ASCII" {
        check_texts(client, options, tables, findings).await?;
    }
    Ok(())
}

/// Each partition is read on its own, and the privileges on its root do not apply to it.
async fn check_rights(
    client: &SqlClient,
    options: &Options,
    tables: &[SourceTable],
    findings: &mut Findings,
) -> Result<(), CliError> {
    let mut read: BTreeMap<QualifiedName, BTreeSet<&str>> = BTreeMap::new();
    for table in tables {
        let excluded = table_settings(options, &table.name).exclude_columns;
        let columns = table.columns.iter().map(|column| column.name.as_str());
        let columns: BTreeSet<&str> =
            columns.filter(|column| !excluded.iter().any(|other| other == column)).collect();
        read.extend(table.leaves.iter().map(|leaf| (leaf.name.clone(), columns.clone())));
    }

    let oids: Vec<u32> =
        tables.iter().flat_map(|table| table.leaves.iter().map(|leaf| leaf.oid)).collect();

    for mut obstacle in readiness::obstacles(client, &oids).await? {
        if let Some(read) = read.get(&obstacle.table) {
            obstacle.unreadable_columns.retain(|column| read.contains(column.as_str()));
        }
        add_obstacle(&obstacle, options.source.user(), findings);
    }
    Ok(())
}

fn add_obstacle(obstacle: &Obstacle, user: &str, findings: &mut Findings) {
    let (table, role) = (quote_table(&obstacle.table), quote_identifier(user));
    let subject = || obstacle.table.to_string();
    let schema = quote_identifier(&obstacle.table.schema);

    if obstacle.lacks_schema {
        findings.add(
            error(subject(), format!("{role} may not use its schema"))
                .sql(format!("GRANT USAGE ON SCHEMA {schema} TO {role}")),
        );
    }

    let columns: Vec<String> =
        obstacle.unreadable_columns.iter().map(|column| quote_identifier(column)).collect();
    if !columns.is_empty() && obstacle.may_read_others {
        findings.add(
            error(subject(), format!("{role} may not read {}", columns.join(", ")))
                .sql(format!("GRANT SELECT ({}) ON {table} TO {role}", columns.join(", ")))
                .hint("Or leave these columns out, by exclude_columns in its settings."),
        );
    } else if !columns.is_empty() {
        findings.add(
            error(subject(), format!("{role} may not read it"))
                .sql(format!("GRANT SELECT ON {table} TO {role}")),
        );
    }

    if obstacle.has_row_security {
        let what = format!("row-level security hides rows of it from {role}");
        findings.add(
            error(subject(), what)
                .sql(format!("ALTER ROLE {role} BYPASSRLS"))
                .hint("rhei copies all rows or none: a part of them would pass for the whole."),
        );
    }
}

fn check_key(table: &SourceTable, findings: &mut Findings) {
    let subject = table.name.to_string();
    let full = || format!("ALTER TABLE {} REPLICA IDENTITY FULL", quote_table(&table.name));

    match catalog::key_of(table) {
        SourceKey::Columns(_) => {}
        SourceKey::WholeRow => {
            let what = "has no key; rows are matched whole, which is exact but slower";
            findings.add(warning(&subject, what).hint("Add a primary key."));
        }
        SourceKey::AppendOnly => {
            let what = "has no replica identity; PostgreSQL refuses UPDATE and DELETE once it is \
                        published";
            findings.add(warning(&subject, what).sql(full()).hint("Or add a primary key."));
        }
    }

    // See trap 48a.
    let has_toast = table.columns.iter().any(|column| column.toastable);
    if table.row_filter.is_some() && has_toast && table.replica_identity != ReplicaIdentity::Full {
        let what = "has a row filter and large values: an update that moves a row into the filter \
                    may lack a value";
        findings.add(warning(subject, what).sql(full()));
    }
}

/// Returns whether there is a copy of a table already.
fn is_copied(options: &Options, table: &QualifiedName) -> bool {
    let stored = DuckDb::read_state(&options.target).ok().flatten();
    stored.is_some_and(|(state, _)| {
        state.tables.iter().any(|stored| stored.source == *table && !stored.columns.is_empty())
    })
}

/// Checks types, settings, and names that DuckDB does not distinguish (trap 59).
async fn check_plans(
    client: &SqlClient,
    options: &Options,
    tables: &[SourceTable],
    findings: &mut Findings,
) -> Result<(), CliError> {
    let types = types_of(client, tables).await?;
    let targets = target_names(options, &names_of(tables), &BTreeMap::new());

    for table in tables {
        let subject = table.name.to_string();
        let settings = table_settings(options, &table.name);
        let plan_options =
            PlanOptions { settings: &settings, null_unrepresentable: false, before: None };

        let spec = match plan(table, &types, plan_options) {
            Ok(spec) => spec,
            Err(refused) => {
                let mend = match &refused {
                    TablePlanError::WithoutWal { .. } => {
                        readiness::sql_for_wal(client, &table.leaves_without_wal).await?
                    }
                    _ => Vec::new(),
                };
                findings.add(failure(&subject, &refused).sqls(mend));
                continue;
            }
        };

        if let Err(unknown) = refuse_unknown_layout(&spec, &settings) {
            findings.add(if is_copied(options, &table.name) {
                warning(&subject, unknown.to_string().lines().next().unwrap_or_default())
            } else {
                failure(&subject, &unknown)
            });
        }

        let mut names: Vec<String> = spec
            .columns
            .iter()
            .filter(|column| column.target_name != column.name)
            .map(|column| format!("column \"{}\" is \"{}\"", column.name, column.target_name))
            .collect();

        if let Some(target) = targets.get(&table.oid).filter(|target| **target != spec.target) {
            names.insert(0, format!("the table is {target}"));
        }
        if !names.is_empty() {
            let what = format!("has other names in DuckDB: {}", names.join(", "));
            findings.add(warning(subject, what).hint(
                "DuckDB does not tell the case of letters apart, and some names are its \
                           or rhei's own.",
            ));
        }
    }
    Ok(())
}

/// Looks through the text of a database that may be in any encoding.
async fn check_texts(
    client: &SqlClient,
    options: &Options,
    tables: &[SourceTable],
    findings: &mut Findings,
) -> Result<(), CliError> {
    for table in tables {
        let subject = table.name.to_string();
        let settings = table_settings(options, &table.name);
        let columns: Vec<&str> = table
            .columns
            .iter()
            .filter(|column| column.toastable && !settings.exclude_columns.contains(&column.name))
            .map(|column| column.name.as_str())
            .collect();

        match readiness::check_text(client, &table.name, &columns).await? {
            TextCheck::Valid => {}
            TextCheck::Unfinished => {
                let what = "is too large to look through: a text that is not UTF-8 would pause it";
                findings.add(warning(subject, what));
            }
            TextCheck::Invalid(column) => {
                let what = format!(
                    "column \"{column}\" holds text that is not UTF-8, and the database says \
                     SQL_ASCII"
                );
                findings.add(
                    error(subject, what).sql(readiness::sql_to_utf8(&table.name, &column)).hint(
                        "The statement takes what is not UTF-8 for LATIN1: name the \
                               encoding that it is in. Then `rhei backfill --table` copies a \
                               table that was paused because of it.",
                    ),
                );
            }
        }
    }
    Ok(())
}
