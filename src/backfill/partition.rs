//! Partitions: which there are, which of their days may lack rows, and in which slices they are read.

use std::fmt;

use chrono::{DateTime, Utc};
use tokio_postgres::Client;

use crate::coverage::{LEAVES, reading};
use crate::error::{Error, Result};
use crate::postgres::quote_identifier;
use crate::record::{CALENDAR, MICROS_PER_DAY};
use crate::watermark::Watermark;

const MICROS_PER_MINUTE: i64 = 60_000_000;

/// Ranges of time in one condition.
const RANGES_MAX: usize = 500;

/// A table that holds rows itself: a leaf of a partition tree, or a plain table.
#[derive(Clone, Debug)]
pub(super) struct Partition {
    pub(super) oid: u32,
    /// With its schema, for people.
    pub(super) name: String,
    /// Where its rows are read from, and under which condition; see [`reading`].
    pub(super) from: String,
    pub(super) filter: String,
    /// The table itself, for a plain `COPY`; `None` if we may read only the root.
    pub(super) itself: Option<String>,
    quoted: String,
    /// The file that it is in: another one means that it was rewritten.
    file: Option<u32>,
    /// It is in `highwater.covered_partition`.
    pub(super) is_covered: bool,
    /// Rows that the planner expects.
    pub(super) rows_expected: f64,
}

/// The leaves under the table of oid `$1`, the oldest range first (a default partition before them).
const IN_ORDER: &str = "
    select c.oid, l.nspname, l.relname, greatest(c.reltuples, 0)::float8,
           exists (select from highwater.covered_partition p where p.source_table = $2 and p.partition_oid = c.oid),
           c.relfilenode, has_table_privilege(c.oid, 'select'), pg_get_partition_constraintdef(c.oid),
           $1::oid::regclass::text
    from leaves l join pg_class c using (oid)
    order by coalesce(pg_get_expr(c.relpartbound, c.oid), ''), c.relname";

pub(super) async fn leaves(client: &Client, row: &Watermark, root: u32) -> Result<Vec<Partition>> {
    let failed = || Error::sql(format!("reading the partitions of {}", row.source_table));
    let query = format!("with leaves as ({LEAVES}) {IN_ORDER}");
    let rows = client.query(&query, &[&root, &row.source_table]).await.map_err(failed())?;
    let mut leaves = Vec::new();
    for row in rows {
        let schema: String = row.try_get(1).map_err(failed())?;
        let table: String = row.try_get(2).map_err(failed())?;
        let oid = row.try_get(0).map_err(failed())?;
        let quoted = format!("{}.{}", quote_identifier(&schema), quote_identifier(&table));
        // Null where it is gone by now; then the reading says so.
        let may_read = row.try_get::<_, Option<bool>>(6).map_err(failed())?.unwrap_or(true);
        let constraint: Option<String> = row.try_get(7).map_err(failed())?;
        let root: String = row.try_get(8).map_err(failed())?;
        let (from, filter) = reading(&quoted, &root, oid, constraint.as_deref(), may_read);
        leaves.push(Partition {
            oid,
            from,
            filter,
            itself: may_read.then(|| quoted.clone()),
            quoted,
            file: row.try_get(5).map_err(failed())?,
            name: format!("{schema}.{table}"),
            rows_expected: row.try_get(3).map_err(failed())?,
            is_covered: row.try_get(4).map_err(failed())?,
        });
    }
    Ok(leaves)
}

/// `created_at`, as SQL compares it.
#[derive(Clone, Copy, Debug)]
pub(super) enum TimeColumn {
    /// `timestamptz`.
    Zoned,
    /// `timestamp`, taken to be UTC.
    Naive,
    /// Missing, or of a type that no archive column holds: every row goes to quarantine.
    None,
}

impl TimeColumn {
    pub(super) const fn of(type_oid: Option<u32>) -> Self {
        match type_oid {
            Some(1184) => Self::Zoned,
            Some(1114) => Self::Naive,
            _ => Self::None,
        }
    }

    /// The condition for rows of these microseconds since the epoch.
    fn within(self, start: i64, end: i64) -> String {
        format!("created_at >= {} and created_at < {}", self.literal(start), self.literal(end))
    }

    fn literal(self, micros: i64) -> String {
        let time = DateTime::<Utc>::from_timestamp_micros(micros).unwrap_or_default();
        // The end of the calendar has a year of five digits, which would get a sign.
        let text = time.format("%Y-%m-%d %H:%M:%S%.6f").to_string();
        let text = text.trim_start_matches('+');
        match self {
            Self::Naive => format!("timestamp '{text}'"),
            Self::Zoned | Self::None => format!("timestamptz '{text}+00'"),
        }
    }

    /// The rows of these times.
    fn slice(self, ranges: Vec<(i64, i64)>) -> Slice {
        let conditions = ranges.iter().map(|(start, end)| format!("({})", self.within(*start, *end)));
        Slice { condition: Some(conditions.collect::<Vec<_>>().join(" or ")), ranges }
    }

    /// The condition for rows whose time the archive can hold.
    fn is_fit(self) -> String {
        match self {
            Self::None => "false".to_owned(),
            _ => {
                let within = self.within(CALENDAR.start, CALENDAR.end);
                format!("(created_at is not null and isfinite(created_at) and {within})")
            }
        }
    }

    /// Units of so many microseconds since the epoch; null where the time is unfit.
    fn units(self, micros: i64) -> String {
        match self {
            Self::None => "null::bigint".to_owned(),
            _ => format!(
                "case when {} then floor(extract(epoch from created_at) / {})::bigint end",
                self.is_fit(),
                micros / 1_000_000
            ),
        }
    }
}

/// Days of `created_at`, in UTC.
#[derive(Clone, Debug, Default)]
pub(super) struct Days {
    /// Numbers of days since the epoch, ascending.
    days: Vec<i64>,
    /// Rows whose time the archive can't hold are among them.
    has_unfit: bool,
}

impl Days {
    pub(super) const fn is_empty(&self) -> bool {
        self.days.is_empty() && !self.has_unfit
    }
}

impl fmt::Display for Days {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, day) in self.days.iter().enumerate() {
            if index == 10 {
                write!(f, " and {} more", self.days.len() - index)?;
                break;
            }
            let time = DateTime::<Utc>::from_timestamp_micros(day.saturating_mul(MICROS_PER_DAY));
            write!(
                f,
                "{}{}",
                if index == 0 { "" } else { " " },
                time.unwrap_or_default().format("%Y-%m-%d")
            )?;
        }
        if self.has_unfit { f.write_str(" and rows without a usable time") } else { Ok(()) }
    }
}

/// A part of a partition that is read at once.
#[derive(Clone, Debug)]
pub(super) struct Slice {
    /// In SQL; `None` for the whole partition.
    pub(super) condition: Option<String>,
    /// Times (first, and first after the last) whose rows are compared with the archive, ascending; none if nothing of the
    /// slice can be there.
    pub(super) ranges: Vec<(i64, i64)>,
}

impl Slice {
    pub(super) const fn whole() -> Self {
        Self { condition: None, ranges: Vec::new() }
    }
}

const fn day_of(micros: i64) -> i64 {
    micros.div_euclid(MICROS_PER_DAY)
}

/// What has become of a partition since the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Unchanged,
    /// It has another name, or was rewritten: then it looks empty to an older snapshot (manual section 13.6).
    Changed,
    Dropped,
}

impl Partition {
    /// Asks the catalog as it is now. Under a lock that the reading has taken, the answer holds for what was read.
    pub(super) async fn fate(&self, client: &Client) -> Result<Fate> {
        let query = "select pg_relation_filenode($1::oid::regclass), to_regclass($2)::oid";
        let failed = || Error::sql(format!("looking for {}", self.name));
        let row = client.query_one(query, &[&self.oid, &self.quoted]).await.map_err(failed())?;
        let file: Option<u32> = row.try_get(0).map_err(failed())?;
        let named: Option<u32> = row.try_get(1).map_err(failed())?;
        Ok(match file {
            None => Fate::Dropped,
            file if file == self.file && named == Some(self.oid) => Fate::Unchanged,
            _ => Fate::Changed,
        })
    }

    /// First and last time that the archive can hold, in microseconds since the epoch; `None` if there is no such row, or if
    /// there are others beside them.
    pub(super) async fn range(&self, client: &Client, time: &TimeColumn) -> Result<Option<(i64, i64)>> {
        if matches!(time, TimeColumn::None) {
            return Ok(None);
        }
        let query = format!(
            "select (extract(epoch from min(created_at)) * 1000000)::bigint, (extract(epoch from max(created_at)) * 1000000)::bigint
             from {} where {} having isfinite(min(created_at)) and isfinite(max(created_at))
                and min(created_at) >= {} and max(created_at) < {}",
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
    ///
    /// The rows' own ids have 32 bits. They are compared with the horizon's lower half as ids are compared, within half of
    /// their range; one that is further away, from before a wrap-around, is looked at without need, and so are the
    /// special ids below 3.
    pub(super) async fn touched_days(
        &self,
        client: &Client,
        time: &TimeColumn,
        horizon: u64,
    ) -> Result<Days> {
        let low = i64::try_from(horizon & 0xFFFF_FFFF).unwrap_or_default();
        let query = format!(
            "select distinct {} from {} where {}
             and (xmin::text::bigint < 3 or ((xmin::text::bigint - $1::bigint) & 4294967295) < 2147483648)",
            time.units(MICROS_PER_DAY),
            self.from,
            self.filter
        );
        let failed = || Error::sql(format!("looking for rows of {} that may be missing", self.name));
        let mut days = Days::default();
        for row in client.query(&query, &[&low]).await.map_err(failed())? {
            match row.try_get::<_, Option<i64>>(0).map_err(failed())? {
                Some(day) => days.days.push(day),
                None => days.has_unfit = true,
            }
        }
        days.days.sort_unstable();
        Ok(days)
    }

    /// The rows of these days (`None`: of all), in slices of at most about `rows_max` rows, cut at minutes.
    pub(super) async fn slices(
        &self,
        client: &Client,
        time: &TimeColumn,
        days: Option<&Days>,
        rows_max: usize,
    ) -> Result<Vec<Slice>> {
        let condition = days.map(|days| {
            let mut conditions: Vec<String> = days
                .days
                .iter()
                .map(|day| time.within(day * MICROS_PER_DAY, (day + 1) * MICROS_PER_DAY))
                .collect();
            if days.has_unfit {
                conditions.push(format!("not coalesce({}, false)", time.is_fit()));
            }
            format!("({})", conditions.join(" or "))
        });
        let query = format!(
            "select {}, count(*) from {} where {} and {} group by 1 order by 1",
            time.units(MICROS_PER_MINUTE),
            self.from,
            self.filter,
            condition.as_deref().unwrap_or("true")
        );
        let failed = || Error::sql(format!("counting the rows of {}", self.name));
        let mut slices = Vec::new();
        let mut open: Vec<(i64, i64)> = Vec::new();
        let mut open_rows = 0_usize;
        for row in client.query(&query, &[]).await.map_err(failed())? {
            let count: i64 = row.try_get(1).map_err(failed())?;
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            let Some(minute) = row.try_get::<_, Option<i64>>(0).map_err(failed())? else {
                // They all go to the quarantine, where they are compared one by one.
                let condition = format!("not coalesce({}, false)", time.is_fit());
                slices.push(Slice { condition: Some(condition), ranges: Vec::new() });
                continue;
            };
            if !open.is_empty() && (open_rows.saturating_add(count) > rows_max || open.len() > RANGES_MAX) {
                slices.push(time.slice(std::mem::take(&mut open)));
                open_rows = 0;
            }
            open_rows += count;
            let (start, end) = (minute * MICROS_PER_MINUTE, (minute + 1) * MICROS_PER_MINUTE);
            match open.last_mut() {
                // Not over days: between them the archive may hold many rows of other partitions.
                Some((_, last)) if day_of(*last - 1) == day_of(start) => *last = end,
                _ => open.push((start, end)),
            }
        }
        if !open.is_empty() {
            slices.push(time.slice(open));
        }
        Ok(slices)
    }
}
