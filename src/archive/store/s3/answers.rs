//! What an S3 store's answers mean, below the retries of the store's library.
//!
//! The library tries again what it thinks worth it, and hands the rest on as text. Here an answer that no repetition
//! can change becomes a [`Verdict`], one that asks for a repetition looks like one, and error documents, which may hold session
//! tokens, are cut down to their code and message.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    ReqwestConnector,
};

use crate::error::{Policy, Verdict};

/// How long a store may tell us to wait.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);

/// How long the metadata address of a cloud's machine may take to answer. It is one hop away, and on other machines nobody
/// answers at all.
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);

/// Where such a machine asks for its credentials.
pub(super) const METADATA_HOST: &str = "169.254.169.254";

/// Characters of an answer that is no error document of S3's.
const TEXT_MAX: usize = 200;

/// What the answers have to be judged by.
#[derive(Debug, Default)]
pub(super) struct Circumstances {
    /// The keys are in the environment, which nobody can change while the process runs.
    pub(super) has_fixed_keys: bool,
    /// Requests are not signed, so those without a signature are not for credentials.
    pub(super) is_unsigned: bool,
    /// `AWS_ALLOW_HTTP`: then a service of tokens may be asked without TLS, too, as MinIO's beside the store. The library would refuse.
    pub(super) allows_http: bool,
    /// Host and port of the metadata address.
    pub(super) metadata_host: String,
    /// Where credentials were looked for, for people.
    pub(super) looked_at: String,
    /// Whether there were credentials before: then a failure to get them may pass.
    pub(super) had_credentials: AtomicBool,
}

/// Makes the library's HTTP clients.
#[derive(Clone, Debug)]
pub(super) struct Connector(pub(super) Arc<Circumstances>);

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let options = options.clone();
        let options = if self.0.allows_http { options.with_allow_http(true) } else { options };
        let inner = ReqwestConnector::default().connect(&options)?;
        Ok(HttpClient::new(Answers { inner, circumstances: Arc::clone(&self.0) }))
    }
}

#[derive(Debug)]
struct Answers {
    inner: HttpClient,
    circumstances: Arc<Circumstances>,
}

#[async_trait]
impl HttpService for Answers {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let host = request.uri().authority().map_or("", |authority| authority.as_str());
        let is_metadata = host == self.circumstances.metadata_host;
        let is_signed = request
            .headers()
            .get("authorization")
            .is_some_and(|value| value.to_str().is_ok_and(|value| value.starts_with("AWS4-HMAC-SHA256")));
        if is_signed || self.circumstances.is_unsigned {
            self.circumstances.had_credentials.store(true, Ordering::Relaxed);
            return self.object(self.inner.execute(request).await?).await;
        }
        let (limit, host) = (if is_metadata { METADATA_TIMEOUT } else { Duration::MAX }, host.to_owned());
        match tokio::time::timeout(limit, self.inner.execute(request)).await {
            Ok(Ok(response)) => self.credentials(&host, response).await,
            Ok(Err(error)) if !is_metadata => Err(error),
            Ok(Err(_)) => Err(self.no_credentials(&host, "can't be reached")),
            Err(_) => Err(self.no_credentials(&host, "does not answer")),
        }
    }
}

impl Answers {
    /// An answer to a request for an object.
    async fn object(&self, response: HttpResponse) -> Result<HttpResponse, HttpError> {
        let status = response.status().as_u16();
        // What the library has a meaning for, and a document of no interest.
        if status < 300 || matches!(status, 304 | 412) {
            return Ok(response);
        }
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let retry_after = header("retry-after").and_then(|seconds| seconds.parse().ok());
        let region = header("x-amz-bucket-region").map(str::to_owned);
        let (mut parts, body) = response.into_parts();
        let body = body.bytes().await?;
        let document = Document::new(&String::from_utf8_lossy(&body), region);
        if let Some(policy) = self.judge(status, &document) {
            let detail = document.to_string();
            let detail = if detail.is_empty() { format!("the store answered {status}") } else { detail };
            return Err(HttpError::new(HttpErrorKind::Unknown, Verdict { detail, policy }));
        }
        if is_passing(&document.code)
            && let Ok(unavailable) = 503_u16.try_into()
        {
            parts.status = unavailable;
        }
        if let Some(seconds) = retry_after {
            tokio::time::sleep(Duration::from_secs(seconds).min(RETRY_AFTER_MAX)).await;
        }
        Ok(HttpResponse::from_parts(parts, document.to_string().into()))
    }

    /// What to do about an answer, where the library would get it wrong.
    fn judge(&self, status: u16, document: &Document) -> Option<Policy> {
        let stop = |advice| Some(Policy::Stop { advice });
        match (status, document.code.as_str()) {
            (301 | 307 | 308, _) | (_, "PermanentRedirect" | "AuthorizationHeaderMalformed") => {
                stop("set AWS_REGION (`region`) to the bucket's, or AWS_ENDPOINT_URL to its address")
            }
            (501, _) | (_, "NotImplemented") => stop(
                "the store lacks what an archive needs (a PUT with `If-None-Match: *`): take another store, or set \
                 AWS_ENDPOINT_URL to the store itself instead of a proxy",
            ),
            (_, "ExpiredToken" | "TokenRefreshRequired") if !self.circumstances.has_fixed_keys => {
                Some(Policy::Retry)
            }
            (_, "ExpiredToken" | "TokenRefreshRequired" | "InvalidToken") => stop(
                "renew AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or use AWS_PROFILE with a \
                 `credential_process`, which renews them by itself",
            ),
            (_, "InvalidAccessKeyId" | "SignatureDoesNotMatch") => {
                stop("check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what AWS_PROFILE names")
            }
            (_, "RequestTimeTooSkewed") => stop("set the clock of this machine"),
            (_, "NoSuchBucket") => {
                stop("make the bucket, or correct SCOUTER_STORAGE_URI or AWS_ENDPOINT_URL")
            }
            (_, "InvalidBucketName") => stop("correct the bucket in SCOUTER_STORAGE_URI"),
            (405, _) => stop("check AWS_ENDPOINT_URL: what answers there is no S3 store"),
            _ => None,
        }
    }

    /// An answer to a request for credentials.
    async fn credentials(&self, host: &str, response: HttpResponse) -> Result<HttpResponse, HttpError> {
        let status = response.status();
        if !status.is_client_error() {
            return Ok(response);
        }
        let body = response.into_body().bytes().await?;
        let document = Document::new(&String::from_utf8_lossy(&body), None);
        Err(self.no_credentials(host, &format!("answered {status} {document}")))
    }

    fn no_credentials(&self, host: &str, what: &str) -> HttpError {
        let detail = format!("{}; {host} {}", self.circumstances.looked_at, what.trim_end());
        HttpError::new(HttpErrorKind::Unknown, self.circumstances.missing(detail))
    }
}

impl Circumstances {
    /// The verdict where there are no credentials.
    pub(super) fn missing(&self, detail: String) -> Verdict {
        let advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; on a machine with a role of its own, see \
                      that the role is attached";
        let policy = match self.had_credentials.load(Ordering::Relaxed) {
            true => Policy::Retry,
            false => Policy::Stop { advice },
        };
        Verdict { detail, policy }
    }
}

/// Codes that ask for the request to be sent again, with statuses that the library takes for final. Of 409 it thinks that the
/// object exists; but another request for it was only being worked on, and this one has changed nothing.
fn is_passing(code: &str) -> bool {
    matches!(
        code,
        "ConditionalRequestConflict" | "OperationAborted" | "RequestTimeout" | "IncompleteBody" | "BadDigest"
    )
}

/// What an error document says ("Error responses" in the S3 API reference), and no more.
#[derive(Debug, Default, PartialEq, Eq)]
struct Document {
    code: String,
    message: String,
    region: Option<String>,
}

impl Document {
    fn new(body: &str, region: Option<String>) -> Self {
        let element = |name: &str| {
            let (_, rest) = body.split_once(&format!("<{name}>"))?;
            let (text, _) = rest.split_once(&format!("</{name}>"))?;
            Some(text.trim().to_owned())
        };
        match element("Code") {
            Some(code) => Self {
                code,
                message: element("Message").unwrap_or_default(),
                region: region.or_else(|| element("Region")),
            },
            None => {
                let message = body.trim().chars().take(TEXT_MAX).collect();
                Self { code: String::new(), message, region }
            }
        }
    }
}

impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [self.code.as_str(), self.message.as_str()];
        f.write_str(&parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": "))?;
        match &self.region {
            Some(region) => write!(f, " (the bucket is in region {region})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_document_is_told_without_the_token_in_it() {
        let body = "<?xml version=\"1.0\"?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.\
                    </Message><Token-0>c2VjcmV0</Token-0></Error>";
        let document = Document::new(body, None);
        assert_eq!(document.to_string(), "ExpiredToken: The provided token has expired.");
        let elsewhere = Document::new("", Some("eu-west-1".to_owned()));
        assert_eq!(elsewhere.to_string(), " (the bucket is in region eu-west-1)");
        assert_eq!(Document::new("<html>no</html>", None).to_string(), "<html>no</html>");
    }
}
