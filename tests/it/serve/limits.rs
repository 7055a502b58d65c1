//! Who may connect, how many, and how long.

use std::{
    io::{Read, Write},
    time::Duration,
};

use super::{SOON, Served, code};
use crate::{
    bed::{Session, wait_until},
    following::Following,
};

const TABLE: &str =
    "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 1000)";

const LONG: &str = "SELECT count(*) FROM range(1000000) a, range(1000000) b";

#[test]
fn a_statement_ends_at_its_timeout_and_when_its_client_cancels_it() {
    let served = Served::new("serve_cancel", TABLE, "statement_timeout = \"1s\"");
    let session = served.session();
    let error = session.try_query(LONG).unwrap_err();
    assert_eq!(code(&error), "57014", "{error}");
    assert!(error.contains("statement timeout"), "{error}");
    assert_eq!(session.value("SELECT 1"), "1");
    served.stop();

    let served = Served::new("serve_own", TABLE, "");
    let session = served.session();
    session.execute("SET statement_timeout = '300ms'");
    assert_eq!(code(&session.try_query(LONG).unwrap_err()), "57014");
    session.execute("SET statement_timeout = 0");
    assert_eq!(session.value("SELECT 1"), "1");
    served.stop();

    let served = Served::new("serve_cancel2", TABLE, "");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (client, connection) = served.config().connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let cancel = client.cancel_token();
        let answer = client.simple_query(LONG);
        let mut answer = std::pin::pin!(answer);
        // A request that comes before the statement has begun does nothing, so it is repeated.
        let error = loop {
            tokio::select! {
                answer = &mut answer => break answer.unwrap_err(),
                () = tokio::time::sleep(Duration::from_millis(20)) => {
                    cancel.cancel_query(tokio_postgres::NoTls).await.unwrap();
                }
            }
        };
        let error = error.as_db_error().unwrap();
        assert_eq!(error.code().code(), "57014");
        assert!(error.message().contains("user request"), "{error}");
        assert!(client.simple_query("SELECT 1").await.is_ok());
    });
    served.stop();
}

#[test]
fn a_transaction_that_does_nothing_ends_with_its_session() {
    let served = Served::new("serve_idle", TABLE, "idle_in_transaction_timeout = \"500ms\"");
    let outside = served.session();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let ended = runtime.block_on(async {
        let (idle, connection) = served.config().connect(tokio_postgres::NoTls).await.unwrap();
        let connection = tokio::spawn(connection);
        idle.batch_execute("BEGIN; SELECT count(*) FROM t").await.unwrap();
        tokio::time::timeout(SOON, connection).await.unwrap().unwrap()
    });
    assert_eq!(ended.unwrap_err().code().unwrap().code(), "25P03");
    assert_eq!(outside.value("SELECT 1"), "1", "a session outside of a transaction stays");
    served.stop();
}

#[test]
fn more_connections_than_the_limit_are_refused() {
    let served = Served::new("serve_full", TABLE, "max_connections = 2");
    let (one, two) = (served.session(), served.session());
    let error = Session::open(&served.config()).unwrap_err();
    assert_eq!(code(&error), "53300", "{error}");
    drop((one, two));
    wait_until(SOON, "there is room again", || Session::open(&served.config()).is_ok());
    served.stop();
}

#[test]
fn users_prove_their_passwords() {
    let served = Served::new("serve_users", TABLE, "[serve.users]\nreader = \"right pässword\"");
    let mut config = served.config();
    for (user, password) in [("reader", "wrong"), ("nobody", "right pässword")] {
        let error = Session::open(config.user(user).password(password)).unwrap_err();
        assert_eq!(code(&error), "28P01", "{error}");
    }
    let session = Session::open(config.user("reader").password("right pässword")).unwrap();
    assert_eq!(session.value("SELECT count(*) FROM t"), "1000");
    let logs = served.running.logs();
    assert!(!logs.contains("pässword"), "{logs}");
    served.stop();
}

/// Everybody on the network could read the copy, or what is read of it.
#[test]
fn an_address_that_others_reach_needs_passwords_and_tls() {
    let mut following = Following::new("serve_open");
    following.db.execute(TABLE);
    following.sync();
    let slot = following.slot().to_owned();
    for settings in ["", "[serve.users]\nreader = \"secret\""] {
        following.rhei = following.rhei.config(&format!(
            "[source]\nslot = \"{slot}\"\n[serve]\nlisten = \"0.0.0.0:0\"\n{settings}\n"
        ));
        let output = following.rhei.run(["run"]);
        output.assert_code(1);
        assert!(output.stderr.contains("is not a loopback address"), "{}", output.stderr);
        assert!(output.stderr.contains("tls_cert"), "{}", output.stderr);
    }
}

/// A statement may take longer to plan than to run.
#[test]
fn planning_ends_at_the_timeout_too() {
    let served = Served::new("serve_planning", TABLE, "statement_timeout = \"250ms\"");
    let session = served.session();
    let tables = (0..36).map(|at| format!("t t{at}")).collect::<Vec<_>>().join(", ");
    let pairs = (0..36).flat_map(|a| (0..a).map(move |b| format!("t{a}.id = t{b}.id + 1")));
    let joined = pairs.collect::<Vec<_>>().join(" AND ");
    let error = session.try_query(&format!("SELECT count(*) FROM {tables} WHERE {joined}"));
    let error = error.unwrap_err();
    assert_eq!(code(&error), "57014", "{error}");
    assert!(error.contains("statement timeout"), "{error}");
    assert_eq!(session.value("SELECT 1"), "1");
    served.stop();
}

/// An old snapshot keeps DuckDB from writing its log into the file.
#[test]
fn a_transaction_ends_at_its_greatest_age_whatever_it_does() {
    let served = Served::new("serve_old", TABLE, "transaction_timeout = \"1s\"");
    let outside = served.session();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let ends = runtime.block_on(async {
        let (busy, connection) = served.config().connect(tokio_postgres::NoTls).await.unwrap();
        let connection = tokio::spawn(connection);
        busy.batch_execute("BEGIN").await.unwrap();
        let refused = loop {
            if let Err(error) = busy.batch_execute("SELECT count(*) FROM t").await {
                break Some(error);
            }
        };
        let ended = tokio::time::timeout(SOON, connection).await.unwrap().unwrap();
        [refused, ended.err()]
    });
    // The reason comes in the place of rows, or between two statements.
    let codes = ends.iter().flatten().filter_map(|error| error.code()).map(|code| code.code());
    assert_eq!(codes.collect::<Vec<_>>(), ["25P04"], "{ends:?}");
    assert_eq!(outside.value("SELECT 1"), "1");
    served.stop();
}

#[test]
fn an_open_result_that_has_no_room_ends_with_an_error_and_its_session_goes_on() {
    let served = Served::new("serve_spool", TABLE, "spool_limit = \"1MB\"");
    let session = served.session();
    session.execute("BEGIN");
    session.execute("DECLARE big CURSOR FOR SELECT repeat('x', 1000) FROM range(100000)");
    session.execute("DECLARE small CURSOR FOR SELECT id FROM t ORDER BY id");
    assert_eq!(session.value("FETCH 1 FROM small"), "1");
    let error = session.try_query("FETCH ALL FROM big").unwrap_err();
    assert_eq!(code(&error), "53400", "{error}");
    session.execute("ROLLBACK");
    assert_eq!(session.value("SELECT count(*) FROM t"), "1000");
    served.stop();
}

/// Who has not proven anything yet gets neither memory nor more than some sockets.
#[test]
fn clients_that_have_not_proven_who_they_are_get_little() {
    let served = Served::new(
        "serve_strangers",
        TABLE,
        "max_connections = 1\n[serve.users]\nreader = \"secret\"",
    );
    let socket = served.folder.join(".s.PGSQL.5432");
    let connect = || std::os::unix::net::UnixStream::connect(&socket).unwrap();

    let mut stranger = connect();
    let mut startup = b"\0\0\0\0\0\x03\0\0user\0reader\0database\0copy\0\0".to_vec();
    let length = startup.len() as u32;
    startup[..4].copy_from_slice(&length.to_be_bytes());
    stranger.write_all(&startup).unwrap();
    let mut answer = [0; 1];
    stranger.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"R");

    // The head of a message of half a gigabyte, and some of it.
    stranger.write_all(b"p\x20\0\0\0").unwrap();
    let chunk = [b'x'; 65536];
    let mut rest = Vec::new();
    while stranger.write_all(&chunk).is_ok() {
        assert!(rest.len() < 1000, "the endpoint takes 64 MB of a stranger");
        rest.push(());
    }
    drop(stranger);

    let mut idle: Vec<_> = (0..40).map(|_| connect()).collect();
    let is_closed = |stream: &mut std::os::unix::net::UnixStream| {
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        matches!(stream.read(&mut [0; 1]), Ok(0))
    };
    wait_until(SOON, "some are closed at once", || idle.iter_mut().any(is_closed));
    drop(idle);
    let mut config = served.config();
    config.password("secret");
    wait_until(SOON, "there is room again", || Session::open(&config).is_ok());
    served.stop();
}

/// What a client leaves unread stops its statement, and no other.
#[test]
fn a_client_that_does_not_read_stops_nobody_else() {
    let served = Served::new("serve_slow", TABLE, "max_statements = 1");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (slow, connection) = served.config().connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let rows = slow
            .query_raw("SELECT repeat('x', 1000) FROM range(200000)", Vec::<String>::new())
            .await
            .unwrap();

        let (quick, connection) = served.config().connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        assert_eq!(quick.query("SELECT * FROM t", &[]).await.unwrap().len(), 1000);
        drop(rows);
    });
    served.stop();
}
