//! Credentials that a profile or a container gives, for as long as they last.

use std::fmt;
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use object_store::CredentialProvider;
use object_store::aws::AwsCredential;
use object_store::client::{HttpClient, HttpRequest, HttpRequestBody};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::answers::Circumstances;
use super::profile::{Profile, Source};
use crate::config::environment_variable;

/// A program may ask a person to log in, or a service far away.
const PROCESS_TIMEOUT: Duration = Duration::from_secs(60);

/// How often a file of keys is read again: somebody may have renewed them.
const FILE_AGE_MAX: Duration = Duration::from_mins(1);

/// How long before their end credentials are renewed; of short-lived ones, after half of their time.
const RENEW_BEFORE: Duration = Duration::from_mins(5);

/// How long the next attempt waits when credentials could not be renewed in time, but still hold.
const RENEW_AGAIN: Duration = Duration::from_secs(30);

/// Bytes of a program's complaint that are passed on.
const COMPLAINT_MAX: usize = 300;

/// How credentials are got.
pub(super) enum Origin {
    /// The profile's keys or program, whichever its files have by then.
    Profile,
    /// The address of a container's credentials, and what it wants to see (`AWS_CONTAINER_AUTHORIZATION_TOKEN`).
    Container { client: HttpClient, url: String, token: Option<String> },
}

/// Gives credentials to the store's library.
pub(super) struct Credentials {
    origin: Origin,
    circumstances: Arc<Circumstances>,
    current: Mutex<Option<Current>>,
}

struct Current {
    credential: Arc<AwsCredential>,
    renew_at: Option<Instant>,
    expires_at: Option<Instant>,
}

// By hand, because they are secret.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

impl Credentials {
    pub(super) fn new(origin: Origin, circumstances: Arc<Circumstances>) -> Self {
        Self { origin, circumstances, current: Mutex::default() }
    }

    async fn fetch(&self) -> Result<Current, String> {
        match &self.origin {
            Origin::Profile => {
                let read = || Profile::read(&environment_variable).map_err(|error| error.chain());
                match blocking(read).await?.source {
                    Some(Source::Keys { key_id, secret_key, token }) => Ok(Current {
                        credential: Arc::new(AwsCredential { key_id, secret_key, token }),
                        renew_at: Instant::now().checked_add(FILE_AGE_MAX),
                        expires_at: None,
                    }),
                    Some(Source::Process(command)) => {
                        let printed = blocking(move || run(&command)).await?;
                        Current::of(&printed).map_err(|what| format!("`credential_process` {what}"))
                    }
                    None => Err("the profile has no credentials any more".to_owned()),
                }
            }
            Origin::Container { client, url, token } => {
                let answer = ask(client, url, token.as_deref()).await?;
                Current::of(&answer).map_err(|what| format!("AWS_CONTAINER_CREDENTIALS_FULL_URI {what}"))
            }
        }
    }
}

#[async_trait]
impl CredentialProvider for Credentials {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let mut current = self.current.lock().await;
        let now = Instant::now();
        let holds = |until: Option<Instant>| until.is_none_or(|until| now < until);
        if let Some(current) = current.as_ref().filter(|current| holds(current.renew_at)) {
            return Ok(Arc::clone(&current.credential));
        }
        let detail = match self.fetch().await {
            Ok(fetched) => return Ok(Arc::clone(&current.insert(fetched).credential)),
            Err(detail) => detail,
        };
        if let Some(current) = current.as_mut().filter(|current| holds(current.expires_at)) {
            tracing::warn!(
                detail,
                "the storage credentials were not renewed; the old ones are used as long as they hold"
            );
            current.renew_at = now.checked_add(RENEW_AGAIN);
            return Ok(Arc::clone(&current.credential));
        }
        let source = self.circumstances.missing(format!("no credentials for S3: {detail}"));
        Err(object_store::Error::Unauthenticated { path: "the archive".to_owned(), source: Box::new(source) })
    }
}

/// What a `credential_process` prints ("Sourcing credentials with an external process" in the AWS tools' manual), or a
/// container's address answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Printed {
    version: Option<u32>,
    access_key_id: String,
    secret_access_key: String,
    #[serde(alias = "Token")]
    session_token: Option<String>,
    expiration: Option<String>,
}

impl Current {
    fn of(json: &[u8]) -> Result<Self, String> {
        // The parser's own text may quote a secret.
        let printed: Printed = serde_json::from_slice(json).map_err(|_| {
            "gives no JSON with Version, AccessKeyId, SecretAccessKey, and SessionToken and Expiration where they are temporary"
                .to_owned()
        })?;
        if printed.version.is_some_and(|version| version != 1) {
            return Err("gives another Version than 1".to_owned());
        }
        let now = Instant::now();
        let mut current = Self {
            credential: Arc::new(AwsCredential {
                key_id: printed.access_key_id,
                secret_key: printed.secret_access_key,
                token: printed.session_token,
            }),
            renew_at: None,
            expires_at: None,
        };
        if let Some(text) = printed.expiration {
            let end: DateTime<Utc> =
                text.parse().map_err(|_| format!("gives an Expiration that is no time: {text:?}"))?;
            let left = end.signed_duration_since(Utc::now()).to_std();
            let left = left.map_err(|_| format!("gives credentials that have expired ({end})"))?;
            current.renew_at = now.checked_add(left.saturating_sub(RENEW_BEFORE).max(left / 2));
            current.expires_at = now.checked_add(left);
        }
        Ok(current)
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?
}

/// Runs a command line as a shell has it; what it prints.
fn run(command: &str) -> Result<Vec<u8>, String> {
    let failed = |what: String| format!("`credential_process` {what}");
    let mut child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("can't be started: {error}")))?;
    let (stdout, stderr) = (gather(child.stdout.take()), gather(child.stderr.take()));
    let deadline = Instant::now() + PROCESS_TIMEOUT;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            Ok(None) => {
                let _ = child.kill().and_then(|()| child.wait());
                return Err(failed(format!("has not ended after {} s", PROCESS_TIMEOUT.as_secs())));
            }
            Err(error) => return Err(failed(format!("can't be waited for: {error}"))),
        }
    };
    // One that went on in the background may hold its output open: what has come by now counts.
    let printed = stdout.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
    if status.success() {
        return Ok(printed);
    }
    let complaint = stderr.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
    let complaint =
        String::from_utf8_lossy(complaint.get(..COMPLAINT_MAX).unwrap_or(&complaint)).into_owned();
    Err(failed(format!("has failed ({status}): {}", complaint.trim())))
}

/// Reads an output to its end, beside the process.
fn gather(output: Option<impl Read + Send + 'static>) -> std::sync::mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut output) = output {
            let _ = output.read_to_end(&mut bytes);
        }
        let _ = sender.send(bytes);
    });
    receiver
}

async fn ask(client: &HttpClient, url: &str, token: Option<&str>) -> Result<Vec<u8>, String> {
    let refuse = |what: &str| format!("AWS_CONTAINER_CREDENTIALS_FULL_URI {what}");
    let mut request = HttpRequest::new(HttpRequestBody::empty());
    *request.uri_mut() = url.parse().map_err(|_| refuse("is no URL"))?;
    if let Some(token) = token {
        let mut value = object_store::HeaderValue::from_str(token)
            .map_err(|_| "AWS_CONTAINER_AUTHORIZATION_TOKEN can't be sent".to_owned())?;
        value.set_sensitive(true);
        request.headers_mut().insert("authorization", value);
    }
    let answer = client.execute(request).await.map_err(|error| refuse(&error.to_string()))?;
    if !answer.status().is_success() {
        return Err(refuse(&format!("answers {}", answer.status())));
    }
    let bytes = answer.into_body().bytes().await.map_err(|error| refuse(&error.to_string()))?;
    Ok(bytes.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_credentials_are_renewed_before_their_end() {
        let printed = |seconds: i64| {
            let end = Utc::now() + chrono::Duration::seconds(seconds);
            let json = format!(
                r#"{{"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "hunter2", "SessionToken": "t", "Expiration": "{}"}}"#,
                end.to_rfc3339()
            );
            Current::of(json.as_bytes())
        };
        let in_seconds = |at: Option<Instant>| (at.unwrap() - Instant::now()).as_secs();
        let hour = printed(3600).unwrap();
        assert!((3298..=3300).contains(&in_seconds(hour.renew_at)) && in_seconds(hour.expires_at) >= 3598);
        assert!((28..=30).contains(&in_seconds(printed(60).unwrap().renew_at)));
        assert!(printed(-1).err().unwrap().contains("expired"));
        let error = Current::of(br#"{"Version": "hunter2"}"#).err().unwrap();
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn a_command_line_is_run_as_a_shell_does() {
        assert_eq!(run("printf '%s' \"a  b\"").unwrap(), b"a  b");
        let error = run("echo secret; echo 'the session has expired' >&2; exit 3").unwrap_err();
        assert!(error.contains("the session has expired") && !error.contains("secret"), "{error}");
    }
}
