//! `highwater run`: archive until told to stop.

use crate::config::Config;
use crate::error::{Error, Result};

pub(super) async fn run(_config: &Config) -> Result<()> {
    Err(Error::Internal("`run` is not built yet".to_owned()))
}
