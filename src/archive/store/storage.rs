use std::fmt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use futures::TryStreamExt as _;
use object_store::ObjectStore;
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use tokio::sync::OnceCell;
use url::Url;

use super::s3;
use super::synced::{SyncedLocal, create_folder};
use crate::config::{LocalAccess, ObjectStorageSettings, StorageType};
use crate::tables::Kind;
use crate::{Error, Result};

/// The archive's place in object storage. Cheap to clone.
///
/// A put that returned is durable, also on a local disk (bytes and names are synced).
#[derive(Clone)]
pub struct Storage {
    /// The whole bucket, or the whole file system.
    root: Arc<dyn ObjectStore>,
    /// The storage URI, with a slash at its end.
    url: Url,
    /// What tells the place from others, of the same URI as well.
    place: String,
    /// Set once the place has been seen to keep writers apart.
    proved: Arc<OnceCell<()>>,
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Storage").field("url", &self.url.as_str()).finish_non_exhaustive()
    }
}

/// How errors name the setting.
const STORAGE_URI: &str = "storage URI";

/// The error of a place without an archive.
pub(crate) fn nothing_in(uri: &str) -> Error {
    Error::Setting {
        setting: STORAGE_URI.to_owned(),
        value: uri.to_owned(),
        accepted: "the place of an archive: nothing was archived there".to_owned(),
    }
}

/// Whether it is that error.
pub(crate) fn is_nothing(error: &Error) -> bool {
    matches!(error, Error::Setting { setting, .. } if setting == STORAGE_URI)
}

impl Storage {
    /// Opens the storage that the settings name; a local folder is created, and no other is written to in its
    /// place later on. Credentials and endpoints
    /// come from the store's usual environment variables (`AWS_*`, `GOOGLE_*`, `AZURE_*`). Sends no request.
    ///
    /// # Errors
    ///
    /// [`Error::Storage`] if the environment lacks something that the store needs, [`Error::Io`] if a
    /// local folder can't be created.
    pub fn open(settings: &ObjectStorageSettings) -> Result<Self> {
        let uri = &settings.storage_uri;
        let failed = || Error::storage(format!("opening {uri}"));
        let bucket = settings.bucket().map_or("", |(bucket, _)| bucket);
        let (root, address): (Arc<dyn ObjectStore>, _) = match settings.storage_type {
            StorageType::Aws => {
                let (store, address) = s3::open(settings, bucket)?;
                (Arc::new(store), address)
            }
            StorageType::Google => {
                let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket);
                (Arc::new(builder.build().map_err(failed())?), "Google".to_owned())
            }
            StorageType::Azure => {
                let builder = MicrosoftAzureBuilder::from_env().with_container_name(bucket);
                let account = builder.get_config_value(&AzureConfigKey::AccountName).unwrap_or_default();
                (Arc::new(builder.build().map_err(failed())?), format!("Azure, account {account}"))
            }
            StorageType::Local => {
                return Self::open_folder(FilePath::new(settings.storage_root()), settings.local_access);
            }
        };
        let storage = Self::from_store(root, &format!("{uri}/"))?;
        Ok(Self { place: format!("{} at {address}", storage.url), ..storage })
    }

    /// As [`Storage::open`], where an archive should be already: no folder is created.
    ///
    /// # Errors
    ///
    /// Also [`Error::Setting`] if a local folder does not exist.
    pub fn open_existing(settings: &ObjectStorageSettings) -> Result<Self> {
        if Self::is_away(settings) { Err(nothing_in(&settings.storage_uri)) } else { Self::open(settings) }
    }

    /// Whether it is a folder of this machine that is not there: not mounted, or nothing was ever archived.
    pub(crate) fn is_away(settings: &ObjectStorageSettings) -> bool {
        settings.storage_type == StorageType::Local && !FilePath::new(settings.storage_root()).is_dir()
    }

    fn open_folder(folder: &FilePath, access: LocalAccess) -> Result<Self> {
        let context = || format!("creating the folder {}", folder.display());
        let absolute: PathBuf = std::path::absolute(folder).map_err(Error::io(context()))?;
        create_folder(&absolute, access).map_err(Error::io(context()))?;
        // Links and dots are resolved once, so that one folder has one URL.
        let absolute = absolute.canonicalize().map_err(Error::io(context()))?;
        let url = Url::from_directory_path(&absolute)
            .map_err(|()| Error::Internal(format!("{} is not absolute", absolute.display())))?;
        let store = SyncedLocal::open(&absolute, access).map_err(Error::io(context()))?;
        let place = format!("{url} {}", store.identity());
        Ok(Self { root: Arc::new(store), url, place, proved: Arc::default() })
    }

    /// Storage under a URL of a store that is already open; the store's root is the bucket's (of `file://`, the file system's).
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if it is no URL.
    pub fn from_store(root: Arc<dyn ObjectStore>, url: &str) -> Result<Self> {
        let url = Url::parse(url).map_err(|error| Error::Setting {
            setting: "storage URI".to_owned(),
            value: url.to_owned(),
            accepted: format!("a URL ({error})"),
        })?;
        Ok(Self { root, place: url.to_string(), url, proved: Arc::default() })
    }

    /// The same place by way of another store, which is made of this one: it counts or limits requests, say.
    #[must_use]
    pub fn through(self, make: impl FnOnce(Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore>) -> Self {
        Self { root: make(self.root), ..self }
    }

    /// The storage URI, with a slash at its end.
    #[must_use]
    pub fn url(&self) -> &str {
        self.url.as_str()
    }

    /// The URL of a kind's Delta table, with a slash at its end.
    #[must_use]
    pub fn table_url(&self, kind: Kind) -> Url {
        let mut url = self.url.clone();
        url.set_path(&format!("{}/{}/", self.url.path().trim_end_matches('/'), kind.name()));
        url
    }

    /// The objects of a kind's table; paths are relative to the table.
    #[must_use]
    pub fn table_store(&self, kind: Kind) -> Arc<dyn ObjectStore> {
        let prefix = Path::from_url_path(self.table_url(kind).path()).unwrap_or_default();
        Arc::new(PrefixStore::new(Arc::clone(&self.root), prefix))
    }

    /// The objects under the storage URI; paths are relative to it.
    #[must_use]
    pub fn store(&self) -> Arc<dyn ObjectStore> {
        let prefix = Path::from_url_path(self.url.path()).unwrap_or_default();
        Arc::new(PrefixStore::new(Arc::clone(&self.root), prefix))
    }

    /// The folders right under the storage URI.
    pub(crate) async fn folders(&self) -> Result<Vec<String>> {
        let listed = self.store().list_with_delimiter(None).await;
        let listed = listed.map_err(Error::storage(format!("listing {}", self.url)))?;
        Ok(listed.common_prefixes.iter().filter_map(|folder| folder.filename().map(str::to_owned)).collect())
    }

    /// Whether there is a Delta log of a kind's table.
    pub(in crate::archive) async fn has_log(&self, kind: Kind) -> Result<bool> {
        let store = self.table_store(kind);
        let mut log = store.list(Some(&Path::from("_delta_log")));
        let failed = Error::storage(format!("listing the log of {}", self.table_url(kind)));
        log.try_next().await.map_err(failed).map(|object| object.is_some())
    }

    /// The local folder, if it is one.
    pub(in crate::archive) fn folder(&self) -> Option<PathBuf> {
        (self.url.scheme() == "file").then(|| self.url.to_file_path().ok()).flatten()
    }

    /// What tells the place from others, of the same URI as well.
    pub(in crate::archive) fn place(&self) -> &str {
        &self.place
    }

    /// Set once the place has been seen to keep writers apart.
    pub(in crate::archive) fn proved(&self) -> &OnceCell<()> {
        &self.proved
    }

    /// The whole bucket, as Delta Lake libraries want it beside [`Storage::table_url`].
    #[must_use]
    pub fn root_store(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.root)
    }
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;

    use super::*;

    #[tokio::test]
    async fn a_local_folder_is_created_and_probed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a b/ä#1/%20");
        let settings = ObjectStorageSettings::new(path.to_str().unwrap(), "").unwrap();
        let storage = Storage::open(&settings).unwrap();
        storage.probe().await.unwrap();
        let path = Path::from("2026/11/22-x.parquet");
        storage.table_store(Kind::psi()).put(&path, "x".into()).await.unwrap();
        let on_disk = storage.table_url(Kind::psi()).to_file_path().unwrap().join(path.as_ref());
        assert_eq!(std::fs::read(on_disk).unwrap(), b"x");
        assert_eq!(std::fs::read_dir(settings.storage_root()).unwrap().count(), 1, "the probe is gone");
    }
}
