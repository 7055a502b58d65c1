//! A process of its own that reads a lake, with a connection that it keeps. It is this very binary,
//! told to run [`the_process_of_a_reader`] alone.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread::JoinHandle,
};

use super::lake::Lake;

/// What begins each line by which the process says what it has seen.
const SEEN: &str = "seen: ";
const BODY: &str = "bed::reader::the_process_of_a_reader";

/// Reads again and again until it is ended or dropped.
pub struct Reader {
    child: Child,
    listening: Option<JoinHandle<()>>,
    looks: Arc<AtomicU32>,
    /// What differed within one look, and what it saw that was equal.
    seen: Arc<Mutex<(Vec<String>, BTreeSet<String>)>>,
}

impl Reader {
    /// Starts a process that reads the queries, one after the other in one transaction, each of one
    /// value.
    pub fn spawn(lake: &Lake, queries: &[&str]) -> Reader {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([BODY, "--exact", "--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let told = serde_json::json!({ "opening": lake.opening(), "queries": queries });
        writeln!(child.stdin.as_mut().unwrap(), "{told}").unwrap();

        let (looks, seen) = (Arc::<AtomicU32>::default(), Arc::<Mutex<_>>::default());
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (counter, collected) = (Arc::clone(&looks), Arc::clone(&seen));
        let listening = std::thread::spawn(move || {
            let collected: Arc<Mutex<(Vec<String>, BTreeSet<String>)>> = collected;
            for line in lines.map_while(Result::ok) {
                let Some(values) = line.strip_prefix(SEEN) else { continue };
                let values: Vec<&str> = values.split(' ').collect();
                let mut seen = collected.lock().unwrap();
                if values.iter().all(|value| *value == values[0]) {
                    seen.1.insert(values[0].to_owned());
                } else {
                    seen.0.push(values.join(" "));
                }
                counter.fetch_add(1, Ordering::Relaxed);
            }
        });
        Reader { child, listening: Some(listening), looks, seen }
    }

    /// How often the process has looked.
    #[track_caller]
    pub fn looks(&mut self) -> u32 {
        let ended = self.child.try_wait().unwrap();
        assert!(ended.is_none(), "a reader has ended by itself: {ended:?}");
        self.looks.load(Ordering::Relaxed)
    }

    /// Ends the process; returns the values that it saw. All values of a look must be equal.
    #[track_caller]
    pub fn end(mut self) -> BTreeSet<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.listening.take().unwrap().join().unwrap();
        let (torn, values) = std::mem::take(&mut *self.seen.lock().unwrap());
        assert!(torn.is_empty(), "a reader saw two commits at once: {torn:?}");
        values
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "tests of readers start it"]
fn the_process_of_a_reader() {
    let mut told = String::new();
    if std::io::stdin().read_line(&mut told).unwrap() == 0 {
        return;
    }
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    let texts = |of: &str| -> Vec<String> { serde_json::from_value(told[of].clone()).unwrap() };

    let copy = duckdb::Connection::open_in_memory().unwrap();
    for statement in texts("opening") {
        copy.execute_batch(&statement).unwrap();
    }
    let queries = texts("queries");
    loop {
        copy.execute_batch("BEGIN").unwrap();
        let values: Vec<String> = queries
            .iter()
            .map(|query| copy.query_row(query, [], |row| row.get(0)).unwrap())
            .collect();
        copy.execute_batch("COMMIT").unwrap();
        println!("{SEEN}{}", values.join(" "));
    }
}
