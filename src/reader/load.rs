//! Records that come by a call instead of the stream: one log entry, once.

use crate::archive::{self, CommitNote, Namer, Snapshot, Storage, Table, View, each_digest, upload};
use crate::batch::Batches;
use crate::config::ObjectStorageSettings;
use crate::lsn::Lsn;
use crate::tables::Kind;
use crate::{Error, Result};

/// The position of a load that is done; before it is, its application id has none, or 0.
const DONE: Lsn = Lsn(1);

/// Adds rows to a kind's table, unless this very load was made before: `name` and a digest of the rows are its application id
/// in the log.
///
/// Whoever loads the same at the same time claims the same id; the earlier claim is void then, so only one of them commits.
pub(super) async fn load(
    settings: &ObjectStorageSettings,
    kind: Kind,
    name: &str,
    batches: Batches,
) -> Result<()> {
    if batches.is_empty() {
        return Ok(());
    }
    let row_count = batches.row_count();
    let work = move || encode(kind, &batches);
    let (digest, files) = tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::Internal(format!("the encoder failed: {error}")))??;
    let app_id = format!("highwater-load/{digest:032x}-{row_count}/{name}");
    let storage = Storage::open(settings)?;
    let is_there = View::read(&storage, kind).await?.version().is_some();
    if is_there && Snapshot::read(&storage, kind, &app_id).await?.lsn == Some(DONE) {
        return Ok(());
    }
    let session = format!("{:032x}", rand::random::<u128>());
    let mut table = Table::claim(&storage, kind, &app_id, &session, Lsn::ZERO).await?;
    if table.lsn() == DONE {
        return Ok(());
    }
    let namer = Namer::new();
    let mut uploaded = Vec::new();
    for (window, file) in files {
        // Behind every watermark: these are no rows that one lacks.
        uploaded.push(upload(&storage, kind, namer.name(window, Lsn::ZERO), file).await?);
    }
    let note = CommitNote { last_lsn: DONE, row_count, ..CommitNote::default() };
    table.commit(&uploaded, DONE, &note).await
}

type Files = Vec<(crate::tables::Window, archive::EncodedFile)>;

/// The rows as files, and a digest of them that does not depend on their order.
fn encode(kind: Kind, batches: &Batches) -> Result<(u128, Files)> {
    let mut sum = 0_u128;
    let mut files = Vec::new();
    for rows in batches.files() {
        let batches = rows.record_batches().collect::<Result<Vec<_>>>()?;
        for batch in &batches {
            each_digest(kind, batch, |_, digest| sum = sum.wrapping_add(digest))?;
        }
        if let Some(file) = archive::encode(kind, batches)? {
            files.push((rows.window(), file));
        }
    }
    Ok((sum, files))
}
