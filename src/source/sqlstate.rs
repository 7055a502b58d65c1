//! Whether retrying after an error code of the source can help.

/// The kinds of refusal, by what can be done about the refused statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Another session holds a lock on the requested object for longer than `lock_timeout` allows.
    Locked,
    /// The server is up, and the cause is over by the next attempt: a deadlock, a statement that an
    /// operator cancelled, a table that was dropped while its catalogs were read.
    Passing,
    /// The server cannot answer now: it shuts down, has no connection or memory left, or its disk
    /// fails.
    Outage,
    /// The error is about the requested data.
    Data,
    /// The server refuses the statement again until an operator changes a setting, a privilege, a
    /// publication or the statement.
    Lasting,
}

/// Classifies `sqlstate`: five characters, as in appendix A of PostgreSQL's documentation. The
/// first two are its class.
pub fn refusal(sqlstate: &str) -> Refusal {
    match sqlstate {
        "55P03" => Refusal::Locked,
        // These codes mean: cancelled; a slot or a database that is still in use; transactions that
        // took longer than a timeout of the server.
        "57014" | "55006" | "25P02" | "25P03" | "25P04" => Refusal::Passing,
        // A broken page of a table or an index stays broken. Other internal errors are races with
        // DDL.
        "XX001" | "XX002" => Refusal::Data,
        _ => match sqlstate.get(..2).unwrap_or_default() {
            "40" | "72" | "XX" => Refusal::Passing,
            "08" | "53" | "57" | "58" => Refusal::Outage,
            "21" | "22" | "23" => Refusal::Data,
            _ => Refusal::Lasting,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test covers every class of appendix A, and the codes that differ from their class.
    #[test]
    fn every_class_of_postgresql_is_told_apart() {
        let lasting = [
            "00", "01", "02", "03", "09", "0A", "0B", "0F", "0L", "0P", "0Z", "10", "20", "24",
            "25", "26", "27", "28", "2B", "2D", "2F", "34", "38", "39", "3B", "3D", "3F", "42",
            "44", "54", "55", "F0", "HV", "P0",
        ];
        let cases = [
            (Refusal::Lasting, &lasting[..]),
            (Refusal::Passing, &["40", "72", "XX"]),
            (Refusal::Outage, &["08", "53", "57", "58"]),
            (Refusal::Data, &["21", "22", "23"]),
        ];
        for (expected, classes) in cases {
            for class in classes {
                assert_eq!(refusal(&format!("{class}000")), expected, "class {class}");
                assert_eq!(refusal(&format!("{class}0A1")), expected, "class {class}");
            }
        }

        let codes = [
            ("55P03", Refusal::Locked),
            ("55006", Refusal::Passing),
            ("57014", Refusal::Passing),
            ("25P03", Refusal::Passing),
            ("57P01", Refusal::Outage),
            ("53300", Refusal::Outage),
            ("58030", Refusal::Outage),
            ("40P01", Refusal::Passing),
            ("XX000", Refusal::Passing),
            ("XX001", Refusal::Data),
            ("XX002", Refusal::Data),
            ("42P01", Refusal::Lasting),
            ("28P01", Refusal::Lasting),
            ("", Refusal::Lasting),
            ("ü", Refusal::Lasting),
        ];
        for (code, expected) in codes {
            assert_eq!(refusal(code), expected, "{code}");
        }
    }
}
