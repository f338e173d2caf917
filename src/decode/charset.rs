use std::collections::HashMap;

use foldhash::fast::RandomState;

use super::source_type::SourceType;
use crate::pgoutput::Value;

/// Bytes of texts, and of what they mean, that are kept before they are forgotten and asked for again.
const KNOWN_BYTES_MAX: usize = 16 << 20;

/// How the bytes of a text are read.
#[derive(Debug, Default)]
pub(super) enum Charset {
    /// As UTF-8; what is none does not fit.
    #[default]
    Utf8,
    /// As the server reads them, who is asked for each text that is not ASCII: no other table of characters agrees with the
    /// server's in every place.
    Foreign(Texts),
}

/// Texts in the database's encoding, with what they are in UTF-8; `None` if the server can't tell.
#[derive(Debug, Default)]
pub(super) struct Texts {
    known: HashMap<Box<[u8]>, Option<Box<str>>, RandomState>,
    byte_count: usize,
    asked: Vec<u8>,
}

impl Charset {
    /// The text in UTF-8, as far as that can be known without checking it; `None` if there is no such text.
    #[inline]
    pub(super) fn utf8<'a>(&'a self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        match self {
            Self::Utf8 => Some(bytes),
            Self::Foreign(texts) => texts.utf8(bytes),
        }
    }

    /// The text, if it is one.
    pub(super) fn text<'a>(&'a self, bytes: &'a [u8]) -> Option<&'a str> {
        self.utf8(bytes).and_then(|text| std::str::from_utf8(text).ok())
    }

    /// The bytes of what is no text, for a person to read: `caf\xe9`.
    pub(super) fn escaped(&self, bytes: &[u8]) -> String {
        use std::fmt::Write as _;
        let mut shown = String::new();
        for chunk in bytes.utf8_chunks() {
            for character in chunk.valid().chars() {
                match character {
                    '\\' => shown.push_str("\\\\"),
                    // What looks like UTF-8 is none.
                    other if !other.is_ascii() && matches!(self, Self::Foreign(_)) => {
                        let mut buffer = [0; 4];
                        for byte in other.encode_utf8(&mut buffer).bytes() {
                            // Writing to a String can't fail.
                            let _ = write!(shown, "\\x{byte:02x}");
                        }
                    }
                    other => shown.push(other),
                }
            }
            for byte in chunk.invalid() {
                let _ = write!(shown, "\\x{byte:02x}");
            }
        }
        shown
    }

    /// Whether the server may have to be asked.
    #[inline]
    pub(super) const fn is_foreign(&self) -> bool {
        matches!(self, Self::Foreign(_))
    }

    /// Whether one of these values is a text that the server must be asked for: then it is [`Charset::asked`].
    #[inline]
    pub(super) fn asks<'a>(&mut self, values: impl Iterator<Item = (Value<'a>, SourceType)>) -> bool {
        let Self::Foreign(texts) = self else { return false };
        for (value, source_type) in values {
            let bytes = match (value, source_type) {
                (Value::Text(bytes), _) | (Value::Binary(bytes), SourceType::Text | SourceType::Json) => {
                    bytes
                }
                (Value::Binary(bytes), SourceType::Jsonb) => bytes.get(1..).unwrap_or_default(),
                _ => continue,
            };
            if !bytes.is_ascii() && !texts.known.contains_key(bytes) {
                texts.asked.clear();
                texts.asked.extend_from_slice(bytes);
                return true;
            }
        }
        false
    }

    /// The text that the server must be asked for.
    pub(super) fn asked(&self) -> &[u8] {
        match self {
            Self::Utf8 => &[],
            Self::Foreign(texts) => &texts.asked,
        }
    }

    /// Learns what [`Charset::asked`] is in UTF-8.
    pub(super) fn learn(&mut self, text: Option<String>) {
        let Self::Foreign(texts) = self else { return };
        let bytes = std::mem::take(&mut texts.asked).into_boxed_slice();
        texts.byte_count += bytes.len() + text.as_ref().map_or(0, String::len);
        texts.known.insert(bytes, text.map(String::into_boxed_str));
    }

    /// Forgets what takes too much memory. To be called between rows: while a row is handed in again and again, all of its texts
    /// must stay known.
    #[inline]
    pub(super) fn trim(&mut self) {
        if let Self::Foreign(texts) = self
            && texts.byte_count > KNOWN_BYTES_MAX
        {
            texts.known.clear();
            texts.byte_count = 0;
        }
    }
}

impl Texts {
    #[inline]
    fn utf8<'a>(&'a self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        if bytes.is_ascii() { Some(bytes) } else { self.known.get(bytes)?.as_deref().map(str::as_bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_without_a_meaning_are_shown_one_by_one() {
        let utf8 = Charset::Utf8;
        assert_eq!((utf8.text("ü".as_bytes()), utf8.text(b"caf\xe9")), (Some("ü"), None));
        assert_eq!(utf8.escaped(b"a\\b caf\xe9 \xc3\xbc"), "a\\\\b caf\\xe9 ü");
        let mut foreign = Charset::Foreign(Texts::default());
        let text = (Value::Binary(b"caf\xe9"), SourceType::Text);
        assert!(foreign.asks([(Value::Binary(b"\xe9"), SourceType::Bool), text].into_iter()));
        assert_eq!(foreign.asked(), b"caf\xe9");
        foreign.learn(Some("café".to_owned()));
        assert!(!foreign.asks([text].into_iter()));
        assert_eq!(foreign.text(b"caf\xe9"), Some("café"));
        assert!(foreign.asks([(Value::Text(b"\x81\xc3\xbc"), SourceType::Other(1))].into_iter()));
        foreign.learn(None);
        assert_eq!((foreign.utf8(b"\x81\xc3\xbc"), foreign.utf8(b"plain")), (None, Some(&b"plain"[..])));
        assert_eq!(foreign.escaped(b"\x81\xc3\xbc"), "\\x81\\xc3\\xbc");
    }

    #[test]
    fn what_is_known_is_bounded() {
        let mut foreign = Charset::Foreign(Texts::default());
        for byte in [0xc0, 0xc1, 0xc2] {
            let long = vec![byte; KNOWN_BYTES_MAX / 2];
            assert!(foreign.asks([(Value::Text(&long), SourceType::Text)].into_iter()));
            foreign.learn(None);
            assert!(!foreign.asks([(Value::Text(&long), SourceType::Text)].into_iter()));
        }
        foreign.trim();
        let Charset::Foreign(texts) = foreign else { panic!("foreign") };
        assert!(texts.byte_count <= KNOWN_BYTES_MAX && texts.known.is_empty());
    }
}
