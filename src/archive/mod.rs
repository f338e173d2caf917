//! Placeholder, replaced at the merge.

use crate::config::ObjectStorageSettings;
use crate::error::{Error, Result};

/// Placeholder.
#[derive(Debug)]
pub struct Storage {
    path: std::path::PathBuf,
}

impl Storage {
    /// Opens.
    ///
    /// # Errors
    ///
    /// None yet.
    pub fn open(settings: &ObjectStorageSettings) -> Result<Self> {
        Ok(Self { path: settings.storage_uri.clone().into() })
    }

    /// Writes, reads and removes an object.
    ///
    /// # Errors
    ///
    /// When that fails.
    pub async fn probe(&self) -> Result<()> {
        let file = self.path.join("_highwater_probe");
        tokio::fs::create_dir_all(&self.path).await.map_err(Error::io("making the storage directory"))?;
        tokio::fs::write(&file, b"x").await.map_err(Error::io("writing the probe"))?;
        tokio::fs::remove_file(&file).await.map_err(Error::io("removing the probe"))
    }
}
