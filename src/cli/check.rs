//! `highwater check`: the report of [`crate::check`], for people or for machines.

use std::fmt::Write as _;
use std::process::ExitCode;

use super::columns::line;
use super::{Format, json, print};
use crate::check::{Report, Severity};
use crate::config::Config;
use crate::error::Result;

/// Widest column of objects, in characters: one long URI must not push every line off the screen.
const OBJECT_WIDTH_MAX: usize = 40;

/// Prints the report; the exit code is 0 when all is well, 1 with warnings, 2 with errors.
pub(super) async fn check(config: &Config, format: Format) -> Result<ExitCode> {
    let report = crate::check::check(config).await;
    let text = match format {
        Format::Table => table(&report),
        Format::Json => json(&report)?,
    };
    print(&text)?;
    Ok(match report.worst() {
        Severity::Ok => ExitCode::SUCCESS,
        Severity::Warning => ExitCode::from(1),
        Severity::Error => ExitCode::from(2),
    })
}

fn table(report: &Report) -> String {
    let findings = report.findings().iter();
    let id_width = findings.clone().map(|finding| finding.id.len()).max().unwrap_or(0);
    let object_width = findings.map(|finding| line(&finding.object).chars().count()).max().unwrap_or(0);
    let object_width = object_width.min(OBJECT_WIDTH_MAX);
    let mut text = String::new();
    for finding in report.findings() {
        // Writing to a `String` can't fail.
        let _ = writeln!(
            text,
            "{:<7}  {:<id_width$}  {:<object_width$}  {}",
            finding.severity.name(),
            finding.id,
            line(&finding.object),
            line(&finding.message)
        );
        if let Some(remedy) = &finding.remedy {
            let _ = writeln!(text, "{:<7}  -> {}", "", line(remedy));
        }
    }
    let counted = |severity, noun: &str| {
        let count = report.count(severity);
        format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
    };
    let (errors, warnings) = (counted(Severity::Error, "error"), counted(Severity::Warning, "warning"));
    let _ = write!(text, "\n{errors}, {warnings}, {} ok", report.count(Severity::Ok));
    text
}
