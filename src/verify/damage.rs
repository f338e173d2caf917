//! Files of the archive that are gone, or not whole: what an earlier verification said of their rows is taken back.

use super::table::Table;
use crate::archive::{self, TableFile};
use crate::error::{Error, Result};
use crate::postgres::Session;
use crate::source::Partition;
use crate::watermark::{self, Verified};

/// Damaged files that a message names.
const SHOWN: usize = 10;

/// Whether an error says of a file that it is gone, or not whole.
pub(super) const fn is_told_by(error: &Error) -> bool {
    matches!(
        error,
        Error::Encode { .. }
            | Error::Delta { .. }
            | Error::Storage { source: object_store::Error::NotFound { .. }, .. }
    )
}

impl Table<'_> {
    /// Looks for the files that can't be read, and says which. Whatever they may hold rows of is not verified any more, and
    /// its purge is blocked until a comparison of all of it finds no row missing.
    ///
    /// # Errors
    ///
    /// `error`, if every file can be read after all; the first that is not about a file.
    pub(super) async fn take_back(
        &self,
        leaves: &[Partition],
        error: Error,
        sql: &mut Session,
    ) -> Result<String> {
        let reach = |leaf: &Partition| leaf.extent.unwrap_or((i64::MIN, i64::MAX));
        let may_hold = |file: &TableFile, (low, high): (i64, i64)| file.may_hold(low, high);
        let candidates = self.files.iter().filter(|file| may_hold(file, self.range));
        let mut damaged = Vec::new();
        for file in candidates.filter(|file| leaves.iter().any(|leaf| may_hold(file, reach(leaf)))) {
            match archive::read_through(self.storage, self.kind, &file.path).await {
                Err(error) if is_told_by(&error) => damaged.push((file, error.chain())),
                other => other?,
            }
        }
        let Some((_, first)) = damaged.first() else { return Err(error) };
        for leaf in leaves.iter().filter(|leaf| damaged.iter().any(|(file, _)| may_hold(file, reach(leaf)))) {
            let verified = Verified {
                source_table: &self.row.source_table,
                partition_oid: leaf.oid,
                partition_name: &leaf.name,
                row_count: 0,
                checksum: "",
                horizon: self.point.xmin,
                gap_count: self.row.gap_count,
            };
            sql.run(async |client| {
                watermark::forget_verified(client, &verified).await?;
                watermark::set_lacking(client, &verified, true, None).await
            })
            .await?;
        }
        let paths: Vec<&str> = damaged.iter().take(SHOWN).map(|(file, _)| file.path.as_str()).collect();
        Ok(format!(
            "{} files of its archive can't be read, so what they hold is not purged: {}{} ({first}); restore them from a \
             backup or an older version of the objects, or have Delta forget them (`DeltaTable.repair()` in Python), and \
             add their rows with `highwater verify --repair` while the sidecar runs",
            damaged.len(),
            paths.join(", "),
            if damaged.len() > paths.len() { ", ..." } else { "" },
        ))
    }
}
