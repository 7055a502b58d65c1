//! `rhei drop`: removes from the source what rhei made there.

use std::process::ExitCode;

use clap::Args;

use super::{CliError, Invocation};
use crate::{
    control,
    olap::{DuckDb, Phase},
    source::{
        catalog,
        connection::{SqlClient, connect_sql},
        quote::{quote_identifier, quote_literal},
        wire::ReplicationClient,
    },
};

/// Flags of `rhei drop`.
#[derive(Debug, Clone, Args)]
pub struct DropArgs {
    /// Does it; without this flag the command only says what it would do
    #[arg(long)]
    pub yes: bool,
    /// Drops the slot of the settings also where no file proves that rhei made it
    #[arg(long)]
    pub force: bool,
}

impl DropArgs {
    fn verb(&self) -> &'static str {
        if self.yes { "is dropped" } else { "would be dropped" }
    }
}

/// What the command does about one object, or why it leaves the object alone.
struct Step {
    what: String,
    sql: Option<String>,
}

impl Step {
    fn drop(what: String, sql: String) -> Self {
        Self { what, sql: Some(sql) }
    }

    fn keep(what: String) -> Self {
        Self { what, sql: None }
    }
}

/// Runs the command. The DuckDB file stays.
pub async fn run(session: Invocation, args: DropArgs) -> Result<ExitCode, CliError> {
    let source = session.source()?;
    let client = connect_sql(&source, "drop").await?;

    let steps = [
        slot_step(&client, &session, &args).await?,
        publication_step(&client, &session.config.publications, &args).await?,
    ];

    for step in &steps {
        println!("{}", step.what);
        let Some(sql) = &step.sql else { continue };
        println!("    {sql};");
        if args.yes {
            client.batch_execute(sql).await.map_err(|error| {
                let reason = crate::error::error_chain(&error);
                CliError::Failed(format!("the source refused \"{sql}\": {reason}"))
            })?;
        }
    }

    let has_work = steps.iter().any(|step| step.sql.is_some());
    match (has_work, args.yes) {
        (true, true) => {
            println!(
                "done; the copy stays. `rhei backfill --force` makes a new slot and copies every \
                 table again"
            )
        }
        (true, false) => println!("nothing was done; `rhei drop --yes` does it"),
        (false, _) => println!("there is nothing to drop"),
    }
    Ok(ExitCode::SUCCESS)
}

/// A slot is rhei's if the file says so that it follows.
async fn slot_step(
    client: &SqlClient,
    session: &Invocation,
    args: &DropArgs,
) -> Result<Step, CliError> {
    let name = &session.config.slot;
    let Some(found) = catalog::slot(client, name).await? else {
        return Ok(Step::keep(format!("slot \"{name}\" is not there")));
    };

    if found.active {
        return Err(CliError::Failed(format!(
            "slot \"{name}\" is in use\nhint: stop the replicator that reads it, then drop it"
        )));
    }

    let held = indicatif::HumanBytes(found.held_bytes.unwrap_or_default());
    let sql = format!("SELECT pg_drop_replication_slot({})", quote_literal(name));
    let what = format!("slot \"{name}\", which holds {held} of WAL, {}", args.verb());

    if args.force || is_of_file(client, session).await? {
        return Ok(Step::drop(what, sql));
    }
    Ok(Step::keep(format!(
        "slot \"{name}\" stays: no file proves that rhei made it (--target names the file, --force \
         drops the slot without)"
    )))
}

/// Returns whether the DuckDB file follows the slot of the settings, in this very cluster.
async fn is_of_file(client: &SqlClient, session: &Invocation) -> Result<bool, CliError> {
    let Ok(target) = session.target() else { return Ok(false) };
    if control::request(&target.path, "status").await.is_some() {
        return Err(CliError::Failed(
            "a replicator runs on this file\nhint: stop it, then drop what it made".to_owned(),
        ));
    }

    if target.lake.is_none() && !target.path.exists() {
        return Ok(false);
    }
    let Some((state, _)) = DuckDb::read_state(&target)? else { return Ok(false) };

    let pipeline = state.pipeline;
    if pipeline.slot != session.config.slot || pipeline.phase == Phase::PlainCopy {
        return Ok(false);
    }

    // Another cluster may have a slot of this name.
    let mut replication = ReplicationClient::connect(&session.source()?, "drop")
        .await
        .map_err(crate::source::SourceError::from)?;
    let identity = replication.identify_system().await.map_err(crate::source::SourceError::from)?;
    let server = catalog::server(client).await?;
    Ok(pipeline.system_id == identity.system_id && pipeline.database_oid == server.database_oid)
}

async fn publication_step(
    client: &SqlClient,
    names: &[String],
    args: &DropArgs,
) -> Result<Step, CliError> {
    let shown = names.join(", ");
    let Some((rights, _)) = catalog::unpublished(client, names).await? else {
        return Ok(Step::keep(format!("publication {shown} is not there")));
    };

    let [name] = names else {
        return Ok(Step::keep(format!("publications {shown} stay: rhei did not make them")));
    };
    if !rights.is_made_by_rhei {
        return Ok(Step::keep(format!("publication {name} stays: rhei did not make it")));
    }

    let sql = format!("DROP PUBLICATION {}", quote_identifier(name));
    Ok(Step::drop(format!("publication {name}, which rhei made, {}", args.verb()), sql))
}
