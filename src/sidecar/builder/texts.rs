use std::sync::Arc;

use crate::postgres::Encoding;
use crate::sidecar::wants::Wants;

/// How the stream sends texts.
#[derive(Clone, Debug)]
pub(crate) struct Texts {
    /// How names are to be read; values are read by the decoder.
    pub(crate) encoding: Encoding,
    /// All values come as text.
    pub(crate) is_all: bool,
    /// What the next session is to do otherwise.
    pub(crate) wants: Arc<Wants>,
}
