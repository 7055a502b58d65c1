//! `rhei check`: finds the problems that would stop rhei, and names the fix of each.

use std::{collections::BTreeSet, process::ExitCode};

use super::{CliError, Invocation};
use crate::{
    config::Config,
    olap::DuckDb,
    pgoutput::{QualifiedName, ReplicaIdentity},
    pipeline::{
        options::defaults,
        tables::{
            names::target_name,
            plan::{PlanOptions, plan},
        },
    },
    source::{
        catalog::{self, SourceKey, SourceTable},
        connection::{SqlClient, connect_sql},
        ddl_trigger::{self, DdlTrigger},
        quote::{quote_identifier, quote_table},
        slot,
    },
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Ok,
    Warning,
    Error,
}

struct Finding {
    level: Level,
    subject: String,
    what: String,
    mend: String,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(
        &mut self,
        level: Level,
        subject: impl Into<String>,
        what: impl Into<String>,
        mend: impl Into<String>,
    ) {
        self.0.push(Finding {
            level,
            subject: subject.into(),
            what: what.into(),
            mend: mend.into(),
        });
    }

    fn ok(&mut self, subject: &str, what: impl Into<String>) {
        self.add(Level::Ok, subject, what, "");
    }
}

#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Installs an event trigger at the source that describes each change of a table in the stream
    /// itself. Needs a superuser. Without it rhei reads the catalogs, and copies a table again
    /// where these leave a doubt.
    #[arg(long)]
    install_ddl_trigger: bool,
}

/// Runs the command.
pub async fn run(session: Invocation, args: CheckArgs) -> Result<ExitCode, CliError> {
    let source = session.source()?;
    let client = connect_sql(&source, "check").await?;
    let mut findings = Findings::default();

    if args.install_ddl_trigger {
        install_ddl_trigger(&client).await?;
    }
    check_ddl_trigger(&client, &mut findings).await?;

    findings.ok("connection", source.redacted());
    check_server(&client, &session, &mut findings).await?;

    let tables = check_publication(&client, &session, &mut findings).await?;
    for table in &tables {
        check_table(table, source.user(), &mut findings);
    }

    check_plans(&client, &session, &tables, &mut findings).await?;
    for blocker in catalog::open_transactions(&client).await? {
        findings.add(
            Level::Warning,
            "open transactions",
            blocker,
            "slot creation waits for it to end",
        );
    }

    check_target(&session, &mut findings);
    Ok(print(&findings))
}

async fn install_ddl_trigger(client: &SqlClient) -> Result<(), CliError> {
    let Err(error) = client.batch_execute(ddl_trigger::SQL).await else { return Ok(()) };

    let reason =
        error.as_db_error().map_or_else(|| error.to_string(), |error| error.message().to_owned());
    let hint = error.as_db_error().and_then(|error| error.hint()).map_or_else(
        || "it takes a superuser; the SQL is in schemas/ddl_trigger.sql".to_owned(),
        |hint| format!("{hint}; the SQL is in schemas/ddl_trigger.sql"),
    );

    Err(CliError::Failed(format!(
        "the event trigger could not be installed: {reason}\nhint: {hint}"
    )))
}

async fn check_ddl_trigger(client: &SqlClient, findings: &mut Findings) -> Result<(), CliError> {
    const SUBJECT: &str = "event trigger";
    match ddl_trigger::look(client).await? {
        DdlTrigger::Usable(_) => {
            findings.ok(SUBJECT, "rhei_ddl describes schema changes in the stream")
        }
        DdlTrigger::Absent => {
            findings.ok(
                SUBJECT,
                "not installed (--install-ddl-trigger); the catalogs are read instead",
            );
        }
        DdlTrigger::Foreign { why } => {
            let what = format!(
                "rhei_ddl {why}: it is not listened to, and may do anything in the DDL of every \
                 role"
            );
            let mend = "as a superuser: DROP EVENT TRIGGER rhei_ddl, then rhei check \
                        --install-ddl-trigger";
            findings.add(Level::Error, SUBJECT, what, mend);
        }
        DdlTrigger::Unreadable { grant } => {
            let what = "this role may not read the secret that rhei_ddl signs with, so it is not \
                        listened to";
            findings.add(Level::Warning, SUBJECT, what, grant);
        }
    }
    Ok(())
}

async fn check_server(
    client: &SqlClient,
    session: &Invocation,
    findings: &mut Findings,
) -> Result<(), CliError> {
    let server = catalog::server(client).await?;
    match slot::check_server(&server) {
        Ok(()) => {
            findings.ok("server", format!("PostgreSQL {}, wal_level = logical", server.version))
        }
        Err(error) => explain(findings, "server", &error.to_string()),
    }

    if server.is_superuser || server.can_replicate {
        findings.ok("role", format!("\"{}\" may replicate", server.user));
    } else {
        let mend = format!(
            "ALTER ROLE {} REPLICATION; (a managed server may have a role to grant)",
            quote_identifier(&server.user)
        );
        findings.add(Level::Error, "role", format!("\"{}\" may not replicate", server.user), mend);
    }

    for (name, used, max) in [
        ("max_replication_slots", server.used_slots, server.max_slots),
        ("max_wal_senders", server.used_senders, server.max_senders),
    ] {
        // The stream needs one, and the snapshot of tables that come later needs one.
        if max - used < 2 {
            let mend = format!("ALTER SYSTEM SET {name} = {}; then restart the source", used + 4);
            findings.add(
                Level::Warning,
                name,
                format!("{used} of {max} are in use, and rhei needs 2"),
                mend,
            );
        } else {
            findings.ok(name, format!("{used} of {max} in use"));
        }
    }

    let name = &session.config.slot;
    match catalog::slot(client, name).await? {
        None => findings.ok("slot", format!("\"{name}\" will be made")),
        Some(found) if found.wal_status.as_deref() == Some("lost") => {
            findings.add(
                Level::Error,
                "slot",
                format!("\"{name}\" is lost"),
                "rhei backfill --force",
            );
        }
        Some(found) => {
            let held = found.held_bytes.unwrap_or_default();
            let use_word = if found.active { "in use" } else { "not in use" };
            findings.ok(
                "slot",
                format!("\"{name}\" is there, {use_word}, and holds {held} bytes of WAL"),
            );
        }
    }
    Ok(())
}

/// Returns the tables that rhei would copy.
async fn check_publication(
    client: &SqlClient,
    session: &Invocation,
    findings: &mut Findings,
) -> Result<Vec<SourceTable>, CliError> {
    let config = &session.config;
    let names = &config.publications;

    let mut tables = match catalog::publication(client, names).await? {
        Some(info) => {
            match slot::check_publication(&info) {
                Ok(()) => findings.ok("publication", format!("{} is there", quoted(names))),
                Err(error) => explain(findings, "publication", &error.to_string()),
            }

            check_column_lists(client, names, findings).await?;
            catalog::published_tables(client, names).await?
        }
        None if names.len() > 1 => {
            let error = slot::SlotError::PublicationMissing { names: names.clone() };
            explain(findings, "publication", &error.to_string());
            return Ok(Vec::new());
        }
        None => {
            announce_publication(client, config, findings).await?;
            catalog::all_tables(client).await?
        }
    };

    tables.retain(|table| is_wanted(config, &table.name));
    if tables.is_empty() {
        findings.add(Level::Error, "tables", "no table matches", "see [source] tables and exclude");
    } else {
        findings.ok("tables", format!("{} to copy", tables.len()));
    }

    if catalog::publication(client, names).await?.is_some() {
        check_unpublished(client, config, findings).await?;
    }
    check_unlogged(client, config, findings).await?;

    Ok(tables)
}

/// Returns whether the settings choose a table.
fn is_wanted(config: &Config, table: &QualifiedName) -> bool {
    (config.tables.is_empty() || config.tables.iter().any(|pattern| pattern.matches(table)))
        && !config.exclude.iter().any(|pattern| pattern.matches(table))
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ")
}

async fn check_column_lists(
    client: &SqlClient,
    publications: &[String],
    findings: &mut Findings,
) -> Result<(), CliError> {
    for table in catalog::conflicting_column_lists(client, publications).await? {
        if let Err(error) = slot::check_column_lists(&[table], publications) {
            explain(findings, "publication", &error.to_string());
        }
    }
    Ok(())
}

/// Says with which statement rhei will make the publication.
async fn announce_publication(
    client: &SqlClient,
    config: &Config,
    findings: &mut Findings,
) -> Result<(), CliError> {
    let names = &config.publications;
    let name = names.first().map_or(defaults::PUBLICATION, String::as_str);

    let mut candidates = catalog::candidate_tables(client).await?;
    candidates.retain(|table| is_wanted(config, table));

    let sql = slot::publication_sql(name, &candidates);
    findings.add(
        Level::Ok,
        "publication",
        format!("{} will be made for {} tables", quoted(names), candidates.len()),
        sql,
    );
    Ok(())
}

/// Warns about tables that the settings name and the publications lack.
async fn check_unpublished(
    client: &SqlClient,
    config: &Config,
    findings: &mut Findings,
) -> Result<(), CliError> {
    let names = &config.publications;
    let published = catalog::published_names(client, names).await?;
    let mut others = catalog::candidate_tables(client).await?;
    others.retain(|table| {
        is_wanted(config, table) && !published.iter().any(|(_, name)| name == table)
    });

    for table in others.iter().filter(|_| !config.tables.is_empty()) {
        let mend = format!(
            "ALTER PUBLICATION {} ADD TABLE {}",
            names.first().map_or_else(String::new, |name| quote_identifier(name)),
            quote_table(table)
        );
        findings.add(
            Level::Warning,
            table.to_string(),
            "is in [source] tables, but not published",
            mend,
        );
    }
    Ok(())
}

async fn check_unlogged(
    client: &SqlClient,
    config: &Config,
    findings: &mut Findings,
) -> Result<(), CliError> {
    let unlogged = catalog::unlogged_tables(client).await?;
    for table in unlogged.iter().filter(|table| is_wanted(config, table)) {
        let mend = format!("ALTER TABLE {} SET LOGGED", quote_table(table));
        findings.add(
            Level::Warning,
            table.to_string(),
            "is UNLOGGED: its changes are not in the WAL, so it is left out",
            mend,
        );
    }
    Ok(())
}

fn check_table(table: &SourceTable, user: &str, findings: &mut Findings) {
    let subject = table.name.to_string();

    // Each partition is read on its own, and the privileges on its root do not apply to it.
    let leaves = table
        .leaves
        .iter()
        .filter(|leaf| leaf.oid != table.oid)
        .map(|leaf| (&leaf.name, leaf.can_select));

    let unreadable = std::iter::once((&table.name, table.can_select))
        .chain(leaves)
        .filter(|(_, can_select)| !can_select);

    for (name, _) in unreadable {
        let (schema, role) = (quote_identifier(&name.schema), quote_identifier(user));

        let mend = format!(
            "GRANT USAGE ON SCHEMA {schema} TO {role}; GRANT SELECT ON {} TO {role}",
            quote_table(name)
        );
        findings.add(Level::Error, name.to_string(), format!("\"{user}\" may not read it"), mend);
    }

    let identity =
        |to: &str| format!("ALTER TABLE {} REPLICA IDENTITY {to}", quote_table(&table.name));

    match catalog::key_of(table) {
        SourceKey::Columns(_) => {}
        SourceKey::WholeRow => findings.add(
            Level::Warning,
            &subject,
            "has no key; rows are matched whole, which is exact but slower",
            "add a primary key",
        ),
        SourceKey::AppendOnly => findings.add(
            Level::Warning,
            &subject,
            "has no replica identity; PostgreSQL refuses UPDATE and DELETE once it is published",
            format!("add a primary key, or {}", identity("FULL")),
        ),
    }

    // See trap 48a.
    let has_toast = table.columns.iter().any(|column| column.toastable);
    if table.row_filter.is_some() && has_toast && table.replica_identity != ReplicaIdentity::Full {
        let what = "has a row filter and large values: an update that moves a row into the filter \
                    may lack a value";
        findings.add(Level::Warning, &subject, what, identity("FULL"));
    }
}

/// Checks types, settings, and names that DuckDB does not distinguish (trap 59).
async fn check_plans(
    client: &SqlClient,
    session: &Invocation,
    tables: &[SourceTable],
    findings: &mut Findings,
) -> Result<(), CliError> {
    let oids: BTreeSet<u32> = tables
        .iter()
        .flat_map(|table| table.columns.iter().map(|column| column.type_oid))
        .collect();
    let types = catalog::types(client, &oids.into_iter().collect::<Vec<_>>()).await?;

    let settings = session.table_settings();
    let mut by_age: Vec<&SourceTable> = tables.iter().collect();
    by_age.sort_by_key(|table| table.oid);
    let mut taken = BTreeSet::new();

    for table in by_age {
        let subject = table.name.to_string();
        let settings = settings.get(&subject).cloned().unwrap_or_default();
        let options =
            PlanOptions { settings: &settings, null_unrepresentable: false, before: None };

        let spec = match plan(table, &types, options) {
            Ok(spec) => spec,
            Err(error) => {
                explain(findings, &subject, &error.to_string());
                continue;
            }
        };

        let target = target_name(&spec.target, &mut taken);
        if target != spec.target {
            let what = format!(
                "will be called {target}: DuckDB does not tell case apart, and the name is taken"
            );
            findings.add(
                Level::Warning,
                &subject,
                what,
                format!("[tables.\"{subject}\"] target = \"..\""),
            );
        }

        for column in spec.columns.iter().filter(|column| column.target_name != column.name) {
            let what =
                format!("column \"{}\" will be called \"{}\"", column.name, column.target_name);
            findings.add(
                Level::Warning,
                &subject,
                what,
                "the name is taken, as DuckDB does not tell case apart",
            );
        }
    }
    Ok(())
}

fn check_target(session: &Invocation, findings: &mut Findings) {
    let Ok(target) = session.target() else {
        findings.add(Level::Warning, "target", "none given", "--target PATH, or [target] path");
        return;
    };

    if !target.path.exists() {
        findings.ok("target", format!("{} will be made", target.path.display()));
        return;
    }

    match DuckDb::read_state(&target.path) {
        Ok(Some((state, _))) => {
            findings.ok(
                "target",
                format!("{} is a copy at {}", target.path.display(), state.pipeline.checkpoint.lsn),
            );
        }
        Ok(None) => findings.ok(
            "target",
            format!("{} is a DuckDB file that rhei has not written to", target.path.display()),
        ),
        Err(error) => explain(findings, "target", &error.to_string()),
    }
}

/// Adds a finding of an error; the hint of the error is the fix.
fn explain(findings: &mut Findings, subject: &str, text: &str) {
    let what = text.lines().next().unwrap_or_default();
    let mend = text.lines().find_map(|line| line.strip_prefix("hint: ")).unwrap_or_default();
    findings.add(Level::Error, subject, what, mend);
}

fn print(findings: &Findings) -> ExitCode {
    for finding in &findings.0 {
        let level = match finding.level {
            Level::Ok => "ok     ",
            Level::Warning => "warning",
            Level::Error => "ERROR  ",
        };

        println!("{level}  {}: {}", finding.subject, finding.what);
        if !finding.mend.is_empty() {
            println!("         {}", finding.mend);
        }
    }

    let count = |level| findings.0.iter().filter(|finding| finding.level == level).count();
    let (errors, warnings) = (count(Level::Error), count(Level::Warning));
    println!("{errors} errors, {warnings} warnings");
    if errors == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) }
}
