//! Placeholder, replaced at the merge.

use std::fmt;

use crate::error::{Error, Result};

/// Where the rows come from.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Placeholder.
    pub(crate) inner: tokio_postgres::Config,
}

impl SourceConfig {
    /// From a libpq URL and the `PG*` variables.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if the URL can't be read.
    pub fn new(uri: Option<&str>, _env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let uri = uri.unwrap_or("postgresql://postgres:postgres@localhost:5432/postgres");
        let inner = uri.parse().map_err(|_| Error::Setting {
            setting: "DATABASE_URI".into(),
            value: "(hidden)".into(),
            accepted: "a libpq URL".into(),
        })?;
        Ok(Self { inner })
    }
}

impl fmt::Display for SourceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |part: Option<&str>| part.unwrap_or("?").to_owned();
        write!(f, "{}@{}", name(self.inner.get_user()), name(self.inner.get_dbname()))
    }
}
