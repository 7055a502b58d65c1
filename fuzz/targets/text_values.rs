//! Values in the server's text form, of every type.
#![no_main]

mod common;
mod values;

use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: common::write_seeds(|| values::seeds(false)),
    |bytes: &[u8]| values::decode(bytes, rhei::internals::types::ColumnBuilder::push_text)
);
