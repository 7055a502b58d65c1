//! The types that the catalogs of a source describe.

use std::collections::{HashMap, HashSet};
/// The row of `pg_type`, as far as a value's text and binary form depend on it.
#[derive(Debug, Clone)]
pub struct TypeInfo {
    pub oid: u32,
    pub schema: String,
    pub name: String,
    /// `typtype`: `b` base, `c` composite, `d` domain, `e` enum, `p` pseudo, `r` range, `m`
    /// multirange.
    pub kind: u8,
    /// The `typcategory` of the type; `A` for arrays.
    pub category: u8,
    /// The `typelem` of a true array type (`typsubscript = array_subscript_handler`), else 0.
    pub element_oid: u32,
    /// The `typdelim` of this type as an element (`;` for box, `,` for all others).
    pub delimiter: u8,
    /// The `typbasetype` of a domain, else 0.
    pub base_oid: u32,
    /// The `typtypmod` of a domain, else -1.
    pub base_typmod: i32,
    /// The `typndims` of a domain over an array, else 0.
    pub base_ndims: i32,
    /// The `rngsubtype` of a range, else 0.
    pub range_of: u32,
    /// The attributes of a composite, in order.
    pub fields: Vec<FieldInfo>,
}

/// One attribute of a composite type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldInfo {
    pub name: String,
    pub type_oid: u32,
    pub typmod: i32,
    pub ndims: i32,
}

/// The types that the published columns use, and all types that those are made of.
#[derive(Debug, Clone, Default)]
pub struct TypeCatalog {
    pub types: HashMap<u32, TypeInfo>,
    /// The number of digits after the point of `money` under the pinned `lc_monetary=C` (2).
    pub money_scale: u8,
}

impl TypeCatalog {
    /// Returns the type that remains without its domains and arrays.
    pub fn leaf_of(&self, mut type_oid: u32) -> u32 {
        // The loop takes no more steps than there are types, so that it also ends for a type over
        // itself.
        for _ in 0..self.types.len() {
            match self.types.get(&type_oid) {
                Some(info) if info.kind == b'd' => type_oid = info.base_oid,
                Some(info) if info.element_oid != 0 => type_oid = info.element_oid,
                _ => break,
            }
        }
        type_oid
    }

    /// Returns whether values of a type hold values of `part`, at any depth.
    pub fn is_made_of(&self, type_oid: u32, part: u32) -> bool {
        let (mut open, mut seen) = (vec![type_oid], HashSet::new());

        while let Some(oid) = open.pop() {
            if oid == part {
                return true;
            }

            if let Some(info) = self.types.get(&oid).filter(|_| seen.insert(oid)) {
                open.extend([info.base_oid, info.element_oid, info.range_of]);
                open.extend(info.fields.iter().map(|field| field.type_oid));
            }
        }

        false
    }
}
