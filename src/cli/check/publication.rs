//! The publications, and whether rhei can make the one that is missing.

use super::finding::{Findings, error, failure, ok, warning};
use crate::{
    cli::CliError,
    pgoutput::QualifiedName,
    pipeline::{
        Options,
        tables::selection::{is_wanted, retain_wanted},
    },
    source::{
        catalog::{self, SourceTable, readiness},
        connection::SqlClient,
        quote::{quote_identifier, quote_table},
        slot,
    },
};

const SUBJECT: &str = "publication";

/// Returns the tables that rhei would copy.
pub(super) async fn check(
    client: &SqlClient,
    options: &Options,
    findings: &mut Findings,
) -> Result<Vec<SourceTable>, CliError> {
    let names = &options.publications;

    let mut tables = match catalog::publication(client, names).await? {
        Some(info) => {
            findings.add(match slot::check_publication(&info) {
                Ok(()) => ok(SUBJECT, format!("{} is there", quoted(names))),
                Err(partial) => failure(SUBJECT, &partial).mended_by(partial.sql()),
            });

            check_column_lists(client, names, findings).await?;
            catalog::published_tables(client, names).await?
        }
        None => {
            announce(client, options, findings).await?;
            catalog::all_tables(client).await?
        }
    };

    for table in tables.iter().filter(|table| is_wanted(options, &table.name)) {
        if table.columns.is_empty() {
            let what = "has no column that is published, so it is not copied";
            findings.add(warning(table.name.to_string(), what));
        }
    }

    retain_wanted(options, &mut tables);
    if tables.is_empty() {
        findings.add(no_table(client, options).await?);
    } else {
        findings.add(ok("tables", format!("{} to copy", tables.len())));
    }

    check_unpublished(client, options, findings).await?;
    check_unlogged(client, options, findings).await?;
    Ok(tables)
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| quote_identifier(name)).collect::<Vec<_>>().join(", ")
}

fn first(names: &[String]) -> &str {
    names.first().map_or("", String::as_str)
}

/// Returns the tables that a new publication would hold.
async fn candidates(client: &SqlClient, options: &Options) -> Result<Vec<QualifiedName>, CliError> {
    let mut candidates = catalog::candidate_tables(client).await?;
    candidates.retain(|table| is_wanted(options, table));
    Ok(candidates)
}

/// Says with which statement rhei will make the publication, or who has to.
async fn announce(
    client: &SqlClient,
    options: &Options,
    findings: &mut Findings,
) -> Result<(), CliError> {
    let names = &options.publications;
    let candidates = candidates(client, options).await?;
    if candidates.is_empty() {
        // What is missing are tables.
        return Ok(());
    }

    if names.len() > 1 {
        let what = format!("one of {} does not exist", quoted(names));
        findings.add(error(SUBJECT, what).hint("rhei makes a publication only if it is the one."));
        return Ok(());
    }

    let server = catalog::server(client).await?;
    let mut others = readiness::tables_of_others(client).await?;
    others.retain(|table| candidates.contains(table));

    let mut obstacles = Vec::new();
    if !server.can_create_in_database {
        obstacles.push(format!("the role lacks CREATE on database \"{}\"", server.database));
    }
    if let Some(one) = others.first() {
        let more = others.len() - 1;
        let more = if more == 0 { String::new() } else { format!(" and {more} more") };
        obstacles.push(format!("other roles own {one}{more}"));
    }

    let sql = slot::publication_sql(first(names), &candidates);
    findings.add(if obstacles.is_empty() || server.is_superuser {
        ok(SUBJECT, format!("{} will be made for {} tables", quoted(names), candidates.len()))
            .sql(sql)
    } else {
        let what = format!(
            "{} does not exist, and rhei may not make it: {}",
            quoted(names),
            obstacles.join(", and ")
        );
        error(SUBJECT, what)
            .sql(sql)
            .hint("The owner of the tables runs it, who needs CREATE on the database.")
    });
    Ok(())
}

async fn no_table(
    client: &SqlClient,
    options: &Options,
) -> Result<super::finding::Finding, CliError> {
    let names = &options.publications;
    let candidates = candidates(client, options).await?;
    if candidates.is_empty() {
        return Ok(error("tables", "no table of the source matches the settings")
            .hint("See [source] tables and exclude."));
    }

    let what = format!("{} holds no table that the settings choose", quoted(names));
    let sqls = candidates.iter().map(|table| slot::add_table_sql(first(names), table));
    Ok(error("tables", what).sqls(sqls))
}

/// Reports tables that two publications bring with different columns.
async fn check_column_lists(
    client: &SqlClient,
    names: &[String],
    findings: &mut Findings,
) -> Result<(), CliError> {
    for table in catalog::conflicting_column_lists(client, names).await? {
        let what = "is in two publications with different column lists, so decoding fails at its \
                    first change";
        let too_many = readiness::publications_too_many(client, &table, names).await?;
        let dropped = too_many.iter().map(|publication| {
            let publication = quote_identifier(publication);
            format!("ALTER PUBLICATION {publication} DROP TABLE {}", quote_table(&table))
        });

        let kept = "The columns of the publication that is left are copied then.";
        findings.add(error(table.to_string(), what).sqls(dropped).hint(kept));
    }
    Ok(())
}

/// Reports tables that the settings choose and the publications lack.
async fn check_unpublished(
    client: &SqlClient,
    options: &Options,
    findings: &mut Findings,
) -> Result<(), CliError> {
    let names = &options.publications;
    let Some((rights, missing)) = catalog::unpublished(client, names).await? else {
        return Ok(());
    };

    for table in missing.iter().filter(|table| is_wanted(options, &table.name)) {
        // Without patterns, the publication says what is copied, unless rhei made it.
        if !rights.is_made_by_rhei && options.tables.is_empty() {
            continue;
        }

        let subject = table.name.to_string();
        let sql = slot::add_table_sql(first(names), &table.name);
        let is_added = rights.is_made_by_rhei
            && rights.may_alter
            && table.is_own
            && table.has_identity
            && options.add_tables == crate::pipeline::options::AddTables::Auto;

        findings.add(if is_added {
            ok(subject, format!("will be added to {}", quoted(names)))
        } else if table.has_identity {
            warning(subject, "is chosen by the settings, but not published").sql(sql)
        } else {
            let what = "is chosen by the settings, but not published, and has no key: once it is \
                        published, PostgreSQL refuses UPDATE and DELETE of it";
            warning(subject, what).sql(sql).hint("Add a primary key before.")
        });
    }
    Ok(())
}

async fn check_unlogged(
    client: &SqlClient,
    options: &Options,
    findings: &mut Findings,
) -> Result<(), CliError> {
    let unlogged = catalog::unlogged_tables(client).await?;
    for table in unlogged.iter().filter(|table| is_wanted(options, table)) {
        let what = "is UNLOGGED: its changes are not in the WAL, so it is left out";
        findings.add(
            warning(table.to_string(), what)
                .sql(format!("ALTER TABLE {} SET LOGGED", quote_table(table))),
        );
    }
    Ok(())
}
