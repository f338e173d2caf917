use std::io;
use std::time::Duration;

use tokio_postgres::Client;

use super::settings::BRIEF;
use super::sql::connect;
use crate::config::SourceConfig;
use crate::error::{Error, Result};

/// Our statements touch a few rows. One that takes longer waits for a network that is gone.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// An SQL session that connects when it is first used, and again after it was lost.
#[derive(Debug)]
pub(crate) struct Session {
    source: SourceConfig,
    client: Option<Client>,
}

impl Session {
    pub(crate) const fn new(source: SourceConfig) -> Self {
        Self { source, client: None }
    }

    /// Runs one exchange.
    ///
    /// # Errors
    ///
    /// As [`connect`] and the work itself; and [`Error::Io`] if the work, or what comes before it, takes longer than
    /// 30 s (a connection: than its own time-outs allow), after which the connection is given up.
    pub(crate) async fn run<T>(&mut self, work: impl AsyncFnOnce(&Client) -> Result<T>) -> Result<T> {
        let client = match self.client.take() {
            Some(client) if !client.is_closed() => client,
            _ => self.bounded(self.connect_limit(), open(&self.source)).await??,
        };
        let result = self.bounded(STATEMENT_TIMEOUT, work(&client)).await?;
        self.client = Some(client);
        result
    }

    /// Each server has the user's time to connect, and again to log in, both with TLS and without.
    fn connect_limit(&self) -> Duration {
        let steps = u32::try_from(self.source.endpoints.len()).unwrap_or(u32::MAX).saturating_mul(4);
        self.source.connect_timeout.saturating_mul(steps).saturating_add(STATEMENT_TIMEOUT)
    }

    async fn bounded<T>(&self, limit: Duration, work: impl Future<Output = T>) -> Result<T> {
        tokio::time::timeout(limit, work).await.map_err(|_| {
            Error::io(format!("waiting for an answer of {}", self.source))(io::ErrorKind::TimedOut.into())
        })
    }
}

async fn open(source: &SourceConfig) -> Result<Client> {
    let client = connect(source).await?;
    client.batch_execute(BRIEF).await.map_err(Error::sql("starting an SQL session"))?;
    Ok(client)
}
