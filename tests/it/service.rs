//! What a service manager gets to hear of `rhei run`, and the commands that packages are made with.

use std::{
    os::unix::net::UnixDatagram,
    path::Path,
    time::{Duration, Instant},
};

use crate::{
    bed::{Rhei, Running, temp_dir},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

/// The end of a service manager.
struct Manager {
    socket: UnixDatagram,
    heard: Vec<String>,
}

impl Manager {
    /// Listens in `folder`; `rhei` is to be told of it.
    fn listen(folder: &Path, rhei: &Rhei) -> (Self, Rhei) {
        let path = folder.join("notify.sock");
        let socket = UnixDatagram::bind(&path).unwrap();
        let rhei = rhei.clone().env("NOTIFY_SOCKET", path.to_str().unwrap());
        (Self { socket, heard: Vec::new() }, rhei)
    }

    /// The next message; none when none comes in this time.
    fn next(&mut self, within: Duration) -> Option<String> {
        self.socket.set_read_timeout(Some(within)).unwrap();
        let mut message = [0; 4096];
        let length = self.socket.recv(&mut message).ok()?;
        let message = String::from_utf8_lossy(&message[..length]).trim_end().to_owned();
        self.heard.push(message.clone());
        Some(message)
    }

    /// Waits for a message that contains `text`.
    #[track_caller]
    fn wait_for(&mut self, text: &str, running: &Running) -> String {
        let end = Instant::now() + SOON;
        while Instant::now() < end {
            match self.next(SOON) {
                Some(message) if message.contains(text) => return message,
                _ => {}
            }
        }
        panic!("{text:?} was not said: {:?}\n{}", self.heard, running.logs());
    }

    /// Waits until the watchdog has not heard of the engine for this long.
    #[track_caller]
    fn wait_for_silence(&mut self, silence: Duration, running: &Running) {
        let end = Instant::now() + SOON;
        let mut last = Instant::now();
        while last.elapsed() < silence {
            assert!(Instant::now() < end, "it is heard again and again\n{}", running.logs());
            if self.next(silence).is_some_and(|message| message == "WATCHDOG=1") {
                last = Instant::now();
            }
        }
    }
}

fn with_rows(name: &str) -> Following {
    let following = Following::new(name);
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)");
    following
}

#[test]
fn a_service_manager_hears_when_a_run_is_ready_where_it_is_and_that_it_stops() {
    let following = with_rows("service_told");
    let (mut manager, rhei) = Manager::listen(following.folder.path(), &following.rhei);
    let mut running = rhei.spawn(["run"]);

    manager.wait_for("READY=1", &running);
    let first = manager.heard.first().unwrap();
    assert_eq!(first, "STATUS=attaching to the source");

    running.wait_for_log("all tables are live", SOON);
    let status = manager.wait_for("bytes of WAL behind", &running);
    assert!(status.starts_with("STATUS=following; the copy is at "), "{status}");

    running.sigterm();
    manager.wait_for("STOPPING=1", &running);
    running.wait(SOON).assert_code(0);
    // Without a watchdog there is nothing to tell one.
    assert!(!manager.heard.iter().any(|message| message.contains("WATCHDOG")));
    let ready = manager.heard.iter().filter(|message| message.starts_with("READY=1"));
    assert_eq!(ready.count(), 1, "{:?}", manager.heard);
}

#[test]
fn a_run_without_anything_to_do_is_alive() {
    let following = with_rows("service_idle");
    following.sync();
    let settings =
        format!("[source]\nslot = \"{}\"\n[sync]\ninterval = \"1h\"\n", following.slot());
    let rhei = following.rhei.clone().config(&settings).env("WATCHDOG_USEC", "400000");
    let (mut manager, rhei) = Manager::listen(following.folder.path(), &rhei);

    let running = rhei.spawn(["run"]);
    manager.wait_for("READY=1", &running);
    for _ in 0..20 {
        manager.wait_for("WATCHDOG=1", &running);
    }
    running.stop(SOON).assert_code(0);
}

#[test]
fn a_service_manager_hears_that_the_source_is_away_and_back() {
    let following = with_rows("service_away");
    let (mut manager, rhei) = Manager::listen(following.folder.path(), &following.rhei);
    let running = rhei.spawn(["run"]);
    manager.wait_for("READY=1", &running);

    // The stream breaks again until the pauses are long enough for a status.
    let broken = format!(
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{}' \
         AND active",
        following.slot()
    );
    let mut messages = std::iter::from_fn(|| {
        following.db.execute(&broken);
        Some(manager.next(Duration::from_millis(200)).unwrap_or_default())
    });
    let away = messages.find(|message| message.starts_with("STATUS=not connected")).unwrap();
    assert!(away.contains("trying again in"), "{away}");

    manager.wait_for("STATUS=following", &running);
    running.stop(SOON).assert_code(0);
}

#[test]
fn a_long_step_of_duckdb_is_alive() {
    let following = with_rows("service_long");
    following.sync();
    // The step keeps a processor busy, as a merge does.
    let rhei = following.rhei.clone().env("FAILPOINTS", "apply.committing=1*delay(3000)");
    let (mut manager, rhei) =
        Manager::listen(following.folder.path(), &rhei.env("WATCHDOG_USEC", "400000"));

    let mut running = rhei.spawn(["run"]);
    manager.wait_for("READY=1", &running);
    following.db.execute("INSERT INTO t VALUES (2)");
    running.wait_for_log("applied", SOON);

    // What came meanwhile waits in the socket: more than the looks of the time before and after.
    let mut alive = 0;
    while let Some(message) = manager.next(Duration::from_millis(1)) {
        alive += usize::from(message == "WATCHDOG=1");
    }
    assert!(alive >= 10, "{alive}: {:?}", manager.heard);
    running.stop(SOON).assert_code(0);
}

#[test]
fn a_run_that_hangs_in_duckdb_is_not_alive_although_somebody_asks_for_its_status() {
    let following = with_rows("service_hangs");
    following.sync();
    let rhei = following.rhei.clone().env("FAILPOINTS", "apply.committing=pause");
    let (mut manager, rhei) =
        Manager::listen(following.folder.path(), &rhei.env("WATCHDOG_USEC", "400000"));

    let running = rhei.spawn(["run"]);
    manager.wait_for("READY=1", &running);
    manager.wait_for("WATCHDOG=1", &running);
    following.db.execute("INSERT INTO t VALUES (2)");
    manager.wait_for_silence(Duration::from_secs(1), &running);

    rhei.status();
    manager.wait_for_silence(Duration::from_secs(1), &running);
    running.kill9();
    following.sync();
    following.assert_same(&["public.t"]);
}

#[test]
fn a_health_check_fails_unless_a_replicator_answers() {
    let following = with_rows("service_health");
    let check = ["status", "--running", "--quiet"];
    let output = following.rhei.run(check);
    output.assert_code(1);
    assert!(output.stderr.starts_with("error: no replicator answers for "), "{}", output.stderr);

    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    let output = following.rhei.run_ok(check);
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("", ""));
    running.signal("STOP");
    following.rhei.run(check).assert_code(1);
    running.signal("CONT");
    running.stop(SOON).assert_code(0);
    following.rhei.run(check).assert_code(1);
}

#[test]
fn what_is_settled_holds_the_first_copies_too() {
    let following = with_rows("service_settled");
    let wait = ["wait", "--now", "--settled", "--timeout", "60s"];
    // The copy is planned only some time after the stream has begun.
    let rhei = following.rhei.clone().env("FAILPOINTS", "copy.planned=1*sleep(1000)");
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("following the source", SOON);

    following.rhei.run_ok(wait);
    let status = following.rhei.status().unwrap();
    assert_eq!(status["tables"][0]["state"], "live", "{status}");
    running.stop(SOON).assert_code(0);

    let output = following.rhei.run(wait);
    assert!(output.assert_code(1).stderr.contains("no replicator runs"), "{}", output.stderr);
}

#[test]
fn the_version_names_what_a_report_of_a_bug_needs() {
    let folder = temp_dir();
    let rhei = Rhei::new(folder.path());
    let short = rhei.run_ok(["-V"]).stdout;
    assert_eq!(short, format!("rhei {}\n", env!("CARGO_PKG_VERSION")));

    let long = rhei.run_ok(["--version"]).stdout;
    let lines: Vec<&str> = long.lines().collect();
    assert!(long.starts_with(&short), "{long}");
    for (line, begin) in lines[1..].iter().zip(["DuckDB v1.", "Arrow  58.", "commit ", "target "]) {
        assert!(line.starts_with(begin) && line.len() > begin.len(), "{line}");
    }
    assert_eq!(lines.len(), 5, "{long}");
}

#[test]
fn every_command_has_completions_and_a_man_page() {
    let folder = temp_dir();
    let rhei = Rhei::new(folder.path());
    let pages = folder.path().join("man1");
    rhei.run_ok(["man", pages.to_str().unwrap()]);
    let page = std::fs::read_to_string(pages.join("rhei.1")).unwrap();

    let help = rhei.run_ok(["--help"]).stdout;
    let commands = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let commands = commands.lines().filter_map(|line| line.strip_prefix("  "));
    let names: Vec<&str> = commands
        .filter(|line| !line.starts_with(' '))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect();
    assert!(names.len() > 15, "{names:?}");

    for shell in ["bash", "zsh", "fish"] {
        let script = rhei.run_ok(["completions", shell]).stdout;
        for name in &names {
            assert!(script.contains(name), "{name} is not completed by {shell}");
        }
    }
    for name in names {
        assert!(page.contains(&name.replace('-', "\\-")), "{name} is not in rhei.1");
        assert!(pages.join(format!("rhei-{name}.1")).exists(), "there is no rhei-{name}.1");
    }
}
