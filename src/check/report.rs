//! [`Report`]: the findings of a check.

use serde::{Serialize, Serializer};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Works, but will hurt.
    Warning,
    /// Can't work, or loses rows.
    Error,
}

impl Severity {
    /// `ok`, `warning` or `error`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// Which check it was; stable between versions.
    pub id: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What was looked at: a table, a setting, a role.
    pub object: String,
    /// What was seen, and what it means.
    pub message: String,
    /// The SQL or setting that mends it; absent when all is well.
    pub remedy: Option<String>,
}

/// The findings of a check, in the order in which they were made.
#[derive(Clone, Debug, Default)]
pub struct Report {
    findings: Vec<Finding>,
}

impl Report {
    /// Every finding.
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// How many findings have this severity.
    #[must_use]
    pub fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }

    /// The worst severity; [`Severity::Ok`] if nothing was found.
    #[must_use]
    pub fn worst(&self) -> Severity {
        self.findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Ok)
    }

    pub(super) fn ok(&mut self, id: &'static str, object: impl Into<String>, message: impl Into<String>) {
        self.push(id, Severity::Ok, object.into(), message.into(), None);
    }

    pub(super) fn warning(
        &mut self,
        id: &'static str,
        object: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.push(id, Severity::Warning, object.into(), message.into(), Some(remedy.into()));
    }

    pub(super) fn error(
        &mut self,
        id: &'static str,
        object: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.push(id, Severity::Error, object.into(), message.into(), Some(remedy.into()));
    }

    fn push(
        &mut self,
        id: &'static str,
        severity: Severity,
        object: String,
        message: String,
        remedy: Option<String>,
    ) {
        self.findings.push(Finding { id, severity, object, message, remedy });
    }
}

/// `{"findings": [...], "errors": n, "warnings": n}`.
impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut json = serializer.serialize_struct("Report", 3)?;
        json.serialize_field("findings", &self.findings)?;
        json.serialize_field("errors", &self.count(Severity::Error))?;
        json.serialize_field("warnings", &self.count(Severity::Warning))?;
        json.end()
    }
}
