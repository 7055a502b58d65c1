//! Where a published copy stands: what may be replaced there, and how one version takes the
//! place of another.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::ErrorKind,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{PublishFormat, PublishOptions};
use crate::{
    failpoint::reached,
    olap::{TargetError, compact::sibling},
};

/// The ending of the names of what is not whole yet.
pub(super) const UNFINISHED: &str = ".publishing";

/// The endings of the files that belong to a DuckDB file, and to a copy.
const LOGS: [&str; 3] = [".wal", ".wal.checkpoint", ".wal.recovery"];
const OF_COPY: [&str; 8] = [
    "",
    ".wal",
    ".wal.checkpoint",
    ".wal.recovery",
    ".compacting",
    ".compacting.wal",
    ".tmp",
    ".rhei.sock",
];

/// The path of a published copy, which no other publication writes to while this lives.
pub(super) struct Place {
    /// Where a symbolic link leads to.
    pub(super) path: PathBuf,
    lock: PathBuf,
    _locked: File,
}

impl Drop for Place {
    fn drop(&mut self) {
        // A publication that has opened the lock in the meantime notices that it is gone.
        let _ = fs::remove_file(&self.lock);
    }
}

impl Place {
    /// Takes the place of `options`.
    ///
    /// # Errors
    /// There is no folder for it, it belongs to the copy `source`, or another publication has it.
    pub(super) fn take(options: &PublishOptions, source: &Path) -> Result<Self, TargetError> {
        let path = resolved(&options.path)?;
        let folder = path.parent().unwrap_or(Path::new("/")).to_owned();
        if !folder.is_dir() {
            return Err(TargetError::NoFolder { path, folder });
        }

        let source = resolved(source)?;
        let is_of_copy =
            |path: &Path| OF_COPY.iter().any(|ending| sibling(&source, ending) == path);
        let written = [path.clone(), sibling(&path, UNFINISHED)];
        if written.iter().any(|path| is_of_copy(path)) {
            return Err(refused(
                "its path is that of the copy itself, or of a file that belongs to it\nhint: name \
                 another file",
            ));
        }

        let lock = match options.format {
            PublishFormat::DuckDb => sibling(&path, ".publishing.lock"),
            PublishFormat::Parquet => {
                fs::create_dir_all(&path)?;
                path.join(".publishing.lock")
            }
        };
        let locked = locked(&lock)?;
        Ok(Self { path, lock, _locked: locked })
    }

    /// Returns the path under which the next version is written.
    pub(super) fn next(&self, format: PublishFormat) -> PathBuf {
        match format {
            PublishFormat::DuckDb => sibling(&self.path, UNFINISHED),
            PublishFormat::Parquet => self.path.join(UNFINISHED),
        }
    }

    /// Puts a new file at the path; the one that was there becomes the first of the older ones.
    /// `source` is the file whose rights the first version gets.
    pub(super) fn replace_file(
        &self,
        next: &Path,
        source: &Path,
        keep: usize,
    ) -> Result<(), TargetError> {
        let path = &self.path;
        let permissions = fs::metadata(path).or_else(|_| fs::metadata(source))?.permissions();
        fs::set_permissions(next, permissions)?;
        File::open(next)?.sync_all()?;
        reached("publish.written");

        if keep > 1 && path.exists() && !is_same(path, &numbered(path, 1)) {
            for number in (1..keep.saturating_sub(1)).rev() {
                rename_if_there(&numbered(path, number), &numbered(path, number + 1))?;
            }
            // The path itself is never without a file. Some file systems have no links.
            let unfinished = sibling(&numbered(path, 1), UNFINISHED);
            remove_if_there(&unfinished)?;
            fs::hard_link(path, &unfinished)
                .or_else(|_| fs::copy(path, &unfinished).map(|_| ()))?;
            fs::rename(&unfinished, numbered(path, 1))?;
        }

        // DuckDB opens no file beside the log of another one: a tool that wrote into the version
        // before may have left its log.
        for ending in LOGS {
            remove_if_there(&sibling(path, ending))?;
        }
        fs::rename(next, path)?;
        reached("publish.renamed");
        sync_folder_of(path);

        // The copy is published: what cannot be removed does not change that.
        for number in keep.max(1).. {
            if !matches!(remove_if_there(&numbered(path, number)), Ok(true)) {
                break;
            }
        }
        Ok(())
    }
}

/// Returns the path that is written: a symbolic link stays one.
pub(super) fn resolved(path: &Path) -> std::io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    match fs::canonicalize(&path) {
        Ok(resolved) => Ok(resolved),
        Err(_) => {
            let folder = path.parent().and_then(|folder| fs::canonicalize(folder).ok());
            Ok(match (folder, path.file_name()) {
                (Some(folder), Some(name)) => folder.join(name),
                _ => path,
            })
        }
    }
}

/// Opens a lock file and locks it, unless another publication has it.
fn locked(path: &Path) -> Result<File, TargetError> {
    loop {
        let file = File::options().create(true).truncate(false).write(true).open(path)?;
        if file.try_lock().is_err() {
            return Err(refused("another publication writes to the same path"));
        }
        // The one before may have removed the file after it was opened here.
        if fs::metadata(path).is_ok_and(|there| {
            file.metadata().is_ok_and(|here| (here.dev(), here.ino()) == (there.dev(), there.ino()))
        }) {
            return Ok(file);
        }
    }
}

pub(super) fn refused(reason: impl Into<String>) -> TargetError {
    TargetError::NotPublished { reason: reason.into() }
}

/// Returns the path of an older version: `shop.older-1.duckdb` of `shop.duckdb`.
fn numbered(path: &Path, number: usize) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!(".older-{number}"));
    if let Some(extension) = path.extension() {
        name.push(OsStr::new("."));
        name.push(extension);
    }
    path.with_file_name(name)
}

fn is_same(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

fn rename_if_there(from: &Path, to: &Path) -> std::io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Returns whether there was such a file.
pub(super) fn remove_if_there(path: &Path) -> std::io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Has the disk keep all files below a folder.
pub(super) fn sync_all(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sync_all(&path)?;
        } else {
            File::open(&path)?.sync_all()?;
        }
    }
    File::open(folder)?.sync_all()
}

pub(super) fn sync_folder_of(path: &Path) {
    if let Some(folder) = path.parent() {
        // A crash before this sync leaves the version before, which is equally valid.
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
    }
}

/// Returns the size of a file, or of all files in a folder.
pub(super) fn size_of(path: &Path) -> std::io::Result<u64> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_dir() {
        return Ok(metadata.len());
    }
    let mut bytes = 0;
    for entry in fs::read_dir(path)? {
        bytes += size_of(&entry?.path())?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(path: &Path) -> PublishOptions {
        PublishOptions { path: path.to_owned(), format: PublishFormat::DuckDb, keep: 3 }
    }

    #[test]
    fn older_versions_keep_the_ending_that_tools_know() {
        let path = Path::new("/data/shop.ro.duckdb");
        assert_eq!(numbered(path, 1), Path::new("/data/shop.ro.older-1.duckdb"));
        assert_eq!(numbered(Path::new("/data/shop"), 2), Path::new("/data/shop.older-2"));
    }

    #[test]
    fn a_place_is_taken_once_at_a_time_and_never_from_the_copy() {
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("copy.duckdb");
        fs::write(&copy, "a copy").unwrap();
        for name in ["copy.duckdb", "copy.duckdb.wal", "copy.duckdb.compacting"] {
            assert!(Place::take(&options(&folder.path().join(name)), &copy).is_err(), "{name}");
        }

        let path = folder.path().join("ro.duckdb");
        let place = Place::take(&options(&path), &copy).unwrap();
        assert!(Place::take(&options(&path), &copy).is_err());
        drop(place);
        drop(Place::take(&options(&path), &copy).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no lock is left");
    }

    #[test]
    fn each_version_takes_its_turn_and_a_link_stays_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (real, link) = (folder.path().join("real.duckdb"), folder.path().join("ro.duckdb"));
        std::os::unix::fs::symlink("real.duckdb", &link).unwrap();
        fs::write(&real, "0").unwrap();
        fs::write(folder.path().join("real.duckdb.wal"), "of another tool").unwrap();

        for version in 1..=5 {
            let place = Place::take(&options(&link), Path::new("/none/copy.duckdb")).unwrap();
            let next = place.next(PublishFormat::DuckDb);
            fs::write(&next, version.to_string()).unwrap();
            place.replace_file(&next, &real, 3).unwrap();
        }
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        assert_eq!(
            [read(&link), read(&numbered(&fs::canonicalize(&real).unwrap(), 1))],
            ["5", "4"]
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4, "the link and three versions");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }
}
