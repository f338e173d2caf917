//! `highwater setup`: make the schema, the publication and the rest in the database.

use crate::config::Config;
use crate::error::{Error, Result};

pub(super) async fn setup(_config: &Config) -> Result<()> {
    Err(Error::Internal("`setup` is not built yet".to_owned()))
}
