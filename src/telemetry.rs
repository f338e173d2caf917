//! Logs: `tracing` to stderr, for people or for machines.

use std::io::{self, IsTerminal};

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
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
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
