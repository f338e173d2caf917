//! What Scouter's database knows of its models.

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Row};

use crate::error::{Error, Result};
use crate::postgres::quote_identifier;
use crate::tables::Entity;

/// The model with this uid.
///
/// # Errors
///
/// The query failed. A database that is not Scouter's has none of them, which is no error.
pub(crate) async fn entity_of(client: &Client, schema: &str, uid: &str) -> Result<Option<Entity>> {
    let query = format!(
        "select space::text, name::text, version::text from {}.drift_entities where uid = $1 limit 1",
        quote_identifier(schema)
    );
    let failed = || {
        Error::sql(format!(
            "looking up a model by its uid (the role needs select on {schema}.drift_entities)"
        ))
    };
    let row = client.query_opt(&query, &[&uid]).await.or_else(without_table).map_err(failed())?;
    let of =
        |row: Row| Ok(Entity { space: row.try_get(0)?, name: row.try_get(1)?, version: row.try_get(2)? });
    row.map(of).transpose().map_err(failed())
}

/// The profile against which the drift of a model is measured, as Scouter has it: of `custom`, `psi` or `spc`.
///
/// # Errors
///
/// The query failed. A database that is not Scouter's has none of them, which is no error.
pub(crate) async fn profile(
    client: &Client,
    schema: &str,
    entity: &Entity,
    drift_type: &str,
) -> Result<Option<serde_json::Value>> {
    let query = format!(
        "select profile::jsonb from {}.drift_profile
         where (space, name, version) = ($1, $2, $3) and lower(drift_type) = $4 limit 1",
        quote_identifier(schema)
    );
    let failed = || {
        Error::sql(format!(
            "reading the profile of a model (the role needs select on {schema}.drift_profile)"
        ))
    };
    let row = client.query_opt(&query, &[&entity.space, &entity.name, &entity.version, &drift_type]).await;
    let row = row.or_else(without_table).map_err(failed())?;
    row.map(|row| row.try_get(0)).transpose().map_err(failed())
}

/// A database without the table has no such row.
fn without_table(error: tokio_postgres::Error) -> Result<Option<Row>, tokio_postgres::Error> {
    if error.code() == Some(&SqlState::UNDEFINED_TABLE) { Ok(None) } else { Err(error) }
}
