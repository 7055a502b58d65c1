//! Ways in: TLS with each sslmode, passwords of each kind, unix sockets, several hosts. Through the
//! binary, so SQL sessions and the replication socket both pass.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering::SeqCst},
    },
    time::Duration,
};

use crate::{
    bed::{Cluster, ClusterOptions, Db, Output, Rhei, temp_dir, wait_until},
    following::Following,
};

fn openssl(folder: &Path, arguments: &str) {
    let output =
        Command::new("openssl").args(arguments.split(' ')).current_dir(folder).output().unwrap();
    assert!(
        output.status.success(),
        "openssl {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A server with TLS whose certificate is for `localhost`, and the folder with its authority.
fn with_tls() -> (Cluster, tempfile::TempDir) {
    let folder = temp_dir();
    let make = |arguments: &str| openssl(folder.path(), arguments);
    make(
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 30 -subj \
         /CN=rhei-test-authority",
    );
    make("req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=localhost");
    fs::write(folder.path().join("names"), "subjectAltName=DNS:localhost\n").unwrap();
    make(
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -extfile names \
         -out server.pem",
    );
    make(
        "req -x509 -newkey rsa:2048 -nodes -keyout other.key -out other.pem -days 30 -subj \
         /CN=another-authority",
    );
    make("req -newkey rsa:2048 -nodes -keyout client.key -out client.csr -subj /CN=by_certificate");
    make(
        "x509 -req -in client.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -extfile names \
         -out client.pem",
    );
    let hba = "local all postgres trust\nhostssl all by_certificate all cert\nhostssl all all all \
               scram-sha-256\n";
    let cluster =
        Cluster::start(ClusterOptions { hba: Some(hba.to_owned()), ..ClusterOptions::default() });
    let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
    cluster.write_data_file("server.crt", &read("server.pem"));
    cluster.write_data_file("server.key", &read("server.key"));
    cluster.write_data_file("ca.crt", &read("ca.pem"));
    cluster.append_data_file("postgresql.conf", "\nssl = on\nssl_ca_file = 'ca.crt'\n");
    cluster.restart();
    (cluster, folder)
}

fn with_role(cluster: &Cluster, name: &str) -> Db {
    let db = cluster.database(name);
    db.execute(
        "SET password_encryption = 'scram-sha-256'; CREATE ROLE entering LOGIN REPLICATION \
         PASSWORD 'open sesame';
         CREATE ROLE by_certificate LOGIN REPLICATION; CREATE TABLE t (id int PRIMARY KEY); INSERT \
         INTO t VALUES (1);
         GRANT SELECT ON t TO entering, by_certificate; CREATE PUBLICATION rhei FOR TABLE t",
    );
    db
}

/// Copies and follows with this source.
fn enter(db: &Db, number: usize, source: &str) -> Output {
    let folder = temp_dir();
    let output = Rhei::new(folder.path())
        .source(source)
        .target("copy.duckdb")
        .config(&format!("[source]\nslot = \"enter_{number}\"\n"))
        .env("PGPASSWORD", "open sesame")
        .run(["sync"]);
    db.query(&format!(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = \
         'enter_{number}'"
    ));
    output
}

#[test]
fn each_sslmode_verifies_what_it_says() {
    let (cluster, folder) = with_tls();
    let db = with_role(&cluster, "tls");
    let (port, name) = (cluster.port(), db.name());
    let file = |name: &str| folder.path().join(name).display().to_string();
    let (ca, other) = (file("ca.pem"), file("other.pem"));
    let url = |host: &str, rest: &str| format!("postgresql://entering@{host}:{port}/{name}?{rest}");
    let opens = [
        url("localhost", "sslmode=require"),
        url("127.0.0.1", "sslmode=prefer"),
        url("localhost", "sslmode=require&channel_binding=require"),
        url("127.0.0.1", &format!("sslmode=verify-ca&sslrootcert={ca}")),
        url("localhost", &format!("sslmode=verify-full&sslrootcert={ca}")),
        format!(
            "host=localhost port={port} user=by_certificate dbname={name} sslmode=verify-full \
             sslrootcert='{ca}' \
             sslcert='{}' sslkey='{}'",
            file("client.pem"),
            file("client.key")
        ),
    ];
    for (number, source) in opens.iter().enumerate() {
        let output = enter(&db, number, source);
        assert_eq!(output.code(), Some(0), "{source}\n{}", output.stderr);
    }
    let stays_shut = [
        // No TLS, where pg_hba.conf wants it.
        url("localhost", "sslmode=disable"),
        // Another authority.
        url("localhost", &format!("sslmode=verify-ca&sslrootcert={other}")),
        url("localhost", &format!("sslmode=require&sslrootcert={other}")),
        // The certificate is for localhost.
        url("127.0.0.1", &format!("sslmode=verify-full&sslrootcert={ca}")),
    ];
    for (number, source) in stays_shut.iter().enumerate() {
        let output = enter(&db, 100 + number, source);
        assert_eq!(output.code(), Some(1), "{source}\n{}", output.stderr);
        assert!(
            output.stderr.starts_with("error: ") && output.stderr.contains("hint: "),
            "{source}\n{}",
            output.stderr
        );
    }
}

#[test]
fn passwords_of_each_kind_are_taken() {
    let hba = "local all postgres trust\nhost all by_scram all scram-sha-256\nhost all by_md5 all \
               md5\n\
               host all by_clear all password\n";
    let cluster =
        Cluster::start(ClusterOptions { hba: Some(hba.to_owned()), ..ClusterOptions::default() });
    let db = cluster.database("passwords");
    db.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION rhei FOR TABLE t");
    for (number, (role, encryption)) in
        [("by_scram", "scram-sha-256"), ("by_md5", "md5"), ("by_clear", "scram-sha-256")]
            .iter()
            .enumerate()
    {
        db.execute(&format!(
            "SET password_encryption = '{encryption}'; CREATE ROLE {role} LOGIN REPLICATION \
             PASSWORD 'open sesame'; \
             GRANT SELECT ON t TO {role}"
        ));
        let source = format!(
            "postgresql://{role}@127.0.0.1:{}/{}?sslmode=disable",
            cluster.port(),
            db.name()
        );
        let output = enter(&db, number, &source);
        assert_eq!(output.code(), Some(0), "{role}\n{}", output.stderr);
    }
}

#[test]
fn unix_sockets_and_the_second_of_two_hosts_are_reached() {
    let following = Following::new("sockets");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY)");
    following.rhei.clone().source(following.db.socket_url()).run_ok(["sync"]);
    following.db.execute("INSERT INTO t VALUES (1)");
    let port = Cluster::shared().port();
    let url = format!("postgresql://postgres@127.0.0.1:1,127.0.0.1:{port}/{}", following.db.name());
    following.rhei.clone().source(url).run_ok(["sync"]);
    following.assert_same(&["public.t"]);
}

/// Trap 41: quoted names, as PostgreSQL would fold them.
#[test]
fn a_publication_name_keeps_its_case() {
    let following = Following::new("publication_case");
    following
        .db
        .execute("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION \"My 'Pub\" FOR TABLE t");
    let settings =
        format!("[source]\nslot = \"{}\"\npublication = \"My 'Pub\"\n", following.slot());
    let rhei = following.rhei.clone().config(&settings);
    rhei.run_ok(["sync"]);
    following.db.execute("INSERT INTO t VALUES (1)");
    rhei.run_ok(["sync"]);
    following.assert_same(&["public.t"]);
}

/// An address that leads the stream's connection to one server and all others to another.
struct Junction {
    port: u16,
    stream_to: Arc<AtomicU16>,
}

impl Junction {
    fn to(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let junction = Self {
            port: listener.local_addr().unwrap().port(),
            stream_to: Arc::new(AtomicU16::new(port)),
        };
        let stream_to = Arc::clone(&junction.stream_to);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let stream_to = Arc::clone(&stream_to);
                std::thread::spawn(move || pass_on(client, port, &stream_to));
            }
        });
        junction
    }

    fn lead_stream_to(&self, cluster: &Cluster) {
        self.stream_to.store(cluster.port(), SeqCst);
    }
}

/// Until either side ends. The first message says what the connection is for.
fn pass_on(mut client: TcpStream, port: u16, stream_to: &AtomicU16) -> Option<()> {
    let mut first = [0; 4096];
    let read = client.read(&mut first).ok()?;
    let is_stream = first[..read].windows(11).any(|window| window == b"rhei/stream");
    let mut server =
        TcpStream::connect(("127.0.0.1", if is_stream { stream_to.load(SeqCst) } else { port }))
            .ok()?;
    server.write_all(&first[..read]).ok()?;
    let (mut back, mut to_client) = (server.try_clone().ok()?, client.try_clone().ok()?);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut back, &mut to_client);
        let _ = to_client.shutdown(std::net::Shutdown::Both);
    });
    let _ = std::io::copy(&mut client, &mut server);
    let _ = server.shutdown(std::net::Shutdown::Both);
    Some(())
}

/// Trap 36: a server that was promoted meanwhile streams from any position without an error.
#[test]
fn a_stream_that_another_server_answers_is_not_read() {
    const SOON: Duration = Duration::from_secs(60);
    let primary = Cluster::start(ClusterOptions::default());
    let standby = primary.standby();
    let following = Following::of(primary.database("junction"));
    following
        .db
        .execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a')");
    following.sync();
    let promoted = standby.replica_of(&following.db);
    wait_until(SOON, "the standby has the table", || {
        promoted.try_query("SELECT FROM t").is_ok_and(|rows| rows.len() == 1)
    });
    standby.promote();
    let slot = following.slot();
    promoted.query(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"));
    promoted.execute("INSERT INTO t VALUES (666, 'of another history')");

    let junction = Junction::to(primary.port());
    let url = following.db.url().replace(&primary.port().to_string(), &junction.port.to_string());
    let mut running = following.rhei.clone().source(url).spawn(["run"]);
    running.wait_for_log("following the source", SOON);
    following.db.execute("INSERT INTO t VALUES (2, 'b')");
    following.wait_until_in_step();

    junction.lead_stream_to(&standby);
    let mark = running.log_mark();
    following
        .db
        .query("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active");
    running.wait_for_log_after(mark, "another server answers", SOON);
    junction.lead_stream_to(&primary);
    following.db.execute("INSERT INTO t VALUES (3, 'c')");
    following.wait_until_in_step();
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.t"]);
}

/// What the URL sets for other clients must not decide how values are printed for this one.
#[test]
fn settings_in_the_url_do_not_shorten_values() {
    const SOON: Duration = Duration::from_secs(60);
    let following = Following::new("url_options");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, d float8, f float4, l float8[], i interval, at \
         timestamptz);
         CREATE PUBLICATION rhei FOR TABLE t",
    );
    let insert = |id: i32| {
        format!(
            "INSERT INTO t VALUES ({id}, 0.1::float8 + 0.2, 1.0::float4 / 3, ARRAY[1.0::float8 / \
             3, 1e-300],
             '1 mon -2 days 03:04:05.678', '2024-02-01 12:00:00.123456+00')"
        )
    };
    following.db.execute(&insert(1));
    let options = "-c extra_float_digits=0 -c IntervalStyle=iso_8601 -c DateStyle=German,MDY -c \
                   TimeZone=Asia/Tokyo";
    let options = options.replace(' ', "%20").replace('=', "%3D");
    let rhei = following.rhei.clone().source(format!("{}&options={options}", following.db.url()));
    let mut running = rhei.spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);
    following.db.execute(&insert(2));
    following.wait_until_in_step();
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.t"]);
}
