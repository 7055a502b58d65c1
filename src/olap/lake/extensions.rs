//! The extensions of DuckDB that a lake takes. rhei loads them from files and fetches none.

use std::path::PathBuf;

use duckdb::Connection;

use super::{CatalogKind, LakeOptions};
use crate::olap::{TargetError, library_version, names::literal};

/// Loads the extensions that a lake takes, each from the first folder that has it. DuckDB refuses
/// an extension of another version, and one without the signature of its makers.
pub(super) fn load(connection: &Connection, options: &LakeOptions) -> Result<(), TargetError> {
    for name in needed(options) {
        let file = find(options, name).ok_or_else(|| TargetError::NoExtension {
            name,
            version: library_version(),
            folders: options
                .extension_folders
                .iter()
                .map(|folder| folder.display().to_string())
                .collect::<Vec<_>>()
                .join(", "),
        })?;

        connection
            .execute_batch(&format!("LOAD {}", literal(&file.display().to_string())))
            .map_err(|source| TargetError::ExtensionRefused { file, source })?;
    }
    Ok(())
}

/// Returns the names of the extensions that this lake takes.
fn needed(options: &LakeOptions) -> Vec<&'static str> {
    let mut names = vec!["ducklake"];
    match options.catalog_kind() {
        CatalogKind::Postgres => names.push("postgres_scanner"),
        CatalogKind::Sqlite => names.push("sqlite_scanner"),
        CatalogKind::MotherDuck => names.push("motherduck"),
        CatalogKind::DuckDb => {}
    }

    if options.is_in_store() {
        names.push("httpfs");
        if options.s3.key.is_none() {
            names.push("aws");
        }
    }
    names
}

fn find(options: &LakeOptions, name: &str) -> Option<PathBuf> {
    let file = format!("{name}.duckdb_extension");
    options.extension_folders.iter().map(|folder| folder.join(&file)).find(|file| file.is_file())
}

/// Returns the folders where the extensions may lie, in the order in which they are looked at:
/// `named` by the environment, beside the binary, and where DuckDB's own INSTALL puts them.
pub fn folders(named: Option<PathBuf>, home: Option<PathBuf>) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = named.into_iter().collect();
    if let Some(beside) =
        std::env::current_exe().ok().and_then(|file| Some(file.parent()?.to_owned()))
    {
        folders.push(beside.join("extensions"));
        folders.push(beside.join("../lib/rhei/extensions"));
    }

    if let Some(home) = home {
        let os = if cfg!(target_os = "macos") { "osx" } else { "linux" };
        let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let installed = home.join(".duckdb/extensions").join(library_version());
        folders.push(installed.join(format!("{os}_{arch}")));
    }
    folders
}
