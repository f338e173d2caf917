use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use async_trait::async_trait;
use chrono::DateTime;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::DFSchema;
use datafusion::datasource::file_format::FileFormat;
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::physical_plan::{FileGroup, FileScanConfigBuilder, ParquetSource};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::logical_expr::utils::conjunction;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown, TableType};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::prelude::{SessionConfig, SessionContext};
use object_store::ObjectMeta;
use object_store::path::Path;

use super::{Storage, TableFile};
use crate::record::{ColumnType, Kind};

/// Bytes of a file's end that are fetched first; they hold the footer of most files.
const FOOTER_BYTES: usize = 64 * 1024;

/// Some files of a table, as one version of its log has them, to be queried by DataFusion.
#[derive(Debug)]
pub(super) struct Scan {
    schema: SchemaRef,
    url: ObjectStoreUrl,
    files: Vec<PartitionedFile>,
}

/// A session that reads the tables of an archive.
pub(super) fn session() -> SessionContext {
    let mut config = SessionConfig::new();
    let options = config.options_mut();
    // A file that is split is opened once for each part.
    options.optimizer.repartition_file_scans = false;
    options.execution.parquet.schema_force_view_types = false;
    SessionContext::new_with_config(config)
}

impl Scan {
    /// These files of a kind's table. Registers the table's store with the session.
    pub(super) fn new<'a>(
        session: &SessionContext,
        storage: &Storage,
        kind: Kind,
        files: impl IntoIterator<Item = &'a TableFile>,
    ) -> Result<Self> {
        let url = ObjectStoreUrl::parse(format!("highwater://{}", kind.name()))?;
        session.register_object_store(url.as_ref(), storage.table_store(kind));
        Ok(Self { schema: schema(kind), url, files: files.into_iter().map(partitioned).collect() })
    }
}

/// A kind's columns as queries see them.
fn schema(kind: Kind) -> SchemaRef {
    let field = |name: &str, column_type, nullable| {
        let data_type = match column_type {
            ColumnType::Timestamp => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
            ColumnType::String => DataType::Utf8,
            ColumnType::Double => DataType::Float64,
            ColumnType::Int => DataType::Int32,
        };
        Field::new(name, data_type, nullable)
    };
    let columns = kind.columns().iter();
    let fields: Vec<Field> =
        columns.map(|column| field(column.name, column.column_type, column.nullable)).collect();
    Arc::new(Schema::new(fields))
}

fn partitioned(file: &TableFile) -> PartitionedFile {
    PartitionedFile::from(ObjectMeta {
        location: Path::from(file.path.as_str()),
        last_modified: DateTime::from_timestamp_millis(file.modified_millis).unwrap_or_default(),
        size: file.size,
        e_tag: None,
        version: None,
    })
}

#[async_trait]
impl TableProvider for Scan {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    /// They prune row groups and pages, no more.
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
        if let Some(filter) = conjunction(filters.to_vec()) {
            let schema = DFSchema::try_from(Arc::clone(&self.schema))?;
            source = source.with_predicate(state.create_physical_expr(filter, &schema)?);
        }
        let groups = FileGroup::new(self.files.clone()).split_files(state.config().target_partitions());
        let scan = FileScanConfigBuilder::new(self.url.clone(), Arc::new(source))
            .with_file_groups(groups)
            .with_projection_indices(projection.cloned())?
            .with_limit(limit)
            .build();
        let format = ParquetFormat::default().with_metadata_size_hint(Some(FOOTER_BYTES));
        format.create_physical_plan(state, scan).await
    }
}

impl crate::Error {
    /// Wraps a failure of a query; what storage caused is a storage failure, worth a retry.
    pub(super) fn query(context: impl Into<String>) -> impl FnOnce(DataFusionError) -> Self {
        let context = context.into();
        move |error| match error {
            DataFusionError::ObjectStore(source) => Self::Storage { context, source: *source },
            DataFusionError::ParquetError(source) => super::parquet_error(context)(*source),
            error => Self::Encode { context, source: Box::new(error) },
        }
    }
}
