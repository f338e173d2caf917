//! Opening an S3 store in the environment that the AWS tools find.
//!
//! The store's library reads the variables, web identities, the addresses of containers and the metadata service. What it
//! does not read is here: profiles, their programs and regions, and where the library stops looking.

mod answers;
mod credentials;
mod profile;

use std::sync::Arc;

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey as Key};
use object_store::client::HttpConnector;
use object_store::{ClientConfigKey, ClientOptions};
use url::Url;

use self::answers::{Circumstances, Connector, METADATA_HOST};
use self::credentials::{Credentials, Origin};
use self::profile::Profile;
use crate::config::{ObjectStorageSettings, environment_variable};
use crate::error::{Policy, Verdict};
use crate::{Error, Result};

/// The region where nobody names one.
const REGION: &str = "us-east-1";

/// A bucket, and the address of the store that has it, which tells it from one of the same name elsewhere.
pub(super) fn open(settings: &ObjectStorageSettings, bucket: &str) -> Result<(AmazonS3, String)> {
    let failed = || Error::storage(format!("opening {}", settings.storage_uri));
    let mut builder = from_environment().with_bucket_name(bucket);
    let profile = Profile::read(&environment_variable);
    let profile = match has_keys(&builder) {
        // Nobody needs it then but for a region.
        true => profile.unwrap_or_default(),
        false => profile?,
    };
    let region = Some(settings.region.clone()).filter(|region| !region.is_empty());
    let region = region.or_else(|| builder.get_config_value(&Key::Region)).or_else(|| profile.region.clone());
    builder = builder.with_region(region.unwrap_or_else(|| REGION.to_owned()));
    let endpoint = |builder: &AmazonS3Builder| {
        builder.get_config_value(&Key::S3Endpoint).or_else(|| builder.get_config_value(&Key::Endpoint))
    };
    if let (None, Some(url)) = (endpoint(&builder), &profile.endpoint_url) {
        builder = builder.with_endpoint(url);
    }
    let address = endpoint(&builder).map_or_else(|| "AWS".to_owned(), |url| without_secrets(&url));
    let builder = with_credentials(builder, profile)?;
    let store = builder.build().map_err(|error| {
        // What is missing in the environment does not come by waiting.
        let policy = Policy::Stop { advice: "correct the AWS_ variables" };
        failed()(object_store::Error::NotSupported {
            source: Box::new(Verdict { detail: error.to_string(), policy }),
        })
    })?;
    Ok((store, address))
}

/// The library's own reading of the environment, but for variables that are empty: the AWS tools take these for unset.
fn from_environment() -> AmazonS3Builder {
    std::env::vars_os().fold(AmazonS3Builder::new(), |builder, (name, value)| {
        let key = name.to_str().filter(|name| name.starts_with("AWS_"));
        let key = key.and_then(|name| name.to_ascii_lowercase().parse().ok());
        match key.zip(value.to_str().filter(|value| !value.is_empty())) {
            Some((key, value)) => builder.with_config(key, value),
            None => builder,
        }
    })
}

fn has_keys(builder: &AmazonS3Builder) -> bool {
    [Key::AccessKeyId, Key::SecretAccessKey].iter().any(|key| builder.get_config_value(key).is_some())
}

/// What the builder and the profile say of the answers that will come.
fn circumstances(builder: &AmazonS3Builder, profile: &Profile) -> Circumstances {
    let is_true = |key: Key| builder.get_config_value(&key).is_some_and(|value| value == "true");
    let metadata = builder.get_config_value(&Key::MetadataEndpoint);
    Circumstances {
        has_fixed_keys: has_keys(builder),
        is_unsigned: is_true(Key::SkipSignature),
        allows_http: is_true(Key::Client(ClientConfigKey::AllowHttp)),
        metadata_host: metadata.as_deref().map_or_else(|| METADATA_HOST.to_owned(), host),
        looked_at: format!(
            "no credentials for S3: AWS_ACCESS_KEY_ID, AWS_WEB_IDENTITY_TOKEN_FILE and AWS_CONTAINER_CREDENTIALS_* are not \
             set, profile {:?} has none in {}",
            profile.name, profile.files
        ),
        ..Circumstances::default()
    }
}

/// Decides where credentials come from: keys in the environment; a profile that is named; a web identity; the default profile; a
/// container's address; the machine's metadata service.
fn with_credentials(mut builder: AmazonS3Builder, profile: Profile) -> Result<AmazonS3Builder> {
    let has = |builder: &AmazonS3Builder, key: Key| builder.get_config_value(&key).is_some();
    let circumstances = Arc::new(circumstances(&builder, &profile));
    let connector = Connector(Arc::clone(&circumstances));
    builder = builder.with_http_connector(connector.clone());
    if circumstances.has_fixed_keys || circumstances.is_unsigned {
        return Ok(builder);
    }
    let has_identity =
        |builder: &AmazonS3Builder| has(builder, Key::WebIdentityTokenFile) && has(builder, Key::RoleArn);
    if !profile.is_named && has_identity(&builder) {
        return Ok(builder);
    }
    if let Some(key) = profile.needs_tools {
        return Err(Error::Setting {
            setting: "AWS_PROFILE".to_owned(),
            value: profile.name.clone(),
            accepted: format!(
                "a profile with keys or a `credential_process`. It has {key}, by which only the AWS tools get credentials: add a \
                 profile with `credential_process = aws configure export-credentials --format process --profile {}` to the \
                 file, and name that",
                profile.name
            ),
        });
    }
    if profile.source.is_some() {
        let credentials = Credentials::new(Origin::Profile, circumstances);
        return Ok(builder.with_credentials(Arc::new(credentials)));
    }
    if let Some(web) = profile.web_identity {
        builder = builder.with_config(Key::WebIdentityTokenFile, web.token_file);
        return Ok(builder.with_config(Key::RoleArn, web.role_arn));
    }
    if has_identity(&builder) || has(&builder, Key::ContainerCredentialsRelativeUri) {
        return Ok(builder);
    }
    match builder.get_config_value(&Key::ContainerCredentialsFullUri) {
        // The library wants a file with the token.
        Some(_) if has(&builder, Key::ContainerAuthorizationTokenFile) => Ok(builder),
        Some(url) => {
            let client = connector
                .connect(&ClientOptions::new().with_allow_http(true))
                .map_err(Error::storage("preparing to ask for credentials"))?;
            let token = environment_variable("AWS_CONTAINER_AUTHORIZATION_TOKEN");
            let origin = Origin::Container { client, url, token };
            Ok(builder.with_credentials(Arc::new(Credentials::new(origin, circumstances))))
        }
        None if environment_variable("AWS_EC2_METADATA_DISABLED")
            .is_some_and(|value| value.eq_ignore_ascii_case("true")) =>
        {
            let detail = format!("{}, and AWS_EC2_METADATA_DISABLED is set", circumstances.looked_at);
            let source = Box::new(circumstances.missing(detail));
            Err(Error::storage("opening the store")(object_store::Error::Unauthenticated {
                path: "the archive".to_owned(),
                source,
            }))
        }
        None => Ok(builder),
    }
}

/// Host and port of a URL.
fn host(url: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split('/').next().unwrap_or_default().to_owned()
}

fn without_secrets(url: &str) -> String {
    let Ok(mut parsed) = Url::parse(url) else { return host(url) };
    let _ = parsed.set_username("");
    let _ = parsed.set_password(None);
    parsed.set_query(None);
    parsed.to_string()
}
