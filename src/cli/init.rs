//! `rhei init`: writes a commented rhei.toml from the tables that it finds at the source.

use std::{fmt::Write, path::PathBuf, process::ExitCode};

use clap::Args;

use super::{CliError, Invocation};
use crate::source::{catalog, connection::connect_sql};

/// Flags of `rhei init`.
#[derive(Debug, Clone, Args)]
pub struct InitArgs {
    /// Where to write
    #[arg(long, default_value = "rhei.toml", value_name = "FILE")]
    pub output: PathBuf,
    /// Replace a file that is there
    #[arg(long)]
    pub force: bool,
}

/// Runs the command.
pub async fn run(session: Invocation, args: InitArgs) -> Result<ExitCode, CliError> {
    let path = &args.output;
    if path.exists() && !args.force {
        return Err(CliError::Failed(format!(
            "{} is there already\nhint: --force replaces it",
            path.display()
        )));
    }

    let source = session.source()?;
    let client = connect_sql(&source, "init").await?;
    let tables = catalog::all_tables(&client).await?;

    let mut text =
        String::from("# Settings of rhei; rhei.toml.example explains every key.\n\n[source]\n");
    text.push_str(
        "# The password stays outside of this file: password_file, PGPASSWORD, ~/.pgpass or \
         PGSERVICE.\n",
    );

    let target = session
        .config
        .target_path
        .clone()
        .unwrap_or_else(|| format!("{}.duckdb", source.database()).into());

    let _ = writeln!(text, "url = {}", quoted(&source.url_without_password()));

    let publications: Vec<String> =
        session.config.publications.iter().map(|name| quoted(name)).collect();
    let publications = match publications.as_slice() {
        [one] => one.clone(),
        several => format!("[{}]", several.join(", ")),
    };

    let _ = writeln!(text, "publication = {publications}");
    let _ = writeln!(text, "slot = {}", quoted(&session.config.slot));
    text.push_str("tables = [\n");

    for table in &tables {
        let note = match catalog::key_of(table) {
            catalog::SourceKey::AppendOnly => {
                " # no replica identity: PostgreSQL will refuse UPDATE and DELETE"
            }
            catalog::SourceKey::WholeRow => " # no key: exact, but slower",
            catalog::SourceKey::Columns(_) => "",
        };

        let _ = writeln!(text, "    {},{note}", quoted(&table.name.to_string()));
    }

    let _ = write!(
        text,
        "]\n\n[target]\npath = {}\n\n[sync]\ninterval = \"1s\"\n",
        quoted(&target.display().to_string())
    );

    std::fs::write(path, text)
        .map_err(|error| CliError::Failed(format!("cannot write {}: {error}", path.display())))?;
    println!(
        "wrote {} for {} tables; next: rhei check, then rhei sync",
        path.display(),
        tables.len()
    );

    Ok(ExitCode::SUCCESS)
}

/// Returns the text as a TOML string.
fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}
