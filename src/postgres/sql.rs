//! Placeholder, replaced at the merge.

use crate::config::SourceConfig;
use crate::error::{Error, Result};

/// Connects.
///
/// # Errors
///
/// Whatever the server or network says.
pub async fn connect(source: &SourceConfig) -> Result<tokio_postgres::Client> {
    let (client, connection) =
        source.inner.connect(tokio_postgres::NoTls).await.map_err(Error::sql("connecting"))?;
    tokio::spawn(connection);
    Ok(client)
}
