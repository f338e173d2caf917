//! Logging in on a connection of our own (manual 55.2.1, 55.3).

use bytes::{Buf as _, BytesMut};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::backend::{AUTHENTICATION_TAG, BACKEND_KEY_DATA_TAG, READY_FOR_QUERY_TAG};
use postgres_protocol::message::frontend;

use super::wire::{Message, Wire, unexpected};
use crate::config::Password;
use crate::config::SourceConfig;
use crate::error::{Error, Result};

// The kinds of authentication request (manual 55.7).
const OK: u32 = 0;
const CLEARTEXT: u32 = 3;
const MD5: u32 = 5;
const SASL: u32 = 10;
const SASL_CONTINUE: u32 = 11;
const SASL_FINAL: u32 = 12;

/// Who is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Process {
    /// A server process for SQL.
    Backend,
    /// One for logical replication, which understands SQL, too (manual 55.4).
    Walsender,
}

/// Sends the start-up message and answers until the server is ready for a query. Gives the id of the server's
/// process, or zero.
pub(super) async fn log_in(
    wire: &mut Wire,
    config: &SourceConfig,
    process: Process,
    password: Option<&Password>,
    context: &str,
) -> Result<i32> {
    let mut parameters = vec![
        ("user", config.user.as_str()),
        ("database", config.database.as_str()),
        ("application_name", config.application_name.as_str()),
        // Values may arrive as text; these make their text the same whatever the server's settings are.
        ("client_encoding", "UTF8"),
        ("DateStyle", "ISO"),
        ("TimeZone", "UTC"),
        ("extra_float_digits", "3"),
    ];
    if process == Process::Walsender {
        parameters.push(("replication", "database"));
    }
    if let Some(options) = &config.options {
        parameters.push(("options", options));
    }
    let mut message = BytesMut::new();
    frontend::startup_message(parameters, &mut message).map_err(Error::io(context))?;
    wire.send(&message, context).await?;
    authenticate(wire, config, password, context).await?;
    // Poolers may leave the message out.
    let mut process_id = 0;
    loop {
        let mut message = wire.receive(context).await?;
        match message.tag {
            // The key to cancel with follows; nothing here is cancelled.
            BACKEND_KEY_DATA_TAG => {
                process_id = message
                    .body
                    .try_get_i32()
                    .map_err(|_| refuse(context, "the key data has no process id"))?;
            }
            READY_FOR_QUERY_TAG => return Ok(process_id),
            // A server that doesn't know our minor version (`v`) would negotiate; we ask for 3.0, which all
            // know.
            _ => return Err(unexpected(&message, context)),
        }
    }
}

async fn authenticate(
    wire: &mut Wire,
    config: &SourceConfig,
    password: Option<&Password>,
    context: &str,
) -> Result<()> {
    let needed = || {
        password.map(|known| known.reveal().as_bytes()).ok_or_else(|| Error::Server {
            context: context.to_owned(),
            message: "the server asks for a password, and none is set".to_owned(),
            code: "28P01".to_owned(),
        })
    };
    let (mut kind, mut data) = request(wire, context).await?;
    if kind == SASL {
        scram(wire, &data, needed()?, context).await?;
    } else if kind == MD5 || kind == CLEARTEXT {
        let mut answer = BytesMut::new();
        let written = match (kind, data.split_first_chunk::<4>()) {
            (MD5, Some((salt, _))) => {
                let hash = md5_hash(config.user.as_bytes(), needed()?, *salt);
                frontend::password_message(hash.as_bytes(), &mut answer)
            }
            (MD5, None) => return Err(refuse(context, "an MD5 request without its salt")),
            _ => frontend::password_message(needed()?, &mut answer),
        };
        written.map_err(Error::io(context))?;
        wire.send(&answer, context).await?;
    }
    if kind != OK {
        (kind, data) = request(wire, context).await?;
    }
    match kind {
        OK => Ok(()),
        _ => Err(refuse(
            context,
            &format!("authentication method {kind} ({} bytes) is not supported", data.len()),
        )),
    }
}

/// SCRAM-SHA-256 (manual 55.3.1). Ends after the server has proved that it knows the password, too.
async fn scram(wire: &mut Wire, mechanisms: &[u8], password: &[u8], context: &str) -> Result<()> {
    if !mechanisms.split(|byte| *byte == 0).any(|name| name == SCRAM_SHA_256.as_bytes()) {
        return Err(refuse(context, "the server offers no SCRAM-SHA-256"));
    }
    // The answers may hold what was derived from the password, so the library's texts are not passed on.
    let failed = |_| refuse(context, "the server's SCRAM answer is wrong");
    let mut exchange = ScramSha256::new(password, ChannelBinding::unsupported());
    let mut message = BytesMut::new();
    frontend::sasl_initial_response(SCRAM_SHA_256, exchange.message(), &mut message)
        .map_err(Error::io(context))?;
    wire.send(&message, context).await?;

    let data = expect(wire, SASL_CONTINUE, context).await?;
    exchange.update(&data).map_err(failed)?;
    message.clear();
    frontend::sasl_response(exchange.message(), &mut message).map_err(Error::io(context))?;
    wire.send(&message, context).await?;

    let data = expect(wire, SASL_FINAL, context).await?;
    exchange.finish(&data).map_err(failed)
}

async fn expect(wire: &mut Wire, wanted: u32, context: &str) -> Result<bytes::Bytes> {
    match request(wire, context).await? {
        (kind, data) if kind == wanted => Ok(data),
        (kind, _) => Err(refuse(context, &format!("authentication request {kind} instead of {wanted}"))),
    }
}

/// The next authentication request: its kind and its data.
async fn request(wire: &mut Wire, context: &str) -> Result<(u32, bytes::Bytes)> {
    match wire.receive(context).await? {
        Message { tag: AUTHENTICATION_TAG, mut body } if body.len() >= 4 => Ok((body.get_u32(), body)),
        message => Err(unexpected(&message, context)),
    }
}

fn refuse(context: &str, detail: &str) -> Error {
    Error::Protocol { context: context.to_owned(), detail: detail.to_owned() }
}
