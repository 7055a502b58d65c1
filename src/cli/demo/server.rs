//! The PostgreSQL server of the demo, and the shop that is kept for the next demo.
//!
//! Each demo has a server and a folder of its own, named like its process, so that no demo is in
//! the way of another. The shop is kept as a copy of the data folder of a server that was stopped,
//! and gets its name when all of it is on the disk: whenever a demo is killed, the next one finds
//! either a whole shop or none. What a killed demo left otherwise, its server and its folder, the
//! next one removes.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use sha2::{Digest, Sha256};

use super::{CliError, failed};

const FOLDER_PREFIX: &str = "rhei-demo-";
/// A shop that is not whole yet is named by this and the process that writes it.
const UNFINISHED_PREFIX: &str = "unfinished-";

/// A server that stops when the demo ends, whether the demo succeeds or fails.
pub struct Throwaway {
    bin: PathBuf,
    folder: PathBuf,
    as_postgres: bool,
    is_running: bool,
}

/// What a server is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To be filled, with as little WAL as can be.
    Load,
    /// To be replicated.
    Source,
}

impl Throwaway {
    /// Makes the folder of a server that is not started yet.
    pub fn new() -> Result<Self, CliError> {
        let bin = find_postgres()?;
        // initdb refuses to run as root.
        let as_postgres = fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0);
        remove_left_over(&bin, as_postgres);

        let folder = std::env::temp_dir().join(format!("{FOLDER_PREFIX}{}", std::process::id()));
        fs::create_dir_all(&folder)
            .map_err(|error| failed(format!("cannot make {}: {error}", folder.display())))?;

        let server = Self { bin, folder, as_postgres, is_running: false };
        if as_postgres {
            run(Command::new("chown").arg("postgres").arg(&server.folder), "chown")?;
        }
        Ok(server)
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// Makes an empty data folder.
    pub fn make_data(&self) -> Result<(), CliError> {
        run(
            self.command("initdb")
                .arg("-D")
                .arg(self.data())
                .args(["-A", "trust", "-U", "postgres", "-E", "UTF8"])
                .args(["--locale=C", "--no-sync"]),
            "initdb",
        )
    }

    pub fn start(&mut self, purpose: Purpose) -> Result<(), CliError> {
        let for_purpose = match purpose {
            // No WAL is left behind that would have to be kept with the shop.
            Purpose::Load => {
                "-c wal_level=minimal -c max_wal_senders=0 -c wal_recycle=off -c min_wal_size=32MB \
                 -c shared_buffers=512MB"
            }
            Purpose::Source => "-c wal_level=logical",
        };
        let settings = format!(
            "-c fsync=off -c synchronous_commit=off -c max_wal_size=4GB -c listen_addresses='' -c \
             unix_socket_directories={} {for_purpose}",
            self.folder.display()
        );

        run(
            self.command("pg_ctl")
                .arg("-D")
                .arg(self.data())
                .arg("-l")
                .arg(self.folder.join("log"))
                .args(["-w", "-o", &settings, "start"]),
            "pg_ctl start",
        )?;
        self.is_running = true;
        Ok(())
    }

    /// Stops the server so that its data folder is whole without its WAL.
    pub fn stop(&mut self) -> Result<(), CliError> {
        run(
            self.command("pg_ctl").arg("-D").arg(self.data()).args(["-m", "fast", "-w", "stop"]),
            "pg_ctl stop",
        )?;
        self.is_running = false;
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = command(&self.bin.join(program), self.as_postgres);
        // The user of the server may not be allowed to read the current folder of the demo.
        command.current_dir(&self.folder);
        command
    }

    pub fn url(&self) -> String {
        format!("host={} user=postgres dbname=postgres", self.folder.display())
    }
}

impl Drop for Throwaway {
    fn drop(&mut self) {
        if self.is_running {
            stop_at_once(&self.bin, &self.folder, self.as_postgres);
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The folder in which the shop is kept for the next demo, if there is a place for it.
pub struct KeptShop {
    /// The folder of all shops, and the name of this one.
    place: Option<(PathBuf, String)>,
}

impl KeptShop {
    /// Returns the place of the shop that these statements make on this version of the server.
    pub fn of(server: &Throwaway, statements: &[&str]) -> Result<Self, CliError> {
        let version = Command::new(server.bin.join("initdb"))
            .arg("--version")
            .output()
            .map_err(|error| cannot_run("initdb", &error))?;

        let mut hash = Sha256::new();
        hash.update(&version.stdout);
        statements.iter().for_each(|statement| hash.update(statement));
        let name = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();

        let place = cache_folder().map(|folder| (folder, name));
        Ok(Self { place })
    }

    /// Gives the server a copy of the shop. Returns whether it has one now.
    pub fn restore(&self, server: &Throwaway) -> bool {
        let Some((folder, name)) = &self.place else { return false };
        let kept = folder.join(name);

        // The user of the server may have been dropped and made again, with another uid.
        let owner = |path: &Path| fs::symlink_metadata(path).map(|found| found.uid()).ok();
        if owner(&kept).is_none() || owner(&kept) != owner(&server.folder) {
            return false;
        }

        let is_copied = copy_folder(&kept, &server.data()).is_ok();
        if !is_copied {
            let _ = fs::remove_dir_all(server.data());
        }
        is_copied
    }

    /// Removes a shop that no server starts with, also from the server.
    pub fn forget(&self, server: &Throwaway) -> Result<(), CliError> {
        if let Some((folder, name)) = &self.place {
            let _ = fs::remove_dir_all(folder.join(name));
        }

        let data = server.data();
        fs::remove_dir_all(&data)
            .map_err(|error| failed(format!("cannot replace {}: {error}", data.display())))
    }

    /// Keeps the shop of a server that is stopped. A demo needs none, so a failure is no error.
    pub fn keep(&self, server: &Throwaway) {
        let Some((folder, name)) = &self.place else { return };
        if fs::create_dir_all(folder).is_err() {
            return;
        }
        remove_old_shops(folder);

        let unfinished = folder.join(format!("{UNFINISHED_PREFIX}{}", std::process::id()));
        if copy_folder(&server.data(), &unfinished).is_err() {
            let _ = fs::remove_dir_all(&unfinished);
            return;
        }

        // The disk may take longer than the demo wants to wait. If the process ends sooner, the
        // next demo makes the shop again.
        let kept = folder.join(name);
        std::thread::spawn(move || {
            let is_durable =
                fs::File::open(&unfinished).is_ok_and(|file| rustix::fs::syncfs(&file).is_ok());
            if !is_durable || fs::rename(&unfinished, kept).is_err() {
                let _ = fs::remove_dir_all(&unfinished);
            }
        });
    }
}

/// Removes shops of other versions, and those of demos that were killed.
fn remove_old_shops(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_written = name
            .strip_prefix(UNFINISHED_PREFIX)
            .is_some_and(|process| Path::new("/proc").join(process).exists());
        if !is_written {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Returns the folder for what may be removed at any time; none when there is no such folder.
fn cache_folder() -> Option<PathBuf> {
    let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
    Some(cache.join("rhei-demo"))
}

/// Stops the servers of demos that were killed, and removes their folders.
fn remove_left_over(bin: &Path, as_postgres: bool) {
    let own = fs::metadata("/proc/self").map(|me| me.uid()).ok();
    let is_ours = |path: &Path| {
        fs::symlink_metadata(path).is_ok_and(|found| {
            found.is_dir()
                && (Some(found.uid()) == own || (as_postgres && is_postgres(found.uid())))
        })
    };

    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(process) = name.strip_prefix(FOLDER_PREFIX) else { continue };
        let is_number = process.parse::<u32>().is_ok();
        let is_running = Path::new("/proc").join(process).exists();

        let folder = entry.path();
        if is_number && !is_running && is_ours(&folder) {
            if folder.join("data/postmaster.pid").exists() {
                stop_at_once(bin, &folder, as_postgres);
            }
            let _ = fs::remove_dir_all(&folder);
        }
    }
}

fn is_postgres(uid: u32) -> bool {
    Command::new("id").args(["-u", "postgres"]).output().is_ok_and(|output| {
        String::from_utf8_lossy(&output.stdout).trim().parse::<u32>() == Ok(uid)
    })
}

fn stop_at_once(bin: &Path, folder: &Path, as_postgres: bool) {
    let mut command = command(&bin.join("pg_ctl"), as_postgres);
    command.current_dir(folder).arg("-D").arg(folder.join("data"));
    let _ = run(command.args(["-m", "immediate", "-w", "stop"]), "pg_ctl stop");
}

/// Copies a folder with its owners, without its blocks where the file system can.
fn copy_folder(from: &Path, to: &Path) -> Result<(), CliError> {
    run(Command::new("cp").args(["-a", "--reflink=auto", "--"]).arg(from).arg(to), "cp")
}

fn command(program: &Path, as_postgres: bool) -> Command {
    if !as_postgres {
        return Command::new(program);
    }

    let mut command = Command::new("runuser");
    command.args(["-u", "postgres", "--"]).arg(program);
    command
}

fn find_postgres() -> Result<PathBuf, CliError> {
    let has_initdb =
        |folder: &Path| folder.join("initdb").exists() && folder.join("pg_ctl").exists();

    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .filter(|folder| has_initdb(folder))
        .collect();
    found.sort();

    if let Some(newest) = found.pop() {
        return Ok(newest);
    }

    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        if has_initdb(&folder) {
            return Ok(folder);
        }
    }

    std::env::var_os("PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .find(|folder| has_initdb(folder))
        .ok_or_else(|| {
            failed(
                "no PostgreSQL server found for the demo\nhint: `make setup` installs one, or \
                    install the package postgresql",
            )
        })
}

fn run(command: &mut Command, what: &str) -> Result<(), CliError> {
    // The server that pg_ctl starts inherits the output, so reading from a pipe would never end.
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(failed(format!("{what} failed ({status})"))),
        Err(error) => Err(cannot_run(what, &error)),
    }
}

fn cannot_run(what: &str, error: &std::io::Error) -> CliError {
    failed(format!("cannot run {what}: {error}"))
}
