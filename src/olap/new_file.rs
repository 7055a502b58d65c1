//! Makes a new target file completely or not at all.
//!
//! DuckDB writes a new file in several steps, and a process that is killed between them leaves a
//! file that no DuckDB opens. So rhei lets DuckDB make the file under another name, and gives the
//! file its own name when it is complete.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use duckdb::Connection;

use super::{TargetError, compact::sibling, names};

/// The ending that the name of an unfinished file adds to the name of the target; the process id
/// follows.
const UNFINISHED: &str = ".creating-";

/// The name under which the file is attached while it is made.
const NEW: &str = "rhei_new";

/// Makes an empty database at `path`, unless a file or link of that name already exists.
///
/// # Errors
/// The errors are those of DuckDB and the disk: [`TargetError::Query`] and [`TargetError::Io`].
pub fn make(connection: &Connection, path: &Path) -> Result<(), TargetError> {
    // A symbolic link without a target has the name, too; DuckDB makes the file that the link
    // names.
    if fs::symlink_metadata(path).is_ok() {
        return Ok(());
    }

    let unfinished = sibling(path, &format!("{UNFINISHED}{}", std::process::id()));
    let made = write(connection, &unfinished).and_then(|()| Ok(give_name(&unfinished, path)?));
    if made.is_err() {
        let _ = connection.execute_batch(&format!("DETACH DATABASE IF EXISTS {NEW}"));
    }
    remove(&unfinished);

    // Another process may have made the file meanwhile, and removed this unfinished one.
    if path.exists() { Ok(()) } else { made }
}

fn write(connection: &Connection, unfinished: &Path) -> Result<(), TargetError> {
    // A process that had the same id may have left this file.
    remove(unfinished);
    let file = names::literal(&unfinished.display().to_string());
    connection.execute_batch(&format!(
        "ATTACH {file} AS {NEW} (STORAGE_VERSION 'latest'); DETACH DATABASE {NEW};"
    ))?;
    Ok(File::open(unfinished)?.sync_all()?)
}

/// Gives the unfinished file its name. Never replaces a file that another process made meanwhile.
fn give_name(unfinished: &Path, path: &Path) -> io::Result<()> {
    // This log belongs to a file that a user or another process removed. DuckDB removes such a log
    // when it makes a file by itself.
    let stale_log = sibling(path, ".wal");
    if stale_log.exists() && !path.exists() {
        fs::remove_file(&stale_log)?;
    }

    match fs::hard_link(unfinished, path) {
        Err(_) if fs::symlink_metadata(path).is_ok() => return Ok(()),
        // Not every file system has hard links.
        Err(_) => fs::rename(unfinished, path)?,
        Ok(()) => {}
    }

    let folder =
        path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// Removes the unfinished files of processes that were killed. The caller has the file at `path`
/// open, so the file exists, and no other process needs an unfinished one.
pub fn remove_stale_spill(path: &Path) {
    let folder =
        path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let Some(Ok(entries)) = path.file_name().map(|_| fs::read_dir(folder)) else { return };

    let unfinished = sibling(path, UNFINISHED);
    let prefix = unfinished.file_name().unwrap_or_default().as_encoded_bytes();

    for entry in entries.flatten() {
        let name = entry.file_name();
        let rest = name.as_encoded_bytes().strip_prefix(prefix);
        if rest.is_some_and(|rest| rest.first().is_some_and(u8::is_ascii_digit)) {
            remove(&entry.path());
        }
    }
}

fn remove(unfinished: &Path) {
    // An unfinished file that cannot be removed does no harm.
    let _ = fs::remove_file(unfinished);
    let _ = fs::remove_file(sibling(unfinished, ".wal"));
}
