//! Logs: `tracing` to stderr, for people or for machines; and what a terminal may be shown.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::OnceLock;

use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressState, ProgressStyle};
use tracing_subscriber::EnvFilter;

use crate::error::{Error, Result};

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One short line, with the UTC time; coloured on a terminal.
    #[default]
    Human,
    /// One JSON object per line.
    Json,
}

impl LogFormat {
    /// The format that a text names.
    #[must_use]
    pub fn of_name(text: &str) -> Option<Self> {
        match text {
            "human" => Some(Self::Human),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// What is logged, for a level or filter as its user typed it.
///
/// A bare level (`debug`) is for Highwater alone, everything else stays at `warn`, because the Delta
/// libraries say a lot. Anything else is a filter of `tracing` (`warn,highwater::stream=trace`).
#[must_use]
pub fn filter_text(typed: Option<&str>) -> String {
    match typed.map(str::trim) {
        None | Some("") => "warn,highwater=info".to_owned(),
        Some(level) if is_level(level) => format!("warn,highwater={level}"),
        Some(filter) => filter.to_owned(),
    }
}

/// The progress bars on the terminal; none where nobody looks, and where a server embeds us.
static BARS: OnceLock<MultiProgress> = OnceLock::new();

/// A progress bar at the bottom of the terminal; it is gone when it is dropped.
pub(crate) struct Bar(ProgressBar);

impl Bar {
    /// A new bar, if stderr is a terminal and logs are for people. `unit` is what is counted: rows, hours.
    pub(crate) fn new(unit: &'static str) -> Option<Self> {
        let bars = BARS.get()?;
        let style = ProgressStyle::with_template("{wide_msg} {bar:12} {pace}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).with_key(
            "pace",
            move |state: &ProgressState, text: &mut dyn fmt::Write| {
                let per_second = state.per_sec();
                // What can't be written is not shown.
                let _ = match state.len() {
                    Some(_) => write!(
                        text,
                        "{:.0}% {per_second:.0} {unit}/s, {:#} left",
                        state.fraction() * 100.0,
                        HumanDuration(state.eta())
                    ),
                    None => write!(text, "{} {unit}, {per_second:.0}/s", state.pos()),
                };
            },
        );
        Some(Self(bars.add(ProgressBar::no_length().with_style(style))))
    }

    /// Shows what is being done, and how much of `all` is done; `None` if nobody knows how much that is.
    pub(crate) fn show(&self, step: &str, done: u64, all: Option<u64>) {
        match all {
            Some(all) if self.0.length() != Some(all) => self.0.set_length(all),
            None if self.0.length().is_some() => self.0.unset_length(),
            _ => {}
        }
        self.0.set_position(done);
        let step = plain(step);
        if self.0.message() != *step {
            self.0.set_message(step.into_owned());
        }
    }
}

/// A text in which nothing can move the cursor, hide what stands before it or turn its direction, whoever wrote it: names
/// and messages come from tables that others write. Line ends and tabs stay. What is dangerous is written as JSON writes it,
/// so that a JSON document says the same as before.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_dangerous) {
        return Cow::Borrowed(text);
    }
    let mut plain = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if is_dangerous(character) {
            plain.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            plain.push(character);
        }
    }
    Cow::Owned(plain)
}

/// Control characters of both sets (ECMA-48), separators of lines, marks and overrides of direction (Unicode's annex 9),
/// and what is not seen at all. None lies beyond the first plane.
const fn is_dangerous(character: char) -> bool {
    match character {
        '\n' | '\t' => false,
        '\u{00}'..='\u{1f}' | '\u{7f}'..='\u{9f}' => true,
        '\u{61c}'
        | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{feff}' => true,
        _ => false,
    }
}

/// An estimate of rows, as a bar shows it.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an estimate, for people")]
pub(crate) fn whole(rows: f64) -> u64 {
    rows.max(0.0) as u64
}

/// An event on one line, whoever wrote the names in it. `tracing` writes each with one call, and has escaped the escape
/// characters of others; those that are left are its colours.
fn one_line(event: &str) -> String {
    let (text, end) = event.strip_suffix('\n').map_or((event, ""), |text| (text, "\n"));
    let parts: Vec<Cow<'_, str>> = text.split('\u{1b}').map(plain).collect();
    parts.join("\u{1b}").replace('\n', "\\n") + end
}

/// Stderr, with the bars out of the way while a line is written.
struct BesideBars;

impl io::Write for BesideBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let line = one_line(&String::from_utf8_lossy(bytes));
        match BARS.get() {
            Some(bars) => bars.suspend(|| io::stderr().write_all(line.as_bytes())),
            None => io::stderr().write_all(line.as_bytes()),
        }
        .map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Starts logging for the whole process. `filter` as in [`filter_text`].
///
/// # Errors
///
/// [`Error::Setting`] if the filter can't be read, [`Error::Internal`] if the process logs already.
pub fn init(format: LogFormat, filter: Option<&str>) -> Result<()> {
    let text = filter_text(filter);
    let filter = EnvFilter::try_new(&text).map_err(|error| Error::Setting {
        setting: "the log filter (--log, HIGHWATER_LOG or RUST_LOG)".to_owned(),
        value: text.clone(),
        accepted: format!("a level, or a filter such as warn,highwater=debug ({error})"),
    })?;
    if format == LogFormat::Human && io::stderr().is_terminal() {
        BARS.get_or_init(MultiProgress::new);
    }
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| BesideBars);
    let started = match format {
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
        LogFormat::Human => builder.compact().with_ansi(is_colour_welcome()).try_init(),
    };
    started.map_err(|error| Error::Internal(format!("logging was started twice ({error})")))
}

fn is_level(text: &str) -> bool {
    ["off", "error", "warn", "info", "debug", "trace"].contains(&text)
}

/// See <https://no-color.org> for the variable.
fn is_colour_welcome() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_others_steers_a_terminal() {
        assert_eq!(plain("größe\t1\n\u{2003}é 日本"), "größe\t1\n\u{2003}é 日本");
        assert_eq!(plain("a\u{1b}[2J\r\u{9b}1m\u{202e}b\u{200b}"), r"a\u001b[2J\u000d\u009b1m\u202eb\u200b");
        let document = serde_json::to_string("x\u{7f}\u{2066}y\u{1b}").unwrap();
        let read: String = serde_json::from_str(&plain(&document)).unwrap();
        assert_eq!(read, "x\u{7f}\u{2066}y\u{1b}", "the same document");
    }

    #[test]
    fn an_event_is_one_line() {
        let colours = "\u{1b}[32m INFO\u{1b}[0m rows of x\n2026  INFO all is well\r\u{9b}1m\u{202e} are\n";
        let wanted =
            "\u{1b}[32m INFO\u{1b}[0m rows of x\\n2026  INFO all is well\\u000d\\u009b1m\\u202e are\n";
        assert_eq!(one_line(colours), wanted);
    }

    #[test]
    fn a_bare_level_is_for_highwater_alone() {
        for (typed, filter) in [
            (None, "warn,highwater=info"),
            (Some(""), "warn,highwater=info"),
            (Some("debug"), "warn,highwater=debug"),
            (Some("info,deltalake=off"), "info,deltalake=off"),
        ] {
            assert_eq!(filter_text(typed), filter);
        }
    }
}
