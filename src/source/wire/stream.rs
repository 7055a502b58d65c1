//! The receiving half of a replication connection: a task that only reads, and the queue between
//! the task and the decoder.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncReadExt, ReadHalf},
    sync::{Semaphore, mpsc},
};

use super::{
    Frame, FrameReader, ServerMessage, WireError,
    feedback::Liveness,
    frame::{HEADER_BYTES, MAX_MESSAGE_BYTES, whole_frame},
    socket::Socket,
};
use crate::{Lsn, failpoint::reached, source::StreamFigures};

/// One message of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamMessage {
    /// The payload of one XLogData; its header's LSNs mean nothing (trap 7).
    Data {
        payload: Bytes,
    },
    Keepalive {
        wal_end: Lsn,
        reply_requested: bool,
    },
    Notice(ServerMessage),
}

impl StreamMessage {
    /// Reads one frame. None means that the stream ended in good order.
    pub fn read(frame: Frame) -> Result<Option<Self>, WireError> {
        const SHORT: WireError = WireError::Short { during: "streaming" };
        match frame.tag {
            b'd' => {}
            // A server that shuts down sends CommandComplete without CopyDone before it.
            b'c' | b'C' | b'Z' => return Ok(None),
            b'E' => return Err(WireError::Server(ServerMessage::read(&frame.body))),
            b'N' => return Ok(Some(Self::Notice(ServerMessage::read(&frame.body)))),
            // A parameter changed: the parameters that rhei relies on are pinned.
            b'S' => {
                let (wal_end, reply_requested) = (Lsn::ZERO, false);
                return Ok(Some(Self::Keepalive { wal_end, reply_requested }));
            }
            tag => return Err(WireError::Unexpected { tag, during: "streaming" }),
        }

        let mut body = frame.body;
        match body.first() {
            // Start, end and time: 24 bytes that mean nothing to rhei (trap 7).
            Some(b'w') if body.len() >= 25 => {
                body.advance(25);
                Ok(Some(Self::Data { payload: body }))
            }
            Some(b'k') if body.len() == 18 => {
                body.advance(1);
                let wal_end = Lsn(body.get_u64());
                body.advance(8);
                Ok(Some(Self::Keepalive { wal_end, reply_requested: body.get_u8() != 0 }))
            }
            Some(b'w' | b'k') | None => Err(SHORT),
            Some(&tag) => Err(WireError::Unexpected { tag, during: "streaming" }),
        }
    }
}

/// The receiving end. Its task reads the socket whatever the decoder does, up to a budget in bytes,
/// and hands over many whole frames at a time: a queue entry and a wake-up for each message would
/// cost more than decoding the message.
pub struct StreamReader {
    queue: mpsc::UnboundedReceiver<Result<Bytes, WireError>>,
    queue_bytes: usize,
    budget: Arc<Semaphore>,
    figures: StreamFigures,
    /// Whole frames that were taken off the queue and are not read yet.
    frames: Bytes,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl StreamReader {
    pub(super) fn start(
        read: ReadHalf<Socket>,
        socket: Option<OwnedFd>,
        frames: FrameReader,
        liveness: Liveness,
        timeout: Option<Duration>,
        (queue_bytes, figures): (usize, StreamFigures),
    ) -> Self {
        let (send, queue) = mpsc::unbounded_channel();

        // One permit stands for one byte.
        let queue_bytes = queue_bytes.min(Semaphore::MAX_PERMITS).min(u32::MAX as usize);
        let budget = Arc::new(Semaphore::new(queue_bytes));

        let pump = Pump {
            read,
            // A server that refuses at once may have sent its error together with its answer to
            // START_REPLICATION, and sends nothing more.
            since: (frames.buffered() > 0).then(Instant::now),
            frames,
            is_busy: false,
            watermark: ReceiveLowWatermark::new(socket),
            liveness,
            timeout,
            queue: send,
            queue_bytes,
            room: Arc::clone(&budget),
            figures: figures.clone(),
        };
        let task = tokio::spawn(pump.run());

        Self { queue, queue_bytes, budget, figures, frames: Bytes::new(), task }
    }

    fn take(&mut self, whole: Result<Bytes, WireError>) -> Result<(), WireError> {
        let whole = whole?;
        self.budget.add_permits(whole.len().min(self.queue_bytes));
        self.figures.take(whole.len());
        self.frames = whole;
        Ok(())
    }

    fn next_frame(&mut self) -> Result<Option<Frame>, WireError> {
        let Some((tag, body)) = whole_frame(&self.frames, MAX_MESSAGE_BYTES)? else {
            return Ok(None);
        };
        let bytes = body.len();
        self.frames.advance(HEADER_BYTES);
        Ok(Some(Frame { tag, body: self.frames.split_to(bytes) }))
    }

    /// Returns the next message, or none when the server ended the stream in good order.
    /// Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<StreamMessage>, WireError> {
        loop {
            if let Some(frame) = self.next_frame()? {
                return StreamMessage::read(frame);
            }
            match self.queue.recv().await {
                Some(whole) => self.take(whole)?,
                None => return Ok(None),
            }
        }
    }

    /// Returns the next message if one is here already. The end of the stream is an error here,
    /// since a caller that only polls now and then would not notice it otherwise.
    pub fn try_next(&mut self) -> Result<Option<StreamMessage>, WireError> {
        loop {
            if let Some(frame) = self.next_frame()? {
                return StreamMessage::read(frame)?.map(Some).ok_or(WireError::Closed);
            }
            match self.queue.try_recv() {
                Ok(whole) => self.take(whole)?,
                Err(mpsc::error::TryRecvError::Empty) => return Ok(None),
                Err(mpsc::error::TryRecvError::Disconnected) => return Err(WireError::Closed),
            }
        }
    }
}

/// The reader gathers this many bytes before it hands them over, or gathers for [`GATHER`].
const GATHERED_BYTES: usize = 64 << 10;
const GATHER: Duration = Duration::from_millis(1);
/// While the stream fills [`GATHERED_BYTES`] that fast, the reader waits until this many bytes are
/// in the socket.
const READ_BYTES: libc::c_int = 32 << 10;

/// The task that moves frames from the socket to the queue.
struct Pump {
    read: ReadHalf<Socket>,
    frames: FrameReader,
    /// The time at which bytes were read that are not handed over yet.
    since: Option<Instant>,
    /// Whether the stream fills [`GATHERED_BYTES`] within [`GATHER`].
    is_busy: bool,
    watermark: ReceiveLowWatermark,
    liveness: Liveness,
    timeout: Option<Duration>,
    queue: mpsc::UnboundedSender<Result<Bytes, WireError>>,
    queue_bytes: usize,
    /// The bytes that may still be queued.
    room: Arc<Semaphore>,
    figures: StreamFigures,
}

impl Pump {
    async fn run(mut self) {
        if let Err(error) = self.pump().await {
            let _ = self.queue.send(Err(error));
        }
    }

    /// Reads frames and delivers them until the consumer is gone.
    async fn pump(&mut self) -> Result<(), WireError> {
        while self.deliver().await? {
            self.watermark.set(if self.is_busy { READ_BYTES } else { 1 });
            self.read_some().await?;
        }
        Ok(())
    }

    /// Hands the whole frames over if they are many or have waited for [`GATHER`], as soon as the
    /// queue has room for them. Returns `false` when the consumer is gone.
    async fn deliver(&mut self) -> Result<bool, WireError> {
        let is_due = self.since.is_some_and(|since| since.elapsed() >= GATHER);
        let is_much = self.frames.buffered() >= GATHERED_BYTES;
        if !is_due && !is_much {
            return Ok(true);
        }

        self.since = None;
        let Some(whole) = self.frames.whole_frames()? else { return Ok(true) };

        self.is_busy |= is_much;
        self.liveness.record_activity();
        reached("stream.received");

        self.figures.queue(whole.len(), position_of_first(&whole));

        // Frames that are larger than the whole budget take all of it, and pass.
        let cost = whole.len().min(self.queue_bytes) as u32;
        if let Ok(permit) = self.room.acquire_many(cost).await {
            permit.forget();
        }

        Ok(self.queue.send(Ok(whole)).is_ok())
    }

    /// Reads bytes, if any arrive before bytes that were read earlier have to be handed over.
    async fn read_some(&mut self) -> Result<(), WireError> {
        let read = self.read.read_buf(self.frames.buffer());
        let read = match self.timeout {
            _ if self.is_busy || self.since.is_some() => {
                let Ok(read) = tokio::time::timeout(GATHER, read).await else {
                    // Fewer bytes than the watermark may be there; the reader takes them with the
                    // bytes gathered next.
                    if std::mem::take(&mut self.is_busy) {
                        self.since = self.since.map(|_| Instant::now());
                    }
                    return Ok(());
                };
                read
            }
            // A server that is silent for that long although rhei asked is dead (trap 27). The
            // status that rhei sends asks for an answer at half that time.
            Some(timeout) => tokio::time::timeout(timeout * 2, read)
                .await
                .map_err(|_| WireError::Silent(timeout * 2))?,
            None => read.await,
        };

        if !matches!(read, Ok(1..)) {
            // The last message of the server gives the reason.
            if let Some(whole) = self.frames.whole_frames()? {
                let _ = self.queue.send(Ok(whole));
            }
            return Err(read.map_or_else(WireError::from, |_| WireError::Closed));
        }

        self.since.get_or_insert_with(Instant::now);
        Ok(())
    }
}

/// Returns the position of the first frame: that of a change, or what a keepalive says. It only
/// shows about how far the server has come (trap 7).
fn position_of_first(frames: &[u8]) -> Option<Lsn> {
    let body = frames.get(HEADER_BYTES..)?;
    let (tag, rest) = body.split_first()?;
    let (lsn, _) = rest.split_first_chunk::<8>()?;
    (frames.first() == Some(&b'd') && matches!(tag, b'w' | b'k'))
        .then(|| Lsn(u64::from_be_bytes(*lsn)))
}

/// The number of bytes that wait in a socket before the kernel wakes its reader. The server sends
/// each change by itself, and one wake-up for each change costs more than decoding the change.
struct ReceiveLowWatermark {
    /// Set for TCP on Linux only, which (from 4.18 on) also wakes a reader that asks for less than
    /// the watermark once the watermark is reached.
    socket: Option<OwnedFd>,
    bytes: libc::c_int,
}

impl ReceiveLowWatermark {
    fn new(socket: Option<OwnedFd>) -> Self {
        Self { socket, bytes: 1 }
    }

    #[allow(unsafe_code, reason = "no library that we have offers SO_RCVLOWAT")]
    fn set(&mut self, bytes: libc::c_int) {
        let Some(socket) = &self.socket else { return };
        if bytes == self.bytes {
            return;
        }

        self.bytes = bytes;
        // SAFETY: the descriptor is open, and the option is an int of this length that the kernel
        // copies. A kernel that refuses the option wakes the reader as before.
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVLOWAT,
                (&raw const bytes).cast(),
                size_of_val(&bytes) as libc::socklen_t,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_came_with_the_start_of_the_stream_is_heard_though_nothing_follows() {
        let (ours, _theirs) = tokio::net::UnixStream::pair().unwrap();
        let (read, write) = tokio::io::split(Socket::Unix(ours));
        let feedback = crate::source::wire::feedback::Feedback::start(write, Lsn::ZERO, None);
        let mut frames = FrameReader::default();
        frames.buffer().extend_from_slice(b"E\0\0\0\x0cC58P01\0\0");
        let queue = (1000, StreamFigures::default());
        let mut reader = StreamReader::start(read, None, frames, feedback.liveness(), None, queue);
        let heard = tokio::time::timeout(Duration::from_secs(10), reader.next()).await.unwrap();
        assert!(matches!(heard, Err(WireError::Server(message)) if message.code == "58P01"));
    }

    /// Frames of `sizes`, each sent by itself, arrive whole over TCP, where a busy reader leaves
    /// bytes in the socket.
    async fn come_whole(sizes: &[usize]) {
        use tokio::io::AsyncWriteExt;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut theirs, _) = listener.accept().await.unwrap();
        let socket = std::os::fd::AsFd::as_fd(&ours).try_clone_to_owned().ok();
        let (read, write) = tokio::io::split(Socket::Tcp(ours));
        let feedback = crate::source::wire::feedback::Feedback::start(write, Lsn::ZERO, None);
        let mut reader = StreamReader::start(
            read,
            socket,
            FrameReader::default(),
            feedback.liveness(),
            None,
            (64 << 20, StreamFigures::default()),
        );
        let frames: Vec<Vec<u8>> = sizes
            .iter()
            .map(|size| {
                let length = u32::try_from(4 + 25 + size).unwrap().to_be_bytes();
                [&b"d"[..], &length, b"w", &[0; 24], &vec![7; *size]].concat()
            })
            .collect();
        // The connection stays open, so that only its bytes wake the reader.
        let sent = tokio::spawn(async move {
            for frame in frames {
                theirs.write_all(&frame).await.unwrap();
            }
            theirs
        });
        for size in sizes {
            let heard = tokio::time::timeout(Duration::from_secs(30), reader.next())
                .await
                .unwrap()
                .unwrap();
            assert!(
                matches!(heard, Some(StreamMessage::Data { payload }) if payload.len() == *size)
            );
        }
        drop(sent.await.unwrap());
    }

    #[tokio::test]
    async fn the_last_bytes_of_a_busy_stream_are_read_though_nothing_follows() {
        come_whole(&[&[200; 2000][..], &[1]].concat()).await;
    }

    #[tokio::test]
    async fn a_message_larger_than_what_is_gathered_comes_whole_out_of_a_busy_stream() {
        come_whole(
            &[&[200; 2000][..], &[3_000_001], &[200; 2000], &[GATHERED_BYTES + 1, 1, 70_000]]
                .concat(),
        )
        .await;
    }

    #[test]
    fn short_stream_messages_are_errors() {
        for body in [&b"w"[..], &[b'w'; 24], b"k", &[b'k'; 17], &[b'k'; 19], b""] {
            let frame = Frame { tag: b'd', body: Bytes::copy_from_slice(body) };
            assert!(StreamMessage::read(frame).is_err(), "{body:?}");
        }
    }
}
