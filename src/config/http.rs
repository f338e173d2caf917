//! [`HttpSettings`]: where the HTTP server listens, and whom it answers.

use std::net::{Ipv4Addr, SocketAddr};

use super::parameters::Password;
use super::parse;
use super::raw::Layers;
use super::setting::{Setting, setting_error};
use crate::error::Result;

/// The least bytes of a token: what 12 random bytes have in base64.
const TOKEN_BYTES_MIN: usize = 16;

/// The most: what fits a header with room for others.
const TOKEN_BYTES_MAX: usize = 1024;

/// Where the HTTP server listens, and whom it answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpSettings {
    /// Its address; `None` if there is to be no server.
    pub listen: Option<SocketAddr>,
    /// Whom it answers.
    pub access: HttpAccess,
    /// Whether it answers queries in SQL, too.
    pub sql: bool,
}

/// Whom the HTTP server answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HttpAccess {
    /// Everybody on this machine; for a loopback address only.
    Local,
    /// Whoever has the token.
    Token(Password),
    /// Everybody who reaches it.
    Anybody,
}

impl Default for HttpSettings {
    fn default() -> Self {
        let listen = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 9808)));
        Self { listen, access: HttpAccess::Local, sql: false }
    }
}

impl HttpSettings {
    /// From what was typed.
    pub(super) fn from_layers(layers: &Layers) -> Result<Self> {
        let listen = match layers.text(Setting::Http).trim() {
            "off" => None,
            _ => Some(parse::parsed(
                layers,
                Setting::Http,
                "an IP address and a port, such as 127.0.0.1:9808 or [::1]:9808; or off",
            )?),
        };
        let sql = match layers.text(Setting::HttpSql).trim() {
            "on" => true,
            "off" => false,
            _ => return Err(parse::refused(layers, Setting::HttpSql, "on or off")),
        };
        let access = match layers.typed(Setting::HttpToken) {
            None => HttpAccess::Local,
            Some("none") => HttpAccess::Anybody,
            Some(token) => HttpAccess::Token(Password::new(token)),
        };
        let settings = Self { listen, access, sql };
        settings.check(&|setting| layers.name(setting))?;
        Ok(settings)
    }

    /// Checks that the address is not open to more than those who are meant, and the token can't be guessed.
    pub(super) fn check(&self, name: &dyn Fn(Setting) -> String) -> Result<()> {
        match (&self.access, self.listen) {
            (HttpAccess::Local, Some(address)) if !address.ip().is_loopback() => Err(setting_error(
                &name(Setting::Http),
                address.to_string(),
                format!(
                    "an address of this machine alone, such as 127.0.0.1:{}, unless {} is set: a token, without which nothing is \
                     answered, or `none`, if everybody may ask who reaches it",
                    address.port(),
                    Setting::HttpToken.variable()
                ),
            )),
            (HttpAccess::Token(token), _) if !is_token(token.reveal()) => Err(setting_error(
                &name(Setting::HttpToken),
                "(not shown)",
                format!(
                    "{TOKEN_BYTES_MIN} to {TOKEN_BYTES_MAX} visible ASCII characters, such as `openssl rand -base64 24` gives; or none"
                ),
            )),
            _ => Ok(()),
        }
    }
}

fn is_token(text: &str) -> bool {
    (TOKEN_BYTES_MIN..=TOKEN_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(texts: &[(Setting, &str)]) -> Result<HttpSettings> {
        let mut layers = Layers::default();
        for (setting, text) in texts {
            layers.environment.set(*setting, Some((*text).to_owned()));
        }
        HttpSettings::from_layers(&layers)
    }

    #[test]
    fn an_address_that_others_reach_wants_a_token_or_the_word_that_it_goes_without() {
        let open = (Setting::Http, "0.0.0.0:9808");
        let error = settings(&[open]).unwrap_err().to_string();
        assert!(error.contains("HIGHWATER_HTTP_TOKEN") && error.contains("127.0.0.1:9808"), "{error}");
        assert_eq!(settings(&[open, (Setting::HttpToken, "none")]).unwrap().access, HttpAccess::Anybody);
        let token = "0123456789abcdef";
        let with_token = settings(&[open, (Setting::HttpToken, token)]).unwrap();
        assert_eq!(with_token.access, HttpAccess::Token(Password::new(token)));
        assert!(!format!("{with_token:?}").contains(token));
        assert_eq!(settings(&[(Setting::Http, "[::1]:1")]).unwrap().access, HttpAccess::Local);
        assert_eq!(settings(&[(Setting::Http, "off")]).unwrap().listen, None);
    }

    #[test]
    fn a_token_that_is_refused_is_not_shown() {
        for token in ["short", "with a space in its middle", "0123456789abcde\u{e4}"] {
            let error = settings(&[(Setting::HttpToken, token)]).unwrap_err().to_string();
            assert!(error.starts_with("HIGHWATER_HTTP_TOKEN is ") && !error.contains(token), "{error}");
        }
        assert!(settings(&[(Setting::HttpSql, "true")]).is_err());
    }
}
