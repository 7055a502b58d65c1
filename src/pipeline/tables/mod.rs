//! Tables: which tables the settings choose, their names in the target, and their shapes there.

pub mod names;
pub mod plan;
pub mod selection;

pub use names::{is_name_for, target_name};
pub use plan::{PlanOptions, fingerprint_text, from_stored, plan, refuse_unknown_layout};
