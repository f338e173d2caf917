//! Plain SQL sessions.

use std::io;

use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, NoTls};
use tracing::debug;

use super::socket;
use crate::config::SourceConfig;
use crate::error::{Error, Result};

/// Opens an SQL session. Its connection is driven by a task of its own, which ends when the client is dropped
/// or the connection fails; the client's next call then says so.
///
/// # Errors
///
/// Those of [`Socket::connect`](super::Socket::connect), and [`Error::Server`] if the login is refused.
pub async fn connect(config: &SourceConfig) -> Result<Client> {
    let (socket, endpoint) = socket::connect(config).await?;
    let context = format!("logging in to {config}");
    let mut login = tokio_postgres::Config::new();
    login
        .user(&config.user)
        .dbname(&config.database)
        .application_name(&config.application_name)
        // The socket is encrypted already, if it is to be.
        .ssl_mode(SslMode::Disable);
    if let Some(password) = &endpoint.password {
        login.password(password.reveal());
    }
    if let Some(options) = &config.options {
        login.options(options);
    }
    let (client, connection) =
        match tokio::time::timeout(config.connect_timeout, login.connect_raw(socket, NoTls)).await {
            Ok(result) => result.map_err(|error| named_login_error(Error::sql(context)(error)))?,
            Err(_) => return Err(Error::io(context)(io::ErrorKind::TimedOut.into())),
        };
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            debug!(error = Error::sql("SQL connection")(error).chain(), "an SQL connection ended");
        }
    });
    Ok(client)
}

/// The library has no code for a password that is asked for and missing: only this text.
fn named_login_error(error: Error) -> Error {
    match error {
        Error::Sql { context, source } if format!("{source:?}").contains("password missing") => {
            Error::Server {
                context,
                message: "the server asks for a password, and none is set".to_owned(),
                code: "28P01".to_owned(),
            }
        }
        other => other,
    }
}
