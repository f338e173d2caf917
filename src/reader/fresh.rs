//! Rows that are committed and not archived yet, so that a query up to now is complete.
//!
//! ```text
//! 1  the horizon H    every transaction below it is archived: read from the watermark, first
//! 2  version V        the archive's newest version, read after H: it has all transactions below H
//! 3  snapshot S       begun after V was read: it sees every transaction that V has
//! ```
//!
//! A row of S that V lacks belongs to a transaction at or above H. So of S the rows of such transactions are read, and V's are
//! taken away from them, as multisets (`archive::digest`); with each such row all others of its time are read, so that of
//! rows that are equal in every column as many are taken away as V has. What is left is exactly S without V: nothing is in
//! both parts, and no row that was committed before the query began is in neither, unless it was archived and purged between
//! 2 and 3. The purge deletes below its horizon only, and logs that: where S has an entry with one above H, all begins anew.
//!
//! Where H does not speak for all rows (the table's state is `snapshot` or `gap`, a partition is not covered), all rows of S in
//! the range are read.

use std::collections::{BTreeSet, HashMap, HashSet};

use arrow::array::RecordBatch;
use arrow::compute::cast;
use arrow::error::ArrowError;
use chrono::{DateTime, Utc};
use datafusion::dataframe::DataFrame;
use tokio_postgres::Client;

use super::columns::each_batch;
use super::query::BinnedQuery;
use crate::archive::{self, Multiset, Snapshot, Storage, each_digest};
use crate::batch::Batches;
use crate::config::Config;
use crate::decode::{Decoder, Settled};
use crate::failpoint;
use crate::lsn::Lsn;
use crate::postgres::{READING, Session, quote_identifier, sql};
use crate::source::lookup::Lookup;
use crate::source::unarchived::{self, Part};
use crate::source::{self, Copier, Fate, Partition, Slice, Source};
use crate::tables::{ENTITY_TABLE, Kind, MICROS_PER_HOUR};
use crate::watermark::{self, State, Watermark};
use crate::{Error, Result, purge};

/// Hours of fresh rows that the archive is asked for one by one; for more it is asked for all between the first and the last.
const HOURS_MAX: usize = 100;

/// What is known of a drift table before the archive's version is read.
pub(super) struct Before<'a> {
    config: &'a Config,
    kind: Kind,
    client: Client,
    row: Watermark,
    /// Where the purge's log ended.
    at: DateTime<Utc>,
    /// Partitions that the horizon speaks for.
    covered: HashSet<u32>,
}

impl<'a> Before<'a> {
    /// `None` if the kind's table is not archived from this database, but others are.
    pub(super) async fn read(config: &'a Config, kind: Kind) -> Result<Option<Self>> {
        let client = sql::connect(&config.source).await?;
        client.batch_execute(READING).await.map_err(Error::sql("preparing to read fresh rows"))?;
        refuse_standby(config, &client).await?;
        let at = purge::log_end(&client).await?;
        let rows = watermark::choose(watermark::read(&client).await?, &config.slot, &[])?;
        let Some(row) = rows.into_iter().find(|row| row.kind == kind.name()) else { return Ok(None) };
        let mut covered = HashSet::new();
        if let Some(source) = Source::find(&client, &row).await? {
            let leaves = source::holders(&client, &row.source_table, source.oid).await?;
            covered.extend(leaves.iter().filter(|leaf| leaf.is_covered).map(|leaf| leaf.oid));
            for Part { part, reason, .. } in unarchived::parts(&client, source.oid).await? {
                tracing::warn!("rows of {part} are not in the answer: it {reason}");
            }
        }
        Ok(Some(Self { config, kind, client, row, at, covered }))
    }

    /// Makes sure that the storage is the one that the watermark speaks of.
    pub(super) async fn check_storage(&self, storage: &Storage) -> Result<()> {
        let app_id = archive::app_id(&self.row.system_identifier, &self.row.slot_name);
        let found = Snapshot::read(storage, self.kind, &app_id).await?;
        // Only a checkpoint with rows of a table moves the position in its log, and rows are never removed.
        let held: u64 = found.files.iter().filter_map(|file| file.row_count).sum();
        let is_counted = found.files.iter().all(|file| file.row_count.is_some());
        let expected = u64::try_from(self.row.row_count).unwrap_or_default();
        if found.lsn.is_some() && (held >= expected || !is_counted) {
            return Ok(());
        }
        Err(Error::Setting {
            setting: "storage".to_owned(),
            value: self.config.storage.storage_uri.clone(),
            accepted: format!("the archive that the watermark of {} speaks of", self.row.source_table),
        })
    }

    /// The rows of a query that the archive lacks; `None` if some were purged since its version was read, which may not
    /// have them. `archived` gives those that it has, in ranges of time.
    pub(super) async fn fresh(
        self,
        query: &BinnedQuery,
        archived: impl Fn(&[(i64, i64)]) -> Result<DataFrame>,
    ) -> Result<Option<Vec<RecordBatch>>> {
        failpoint::hit("before-fresh");
        let begin = "begin isolation level repeatable read read only";
        self.client.batch_execute(begin).await.map_err(Error::sql("beginning to read fresh rows"))?;
        if self.was_purged().await? {
            return Ok(None);
        }
        let source = Source::find(&self.client, &self.row).await?.ok_or_else(|| Error::Query {
            detail: format!(
                "{} is gone from the database, or another table has its name",
                self.row.source_table
            ),
        })?;
        self.check_detached(source.oid).await?;
        let Some(entity) = self.entity_condition(&source, query).await? else { return Ok(Some(Vec::new())) };
        let (start, end) = query.range();
        let mut copier = Copier::open(self.config, &self.client).await?;
        let mut rows = Rows::new(self.config, self.kind, &source);
        let failed = || Error::sql("looking for partitions");
        // Without the lock on the table that this may take: who waits for that would keep the copies waiting.
        self.client.batch_execute("savepoint part").await.map_err(failed())?;
        let leaves = source::holders(&self.client, &self.row.source_table, source.oid).await?;
        self.client.batch_execute("rollback to savepoint part").await.map_err(failed())?;
        for leaf in leaves {
            let (low, high) = leaf.bounds.unwrap_or((i64::MIN, i64::MAX));
            if low < end && start < high {
                let condition = self.condition(&source, &leaf, &entity, (start, end));
                rows.read(&mut copier, &source, &leaf, condition).await?;
            }
        }
        let batches = rows.finish()?;
        drop(self.client);
        lacking(self.kind, batches, archived).await.map(Some)
    }

    /// Rights on the drift table reach its partitions, but not those that were detached, which may hold rows that are not
    /// archived yet.
    async fn check_detached(&self, root: u32) -> Result<()> {
        let query = "
            select p.partition_name from highwater.covered_partition p join pg_class c on c.oid = p.partition_oid
            where p.source_table = $1 and not c.relispartition and c.oid <> $2 and not has_table_privilege(c.oid, 'select')
            limit 1";
        let failed = || Error::sql("looking for detached partitions");
        let row = self.client.query_opt(query, &[&self.row.source_table, &root]).await.map_err(failed())?;
        let Some(row) = row else { return Ok(()) };
        let name: String = row.try_get(0).map_err(failed())?;
        Err(Error::Query {
            detail: format!(
                "{name} was detached from {}, and this role may not read it, so rows may be missing: grant select on {name}",
                self.row.source_table
            ),
        })
    }

    /// Whether the snapshot may lack rows that were there when the horizon was read, and were not below it.
    async fn was_purged(&self) -> Result<bool> {
        // An entry may be some batches old before it is committed. Ids may have been reset long ago.
        let query = "
            select exists (
                select from highwater.purge_log
                where source_table = $1 and action in ('dropped', 'deleted')
                  and case when $2::text is null then last_at >= $3
                           else last_at >= $3 - interval '1 hour' and horizon::text::bigint > $2::text::bigint end)";
        let horizon = self.row.archived_before.map(|horizon| horizon.to_string());
        let row = self.client.query_one(query, &[&self.row.source_table, &horizon, &self.at]).await;
        row.and_then(|row| row.try_get(0)).map_err(Error::sql("reading what was purged"))
    }

    /// The condition for rows of the query's entity; `None` if the database has none.
    async fn entity_condition(&self, source: &Source, query: &BinnedQuery) -> Result<Option<String>> {
        let entity = query.entity();
        if source.has_column("space") {
            let columns = [("space", &entity.space), ("name", &entity.name), ("version", &entity.version)];
            // Types that are compared in another way than texts, or not with every text, are no texts to this.
            let cast = |column| if source.is_plain_text(column) { "" } else { "::text" };
            let equal = columns
                .map(|(column, value)| format!("{column}{} = '{}'", cast(column), value.replace('\'', "''")));
            return Ok(Some(equal.join(" and ")));
        }
        let ids = format!(
            "select id::text from {}.{ENTITY_TABLE} where space = $1 and name = $2 and version = $3",
            quote_identifier(&self.config.schema)
        );
        let failed = || Error::sql("looking up the entity");
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
            [&entity.space, &entity.name, &entity.version];
        let ids = self.client.query(&ids, &parameters).await.map_err(failed())?;
        let ids: Vec<String> =
            ids.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>().map_err(failed())?;
        Ok((!ids.is_empty()).then(|| format!("entity_id in ({})", ids.join(", "))))
    }

    /// The condition for rows that the archive may lack, and those that were created at the same time.
    fn condition(&self, source: &Source, leaf: &Partition, entity: &str, range: (i64, i64)) -> Slice {
        let mut slice = source.time.slice(vec![range]);
        let is_wanted = format!("{entity} and {}", slice.condition.as_deref().unwrap_or("true"));
        let speaks = self.row.state == State::Streaming && self.covered.contains(&leaf.oid);
        slice.condition = Some(match self.row.archived_before.filter(|_| speaks) {
            None => is_wanted,
            Some(horizon) => format!(
                "{is_wanted} and created_at in (select created_at from {} where {} and {is_wanted} and {})",
                leaf.from,
                leaf.filter,
                source::not_below(horizon),
            ),
        });
        slice
    }
}

/// A standby knows what it has received, and not what it lacks.
async fn refuse_standby(config: &Config, client: &Client) -> Result<()> {
    let row = client.query_one("select pg_is_in_recovery()", &[]).await;
    let is_standby: bool =
        row.and_then(|row| row.try_get(0)).map_err(Error::sql("asking whether the server is a standby"))?;
    if !is_standby {
        return Ok(());
    }
    Err(Error::Query {
        detail: format!(
            "{} is a standby, which may lack rows that are committed on the primary: for fresh rows, name the primary in \
             DATABASE_URI, without target_session_attrs=any; or leave them out",
            config.source
        ),
    })
}

/// Rows of a drift table on their way to batches of the archive's columns.
struct Rows<'a> {
    config: &'a Config,
    kind: Kind,
    decoder: Decoder,
    entities: Lookup,
    batches: Batches,
    found: Vec<RecordBatch>,
    byte_count: usize,
}

impl<'a> Rows<'a> {
    fn new(config: &'a Config, kind: Kind, source: &Source) -> Self {
        let (mut decoder, _) = source.decoder(&config.schema, kind);
        decoder.begin_copy(Lsn::ZERO, 0, Settled::default());
        Self {
            config,
            kind,
            decoder,
            entities: Lookup::new(Session::new(config.source.clone()), &config.schema),
            batches: Batches::new(config.window, 0),
            found: Vec::new(),
            byte_count: 0,
        }
    }

    async fn read(
        &mut self,
        copier: &mut Copier,
        source: &Source,
        leaf: &Partition,
        slice: Slice,
    ) -> Result<()> {
        let mut rows = source.read(copier, leaf, &slice).await?;
        while let Some(row) = rows.next().await? {
            source::insert(&mut self.decoder, row, &mut self.batches, &mut self.entities).await?;
            if self.batches.byte_count() >= self.config.batch_bytes_max() {
                self.gather()?;
            }
        }
        if copier.end(leaf).await? == Fate::Unchanged {
            return Ok(());
        }
        // Then it looks empty to the snapshot.
        Err(Error::Query { detail: format!("{} was dropped or rewritten meanwhile; ask again", leaf.name) })
    }

    fn gather(&mut self) -> Result<()> {
        let batches = std::mem::replace(&mut self.batches, Batches::new(self.config.window, 0));
        for rows in batches.files().iter().filter(|rows| rows.kind() == self.kind) {
            for batch in rows.record_batches() {
                let batch = plain(self.kind, &batch?).map_err(|source| Error::Encode {
                    context: "reading fresh rows".to_owned(),
                    source: Box::new(source),
                })?;
                self.byte_count += batch.get_array_memory_size();
                self.found.push(batch);
            }
        }
        if self.byte_count <= self.config.memory_bytes {
            return Ok(());
        }
        Err(Error::Setting {
            setting: "HIGHWATER_MEMORY".to_owned(),
            value: self.config.memory_bytes.to_string(),
            accepted: "more, or the range shorter: so many rows of it are not archived yet".to_owned(),
        })
    }

    fn finish(mut self) -> Result<Vec<RecordBatch>> {
        self.gather()?;
        Ok(self.found)
    }
}

/// The rows with plain strings, as queries have them.
fn plain(kind: Kind, batch: &RecordBatch) -> Result<RecordBatch, ArrowError> {
    let schema = kind.schema();
    let columns = batch.columns().iter().zip(schema.fields());
    let columns = columns.map(|(column, field)| cast(column, field.data_type())).collect::<Result<_, _>>()?;
    RecordBatch::try_new(schema, columns)
}

/// The rows that the archive lacks.
async fn lacking(
    kind: Kind,
    batches: Vec<RecordBatch>,
    archived: impl Fn(&[(i64, i64)]) -> Result<DataFrame>,
) -> Result<Vec<RecordBatch>> {
    let mut wanted: HashMap<u128, u32> = HashMap::new();
    let mut hours = BTreeSet::new();
    for batch in &batches {
        each_digest(kind, batch, |time, digest| {
            *wanted.entry(digest).or_default() += 1;
            hours.insert(time.div_euclid(MICROS_PER_HOUR));
        })?;
    }
    if hours.is_empty() {
        return Ok(Vec::new());
    }
    let mut present = Multiset::new(kind);
    each_batch(archived(&ranges(&hours))?, "reading what of the fresh rows is archived", |batch| {
        each_digest(kind, batch, |_, digest| {
            if wanted.contains_key(&digest) {
                present.add(digest);
            }
        })
    })
    .await?;
    let missing = batches.iter().map(|batch| present.missing(batch));
    missing.filter(|batch| batch.as_ref().map_or(true, |batch| batch.num_rows() > 0)).collect()
}

/// Ranges of time that hold these hours.
fn ranges(hours: &BTreeSet<i64>) -> Vec<(i64, i64)> {
    let mut ranges: Vec<(i64, i64)> = Vec::new();
    for hour in hours {
        let (start, end) = (hour * MICROS_PER_HOUR, (hour + 1) * MICROS_PER_HOUR);
        match ranges.last_mut() {
            Some((_, last)) if *last == start => *last = end,
            _ => ranges.push((start, end)),
        }
    }
    match (ranges.first(), ranges.last()) {
        (Some((start, _)), Some((_, end))) if ranges.len() > HOURS_MAX => vec![(*start, *end)],
        _ => ranges,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_become_ranges() {
        let hour = MICROS_PER_HOUR;
        let of = |hours: &[i64]| ranges(&hours.iter().copied().collect());
        assert_eq!(of(&[-1, 0, 5]), [(-hour, hour), (5 * hour, 6 * hour)]);
        let many: Vec<i64> = (0..=HOURS_MAX as i64).map(|number| number * 2).collect();
        assert_eq!(of(&many), [(0, (2 * HOURS_MAX as i64 + 1) * hour)]);
    }
}
