//! Names and texts as SQL wants them.

/// A name as SQL wants it in double quotes (manual section 4.1.1).
pub(crate) fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text as SQL wants it in quotes, with `standard_conforming_strings`, the default since 9.1.
pub(crate) fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_can_not_end_their_quotes() {
        assert_eq!(quote_literal(&quote_identifier("it's \"x\"")), "'\"it''s \"\"x\"\"\"'");
    }
}
