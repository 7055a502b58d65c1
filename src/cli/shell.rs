//! What is generated of the commands: completions of shells, and man pages.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, CliError};

/// Flags of `rhei completions`.
#[derive(Debug, Clone, Args)]
pub struct CompletionsArgs {
    /// The shell
    pub shell: Shell,
}

/// Flags of `rhei man`.
#[derive(Debug, Clone, Args)]
pub struct ManArgs {
    /// The folder that gets a page for each command
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
}

/// Prints the completions of a shell.
pub fn completions(args: &CompletionsArgs) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "rhei", &mut script);
    print!("{}", String::from_utf8_lossy(&script));
    ExitCode::SUCCESS
}

/// Writes the man pages.
pub fn man(args: &ManArgs) -> Result<ExitCode, CliError> {
    write_pages(&args.folder).map_err(|error| {
        CliError::Failed(format!("cannot write man pages to {}: {error}", args.folder.display()))
    })?;
    Ok(ExitCode::SUCCESS)
}

fn write_pages(folder: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    // `help` is of use at a prompt only.
    clap_mangen::generate_to(Cli::command().disable_help_subcommand(true), folder)
}
