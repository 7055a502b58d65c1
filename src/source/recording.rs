//! The messages of a recorded stream, one after another.

/// A recording that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordedError {
    #[error("cannot read the recorded stream {path}")]
    Read { path: String, source: std::io::Error },
    #[error("the recorded stream ends in the middle of a message, at byte {at}")]
    Cut { at: usize },
}

/// Splits a recording into its messages.
///
/// # Errors
/// The recording ends in the middle of a message.
pub fn split(recording: &[u8]) -> Result<Vec<Vec<u8>>, RecordedError> {
    let mut messages = Vec::new();
    let mut rest = recording;

    while !rest.is_empty() {
        let cut = || RecordedError::Cut { at: recording.len() - rest.len() };
        let (length, after) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
        let (message, after) =
            after.split_at_checked(u32::from_be_bytes(*length) as usize).ok_or_else(cut)?;

        messages.push(message.to_vec());
        rest = after;
    }
    Ok(messages)
}
