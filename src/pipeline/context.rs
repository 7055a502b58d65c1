//! What the parts of a running pipeline share.

use std::sync::Arc;

use tokio::sync::RwLock;

/// Read for cycles, write for whatever changes the shape of tables or rewrites the file.
pub type DdlLock = Arc<RwLock<()>>;
