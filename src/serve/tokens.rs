//! Cuts SQL into tokens, as PostgreSQL's scanner (`scan.l`) does. What clients write is recognised
//! and rewritten by token, never by text: a text may hold anything in quotes.

/// The kind of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A keyword or a name without quotes.
    Word,
    /// A name in double quotes.
    Quoted,
    /// A string: `'..'`, `E'..'`, `$tag$..$tag$`.
    Text,
    Number,
    /// `$1`
    Parameter,
    /// One sign, or `::`.
    Sign,
}

/// One token. Comments and blanks are only noted, in front of the token that follows them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    pub kind: Kind,
    pub text: String,
    pub is_spaced: bool,
}

impl Token {
    pub fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into(), is_spaced: true }
    }

    /// Returns whether this is the keyword, which is given in lower case.
    pub fn is(&self, word: &str) -> bool {
        self.kind == Kind::Word && self.text.eq_ignore_ascii_case(word)
    }

    pub fn is_sign(&self, sign: &str) -> bool {
        self.kind == Kind::Sign && self.text == sign
    }

    /// Returns the name that the token stands for, if it is a name: in lower case without quotes,
    /// as it is in quotes.
    pub fn name(&self) -> Option<String> {
        match self.kind {
            Kind::Word => Some(self.text.to_lowercase()),
            Kind::Quoted => {
                let inner = self.text.get(1..self.text.len().saturating_sub(1))?;
                Some(inner.replace("\"\"", "\""))
            }
            _ => None,
        }
    }

    /// Returns the content of a plain string.
    pub fn text_value(&self) -> Option<String> {
        let inner = self.text.strip_prefix('\'')?.strip_suffix('\'')?;
        (self.kind == Kind::Text).then(|| inner.replace("''", "'"))
    }
}

/// Returns the tokens of a text. A string or comment that does not end reaches to the end.
pub fn tokens(sql: &str) -> Vec<Token> {
    let mut found = Vec::new();
    let mut rest = sql;
    let mut is_spaced = false;

    while let Some(first) = rest.chars().next() {
        let blank = blank_len(rest, first);
        if blank > 0 {
            (rest, is_spaced) = (rest.get(blank..).unwrap_or_default(), true);
            continue;
        }

        let (kind, len) = token_len(rest, first);
        let (text, after) = rest.split_at_checked(len).unwrap_or((rest, ""));
        found.push(Token { kind, text: text.to_owned(), is_spaced });
        (rest, is_spaced) = (after, false);
    }
    found
}

/// Returns the text of tokens.
pub fn text(tokens: &[Token]) -> String {
    let mut sql = String::new();
    for (at, token) in tokens.iter().enumerate() {
        if at > 0 && token.is_spaced {
            sql.push(' ');
        }
        sql.push_str(&token.text);
    }
    sql
}

/// Returns the statements between semicolons, without those that hold nothing.
pub fn statements(tokens: Vec<Token>) -> Vec<Vec<Token>> {
    let parts = tokens.split(|token| token.is_sign(";"));
    parts.filter(|part| !part.is_empty()).map(<[Token]>::to_vec).collect()
}

/// Returns the length of the blanks and comments that a text begins with.
fn blank_len(rest: &str, first: char) -> usize {
    if first.is_whitespace() {
        return first.len_utf8();
    }
    if rest.starts_with("--") {
        return rest.find(['\n', '\r']).unwrap_or(rest.len());
    }
    if !rest.starts_with("/*") {
        return 0;
    }

    // Comments nest in PostgreSQL.
    let (mut depth, mut at) = (0, 0);
    while let Some(left) = rest.get(at..).filter(|left| !left.is_empty()) {
        if left.starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if left.starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                break;
            }
        } else {
            at += left.chars().next().map_or(1, char::len_utf8);
        }
    }
    at
}

fn token_len(rest: &str, first: char) -> (Kind, usize) {
    let second = rest.chars().nth(1);
    match first {
        '\'' => (Kind::Text, quoted_len(rest, '\'', false)),
        'e' | 'E' if second == Some('\'') => {
            let inner = rest.get(1..).unwrap_or_default();
            (Kind::Text, 1 + quoted_len(inner, '\'', true))
        }
        '"' => (Kind::Quoted, quoted_len(rest, '"', false)),
        '$' if second.is_some_and(|sign| sign.is_ascii_digit()) => {
            let digits = rest.get(1..).unwrap_or_default();
            let len = digits.find(|sign: char| !sign.is_ascii_digit()).unwrap_or(digits.len());
            (Kind::Parameter, 1 + len)
        }
        '$' => dollar_len(rest).map_or((Kind::Sign, 1), |len| (Kind::Text, len)),
        _ if first.is_alphabetic() || first == '_' => {
            let is_part = |sign: char| sign.is_alphanumeric() || sign == '_' || sign == '$';
            (Kind::Word, rest.find(|sign| !is_part(sign)).unwrap_or(rest.len()))
        }
        _ if first.is_ascii_digit()
            || first == '.' && second.is_some_and(|s| s.is_ascii_digit()) =>
        {
            (Kind::Number, number_len(rest))
        }
        ':' if second == Some(':') => (Kind::Sign, 2),
        _ => (Kind::Sign, first.len_utf8()),
    }
}

/// Returns the length of a text in quotes, with the quotes.
fn quoted_len(rest: &str, quote: char, has_escapes: bool) -> usize {
    let mut signs = rest.char_indices().skip(1).peekable();
    while let Some((at, sign)) = signs.next() {
        if has_escapes && sign == '\\' {
            signs.next();
        } else if sign == quote {
            match signs.peek() {
                Some((_, next)) if *next == quote => signs.next(),
                _ => return at + quote.len_utf8(),
            };
        }
    }
    rest.len()
}

/// Returns the length of `$tag$..$tag$`, if the text begins with one.
fn dollar_len(rest: &str) -> Option<usize> {
    let inner = rest.strip_prefix('$')?;
    let end = inner.find('$')?;
    let tag = inner.get(..end)?;
    if !tag.chars().all(|sign| sign.is_alphanumeric() || sign == '_') {
        return None;
    }

    let quote = rest.get(..tag.len() + 2)?;
    let body = rest.get(quote.len()..)?;
    Some(body.find(quote).map_or(rest.len(), |at| quote.len() + at + quote.len()))
}

fn number_len(rest: &str) -> usize {
    let mut before = ' ';
    let is_part = |sign: char| {
        let is_exponent_sign = matches!(sign, '+' | '-') && matches!(before, 'e' | 'E');
        before = sign;
        sign.is_ascii_alphanumeric() || matches!(sign, '.' | '_') || is_exponent_sign
    };
    let mut is_part = is_part;
    rest.find(|sign| !is_part(sign)).unwrap_or(rest.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(sql: &str) -> Vec<String> {
        tokens(sql).into_iter().map(|token| token.text).collect()
    }

    #[test]
    fn quotes_comments_and_parameters_are_tokens_of_their_own() {
        assert_eq!(
            texts("SELECT 'it''s; --', \"a\"\"b\", E'x\\'y', $1 /* a /* b */ c */ -- d\n, $a$;$a$"),
            [
                "SELECT",
                "'it''s; --'",
                ",",
                "\"a\"\"b\"",
                ",",
                "E'x\\'y'",
                ",",
                "$1",
                ",",
                "$a$;$a$"
            ]
        );
        assert_eq!(texts("a.b::int8[1:2]"), ["a", ".", "b", "::", "int8", "[", "1", ":", "2", "]"]);
        assert_eq!(texts("1.5e-3+.5"), ["1.5e-3", "+", ".5"]);
        assert_eq!(texts("größe $ x"), ["größe", "$", "x"]);
    }

    #[test]
    fn what_does_not_end_reaches_to_the_end() {
        for sql in ["'x", "\"x", "/* x", "$a$ x", "E'\\", "-- x"] {
            assert!(tokens(sql).len() <= 1, "{sql}");
        }
    }

    #[test]
    fn statements_end_at_semicolons() {
        let all = statements(tokens("SELECT ';' ; ; SELECT 2;"));
        let all: Vec<String> = all.iter().map(|part| text(part)).collect();
        assert_eq!(all, ["SELECT ';'", "SELECT 2"]);
    }

    proptest::proptest! {
        #[test]
        fn every_text_is_cut_and_put_together_again(sql in ".{0,60}") {
            let cut = tokens(&sql);
            let again = tokens(&text(&cut));
            let plain = |tokens: &[Token]| {
                tokens.iter().map(|token| token.text.clone()).collect::<Vec<_>>()
            };
            proptest::prop_assert_eq!(plain(&cut), plain(&again));
        }
    }
}
