//! `highwater --watermarks`: how far the archive reaches.

use super::Format;
use crate::config::Config;
use crate::error::{Error, Result};

pub(super) async fn watermarks(_config: &Config, _format: Format) -> Result<()> {
    Err(Error::Internal("`--watermarks` is not built yet".to_owned()))
}
