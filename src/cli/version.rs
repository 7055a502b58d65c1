//! What `rhei --version` says: which rhei, and which DuckDB and Arrow it is made of.

use std::sync::LazyLock;

use crate::olap::library_version;

/// The version, and below it what a bug report needs. DuckDB is named as it was found at run time.
pub static LONG: LazyLock<String> = LazyLock::new(|| {
    format!(
        "{}\nDuckDB {}\nArrow  {}\ncommit {}\ntarget {}",
        env!("CARGO_PKG_VERSION"),
        library_version(),
        arrow::ARROW_VERSION,
        env!("RHEI_COMMIT"),
        env!("RHEI_TARGET")
    )
});
