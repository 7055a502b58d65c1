//! Runs the binary under test.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    cluster::shell,
    lake::{Kind, Lake},
};

/// How the binary is called. Nothing of the caller's surroundings (HOME, PG*, RHEI_*) reaches it.
#[derive(Debug, Clone)]
pub struct Rhei {
    folder: PathBuf,
    source: Option<String>,
    target: Option<PathBuf>,
    environment: BTreeMap<String, String>,
    deadline: Duration,
    longest_file: Option<u64>,
}

#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// The exit code; none after a signal.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// As [`Running::copies`].
    pub fn copies(&self) -> Vec<String> {
        copies_in(self.stderr.lines())
    }

    #[track_caller]
    pub fn assert_code(&self, code: i32) -> &Self {
        assert_eq!(self.code(), Some(code), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }
}

/// The tables that were copied according to a log of `rhei run`.
pub fn copies_in<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<String> {
    let table = |line: &str| {
        let (_, rest) = line.split_once(COPY_BEGAN)?;
        // Quoted as Rust does it, and the number of rows behind it.
        Some(rest.rsplit_once(" estimated_rows=")?.0.trim_matches('"').replace("\\\"", "\""))
    };
    lines.filter_map(table).collect()
}

impl Rhei {
    /// `folder` is the working folder and the HOME of the process.
    pub fn new(folder: &Path) -> Rhei {
        Rhei {
            folder: folder.to_owned(),
            source: None,
            target: None,
            environment: BTreeMap::new(),
            deadline: Duration::from_secs(120),
            longest_file: None,
        }
    }

    /// `--source`.
    pub fn source(mut self, url: impl Into<String>) -> Rhei {
        self.source = Some(url.into());
        self
    }

    /// `--target`; a relative path is inside the folder. A lake takes the place of the file where
    /// all tests use one.
    pub fn target(mut self, path: impl AsRef<Path>) -> Rhei {
        let path = self.folder.join(path);
        if let (Some(kind), None) = (Kind::of_all_tests(), Lake::at(&path)) {
            Lake::new(kind, &path);
        }
        self.target = Some(path);
        self
    }

    /// A lake takes the place of the file.
    pub fn lake(self, kind: Kind) -> Rhei {
        Lake::new(kind, self.target_path());
        self
    }

    pub fn target_path(&self) -> &Path {
        self.target.as_deref().expect("a target was set")
    }

    /// Writes rhei.toml into the folder, where the binary finds it by itself.
    pub fn config(self, toml: &str) -> Rhei {
        fs::write(self.folder.join("rhei.toml"), toml).unwrap();
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Rhei {
        self.environment.insert(name.to_owned(), value.to_owned());
        self
    }

    /// How long [`Self::run`] may take; two minutes unless told.
    pub fn deadline(mut self, deadline: Duration) -> Rhei {
        self.deadline = deadline;
        self
    }

    /// The system ends the process when it writes beyond so many bytes of any file; a multiple of
    /// 512.
    pub fn longest_file(mut self, bytes: u64) -> Rhei {
        self.longest_file = Some(bytes);
        self
    }

    /// Runs to the end, whatever that is.
    #[track_caller]
    pub fn run<A: AsRef<str>>(&self, arguments: impl IntoIterator<Item = A>) -> Output {
        self.spawn(arguments).wait(self.deadline)
    }

    /// Runs to the end and expects exit code 0.
    #[track_caller]
    pub fn run_ok<A: AsRef<str>>(&self, arguments: impl IntoIterator<Item = A>) -> Output {
        let arguments: Vec<A> = arguments.into_iter().collect();
        let shown = arguments.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" ");
        let output = self.run(arguments);
        let Output { status, stdout, stderr } = &output;
        assert!(
            status.success(),
            "rhei {shown}: {status}\n--- stdout ---\n{stdout}\n--- stderr ---\n{stderr}"
        );
        output
    }

    /// What `rhei status --json` asks a replicator, and the answer, while one runs. (Without one
    /// the command opens the file, and then none can start at that moment.)
    pub fn status(&self) -> Option<serde_json::Value> {
        let mut socket = self.target_path().as_os_str().to_owned();
        socket.push(".rhei.sock");
        let mut stream = UnixStream::connect(Path::new(&socket)).ok()?;
        stream.write_all(b"status\n").ok()?;
        serde_json::from_reader(stream).ok()
    }

    /// Waits until `running` says that whatever was committed before this position of the source's
    /// WAL is in the copy, also what the stream never mentions.
    #[track_caller]
    pub fn wait_settled(&self, running: &mut Running, lsn: &str, deadline: Duration) {
        if let Err(message) = self.try_settle(running, lsn, deadline) {
            panic!("{message}");
        }
    }

    /// As [`Self::wait_settled`]. An error has the log.
    pub fn try_settle(
        &self,
        running: &mut Running,
        lsn: &str,
        deadline: Duration,
    ) -> Result<(), String> {
        let end = Instant::now() + deadline;
        loop {
            let status = self.status();
            let settled = status.as_ref().and_then(|status| status["settled_lsn"].as_str());
            if settled.is_some_and(|at| wal_bytes(at) >= wal_bytes(lsn)) {
                return Ok(());
            }
            let is_running = running.is_running();
            if !is_running || Instant::now() > end {
                let logs = running.logs();
                return Err(format!(
                    "{lsn} is not settled in {deadline:?} (running: {is_running}): \
                     {status:?}\n{logs}"
                ));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The command that [`Self::spawn`] runs, whose streams are still to be set.
    pub fn command<A: AsRef<str>>(&self, arguments: impl IntoIterator<Item = A>) -> Command {
        let binary = env!("CARGO_BIN_EXE_rhei");
        let mut command = match self.longest_file {
            None => Command::new(binary),
            Some(bytes) => {
                let mut limited = Command::new("sh");
                limited.args([
                    "-c",
                    "ulimit -c 0 && ulimit -f $0 && exec \"$@\"",
                    &(bytes / 512).to_string(),
                    binary,
                ]);
                limited
            }
        };
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("PG") || text.starts_with("RHEI_") {
                command.env_remove(&name);
            }
        }
        command.current_dir(&self.folder).env("HOME", &self.folder).env("NO_COLOR", "1");
        let arguments: Vec<A> = arguments.into_iter().collect();
        if arguments.iter().map(AsRef::as_ref).eq(["run"]) {
            command.env("RHEI_LOG", LOG_WITH_COPIES);
        }
        if let Some(source) = &self.source {
            command.arg("--source").arg(source);
        }
        if let Some(target) = &self.target {
            match Lake::at(target) {
                Some(lake) => _ = command.envs(lake.environment(target)),
                None => _ = command.arg("--target").arg(target),
            }
        }
        // What a test sets stands above what the lake needs.
        command.envs(&self.environment);
        command.args(arguments.iter().map(AsRef::as_ref));
        command
    }

    #[track_caller]
    pub fn spawn<A: AsRef<str>>(&self, arguments: impl IntoIterator<Item = A>) -> Running {
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (stdout, stderr) = (Lines::default(), Lines::default());
        let readers = vec![
            stdout.read_from(child.stdout.take().unwrap()),
            stderr.read_from(child.stderr.take().unwrap()),
        ];
        Running { child, stdout, stderr, readers, status: None }
    }
}

/// The log of `rhei run` says which copies began.
const LOG_WITH_COPIES: &str = "info,rhei::cli::progress=debug";
const COPY_BEGAN: &str = " copying table=";

/// An LSN as the number that it is.
#[track_caller]
pub fn wal_bytes(lsn: &str) -> u64 {
    let (high, low) = lsn.split_once('/').unwrap_or_else(|| panic!("{lsn} is no LSN"));
    let half = |text| u64::from_str_radix(text, 16).unwrap_or_else(|_| panic!("{lsn} is no LSN"));
    (half(high) << 32) | half(low)
}

/// A running binary. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: Lines,
    stderr: Lines,
    readers: Vec<JoinHandle<()>>,
    status: Option<ExitStatus>,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        self.status.is_none() && {
            self.status = self.child.try_wait().unwrap();
            self.status.is_none()
        }
    }

    /// SIGKILL; returns when the process is gone.
    pub fn kill9(mut self) -> Output {
        let _ = self.child.kill();
        self.status = Some(self.child.wait().unwrap());
        self.output()
    }

    pub fn sigterm(&self) {
        self.signal("TERM");
    }

    pub fn sigint(&self) {
        self.signal("INT");
    }

    /// Any signal by name: `STOP`, `CONT`, ...
    pub fn signal(&self, name: &str) {
        assert!(shell(&format!("kill -{name} {}", self.child.id())), "kill -{name} failed");
    }

    /// Waits for the end of the process; when it does not come in time, kills it and panics with
    /// its logs.
    #[track_caller]
    pub fn wait(mut self, deadline: Duration) -> Output {
        let end = Instant::now() + deadline;
        while self.is_running() {
            if Instant::now() > end {
                let _ = self.child.kill();
                panic!("rhei still runs after {deadline:?}\n{}", self.logs());
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        self.output()
    }

    /// SIGTERM, then [`Self::wait`].
    #[track_caller]
    pub fn stop(self, deadline: Duration) -> Output {
        self.sigterm();
        self.wait(deadline)
    }

    /// Waits for a line on stderr that contains `text`, and returns it.
    #[track_caller]
    pub fn wait_for_log(&mut self, text: &str, deadline: Duration) -> String {
        self.wait_for_log_after(0, text, deadline)
    }

    /// How many lines stderr has so far: a mark for [`Self::wait_for_log_after`].
    pub fn log_mark(&self) -> usize {
        self.stderr.shared.0.lock().unwrap().lines.len()
    }

    /// The tables that `run` began to copy, in their order.
    pub fn copies(&self) -> Vec<String> {
        copies_in(self.stderr.shared.0.lock().unwrap().lines.iter().map(String::as_str))
    }

    /// As [`Self::copies`], past the first `mark` lines of the log.
    pub fn copies_since(&self, mark: usize) -> Vec<String> {
        copies_in(self.stderr.shared.0.lock().unwrap().lines.iter().skip(mark).map(String::as_str))
    }

    /// Tables are followed as they are: none was copied past the first `mark` lines of the log.
    #[track_caller]
    pub fn assert_no_copies_since(&self, mark: usize) {
        let copies = self.copies_since(mark);
        assert!(copies.is_empty(), "copied: {copies:?}\n{}", self.logs());
    }

    /// As [`Self::wait_for_log`], past the first `mark` lines.
    #[track_caller]
    pub fn wait_for_log_after(&mut self, mark: usize, text: &str, deadline: Duration) -> String {
        match self.stderr.wait_for(mark, text, deadline) {
            Some(line) => line,
            None => {
                panic!(
                    "no log line with {text:?} in {deadline:?} (running: {})\n{}",
                    self.is_running(),
                    self.logs()
                )
            }
        }
    }

    /// Everything it has printed so far, for messages.
    pub fn logs(&self) -> String {
        format!("--- stdout ---\n{}\n--- stderr ---\n{}", self.stdout.text(), self.stderr.text())
    }

    fn output(mut self) -> Output {
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        Output {
            status: self.status.unwrap(),
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[derive(Debug, Default)]
struct Collected {
    lines: Vec<String>,
    ended: bool,
}

#[derive(Debug, Clone, Default)]
struct Lines {
    shared: Arc<(Mutex<Collected>, Condvar)>,
}

impl Lines {
    fn read_from(&self, stream: impl Read + Send + 'static) -> JoinHandle<()> {
        let shared = Arc::clone(&self.shared);
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                let text = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
                shared.0.lock().unwrap().lines.push(text);
                shared.1.notify_all();
                line.clear();
            }
            shared.0.lock().unwrap().ended = true;
            shared.1.notify_all();
        })
    }

    fn text(&self) -> String {
        self.shared.0.lock().unwrap().lines.iter().map(|line| format!("{line}\n")).collect()
    }

    /// None when the deadline passes or the stream ends without such a line.
    fn wait_for(&self, mut from: usize, text: &str, deadline: Duration) -> Option<String> {
        let end = Instant::now() + deadline;
        let mut collected = self.shared.0.lock().unwrap();
        loop {
            if let Some(line) = collected.lines.iter().skip(from).find(|line| line.contains(text)) {
                return Some(line.clone());
            }
            from = from.max(collected.lines.len());
            let left = end.checked_duration_since(Instant::now())?;
            if collected.ended {
                return None;
            }
            collected = self.shared.1.wait_timeout(collected, left).unwrap().0;
        }
    }
}
