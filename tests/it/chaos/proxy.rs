//! A TCP forwarder with bad weather: it delays, cuts, resets, truncates, swallows and refuses.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::Duration,
};

/// How often a thread that waits for bytes looks at the weather.
const LOOK: Duration = Duration::from_millis(20);

/// Dropping it closes all connections and waits for the threads.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    upstream: AtomicU16,
    delay_ms: AtomicU64,
    is_refusing: AtomicBool,
    is_swallowing: AtomicBool,
    is_over: AtomicBool,
    connections: Mutex<Vec<Weak<Connection>>>,
}

struct Connection {
    client: TcpStream,
    server: TcpStream,
    /// Bytes that still pass, both directions together.
    allowance: AtomicU64,
    /// Nothing passes any more, and neither side is told.
    is_swallowed: AtomicBool,
    is_ended: AtomicBool,
}

impl Proxy {
    pub fn start(upstream: u16) -> Proxy {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared { upstream: upstream.into(), ..Shared::default() });
        let accepting = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(&listener, &shared)
        });
        Proxy { port, shared, accepting: Some(accepting) }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// New connections go to another server.
    pub fn forward_to(&self, upstream: u16) {
        self.shared.upstream.store(upstream, SeqCst);
    }

    /// Each piece of at most 16 KiB waits so long.
    pub fn delay(&self, delay: Duration) {
        self.shared.delay_ms.store(delay.as_millis() as u64, SeqCst);
    }

    /// New connections are reset.
    pub fn refuse(&self, is_refusing: bool) {
        self.shared.is_refusing.store(is_refusing, SeqCst);
    }

    /// As behind a router that went down: connections stay open and silent, those made meanwhile
    /// too. When it is back it knows none of them.
    pub fn swallow(&self, is_swallowing: bool) {
        self.shared.is_swallowing.store(is_swallowing, SeqCst);
        for connection in self.open() {
            if is_swallowing {
                connection.is_swallowed.store(true, SeqCst);
            } else if connection.is_swallowed.load(SeqCst) {
                connection.reset();
            }
        }
    }

    /// Both sides see the end of the stream.
    pub fn cut(&self) {
        self.open().iter().for_each(|connection| connection.close());
    }

    /// Both sides see "connection reset by peer".
    pub fn reset(&self) {
        self.open().iter().for_each(|connection| connection.reset());
    }

    /// So many more bytes pass on each connection, then it is cut: in the middle of a message, most
    /// likely.
    pub fn truncate(&self, bytes: u64) {
        self.open().iter().for_each(|connection| connection.allowance.store(bytes, SeqCst));
    }

    fn open(&self) -> Vec<Arc<Connection>> {
        self.shared.registered().iter().filter_map(Weak::upgrade).collect()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.is_over.store(true, SeqCst);
        // Wakes the accepting thread.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
        self.cut();
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

impl Shared {
    fn registered(&self) -> MutexGuard<'_, Vec<Weak<Connection>>> {
        self.connections.lock().unwrap()
    }
}

fn accept(listener: &TcpListener, shared: &Shared) {
    std::thread::scope(|scope| {
        while let Ok((client, _)) = listener.accept() {
            if shared.is_over.load(SeqCst) {
                break;
            }
            if shared.is_refusing.load(SeqCst) {
                let _ = socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO));
                continue;
            }
            let Ok(server) = TcpStream::connect(("127.0.0.1", shared.upstream.load(SeqCst))) else {
                continue;
            };
            for stream in [&client, &server] {
                let _ = stream.set_nodelay(true);
                let _ = stream.set_read_timeout(Some(LOOK));
                let _ = stream.set_write_timeout(Some(LOOK));
            }
            let connection = Arc::new(Connection {
                client,
                server,
                allowance: u64::MAX.into(),
                is_swallowed: shared.is_swallowing.load(SeqCst).into(),
                is_ended: false.into(),
            });
            let mut registered = shared.registered();
            registered.retain(|known| known.strong_count() > 0);
            registered.push(Arc::downgrade(&connection));
            drop(registered);
            let back = Arc::clone(&connection);
            scope.spawn(move || connection.pump(&connection.client, &connection.server, shared));
            scope.spawn(move || back.pump(&back.server, &back.client, shared));
        }
        shared
            .registered()
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|connection| connection.close());
    });
}

impl Connection {
    fn close(&self) {
        self.is_ended.store(true, SeqCst);
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.shutdown(Shutdown::Both);
    }

    /// Sent when both pumps have let go of the sockets.
    fn reset(&self) {
        for stream in [&self.client, &self.server] {
            let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
        self.is_ended.store(true, SeqCst);
    }

    fn pump(&self, mut from: &TcpStream, to: &TcpStream, shared: &Shared) {
        let is_of_client = std::ptr::eq(from, &self.client);
        let mut buffer = vec![0; 16 << 10];
        while !self.is_ended.load(SeqCst) {
            match from.read(&mut buffer) {
                Err(error) if is_only_slow(&error) => {}
                // Who is behind the swallowing router does not hear that the other side has given
                // up.
                Ok(0) | Err(_) if self.is_swallowed.load(SeqCst) && !is_of_client => {
                    std::thread::sleep(LOOK)
                }
                Ok(0) | Err(_) => return self.close(),
                Ok(_) if self.is_swallowed.load(SeqCst) => {}
                Ok(count) => {
                    std::thread::sleep(Duration::from_millis(shared.delay_ms.load(SeqCst)));
                    let spend = |left: u64| Some(left.saturating_sub(count as u64));
                    let allowed = self
                        .allowance
                        .fetch_update(SeqCst, SeqCst, spend)
                        .unwrap_or(0)
                        .min(count as u64);
                    self.pass_on(&buffer[..allowed as usize], to);
                    if allowed < count as u64 {
                        return self.close();
                    }
                }
            }
        }
    }

    fn pass_on(&self, mut bytes: &[u8], mut to: &TcpStream) {
        while !bytes.is_empty() && !self.is_ended.load(SeqCst) && !self.is_swallowed.load(SeqCst) {
            match to.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if is_only_slow(&error) => {}
                Err(_) => return self.close(),
            }
        }
    }
}

fn is_only_slow(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
