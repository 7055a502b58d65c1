//! Errors of values that cannot be decoded or stored.

/// A value that cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// The text is not in the form that the server prints for this type, because of a broken server
    /// or an error in rhei.
    #[error("\"{shown}\" is not a value of {expected}")]
    Malformed { expected: &'static str, shown: String },
    #[error(
        "{what} cannot be stored as {target_type}\nhint: set type = \"VARCHAR\" for this column in \
         its [tables.\"..\".columns] section, or [sync] on_unrepresentable = \"null\""
    )]
    NotRepresentable { what: String, target_type: String },
    #[error("a value is not valid UTF-8")]
    NotUtf8,
}

impl ValueError {
    pub(super) fn malformed(expected: &'static str, bytes: &[u8]) -> Self {
        const SHOWN: usize = 40;
        let shown = String::from_utf8_lossy(bytes.get(..SHOWN).unwrap_or(bytes)).into_owned();
        Self::Malformed { expected, shown }
    }

    /// Prints the error on one line, with the row of the value.
    pub fn at(&self, row: &str) -> String {
        format!("{}{row}", self.to_string().lines().next().unwrap_or_default())
    }

    /// Returns whether the error is about a legal value that the target's type cannot represent, to
    /// which `[sync] on_unrepresentable` applies.
    pub fn is_unrepresentable(&self) -> bool {
        matches!(self, Self::NotRepresentable { .. })
    }
}
