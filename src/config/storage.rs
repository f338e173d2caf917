//! Placeholder, replaced at the merge.

use crate::error::{Error, Result};

/// Kinds of storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageType {
    /// A directory.
    Local,
}

/// Where the archive is.
#[derive(Clone, Debug)]
pub struct ObjectStorageSettings {
    /// The URI.
    pub storage_uri: String,
    /// Its kind.
    pub storage_type: StorageType,
    /// The region.
    pub region: String,
}

impl ObjectStorageSettings {
    /// From a URI or path.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if the scheme is not known.
    pub fn new(uri: &str, region: &str) -> Result<Self> {
        if uri.starts_with("ftp://") {
            return Err(Error::Setting {
                setting: "SCOUTER_STORAGE_URI".into(),
                value: uri.into(),
                accepted: "s3://, gs://, az:// or a path".into(),
            });
        }
        Ok(Self { storage_uri: uri.into(), storage_type: StorageType::Local, region: region.into() })
    }
}
