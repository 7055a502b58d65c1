//! Throwaway Postgres clusters, and a small SQL client that shares nothing with the code under
//! test.
//!
//! Each cluster has a watchdog: a shell that waits for the end of its standard input, which the
//! test process holds. When the test process ends, in whatever way, the watchdog stops the server
//! and removes the folder.

use std::{
    fs,
    io::Write,
    net::TcpListener,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    time::Duration,
};

use tokio_postgres::SimpleQueryMessage;

use super::wait_until;

/// Rows as text, in the order the server sent them.
pub type Rows = Vec<Vec<Option<String>>>;

#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// Off by default; tests that kill the server switch it on.
    pub fsync: bool,
    pub wal_level: &'static str,
    /// Lines of postgresql.conf that come after, and so override, those of the bed.
    pub conf: Vec<String>,
    /// The whole of pg_hba.conf; without it everybody is trusted.
    pub hba: Option<String>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self { fsync: false, wal_level: "logical", conf: Vec::new(), hba: None }
    }
}

impl ClusterOptions {
    /// For tests that kill the server: what was committed must still be there.
    pub fn durable() -> Self {
        Self { fsync: true, ..Self::default() }
    }

    pub fn conf(mut self, line: &str) -> Self {
        self.conf.push(line.to_owned());
        self
    }
}

/// A Postgres server of its own folder, port and socket.
#[derive(Debug)]
pub struct Cluster {
    folder: PathBuf,
    bin: PathBuf,
    port: u16,
    watchdog: Child,
}

impl Cluster {
    /// The cluster that most tests share, each with a database of its own ([`Self::database`]).
    ///
    /// A transaction that a test leaves open, or prepared, delays CREATE_REPLICATION_SLOT in every
    /// database of the cluster: tests of such things start their own, as do tests that stop the
    /// server.
    pub fn shared() -> &'static Cluster {
        static SHARED: OnceLock<Cluster> = OnceLock::new();
        SHARED.get_or_init(|| Cluster::start(ClusterOptions::default()))
    }

    /// Makes and starts a cluster of the major under test.
    pub fn start(options: ClusterOptions) -> Cluster {
        Self::start_with_bin(bin_dir(), &options)
    }

    pub fn start_with_bin(bin: &Path, options: &ClusterOptions) -> Cluster {
        let folder = new_folder();
        let watchdog = start_watchdog(&folder);
        let mut cluster = Cluster { folder, bin: bin.to_owned(), port: 0, watchdog };

        succeed(
            cluster
                .tool("initdb")
                .args([
                    "-A",
                    "trust",
                    "-U",
                    "postgres",
                    "-E",
                    "UTF8",
                    "--locale=C",
                    "--no-sync",
                    "-D",
                ])
                .arg(cluster.data()),
        );
        let folder = cluster.folder.display().to_string();
        cluster.write_data_file(
            "bed.conf",
            &format!(
                "wal_level = {}\nfsync = {}\nfull_page_writes = {}\nmax_prepared_transactions = \
                 10\n\
                 max_replication_slots = 60\nmax_wal_senders = 60\nmax_connections = 200\n\
                 listen_addresses = '127.0.0.1'\nunix_socket_directories = '{folder}'\n\
                 log_min_messages = warning\nlog_line_prefix = '%m [%p] %d '\n\
                 shared_buffers = 128MB\nmax_wal_size = 2GB\n{}\n",
                options.wal_level,
                if options.fsync { "on" } else { "off" },
                if options.fsync { "on" } else { "off" },
                options.conf.join("\n")
            ),
        );
        cluster.append_data_file(
            "postgresql.conf",
            "\ninclude = 'bed.conf'\ninclude_if_exists = 'port.conf'\n",
        );
        if let Some(hba) = &options.hba {
            cluster.write_data_file("pg_hba.conf", hba);
        }
        cluster.start_on_a_free_port();
        cluster
    }

    /// A hot standby of this cluster, which is stopped and started again for it.
    pub fn standby(&self) -> Cluster {
        let folder = new_folder();
        let mut standby =
            Cluster { watchdog: start_watchdog(&folder), folder, bin: self.bin.clone(), port: 0 };
        self.stop_fast();
        succeed(Command::new("cp").arg("-a").arg(self.data()).arg(standby.data()));
        // As pg_basebackup does: slots are the primary's.
        assert!(shell(&format!("rm -rf '{}'/pg_replslot/*", standby.data().display())));
        self.start_again();
        let (port, folder) = (self.port, standby.folder.display());
        let settings = format!(
            "unix_socket_directories = '{folder}'\nhot_standby = on\n\
             primary_conninfo = 'host=127.0.0.1 port={port} user=postgres'\n"
        );
        standby.append_data_file("bed.conf", &settings);
        standby.write_data_file("standby.signal", "");
        standby.start_on_a_free_port();
        standby
    }

    fn start_on_a_free_port(&mut self) {
        // Another process may take the port between our look and the server's bind.
        for _ in 0..5 {
            self.port = free_port();
            self.write_data_file("port.conf", &format!("port = {}\n", self.port));
            match self.try_start() {
                Ok(()) => return,
                Err(_) if self.log().contains("could not bind") => {}
                Err(message) => panic!("{message}\n--- server log ---\n{}", self.log()),
            }
        }
        panic!("no free port found\n--- server log ---\n{}", self.log());
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// Holds the unix socket; readable by everyone.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// The major version, such as 15.
    pub fn major(&self) -> u32 {
        major_of(&self.bin).unwrap()
    }

    pub fn log(&self) -> String {
        fs::read(self.folder.join("log"))
            .map(|b| String::from_utf8_lossy(&b).into_owned())
            .unwrap_or_default()
    }

    /// Writes a file into the data folder, owned and readable only by the server's user (as keys
    /// must be).
    pub fn write_data_file(&self, name: &str, contents: &str) {
        let path = self.data().join(name);
        fs::write(&path, contents).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        if is_root() {
            succeed(Command::new("chown").arg("postgres").arg(&path));
        }
    }

    pub fn append_data_file(&self, name: &str, contents: &str) {
        let path = self.data().join(name);
        fs::OpenOptions::new()
            .append(true)
            .open(path)
            .unwrap()
            .write_all(contents.as_bytes())
            .unwrap();
    }

    /// A new, empty database that only this test uses. It and its slots are dropped with the value.
    pub fn database(&self, name: &str) -> Db {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!("{name}_{}", COUNTER.fetch_add(1, Ordering::Relaxed));
        self.maintenance().execute(&format!("CREATE DATABASE {} TEMPLATE template0", quote(&name)));
        Db {
            host: self.folder.display().to_string(),
            port: self.port,
            name,
            dropped_with_value: true,
        }
    }

    /// A database that came from the primary.
    pub fn replica_of(&self, db: &Db) -> Db {
        Db {
            host: self.folder.display().to_string(),
            port: self.port,
            name: db.name.clone(),
            dropped_with_value: false,
        }
    }

    /// A database of this name, which a test has made itself.
    pub fn named(&self, name: &str) -> Db {
        Db {
            host: self.folder.display().to_string(),
            port: self.port,
            name: name.to_owned(),
            dropped_with_value: false,
        }
    }

    /// The database `postgres`, which outlives the value.
    pub fn maintenance(&self) -> Db {
        Db {
            host: self.folder.display().to_string(),
            port: self.port,
            name: "postgres".to_owned(),
            dropped_with_value: false,
        }
    }

    pub fn is_running(&self) -> bool {
        self.postmaster_pid().is_some_and(is_alive)
    }

    pub fn postmaster_pid(&self) -> Option<u32> {
        fs::read_to_string(self.data().join("postmaster.pid"))
            .ok()?
            .lines()
            .next()?
            .trim()
            .parse()
            .ok()
    }

    /// Starts a stopped or killed server on the same port.
    pub fn start_again(&self) {
        if let Err(message) = self.try_start() {
            panic!("{message}\n--- server log ---\n{}", self.log());
        }
    }

    pub fn restart(&self) {
        self.stop_fast();
        self.start_again();
    }

    /// Disconnects everybody, writes a shutdown checkpoint. A walsender holds this up until its
    /// client is caught up.
    pub fn stop_fast(&self) {
        self.stop("fast");
    }

    /// Stops without a shutdown checkpoint, as in a crash that the server noticed.
    pub fn stop_immediate(&self) {
        self.stop("immediate");
    }

    fn stop(&self, mode: &str) {
        succeed(
            self.tool("pg_ctl").args(["stop", "-w", "-t", "60", "-m", mode, "-D"]).arg(self.data()),
        );
    }

    /// SIGKILL for the server and all its processes at once, as in a crash of the machine's kernel
    /// or an OOM kill.
    pub fn kill9(&self) {
        let postmaster = self.postmaster_pid().expect("the server runs");
        let mut pids = vec![postmaster];
        pids.extend(children_of(postmaster));
        let list = pids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
        // A child may have ended by itself meanwhile, which kill reports.
        let _ = shell(&format!("kill -9 {list} 2>/dev/null"));
        wait_until(Duration::from_secs(30), "the killed server is gone", || {
            !pids.iter().any(|p| is_alive(*p))
        });
        // Where init is slow to reap, the dead server still has its number, and the next one would
        // take it for alive. The other lines stay: from them the next server frees the old one's
        // shared memory.
        const NO_PROCESS: &str = "99999999";
        let path = self.data().join("postmaster.pid");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replacen(&postmaster.to_string(), NO_PROCESS, 1)).unwrap();
        fs::remove_file(self.folder.join(format!(".s.PGSQL.{}.lock", self.port))).unwrap();
    }

    /// Signals a standby's walreceiver, which is one of its processes: `STOP` has it answer no
    /// more.
    pub fn signal_walreceiver(&self, name: &str) {
        let postmaster = self.postmaster_pid().expect("the server runs");
        let is_receiver = |pid: &u32| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&command).contains("walreceiver")
        };
        let pid =
            children_of(postmaster).into_iter().find(is_receiver).expect("a walreceiver runs");
        assert!(shell(&format!("kill -{name} {pid}")));
    }

    /// A standby becomes a primary.
    pub fn promote(&self) {
        succeed(self.tool("pg_ctl").args(["promote", "-w", "-t", "60", "-D"]).arg(self.data()));
    }

    pub fn try_start(&self) -> Result<(), String> {
        let log = self.folder.join("log");
        run(self
            .tool("pg_ctl")
            .args(["start", "-w", "-t", "60", "-D"])
            .arg(self.data())
            .arg("-l")
            .arg(log))
    }

    /// A command of the server's own programs, run as the user that the server accepts.
    fn tool(&self, name: &str) -> Command {
        let program = self.bin.join(name);
        let mut command = if is_root() {
            let mut command = Command::new("runuser");
            command.args(["-u", "postgres", "--"]).arg(program);
            command
        } else {
            Command::new(program)
        };
        command.current_dir(&self.folder).env("LC_ALL", "C");
        for variable in
            ["PGDATA", "PGHOST", "PGPORT", "PGUSER", "PGDATABASE", "PGSERVICE", "PGOPTIONS"]
        {
            command.env_remove(variable);
        }
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The end of its input tells the watchdog to stop the server and remove the folder.
        drop(self.watchdog.stdin.take());
        let _ = self.watchdog.wait();
    }
}

/// Of the user that the server runs as.
fn new_folder() -> PathBuf {
    // Not the platform's folder when that is deep: a socket path has room for about 100 bytes.
    let parent = Some(std::env::temp_dir())
        .filter(|p| p.as_os_str().len() < 50)
        .unwrap_or_else(|| "/tmp".into());
    let folder = tempfile::Builder::new().prefix("rhei-pg-").tempdir_in(parent).unwrap().keep();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    if is_root() {
        succeed(Command::new("chown").arg("postgres").arg(&folder));
    }
    folder
}

fn start_watchdog(folder: &Path) -> Child {
    // Ctrl-C reaches the whole process group: the watchdog must outlive it to clean up.
    // A server that ended removes its pid file; its number alone may linger until init reaps it.
    const SCRIPT: &str = r#"
        trap '' INT TERM HUP QUIT
        cat >/dev/null
        pid=$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null)
        if [ -n "$pid" ]; then
            kill -QUIT "$pid" 2>/dev/null
            n=0
            while [ -f "$1/data/postmaster.pid" ] && kill -0 "$pid" 2>/dev/null && [ $n -lt 100 ]; do sleep 0.05; n=$((n + 1)); done
            kill -9 "$pid" 2>/dev/null
        fi
        rm -rf "$1"
    "#;
    Command::new("sh")
        .args(["-c", SCRIPT, "rhei-test-watchdog"])
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// A database, and the simplest of clients to it: a new connection for each call.
#[derive(Debug)]
pub struct Db {
    host: String,
    port: u16,
    name: String,
    dropped_with_value: bool,
}

impl Db {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Over TCP, without TLS.
    pub fn url(&self) -> String {
        self.url_as("postgres")
    }

    pub fn url_as(&self, user: &str) -> String {
        format!("postgresql://{user}@127.0.0.1:{}/{}?sslmode=disable", self.port, self.name)
    }

    /// Over the unix socket.
    pub fn socket_url(&self) -> String {
        format!("postgresql:///{}?host={}&port={}&user=postgres", self.name, self.host, self.port)
    }

    /// A connection that stays, for open transactions and session settings.
    #[track_caller]
    pub fn session(&self) -> Session {
        match Session::open(&self.socket_config("postgres")) {
            Ok(session) => session,
            Err(message) => panic!("cannot connect to {}: {message}", self.name),
        }
    }

    /// As [`Self::session`], for servers that may be down.
    pub fn try_session(&self) -> Result<Session, String> {
        Session::open(&self.socket_config("postgres"))
    }

    #[track_caller]
    pub fn execute(&self, sql: &str) {
        self.session().execute(sql);
    }

    /// The rows of all statements in `sql`.
    #[track_caller]
    pub fn query(&self, sql: &str) -> Rows {
        self.session().query(sql)
    }

    pub fn try_query(&self, sql: &str) -> Result<Rows, String> {
        Session::open(&self.socket_config("postgres"))?.try_query(sql)
    }

    /// The one value of one row; NULL panics.
    #[track_caller]
    pub fn value(&self, sql: &str) -> String {
        self.session().value(sql)
    }

    /// `pg_current_wal_insert_lsn()`, as text.
    #[track_caller]
    pub fn wal_lsn(&self) -> String {
        self.value("SELECT pg_current_wal_insert_lsn()")
    }

    fn socket_config(&self, user: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.host_path(&self.host).port(self.port).user(user).dbname(&self.name);
        config.application_name("rhei test bed").connect_timeout(Duration::from_secs(20));
        config
    }
}

impl Drop for Db {
    fn drop(&mut self) {
        if !self.dropped_with_value {
            return;
        }
        // The server may be stopped, or this a panic: what cannot be dropped goes with the cluster.
        let server = Db {
            host: self.host.clone(),
            port: self.port,
            name: "postgres".into(),
            dropped_with_value: false,
        };
        let literal = self.name.replace('\'', "''");
        for _ in 0..40 {
            let left = server.try_query(&format!(
                "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots \
                 WHERE database = '{literal}' AND active_pid IS NOT NULL; \
                 SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots \
                 WHERE database = '{literal}' AND active_pid IS NULL; \
                 SELECT 'left' FROM pg_replication_slots WHERE database = '{literal}'"
            ));
            match left {
                Ok(rows)
                    if rows
                        .iter()
                        .any(|r| r.first().is_some_and(|v| v.as_deref() == Some("left"))) =>
                {
                    std::thread::sleep(Duration::from_millis(25));
                }
                _ => break,
            }
        }
        let _ = server
            .try_query(&format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", quote(&self.name)));
    }
}

/// One connection, served by a thread of its own so that it can be used from sync and async tests
/// alike.
#[derive(Debug)]
pub struct Session {
    statements: mpsc::Sender<(String, mpsc::Sender<Result<Rows, String>>)>,
}

impl Session {
    pub fn open(config: &tokio_postgres::Config) -> Result<Session, String> {
        let (statements, receiver) =
            mpsc::channel::<(String, mpsc::Sender<Result<Rows, String>>)>();
        let (ready, is_ready) = mpsc::channel();
        let config = config.clone();
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (client, connection) = match runtime.block_on(config.connect(tokio_postgres::NoTls))
            {
                Ok(connected) => connected,
                Err(error) => return drop(ready.send(Err(explain(&error)))),
            };
            runtime.spawn(connection);
            let _ = ready.send(Ok(()));
            while let Ok((sql, answer)) = receiver.recv() {
                let result = runtime.block_on(client.simple_query(&sql));
                let _ = answer.send(result.map(rows_of).map_err(|error| explain(&error)));
            }
        });
        is_ready.recv().unwrap_or_else(|_| Err("the connection's thread ended".into()))?;
        Ok(Session { statements })
    }

    pub fn try_query(&self, sql: &str) -> Result<Rows, String> {
        let (answer, result) = mpsc::channel();
        let gone = || "the connection's thread ended".to_owned();
        self.statements.send((sql.to_owned(), answer)).map_err(|_| gone())?;
        result.recv().map_err(|_| gone())?
    }

    #[track_caller]
    pub fn query(&self, sql: &str) -> Rows {
        match self.try_query(sql) {
            Ok(rows) => rows,
            Err(message) => panic!("{message}\nin: {}", sql.chars().take(600).collect::<String>()),
        }
    }

    #[track_caller]
    pub fn execute(&self, sql: &str) {
        self.query(sql);
    }

    #[track_caller]
    pub fn value(&self, sql: &str) -> String {
        match self.query(sql).into_iter().next().and_then(|row| row.into_iter().next()) {
            Some(Some(value)) => value,
            other => panic!("expected one value, got {other:?} from: {sql}"),
        }
    }
}

fn rows_of(messages: Vec<SimpleQueryMessage>) -> Rows {
    let rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => {
            Some((0..row.len()).map(|i| row.get(i).map(str::to_owned)).collect())
        }
        _ => None,
    });
    rows.collect()
}

fn explain(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => {
            format!("{} ({}) {}", db.message(), db.code().code(), db.detail().unwrap_or_default())
        }
        None => format!("{error:?}"),
    }
}

/// Quotes an SQL identifier.
pub fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The server programs under test: RHEI_TEST_PG_BIN, or the major RHEI_TEST_PG_MAJOR, or the newest
/// installed.
pub fn bin_dir() -> &'static Path {
    static BIN: OnceLock<PathBuf> = OnceLock::new();
    BIN.get_or_init(|| {
        let wanted = std::env::var("RHEI_TEST_PG_MAJOR")
            .ok()
            .map(|m| m.parse::<u32>().expect("RHEI_TEST_PG_MAJOR"));
        if let Some(bin) = std::env::var_os("RHEI_TEST_PG_BIN").filter(|b| !b.is_empty()) {
            let bin = PathBuf::from(bin);
            let found = major_of(&bin).unwrap_or_else(|| {
                panic!(
                    "no Postgres server in \
                 {}",
                    bin.display()
                )
            });
            assert!(
                wanted.is_none_or(|w| w == found),
                "RHEI_TEST_PG_BIN holds {found}, RHEI_TEST_PG_MAJOR says {wanted:?}"
            );
            return bin;
        }
        let installed = installed();
        let chosen = match wanted {
            Some(major) => installed.iter().find(|(m, _)| *m == major),
            // What `setup.sh matrix` fetched is used only when asked for.
            None => {
                installed.iter().filter(|(_, b)| !b.ends_with("native/bin")).max_by_key(|(m, _)| *m)
            }
        };
        match chosen {
            Some((_, bin)) => bin.clone(),
            None => panic!(
                "no Postgres server {wanted:?} found; run scripts/setup.sh (or: \
                            scripts/setup.sh matrix)"
            ),
        }
    })
}

/// Every server that is found, with its major version.
pub fn installed() -> Vec<(u32, PathBuf)> {
    let mut folders = Vec::new();
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        folders.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    let children = |parent: &Path, below: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(parent).into_iter().flatten().flatten();
        entries.map(|e| e.path().join(below)).collect()
    };
    folders.extend(children(Path::new("/usr/lib/postgresql"), "bin"));
    let cache = std::env::var_os("RHEI_PG_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let home = PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
        if is_root() {
            "/var/cache/rhei/postgres".into()
        } else {
            home.join(".cache/rhei/postgres")
        }
    });
    folders.extend(children(&cache, "native/bin"));
    let mut found: Vec<(u32, PathBuf)> = folders
        .into_iter()
        .filter_map(|folder| major_of(&folder).map(|major| (major, folder)))
        .collect();
    found.sort();
    found.dedup();
    found
}

/// The major version that the tests run on.
pub fn tested_major() -> u32 {
    static MAJOR: OnceLock<u32> = OnceLock::new();
    *MAJOR.get_or_init(|| major_of(bin_dir()).unwrap())
}

fn major_of(bin: &Path) -> Option<u32> {
    if !bin.join("initdb").exists() || !bin.join("pg_ctl").exists() {
        return None;
    }
    let output = Command::new(bin.join("postgres")).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version =
        text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Below the range from which the kernel takes ports for outgoing connections, so that a server can
/// start again on it.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..5000 {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let offset = (std::process::id().wrapping_mul(97).wrapping_add(step)) % 12_000;
        let port = 20_000 + u16::try_from(offset).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port between 20000 and 32000");
}

pub fn is_root() -> bool {
    static ROOT: OnceLock<bool> = OnceLock::new();
    // A file that we make belongs to our effective user.
    *ROOT.get_or_init(|| tempfile::tempfile().and_then(|f| f.metadata()).unwrap().uid() == 0)
}

pub fn is_alive(pid: u32) -> bool {
    // A process that has ended but is not yet reaped by its parent no longer counts.
    if let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) {
        return !stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'));
    }
    !Path::new("/proc/self").exists() && shell(&format!("kill -0 {pid} 2>/dev/null"))
}

fn children_of(parent: u32) -> Vec<u32> {
    let output = Command::new("ps").args(["-A", "-o", "pid=,ppid="]).output();
    if let Ok(output) = output.as_ref() {
        let text = String::from_utf8_lossy(&output.stdout);
        let pairs = text.lines().filter_map(|line| {
            let mut words = line.split_whitespace().map(str::parse::<u32>);
            Some((words.next()?.ok()?, words.next()?.ok()?))
        });
        return pairs.filter(|(_, ppid)| *ppid == parent).map(|(pid, _)| pid).collect();
    }
    // A minimal system has no ps, but then it has /proc.
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit(')').next().unwrap_or_default();
        fields.split_whitespace().nth(1).and_then(|ppid| ppid.parse::<u32>().ok()) == Some(parent)
    })
    .collect()
}

/// The shell's own `kill` is used for signals: every system has it, and no unsafe code is needed.
pub fn shell(script: &str) -> bool {
    Command::new("sh").args(["-c", script]).status().is_ok_and(|status| status.success())
}

fn run(command: &mut Command) -> Result<(), String> {
    // Into files, not pipes: a server that pg_ctl starts would inherit a pipe and keep it open.
    let out = tempfile::NamedTempFile::new().unwrap();
    let handle = || Stdio::from(out.reopen().unwrap());
    let status = command.stdin(Stdio::null()).stdout(handle()).stderr(handle()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!(
            "{command:?}: {status}\n{}",
            fs::read_to_string(out.path()).unwrap_or_default()
        )),
        Err(error) => Err(format!("{command:?}: {error}")),
    }
}

#[track_caller]
fn succeed(command: &mut Command) {
    if let Err(message) = run(command) {
        panic!("{message}");
    }
}
