//! The interface of Scouter's own data archive, over this one. `docs/scouter.md` says what differs.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, Float32Array, Float64Array, ListArray, RecordBatch, StringViewArray, StructArray,
    TimestampNanosecondArray, UInt64Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, FieldRef, Fields, Schema, SchemaRef, TimeUnit};
use arrow::error::ArrowError;
use chrono::{DateTime, Utc};
use datafusion::dataframe::DataFrame;
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;

use super::load::load;
use super::{Archive, BinnedMetrics, BinnedQuery, Bins, FeatureBinProportions, SpcFeatures};
use crate::batch::{Batches, Cell};
use crate::config::{ObjectStorageSettings, StorageType};
use crate::tables::{Entity, Kind, WindowWidth, is_in_calendar};
use crate::{Error, Result};

/// The kinds of records that have a data frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RecordType {
    /// Custom metrics.
    Custom,
    /// Population stability.
    Psi,
    /// Process control.
    Spc,
}

impl RecordType {
    fn kind(self) -> Kind {
        match self {
            Self::Custom => Kind::custom(),
            Self::Psi => Kind::psi(),
            Self::Spc => Kind::spc(),
        }
    }
}

/// A value of a custom metric.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CustomMetricServerRecord {
    /// When it was made; to the microsecond.
    pub created_at: DateTime<Utc>,
    /// The model's space.
    pub space: String,
    /// The model's name.
    pub name: String,
    /// The model's version.
    pub version: String,
    /// The metric.
    pub metric: String,
    /// Its value.
    pub value: f64,
}

/// The count of one bin of a feature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PsiServerRecord {
    /// When it was counted; to the microsecond.
    pub created_at: DateTime<Utc>,
    /// The model's space.
    pub space: String,
    /// The model's name.
    pub name: String,
    /// The model's version.
    pub version: String,
    /// The feature.
    pub feature: String,
    /// The bin; at most 2^31 - 1, as in Postgres.
    pub bin_id: usize,
    /// Its count; at most 2^31 - 1, as in Postgres.
    pub bin_count: usize,
}

/// A value of a feature.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpcServerRecord {
    /// When it was made; to the microsecond.
    pub created_at: DateTime<Utc>,
    /// The model's space.
    pub space: String,
    /// The model's name.
    pub name: String,
    /// The model's version.
    pub version: String,
    /// The feature.
    pub feature: String,
    /// Its value.
    pub value: f64,
}

/// A record of any kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ServerRecord {
    /// A value of a custom metric.
    Custom(CustomMetricServerRecord),
    /// The count of one bin of a feature.
    Psi(PsiServerRecord),
    /// A value of a feature.
    Spc(SpcServerRecord),
}

/// Records that are archived together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ServerRecords {
    /// The records.
    pub records: Vec<ServerRecord>,
}

impl ServerRecords {
    /// These records.
    #[must_use]
    pub const fn new(records: Vec<ServerRecord>) -> Self {
        Self { records }
    }
}

/// The archive's table of one kind, behind a [`ParquetDataFrame`].
#[derive(Debug)]
pub struct KindFrame {
    settings: ObjectStorageSettings,
    kind: Kind,
    archive: OnceCell<Archive>,
}

/// One kind of records, as Scouter's servers write and read it.
///
/// ```no_run
/// use chrono::{Duration, Utc};
/// use highwater::config::ObjectStorageSettings;
/// use highwater::reader::scouter::{ParquetDataFrame, RecordType};
///
/// # async fn example() -> highwater::Result<()> {
/// let frame = ParquetDataFrame::new(&ObjectStorageSettings::default(), &RecordType::Custom)?;
/// let (start, end) = (Utc::now() - Duration::days(30), Utc::now());
/// let binned = frame.get_binned_metrics("", &60.0, &start, &end, "shop", "ranking", "2.1.0").await?;
/// println!("{} metrics", binned.count().await.unwrap_or_default());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub enum ParquetDataFrame {
    /// Custom metrics.
    CustomMetric(KindFrame),
    /// Population stability.
    Psi(KindFrame),
    /// Process control.
    Spc(KindFrame),
}

impl ParquetDataFrame {
    /// A data frame over the archive at a storage URI. Nothing is read or written yet.
    ///
    /// # Errors
    ///
    /// None today: settings that can't be used are refused by [`ObjectStorageSettings::new`].
    pub fn new(settings: &ObjectStorageSettings, record_type: &RecordType) -> Result<Self> {
        let kind = record_type.kind();
        let frame = KindFrame { settings: settings.clone(), kind, archive: OnceCell::new() };
        Ok(match record_type {
            RecordType::Custom => Self::CustomMetric(frame),
            RecordType::Psi => Self::Psi(frame),
            RecordType::Spc => Self::Spc(frame),
        })
    }

    /// Adds records, in one log entry: all of them or none. `rpath` and the records together name the load: one that is
    /// repeated, after an error whose outcome is unknown, say, changes nothing. A record that is equal to another one of the
    /// load is kept as well.
    ///
    /// The archive may be one that `highwater run` writes to at the same time. What is loaded has no rows in the database
    /// that it archives, so `highwater verify` reports these as rows that Postgres has not.
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if a record is of another kind, or a value is beyond what the archive holds; then nothing was added.
    /// [`Error::Storage`] and [`Error::Delta`] if the archive can't be written, [`Error::Fenced`] if the same load is made by
    /// somebody else at the same time: make it again.
    pub async fn write_parquet(&self, rpath: &str, records: ServerRecords) -> Result<()> {
        let frame = self.frame();
        let mut batches = Batches::new(WindowWidth::HOUR, Utc::now().timestamp_micros());
        for record in &records.records {
            push(&mut batches, frame.kind, record)?;
        }
        load(&frame.settings, frame.kind, rpath, batches).await
    }

    /// The binned metrics of a model with `start_time <= created_at < end_time`, in bins of so many minutes: one row, and one
    /// record batch, for each metric or feature, with lists in ascending order of time. `path` is not needed: a kind is one
    /// table.
    ///
    /// | kind | columns |
    /// | --- | --- |
    /// | custom | `metric`, `created_at` list, `stats` list of `avg`, `lower_bound`, `upper_bound` |
    /// | psi | `feature`, `created_at` list, `bin_proportions` list of lists `bin_id` and `proportion`, `overall_proportions` |
    /// | spc | `feature`, `created_at` list, `values` list |
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if the bin or the range can't be used; otherwise as [`Archive::open`] and
    /// [`Archive::binned_custom`].
    #[expect(clippy::too_many_arguments, reason = "the interface is Scouter's")]
    pub async fn get_binned_metrics(
        &self,
        _path: &str,
        bin: &f64,
        start_time: &DateTime<Utc>,
        end_time: &DateTime<Utc>,
        space: &str,
        name: &str,
        version: &str,
    ) -> Result<DataFrame> {
        let entity = Entity { space: space.to_owned(), name: name.to_owned(), version: version.to_owned() };
        let query = BinnedQuery::new(entity, *start_time, *end_time, Bins::from_minutes(*bin)?)?;
        let frame = self.frame();
        let archive = frame.archive.get_or_try_init(|| Archive::open(&frame.settings)).await?;
        archive.refresh().await?;
        let failed = |source: ArrowError| Error::Encode {
            context: format!("building a frame of {}", frame.kind.name()),
            source: Box::new(source),
        };
        let (schema, batches) = match self {
            Self::CustomMetric(_) => (custom_schema(), custom_batches(&archive.binned_custom(&query).await?)),
            Self::Psi(_) => (psi_schema(), psi_batches(&archive.binned_psi(&query).await?)),
            Self::Spc(_) => (spc_schema(), spc_batches(&archive.binned_spc(&query).await?)),
        };
        let mut batches = batches.map_err(failed)?;
        if batches.is_empty() {
            batches.push(RecordBatch::new_empty(schema));
        }
        archive.read_batches(batches)
    }

    /// The storage URI without its scheme.
    #[must_use]
    pub fn storage_root(&self) -> String {
        self.frame().settings.storage_root().to_owned()
    }

    /// The kind of store that the archive is in.
    #[must_use]
    pub const fn storage_type(&self) -> StorageType {
        self.frame().settings.storage_type
    }

    const fn frame(&self) -> &KindFrame {
        match self {
            Self::CustomMetric(frame) | Self::Psi(frame) | Self::Spc(frame) => frame,
        }
    }
}

/// Appends a record, if it is of the kind, and one that the archive can hold.
fn push(batches: &mut Batches, kind: Kind, record: &ServerRecord) -> Result<()> {
    let (found, created_at, entity, series) = match record {
        ServerRecord::Custom(r) => (Kind::custom(), r.created_at, [&r.space, &r.name, &r.version], &r.metric),
        ServerRecord::Psi(r) => (Kind::psi(), r.created_at, [&r.space, &r.name, &r.version], &r.feature),
        ServerRecord::Spc(r) => (Kind::spc(), r.created_at, [&r.space, &r.name, &r.version], &r.feature),
    };
    let refused = |detail: String| Err(Error::Query { detail });
    if found != kind {
        return refused(format!(
            "a record is of kind {}, but the frame of kind {}",
            found.name(),
            kind.name()
        ));
    }
    let micros = created_at.timestamp_micros();
    if !is_in_calendar(micros) {
        return refused(format!("a record's created_at is {created_at}, but must be of the years 1 to 9999"));
    }
    if entity.iter().any(|text| text.contains('\0')) || series.contains('\0') {
        return refused("a record's text holds a zero byte, which no text of PostgreSQL does".to_owned());
    }
    let [space, name, version] = entity.map(String::as_bytes);
    let ids = batches.entity(&[space, name, version]).zip(batches.text(series.as_bytes()));
    let Some((entity, series)) = ids else { return refused("a record's text is not UTF-8".to_owned()) };
    let series = Cell::Text(series);
    match record {
        ServerRecord::Custom(CustomMetricServerRecord { value, .. })
        | ServerRecord::Spc(SpcServerRecord { value, .. }) => {
            batches.push(kind, entity, micros, &[series, Cell::Double(*value)]);
        }
        ServerRecord::Psi(record) => {
            let (Ok(id), Ok(count)) = (i32::try_from(record.bin_id), i32::try_from(record.bin_count)) else {
                return refused(format!(
                    "bin {} with {} is beyond 2^31 - 1",
                    record.bin_id, record.bin_count
                ));
            };
            batches.push(kind, entity, micros, &[series, Cell::Int(id), Cell::Int(count)]);
        }
    }
    Ok(())
}

fn item(data_type: DataType) -> FieldRef {
    Arc::new(Field::new_list_field(data_type, true))
}

fn list_of(data_type: DataType) -> DataType {
    DataType::List(item(data_type))
}

fn struct_of<const N: usize>(fields: [(&str, DataType); N]) -> Fields {
    fields.into_iter().map(|(name, data_type)| Field::new(name, data_type, true)).collect()
}

fn schema<const N: usize>(fields: [(&str, DataType); N]) -> SchemaRef {
    Arc::new(Schema::new(struct_of(fields)))
}

const TIME: DataType = DataType::Timestamp(TimeUnit::Nanosecond, None);

fn stats_fields() -> Fields {
    struct_of(["avg", "lower_bound", "upper_bound"].map(|name| (name, DataType::Float64)))
}

fn bins_fields() -> Fields {
    struct_of([("bin_id", list_of(DataType::UInt64)), ("proportion", list_of(DataType::Float32))])
}

fn custom_schema() -> SchemaRef {
    let stats = list_of(DataType::Struct(stats_fields()));
    schema([("metric", DataType::Utf8View), ("created_at", list_of(TIME)), ("stats", stats)])
}

fn spc_schema() -> SchemaRef {
    let values = list_of(DataType::Float64);
    schema([("feature", DataType::Utf8View), ("created_at", list_of(TIME)), ("values", values)])
}

fn psi_schema() -> SchemaRef {
    let bins = DataType::Struct(bins_fields());
    schema([
        ("feature", DataType::Utf8View),
        ("created_at", list_of(TIME)),
        ("bin_proportions", list_of(bins.clone())),
        ("overall_proportions", bins),
    ])
}

/// One list with these values.
fn list(values: ArrayRef) -> Result<ArrayRef, ArrowError> {
    let length = values.len();
    lists(values, [length])
}

/// Lists of these lengths, one after the other.
fn lists(values: ArrayRef, lengths: impl IntoIterator<Item = usize>) -> Result<ArrayRef, ArrowError> {
    let field = item(values.data_type().clone());
    Ok(Arc::new(ListArray::try_new(field, OffsetBuffer::from_lengths(lengths), values, None)?))
}

fn text(value: &str) -> ArrayRef {
    Arc::new(StringViewArray::from(vec![value]))
}

/// Starts of bins, which nanoseconds know from 1677 to 2262 only.
fn times(times: &[DateTime<Utc>]) -> Result<ArrayRef, ArrowError> {
    let nanos = times.iter().map(|time| {
        let refused = || ArrowError::ComputeError(format!("{time} has no place in a column of nanoseconds"));
        time.timestamp_nanos_opt().ok_or_else(refused)
    });
    list(Arc::new(TimestampNanosecondArray::from(nanos.collect::<Result<Vec<_>, _>>()?)))
}

fn custom_batches(found: &BinnedMetrics) -> Result<Vec<RecordBatch>, ArrowError> {
    let batch = |metric: &super::BinnedMetric| {
        let column = |of: fn(&super::BinnedMetricStats) -> f64| {
            Arc::new(metric.stats.iter().map(of).map(Some).collect::<Float64Array>()) as ArrayRef
        };
        let columns = vec![
            column(|stats| stats.avg),
            column(|stats| stats.lower_bound),
            column(|stats| stats.upper_bound),
        ];
        let stats = list(Arc::new(StructArray::try_new(stats_fields(), columns, None)?))?;
        let columns = vec![text(&metric.metric), times(&metric.created_at)?, stats];
        RecordBatch::try_new(custom_schema(), columns)
    };
    found.metrics.values().map(batch).collect()
}

fn spc_batches(found: &SpcFeatures) -> Result<Vec<RecordBatch>, ArrowError> {
    let batch = |(name, feature): (&String, &super::SpcFeature)| {
        let values = list(Arc::new(Float64Array::from(feature.values.clone())))?;
        RecordBatch::try_new(spc_schema(), vec![text(name), times(&feature.created_at)?, values])
    };
    found.features.iter().map(batch).collect()
}

fn psi_batches(found: &[FeatureBinProportions]) -> Result<Vec<RecordBatch>, ArrowError> {
    let batch = |feature: &FeatureBinProportions| {
        let overall = bins(std::slice::from_ref(&feature.overall_proportions))?;
        let columns = vec![
            text(&feature.feature),
            times(&feature.created_at)?,
            list(Arc::new(bins(&feature.bin_proportions)?))?,
            Arc::new(overall),
        ];
        RecordBatch::try_new(psi_schema(), columns)
    };
    found.iter().map(batch).collect()
}

/// Proportions by bin as Scouter has them, with 32 bits.
fn bins(proportions: &[BTreeMap<i32, f64>]) -> Result<StructArray, ArrowError> {
    let lengths = || proportions.iter().map(BTreeMap::len);
    let ids = proportions.iter().flat_map(|bins| bins.keys());
    // A negative bin, which Scouter has no type for, stays told from the others.
    let ids: UInt64Array = ids.map(|id| Some(i64::from(*id).cast_unsigned())).collect();
    #[expect(clippy::cast_possible_truncation, reason = "the interface has 32 bits")]
    let parts: Float32Array =
        proportions.iter().flat_map(|bins| bins.values()).map(|part| Some(*part as f32)).collect();
    let columns = vec![lists(Arc::new(ids), lengths())?, lists(Arc::new(parts), lengths())?];
    StructArray::try_new(bins_fields(), columns, None)
}
