//! A running load: pgbench against a database.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::cluster::{Db, bin_dir, installed};

/// What pgbench does, and for how long.
#[derive(Debug, Clone)]
pub struct Load {
    pub clients: u32,
    pub until: Until,
    /// A pgbench script in place of TPC-B.
    pub script: Option<String>,
    /// Transactions per second; none for as many as possible.
    pub rate: Option<u32>,
}

#[derive(Debug, Clone, Copy)]
pub enum Until {
    Seconds(u32),
    /// By each client.
    Transactions(u32),
}

impl Load {
    pub fn seconds(seconds: u32) -> Load {
        Load { clients: 4, until: Until::Seconds(seconds), script: None, rate: None }
    }

    /// By each of the clients.
    pub fn transactions(transactions: u32) -> Load {
        Load { until: Until::Transactions(transactions), ..Self::seconds(0) }
    }

    pub fn clients(self, clients: u32) -> Load {
        Load { clients, ..self }
    }

    pub fn rate(self, rate: u32) -> Load {
        Load { rate: Some(rate), ..self }
    }

    pub fn script(self, script: &str) -> Load {
        Load { script: Some(script.to_owned()), ..self }
    }
}

/// pgbench in the background. Dropping it stops it.
#[derive(Debug)]
pub struct Pgbench {
    child: Child,
    folder: tempfile::TempDir,
}

impl Pgbench {
    /// Makes the four tables at this scale (100,000 accounts each).
    #[track_caller]
    pub fn init(db: &Db, scale: u32) {
        let output = Command::new(program())
            .args(["--initialize", "--quiet", "--scale", &scale.to_string()])
            .arg(db.socket_url())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "pgbench -i: {}", String::from_utf8_lossy(&output.stderr));
    }

    pub fn start(db: &Db, load: &Load) -> Pgbench {
        let folder = super::temp_dir();
        let mut command = Command::new(program());
        command.args(["--no-vacuum", "--client", &load.clients.to_string()]);
        match load.until {
            Until::Seconds(seconds) => command.args(["--time", &seconds.to_string()]),
            Until::Transactions(count) => command.args(["--transactions", &count.to_string()]),
        };
        if let Some(rate) = load.rate {
            command.args(["--rate", &rate.to_string()]);
        }
        if let Some(script) = &load.script {
            let path = folder.path().join("script.sql");
            fs::write(&path, script).unwrap();
            command.arg("--file").arg(path);
        }
        let log = fs::File::create(folder.path().join("log")).unwrap();
        command.arg(db.socket_url()).stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        Pgbench { child: command.spawn().unwrap(), folder }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end; returns how many transactions it did.
    #[track_caller]
    pub fn wait(mut self, deadline: Duration) -> u64 {
        let end = Instant::now() + deadline;
        while self.is_running() {
            assert!(Instant::now() < end, "pgbench still runs after {deadline:?}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        let (status, log) = (self.child.wait().unwrap(), self.log());
        assert!(status.success(), "pgbench: {status}\n{log}");
        let line =
            log.lines().find(|line| line.starts_with("number of transactions actually processed"));
        let count =
            line.and_then(|line| line.rsplit(':').next()?.trim().split('/').next()?.parse().ok());
        count.unwrap_or_else(|| panic!("pgbench did not say how much it did\n{log}"))
    }

    /// Stops it at once. Its open transactions roll back.
    pub fn stop(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Pgbench {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The fetched servers come without pgbench; one of another major does as well.
fn program() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).collect::<Vec<_>>();
    let others = installed().into_iter().rev().map(|(_, bin)| bin);
    let folders = std::iter::once(bin_dir().to_owned()).chain(others).chain(on_path);
    let found =
        folders.map(|folder| folder.join("pgbench")).find(|program| Path::new(program).exists());
    found.expect("pgbench is installed with the Postgres server (scripts/setup.sh)")
}
