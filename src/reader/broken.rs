//! [`Broken`]: a table that can't be read, among others that can.

use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::{Expr, TableType};
use datafusion::physical_plan::ExecutionPlan;

use crate::tables::Kind;

/// Answers every query of a table with what is wrong with it.
#[derive(Debug)]
pub(super) struct Broken {
    kind: Kind,
    why: String,
}

impl Broken {
    pub(super) const fn new(kind: Kind, why: String) -> Self {
        Self { kind, why }
    }

    pub(super) const fn kind(&self) -> Kind {
        self.kind
    }
}

#[async_trait]
impl TableProvider for Broken {
    fn schema(&self) -> SchemaRef {
        self.kind.schema()
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    async fn scan(
        &self,
        _: &dyn Session,
        _: Option<&Vec<usize>>,
        _: &[Expr],
        _: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        Err(DataFusionError::External(self.why.clone().into()))
    }
}
