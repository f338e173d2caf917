//! `highwater serve`: the history over HTTP, for an archive that another process writes.

use super::notify;
use super::run::Stops;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::http::{self, Server};
use crate::sidecar::Owned;

/// Answers until SIGTERM or SIGINT.
pub(super) async fn serve(config: &Config) -> Result<()> {
    let mut stops = Stops::listen()?;
    let Some(server) = Server::bind(&config.http).await? else {
        return Err(Error::Setting {
            setting: "HIGHWATER_HTTP".to_owned(),
            value: "off".to_owned(),
            accepted: "an address to serve on, such as 127.0.0.1:9808".to_owned(),
        });
    };
    tracing::info!(
        storage = config.storage.storage_uri,
        "serving http://{}; nothing is archived by this process",
        server.address()
    );
    notify::ready();
    let _watched = Owned(tokio::spawn(notify::watchdog(|| true)));
    server.serve(http::program_reader(config), stops.next()).await;
    tracing::info!("stopped");
    Ok(())
}
