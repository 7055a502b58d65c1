//! What stands between rhei and the catalog of a lake, and cuts connections.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

/// Carries what clients and a server on this machine send each other.
pub struct Cut {
    port: u16,
    before: u16,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// What is cut off next.
    armed: Mutex<Option<Order>>,
    cuts: AtomicU32,
    /// New connections are closed at once.
    is_down: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
}

struct Order {
    /// All of them are in what is meant.
    words: Vec<String>,
    /// The words themselves are cut off, not the commit after them.
    at_words: bool,
    lets_commit: bool,
    goes_down: bool,
}

impl Cut {
    /// Stands before the server at this port.
    pub fn before(port: u16) -> Cut {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own_port = listener.local_addr().unwrap().port();
        let cut = Cut { port: own_port, before: port, state: Arc::default() };
        let state = Arc::clone(&cut.state);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                let server = TcpStream::connect(("127.0.0.1", port)).unwrap();
                let both = [&client, &server].map(|end| end.try_clone().unwrap());

                // Under the lock, since a connection that was seen too early would outlive `down`.
                let mut open = state.open.lock().unwrap();
                if state.is_down.load(Ordering::Relaxed) {
                    continue;
                }
                open.extend(both);
                drop(open);
                let state = Arc::clone(&state);
                std::thread::spawn(move || carry(client, server, &state));
            }
        });
        cut
    }

    /// The address of a catalog by this way.
    pub fn through(&self, catalog: &str) -> String {
        catalog.replace(&format!("port={}", self.before), &format!("port={}", self.port))
    }

    /// The next COMMIT of a transaction that has sent these words reaches the server, or does not,
    /// and its answer never comes back.
    pub fn arm(&self, words: &str, lets_commit: bool) {
        self.order(Order {
            words: vec![words.to_owned()],
            at_words: false,
            lets_commit,
            goes_down: false,
        });
    }

    /// As [`Self::arm`], and nothing reaches the server any more after that.
    pub fn arm_and_go_down(&self, words: &str, lets_commit: bool) {
        self.order(Order {
            words: vec![words.to_owned()],
            at_words: false,
            lets_commit,
            goes_down: true,
        });
    }

    /// The next query with all these words does not reach the server, and its connection ends.
    pub fn arm_query(&self, words: &[&str]) {
        self.order(Order {
            words: words.iter().map(|&words| words.to_owned()).collect(),
            at_words: true,
            lets_commit: false,
            goes_down: false,
        });
    }

    fn order(&self, order: Order) {
        *self.state.armed.lock().unwrap() = Some(order);
    }

    pub fn cuts(&self) -> u32 {
        self.state.cuts.load(Ordering::Relaxed)
    }

    /// Nothing reaches the server until [`Self::up`].
    pub fn down(&self) {
        self.state.go_down();
    }

    pub fn up(&self) {
        self.state.is_down.store(false, Ordering::Relaxed);
    }
}

impl State {
    fn go_down(&self) {
        let mut open = self.open.lock().unwrap();
        self.is_down.store(true, Ordering::Relaxed);
        for end in open.drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// Takes the order to cut, if `sent` is the query or of the transaction that it is for.
    fn take(&self, sent: &[u8], at_words: bool) -> Option<Order> {
        let mut armed = self.armed.lock().unwrap();
        let order = armed.as_ref().filter(|order| order.at_words == at_words)?;
        let has = |words: &String| sent.windows(words.len()).any(|text| text == words.as_bytes());
        let is_meant = order.words.iter().all(has);
        if is_meant { armed.take() } else { None }
    }
}

fn carry(client: TcpStream, server: TcpStream, state: &State) {
    let (mut answers, mut back) = (server.try_clone().unwrap(), client.try_clone().unwrap());
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut answers, &mut back);
        let _ = back.shutdown(Shutdown::Both);
    });

    let (mut client, mut server) = (client, server);
    let mut bytes = vec![0; 1 << 16];
    // What the transaction has sent until now. DuckLake also ends what it only reads by a COMMIT.
    let mut transaction = Vec::new();
    while let Ok(length @ 1..) = client.read(&mut bytes) {
        let sent = &bytes[..length];
        transaction.extend_from_slice(sent);
        // A simple query: its kind, its length, its text.
        let is_commit = sent.starts_with(b"Q") && sent[5..].starts_with(b"COMMIT");
        if sent.starts_with(b"Q") && sent[5..].starts_with(b"ROLLBACK") {
            transaction.clear();
        }
        let order = if is_commit {
            state.take(&std::mem::take(&mut transaction), false)
        } else {
            state.take(sent, true)
        };
        if let Some(order) = order {
            let _ = client.shutdown(Shutdown::Both);
            if order.lets_commit {
                let _ = server.write_all(sent);
                // The server reads what was sent before it learns that the client is gone.
                let _ = server.shutdown(Shutdown::Write);
            } else {
                let _ = server.shutdown(Shutdown::Both);
            }
            if order.goes_down {
                state.is_down.store(true, Ordering::Relaxed);
            }
            state.cuts.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if server.write_all(sent).is_err() {
            break;
        }
    }
    let _ = server.shutdown(Shutdown::Both);
}
