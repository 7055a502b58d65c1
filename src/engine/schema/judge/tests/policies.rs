//! What the settings, and a TRUNCATE that was applied, change in a verdict.

use super::*;

/// How [`classify`] decides: a name, the policy, the table before, what happened, the verdict.
type PolicyCase = (&'static str, fn(&mut Policy<'_>), fn() -> SourceTable, Change, &'static str);

#[track_caller]
fn check_policies(cases: &[PolicyCase]) {
    let settings = TableSettings::default();

    for (name, change_policy, before, change, expected) in cases {
        let (before, mut now) = (before(), before());
        change(&mut now);
        let mut policy = policy(&settings);
        change_policy(&mut policy);

        let verdict = classify(&followed(&before), &now, None, &types(), policy);
        assert_eq!(told(&verdict), *expected, "{name}");
    }
}

fn trust(policy: &mut Policy<'_>) {
    policy.trust_widening = true;
}

fn with_bigint() -> SourceTable {
    let mut table = orders();
    retype(&mut table, "n", INT8, -1);
    table
}

#[test]
fn only_a_widening_is_trusted_and_only_where_it_is_allowed() {
    check_policies(&[
        ("int to bigint, not trusted", |_| {}, orders, widen, REWRITTEN),
        ("int to bigint", trust, orders, widen, "in place: n:BIGINT"),
        (
            "int to bigint, and another name",
            trust,
            orders,
            |table| {
                widen(table);
                rename(table, "note", "remark");
            },
            "in place: n:BIGINT, note>remark",
        ),
        (
            "int to bigint, and another column",
            trust,
            orders,
            |table| {
                widen(table);
                add(table, "extra", INT4, None);
            },
            "copy: it was rewritten",
        ),
        (
            "int to bigint, in a partition tree",
            trust,
            tree,
            |table| {
                widen(table);
                table.fingerprint.leaf_attributes = "900".to_owned();
            },
            "copy: it was rewritten",
        ),
        (
            "int USING n * 100",
            trust,
            orders,
            |table| {
                alter(table, "n", |_| {});
                refile(table);
            },
            "copy: it was rewritten",
        ),
        (
            "bigint to int",
            trust,
            with_bigint,
            |table| {
                retype(table, "n", INT4, -1);
                alter(table, "id", |_| {});
                refile(table);
            },
            "copy: column \"n\" has another type",
        ),
        (
            "numeric(10,2) to numeric(12,4)",
            trust,
            orders,
            |table| {
                retype(table, "price", NUMERIC, numeric(12, 4));
                refile(table);
            },
            "copy: column \"price\" has another type",
        ),
    ]);
}

#[test]
fn a_truncate_explains_a_new_file_and_nulls_keep_a_column_from_becoming_text() {
    let file_of_partition = "copy: the file of a partition was replaced, as by TRUNCATE";

    check_policies(&[
        ("no TRUNCATE", |_| {}, with_all, refile, OTHER_FILE),
        (
            "the TRUNCATE that made the file",
            |policy| policy.truncated = Some(Truncated { by: 900, is_unseen: false }),
            with_all,
            refile,
            "noted",
        ),
        (
            "an older TRUNCATE",
            |policy| policy.truncated = Some(Truncated { by: 899, is_unseen: false }),
            with_all,
            refile,
            OTHER_FILE,
        ),
        (
            "a TRUNCATE after the look",
            |policy| policy.truncated = Some(Truncated { by: 901, is_unseen: true }),
            with_all,
            refile,
            "noted",
        ),
        (
            "a TRUNCATE of a partition tree",
            |policy| policy.truncated = Some(Truncated { by: 900, is_unseen: false }),
            tree,
            refile,
            file_of_partition,
        ),
        (
            "numeric(10,2) to numeric, where NaN is stored as NULL",
            |policy| policy.null_unrepresentable = true,
            orders,
            |table| retype(table, "price", NUMERIC, -1),
            "copy: column \"price\" has another type",
        ),
        (
            "numeric(10,2) to numeric(12,2), where NaN is stored as NULL",
            |policy| policy.null_unrepresentable = true,
            orders,
            |table| retype(table, "price", NUMERIC, numeric(12, 2)),
            "in place: price:DECIMAL(12,2)",
        ),
    ]);
}

#[test]
fn columns_that_the_settings_name_have_to_be_there() {
    let settings =
        TableSettings { exclude_columns: vec!["note".to_owned()], ..TableSettings::default() };
    let options = PlanOptions { settings: &settings, null_unrepresentable: false, before: None };
    let spec = Arc::new(tables::plan(&orders(), &types(), options).unwrap());

    let no_such = "copy: table public.orders has no column \"note\", which the settings name";
    let cases: &[(&str, Change, &str)] = &[
        ("nothing", nothing, "same"),
        ("a column came", |table| add(table, "extra", INT4, None), "in place: +extra"),
        ("the excluded column has another type", |table| retype(table, "note", INT8, -1), "noted"),
        ("the excluded column went", |table| remove(table, "note"), no_such),
        ("the excluded column has another name", |table| rename(table, "note", "x"), no_such),
    ];

    for (name, change, expected) in cases {
        let mut now = orders();
        change(&mut now);
        let verdict = classify(&spec, &now, None, &types(), policy(&settings));
        assert_eq!(told(&verdict), *expected, "{name}");
    }
}

#[test]
fn a_table_whose_copy_left_no_fingerprint_is_copied() {
    let spec = TableSpec { fingerprint: String::new(), ..(*followed(&orders())).clone() };
    let settings = TableSettings::default();
    let verdict = classify(&Arc::new(spec), &orders(), None, &types(), policy(&settings));
    assert_eq!(told(&verdict), "copy: nothing is known of its last copy");
}
