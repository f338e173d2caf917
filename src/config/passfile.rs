//! The password file (manual 34.16): lines of `host:port:database:user:password`.

use std::path::Path;

use tracing::warn;

/// What a line of the file has to match.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) host: &'a str,
    pub(super) port: u16,
    pub(super) database: &'a str,
    pub(super) user: &'a str,
}

/// The file's text, or nothing if it is missing or not fit for secrets. As in libpq a file that others can
/// read is ignored, with a warning, because using it would make the mistake permanent.
pub(super) fn read(path: &Path) -> Option<String> {
    let metadata = std::fs::metadata(path).ok()?;
    if !metadata.is_file() {
        warn!(file = %path.display(), "the password file is not a plain file and is ignored");
        return None;
    }
    if !is_private(&metadata) {
        warn!(
            file = %path.display(),
            "the password file has group or world access and is ignored; its mode should be 0600 or less"
        );
        return None;
    }
    match std::fs::read_to_string(path) {
        Ok(text) => Some(text),
        Err(error) => {
            warn!(file = %path.display(), %error, "the password file can't be read and is ignored");
            None
        }
    }
}

#[cfg(unix)]
fn is_private(metadata: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    metadata.permissions().mode() & 0o077 == 0
}

#[cfg(not(unix))]
fn is_private(_: &std::fs::Metadata) -> bool {
    true
}

/// The password of the first line that matches.
pub(super) fn find(text: &str, wanted: Wanted<'_>) -> Option<String> {
    let port = wanted.port.to_string();
    let keys = [wanted.host, &port, wanted.database, wanted.user];
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let mut rest = line;
        for key in keys {
            let (field, after) = split_field(rest)?;
            // Only a bare star is the wildcard; `\*` is the name of one character.
            if field != "*" && unescape(field) != key {
                return None;
            }
            rest = after;
        }
        Some(unescape(split_field(rest).map_or(rest, |(password, _)| password)))
    })
}

/// Splits at the first colon that no backslash precedes.
fn split_field(text: &str) -> Option<(&str, &str)> {
    let mut escaped = false;
    for (at, character) in text.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ':' => {
                return text
                    .split_at_checked(at)
                    .map(|(field, rest)| (field, rest.get(1..).unwrap_or_default()));
            }
            _ => {}
        }
    }
    None
}

fn unescape(field: &str) -> String {
    let mut plain = String::with_capacity(field.len());
    let mut escaped = false;
    for character in field.chars() {
        if character == '\\' && !escaped {
            escaped = true;
        } else {
            plain.push(character);
            escaped = false;
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted<'_> = Wanted { host: "db", port: 5432, database: "drift", user: "high:water" };

    #[test]
    fn the_first_matching_line_wins() {
        let text = "# db:5432:drift:*:comment\n\
                    db:5433:drift:*:other port\n\
                    short:line\n\
                    db:*:drift:high\\:water:a\\:b\\\\c\n\
                    *:*:*:*:late\n";
        assert_eq!(find(text, WANTED).as_deref(), Some("a:b\\c"));
    }

    #[test]
    fn an_escaped_star_is_no_wildcard_and_an_unescaped_colon_ends_the_password() {
        assert_eq!(find("\\*:*:*:*:no\n", WANTED), None);
        assert_eq!(find("*:*:*:*:yes:comment", WANTED).as_deref(), Some("yes"));
        assert_eq!(find("*:*:*:*:w\u{f6}rt\r\n", WANTED).as_deref(), Some("w\u{f6}rt"));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_others_can_read_is_ignored() {
        use std::os::unix::fs::PermissionsExt as _;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "*:*:*:*:secret").unwrap();
        for (mode, used) in [(0o600, true), (0o640, false), (0o604, false), (0o400, true)] {
            std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(read(file.path()).is_some(), used, "{mode:o}");
        }
        assert_eq!(read(Path::new("/nowhere/.pgpass")), None);
        assert_eq!(read(Path::new("/tmp")), None);
    }
}
