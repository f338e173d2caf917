//! `/api/sql`: what `highwater sql` answers, where the settings allow it.

use std::io::ErrorKind;
use std::process::Stdio;
use std::sync::Arc;

use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;

use super::super::compute::QUERY_TIMEOUT;
use super::super::params::{Given, Param};
use super::super::problem::Problem;
use super::super::served::{ANSWER_BYTES_MAX, Served};
use super::query::ARROW;
use crate::apart::{self, Apart};
use crate::config::Setting;
use crate::error::Error;

pub(super) const SQL: [Param; 1] =
    [Param::new("query", "a query in DataFusion's dialect over the tables of the archive").required()];

/// The most bytes of what is said of a failure.
const ERROR_BYTES_MAX: usize = 64 << 10;

/// The forms of an answer: what is accepted, and the command line's name of it.
const FORMS: [(&str, &str); 3] = [("application/json", "json"), (ARROW, "arrow"), ("text/csv", "csv")];

/// The rows of a query. It ends with the request.
pub(in crate::http) async fn sql(
    State(served): State<Arc<Served>>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Result<Response, Problem> {
    if !served.answers_sql {
        let detail = "queries in SQL are answered by `highwater run` and `highwater serve` where HIGHWATER_HTTP_SQL is on";
        return Err(Problem::new(StatusCode::NOT_FOUND, detail));
    }
    let given = Given::read(query.as_deref(), &[&SQL])?;
    let query = given.text("query").unwrap_or_default();
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let (content_type, form) = FORMS.into_iter().find(|(name, _)| accept.contains(name)).unwrap_or(FORMS[0]);
    // Whether there is an archive at all is told as by the other routes.
    if served.archive().await?.is_none() {
        return Err(Problem::new(StatusCode::NOT_FOUND, "nothing is archived yet"));
    }
    let turn = served.turn().await?;
    let arguments = ["sql", "-", "--format", form].map(Into::into);
    let config = &served.config;
    let mut child = Apart::start(config, arguments, |command| {
        // As this process has them, from wherever.
        for (setting, text) in [
            (Setting::StorageUri, config.storage.storage_uri.clone()),
            (Setting::Region, config.storage.region.clone()),
            (Setting::Memory, config.memory_bytes.to_string()),
        ] {
            command.env(setting.variable(), text);
        }
        // It needs neither the server's secrets nor its address.
        for name in [Setting::HttpToken.variable(), Setting::DatabaseUri.variable(), "PGPASSWORD"] {
            command.env_remove(name);
        }
        command.env(Setting::Http.variable(), "off");
        // A log is not an answer.
        command
            .env("HIGHWATER_LOG", "off")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
    })
    .await?;
    let (stdout, stderr) = (child.child.stdout.take(), child.child.stderr.take());
    let stdin = child.child.stdin.take();
    let answered = async {
        let ((), answer, said) = tokio::try_join!(
            tell(stdin, query),
            read(stdout, ANSWER_BYTES_MAX),
            read(stderr, ERROR_BYTES_MAX)
        )
        .map_err(apart::failed())?;
        Ok::<_, Error>((answer, said, child.wait().await?))
    };
    let (answer, said, status) =
        timeout(QUERY_TIMEOUT, answered).await.map_err(|_| Problem::late(QUERY_TIMEOUT))??;
    if answer.len() > ANSWER_BYTES_MAX {
        return Err(Problem::too_large(ANSWER_BYTES_MAX));
    }
    if !apart::outcome(status, config.memory_bytes)? {
        let said = String::from_utf8_lossy(&said);
        return Err(Problem::bad(said.trim().trim_start_matches("highwater: ").to_owned()));
    }
    turn.answer(([(header::CONTENT_TYPE, HeaderValue::from_static(content_type))], answer).into_response())
        .await
}

/// Writes a pipe, and closes it.
async fn tell(pipe: Option<impl AsyncWrite + Unpin>, text: &str) -> std::io::Result<()> {
    let Some(mut pipe) = pipe else { return Ok(()) };
    match pipe.write_all(text.as_bytes()).await {
        // It has ended before it read all, and says why.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Reads a pipe to its end; of one that has more than the limit one byte more than that, after which its writer is cut off.
async fn read(pipe: Option<impl AsyncRead + Unpin>, limit: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(limit as u64 + 1).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}
