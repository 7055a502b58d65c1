//! How the shape of a table changed: not at all, to another shape that its copy can be brought
//! into, or to a shape that only a new copy reaches.
//!
//! The wire describes a relation by names and types (trap 64); only the catalogs know which column
//! is which, what older rows hold and whether the table was rewritten, and the catalogs speak of
//! now, not of then. So `classify` answers `Alter` only where both agree, and `Recopy` wherever a
//! change could have happened in the meantime: a copy is always exact. Every relation of the stream
//! is judged before its rows are read on ([`CatalogWatch::relation`]); changes that the wire never
//! mentions are found by a look at the catalogs now and then ([`CatalogWatch::look`]), and judged
//! once the stream has passed that look ([`CatalogWatch::changes_of`]).

pub mod catalog_watch;
mod described;
mod enum_labels;
mod handler;
mod judge;
#[cfg(test)]
pub(in crate::engine) mod samples;

pub use catalog_watch::{CatalogCheck, CatalogSnapshot, CatalogWatch, Place, RelationAnswer};
pub use handler::{LockNotAvailable, SchemaStep};
pub use judge::ShapeChange;
