//! The little of an X.509 certificate that rustls does not tell (RFC 5280, section 4.1): it refuses version 1, which has
//! no extensions and is what `openssl x509 -req` makes by default, and it doesn't look at a common name.

use chrono::NaiveDateTime;
use rustls_pki_types::{SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer};
use sha2::{Digest as _, Sha224, Sha256, Sha384, Sha512};

// Tags of DER.
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const VERSION: u8 = 0xa0;
const EXTENSIONS: u8 = 0xa3;

// Object identifiers, without tag and length.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const ALTERNATIVE_NAME: &[u8] = &[0x55, 0x1d, 0x11];
/// `1.2.840.113549.1.1`: RSA; the next number tells the digest.
const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
const RSA_PSS: u8 = 10;
/// `1.2.840.10045.4`: ECDSA; with SHA-1, or with one of SHA-2.
const ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04];
/// `2.16.840.1.101.3.4.2`: SHA-2, in the parameters of PSS.
const SHA2: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02];

/// A certificate taken apart; nothing of it is verified.
#[derive(Debug)]
pub(super) struct Certificate<'a> {
    /// What the issuer has signed.
    signed: &'a [u8],
    signature_algorithm: &'a [u8],
    signature: &'a [u8],
    /// 1 to 3.
    pub(super) version: u8,
    issuer: &'a [u8],
    subject: &'a [u8],
    not_before: i64,
    not_after: i64,
    key: PublicKey<'a>,
    /// It names hosts elsewhere than in its subject.
    pub(super) has_alternative_names: bool,
}

#[derive(Debug)]
struct PublicKey<'a> {
    whole: &'a [u8],
    algorithm: &'a [u8],
    bits: &'a [u8],
}

impl<'a> Certificate<'a> {
    /// `None` if it is none.
    pub(super) fn parse(der: &'a [u8]) -> Option<Self> {
        let mut outer = Der(Der(der).content(SEQUENCE)?);
        let (_, body, signed) = outer.next()?;
        let signature_algorithm = outer.content(SEQUENCE)?;
        let signature = bits(outer.content(BIT_STRING)?)?;
        let mut body = Der(body);
        let version = match body.optional(VERSION) {
            Some(inner) => Der(inner).content(INTEGER)?.last()?.checked_add(1)?,
            None => 1,
        };
        body.content(INTEGER)?;
        body.content(SEQUENCE)?;
        let issuer = body.content(SEQUENCE)?;
        let mut validity = Der(body.content(SEQUENCE)?);
        let (not_before, not_after) = (validity.time()?, validity.time()?);
        let subject = body.content(SEQUENCE)?;
        let (tag, content, whole) = body.next()?;
        let mut key = Der((tag == SEQUENCE).then_some(content)?);
        let key =
            PublicKey { whole, algorithm: key.content(SEQUENCE)?, bits: bits(key.content(BIT_STRING)?)? };
        let mut has_alternative_names = false;
        while let Some((tag, content, _)) = body.next() {
            if tag == EXTENSIONS {
                let mut extensions = Der(Der(content).content(SEQUENCE)?);
                while let Some(extension) = extensions.optional(SEQUENCE) {
                    has_alternative_names |= Der(extension).content(OBJECT_IDENTIFIER)? == ALTERNATIVE_NAME;
                }
            }
        }
        Some(Self {
            signed,
            signature_algorithm,
            signature,
            version,
            issuer,
            subject,
            not_before,
            not_after,
            key,
            has_alternative_names,
        })
    }

    /// Who it is of, for people.
    pub(super) fn subject(&self) -> String {
        described(self.subject)
    }

    /// Who has signed it, for people.
    pub(super) fn issuer(&self) -> String {
        described(self.issuer)
    }

    /// Seconds since the epoch.
    pub(super) const fn is_valid_at(&self, now: i64) -> bool {
        self.not_before <= now && now <= self.not_after
    }

    /// Whether it says that the other one has signed it, and that is so.
    pub(super) fn is_signed_by(
        &self,
        other: &Certificate<'_>,
        algorithms: &[&dyn SignatureVerificationAlgorithm],
    ) -> bool {
        let fits = |algorithm: &&&dyn SignatureVerificationAlgorithm| {
            algorithm.signature_alg_id().as_ref() == self.signature_algorithm
        };
        self.names_as_issuer(other)
            && algorithms
                .iter()
                .filter(fits)
                .any(|algorithm| other.key.has_signed(*algorithm, self.signed, self.signature))
    }

    pub(super) fn names_as_issuer(&self, other: &Certificate<'_>) -> bool {
        self.issuer == other.subject
    }

    /// Whether its key has signed a message, by one of these algorithms.
    pub(super) fn has_signed(
        &self,
        algorithms: &[&dyn SignatureVerificationAlgorithm],
        message: &[u8],
        signature: &[u8],
    ) -> bool {
        algorithms.iter().any(|algorithm| self.key.has_signed(*algorithm, message, signature))
    }

    /// Its key.
    pub(super) fn public_key(&self) -> SubjectPublicKeyInfoDer<'a> {
        SubjectPublicKeyInfoDer::from(self.key.whole)
    }

    /// Whether the common name of its subject is this host's; one that begins with `*.` stands for all hosts of a domain.
    pub(super) fn is_named(&self, host: &str) -> bool {
        let Some(name) = attribute(self.subject, COMMON_NAME) else { return false };
        let (name, host) = (name.to_ascii_lowercase(), host.trim_end_matches('.').to_ascii_lowercase());
        match name.strip_prefix("*.") {
            // A label, and no more; and not of a top-level domain.
            Some(domain) => {
                domain.contains('.')
                    && host.parse::<std::net::IpAddr>().is_err()
                    && host.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == domain)
            }
            None => name == host,
        }
    }

    /// The digest that a login is bound to (`tls-server-end-point`, RFC 5929): by the algorithm of its signature, and at
    /// least SHA-256. `None` if that has none of its own, as Ed25519.
    pub(super) fn end_point(&self, der: &[u8]) -> Option<Vec<u8>> {
        let mut algorithm = Der(self.signature_algorithm);
        let identifier = algorithm.content(OBJECT_IDENTIFIER)?;
        let digest = if let Some([number]) = identifier.strip_prefix(RSA) {
            match number {
                4 | 5 => 1,
                11 => 1,
                12 => 2,
                13 => 3,
                14 => 4,
                &RSA_PSS => pss_digest(algorithm.0),
                _ => return None,
            }
        } else {
            match identifier.strip_prefix(ECDSA)? {
                [1] | [3, 2] => 1,
                [3, 3] => 2,
                [3, 4] => 3,
                [3, 1] => 4,
                _ => return None,
            }
        };
        Some(match digest {
            2 => Sha384::digest(der).to_vec(),
            3 => Sha512::digest(der).to_vec(),
            4 => Sha224::digest(der).to_vec(),
            _ => Sha256::digest(der).to_vec(),
        })
    }
}

/// The last number of SHA-2's identifier, which is the first one in the parameters.
fn pss_digest(parameters: &[u8]) -> u8 {
    let at = parameters.windows(SHA2.len()).position(|window| window == SHA2);
    at.and_then(|at| parameters.get(at + SHA2.len()).copied()).unwrap_or(1)
}

impl PublicKey<'_> {
    fn has_signed(
        &self,
        algorithm: &dyn SignatureVerificationAlgorithm,
        message: &[u8],
        signature: &[u8],
    ) -> bool {
        algorithm.public_key_alg_id().as_ref() == self.algorithm
            && algorithm.verify_signature(self.bits, message, signature).is_ok()
    }
}

fn described(name: &[u8]) -> String {
    attribute(name, COMMON_NAME)
        .map_or_else(|| "without a common name".to_owned(), |name| format!("CN={name}"))
}

/// An attribute of a distinguished name, as text; the last of several, which is the most specific one.
fn attribute(name: &[u8], wanted: &[u8]) -> Option<String> {
    let mut sets = Der(name);
    let mut found = None;
    while let Some(set) = sets.optional(SET) {
        let mut pair = Der(Der(set).content(SEQUENCE)?);
        if pair.content(OBJECT_IDENTIFIER)? == wanted {
            found = pair.next().map(|(_, value, _)| String::from_utf8_lossy(value).into_owned());
        }
    }
    found
}

/// A string of whole bytes.
fn bits(content: &[u8]) -> Option<&[u8]> {
    content.split_first().filter(|(unused, _)| **unused == 0).map(|(_, bytes)| bytes)
}

/// What is left of a run of DER elements.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The next element: tag, content, and all of it.
    fn next(&mut self) -> Option<(u8, &'a [u8], &'a [u8])> {
        let (tag, rest) = self.0.split_first()?;
        let (first, rest) = rest.split_first()?;
        let (length, header) = match first {
            0..=0x7f => (usize::from(*first), 2),
            0x81..=0x83 => {
                let count = usize::from(first & 0x7f);
                let bytes = rest.get(..count)?;
                (bytes.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte)), 2 + count)
            }
            _ => return None,
        };
        let whole = self.0.get(..header.checked_add(length)?)?;
        self.0 = self.0.get(whole.len()..)?;
        Some((*tag, whole.get(header..)?, whole))
    }

    fn content(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.next().filter(|(found, _, _)| *found == tag).map(|(_, content, _)| content)
    }

    /// The next element's content if it has this tag; else it stays.
    fn optional(&mut self, tag: u8) -> Option<&'a [u8]> {
        if self.0.first() == Some(&tag) { self.content(tag) } else { None }
    }

    fn time(&mut self) -> Option<i64> {
        let (tag, content, _) = self.next()?;
        let text = std::str::from_utf8(content).ok()?;
        let whole = match tag {
            // Years from 50 on are of the last century.
            UTC_TIME if text < "50" => format!("20{text}"),
            UTC_TIME => format!("19{text}"),
            GENERALIZED_TIME => text.to_owned(),
            _ => return None,
        };
        Some(NaiveDateTime::parse_from_str(&whole, "%Y%m%d%H%M%SZ").ok()?.and_utc().timestamp())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_make_it_panic() {
        let mut bytes = vec![0x30, 0x82, 0x01, 0x00];
        for seed in 0_u32..20_000 {
            bytes.truncate(4);
            let mut state = seed.wrapping_mul(2_654_435_761);
            for _ in 0..seed % 64 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                bytes.push((state >> 24) as u8);
            }
            let _ = Certificate::parse(&bytes);
        }
        for bytes in [&b""[..], b"0", b"0\x83\xff\xff\xff", b"0\x84\0\0\0\x01", b"0\x80"] {
            assert!(Certificate::parse(bytes).is_none());
        }
    }
}
