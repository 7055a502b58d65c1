//! Values that cannot be decoded or kept.

/// A value that cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not what the server prints for this type: a broken server or our mistake.
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

    /// On one line, with the row it is of.
    pub fn at(&self, row: &str) -> String {
        format!("{}{row}", self.to_string().lines().next().unwrap_or_default())
    }

    /// A legal value that the target's type has no room for: what `[sync] on_unrepresentable` is
    /// about.
    pub fn is_unrepresentable(&self) -> bool {
        matches!(self, Self::NotRepresentable { .. })
    }
}
