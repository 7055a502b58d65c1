//! What became of a table's shape: the same, another one that its copy can be brought into, or one
//! that only a new copy reaches.
//!
//! The wire describes a relation by names and types (trap 64); which column is which, what older
//! rows hold and whether the table was rewritten, only the catalogs know, and they speak of now,
//! not of then. So `judge` answers `Alter` only where both agree, and `Recopy` wherever
//! something could have happened in between: a copy is always exact. Every relation of the stream
//! is judged before its rows are read on ([`CatalogWatch::relation`]); what the wire never mentions
//! is found by looking at the catalogs now and then ([`CatalogWatch::look`]), and judged once the
//! stream has passed that look ([`CatalogWatch::settle`]).

pub mod catalog_watch;
mod enum_labels;
mod judge;

pub use catalog_watch::{Asked, CatalogCheck, CatalogSnapshot, CatalogWatch, Place};
pub use judge::ShapeChange;
