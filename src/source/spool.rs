//! The spool keeps transactions that the server streams before they have ended (protocol 2, trap
//! 79), on disk when they are large, until the server reports how they ended. A transaction that
//! commits is read back as an ordinary transaction, so no other part of rhei knows of the spool.
//! The file has no name and is deleted with the process: the server sends uncommitted transactions
//! again.

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    path::PathBuf,
};

use crate::pgoutput::message::{DecodeError, StreamCommit, Streamed};

/// The bytes of each transaction that stay in memory.
const MEMORY_BYTES: usize = 256 << 10;
/// The bytes of all transactions that stay in memory: above this limit, the spool writes all of
/// them to disk.
const ALL_MEMORY_BYTES: usize = 64 << 20;
/// The limit for the metadata of all transactions, which cannot be written to disk: the
/// subtransaction of each segment, the subtransactions that were rolled back, and relations. The
/// metadata takes 16 bytes for each subtransaction.
const MAX_METADATA_BYTES: usize = 1 << 30;

/// The spool cannot keep a transaction, or the stream of it is invalid.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    #[error(
        "cannot keep a transaction that is in progress at the source in {folder}\nhint: make room \
         there; nothing is lost, it comes again"
    )]
    Io { folder: String, source: io::Error },
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("the source ends transaction {0}, which it never began")]
    Unknown(u32),
    #[error(
        "telling transactions apart that are in progress at the source takes more than {limit} \
         bytes of memory"
    )]
    TooMany { limit: usize },
    #[error("the source begins a piece of transaction {next} inside one of {open}")]
    Nested { open: u32, next: u32 },
}

/// All transactions that are in progress.
pub struct Spool {
    folder: PathBuf,
    /// The transaction whose messages arrive now.
    open: Option<u32>,
    transactions: BTreeMap<u32, Transaction>,
    /// The bytes of messages that all transactions hold in memory.
    buffered_bytes: usize,
    /// The bytes of metadata that all transactions hold in memory.
    metadata_bytes: usize,
    buffer_limit: usize,
    metadata_limit: usize,
}

#[derive(Default)]
struct Transaction {
    /// The subtransaction of each segment, and where the segment ends. Each segment begins where
    /// the one before it ends.
    segments: Vec<(u32, u64)>,
    aborted: HashSet<u32>,
    file: Option<File>,
    in_file: u64,
    tail: Vec<u8>,
    /// The relations that the server has described in other transactions since this one began.
    described: BTreeMap<u32, Vec<u8>>,
    /// The bytes of metadata, which stay in memory whatever their size.
    metadata_bytes: usize,
}

/// How [`Spool::take`] handled a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Routed {
    /// The spool keeps the message, or the message decides what happens to kept messages.
    Spooled,
    /// The message belongs to no streamed transaction.
    Passed,
}

impl Spool {
    /// Makes a spool that creates its files in `folder`.
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            open: None,
            transactions: BTreeMap::new(),
            buffered_bytes: 0,
            metadata_bytes: 0,
            buffer_limit: ALL_MEMORY_BYTES,
            metadata_limit: MAX_METADATA_BYTES,
        }
    }

    /// Returns whether the messages that arrive now belong to a transaction that has not ended.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Returns the bytes on disk of the transactions that have not ended.
    pub fn file_bytes(&self) -> u64 {
        self.transactions.values().map(|transaction| transaction.in_file).sum()
    }

    /// Takes a message in, unless it belongs to no streamed transaction. A [`StreamCommit`] goes to
    /// [`Self::commit`] instead.
    pub fn take(&mut self, message: &[u8]) -> Result<Routed, SpoolError> {
        match (self.open, Streamed::decode(message)?) {
            (None, Some(Streamed::Start { xid })) => {
                self.change(xid, |_| {})?;
                self.open = Some(xid);
            }
            (Some(open), Some(Streamed::Start { xid })) => {
                return Err(SpoolError::Nested { open, next: xid });
            }
            (_, Some(Streamed::Stop)) => self.open = None,
            (_, Some(Streamed::Abort { xid, subxid })) if xid == subxid => drop(self.remove(xid)),
            (_, Some(Streamed::Abort { xid, subxid })) => self.change(xid, |transaction| {
                if transaction.aborted.insert(subxid) {
                    transaction.metadata_bytes += size_of::<(u32, u64)>();
                }
            })?,
            (None, None) => {
                if let Some(oid) = Streamed::relation(message) {
                    self.describe(oid, message, None)?;
                }
                return Ok(Routed::Passed);
            }
            (Some(xid), None) => {
                // The message names the origin of the transaction and carries no transaction
                // number.
                if message.first() == Some(&b'O') {
                    return Ok(Routed::Spooled);
                }

                let (subxid, tag, rest) = Streamed::split(message)?;
                if tag == b'R' {
                    let message = [[tag].as_slice(), rest].concat();
                    if let Some(oid) = Streamed::relation(&message) {
                        self.describe(oid, &message, Some(xid))?;
                    }
                }

                if !self.transactions.contains_key(&xid) {
                    return Err(SpoolError::Unknown(xid));
                }

                self.change(xid, |transaction| transaction.add(subxid, tag, rest))?;
                self.make_room(xid).map_err(|source| self.failed(source))?;
            }
        }

        Ok(Routed::Spooled)
    }

    /// Stores the description of a relation with the other transactions. The server describes a
    /// relation once, and after a change of it: a transaction that is read back later must not
    /// leave an older description behind.
    fn describe(&mut self, oid: u32, message: &[u8], by: Option<u32>) -> Result<(), SpoolError> {
        let others: Vec<u32> =
            self.transactions.keys().copied().filter(|xid| Some(*xid) != by).collect();

        for xid in others {
            self.change(xid, |transaction| {
                transaction.metadata_bytes += size_of::<Vec<u8>>() + message.len();
                if let Some(older) = transaction.described.insert(oid, message.to_vec()) {
                    transaction.metadata_bytes -= size_of::<Vec<u8>>() + older.len();
                }
            })?;
        }
        Ok(())
    }

    /// Changes a transaction, which begins here if it is new, and updates the sums.
    fn change(
        &mut self,
        xid: u32,
        change: impl FnOnce(&mut Transaction),
    ) -> Result<(), SpoolError> {
        let transaction = self.transactions.entry(xid).or_insert_with(|| {
            self.metadata_bytes += size_of::<Transaction>();
            Transaction { metadata_bytes: size_of::<Transaction>(), ..Transaction::default() }
        });

        let (tail, metadata_bytes) = (transaction.tail.len(), transaction.metadata_bytes);
        change(transaction);

        self.buffered_bytes = self.buffered_bytes - tail + transaction.tail.len();
        self.metadata_bytes = self.metadata_bytes - metadata_bytes + transaction.metadata_bytes;

        let limit = self.metadata_limit;
        if self.metadata_bytes > limit { Err(SpoolError::TooMany { limit }) } else { Ok(()) }
    }

    /// Writes out the messages that are too large for memory, of this transaction or of all.
    fn make_room(&mut self, xid: u32) -> io::Result<()> {
        let is_full = self.buffered_bytes >= self.buffer_limit;
        let folder = &self.folder;

        for transaction in self
            .transactions
            .range_mut(if is_full { 0..=u32::MAX } else { xid..=xid })
            .map(|(_, it)| it)
        {
            let tail = transaction.tail.len();
            if tail >= MEMORY_BYTES || is_full && tail > 0 {
                transaction.write_out(folder)?;
                self.buffered_bytes -= tail;
                if is_full {
                    transaction.tail.shrink_to_fit();
                }
            }
        }
        Ok(())
    }

    fn remove(&mut self, xid: u32) -> Option<Transaction> {
        let transaction = self.transactions.remove(&xid)?;
        self.buffered_bytes -= transaction.tail.len();
        self.metadata_bytes -= transaction.metadata_bytes;
        Some(transaction)
    }

    pub(super) fn failed(&self, source: io::Error) -> SpoolError {
        SpoolError::Io { folder: self.folder.display().to_string(), source }
    }

    /// Removes the transaction, which has committed, and returns a reader of its messages.
    pub fn commit(&mut self, commit: &StreamCommit) -> Result<Replay, SpoolError> {
        let transaction = self.remove(commit.xid).ok_or(SpoolError::Unknown(commit.xid))?;
        transaction.replay(*commit).map_err(|source| self.failed(source))
    }
}

impl Transaction {
    fn add(&mut self, subxid: u32, tag: u8, rest: &[u8]) {
        // A message is shorter than 2 GiB, so its length fits.
        self.tail.extend_from_slice(&(rest.len() as u32 + 1).to_be_bytes());
        self.tail.push(tag);
        self.tail.extend_from_slice(rest);

        let end = self.in_file + self.tail.len() as u64;

        match self.segments.last_mut() {
            Some((last, last_end)) if *last == subxid => *last_end = end,
            _ => {
                self.segments.push((subxid, end));
                self.metadata_bytes += size_of::<(u32, u64)>();
            }
        }
    }

    fn write_out(&mut self, folder: &std::path::Path) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(tempfile::tempfile_in(folder)?),
        };

        file.write_all(&self.tail)?;
        self.in_file += self.tail.len() as u64;
        self.tail.clear();
        self.tail.shrink_to(2 * MEMORY_BYTES);
        Ok(())
    }

    fn replay(self, commit: StreamCommit) -> io::Result<Replay> {
        let mut file = self.file;
        if let Some(file) = &mut file {
            file.seek(SeekFrom::Start(0))?;
        }

        let mut segments = self.segments;
        segments.reverse();

        Ok(Replay {
            commit,
            file: file.map(|file| file.take(self.in_file)),
            tail: self.tail,
            buffer: Vec::new(),
            at: 0,
            position: 0,
            segments,
            aborted: self.aborted,
            described: self.described,
            again: Vec::new(),
        })
    }
}

/// Reads a committed transaction back, without the subtransactions that were rolled back.
pub struct Replay {
    pub commit: StreamCommit,
    file: Option<io::Take<File>>,
    /// The bytes that come after the file.
    tail: Vec<u8>,
    /// The bytes that were read; those from `at` on are not handed out yet.
    buffer: Vec<u8>,
    at: usize,
    position: u64,
    /// The segments in reverse order: the next segment is the last element.
    segments: Vec<(u32, u64)>,
    aborted: HashSet<u32>,
    described: BTreeMap<u32, Vec<u8>>,
    again: Vec<Vec<u8>>,
}

impl Replay {
    /// Reads on until `bytes` bytes are in the buffer.
    fn fill(&mut self, bytes: usize) -> io::Result<()> {
        if self.buffer.len() - self.at >= bytes {
            return Ok(());
        }

        self.buffer.drain(..self.at);
        self.at = 0;

        if let Some(file) = &mut self.file {
            let wanted = bytes.max(MEMORY_BYTES) - self.buffer.len();
            file.take(wanted as u64).read_to_end(&mut self.buffer)?;
            if file.limit() == 0 {
                self.file = None;
            }
        }

        if self.file.is_none() {
            self.buffer.append(&mut self.tail);
        }

        if self.buffer.len() < bytes { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    /// Steps over bytes of rolled-back subtransactions without reading them.
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let there = (self.buffer.len() - self.at) as u64;
        if bytes <= there {
            self.at += bytes as usize;
            return Ok(());
        }

        self.buffer.clear();
        self.at = 0;
        let mut left = bytes - there;

        if let Some(file) = &mut self.file {
            let here = left.min(file.limit());
            file.get_mut().seek_relative(here as i64)?;
            file.set_limit(file.limit() - here);
            left -= here;
            if file.limit() == 0 {
                self.file = None;
            }
        }

        if self.file.is_none() && left > 0 {
            self.fill(left as usize)?;
            self.at = left as usize;
        }

        Ok(())
    }

    /// Returns the next message, or none at the end.
    pub fn next_message(&mut self) -> io::Result<Option<&[u8]>> {
        while let Some(&(subxid, end)) = self.segments.last() {
            if self.position >= end {
                self.segments.pop();
                continue;
            }

            if self.aborted.contains(&subxid) {
                self.skip(end - self.position)?;
                self.position = end;
                continue;
            }

            self.fill(4)?;
            let length = self
                .buffer
                .get(self.at..)
                .and_then(|rest| rest.first_chunk())
                .copied()
                .unwrap_or_default();
            let length = u32::from_be_bytes(length) as usize;

            self.fill(4 + length)?;
            let message = self.at + 4..self.at + 4 + length;
            self.at = message.end;
            self.position += 4 + length as u64;

            let message = self.buffer.get(message).unwrap_or_default();
            if let Some(newer) =
                Streamed::relation(message).and_then(|oid| self.described.remove(&oid))
            {
                self.again.push(newer);
            }

            return Ok(Some(message));
        }
        Ok(None)
    }

    /// Returns the relations to describe again after this transaction, since the server described
    /// them later than in it.
    pub fn described_later(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.again)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Lsn;

    fn start(xid: u32) -> Vec<u8> {
        [b"S".as_slice(), &xid.to_be_bytes(), b"\x01"].concat()
    }

    fn insert(xid: u32, text: &str) -> Vec<u8> {
        [b"I".as_slice(), &xid.to_be_bytes(), text.as_bytes()].concat()
    }

    fn relation(xid: Option<u32>, oid: u32, text: &str) -> Vec<u8> {
        let xid = xid.map_or_else(Vec::new, |xid| xid.to_be_bytes().to_vec());
        [b"R".as_slice(), &xid, &oid.to_be_bytes(), text.as_bytes()].concat()
    }

    fn abort(xid: u32, subxid: u32) -> Vec<u8> {
        [b"A".as_slice(), &xid.to_be_bytes(), &subxid.to_be_bytes()].concat()
    }

    fn commit(xid: u32) -> StreamCommit {
        StreamCommit { xid, commit_lsn: Lsn(1), end_lsn: Lsn(2), commit_time_us: 0 }
    }

    fn spool(messages: &[Vec<u8>]) -> Spool {
        let mut spool = Spool::new(std::env::temp_dir());
        for message in messages {
            spool.take(message).unwrap();
        }
        spool
    }

    fn read(mut replay: Replay) -> (Vec<String>, Vec<Vec<u8>>) {
        let mut messages = Vec::new();
        while let Some(message) = replay.next_message().unwrap() {
            messages.push(String::from_utf8_lossy(message).into_owned());
        }
        (messages, replay.described_later())
    }

    /// Trap 79.
    #[test]
    fn pieces_of_two_transactions_come_apart_and_what_was_rolled_back_is_left_out() {
        let stop = b"E".to_vec();
        let mut spool = spool(&[
            start(7),
            insert(7, "a"),
            insert(8, "rolled back"),
            insert(7, "b"),
            stop.clone(),
            start(20),
            insert(20, "other"),
            stop.clone(),
            abort(7, 8),
            start(7),
            insert(9, "c"),
            stop,
        ]);
        assert!(!spool.is_open());
        assert_eq!(read(spool.commit(&commit(7)).unwrap()).0, ["Ia", "Ib", "Ic"]);
        spool.take(&abort(20, 20)).unwrap();
        assert!(matches!(spool.commit(&commit(20)), Err(SpoolError::Unknown(20))));
    }

    #[test]
    fn a_transaction_larger_than_memory_comes_back_whole_and_in_order() {
        let mut messages = vec![start(7)];
        let long = "x".repeat(1000);
        for number in 0..2000 {
            messages.push(insert(7 + number % 3, &format!("{number} {long}")));
        }
        messages.extend([b"E".to_vec(), abort(7, 8)]);
        let mut spool = spool(&messages);
        let (read, _) = read(spool.commit(&commit(7)).unwrap());
        let expected: Vec<String> = (0..2000)
            .filter(|number| number % 3 != 1)
            .map(|number| format!("I{number} {long}"))
            .collect();
        assert!(read == expected, "{} of {}", read.len(), expected.len());
    }

    #[test]
    fn what_was_rolled_back_is_stepped_over_wherever_it_lies() {
        let long = "x".repeat(1000);
        for (before, rolled_back, after) in
            [(0, 1000, 1), (300, 1000, 300), (1, 3, 1), (300, 10, 0), (1, 260, 1000)]
        {
            let many = |xid, count| {
                (0..count)
                    .map(|number| insert(xid, &format!("{number} {long}")))
                    .collect::<Vec<_>>()
            };
            let messages = [
                vec![start(7)],
                many(7, before),
                many(8, rolled_back),
                many(7, after),
                vec![abort(7, 8)],
            ];
            let mut spool = spool(&messages.concat());
            let (read, _) = read(spool.commit(&commit(7)).unwrap());
            let kept = |count| (0..count).map(|number| format!("I{number} {long}"));
            let expected: Vec<String> = kept(before).chain(kept(after)).collect();
            assert!(
                read == expected,
                "{before}, {rolled_back}, {after}: {} of {}",
                read.len(),
                expected.len()
            );
        }
    }

    #[test]
    fn a_relation_that_was_described_later_is_described_again() {
        let newer = relation(None, 5, "newer");
        let messages =
            [start(7), relation(Some(7), 5, "older"), relation(Some(7), 6, "same"), b"E".to_vec()];
        let mut spool = spool(&messages);
        assert_eq!(spool.take(&newer).unwrap(), Routed::Passed);
        let (read, again) = read(spool.commit(&commit(7)).unwrap());
        assert_eq!(read.len(), 2);
        assert_eq!(again, [newer]);
    }

    #[test]
    fn many_transactions_in_progress_stay_within_memory_together() {
        const LIMIT: usize = 1_000_000;
        let long = "x".repeat(30_000);
        let mut spool = Spool { buffer_limit: LIMIT, ..spool(&[]) };
        for xid in 1..=100 {
            for message in [start(xid), insert(xid, &format!("{xid} {long}")), b"E".to_vec()] {
                spool.take(&message).unwrap();
            }
            let in_memory: usize =
                spool.transactions.values().map(|transaction| transaction.tail.capacity()).sum();
            assert!(
                spool.buffered_bytes < LIMIT && in_memory < 2 * LIMIT,
                "{in_memory} bytes after {xid}"
            );
        }
        for xid in [1, 70, 100] {
            assert_eq!(read(spool.commit(&commit(xid)).unwrap()).0, [format!("I{xid} {long}")]);
        }
    }

    #[test]
    fn notes_of_transactions_that_never_end_are_refused_once_they_are_too_many() {
        type Next = fn(u32) -> Vec<Vec<u8>>;
        let hostile: [Next; 3] = [
            |number| vec![start(number), b"E".to_vec()],
            |number| vec![abort(number, number + 1)],
            |number| vec![relation(None, number, "described")],
        ];
        for next in hostile {
            let mut spool = Spool { metadata_limit: 10_000, ..spool(&[start(7), b"E".to_vec()]) };
            let refused = (1000..2000)
                .find_map(|number| next(number).iter().find_map(|it| spool.take(it).err()));
            assert!(matches!(refused, Some(SpoolError::TooMany { limit: 10_000 })), "{refused:?}");
        }
        let mut spool = spool(&[start(7)]);
        for number in 0..100 {
            spool.take(&insert(number, "piece")).unwrap();
        }
        assert!(spool.metadata_bytes >= 1600, "{}", spool.metadata_bytes);
        spool.take(&abort(7, 7)).unwrap();
        assert_eq!((spool.metadata_bytes, spool.buffered_bytes), (0, 0));
    }

    #[test]
    fn messages_that_are_cut_are_errors() {
        for message in [b"S\0\0".as_slice(), b"S\0\0\0\x07", b"A\0\0\0\x07", b"Ex"] {
            assert!(Spool::new(std::env::temp_dir()).take(message).is_err(), "{message:?}");
        }
        let mut spool = spool(&[start(7)]);
        assert!(matches!(spool.take(&start(8)), Err(SpoolError::Nested { open: 7, next: 8 })));
        assert!(spool.take(b"I\0\0").is_err());
    }
}
