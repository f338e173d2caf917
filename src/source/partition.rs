use tokio_postgres::{Client, GenericClient, SimpleQueryMessage};

use super::copy::Source;
use super::time::{Days, Slice, TimeColumn, TimeType, cut};
use crate::archive::MinuteCounts;
use crate::error::{Error, Result};
use crate::postgres::{quote_identifier, quote_literal};
use crate::source::unarchived::IS_ARCHIVED;
use crate::tables::{CALENDAR, MICROS_PER_DAY, MICROS_PER_MINUTE};
use crate::watermark::Watermark;

/// A table that holds rows itself: a leaf of a partition tree, or a plain table.
#[derive(Clone, Debug)]
pub(crate) struct Partition {
    pub(crate) oid: u32,
    /// With its schema, for people.
    pub(crate) name: String,
    /// Where its rows are read from, and under which condition: the table itself, or, if we may read only the root (rights
    /// on that don't reach its partitions), the root with what tells the partition's rows.
    pub(crate) from: String,
    pub(crate) filter: String,
    /// The table itself can be read.
    pub(crate) may_read: bool,
    pub(super) quoted: String,
    /// The file that it is in: another one means that it was rewritten.
    file: Option<u32>,
    /// It is in `highwater.covered_partition`, and was attached all the time since.
    pub(crate) is_covered: bool,
    /// The archive is known to lack rows of it, or may.
    pub(crate) lacks: bool,
    /// `highwater.attachment()`: another one means that rows may have come that did not pass the stream.
    pub(crate) attachment: String,
    /// It was a partition, and still holds what was written to it.
    pub(crate) is_detached: bool,
    /// Rows that the server's statistics expect; zero also if they know nothing.
    pub(crate) rows_expected: f64,
    /// Microseconds since the epoch (first, and first after the last) that `created_at` of its rows is within; `None` for a
    /// plain table, a default partition, one that is open to a side, and a key that is not `created_at` alone.
    pub(crate) bounds: Option<(i64, i64)>,
    /// What `created_at` of its rows is within: its bounds, or, of a detached one, what somebody has found there.
    pub(crate) extent: Option<(i64, i64)>,
}

/// The leaves under the table of oid `$1`, the oldest range first (a default partition before them). `$2` is the drift table's
/// name. With the oid, `pg_get_expr` would wait for who has locked a partition. With `$3`, also what was covered and is detached now, if it still has the table's columns.
/// (`{IS_ARCHIVED}` is put in.) What can't be archived is in none of them: [`unarchived`](crate::source::unarchived) tells of it.
const LEAVES: &str = r#"
    with recursive tree as (
        select $1::oid as oid, null::text collate "C" as low, null::text collate "C" as high
        union all
        select c.oid, coalesce(k.bound[1], t.low), coalesce(k.bound[2], t.high)
        from tree t join pg_inherits i on i.inhparent = t.oid join pg_class c on c.oid = i.inhrelid
        left join lateral (
            select regexp_match(pg_get_expr(c.relpartbound, 0),
                                '^FOR VALUES FROM \(''(\d[^'']*)''\) TO \(''(\d[^'']*)''\)$') as bound
            from pg_partitioned_table p join pg_attribute a on a.attrelid = p.partrelid and a.attnum = p.partattrs[0]
            where p.partrelid = i.inhparent and p.partstrat = 'r' and p.partnatts = 1 and a.attname = highwater.time_column($1::oid)) k on true
        -- `detach concurrently` that has not ended: nothing is streamed through the parent any more.
        where not i.inhdetachpending and c.relispartition),
    holder as (
        select oid, low, high, false as is_detached from tree
        union all
        select p.partition_oid, null, null, true from highwater.covered_partition p
        where $3 and p.source_table = $2 and p.partition_oid not in (select oid from tree)
          and coalesce(has_table_privilege(p.partition_oid, 'select'), false)
          and not exists (
            select a.attname from pg_attribute a where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped
            except select a.attname from pg_attribute a where a.attrelid = p.partition_oid and not a.attisdropped))
    select c.oid, n.nspname::text, c.relname::text,
           -- Of a table that was not analyzed yet, only the statistics know something.
           greatest(c.reltuples, pg_stat_get_live_tuples(c.oid), 0)::float8,
           is_detached or exists (
                select from highwater.covered_partition p
                where p.source_table = $2 and p.partition_oid = c.oid and p.detached_at is null
                  and p.attachment = highwater.attachment(c.oid)),
           c.relfilenode, has_table_privilege(c.oid, 'select'),
           -- It locks the partitioned table, until the transaction ends.
           case when not has_table_privilege(c.oid, 'select') then pg_get_partition_constraintdef(c.oid) end,
           $1::oid::regclass::text,
           (extract(epoch from low::timestamptz) * 1000000)::bigint,
           (extract(epoch from high::timestamptz) * 1000000)::bigint,
           coalesce(highwater.attachment(c.oid), ''), is_detached,
           exists (select from highwater.covered_partition p
                   where p.source_table = $2 and p.partition_oid = c.oid and p.lacks_since is not null)
    from holder join pg_class c using (oid) join pg_namespace n on n.oid = c.relnamespace
    where {IS_ARCHIVED}
    order by coalesce(pg_get_expr(c.relpartbound, 0), ''), c.relname"#;

/// The tables that the rows of a drift table are in: it itself, or the leaves of its tree, the oldest first. `root` is its oid.
///
/// # Errors
///
/// The query failed.
pub(crate) async fn leaves(
    client: &impl GenericClient,
    source_table: &str,
    root: u32,
) -> Result<Vec<Partition>> {
    read(client, source_table, root, false).await
}

/// The [`leaves`], and the partitions that were detached and kept: their rows are archived, too.
///
/// # Errors
///
/// The query failed.
pub(crate) async fn holders(
    client: &impl GenericClient,
    source_table: &str,
    root: u32,
) -> Result<Vec<Partition>> {
    read(client, source_table, root, true).await
}

/// Of each range of times (first and last microsecond since the epoch), whether Postgres has any row of it, in the table of a watermark
/// row or in what was detached from it and kept.
///
/// # Errors
///
/// A query failed.
pub(crate) async fn have_rows(client: &Client, row: &Watermark, ranges: &[(i64, i64)]) -> Result<Vec<bool>> {
    let Some(source) = Source::find(client, row).await? else { return Ok(vec![false; ranges.len()]) };
    let holders = holders(client, &row.source_table, source.oid).await?;
    let mut found = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        found.push(has_rows(client, &holders, &source.time, (*first, *last)).await?);
    }
    Ok(found)
}

async fn has_rows(
    client: &Client,
    holders: &[Partition],
    time: &TimeColumn,
    (first, last): (i64, i64),
) -> Result<bool> {
    let is_within = time.within(first, last.saturating_add(1));
    for holder in holders {
        let (low, high) = holder.extent.unwrap_or((i64::MIN, i64::MAX));
        if last < low || first >= high {
            continue;
        }
        let query =
            format!("select exists (select from {} where ({}) and {is_within})", holder.from, holder.filter);
        let found = client.query_one(&query, &[]).await.and_then(|row| row.try_get(0));
        if found.map_err(Error::sql(format!("looking for rows in {}", holder.name)))? {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn read(
    client: &impl GenericClient,
    source_table: &str,
    root: u32,
    with_detached: bool,
) -> Result<Vec<Partition>> {
    let failed = || Error::sql(format!("reading the partitions of {source_table}"));
    let mut leaves = Vec::new();
    let query = LEAVES.replace("{IS_ARCHIVED}", IS_ARCHIVED);
    for row in client.query(&query, &[&root, &source_table, &with_detached]).await.map_err(failed())? {
        let oid = row.try_get(0).map_err(failed())?;
        let (schema, table): (String, String) =
            (row.try_get(1).map_err(failed())?, row.try_get(2).map_err(failed())?);
        let quoted = format!("{}.{}", quote_identifier(&schema), quote_identifier(&table));
        // Null where it is gone by now; then the reading says so.
        let may_read = row.try_get::<_, Option<bool>>(6).map_err(failed())?.unwrap_or(true);
        let constraint: Option<String> = row.try_get(7).map_err(failed())?;
        let (from, filter) = if may_read {
            (format!("only {quoted}"), "true".to_owned())
        } else {
            // The constraint is there for the planner, which leaves out the other partitions by it.
            let constraint = constraint.as_deref().unwrap_or("true");
            (row.try_get(8).map_err(failed())?, format!("(tableoid = {oid}::oid and ({constraint}))"))
        };
        let low: Option<i64> = row.try_get(9).map_err(failed())?;
        let bounds = low.zip(row.try_get(10).map_err(failed())?);
        leaves.push(Partition {
            oid,
            from,
            filter,
            may_read,
            quoted,
            file: row.try_get(5).map_err(failed())?,
            name: format!("{schema}.{table}"),
            rows_expected: row.try_get(3).map_err(failed())?,
            is_covered: row.try_get(4).map_err(failed())?,
            bounds,
            extent: bounds,
            attachment: row.try_get(11).map_err(failed())?,
            is_detached: row.try_get(12).map_err(failed())?,
            lacks: row.try_get(13).map_err(failed())?,
        });
    }
    Ok(leaves)
}

/// The condition for rows of transactions that are not below the horizon.
///
/// The rows' own ids have 32 bits. They are compared with the horizon's lower half as ids are compared, within half of their
/// range; one that is further away, from before a wrap-around, is looked at without need, and so are the special ids below 3.
pub(crate) fn not_below(horizon: u64) -> String {
    let low = horizon & 0xFFFF_FFFF;
    format!("(xmin::text::bigint < 3 or ((xmin::text::bigint - {low}) & 4294967295) < 2147483648)")
}

/// What has become of a partition since the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Unchanged,
    /// It has another name, or was rewritten: then it looks empty to an older snapshot (manual section 13.6).
    Changed,
    Dropped,
}

impl Partition {
    /// Asks the catalog as it is now. Under a lock that the reading has taken, the answer holds for what was read.
    pub(crate) async fn fate(&self, client: &Client) -> Result<Fate> {
        let failed = || Error::sql(format!("looking for {}", self.name));
        let answer = client.simple_query(&self.fate_query()).await.map_err(failed())?;
        let row = answer.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        let value = |index| row.map_or(Ok(None), |row| row.try_get(index)).map_err(failed());
        Ok(self.fate_told(value(0)?, value(1)?))
    }

    /// What to ask the catalog: the table's file, and which table has its name.
    pub(super) fn fate_query(&self) -> String {
        let named = quote_literal(&self.quoted);
        format!("select pg_relation_filenode({}::oid::regclass), to_regclass({named})::oid", self.oid)
    }

    /// What the answer to [`fate_query`](Self::fate_query) says.
    pub(super) fn fate_told(&self, file: Option<&str>, named: Option<&str>) -> Fate {
        let is = |text: Option<&str>, oid: u32| text.and_then(|text| text.parse().ok()) == Some(oid);
        match file {
            None => Fate::Dropped,
            _ if self.file.is_some_and(|known| is(file, known)) && is(named, self.oid) => Fate::Unchanged,
            _ => Fate::Changed,
        }
    }

    /// First and last time that the archive can hold, in microseconds since the epoch; `None` if there is no such row, or if
    /// there are others beside them.
    pub(crate) async fn range(&self, client: &Client, time: &TimeColumn) -> Result<Option<(i64, i64)>> {
        if time.time_type == TimeType::None {
            return Ok(None);
        }
        let query = format!(
            "select (extract(epoch from min({0})) * 1000000)::bigint, (extract(epoch from max({0})) * 1000000)::bigint
             from {1} where {2} having isfinite(min({0})) and isfinite(max({0})) and min({0}) >= {3} and max({0}) < {4}",
            time.name,
            self.from,
            self.filter,
            time.literal(CALENDAR.start),
            time.literal(CALENDAR.end)
        );
        let failed = || Error::sql(format!("looking for the range of {}", self.name));
        let Some(row) = client.query_opt(&query, &[]).await.map_err(failed())? else { return Ok(None) };
        let (low, high) = (row.try_get(0).map_err(failed())?, row.try_get(1).map_err(failed())?);
        Ok(Some((low, high)))
    }

    /// The days of the rows that are not below the horizon.
    pub(crate) async fn touched_days(
        &self,
        client: &Client,
        time: &TimeColumn,
        horizon: u64,
    ) -> Result<Days> {
        let query = format!(
            "select distinct {} from {} where {} and {}",
            time.units(MICROS_PER_DAY),
            self.from,
            self.filter,
            not_below(horizon)
        );
        let failed = || Error::sql(format!("looking for rows of {} that may be missing", self.name));
        let mut days = Days::default();
        for row in client.query(&query, &[]).await.map_err(failed())? {
            match row.try_get::<_, Option<i64>>(0).map_err(failed())? {
                Some(day) => days.days.push(day),
                None => days.has_unfit = true,
            }
        }
        days.days.sort_unstable();
        Ok(days)
    }

    /// The rows of these days (`None`: of all), in slices of which neither side has more than about `rows_max` rows, cut at
    /// minutes. `archived` is what the archive has of these days.
    pub(crate) async fn slices(
        &self,
        client: &Client,
        time: &TimeColumn,
        days: Option<&Days>,
        archived: &MinuteCounts,
        rows_max: u64,
    ) -> Result<Vec<Slice>> {
        let query = format!(
            "select {}, count(*) from {} where {} and {} group by 1 order by 1",
            time.units(MICROS_PER_MINUTE),
            self.from,
            self.filter,
            days.map_or_else(|| "true".to_owned(), |days| days.condition(time))
        );
        let failed = || Error::sql(format!("counting the rows of {}", self.name));
        let mut slices = Vec::new();
        let mut counts = MinuteCounts::new();
        for row in client.query(&query, &[]).await.map_err(failed())? {
            let count: i64 = row.try_get(1).map_err(failed())?;
            match row.try_get::<_, Option<i64>>(0).map_err(failed())? {
                Some(minute) => drop(counts.insert(minute, count.unsigned_abs())),
                // They all go to the quarantine, where they are compared one by one.
                None => slices.push(time.unfit()),
            }
        }
        slices.extend(cut(&counts, archived, rows_max).into_iter().map(|ranges| time.slice(ranges)));
        Ok(slices)
    }
}
