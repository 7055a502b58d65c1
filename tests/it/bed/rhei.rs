//! Runs the binary under test.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::cluster::shell;

/// How the binary is called. Nothing of the caller's surroundings (HOME, PG*, RHEI_*) reaches it.
#[derive(Debug, Clone)]
pub struct Rhei {
    folder: PathBuf,
    source: Option<String>,
    target: Option<PathBuf>,
    environment: BTreeMap<String, String>,
    deadline: Duration,
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

    #[track_caller]
    pub fn assert_code(&self, code: i32) -> &Self {
        assert_eq!(self.code(), Some(code), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }
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
        }
    }

    /// `--source`.
    pub fn source(mut self, url: impl Into<String>) -> Rhei {
        self.source = Some(url.into());
        self
    }

    /// `--target`; a relative path is inside the folder.
    pub fn target(mut self, path: impl AsRef<Path>) -> Rhei {
        self.target = Some(self.folder.join(path));
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
        assert!(status.success(), "rhei {shown}: {status}\n--- stdout ---\n{stdout}\n--- stderr ---\n{stderr}");
        output
    }

    #[track_caller]
    pub fn spawn<A: AsRef<str>>(&self, arguments: impl IntoIterator<Item = A>) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rhei"));
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("PG") || text.starts_with("RHEI_") {
                command.env_remove(&name);
            }
        }
        command.current_dir(&self.folder).env("HOME", &self.folder).env("NO_COLOR", "1").envs(&self.environment);
        if let Some(source) = &self.source {
            command.arg("--source").arg(source);
        }
        if let Some(target) = &self.target {
            command.arg("--target").arg(target);
        }
        command.args(arguments.into_iter().map(|a| a.as_ref().to_owned()));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (stdout, stderr) = (Lines::default(), Lines::default());
        let readers =
            vec![stdout.read_from(child.stdout.take().unwrap()), stderr.read_from(child.stderr.take().unwrap())];
        Running { child, stdout, stderr, readers, status: None }
    }
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

    /// Waits for the end of the process; when it does not come in time, kills it and panics with its logs.
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

    /// As [`Self::wait_for_log`], past the first `mark` lines.
    #[track_caller]
    pub fn wait_for_log_after(&mut self, mark: usize, text: &str, deadline: Duration) -> String {
        match self.stderr.wait_for(mark, text, deadline) {
            Some(line) => line,
            None => {
                panic!("no log line with {text:?} in {deadline:?} (running: {})\n{}", self.is_running(), self.logs())
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
        Output { status: self.status.unwrap(), stdout: self.stdout.text(), stderr: self.stderr.text() }
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
