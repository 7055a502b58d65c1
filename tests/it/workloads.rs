//! The migration histories of applications that people run, forwards and back, with rows in their
//! tables, while `rhei run` follows: `make workloads`. They come from the package index
//! (scripts/workloads.sh), and so are no part of `make test`.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Lines, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use crate::{bed::Db, following::Following};

const SOON: Duration = Duration::from_secs(120);

/// After so many migrations the copy is compared.
const STOP: usize = 25;

/// An application that migrates its database when it is told to.
struct Application {
    child: Child,
    stdin: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

enum Step {
    Done(String),
    Failed(String),
    End,
}

impl Application {
    fn start(name: &str, db: &Db, folder: &Path) -> Self {
        let installed =
            std::env::var_os("RHEI_WORKLOADS").expect("`make workloads` installs the applications");
        let url = db.url();
        let address = url.split('@').next_back().unwrap().split('/').next().unwrap();
        let (host, port) = address.rsplit_once(':').unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(format!("tests/workloads/migrate_{name}.py"));
        let mut command = Command::new(PathBuf::from(installed).join(name).join("bin/python"));
        command.arg(script).current_dir(folder).env("HOME", folder).env("AIRFLOW_HOME", folder);
        command
            .env("WORKLOAD_HOST", host)
            .env("WORKLOAD_PORT", port)
            .env("WORKLOAD_DATABASE", db.name());
        let log = std::fs::File::create(folder.join("application.log")).unwrap();
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { stdin: child.stdin.take().unwrap(), answers, child }
    }

    fn take(&mut self, direction: &str) -> Step {
        writeln!(self.stdin, "{direction}").unwrap();
        let answer = self.answers.next().expect("the application answers").unwrap();
        match answer.strip_prefix("failed: ") {
            Some(why) => Step::Failed(why.to_owned()),
            None if answer == "end" => Step::End,
            None => Step::Done(answer),
        }
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The file of each table.
fn files(db: &Db) -> BTreeMap<String, String> {
    let rows = db.query(
        "SELECT relnamespace::regnamespace::text || '.' || relname, oid::text || '/' || \
         relfilenode::text FROM pg_class
         WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace",
    );
    rows.into_iter().map(|row| (row[0].clone().unwrap(), row[1].clone().unwrap())).collect()
}

fn follow(name: &str) {
    let mut following = Following::new(name);
    let slot = following.slot().to_owned();
    following.rhei = following.rhei.config(&format!(
        "[source]\nslot = \"{slot}\"\npublication = \"{slot}\"\n[sync]\ninterval = \
         \"50ms\"\ncatalog_interval = \"500ms\"\n"
    ));
    following.db.execute(&format!("CREATE PUBLICATION \"{slot}\" FOR ALL TABLES"));
    following.db.execute(include_str!("../workloads/fill.sql"));
    let mut application = Application::start(name, &following.db, following.folder.path());
    let (mut steps, mut copies, mut not_needed, mut stops) = (0, 0, 0, 0);
    for direction in ["forward", "back"] {
        let mut running = following.run();
        let mut has_failed = false;
        loop {
            let (before, mark) = (files(&following.db), running.log_mark());
            let step = match application.take(direction) {
                Step::End => break,
                Step::Failed(why) if has_failed && direction == "back" => {
                    println!("{name}: cannot go back further: {why}");
                    break;
                }
                Step::Failed(why) => {
                    assert!(!has_failed, "{name}: {why}");
                    println!(
                        "{name}: without made-up rows, since it failed: {}",
                        why.get(..200).unwrap_or(&why)
                    );
                    has_failed = true;
                    following.db.execute("SELECT filling.empty()");
                    continue;
                }
                Step::Done(step) => step,
            };
            has_failed = false;
            let after = files(&following.db);
            following.db.execute("SELECT filling.fill(5)");
            following.wait_settled(&mut running);
            steps += 1;
            for table in running.copies_since(mark) {
                copies += 1;
                // The stream does not bring the rows of a new table, nor those of one that was
                // rewritten.
                if before.get(&table).is_some_and(|file| after.get(&table) == Some(file)) {
                    not_needed += 1;
                    let (logs, said) =
                        (running.logs(), format!("copying the table again table={table} reason="));
                    let reason = logs.rsplit_once(&said).and_then(|(_, rest)| rest.lines().next());
                    println!(
                        "{name}: {step}: {table} was copied and had no need to be: {}",
                        reason.unwrap_or("?")
                    );
                }
            }
            if steps % STOP == 0 {
                println!("{name}: {steps} migrations, {copies} copies");
                running.stop(SOON).assert_code(0);
                following.assert_all_same();
                stops += 1;
                running = following.run();
            }
        }
        running.stop(SOON).assert_code(0);
        following.assert_all_same();
        stops += 1;
        let tables = files(&following.db).len();
        println!("{name}: {direction}: {steps} migrations by now, {tables} tables");
    }
    println!(
        "{name}: {steps} migrations, equal at {stops} stops; {copies} copies, {not_needed} of them \
         not needed"
    );
}

#[test]
#[ignore = "needs applications from the package index: make workloads"]
fn the_migrations_of_wagtail_are_followed_forwards_and_back() {
    follow("wagtail");
}

#[test]
#[ignore = "needs applications from the package index: make workloads"]
fn the_migrations_of_airflow_are_followed_forwards_and_back() {
    follow("airflow");
}
