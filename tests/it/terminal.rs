//! What a terminal shows: the binary runs on a pseudo-terminal, and an emulator makes a screen of
//! its bytes. A test looks at the screen, while tables are copied and at the end, not at the bytes.

use std::{
    fs::File,
    io::Read,
    num::NonZero,
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::Duration,
};

use rustix::{
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};
use serde_json::Value;

use crate::{
    bed::{Rhei, wait_until},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);
/// The rows of the terminals: enough for all that a sync of these tests prints.
const ROWS: u16 = 50;
const TABLES: usize = 6;

/// A running binary and the screen of its terminal.
struct Terminal {
    child: Child,
    master: File,
    seen: Arc<Mutex<Seen>>,
    reader: Option<JoinHandle<()>>,
}

struct Seen {
    screen: vt100::Parser,
    bytes: Vec<u8>,
}

impl Terminal {
    fn start(rhei: &Rhei, columns: u16, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        set_size(&master, columns);
        let side = || {
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
            Stdio::from(ioctl_tiocgptpeer(&master, flags).unwrap())
        };

        let mut command = rhei.command(arguments);
        command.env_remove("NO_COLOR").env("TERM", "xterm-256color");
        command.envs(environment.iter().copied());
        let child = command.stdin(side()).stdout(side()).stderr(side()).spawn().unwrap();
        // The terminal ends when the last process closes its side.
        drop(command);

        let screen = vt100::Parser::new(cells(ROWS), cells(columns), 0);
        let seen = Arc::new(Mutex::new(Seen { screen, bytes: Vec::new() }));
        let master = File::from(master);
        let reader = read(master.try_clone().unwrap(), Arc::clone(&seen));
        Self { child, master, seen, reader: Some(reader) }
    }

    fn resize(&self, columns: u16) {
        self.seen.lock().unwrap().screen.screen_mut().set_size(cells(ROWS), cells(columns));
        set_size(&self.master, columns);
    }

    /// The lines of the screen from the top, and whether each goes on in the next one.
    fn lines(&self) -> Vec<(String, bool)> {
        let seen = self.seen.lock().unwrap();
        let screen = seen.screen.screen();
        let (_, columns) = screen.size();
        let lines = screen.rows(0, columns.get()).zip(0..);
        lines.map(|(line, row)| (line, screen.row_wrapped(row))).collect()
    }

    /// The bars on the screen, which are whole and each of another table. There may be none, or
    /// only some of them, while the terminal draws.
    #[track_caller]
    fn bars(&self) -> Vec<String> {
        let lines = self.lines();
        let mut bars: Vec<String> = Vec::new();
        for (line, wraps) in lines.iter().filter(|(line, _)| is_bar(line)) {
            let name = name_of(line);
            assert!(!wraps, "a bar wraps:\n{lines:#?}");
            assert!(!bars.iter().any(|bar| name_of(bar) == name), "two bars of {name}: {lines:#?}");
            assert!(!line.contains("0/0") && !line.contains(" 0 of 0 "), "{line}");
            bars.push(line.clone());
        }
        let totals = bars.iter().filter(|bar| is_total(bar)).count();
        assert!(totals <= 1, "{totals} lines of all tables:\n{lines:#?}");
        bars
    }

    /// Waits for a total and this many bars of tables.
    #[track_caller]
    fn wait_for_bars(&self, least: usize) {
        wait_until(SOON, "bars are on the screen", || {
            let bars = self.bars();
            bars.len() > least && bars.last().is_some_and(|bar| is_total(bar))
        });
    }

    /// Looks at the bars until the end, and returns the lines that then are on the screen.
    #[track_caller]
    fn wait(mut self) -> Vec<String> {
        let mut status = None;
        wait_until(SOON, "the sync ends", || {
            self.bars();
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        self.reader.take().unwrap().join().unwrap();
        assert!(status.unwrap().success(), "{:#?}", self.lines());

        let seen = self.seen.lock().unwrap();
        seen.screen.screen().contents().lines().map(str::to_owned).collect()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn cells(count: u16) -> NonZero<u16> {
    NonZero::new(count).unwrap()
}

fn set_size(terminal: impl std::os::fd::AsFd, columns: u16) {
    let size = Winsize { ws_row: ROWS, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).unwrap();
}

fn read(mut master: File, seen: Arc<Mutex<Seen>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut bytes = [0; 65_536];
        // An error says that no process has the other side any more.
        while let Ok(read @ 1..) = master.read(&mut bytes) {
            let mut seen = seen.lock().unwrap();
            seen.screen.process(&bytes[..read]);
            seen.bytes.extend_from_slice(&bytes[..read]);
        }
    })
}

fn is_bar(line: &str) -> bool {
    line.contains(['█', '░'])
}

fn is_total(line: &str) -> bool {
    line.contains(" done, ") && line.contains(" left ")
}

fn name_of(bar: &str) -> &str {
    bar.split(['█', '░']).next().unwrap_or_default().trim()
}

/// A source whose copy takes some seconds. The source knows nothing of the rows of `t1`.
fn slow(name: &str) -> Following {
    let following = Following::new(name);
    for number in 1..=TABLES {
        let table = format!("t{number}_with_a_name_that_is_rather_long_for_a_narrow_terminal");
        let analyze = if number > 1 { format!("ANALYZE {table}") } else { String::new() };
        following.db.execute(&format!(
            "CREATE TABLE {table} (id int PRIMARY KEY, v text) WITH (autovacuum_enabled = off);
             INSERT INTO {table} SELECT i, repeat(md5(i::text), 10) FROM generate_series(1, 4000) i;
             {analyze}"
        ));
    }
    following.db.execute("CREATE TABLE empty (id int PRIMARY KEY)");
    following
}

fn slowly(following: &Following) -> Rhei {
    following.rhei.clone().env("RHEI_BACKFILL_RATE_LIMIT", "2MB")
}

/// Lines of the log are whole, each table was said to be copied once, and nothing else is left.
#[track_caller]
fn assert_only_log(lines: &[String]) {
    for line in lines {
        let is_log = line.starts_with("20") && line.get(10..11) == Some("T");
        assert!(is_log || line.starts_with("caught up at "), "{line:?} of {lines:#?}");
    }
    for number in 1..=TABLES {
        let name = format!("copied table=\"public.t{number}_with");
        let said = lines.iter().filter(|line| line.contains(&name)).count();
        assert_eq!(said, 1, "{name} in {lines:#?}");
    }
}

#[track_caller]
fn shows_bars_and_leaves_the_log(name: &str, columns: u16) {
    let following = slow(name);
    let terminal = Terminal::start(&slowly(&following), columns, &["sync"], &[]);
    terminal.wait_for_bars(2);
    assert_only_log(&terminal.wait());
}

#[test]
fn bars_fit_60_columns() {
    shows_bars_and_leaves_the_log("bars_60", 60);
}

#[test]
fn bars_fit_110_columns() {
    shows_bars_and_leaves_the_log("bars_110", 110);
}

#[test]
fn bars_fit_250_columns() {
    shows_bars_and_leaves_the_log("bars_250", 250);
}

/// The emulator cuts lines that are too long for its new width, as xterm does; others wrap them.
#[test]
fn a_terminal_of_another_width_keeps_no_ghost() {
    let following = slow("bars_resized");
    let arguments = ["sync", "-q", "--progress", "bar"];
    let terminal = Terminal::start(&slowly(&following), 200, &arguments, &[]);
    terminal.wait_for_bars(2);
    terminal.resize(60);
    wait_until(SOON, "the bars are drawn for the new width", || {
        let bars = terminal.bars();
        bars.last().is_some_and(|bar| is_total(bar) && !bar.contains("tables done"))
    });
    terminal.resize(130);
    wait_until(SOON, "the bars are drawn for the new width", || {
        let bars = terminal.bars();
        bars.last().is_some_and(|bar| is_total(bar) && bar.contains("tables done"))
    });

    let lines = terminal.wait();
    assert!(matches!(&lines[..], [line] if line.starts_with("caught up at ")), "{lines:#?}");
}

/// A thousand tables have a few bars and a total.
#[test]
fn many_tables_leave_room_for_the_log() {
    let following = Following::new("bars_many");
    following.db.execute(
        "DO $$ BEGIN FOR i IN 1..200 LOOP
             EXECUTE format('CREATE TABLE t%s (id int PRIMARY KEY, v text)', i);
             EXECUTE format('INSERT INTO t%s SELECT i, repeat(md5(i::text), 10)
                             FROM generate_series(1, 100) i', i);
         END LOOP; END $$; ANALYZE",
    );
    let rhei = following.rhei.clone().env("RHEI_BACKFILL_RATE_LIMIT", "3MB");
    let terminal = Terminal::start(&rhei, 110, &["sync", "--progress", "bar", "-q"], &[]);
    terminal.wait_for_bars(1);
    let bars = terminal.bars();
    assert!(bars.len() <= 9, "{bars:#?}");
    terminal.wait();
}

/// Neither bars nor colours; nothing that moves the cursor.
#[track_caller]
fn has_plain_lines(name: &str, environment: (&str, &str)) {
    let following = slow(name);
    let terminal = Terminal::start(&slowly(&following), 110, &["sync"], &[environment]);
    let seen = Arc::clone(&terminal.seen);
    assert_only_log(&terminal.wait());
    let bytes = seen.lock().unwrap().bytes.clone();
    assert!(!bytes.contains(&0x1b), "{}", String::from_utf8_lossy(&bytes));
}

#[test]
fn a_dumb_terminal_has_plain_lines() {
    has_plain_lines("dumb", ("TERM", "dumb"));
}

#[test]
fn without_colour_the_terminal_has_plain_lines() {
    has_plain_lines("no_color", ("NO_COLOR", "1"));
}

#[test]
fn without_progress_the_terminal_has_the_log_alone() {
    let following = slow("none");
    let terminal = Terminal::start(&slowly(&following), 110, &["sync", "--progress", "none"], &[]);
    let seen = Arc::clone(&terminal.seen);
    assert_only_log(&terminal.wait());
    let bytes = seen.lock().unwrap().bytes.clone();
    assert!(!is_bar(&String::from_utf8_lossy(&bytes)), "{}", String::from_utf8_lossy(&bytes));
}

/// For programs that show the progress themselves: every line of standard error is an object.
#[test]
fn progress_as_json_is_an_object_per_line() {
    let following = slow("json");
    let output = slowly(&following).run_ok(["sync", "--progress", "json"]);
    let lines: Vec<Value> =
        output.stderr.lines().map(|line| serde_json::from_str(line).expect(line)).collect();

    let events = |name| lines.iter().filter(move |line| line["event"] == name);
    let copying = events("copying").next().expect("a line while tables are copied");
    assert_eq!(copying["tables"], 1 + TABLES);
    assert!(copying["rows"].as_u64() > Some(0) && copying["bytes"].as_u64() > Some(0), "{copying}");
    assert!(copying["seconds_left"].is_number(), "{copying}");

    let ended: Vec<&Value> = events("copies_ended").collect();
    let [ended] = ended[..] else { panic!("{} ends", ended.len()) };
    assert_eq!((&ended["tables_done"], &ended["tables_left"]), (&ended["tables"], &0.into()));
    assert_eq!(ended["rows"], 4000 * TABLES);

    // The log can be text all the same.
    following.db.execute("INSERT INTO empty VALUES (1)");
    let output = following.rhei.run_ok(["sync", "--progress", "json", "--log-format", "text"]);
    assert!(output.stderr.lines().all(|line| !line.starts_with('{')), "{}", output.stderr);
}
