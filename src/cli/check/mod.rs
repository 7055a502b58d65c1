//! `rhei check`: finds the problems that would stop rhei, and names the fix of each.

mod finding;
mod publication;
mod server;
mod tables;
mod target;

use std::process::ExitCode;

use tokio::sync::mpsc;

use self::finding::{Findings, error, failure, ok, warning};
use super::{CliError, Invocation};
use crate::{
    olap::TargetOptions,
    pipeline::Context,
    source::{
        connection::{SqlClient, connect_sql},
        ddl_trigger::{self, DdlTrigger},
    },
};

#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Installs an event trigger at the source that describes each change of a table in the stream
    /// itself. Needs a superuser. Without it rhei reads the catalogs, and copies a table again
    /// where these leave a doubt.
    #[arg(long)]
    install_ddl_trigger: bool,
    /// For scripts: the findings with their SQL
    #[arg(long)]
    json: bool,
}

/// Runs the command. Whatever would stop the next `rhei sync` or `rhei run` is an error, and
/// nothing else is.
pub async fn run(session: Invocation, args: CheckArgs) -> Result<ExitCode, CliError> {
    let source = session.source()?;
    let mut findings = Findings::default();

    let client = match connect_sql(&source, "check").await {
        Ok(client) => client,
        Err(refused) => {
            findings.add(failure("connection", &refused).mended_by(refused.sql()));
            return Ok(findings.print(args.json));
        }
    };

    findings.add(ok("connection", source.redacted()));
    if args.install_ddl_trigger {
        install_ddl_trigger(&client).await?;
    }

    check_ddl_trigger(&client, &mut findings).await?;
    server::check(&client, &session.config, &mut findings).await?;

    let target = session.target().ok();
    let has_target = target.is_some();
    let options = session.options(source, target.unwrap_or_else(|| TargetOptions::new("")));
    let context = Context::new(options, mpsc::unbounded_channel().0);

    let tables = publication::check(&client, &context.options, &mut findings).await?;
    tables::check(&client, &context.options, &tables, &mut findings).await?;

    let context = has_target.then_some(&context);
    target::check(&client, context, &session.config.accept, &mut findings).await?;
    Ok(findings.print(args.json))
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
    findings.add(match ddl_trigger::look(client).await? {
        DdlTrigger::Usable(_) => ok(SUBJECT, "rhei_ddl describes schema changes in the stream"),
        DdlTrigger::Absent => {
            ok(SUBJECT, "not installed (--install-ddl-trigger); the catalogs are read instead")
        }
        DdlTrigger::Foreign { why } => {
            let what = format!(
                "rhei_ddl {why}: it is not listened to, and may do anything in the DDL of every \
                 role"
            );
            error(SUBJECT, what)
                .sql("DROP EVENT TRIGGER rhei_ddl")
                .hint("As a superuser; then `rhei check --install-ddl-trigger`.")
        }
        DdlTrigger::Unreadable { grant } => {
            let what = "this role may not read the secret that rhei_ddl signs with, so it is not \
                        listened to";
            warning(SUBJECT, what).sqls(grant.split("; ").map(str::to_owned))
        }
    });
    Ok(())
}
