//! What tells an answer from another one: its entity tag (RFC 9110, section 8.8.3).

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use sha2::{Digest as _, Sha256};

use super::problem::Problem;

/// What an answer is made of: the versions of the tables that it reads, and all that was asked. Equal ones have equal answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tag(String);

impl Tag {
    /// Of these versions of tables, and what was asked of them.
    pub(super) fn of(versions: &[(&'static str, Option<u64>)], asked: &str) -> Self {
        let digest = Sha256::digest(format!("{}{versions:?}{asked}", env!("CARGO_PKG_VERSION")));
        Self(format!("\"{}\"", hex(digest.get(..16).unwrap_or_default())))
    }

    /// Of a body.
    pub(super) fn of_bytes(bytes: &[u8]) -> Self {
        Self::of(&[], &hex(&Sha256::digest(bytes)))
    }

    /// The answer, which is the same as another one whose body is equal; without it, if that is what the asker has.
    pub(super) async fn of_body(response: Response, headers: &HeaderMap) -> Result<Response, Problem> {
        let (parts, body) = response.into_parts();
        let failed =
            |error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, format!("reading the answer ({error})"));
        let body = axum::body::to_bytes(body, usize::MAX).await.map_err(failed)?;
        let tag = Self::of_bytes(&body);
        let unchanged = tag.unchanged(headers);
        Ok(unchanged.unwrap_or_else(|| tag.put_into(Response::from_parts(parts, body.into()))))
    }

    /// The answer that the asker's own is still right, if it is.
    pub(super) fn unchanged(&self, headers: &HeaderMap) -> Option<Response> {
        let known = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
        let mut known = known.flat_map(|value| value.split(',')).map(str::trim);
        // The comparison is the weak one (RFC 9110, section 13.1.2).
        known
            .any(|known| known == "*" || known.trim_start_matches("W/") == self.0)
            .then(|| self.put_into(StatusCode::NOT_MODIFIED.into_response()))
    }

    /// Adds it to an answer, which may be kept, and has to be asked for again each time.
    pub(super) fn put_into(&self, mut response: Response) -> Response {
        let headers = response.headers_mut();
        if let Ok(tag) = HeaderValue::from_str(&self.0) {
            headers.insert(header::ETAG, tag);
        }
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
        headers.insert(header::VARY, HeaderValue::from_static("accept"));
        response
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
