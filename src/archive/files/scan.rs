use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, FieldRef, Fields, Schema, SchemaRef};
use async_trait::async_trait;
use chrono::DateTime;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::pruning::PruningStatistics;
use datafusion::common::{Column, DFSchema, ScalarValue};
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::physical_plan::{FileGroup, FileScanConfigBuilder, ParquetSource};
use datafusion::datasource::source::DataSourceExec;
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::memory_pool::FairSpillPool;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use datafusion::logical_expr::utils::conjunction;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown, TableType};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_optimizer::pruning::PruningPredicateBuilder;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::empty::EmptyExec;
use datafusion::prelude::{SessionConfig, SessionContext};
use object_store::ObjectMeta;
use object_store::limit::LimitStore;
use object_store::path::Path;
use serde_json::Value;
use url::Url;

use super::footers::Footers;
use super::table_file::TableFile;
use crate::archive::store::storage::Storage;
use crate::tables::Kind;

/// Requests to storage at the same time, of all queries together: enough to hide its latency, few enough for its limits.
const REQUESTS_MAX: usize = 64;

/// Parts that a query is run in. More than there are cores, because a part waits for storage most of its time.
const PARTS_MAX: usize = 16;

/// Memory that a part should have for what it sorts or groups.
const PART_BYTES: usize = 16 << 20;

/// Memory for what is sorted and grouped, where nobody says otherwise.
pub(crate) const MEMORY_BYTES: usize = 1 << 30;

/// What the queries of a reader may have on disk at a time.
const DISK_BYTES_MAX: u64 = 20 << 30;

/// Memory that each part of a sort sets aside, whether it needs it or not, to merge what it sends to disk. DataFusion's 10 MB
/// would let no more than six queries sort at a time.
const SORT_RESERVATION_BYTES: usize = 64 << 10;

/// Memory for the footers of files that were read.
const METADATA_BYTES_MAX: usize = 256 << 20;

/// The store of the archive, as sessions know it.
const STORE_URL: &str = "highwater://archive";

/// What the sessions of a reader share: the store, with a limit to requests, the footers that were read, and so many bytes of
/// memory for what is sorted and grouped.
pub(crate) fn runtime(storage: &Storage, memory_bytes: usize) -> Result<Arc<RuntimeEnv>> {
    let runtime = RuntimeEnvBuilder::new()
        .with_metadata_cache_limit(METADATA_BYTES_MAX.min(memory_bytes / 4))
        // Each of those that can go to disk gets its share; whoever came first would take it all otherwise.
        .with_memory_pool(Arc::new(FairSpillPool::new(memory_bytes)))
        .with_max_temp_directory_size(DISK_BYTES_MAX)
        .build_arc()?;
    let url = Url::parse(STORE_URL).map_err(|error| DataFusionError::External(Box::new(error)))?;
    // One store for all tables: footers are cached by path.
    runtime.register_object_store(&url, Arc::new(LimitStore::new(storage.store(), REQUESTS_MAX)));
    Ok(runtime)
}

/// A session that reads the tables of an archive, in fewer parts where there is little memory for them.
pub(crate) fn session(runtime: Arc<RuntimeEnv>, memory_bytes: usize) -> SessionContext {
    let parts = (memory_bytes / PART_BYTES).clamp(2, PARTS_MAX);
    let mut config = SessionConfig::new().with_target_partitions(parts);
    let options = config.options_mut();
    // A file that is split is opened once for each part.
    options.optimizer.repartition_file_scans = false;
    options.execution.parquet.schema_force_view_types = false;
    options.execution.sort_spill_reservation_bytes = SORT_RESERVATION_BYTES;
    options.execution.time_zone = Some("UTC".to_owned());
    SessionContext::new_with_config_rt(config, runtime)
}

/// Some files of a table, as one version of its log has them, to be queried by DataFusion.
#[derive(Clone, Debug)]
pub(crate) struct Scan {
    schema: SchemaRef,
    url: ObjectStoreUrl,
    files: Vec<PartitionedFile>,
    bounds: Bounds,
}

impl Scan {
    /// These files of a kind's table, of the archive that the session's runtime was made for.
    pub(crate) fn new<'a>(kind: Kind, files: impl IntoIterator<Item = &'a TableFile>) -> Result<Self> {
        let files: Vec<&TableFile> = files.into_iter().collect();
        Ok(Self {
            schema: kind.schema(),
            url: ObjectStoreUrl::parse(STORE_URL)?,
            bounds: Bounds::new(kind, &files),
            files: files.iter().map(|file| partitioned(kind, file)).collect::<Result<_>>()?,
        })
    }

    /// The same files, their texts as views of what a page holds: without a copy for each row.
    pub(crate) fn with_text_views(&self) -> Self {
        let viewed = |field: &FieldRef| match field.data_type() {
            DataType::Utf8 => Arc::new(field.as_ref().clone().with_data_type(DataType::Utf8View)),
            _ => Arc::clone(field),
        };
        let fields: Fields = self.schema.fields().iter().map(viewed).collect();
        Self { schema: Arc::new(Schema::new(fields)), ..self.clone() }
    }

    /// The files that may hold rows for which the condition is true, as far as the log's statistics say.
    fn prune(&self, condition: &Arc<dyn PhysicalExpr>) -> Result<Vec<PartitionedFile>> {
        let builder = PruningPredicateBuilder::new().with_file_schema(Arc::clone(&self.schema));
        let Some(pruning) = builder.build(Arc::clone(condition)) else { return Ok(self.files.clone()) };
        let may_match = pruning.prune(&self.bounds)?;
        Ok(self.files.iter().zip(may_match).filter(|(_, keep)| *keep).map(|(file, _)| file.clone()).collect())
    }
}

fn partitioned(kind: Kind, file: &TableFile) -> Result<PartitionedFile> {
    let location = Path::parse(format!("{}/{}", kind.name(), file.path))
        .map_err(|error| DataFusionError::External(Box::new(error)))?;
    Ok(PartitionedFile::from(ObjectMeta {
        location,
        last_modified: DateTime::from_timestamp_millis(file.modified_millis).unwrap_or_default(),
        size: file.size,
        e_tag: None,
        version: None,
    }))
}

/// Smallest and largest values of the time and entity columns, per file; null where the log does not say.
#[derive(Clone, Debug)]
struct Bounds {
    file_count: usize,
    columns: Vec<(&'static str, ArrayRef, ArrayRef)>,
}

impl Bounds {
    fn new(kind: Kind, files: &[&TableFile]) -> Self {
        // Other writers cut the fractions of a millisecond off, also of the largest time.
        let latest = |file: &TableFile| Some(file.max_time? + if file.name.is_some() { 0 } else { 999 });
        let times = |of: &dyn Fn(&TableFile) -> Option<i64>| {
            let times: TimestampMicrosecondArray = files.iter().map(|file| of(file)).collect();
            Arc::new(times.with_timezone("UTC")) as ArrayRef
        };
        let mut columns = vec![(kind.time_column(), times(&|file| file.min_time), times(&latest))];
        let stats =
            files.iter().map(|file| file.stats.as_deref().and_then(|text| serde_json::from_str(text).ok()));
        let stats: Vec<Value> = stats.map(Option::unwrap_or_default).collect();
        let texts = |bound: &str, column: &str| {
            let pointer = format!("/{bound}/{column}");
            let texts = stats.iter().map(|stats| stats.pointer(&pointer).and_then(Value::as_str));
            Arc::new(texts.collect::<StringArray>()) as ArrayRef
        };
        let bounds =
            |name: &'static String| (name.as_str(), texts("minValues", name), texts("maxValues", name));
        columns.extend(kind.entity_columns().iter().map(bounds));
        Self { file_count: files.len(), columns }
    }

    fn of(&self, column: &Column) -> Option<&(&'static str, ArrayRef, ArrayRef)> {
        self.columns.iter().find(|(name, ..)| *name == column.name)
    }
}

impl PruningStatistics for Bounds {
    fn min_values(&self, column: &Column) -> Option<ArrayRef> {
        self.of(column).map(|(_, low, _)| Arc::clone(low))
    }

    fn max_values(&self, column: &Column) -> Option<ArrayRef> {
        self.of(column).map(|(.., high)| Arc::clone(high))
    }

    fn num_containers(&self) -> usize {
        self.file_count
    }

    fn null_counts(&self, _column: &Column) -> Option<ArrayRef> {
        None
    }

    fn row_counts(&self) -> Option<ArrayRef> {
        None
    }

    fn contained(
        &self,
        _column: &Column,
        _values: &std::collections::HashSet<ScalarValue>,
    ) -> Option<BooleanArray> {
        None
    }
}

#[async_trait]
impl TableProvider for Scan {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    /// They prune files, row groups and pages, no more.
    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> Result<Vec<TableProviderFilterPushDown>> {
        Ok(vec![TableProviderFilterPushDown::Inexact; filters.len()])
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let mut source = ParquetSource::new(Arc::clone(&self.schema));
        let mut files = None;
        if let Some(filter) = conjunction(filters.to_vec()) {
            let schema = DFSchema::try_from(Arc::clone(&self.schema))?;
            let condition = state.create_physical_expr(filter, &schema)?;
            files = Some(self.prune(&condition)?);
            source = source.with_predicate(condition);
        }
        let files = files.unwrap_or_else(|| self.files.clone());
        if files.is_empty() {
            let schema = datafusion::common::project_schema(&self.schema, projection)?;
            return Ok(Arc::new(EmptyExec::new(schema)));
        }
        let groups = FileGroup::new(files).split_files(state.config().target_partitions());
        let runtime = state.runtime_env();
        let footers =
            Footers::new(runtime.object_store(&self.url)?, runtime.cache_manager.get_file_metadata_cache());
        let source = source.with_parquet_file_reader_factory(Arc::new(footers));
        let scan = FileScanConfigBuilder::new(self.url.clone(), Arc::new(source))
            .with_file_groups(groups)
            .with_projection_indices(projection.cloned())?
            .with_limit(limit)
            .build();
        Ok(DataSourceExec::from_data_source(scan))
    }
}

impl crate::Error {
    /// Wraps a failure of a query; what storage caused is a storage failure, worth a retry.
    pub(crate) fn query(context: impl Into<String>) -> impl FnOnce(DataFusionError) -> Self {
        let context = context.into();
        move |error| match error {
            DataFusionError::ObjectStore(source) => Self::Storage { context, source: *source },
            DataFusionError::ParquetError(source) => crate::archive::error::parquet_error(context)(*source),
            error if matches!(error.find_root(), DataFusionError::ResourcesExhausted(_)) => Self::Query {
                detail: format!(
                    "{context}: what it sorts, groups or joins does not fit the memory, nor can it go to disk; --memory gives it \
                     more ({})",
                    error.strip_backtrace()
                ),
            },
            error => Self::Encode { context, source: Box::new(error) },
        }
    }

    /// The same for a query that somebody else has written: what is wrong is wrong with that.
    pub(crate) fn asked(context: &'static str) -> impl FnOnce(DataFusionError) -> Self {
        move |error| match error.find_root() {
            DataFusionError::ObjectStore(_)
            | DataFusionError::ParquetError(_)
            | DataFusionError::IoError(_)
            | DataFusionError::External(_)
            | DataFusionError::ResourcesExhausted(_) => Self::query(context)(error),
            _ => Self::Query { detail: error.strip_backtrace() },
        }
    }
}

#[cfg(test)]
mod tests {
    use datafusion::logical_expr::{col, lit};
    use datafusion::physical_plan::displayable;

    use super::*;
    use crate::config::ObjectStorageSettings;

    /// A file of the archive, or of another writer, by its bounds.
    fn file(path: &str, times: [&str; 2], names: [&str; 2]) -> TableFile {
        let bounds =
            |time, name| serde_json::json!({"created_at": time, "space": "s", "name": name, "version": "1"});
        let [first, last] = times;
        let [low, high] = names;
        let stats = serde_json::json!({"numRecords": 1, "minValues": bounds(first, low), "maxValues": bounds(last, high)});
        TableFile::new(Kind::psi(), path.to_owned(), 1, 0, Some(stats.to_string()))
    }

    const OURS: &str = "2026/11/22/13-0000000000000001-00000000-0000.parquet";

    /// The files that a query opens.
    async fn opened(condition: Expr) -> Vec<&'static str> {
        let morning = ["2026-11-22T06:00:00.000Z", "2026-11-22T07:00:00.000Z"];
        let noon = ["2026-11-22T12:00:00.000Z", "2026-11-22T13:00:00.000Z"];
        let files = [
            file("a-morning.parquet", morning, ["a", "a"]),
            file("b-morning.parquet", morning, ["b", "b"]),
            file("all-noon.parquet", noon, ["a", "z"]),
            file(OURS, noon, ["y", "y"]),
            TableFile::new(Kind::psi(), "unknown.parquet".to_owned(), 1, 0, None),
        ];
        let folder = tempfile::tempdir().unwrap();
        let settings = ObjectStorageSettings::new(folder.path().to_str().unwrap(), "").unwrap();
        let session =
            session(runtime(&Storage::open(&settings).unwrap(), MEMORY_BYTES).unwrap(), MEMORY_BYTES);
        let rows = session.read_table(Arc::new(Scan::new(Kind::psi(), &files).unwrap())).unwrap();
        let plan = rows.filter(condition).unwrap().create_physical_plan().await.unwrap();
        let plan = displayable(plan.as_ref()).indent(true).to_string();
        let names = ["a-morning", "b-morning", "all-noon", OURS, "unknown"];
        names.into_iter().filter(|name| plan.contains(name)).collect()
    }

    fn time(text: &str) -> Expr {
        let micros = text.parse::<DateTime<chrono::Utc>>().unwrap().timestamp_micros();
        lit(ScalarValue::TimestampMicrosecond(Some(micros), Some("UTC".into())))
    }

    #[tokio::test]
    async fn files_of_other_entities_and_times_are_not_opened() {
        let is = |name: &str| col("name").eq(lit(name));
        assert_eq!(opened(is("a")).await, ["a-morning", "all-noon", "unknown"]);
        assert_eq!(opened(is("y")).await, ["all-noon", OURS, "unknown"]);
        assert_eq!(opened(col("space").eq(lit("other"))).await, ["unknown"]);
        let after = |text| col("created_at").gt_eq(time(text));
        assert_eq!(opened(after("2026-11-22T07:30:00Z")).await, ["all-noon", OURS, "unknown"]);
        assert_eq!(opened(is("a").and(after("2026-11-22T07:30:00Z"))).await, ["all-noon", "unknown"]);
        let before = |text| col("created_at").lt(time(text));
        assert_eq!(opened(before("2026-11-22T06:00:00Z")).await, ["unknown"]);
        assert_eq!(
            opened(before("2026-11-22T06:00:00.000001Z")).await,
            ["a-morning", "b-morning", "unknown"]
        );
        assert_eq!(opened(col("bin_id").eq(lit(1))).await.len(), 5, "of which the log says nothing");
    }

    /// Ours are rounded up; the times of others may be cut to milliseconds.
    #[tokio::test]
    async fn the_last_millisecond_of_another_writer_counts() {
        let after = |text| col("created_at").gt_eq(time(text));
        assert_eq!(opened(after("2026-11-22T13:00:00.000999Z")).await, ["all-noon", "unknown"]);
        assert_eq!(opened(after("2026-11-22T13:00:00.001Z")).await, ["unknown"]);
        assert_eq!(opened(after("2026-11-22T13:00:00Z")).await, ["all-noon", OURS, "unknown"]);
    }
}
