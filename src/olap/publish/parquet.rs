//! A published copy as Parquet: of each version a folder with a folder per table, and a manifest
//! that names the newest one.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use duckdb::Connection;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    Snapshot,
    place::{Place, UNFINISHED, refused, sync_all, sync_folder_of},
};
use crate::{
    failpoint::reached,
    olap::{TargetError, names},
    pgoutput::QualifiedName,
};

/// The file that names the newest version.
const MANIFEST: &str = "manifest.json";

/// A column of a table.
#[derive(Serialize)]
struct Column {
    name: String,
    #[serde(rename = "type")]
    data_type: String,
    /// The values are stored as DuckDB's text of them.
    is_text: bool,
}

impl Column {
    fn selected(&self) -> String {
        let name = names::quoted(&self.name);
        if self.is_text { format!("{name}::VARCHAR AS {name}") } else { name }
    }
}

/// Returns whether Parquet files hold values of a type as they are. DuckDB writes HUGEINT as
/// DOUBLE, brings a TIMETZ to UTC, leaves out the microseconds of an INTERVAL, and writes no
/// infinite TIMESTAMP_S.
fn is_kept(data_type: &str) -> bool {
    const LOSSY: [&str; 8] = [
        "HUGEINT",
        "TIME WITH TIME ZONE",
        "INTERVAL",
        "BIGNUM",
        "UNION(",
        "VARIANT",
        "BIT",
        "TIMESTAMP_S",
    ];
    // The label of an ENUM or the name of a field may look like one of them, which does no harm.
    !LOSSY.iter().any(|lossy| data_type.contains(lossy))
}

/// Returns the moment at which a version was published, in microseconds, by the name of its folder;
/// none for what rhei has not made.
fn moment_of(entry: &Path) -> Option<u128> {
    let name = entry.file_name()?.to_str()?;
    let (lsn, moment) = name.split_once('-')?;
    let is_lsn = lsn.len() == 16 && lsn.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_folder = fs::symlink_metadata(entry).is_ok_and(|entry| entry.is_dir());
    (is_lsn && is_folder).then(|| moment.parse().ok())?
}

/// Returns the versions in a folder, the oldest first.
fn versions(folder: &Path) -> std::io::Result<Vec<(u128, PathBuf)>> {
    let entries = fs::read_dir(folder)?.flatten().map(|entry| entry.path());
    let mut versions: Vec<(u128, PathBuf)> =
        entries.filter_map(|entry| Some((moment_of(&entry)?, entry))).collect();
    versions.sort();
    Ok(versions)
}

/// Makes room for the next version, and removes what a crash has left: a version that no manifest
/// has named was never published.
pub(super) fn prepare(place: &Place, next: &Path) -> Result<(), TargetError> {
    let named = match fs::read(place.path.join(MANIFEST)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        read => {
            let manifest: Value = serde_json::from_slice(&read?).unwrap_or_default();
            let version = manifest["version"].as_str().map(|version| place.path.join(version));
            let moment = version.as_deref().and_then(moment_of);
            if moment.is_none() {
                return Err(refused(
                    "there is a manifest.json that rhei did not write\nhint: name another folder",
                ));
            }
            moment
        }
    };
    for (moment, version) in versions(&place.path)? {
        if named.is_none_or(|named| moment > named) {
            fs::remove_dir_all(version)?;
        }
    }

    if next.exists() {
        fs::remove_dir_all(next)?;
    }
    Ok(fs::create_dir(next)?)
}

/// Writes a folder for each table, in the transaction of the snapshot. Returns the rows, and what
/// the manifest says of the tables.
pub(super) fn write(
    connection: &Connection,
    snapshot: &Snapshot,
    next: &Path,
) -> Result<(u64, Vec<Value>), TargetError> {
    let (mut rows, mut tables) = (0, Vec::new());
    for table in &snapshot.tables {
        let columns = columns(connection, table)?;
        let selected: Vec<String> = columns.iter().map(Column::selected).collect();
        let folder = folder_name(table);

        let sql = format!(
            "COPY (SELECT {} FROM {}) TO {} (FORMAT parquet, COMPRESSION zstd, FILE_SIZE_BYTES \
             '512MB')",
            selected.join(", "),
            names::table(table),
            names::literal(&next.join(&folder).display().to_string())
        );
        let written = connection.execute(&sql, [])? as u64;

        rows += written;
        tables.push(json!({
            "schema": table.schema, "table": table.name, "folder": folder, "rows": written,
            "columns": columns,
        }));
    }
    Ok((rows, tables))
}

fn columns(connection: &Connection, table: &QualifiedName) -> Result<Vec<Column>, TargetError> {
    let mut columns = connection.prepare(&format!(
        "SELECT column_name, data_type FROM duckdb_columns() WHERE database_name = '{}' AND \
         schema_name = ? AND table_name = ? ORDER BY column_index",
        names::CATALOG
    ))?;
    let columns = columns.query_map([&table.schema, &table.name], |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
    })?;
    let column = |(name, data_type): (String, String)| {
        let is_text = !is_kept(&data_type);
        Column { name, data_type, is_text }
    };
    Ok(columns.collect::<Result<Vec<_>, _>>()?.into_iter().map(column).collect())
}

/// Puts a new version into its folder, has the manifest name it, and removes old ones.
pub(super) fn put_in_place(
    place: &Place,
    next: &Path,
    snapshot: &Snapshot,
    tables: &[Value],
    keep: usize,
) -> Result<(), TargetError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
    // A clock that was set back does not make the new version an old one.
    let newest = versions(&place.path)?.last().map_or(0, |(moment, _)| *moment);
    let moment = now.max(newest + 1);

    let version = format!("{:016X}-{moment}", snapshot.lsn.0);
    let manifest = json!({
        "lsn": snapshot.lsn.to_string(),
        "published_at_us": now as u64,
        "version": version,
        "tables": tables,
        "not_live": snapshot.not_live,
    });
    let manifest = format!("{manifest:#}\n");

    let mode = fs::metadata(&place.path)?.permissions().mode();
    fs::write(next.join(MANIFEST), &manifest)?;
    open_to(next, mode)?;
    sync_all(next)?;
    reached("publish.written");
    fs::rename(next, place.path.join(&version))?;
    sync_folder_of(&place.path.join(&version));

    let unfinished = place.path.join(format!("{MANIFEST}{UNFINISHED}"));
    fs::write(&unfinished, &manifest)?;
    fs::set_permissions(&unfinished, Permissions::from_mode(mode & 0o666))?;
    File::open(&unfinished)?.sync_all()?;
    fs::rename(&unfinished, place.path.join(MANIFEST))?;
    reached("publish.renamed");
    sync_folder_of(&place.path.join(MANIFEST));

    // The copy is published: what cannot be removed does not change that.
    let all = versions(&place.path).unwrap_or_default();
    let too_many = all.len().saturating_sub(keep.max(1));
    for (_, old) in all.iter().take(too_many) {
        if let Err(error) = fs::remove_dir_all(old) {
            tracing::warn!(
                event = "old_version_stays",
                path = %old.display(),
                error = %error,
                "an older published version cannot be removed"
            );
        }
    }
    Ok(())
}

/// Gives all of a version the rights of the folder that it stands in.
fn open_to(path: &Path, mode: u32) -> std::io::Result<()> {
    if !path.is_dir() {
        return fs::set_permissions(path, Permissions::from_mode(mode & 0o666));
    }
    for entry in fs::read_dir(path)? {
        open_to(&entry?.path(), mode)?;
    }
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Returns the name of a table's folder: any file system and any tool can take it.
fn folder_name(table: &QualifiedName) -> String {
    let mut name = String::new();
    for (at, part) in [&table.schema, &table.name].into_iter().enumerate() {
        if at > 0 {
            name.push('.');
        }
        for byte in part.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' => name.push(byte.into()),
                _ => name.push_str(&format!("%{byte:02X}")),
            }
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_the_name_of_its_table_whatever_is_in_it() {
        assert_eq!(folder_name(&QualifiedName::new("public", "orders")), "public.orders");
        assert_eq!(folder_name(&QualifiedName::new("a.b", "x/../é")), "a%2Eb.x%2F%2E%2E%2F%C3%A9");
    }

    #[test]
    fn only_what_rhei_made_counts_as_a_version() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["000000000000000A-7", "0000000000000001-9", "target", "00-1"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        std::os::unix::fs::symlink("target", folder.path().join("000000000000000B-8")).unwrap();
        let found = versions(folder.path()).unwrap();
        assert_eq!(found.iter().map(|(moment, _)| *moment).collect::<Vec<_>>(), [7, 9]);
    }
}
