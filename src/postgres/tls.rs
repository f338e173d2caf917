//! TLS as libpq's `sslmode` means it (manual 34.19), through rustls.
//!
//! Differences from libpq, which come from rustls: a name is looked for in the certificate's alternative
//! names only, not in its common name; and TLS is 1.2 at least.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tracing::debug;

use crate::config::SourceConfig;
use crate::config::SslMode;
use crate::error::{Error, Result};

/// Wraps a stream on which the server has agreed to TLS.
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
    let connector = TlsConnector::from(Arc::new(client_config(config)?));
    connector.connect(name, stream).await.map_err(Error::io(context))
}

fn client_config(config: &SourceConfig) -> Result<ClientConfig> {
    // Named, because several providers are linked and rustls refuses to choose between them.
    let provider = Arc::new(ring::default_provider());
    let trust = match (config.ssl_mode, config.ssl_root_cert.as_deref()) {
        (SslMode::VerifyFull, roots) => Trust::roots(roots, true)?,
        (SslMode::VerifyCa, roots) | (SslMode::Require, roots @ Some(_)) => Trust::roots(roots, false)?,
        (SslMode::Disable | SslMode::Prefer | SslMode::Require, _) => Trust::Anyone,
    };
    let verifier = Arc::new(Verifier { trust, provider: Arc::clone(&provider) });
    let refuse = |source: rustls::Error| {
        Error::io("setting TLS up")(io::Error::new(io::ErrorKind::InvalidData, source))
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(refuse)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    match &config.ssl_identity {
        None => Ok(builder.with_no_client_auth()),
        Some((certificate, key)) => {
            let chain = certificates(certificate, "sslcert")?;
            let private = PrivateKeyDer::from_pem_slice(&read(key, "sslkey")?)
                .map_err(|_| unusable("sslkey", key, "a PEM file with an unencrypted private key"))?;
            builder.with_client_auth_cert(chain, private).map_err(refuse)
        }
    }
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

/// Whom a connection believes.
#[derive(Debug)]
enum Trust {
    /// Encryption against listeners only.
    Anyone,
    /// Whoever the roots vouch for.
    Roots {
        roots: RootCertStore,
        /// The certificates of `sslrootcert` themselves. A server that signs its own certificate is its own
        /// root; the chain's rules would refuse it because a root is not a server.
        listed: Vec<CertificateDer<'static>>,
        checks_name: bool,
    },
}

impl Trust {
    fn roots(file: Option<&Path>, checks_name: bool) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        let Some(path) = file else {
            let native = rustls_native_certs::load_native_certs();
            for error in &native.errors {
                debug!(%error, "a system certificate can't be read");
            }
            roots.add_parsable_certificates(native.certs);
            return Ok(Self::Roots { roots, listed: Vec::new(), checks_name });
        };
        let listed = certificates(path, "sslrootcert")?;
        for certificate in &listed {
            roots
                .add(certificate.clone())
                .map_err(|_| unusable("sslrootcert", path, "a PEM file with X.509 certificates"))?;
        }
        Ok(Self::Roots { roots, listed, checks_name })
    }
}

#[derive(Debug)]
struct Verifier {
    trust: Trust,
    provider: Arc<CryptoProvider>,
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
        if let Trust::Roots { roots, listed, checks_name } = &self.trust {
            if roots.is_empty() {
                return Err(CertificateError::UnknownIssuer.into());
            }
            let certificate = ParsedCertificate::try_from(end_entity)?;
            if !listed.contains(end_entity) {
                let algorithms = self.provider.signature_verification_algorithms.all;
                verify_server_cert_signed_by_trust_anchor(
                    &certificate,
                    roots,
                    intermediates,
                    now,
                    algorithms,
                )?;
            }
            if *checks_name {
                verify_server_name(&certificate, server_name)?;
            }
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
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
