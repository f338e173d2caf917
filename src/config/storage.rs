//! Where the archive is stored.

use std::str::FromStr;

use crate::{Error, Result};

/// The kind of store behind a storage URI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageType {
    /// Google Cloud Storage, `gs://bucket/prefix`.
    Google,
    /// Amazon S3 or a store that speaks its protocol, `s3://bucket/prefix`.
    Aws,
    /// A folder of this machine, a path or `file:///path`.
    Local,
    /// Azure Blob Storage, `az://container/prefix`.
    Azure,
}

/// Who may read what is made in a local folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LocalAccess {
    /// The user that archives, alone: folders are made with mode 0700 and files with 0600.
    #[default]
    Owner,
    /// Whoever the process's umask lets.
    Umask,
}

/// `owner` or `umask`.
impl FromStr for LocalAccess {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "owner" => Ok(Self::Owner),
            "umask" => Ok(Self::Umask),
            _ => Err(()),
        }
    }
}

impl LocalAccess {
    /// The mode that a folder is made with, before the umask takes from it.
    pub(crate) const fn folder_mode(self) -> u32 {
        match self {
            Self::Owner => 0o700,
            Self::Umask => 0o777,
        }
    }

    /// The mode that a file is made with, before the umask takes from it.
    pub(crate) const fn file_mode(self) -> u32 {
        match self {
            Self::Owner => 0o600,
            Self::Umask => 0o666,
        }
    }
}

/// Where the archive is stored: what `SCOUTER_STORAGE_URI` and `AWS_REGION` say. Credentials and
/// endpoints are not part of it; the stores read them from their usual environment variables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectStorageSettings {
    /// The URI or path, without trailing slashes.
    pub storage_uri: String,
    /// The kind of store, derived from the URI.
    pub storage_type: StorageType,
    /// The region of an S3 bucket; empty: that of `AWS_DEFAULT_REGION` or of the profile, else `us-east-1`. The other
    /// stores ignore it.
    pub region: String,
    /// Who may read what is made in a local folder; the stores have rules of their own.
    pub local_access: LocalAccess,
}

const SETTING: &str = "SCOUTER_STORAGE_URI";
const ACCEPTED: &str = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, or a path";

impl ObjectStorageSettings {
    /// Settings for a storage URI and a region.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if the URI is empty, has an unknown scheme, no bucket, or a part (query, user,
    /// empty folder) that no object can be found under.
    pub fn new(storage_uri: &str, region: &str) -> Result<Self> {
        let refuse = || Error::Setting {
            setting: SETTING.to_owned(),
            value: without_secrets(storage_uri),
            accepted: ACCEPTED.to_owned(),
        };
        let typed = storage_uri.trim();
        let storage_type = storage_type(typed).ok_or_else(refuse)?;
        let trimmed = typed.trim_end_matches('/');
        let storage_uri = match storage_type {
            // Only slashes: the root folder.
            StorageType::Local if matches!(trimmed, "" | "file:") => typed,
            StorageType::Local => trimmed,
            _ if is_bucket_uri(trimmed) => trimmed,
            _ => return Err(refuse()),
        };
        Ok(Self {
            storage_uri: storage_uri.to_owned(),
            storage_type,
            region: region.trim().to_owned(),
            local_access: LocalAccess::default(),
        })
    }

    /// The URI without its scheme: bucket and prefix, or the path of a local folder.
    #[must_use]
    pub fn storage_root(&self) -> &str {
        match self.storage_uri.split_once("://") {
            Some((_, root)) => root,
            None => &self.storage_uri,
        }
    }

    /// Bucket (or container) and prefix; `None` for a local folder.
    pub(crate) fn bucket(&self) -> Option<(&str, &str)> {
        if self.storage_type == StorageType::Local {
            return None;
        }
        Some(self.storage_root().split_once('/').unwrap_or((self.storage_root(), "")))
    }
}

impl Default for ObjectStorageSettings {
    fn default() -> Self {
        Self {
            storage_uri: "./scouter-storage".to_owned(),
            storage_type: StorageType::Local,
            region: String::new(),
            local_access: LocalAccess::default(),
        }
    }
}

fn storage_type(uri: &str) -> Option<StorageType> {
    let Some((scheme, rest)) = uri.split_once("://") else {
        return (!uri.is_empty()).then_some(StorageType::Local);
    };
    match scheme.to_ascii_lowercase().as_str() {
        "s3" => Some(StorageType::Aws),
        "gs" => Some(StorageType::Google),
        "az" => Some(StorageType::Azure),
        // A host other than this one would silently be taken for a folder.
        "file" => rest.starts_with('/').then_some(StorageType::Local),
        _ => None,
    }
}

fn is_bucket_uri(uri: &str) -> bool {
    let Some((_, root)) = uri.split_once("://") else { return false };
    let plain = |part: &str| {
        !part.is_empty()
            && !matches!(part, "." | "..")
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.=+".contains(&byte))
    };
    root.split('/').all(plain)
}

fn without_secrets(uri: &str) -> String {
    match uri.split_once("://") {
        Some((scheme, rest)) => {
            let rest = rest.split('?').next().unwrap_or_default();
            format!("{scheme}://{}", rest.rsplit_once('@').map_or(rest, |(_, host)| host))
        }
        None => uri.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uri_says_the_type_of_storage() {
        for (uri, storage_type, root) in [
            ("s3://bucket/a/b/", StorageType::Aws, "bucket/a/b"),
            ("gs://bucket", StorageType::Google, "bucket"),
            ("az://container/x", StorageType::Azure, "container/x"),
            ("./scouter-storage", StorageType::Local, "./scouter-storage"),
            ("file:///var/lib/archive/", StorageType::Local, "/var/lib/archive"),
            ("/", StorageType::Local, "/"),
        ] {
            let settings = ObjectStorageSettings::new(uri, "eu-west-1").unwrap();
            assert_eq!((settings.storage_type, settings.storage_root()), (storage_type, root), "{uri}");
        }
    }

    #[test]
    fn unusable_uris_are_refused_without_their_secrets() {
        for uri in ["", "  ", "s3://", "s3:///x", "ftp://host/x", "file://host/x", "s3://a//b", "s3://a/../b"]
        {
            assert!(ObjectStorageSettings::new(uri, "x").is_err(), "{uri}");
        }
        let error = ObjectStorageSettings::new("s3://key:secret@bucket/x?token=secret", "x").unwrap_err();
        assert!(!error.chain().contains("secret"), "{}", error.chain());
    }
}
