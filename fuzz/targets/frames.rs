//! Bytes of a hostile server into frames: they come out the same however the socket cuts them, and
//! no length that is only promised takes memory.
#![no_main]

mod common;

use libfuzzer_sys::fuzz_target;

use rhei::internals::source::wire::{Frame, FrameReader, ServerMessage, stream::StreamMessage};

/// All frames, and how it ended: what was left over, or the error.
fn frames<'a>(
    pieces: impl Iterator<Item = &'a [u8]>,
    limit: usize,
) -> (Vec<Frame>, Result<usize, String>) {
    let mut reader = FrameReader::new(limit);
    let mut seen = Vec::new();
    let mut left = 0;
    for piece in pieces {
        reader.buffer().extend_from_slice(piece);
        left += piece.len();
        loop {
            match reader.next_frame() {
                Ok(Some(frame)) => {
                    left -= 5 + frame.body.len();
                    seen.push(frame);
                }
                Ok(None) => break,
                Err(error) => return (seen, Err(error.to_string())),
            }
        }
    }
    (seen, Ok(left))
}

fuzz_target!(
    init: common::write_seeds(seeds),
    |bytes: &[u8]| {
        let mut rest = bytes;
        let limit = common::word(&mut rest) << (common::byte(&mut rest) % 32);
        let seed = common::byte(&mut rest);
        common::within_memory(bytes.len(), 2 << 20, 200, || {
            let whole = frames(std::iter::once(rest), limit);
            let cut = frames(common::cut(rest, seed), limit);
            assert_eq!(whole, cut);
            let mut again = Vec::new();
            for frame in whole.0 {
                assert!(frame.body.len() <= limit);
                again.push(frame.tag);
                again.extend((frame.body.len() as u32 + 4).to_be_bytes());
                again.extend_from_slice(&frame.body);
                let _ = ServerMessage::read(&frame.body).to_string();
                let _ = StreamMessage::read(frame);
            }
            assert!(rest.starts_with(&again));
        });
    }
);

fn seeds() -> Vec<Vec<u8>> {
    let frame = |tag: u8, body: &[u8]| {
        [[tag].as_slice(), &(body.len() as u32 + 4).to_be_bytes(), body].concat()
    };
    let mut all = vec![0xFF, 0xFF, 10, 7];
    let mut seeds = Vec::new();
    let mut bodies = vec![(b'd', [b"k".as_slice(), &[0; 16], b"\x01"].concat())];
    for message in rhei::internals::source::recording::split(common::FIXTURE).unwrap() {
        bodies
            .push((b'd', [b"w".as_slice(), &[0; 24], &message[..message.len().min(60)]].concat()));
    }
    bodies.push((b'E', b"SERROR\0C57P01\0Mgoing away\0Dwhy\0Hwait\0\0".to_vec()));
    bodies.push((b'N', b"SNOTICE\0C00000\0Mhello\0\0".to_vec()));
    bodies.push((b'S', b"server_version\017.5\0".to_vec()));
    bodies.push((b'c', Vec::new()));
    for (tag, body) in bodies {
        let frame = frame(tag, &body);
        seeds.push([[0x10, 0, 0, 3].as_slice(), &frame].concat());
        all.extend(frame);
    }
    seeds.push(all);
    seeds.push([[0xFF, 0xFF, 31, 0].as_slice(), b"d\xff\xff\xff\xff"].concat());
    seeds.push([[0xFF, 0xFF, 31, 0].as_slice(), b"d\x7f\xff\xff\xff"].concat());
    seeds
}
