//! Logging in (manual 55.2.1, 55.3).

use bytes::{Buf as _, BytesMut};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{
    ChannelBinding as Bound, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256,
};
use postgres_protocol::message::backend::{AUTHENTICATION_TAG, BACKEND_KEY_DATA_TAG, READY_FOR_QUERY_TAG};
use postgres_protocol::message::frontend;

use super::settings::CLIENT_ENCODING;
use super::wire::{Message, Wire, unexpected};
use crate::config::{AuthMethod, ChannelBinding, Password, SourceConfig, SslMode};
use crate::error::{Error, Result};

// The kinds of authentication request (manual 55.7).
const OK: u32 = 0;
const CLEARTEXT: u32 = 3;
const MD5: u32 = 5;
const SASL: u32 = 10;
const SASL_CONTINUE: u32 = 11;
const SASL_FINAL: u32 = 12;

/// How the setting is called that says how much TLS is wanted.
pub(super) const SSL_MODE: &str = "sslmode";

/// Who is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Process {
    /// A server process for SQL.
    Backend,
    /// One for logical replication, which understands SQL, too (manual 55.4).
    Walsender,
}

/// A login on its way.
pub(super) struct Login<'a> {
    pub(super) wire: &'a mut Wire,
    pub(super) config: &'a SourceConfig,
    pub(super) process: Process,
    pub(super) password: Option<Password>,
    pub(super) context: &'a str,
    /// The server has asked who we are, so it has nothing against the way that we came.
    pub(super) was_asked: bool,
}

impl Login<'_> {
    /// Sends the start-up message and answers until the server is ready for a query. Gives the id of the server's
    /// process, or zero, and the key to cancel with.
    pub(super) async fn run(&mut self) -> Result<(i32, i32)> {
        let (config, context) = (self.config, self.context);
        let mut parameters = vec![
            ("user", config.user.as_str()),
            ("database", config.database.as_str()),
            ("application_name", config.application_name.as_str()),
            ("client_encoding", CLIENT_ENCODING),
        ];
        if self.process == Process::Walsender {
            parameters.push(("replication", "database"));
        }
        if let Some(options) = &config.options {
            parameters.push(("options", options));
        }
        let mut message = BytesMut::new();
        frontend::startup_message(parameters, &mut message).map_err(Error::io(context))?;
        self.wire.send(&message, context).await?;
        self.authenticate().await?;
        // Poolers may leave the message out.
        let mut key = (0, 0);
        loop {
            let mut message = self.wire.receive(context).await?;
            match message.tag {
                BACKEND_KEY_DATA_TAG => {
                    let short = |_| refuse(context, "the key data is cut short");
                    key.0 = message.body.try_get_i32().map_err(short)?;
                    key.1 = message.body.try_get_i32().map_err(short)?;
                }
                READY_FOR_QUERY_TAG => return Ok(key),
                // A server that doesn't know our minor version (`v`) would negotiate; we ask for 3.0, which all
                // know.
                _ => return Err(unexpected(&message, context)),
            }
        }
    }

    async fn authenticate(&mut self) -> Result<()> {
        let context = self.context;
        let (mut kind, mut data) = self.request().await?;
        self.was_asked = true;
        self.accept(kind, &data)?;
        if kind == SASL {
            self.scram(&data).await?;
        } else if kind == MD5 || kind == CLEARTEXT {
            let mut answer = BytesMut::new();
            let password = self.needed()?;
            let written = match (kind, data.split_first_chunk::<4>()) {
                (MD5, Some((salt, _))) => {
                    let hash = md5_hash(self.config.user.as_bytes(), password, *salt);
                    frontend::password_message(hash.as_bytes(), &mut answer)
                }
                (MD5, None) => return Err(refuse(context, "an MD5 request without its salt")),
                _ => frontend::password_message(password, &mut answer),
            };
            written.map_err(Error::io(context))?;
            self.wire.send(&answer, context).await?;
        }
        if kind != OK {
            (kind, data) = self.request().await?;
        }
        match kind {
            OK => Ok(()),
            _ => Err(refuse(
                context,
                &format!("authentication method {kind} ({} bytes) is not supported", data.len()),
            )),
        }
    }

    /// Refuses a way to log in that the settings don't want, before anything of the password is sent.
    fn accept(&self, kind: u32, data: &[u8]) -> Result<()> {
        let (method, name) = match kind {
            OK => (AuthMethod::None, "none"),
            CLEARTEXT => (AuthMethod::Password, "password"),
            MD5 => (AuthMethod::Md5, "md5"),
            SASL => (AuthMethod::Scram, "scram-sha-256"),
            // Told by who would have to answer.
            _ => return Ok(()),
        };
        let unwanted = |setting: &str, value: &str, accepted: &str| Error::Setting {
            setting: setting.to_owned(),
            value: value.to_owned(),
            accepted: format!("{accepted} ({})", self.context),
        };
        if self.config.require_auth.as_ref().is_some_and(|wanted| !wanted.contains(&method)) {
            let accepted = format!("fulfilled by the server, but that asks for {name}");
            return Err(unwanted("require_auth", "not fulfilled", &accepted));
        }
        let is_readable = matches!(kind, CLEARTEXT | MD5) && !self.wire.socket.is_private();
        if is_readable && self.config.ssl_mode != SslMode::Disable {
            let accepted = format!(
                "require, verify-ca or verify-full: the connection is not encrypted, and the server asks for the password by \
                 method {name}, which whoever is in between could read or try out. Have the server take TLS, or \
                 scram-sha-256; or say sslmode=disable, if the network is trusted"
            );
            return Err(unwanted(SSL_MODE, "one that allows a connection without TLS", &accepted));
        }
        let is_bound =
            kind == SASL && offers(data, SCRAM_SHA_256_PLUS) && self.wire.socket.end_point().is_some();
        if self.config.channel_binding == ChannelBinding::Require && !is_bound {
            let accepted = "left out, or the login one by SCRAM over TLS; the server doesn't offer that here";
            return Err(unwanted("channel_binding", "require", accepted));
        }
        Ok(())
    }

    fn needed(&self) -> Result<&[u8]> {
        self.password.as_ref().map(|known| known.reveal().as_bytes()).ok_or_else(|| Error::Server {
            context: self.context.to_owned(),
            message: "the server asks for a password, and none is set".to_owned(),
            code: "28P01".to_owned(),
        })
    }

    /// SCRAM-SHA-256 (manual 55.3.1), bound to the TLS session where both sides can. Ends after the server has proved that it
    /// knows the password, too.
    async fn scram(&mut self, mechanisms: &[u8]) -> Result<()> {
        let context = self.context;
        let end_point = match self.config.channel_binding {
            ChannelBinding::Disable => None,
            ChannelBinding::Prefer | ChannelBinding::Require => self.wire.socket.end_point(),
        };
        let (mechanism, bound) = match end_point {
            Some(data) if offers(mechanisms, SCRAM_SHA_256_PLUS) => {
                (SCRAM_SHA_256_PLUS, Bound::tls_server_end_point(data))
            }
            // The server then knows that nobody in between has taken its offer away.
            Some(_) => (SCRAM_SHA_256, Bound::unrequested()),
            None => (SCRAM_SHA_256, Bound::unsupported()),
        };
        if !offers(mechanisms, mechanism) {
            return Err(refuse(context, "the server offers no SCRAM-SHA-256"));
        }
        // The answers may hold what was derived from the password, so the library's texts are not passed on.
        let failed = |_| refuse(context, "the server's SCRAM answer is wrong");
        let mut exchange = ScramSha256::new(self.needed()?, bound);
        let mut message = BytesMut::new();
        frontend::sasl_initial_response(mechanism, exchange.message(), &mut message)
            .map_err(Error::io(context))?;
        self.wire.send(&message, context).await?;

        let data = self.expect(SASL_CONTINUE).await?;
        exchange.update(&data).map_err(failed)?;
        message.clear();
        frontend::sasl_response(exchange.message(), &mut message).map_err(Error::io(context))?;
        self.wire.send(&message, context).await?;

        let data = self.expect(SASL_FINAL).await?;
        exchange.finish(&data).map_err(failed)
    }

    async fn expect(&mut self, wanted: u32) -> Result<bytes::Bytes> {
        match self.request().await? {
            (kind, data) if kind == wanted => Ok(data),
            (kind, _) => {
                Err(refuse(self.context, &format!("authentication request {kind} instead of {wanted}")))
            }
        }
    }

    /// The next authentication request: its kind and its data.
    async fn request(&mut self) -> Result<(u32, bytes::Bytes)> {
        match self.wire.receive(self.context).await? {
            Message { tag: AUTHENTICATION_TAG, mut body } if body.len() >= 4 => Ok((body.get_u32(), body)),
            message => Err(unexpected(&message, self.context)),
        }
    }
}

/// Whether a list of mechanisms, which are separated by zeroes, has this one.
fn offers(mechanisms: &[u8], wanted: &str) -> bool {
    mechanisms.split(|byte| *byte == 0).any(|name| name == wanted.as_bytes())
}

fn refuse(context: &str, detail: &str) -> Error {
    Error::Protocol { context: context.to_owned(), detail: detail.to_owned() }
}
