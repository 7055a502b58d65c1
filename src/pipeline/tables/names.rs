//! The names of tables and columns in the target.

use std::collections::BTreeSet;

use crate::{
    change::TableSpec, olap::lake, pgoutput::QualifiedName, source::catalog::SourceColumn,
};

/// Returns the names of columns in the target. DuckDB does not tell `"Id"` from `id` (trap 59), and
/// `rowid` is its own: the column in lower case keeps its name, else the one that came first, and
/// other columns get their `attnum`, which never changes, behind the name. Columns that have a name
/// keep it. A lake has more names of its own.
pub(super) fn column_names(
    columns: &[&SourceColumn],
    before: Option<&TableSpec>,
    is_in_lake: bool,
) -> Vec<String> {
    let folded = |name: &str| name.to_ascii_lowercase();
    let of_lake: &[&str] = if is_in_lake { &lake::RESERVED } else { &[] };
    let mut taken: BTreeSet<String> =
        of_lake.iter().chain(&["rowid"]).map(|name| (*name).to_owned()).collect();

    let kept = |column: &SourceColumn| {
        let before = before?
            .columns
            .iter()
            .find(|old| old.attnum == column.attnum && old.name == column.name)?;
        Some(before.target_name.clone())
    };

    let mut names: Vec<Option<String>> = columns.iter().map(|column| kept(column)).collect();
    taken.extend(names.iter().flatten().map(|name| folded(name)));

    let mut by_rank: Vec<_> = names.iter_mut().zip(columns).collect();
    by_rank.sort_by_key(|(_, column)| folded(&column.name) != column.name);

    for (name, column) in by_rank {
        if name.is_some() {
            continue;
        }

        let mut wanted = column.name.clone();
        if taken.contains(&folded(&wanted)) {
            wanted = format!("{wanted}_{}", column.attnum);
        }

        while !taken.insert(folded(&wanted)) {
            wanted.push('_');
        }
        *name = Some(wanted);
    }

    names.into_iter().flatten().collect()
}

/// Returns the name of a table in the target: the name that it has now, when the settings want no
/// other, else the wanted name; and where that name is taken (DuckDB's names do not tell case
/// apart, trap 59), the name with a number behind it. `taken` holds the names of the tables before
/// this one, folded; the caller asks first for the table that is to keep its name.
pub fn target_name(wanted: &QualifiedName, taken: &mut BTreeSet<String>) -> QualifiedName {
    let folded =
        |name: &QualifiedName| format!("{}.{}", name.schema, name.name).to_ascii_lowercase();

    let mut name = wanted.clone();
    // The schema `_rhei` belongs to rhei itself.
    if name.schema.eq_ignore_ascii_case("_rhei") {
        name.schema.push_str("_source");
    }

    let base = name.name.clone();
    let mut number = 1;

    while !taken.insert(folded(&name)) {
        number += 1;
        name.name = format!("{base}_{number}");
    }

    name
}

/// Returns whether `name` is a name that [`target_name`] may have made of `wanted`.
pub fn is_name_for(name: &QualifiedName, wanted: &QualifiedName) -> bool {
    let first = target_name(wanted, &mut BTreeSet::new());
    let number =
        name.name.strip_prefix(&first.name).map(|rest| rest.strip_prefix('_').unwrap_or(rest));

    name.schema == first.schema
        && number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
        && (name.name.len() == first.name.len()
            || name.name.as_bytes().get(first.name.len()) == Some(&b'_'))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn names_that_differ_by_case_are_told_apart_by_a_stable_rule() {
        let column = |attnum, name: &str| SourceColumn {
            attnum,
            name: name.to_owned(),
            type_oid: 23,
            typmod: -1,
            ndims: 0,
            not_null: false,
            toastable: false,
            is_generated: false,
            xmin: 0,
            missing: BTreeMap::new(),
        };
        let columns = [
            column(1, "Id"),
            column(2, "id"),
            column(4, "ID"),
            column(5, "id_2"),
            column(6, "rowid"),
            column(7, "Row_Id"),
        ];
        let columns: Vec<_> = columns.iter().collect();
        let names = column_names(&columns, None, false);
        assert_eq!(names, ["Id_1", "id", "ID_4", "id_2", "rowid_6", "Row_Id"]);
        let names = column_names(&columns, None, true);
        assert_eq!(names, ["Id_1", "id", "ID_4", "id_2", "rowid_6", "Row_Id_7"]);

        let mut taken = BTreeSet::new();
        let names = ["public.T", "public.t", "Public.t", "_rhei.tables"].map(|name| {
            let (schema, name) = name.split_once('.').unwrap();
            target_name(&QualifiedName::new(schema, name), &mut taken).to_string()
        });
        assert_eq!(names, ["public.T", "public.t_2", "Public.t_3", "_rhei_source.tables"]);
    }
}
