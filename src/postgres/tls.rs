//! TLS as libpq's `sslmode` means it (manual 34.19), through rustls, with the cryptography of AWS-LC, which knows the
//! curve P-521 and is linked for the stores anyway.
//!
//! Differences from libpq: TLS is 1.2 at least; and a certificate of X.509 version 1 is verified only if a root has
//! signed it itself, not over others in between.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::crypto::{
    CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
    verify_tls13_signature_with_raw_key,
};
use rustls::server::ParsedCertificate;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tracing::debug;

use super::certificate::Certificate;
use crate::config::{SourceConfig, SslMode, TlsVersion};
use crate::error::{Error, Result};

/// Who speaks PostgreSQL's protocol says so, where TLS begins at once (manual 55.2.10).
const ALPN: &[u8] = b"postgresql";

/// Wraps a stream on which the server has agreed to TLS, or which begins with it.
pub(super) async fn handshake(
    config: &SourceConfig,
    stream: TcpStream,
    host: &str,
    context: String,
) -> Result<TlsStream<TcpStream>> {
    let name = match ServerName::try_from(host.to_owned()) {
        Ok(name) => name,
        Err(_) if config.ssl_mode == SslMode::VerifyFull => {
            return Err(Error::Setting {
                setting: "host".to_owned(),
                value: host.to_owned(),
                accepted: "a DNS name or an address, so that a certificate can name it".to_owned(),
            });
        }
        // A name that only a resolver understands. The certificate's name is not looked at anyway.
        Err(_) => ServerName::from(stream.peer_addr().map_err(Error::io(&context))?.ip()),
    };
    let (settings, verifier) = client_config(config)?;
    let connector = TlsConnector::from(Arc::new(settings));
    let stream = connector.connect(name, stream).await.map_err(|error| {
        let told = verifier.refusal.lock().unwrap_or_else(PoisonError::into_inner).take();
        Error::io(&context)(told.map_or(error, |told| io::Error::new(io::ErrorKind::InvalidData, told)))
    })?;
    if config.ssl_direct && stream.get_ref().1.alpn_protocol() != Some(ALPN) {
        let detail = "the server does not say that it speaks PostgreSQL's protocol (ALPN), which \
                      sslnegotiation=direct needs";
        return Err(Error::Protocol { context, detail: detail.to_owned() });
    }
    Ok(stream)
}

/// What a login is bound to on this stream; see [`Certificate::end_point`].
pub(super) fn end_point(stream: &TlsStream<TcpStream>) -> Option<Vec<u8>> {
    let der = stream.get_ref().1.peer_certificates()?.first()?;
    Certificate::parse(der)?.end_point(der)
}

fn client_config(config: &SourceConfig) -> Result<(ClientConfig, Arc<Verifier>)> {
    // Named, because several providers are linked and rustls refuses to choose between them.
    let provider = Arc::new(aws_lc_rs::default_provider());
    let trust = match (config.ssl_mode, config.ssl_root_cert.as_deref()) {
        (SslMode::VerifyFull, _) => Trust::roots(config, &provider, true)?,
        (SslMode::VerifyCa, _) | (SslMode::Require, Some(_)) => Trust::roots(config, &provider, false)?,
        (SslMode::Disable | SslMode::Allow | SslMode::Prefer | SslMode::Require, _) => Trust::Anyone,
    };
    let verifier = Arc::new(Verifier { trust, provider: Arc::clone(&provider), refusal: Mutex::new(None) });
    let refuse = |source: rustls::Error| {
        Error::io("setting TLS up")(io::Error::new(io::ErrorKind::InvalidData, source))
    };
    let versions: &[&rustls::SupportedProtocolVersion] = match config.ssl_versions {
        (TlsVersion::V12, TlsVersion::V12) => &[&rustls::version::TLS12],
        (TlsVersion::V12, TlsVersion::V13) => &[&rustls::version::TLS13, &rustls::version::TLS12],
        (TlsVersion::V13, _) => &[&rustls::version::TLS13],
    };
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions)
        .map_err(refuse)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&verifier) as Arc<dyn ServerCertVerifier>);
    let mut settings = match &config.ssl_identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = certificates(certificate, "sslcert")?;
            let private = PrivateKeyDer::from_pem_slice(&read(key, "sslkey")?)
                .map_err(|_| unusable("sslkey", key, "a PEM file with an unencrypted private key"))?;
            let private = provider.key_provider.load_private_key(private).map_err(refuse)?;
            // Not by rustls's own way, which takes the certificate apart and refuses version 1.
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(CertifiedKey::new(
                chain, private,
            ))))
        }
    };
    settings.enable_sni = config.ssl_sni;
    if config.ssl_direct {
        settings.alpn_protocols = vec![ALPN.to_vec()];
    }
    Ok((settings, verifier))
}

fn read(path: &Path, setting: &str) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(Error::io(format!("reading {setting} {}", path.display())))
}

fn unusable(setting: &str, path: &Path, accepted: &str) -> Error {
    Error::Setting { setting: setting.into(), value: path.display().to_string(), accepted: accepted.into() }
}

fn certificates(path: &Path, setting: &str) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = read(path, setting)?;
    match CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>() {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(unusable(setting, path, "a PEM file with certificates")),
    }
}

/// The lists of a file, or of all files of a folder.
fn revocation_lists(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    let setting = "sslcrl or sslcrldir";
    let context = || format!("reading {setting} {}", path.display());
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        let entries = std::fs::read_dir(path).map_err(Error::io(context()))?;
        files = entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()
            .map_err(Error::io(context()))?;
    }
    let mut found = Vec::new();
    for file in files.iter().filter(|file| !file.is_dir()) {
        let bytes = read(file, setting)?;
        let lists = CertificateRevocationListDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>();
        found.extend(lists.map_err(|_| unusable(setting, file, "PEM files with revocation lists"))?);
    }
    if found.is_empty() { Err(unusable(setting, path, "PEM files with revocation lists")) } else { Ok(found) }
}

/// Whom a connection believes.
#[derive(Debug)]
enum Trust {
    /// Encryption against listeners only.
    Anyone,
    /// Whoever the roots vouch for.
    Roots(Roots),
}

#[derive(Debug)]
struct Roots {
    /// `None` without a single root.
    chains: Option<Arc<WebPkiServerVerifier>>,
    /// The certificates of `sslrootcert` themselves. A server that signs its own certificate is its own
    /// root; the chain's rules would refuse it because a root is not a server.
    listed: Vec<CertificateDer<'static>>,
    /// Where the roots are from, for people.
    place: String,
    has_lists: bool,
    checks_name: bool,
}

impl Trust {
    fn roots(config: &SourceConfig, provider: &Arc<CryptoProvider>, checks_name: bool) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        let mut listed = Vec::new();
        if let Some(path) = &config.ssl_root_cert {
            listed = certificates(path, "sslrootcert")?;
            for certificate in &listed {
                roots
                    .add(certificate.clone())
                    .map_err(|_| unusable("sslrootcert", path, "a PEM file with X.509 certificates"))?;
            }
        } else {
            let native = rustls_native_certs::load_native_certs();
            for error in &native.errors {
                debug!(%error, "a system certificate can't be read");
            }
            roots.add_parsable_certificates(native.certs);
        }
        let mut lists = Vec::new();
        for path in &config.ssl_crls {
            lists.extend(revocation_lists(path)?);
        }
        let has_lists = !lists.is_empty();
        let place = |path: &PathBuf| format!("sslrootcert {}", path.display());
        let place = config.ssl_root_cert.as_ref().map_or_else(|| "the system's roots".to_owned(), place);
        let chains = if roots.is_empty() {
            None
        } else {
            let builder = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
                .with_crls(lists)
                .enforce_revocation_expiration();
            Some(builder.build().map_err(|error| Error::Setting {
                setting: "sslrootcert, sslcrl".to_owned(),
                value: error.to_string(),
                accepted: "certificates and revocation lists in X.509's form".to_owned(),
            })?)
        };
        Ok(Self::Roots(Roots { chains, listed, place, has_lists, checks_name }))
    }
}

impl Roots {
    /// Why a server's certificate is not to be trusted.
    fn refusal(
        &self,
        der: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        host: &ServerName<'_>,
        now: UnixTime,
        provider: &CryptoProvider,
    ) -> Option<String> {
        let Some(server) = Certificate::parse(der) else {
            return Some("what the server has sent is no X.509 certificate".to_owned());
        };
        let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        if !server.is_valid_at(seconds) {
            return Some(format!("{} has expired, or is not valid yet", named(&server)));
        }
        if !self.listed.iter().any(|listed| listed == der) {
            // Only as the server's own: rustls sees to it that none of version 1 stands in between.
            let why = match server.version {
                1 | 2 => self.refusal_of_old(&server, provider),
                _ => self.refusal_of_chain(der, &server, intermediates, host, now),
            };
            if why.is_some() {
                return why;
            }
        }
        (self.checks_name && !is_named(der, &server, host)).then(|| {
            format!(
                "{} is not one of host {}; see sslmode, and the certificate's names",
                named(&server),
                host.to_str()
            )
        })
    }

    fn refusal_of_chain(
        &self,
        der: &CertificateDer<'_>,
        server: &Certificate<'_>,
        intermediates: &[CertificateDer<'_>],
        host: &ServerName<'_>,
        now: UnixTime,
    ) -> Option<String> {
        let result = self.chains.as_ref().map_or_else(
            || Err(CertificateError::UnknownIssuer.into()),
            |chains| chains.verify_server_cert(der, intermediates, host, &[], now),
        );
        let others: Vec<_> = intermediates.iter().filter_map(|der| Certificate::parse(der)).collect();
        // Where the chain ends, as far as the server has sent it.
        let mut last = server;
        for _ in &others {
            last = others.iter().find(|one| last.names_as_issuer(one)).unwrap_or(last);
        }
        match result {
            // Names are looked at afterwards.
            Ok(_)
            | Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => None,
            Err(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => Some(format!(
                "{} can't be verified: certificate {} is not in {}",
                named(last),
                last.issuer(),
                self.place
            )),
            Err(rustls::Error::InvalidCertificate(CertificateError::UnknownRevocationStatus)) => {
                Some(format!(
                    "{} can't be verified: no list of sslcrl or sslcrldir is of its issuer, or of one above",
                    named(server)
                ))
            }
            Err(error) => Some(format!("{} can't be verified: {error}", named(server))),
        }
    }

    /// Of a certificate of version 1, about which rustls can't say anything.
    fn refusal_of_old(&self, old: &Certificate<'_>, provider: &CryptoProvider) -> Option<String> {
        let refuse = |why: &str| {
            let advice = "sign it again with extensions (openssl x509 -req -extfile)";
            Some(format!("{} is of X.509 version {}, and {why}; {advice}", named(old), old.version))
        };
        if self.has_lists {
            return refuse("whether it was revoked can't be said of such a one");
        }
        let algorithms = provider.signature_verification_algorithms.all;
        let mut roots = self.listed.iter().filter_map(|der| Certificate::parse(der));
        match roots.any(|root| old.is_signed_by(&root, algorithms)) {
            true => None,
            false => {
                refuse(&format!("can be verified only where one of {} has signed it itself", self.place))
            }
        }
    }
}

/// A certificate, for people.
fn named(one: &Certificate<'_>) -> String {
    format!("the server's certificate {}, signed by {},", one.subject(), one.issuer())
}

/// Whether a certificate names the host. As in libpq the common name counts where there are no others.
fn is_named(der: &CertificateDer<'_>, certificate: &Certificate<'_>, host: &ServerName<'_>) -> bool {
    let by_alternative =
        || ParsedCertificate::try_from(der).is_ok_and(|parsed| verify_server_name(&parsed, host).is_ok());
    match certificate.has_alternative_names {
        true => by_alternative(),
        false => certificate.is_named(&host.to_str()),
    }
}

#[derive(Debug)]
struct Verifier {
    trust: Trust,
    provider: Arc<CryptoProvider>,
    /// Why the certificate was refused, in more words than rustls has.
    refusal: Mutex<Option<String>>,
}

impl Verifier {
    /// A certificate of version 1, if it is one: rustls doesn't use its key.
    fn old<'a>(certificate: &'a CertificateDer<'_>) -> Option<Certificate<'a>> {
        Certificate::parse(certificate).filter(|certificate| certificate.version < 3)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Trust::Roots(roots) = &self.trust
            && let Some(why) = roots.refusal(end_entity, intermediates, server_name, now, &self.provider)
        {
            *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    // The signatures are checked in every mode: without them, whoever has seen the certificate has it.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        let Some(old) = Self::old(certificate) else {
            return verify_tls12_signature(message, certificate, signature, known);
        };
        let algorithms = known.mapping.iter().find(|(scheme, _)| *scheme == signature.scheme);
        match algorithms {
            Some((_, algorithms)) if old.has_signed(algorithms, message, signature.signature()) => {
                Ok(HandshakeSignatureValid::assertion())
            }
            _ => Err(CertificateError::BadSignature.into()),
        }
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        match Self::old(certificate) {
            Some(old) => verify_tls13_signature_with_raw_key(message, &old.public_key(), signature, known),
            None => verify_tls13_signature(message, certificate, signature, known),
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
