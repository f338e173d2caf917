//! Scouter's layout, read by DataFusion.

use std::sync::Arc;
use std::time::Instant;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Schema, TimeUnit};
use async_trait::async_trait;
use chrono::{DateTime, Datelike as _, Timelike as _, Utc};
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::{ListingOptions, ListingTable, ListingTableConfig, ListingTableUrl};
use datafusion::prelude::{SessionConfig, SessionContext};
use highwater::reader::BinnedQuery;
use object_store::ObjectStore;
use url::Url;

use crate::answer::Answer;
use crate::contender::{Contender, Place};
use crate::layout::Layout;
use crate::store::Counted;

/// How the files are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// As well as it can be done: the schema is known, folders of other hours are not opened, rows are read once.
    OnePass,
    /// As Scouter's server does it, but for the answer, which is the right one here.
    AsScouter,
}

/// A model's folder, as a table of a new session.
pub(crate) struct Scouter<'a> {
    layout: &'a Layout,
    reading: Reading,
    store: Arc<dyn ObjectStore>,
    counted: Option<Arc<Counted>>,
    session: Option<SessionContext>,
    found: Vec<RecordBatch>,
}

impl<'a> Scouter<'a> {
    pub(crate) fn new(layout: &'a Layout, place: &Place, reading: Reading) -> Self {
        let (store, counted) = place.store();
        Self { layout, reading, store, counted, session: None, found: Vec::new() }
    }

    fn sql(&self, query: &BinnedQuery) -> String {
        let (start, end) = query.range();
        let width = query.bins().micros();
        let time = |micros: i64| {
            let time = DateTime::<Utc>::from_timestamp_micros(micros).expect("a time");
            (time.format("%Y-%m-%dT%H:%M:%S%.6f").to_string(), time)
        };
        let ((first, from), (last, to)) = (time(start), time(end - 1));
        let hours = "year * 1000000 + month * 10000 + day * 100 + hour";
        let hour = |time: DateTime<Utc>| {
            i64::from(time.year()) * 1_000_000
                + i64::from(time.month() * 10_000 + time.day() * 100 + time.hour())
        };
        let entity = query.entity();
        let wanted = format!(
            "created_at between timestamp '{first}' and timestamp '{last}'
               and space = '{}' and name = '{}' and version = '{}'",
            entity.space, entity.name, entity.version
        );
        let bin =
            format!("date_bin(interval '{} seconds', created_at, timestamp '1970-01-01')", width / 1_000_000);
        let micros = "cast(bin as bigint) / 1000";
        let counts =
            format!("select feature, {bin} as bin, bin_id, sum(bin_count) as n from psi where {wanted}");
        let overall =
            "select feature, null, bin_id, cast(sum(n) as double) / sum(sum(n)) over (partition by feature)
                         from counts group by feature, bin_id";
        match self.reading {
            Reading::OnePass => format!(
                "with counts as ({counts} and {hours} between {} and {} group by 1, 2, 3)
                 select feature, case when is_all = 1 then null else {micros} end, bin_id,
                        cast(n as double) / sum(n) over (partition by is_all, feature, bin)
                   from (select feature, bin, bin_id, sum(n) as n, grouping(bin) as is_all from counts
                          group by grouping sets ((feature, bin, bin_id), (feature, bin_id)))",
                hour(from),
                hour(to)
            ),
            Reading::AsScouter => format!(
                "with counts as ({counts} group by 1, 2, 3),
                      totals as (select feature, {bin} as bin, sum(bin_count) as total from psi where {wanted} group by 1, 2)
                 select counts.feature, {micros} as bin, bin_id, cast(n as double) / total
                   from counts join totals on counts.feature = totals.feature and counts.bin = totals.bin
                 union all {overall}",
                micros = "cast(counts.bin as bigint) / 1000"
            ),
        }
    }
}

/// The columns of Scouter's files.
fn schema() -> Schema {
    let texts =
        ["name", "space", "version", "feature"].map(|name| Field::new(name, DataType::Utf8View, false));
    let numbers = ["bin_id", "bin_count"].map(|name| Field::new(name, DataType::UInt64, false));
    let time = Field::new("created_at", DataType::Timestamp(TimeUnit::Nanosecond, None), false);
    Schema::new([time].into_iter().chain(texts).chain(numbers).collect::<Vec<_>>())
}

#[async_trait]
impl Contender for Scouter<'_> {
    fn name(&self) -> &'static str {
        match self.reading {
            Reading::OnePass => "Scouter's layout, one pass",
            Reading::AsScouter => "Scouter's layout, as Scouter",
        }
    }

    async fn open(&mut self, query: &BinnedQuery) -> f64 {
        let start = Instant::now();
        // Scouter sets 8 partitions for its listings.
        let session = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(8));
        session.register_object_store(&Url::parse("file://").expect("a URL"), Arc::clone(&self.store));
        let folder = self.layout.scouter_folder(query.entity());
        let url = ListingTableUrl::parse(format!("{}/", folder.display())).expect("a folder");
        let parts = ["year", "month", "day", "hour"].map(|name| (name.to_owned(), DataType::Int32));
        let options = ListingOptions::new(Arc::new(ParquetFormat::new()))
            .with_file_extension(".parquet")
            .with_table_partition_cols(parts.to_vec());
        let schema = match self.reading {
            Reading::OnePass => Arc::new(schema()),
            Reading::AsScouter => options.infer_schema(&session.state(), &url).await.expect("a schema"),
        };
        let config = ListingTableConfig::new(url).with_listing_options(options).with_schema(schema);
        let table = ListingTable::try_new(config).expect("a table");
        session.register_table("psi", Arc::new(table)).expect("a new table");
        self.session = Some(session);
        start.elapsed().as_secs_f64()
    }

    async fn run(&mut self, query: &BinnedQuery) -> f64 {
        let start = Instant::now();
        let frame = self.session.as_ref().expect("open").sql(&self.sql(query)).await.expect("a query");
        self.found = frame.collect().await.expect("an answer");
        start.elapsed().as_secs_f64()
    }

    async fn answer(&mut self, _query: &BinnedQuery) -> Answer {
        Answer::of_batches(&self.found)
    }

    async fn close(&mut self) {
        self.session = None;
    }

    fn counted(&self) -> Option<(u64, u64)> {
        self.counted.as_ref().map(|counted| counted.now())
    }
}
