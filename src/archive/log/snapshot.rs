use deltalake_core::kernel::LogicalFileView;
use deltalake_core::table::state::DeltaTableState;

use super::described::as_logged;
use super::open::{open_checked, to_lsn};
use crate::archive::files::table_file::TableFile;
use crate::archive::store::storage::Storage;
use crate::tables::Kind;
use crate::{Error, Lsn, Result};

/// What one version of a table's log says, to be read without writing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The table, with the columns that it has got by then.
    pub kind: Kind,
    /// Position up to which the table is complete for the application that was asked for, if that ever wrote it.
    pub lsn: Option<Lsn>,
    /// The active files.
    pub files: Vec<TableFile>,
}

impl Snapshot {
    /// Reads the newest version.
    ///
    /// # Errors
    ///
    /// [`Error::Storage`] and [`Error::Delta`] if the log can't be read, [`Error::Delta`] also if there is none.
    pub async fn read(storage: &Storage, kind: Kind, app_id: &str) -> Result<Self> {
        let delta = open_checked(storage, kind).await?;
        let failed = || Error::delta(kind, "reading the log");
        let state = delta.snapshot().map_err(failed())?;
        let txn = state.transaction_version(delta.log_store().as_ref(), app_id).await.map_err(failed())?;
        let lsn = txn.map(|version| to_lsn(kind, version)).transpose()?;
        Ok(Self { kind: as_logged(kind, state)?, lsn, files: table_files(kind, state) })
    }
}

/// The active files of a version.
pub(in crate::archive) fn table_files(kind: Kind, state: &DeltaTableState) -> Vec<TableFile> {
    let file = |file: LogicalFileView| {
        let size = u64::try_from(file.size()).unwrap_or_default();
        let path = file.object_store_path().to_string();
        TableFile::new(kind, path, size, file.modification_time(), file.stats())
    };
    state.log_data().iter().map(file).collect()
}
