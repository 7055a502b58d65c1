//! Connection strings of libpq: `key=value`, with values bare or in single quotes.

/// Reads the pairs of a connection string.
///
/// # Errors
/// Returns why the text is no such string; the reason shows none of its values.
pub fn pairs(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let Some((key, after)) = rest.split_once('=') else {
            return Err("expected key=value pairs or a URL".to_owned());
        };

        // The text may be a misspelt URL with a password in it.
        let is_of_key =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        if key.trim().is_empty() || !key.trim().bytes().all(is_of_key) {
            let expected = "expected key=value pairs, or a URL that begins with postgresql://";
            return Err(expected.to_owned());
        }

        let after = after.trim_start();
        let is_quoted = after.starts_with('\'');

        let mut value = String::new();
        let mut characters = after.char_indices().skip(usize::from(is_quoted));
        let mut end = after.len();
        let mut is_closed = !is_quoted;

        while let Some((at, character)) = characters.next() {
            match character {
                '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
                '\'' if is_quoted => {
                    (end, is_closed) = (at + 1, true);
                    break;
                }
                blank if !is_quoted && blank.is_whitespace() => {
                    end = at;
                    break;
                }
                other => value.push(other),
            }
        }

        if !is_closed {
            return Err(format!("the value of {} has no closing quote", key.trim()));
        }

        found.push((key.trim().to_owned(), value));
        rest = after.get(end..).unwrap_or_default().trim_start();
    }
    Ok(found)
}

/// Writes pairs as a connection string, with quotes where a value needs them.
pub fn joined(pairs: &[(String, String)]) -> String {
    let pair = |(key, value): &(String, String)| {
        let is_bare = !value.is_empty()
            && value.chars().all(|each| !each.is_whitespace() && !matches!(each, '\\' | '\''));
        if is_bare {
            return format!("{key}={value}");
        }
        format!("{key}='{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
    };
    pairs.iter().map(pair).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_read_as_they_were_written() {
        for text in
            ["", "dbname=l host=h", "password='two words' host=''", r"password='it\'s a \\ secret'"]
        {
            assert_eq!(joined(&pairs(text).unwrap()), text);
        }
        assert_eq!(joined(&pairs(" host = h\tport =5 ").unwrap()), "host=h port=5");
    }

    #[test]
    fn a_text_that_is_not_all_pairs_is_refused_without_its_values() {
        for text in ["dbname=l password=two geheim", "geheim", "password='geheim", "=geheim"] {
            let reason = pairs(text).unwrap_err();
            assert!(!reason.contains("geheim"), "{text}: {reason}");
        }
    }
}
