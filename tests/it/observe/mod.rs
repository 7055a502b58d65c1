//! What a run shows to those who watch over it: metrics, health, and a status page.

mod alerts;
mod page;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    process::{Command, Stdio},
    time::Duration,
};

use rhei::internals::observe::{Kind, METRICS};
use serde_json::Value;

use crate::{
    bed::{Cluster, ClusterOptions, Running, wait_until},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

/// A replicator that is observed at a free port of this machine.
pub struct Observed {
    pub following: Following,
    pub running: Running,
    pub address: String,
}

/// An answer over HTTP.
pub struct Answer {
    pub code: u16,
    pub head: String,
    pub body: String,
}

impl Observed {
    /// `setup` makes the tables at the source; `settings` are more lines of rhei.toml.
    pub fn new(name: &str, setup: &str, settings: &str) -> Self {
        Self::of(Following::new(name), setup, settings)
    }

    pub fn of(mut following: Following, setup: &str, settings: &str) -> Self {
        following.db.execute(setup);
        let slot = following.slot().to_owned();
        following.rhei = following.rhei.config(&format!(
            "[source]\nslot = \"{slot}\"\n[sync]\ninterval = \"50ms\"\n[observe]\nlisten = \
             \"localhost:0\"\n{settings}\n"
        ));

        let mut running = following.run();
        let line = running.wait_for_log("metrics, health and the status page", SOON);
        let (_, address) = line.split_once("address=").unwrap();
        Self { following, running, address: address.trim().trim_matches('"').to_owned() }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &self.address)
    }

    #[track_caller]
    fn ask(&self, method: &str, path: &str, host: &str) -> Answer {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
        stream.write_all(format!("{request}\r\n").as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();

        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let code = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { code, head: head.to_lowercase(), body: body.to_owned() }
    }

    pub fn status(&self) -> Value {
        serde_json::from_str(&self.get("/status.json").body).unwrap()
    }

    /// Every series of `/metrics`, as `name{labels}`.
    pub fn metrics(&self) -> BTreeMap<String, f64> {
        series(&self.get("/metrics").body)
    }

    #[track_caller]
    pub fn wait_for_metric(&self, series: &str, what: &str, is_there: impl Fn(f64) -> bool) {
        wait_until(SOON, &format!("{series} {what}"), || {
            self.metrics().get(series).is_some_and(|value| is_there(*value))
        });
    }

    #[track_caller]
    pub fn wait_until_ready(&self) {
        wait_until(SOON, "/readyz says ok", || self.get("/readyz").code == 200);
    }

    #[track_caller]
    pub fn settle(&mut self) {
        self.following.wait_settled(&mut self.running);
    }

    #[track_caller]
    pub fn stop(self) {
        self.running.stop(SOON).assert_code(0);
    }
}

fn series(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            (series.to_owned(), value.parse().unwrap())
        })
        .collect()
}

/// The names of metrics in an answer; those of histograms without their endings.
pub fn names(text: &str) -> BTreeSet<String> {
    let declared = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    declared.map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

/// Returns whether a tool that `scripts/setup.sh ci` installs is there. Where everything is to be
/// checked (`RHEI_CI`), it has to be.
#[track_caller]
pub fn has_tool(name: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let is_there = std::env::split_paths(&paths).any(|folder| folder.join(name).is_file());
    assert!(is_there || std::env::var_os("RHEI_CI").is_none(), "{name} is missing");
    if !is_there {
        eprintln!("not checked: {name} is missing, and scripts/setup.sh ci installs it");
    }
    is_there
}

/// Runs promtool with this on its standard input, and expects that it finds nothing wrong.
#[track_caller]
pub fn promtool(arguments: &[&str], input: &str) {
    if !has_tool("promtool") {
        return;
    }
    let mut child = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "promtool {arguments:?}\n{stdout}\n{stderr}");
}

const SHOP: &str = "CREATE TABLE orders (id int PRIMARY KEY, note text);
    CREATE TABLE customers (id int PRIMARY KEY, name text);
    INSERT INTO orders SELECT i, repeat('x', 100) FROM generate_series(1, 1000) i";

/// A run in which every metric has something to say: the source has a limit for WAL, a reader
/// reads, a table is paused, and a verification has ended.
pub fn busy_run(name: &str) -> (Cluster, Observed) {
    let options = ClusterOptions::default().conf("max_slot_wal_keep_size = '4GB'");
    let cluster = Cluster::start(options);
    let following = Following::of(cluster.database(name));
    let folder = following.folder.path().display().to_string();
    let settings = format!("[serve]\nlisten = \"{folder}\"");
    let setup = format!("{SHOP}; CREATE TABLE refused (id int PRIMARY KEY, n numeric(5, 2))");
    let mut observed = Observed::of(following, &setup, &settings);
    observed.wait_until_ready();

    let db = &observed.following.db;
    db.execute("INSERT INTO customers SELECT i, 'c' || i FROM generate_series(1, 50) i");
    db.execute("UPDATE customers SET name = 'new' WHERE id <= 20");
    db.execute("DELETE FROM customers WHERE id > 45");
    // DuckDB's DECIMAL has no room for it.
    db.execute("INSERT INTO refused VALUES (1, 'NaN')");
    observed.settle();

    let mut config = tokio_postgres::Config::new();
    config.host_path(&folder).user("reader").dbname("copy");
    let session = crate::bed::Session::open(&config).unwrap();
    assert_eq!(session.value("SELECT count(*) FROM customers"), "45");
    assert!(session.try_query("SELECT nonsense").is_err());
    drop(session);

    observed.following.rhei.run(["verify", "--table", "public.orders"]).assert_code(0);
    observed.wait_for_metric("rhei_verified_tables{verdict=\"equal\"}", "is 1", |it| it == 1.0);
    observed.wait_for_metric("rhei_tables{state=\"error\"}", "is 1", |it| it == 1.0);
    (cluster, observed)
}

#[test]
fn the_metrics_of_a_run_are_those_that_are_listed_and_promtool_finds_nothing_wrong() {
    let (_cluster, observed) = busy_run("observe_metrics");
    let db = &observed.following.db;
    db.execute("SELECT pg_logical_emit_message(false, 'rhei.test', repeat('x', 100000))");
    wait_until(SOON, "the speed of the WAL is known", || {
        observed.metrics().contains_key("rhei_slot_left_seconds")
    });

    let answer = observed.get("/metrics");
    assert_eq!(answer.code, 200);
    assert!(answer.head.contains("content-type: text/plain; version=0.0.4"), "{}", answer.head);
    promtool(&["check", "metrics"], &answer.body);

    let found = names(&answer.body);
    let listed: BTreeSet<String> = METRICS.iter().map(|metric| metric.name.to_owned()).collect();
    // Copies were too quick to be seen, and the target is a file.
    let missing: Vec<_> = listed.difference(&found).collect();
    assert!(
        missing
            .iter()
            .all(|name| *name == "rhei_copy_left_seconds" || name.starts_with("rhei_lake_")),
        "missing: {missing:?}\n{}",
        answer.body
    );
    assert_eq!(found.difference(&listed).collect::<Vec<_>>(), Vec::<&String>::new());
    for metric in METRICS.iter().filter(|metric| metric.kind == Kind::Histogram) {
        let count = series(&answer.body)[&format!("{}_count", metric.name)];
        assert!(count > 0.0, "{}", metric.name);
    }
    observed.stop();
}

#[test]
fn rows_are_counted_by_table_and_kind_and_what_is_slow_is_measured() {
    let (_cluster, observed) = busy_run("observe_rows");
    let metrics = observed.metrics();
    let rows = |table: &str, kind: &str| {
        metrics[&format!("rhei_table_rows_total{{table=\"public.{table}\",kind=\"{kind}\"}}")]
    };
    assert_eq!(["insert", "update", "delete"].map(|kind| rows("customers", kind)), [50., 20., 5.]);
    assert_eq!((rows("orders", "copy"), rows("orders", "insert")), (1000., 0.));

    let bytes = metrics["rhei_table_bytes_total{table=\"public.orders\",kind=\"copy\"}"];
    assert!(bytes > 100_000., "{bytes}");
    assert_eq!(metrics["rhei_table_paused{table=\"public.refused\"}"], 1.);
    assert_eq!(metrics["rhei_log_events_total{event=\"table_paused\",level=\"error\"}"], 1.);
    assert_eq!(metrics["rhei_slot_limit_bytes"], 4294967296.);
    assert!(metrics["rhei_slot_left_bytes"] > 3e9);
    assert_eq!(metrics["rhei_reader_statements_total{outcome=\"failed\"}"], 1.);
    assert!(metrics["rhei_reader_statements_total{outcome=\"ok\"}"] >= 1.);
    assert!(metrics["process_resident_memory_bytes"] > 1e7);
    observed.stop();
}

#[test]
fn every_rung_of_the_lag_ladder_comes_down_to_nothing_and_ready_says_so() {
    // Of its own: in a cluster that others write to, the end of the WAL is never reached for long.
    let cluster = Cluster::start(ClusterOptions::default());
    let observed = Observed::of(Following::of(cluster.database("observe_lag")), SHOP, "");
    observed.wait_until_ready();
    observed.following.db.execute("INSERT INTO orders SELECT i FROM generate_series(2000, 9000) i");

    for rung in ["sent", "received", "decoded", "applied", "durable"] {
        let series = format!("rhei_lag_bytes{{rung=\"{rung}\"}}");
        observed.wait_for_metric(&series, "is 0", |lag| lag == 0.0);
        let series = format!("rhei_lag_seconds{{rung=\"{rung}\"}}");
        observed.wait_for_metric(&series, "is 0", |lag| lag == 0.0);
    }
    assert_eq!(observed.get("/healthz").body, "ok\n");
    assert_eq!(observed.get("/readyz").body, "ok\n");
    assert_eq!(observed.metrics()["rhei_ready"], 1.0);
    observed.stop();
}

#[test]
fn without_its_source_a_run_is_healthy_and_not_ready_and_says_why() {
    let cluster = Cluster::start(ClusterOptions::durable());
    let following = Following::of(cluster.database("observe_away"));
    let mut observed = Observed::of(following, SHOP, "ready_lag = \"1s\"");
    observed.wait_until_ready();

    cluster.stop_fast();
    wait_until(SOON, "/readyz says no", || observed.get("/readyz").code == 503);
    wait_until(SOON, "/readyz names the broken stream", || {
        observed.get("/readyz").body.starts_with("the stream is broken: ")
    });
    assert_eq!(observed.get("/healthz").code, 200);
    observed.wait_for_metric("rhei_source_up", "is 0", |up| up == 0.0);
    observed.wait_for_metric("rhei_session_failures_total", "counts", |count| count >= 1.0);

    cluster.start_again();
    observed.wait_until_ready();
    assert!(observed.metrics()["rhei_sessions_total"] >= 2.0);
    observed.settle();
    observed.stop();
}

#[test]
fn everything_is_answered_while_the_writer_is_in_a_long_step() {
    let mut following = Following::new("observe_busy");
    following.db.execute(SHOP);
    following.sync();
    following.rhei = following.rhei.env("FAILPOINTS", "apply.committing=1*off->1*sleep(15000)");
    let observed = Observed::of(following, "SELECT 1", "ready_lag = \"2s\"");
    observed.wait_until_ready();

    // One of these two is held up. What comes after it is then behind.
    observed.following.db.execute("INSERT INTO orders VALUES (-1)");
    let behind = "rhei_lag_seconds{rung=\"applied\"}";
    observed.following.db.execute("INSERT INTO orders VALUES (-2)");
    observed.wait_for_metric(behind, "passes 2 s", |lag| lag > 2.0);

    assert_eq!(observed.get("/healthz").code, 200);
    assert_eq!(observed.get("/").code, 200);
    let ready = observed.get("/readyz");
    assert_eq!(ready.code, 503);
    assert!(ready.body.contains("behind, and [observe] ready_lag is 2.0 s"), "{}", ready.body);
    assert_eq!(observed.status()["tables"]["total"], 2);
    assert!(observed.metrics()[behind] > 2.0, "the writer is still busy");

    observed.wait_until_ready();
    observed.stop();
}

#[test]
fn an_address_in_use_ends_a_run_at_its_start_with_the_way_out() {
    let following = Following::new("observe_in_use");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ended = following.rhei.clone().env("RHEI_OBSERVE_LISTEN", &address).run(["run"]);
    ended.assert_code(1);
    let expected = format!(
        "error: cannot listen on {address}, where [observe] serves metrics and the status page\n\
         detail: Address already in use (os error 98)\nhint: end what listens there, or choose \
         another port in [observe] listen\n"
    );
    assert!(ended.stderr.ends_with(&expected), "{}", ended.stderr);

    let nowhere = following.rhei.clone().env("RHEI_OBSERVE_LISTEN", "9187").run(["run"]);
    nowhere.assert_code(2);
    assert!(nowhere.stderr.contains("invalid RHEI_OBSERVE_LISTEN"), "{}", nowhere.stderr);
}

#[test]
fn a_local_address_answers_no_other_name_and_only_what_reads() {
    let observed = Observed::new("observe_names", SHOP, "");
    let port = observed.address.rsplit_once(':').unwrap().1;
    for path in ["/", "/metrics", "/status.json", "/healthz"] {
        for host in ["evil.example", "127.0.0.1.evil.example", ""] {
            assert_eq!(observed.ask("GET", path, host).code, 421, "{path} at {host}");
        }
        assert_eq!(observed.ask("GET", path, &format!("localhost:{port}")).code, 200, "{path}");
        assert_eq!(observed.ask("POST", path, &observed.address).code, 405, "{path}");
        let head = observed.ask("HEAD", path, &observed.address);
        assert_eq!((head.code, head.body.as_str()), (200, ""), "{path}");
    }
    assert_eq!(observed.get("/nowhere").code, 404);
    assert_eq!(observed.get("/..%2fetc/passwd").code, 404);
    observed.stop();
}

#[test]
fn a_stop_does_not_wait_for_those_who_keep_a_connection_open() {
    let observed = Observed::new("observe_stop", SHOP, "");
    observed.wait_until_ready();
    let mut stream = TcpStream::connect(&observed.address).unwrap();
    let request = format!("GET /healthz HTTP/1.1\r\nHost: {}\r\n\r\n", observed.address);
    stream.write_all(request.as_bytes()).unwrap();
    let mut begin = [0; 12];
    stream.read_exact(&mut begin).unwrap();
    assert_eq!(&begin, b"HTTP/1.1 200");

    // An idle connection is kept for a minute while rhei runs.
    observed.running.stop(Duration::from_secs(30)).assert_code(0);
    drop(stream);
}

#[test]
fn no_answer_shows_where_the_source_is_or_its_password() {
    let mut following = Following::new("observe_secrets");
    let url = following.db.url();
    let with_password = url.replacen("postgres@", "postgres:hush-hush@", 1);
    assert_ne!(url, with_password);
    following.rhei = following.rhei.source(with_password);
    let observed = Observed::of(following, SHOP, "");
    observed.wait_until_ready();

    let address = url.split('@').nth(1).unwrap().split('/').next().unwrap();
    for path in ["/", "/metrics", "/status.json", "/healthz", "/readyz"] {
        let body = observed.get(path).body;
        for secret in ["hush-hush", "postgresql://", address] {
            assert!(!body.contains(secret), "{path} shows {secret}");
        }
    }
    observed.stop();
}
