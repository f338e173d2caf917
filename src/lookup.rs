//! Entities by their ids, asked of the entity table.

use crate::decode::ENTITY_TABLE;
use crate::error::{Error, Result};
use crate::postgres::{Session, quote_identifier};
use crate::record::Entity;

/// A session that looks up entities.
#[derive(Debug)]
pub(crate) struct Lookup {
    sql: Session,
    query: String,
}

impl Lookup {
    /// Over this session, in the schema of the drift tables.
    pub(crate) fn new(sql: Session, schema: &str) -> Self {
        let query = format!(
            "select space, name, version from {}.{ENTITY_TABLE} where id = $1::bigint",
            quote_identifier(schema)
        );
        Self { sql, query }
    }

    /// The session, for other questions.
    pub(crate) const fn sql(&mut self) -> &mut Session {
        &mut self.sql
    }

    /// The entity of that id, if there is one.
    ///
    /// # Errors
    ///
    /// The query failed.
    pub(crate) async fn entity(&mut self, id: i64) -> Result<Option<Entity>> {
        let query = self.query.as_str();
        let context = || format!("looking up entity {id}");
        let row = self
            .sql
            .run(async |client| client.query_opt(query, &[&id]).await.map_err(Error::sql(context())))
            .await?;
        let Some(row) = row else { return Ok(None) };
        let column = |index| row.try_get::<_, String>(index).map_err(Error::sql(context()));
        Ok(Some(Entity { space: column(0)?, name: column(1)?, version: column(2)? }))
    }
}
