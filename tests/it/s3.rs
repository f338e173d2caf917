//! S3 stores that answer as stores do: wrong for an archive, or wrong for a while; and credentials as the AWS tools find them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::archive;
use crate::support::s3::{Answer, Request, S3, Turn};
use crate::support::schema::Shape;
use crate::support::sidecar::Launch;
use crate::support::stage::Stage;

const DEADLINE: Duration = Duration::from_secs(90);
const RECORD: &str = "drift/archive/_highwater.json";

/// What a finding of `check` about the storage says: severity, reason, remedy.
fn storage_finding(launch: &Launch) -> String {
    let output = launch.output(&["check", "--format", "json"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let report: serde_json::Value =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let findings = report["findings"].as_array().unwrap_or_else(|| panic!("{report}"));
    findings
        .iter()
        .find(|finding| finding["id"] == "storage")
        .unwrap_or_else(|| panic!("{report}"))
        .to_string()
}

fn text(output: &std::process::Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

async fn has_slot(stage: &Stage) -> bool {
    let sql = "select from pg_replication_slots where slot_name = $1";
    stage.connect().await.query_opt(sql, &[&stage.name]).await.expect("slots").is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_overwrites_gets_no_archive() {
    let stage = Stage::shared(Shape::Named).await;
    let store = S3::start().await;
    let launch = store.launch(stage.launch());
    // One that ignores the condition, and one that looks before it writes, but lets all that look at once write.
    for is_racy in [false, true] {
        let mut looked = BTreeMap::<String, usize>::new();
        store.behaves(move |request| {
            let requests = looked.entry(request.key.clone()).or_default();
            *requests += usize::from(request.is_conditional());
            if is_racy && *requests > 3 { Turn::Serve } else { Turn::ServeUnconditionally }
        });
        let output = launch.output(&["setup"]);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("If-None-Match") && said.contains("take a store that"), "{said}");
        assert!(!has_slot(&stage).await, "a slot keeps WAL for an archive that can't be");
        assert!(storage_finding(&launch).contains("If-None-Match"));
        assert_eq!(store.keys(), [] as [&str; 0], "nothing is left behind");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_proved_once_for_each_place() {
    let stage = Stage::shared(Shape::Named).await;
    let store = S3::start().await;
    let launch = store.launch(stage.launch());
    // What a killed process left.
    store.put("drift/archive/_highwater-probe-1", b"old");
    store.put("drift/archive/highwater-probe-2", b"of an earlier version");
    launch.must(&["setup"]);
    assert_eq!(store.keys(), [RECORD]);
    let probes =
        |store: &S3| store.requests().iter().filter(|request| request.key.contains("-probe-")).count();
    assert!(probes(&store) > 0);
    let client = stage.connect().await;
    let run = async |launch: &Launch| {
        let mut sidecar = launch.start();
        let target = stage.insert_one(&client, "one", None).await;
        stage.acknowledged(&client, target, DEADLINE).await;
        assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    };
    run(&launch).await;
    assert_eq!(probes(&store), 0, "on record");

    // The record came along with a copy to another store, which overwrites: it is void there.
    let copy = S3::start().await;
    for key in store.keys() {
        copy.put(&key, &store.object(&key).unwrap());
    }
    copy.behaves(|_| Turn::ServeUnconditionally);
    let moved = copy.launch(stage.launch());
    let mut sidecar = moved.start();
    assert_eq!(sidecar.wait(DEADLINE).await.code(), Some(1));
    assert!(sidecar.log().contains("If-None-Match"), "{}", sidecar.log());
    assert!(copy.object(RECORD).is_none(), "what is on record is void");
    copy.behaves(|_| Turn::Serve);
    run(&moved).await;
    archive::assert_same(&client, copy.download().path(), stage.shape).await;

    // Nor does it help that it was seen to be right once.
    copy.behaves(|_| Turn::ServeUnconditionally);
    assert!(storage_finding(&moved).contains("If-None-Match"));
    let mut sidecar = moved.start();
    assert_eq!(sidecar.wait(DEADLINE).await.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_pass_are_waited_for_and_double_nothing() {
    let stage = Stage::shared(Shape::Named).await;
    let store = S3::start().await;
    let launch = store.launch(stage.launch());
    launch.must(&["setup"]);
    // Each entry is refused as long as another request for it may be under way, also a table's first; then its answer is lost,
    // once with an error, once with a connection.
    let mut seen = BTreeMap::<String, usize>::new();
    store.behaves(move |request| {
        if !request.is_conditional() || !request.key.ends_with(".json") {
            return Turn::Serve;
        }
        let times = seen.entry(request.key.clone()).or_default();
        *times += 1;
        match (*times, request.is_entry(0) || request.is_entry(2)) {
            (1, true) => Turn::Say(Answer::error(409, "ConditionalRequestConflict", "try again")),
            (1, false) => Turn::ServeAndSay(Answer::error(500, "InternalError", "lost")),
            (2, true) => Turn::Say(Answer::error(503, "SlowDown", "busy").header("Retry-After", "1")),
            _ => Turn::Serve,
        }
    });
    let client = stage.connect().await;
    let mut sidecar = launch.start();
    for text in ["one", "two", "three"] {
        let target = stage.insert_one(&client, text, None).await;
        stage.acknowledged(&client, target, DEADLINE).await;
    }
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    archive::assert_same(&client, store.download().path(), stage.shape).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_left_alone_for_as_long_as_it_says() {
    let stage = Stage::shared(Shape::Named).await;
    let store = S3::start().await;
    let busy = Answer::error(503, "SlowDown", "busy").header("Retry-After", "2");
    let mut refused = None;
    store.behaves(move |request| {
        if refused.is_none() && request.is_conditional() {
            refused = Some(Instant::now());
            return Turn::Say(busy.clone());
        }
        Turn::Serve
    });
    let started = Instant::now();
    let finding = storage_finding(&store.launch(stage.launch()));
    assert!(finding.contains("can be written"), "{finding}");
    assert!(started.elapsed() >= Duration::from_secs(2), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_stay_end_and_say_what_to_do() {
    let stage = Stage::shared(Shape::Named).await;
    let store = S3::start().await;
    let launch = store.launch(stage.launch());
    let token = launch.clone().with("AWS_SESSION_TOKEN", "hunter2");
    let cases = [
        (&launch, Answer::error(501, "NotImplemented", "A header you provided implies"), "If-None-Match"),
        (
            &launch,
            Answer::error(301, "PermanentRedirect", "other endpoint")
                .header("x-amz-bucket-region", "eu-west-1"),
            "eu-west-1",
        ),
        (&launch, Answer::new(301).header("x-amz-bucket-region", "eu-west-1"), "AWS_REGION"),
        (
            &launch,
            Answer::error(400, "AuthorizationHeaderMalformed", "the region is wrong; expecting 'eu-west-1'"),
            "AWS_REGION",
        ),
        (&token, Answer::error(400, "ExpiredToken", "The provided token has expired."), "AWS_SESSION_TOKEN"),
        (&launch, Answer::error(403, "InvalidAccessKeyId", "does not exist"), "AWS_ACCESS_KEY_ID"),
        (&launch, Answer::error(403, "AccessDenied", "Access Denied"), "read, write, list and delete"),
        (&launch, Answer::error(403, "RequestTimeTooSkewed", "too large"), "clock"),
        (&launch, Answer::error(404, "NoSuchBucket", "does not exist"), "make the bucket"),
    ];
    for (launch, answer, says) in cases {
        let what = format!("{answer:?}");
        store.behaves(
            move |request| {
                if request.is_conditional() { Turn::Say(answer.clone()) } else { Turn::Serve }
            },
        );
        let started = Instant::now();
        let output = launch.output(&["setup"]);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{what}: {said}");
        assert!(said.contains(says), "{what}: {said}");
        assert!(!said.contains("hunter2") && !said.contains("sesame"), "{what}: {said}");
        assert!(started.elapsed() < Duration::from_secs(15), "{what}: {:?}", started.elapsed());
    }
    // Also where it runs already.
    store.behaves(|_| Turn::Serve);
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    let client = stage.connect().await;
    let target = stage.insert_one(&client, "one", None).await;
    stage.acknowledged(&client, target, DEADLINE).await;
    store.behaves(|_| Turn::Say(Answer::error(403, "InvalidAccessKeyId", "does not exist")));
    stage.insert_one(&client, "two", None).await;
    assert_eq!(sidecar.wait(DEADLINE).await.code(), Some(1));
    assert!(sidecar.log().contains("AWS_ACCESS_KEY_ID"), "{}", sidecar.log());
}

/// Who signed the last request, and for which region.
fn signed(store: &S3) -> (String, String) {
    let requests = store.requests();
    let header = requests.iter().rev().find_map(|request| request.headers.get("authorization"));
    let header = header.unwrap_or_else(|| panic!("no signature: {requests:?}"));
    let scope = header.split_once("Credential=").expect("a credential").1.split(',').next().expect("a scope");
    let mut parts = scope.split('/');
    (parts.next().expect("a key").to_owned(), parts.nth(1).expect("a region").to_owned())
}

fn home(stage: &Stage, config: &str, credentials: &str) -> String {
    let folder = stage.folder().join("home");
    fs::create_dir_all(folder.join(".aws")).expect("a folder");
    fs::write(folder.join(".aws/config"), config).expect("a file");
    fs::write(folder.join(".aws/credentials"), credentials).expect("a file");
    folder.display().to_string()
}

fn script(path: &Path, text: &str) {
    fs::write(path, format!("#!/bin/sh\n{text}\n")).expect("a script");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("its rights");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_and_region_are_found_as_the_aws_tools_do() {
    let stage = Stage::shared(Shape::Named).await;
    let store = S3::start().await;
    let issuer = stage.folder().join("issue keys");
    script(
        &issuer,
        r#"printf '{"Version": 1, "AccessKeyId": "%s", "SecretAccessKey": "hunter2", "SessionToken": "hunter2"}' "$1""#,
    );
    let config = format!(
        "[default]\nregion = eu-north-1\n\n[profile keys]\nregion = eu-west-3\n\n[profile program]\n\
         credential_process = '{}' \"of-a-program\"\n\n[profile sso]\nsso_session = work\n\n[profile role]\nrole_arn = arn\n\
         source_profile = keys\n\n[profile broken]\ncredential_process = echo hunter2; echo 'log in first' >&2; exit 2\n",
        issuer.display()
    );
    let credentials = "[default]\naws_access_key_id = of-default\naws_secret_access_key = hunter2\n\
                       [keys]\naws_access_key_id = of-keys\naws_secret_access_key = hunter2\n";
    let bare = store.launch_bare(stage.launch()).with("HOME", &home(&stage, &config, credentials));
    // The address of a container's credentials: the store gives them as well.
    store.put(
        "credentials",
        br#"{"AccessKeyId": "of-a-container", "SecretAccessKey": "hunter2", "Token": "t"}"#,
    );
    let container = store
        .launch_bare(stage.launch())
        .with("AWS_CONTAINER_CREDENTIALS_FULL_URI", &format!("{}/credentials", store.endpoint()))
        .with("AWS_CONTAINER_AUTHORIZATION_TOKEN", "ticket");
    let keys =
        bare.clone().with("AWS_ACCESS_KEY_ID", "of-the-environment").with("AWS_SECRET_ACCESS_KEY", "hunter2");
    for (launch, key, region) in [
        (bare.clone(), "of-default", "eu-north-1"),
        (bare.clone().with("AWS_PROFILE", "keys"), "of-keys", "eu-west-3"),
        (bare.clone().with("AWS_PROFILE", "program"), "of-a-program", "us-east-1"),
        (
            bare.clone().with("AWS_PROFILE", "keys").with("AWS_DEFAULT_REGION", "ap-south-1"),
            "of-keys",
            "ap-south-1",
        ),
        (
            keys.clone().with("AWS_REGION", "sa-east-1").with("AWS_DEFAULT_REGION", "x"),
            "of-the-environment",
            "sa-east-1",
        ),
        (keys.with("AWS_PROFILE", "keys"), "of-the-environment", "eu-west-3"),
        (container, "of-a-container", "us-east-1"),
    ] {
        let finding = storage_finding(&launch);
        assert!(finding.contains("can be written"), "{key}: {finding}");
        assert_eq!(signed(&store), (key.to_owned(), region.to_owned()));
    }
    for (profile, says) in [
        ("sso", "credential_process = aws configure export-credentials"),
        ("role", "credential_process = aws configure export-credentials"),
        ("broken", "log in first"),
        ("gone", ".aws/config"),
    ] {
        let finding = storage_finding(&bare.clone().with("AWS_PROFILE", profile));
        assert!(finding.contains(says) && !finding.contains("hunter2"), "{profile}: {finding}");
    }
}

/// The service that exchanges a web identity's token, a machine's metadata service, and a container's, at one address.
fn give_credentials(request: &Request) -> Turn {
    let end = "2099-01-01T00:00:00Z";
    let keys = |id: &str| {
        Turn::Say(Answer::new(200).body(format!(
            r#"{{"AccessKeyId": "{id}", "SecretAccessKey": "hunter2", "Token": "of-the-session", "Expiration": "{end}"}}"#
        )))
    };
    let has = |header: &str, value: &str| request.headers.get(header).is_some_and(|found| found == value);
    let has_ticket = has("x-aws-ec2-metadata-token", "a-ticket");
    match (request.method.as_str(), request.key.as_str()) {
        ("POST", "") if request.query.contains("WebIdentityToken=of-the-cluster") => {
            Turn::Say(Answer::new(200).body(format!(
                "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>\
                 <SessionToken>of-the-session</SessionToken><SecretAccessKey>hunter2</SecretAccessKey>\
                 <Expiration>{end}</Expiration><AccessKeyId>of-an-identity</AccessKeyId></Credentials>\
                 </AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
            )))
        }
        ("PUT", "latest/api/token") => Turn::Say(Answer::new(200).body("a-ticket")),
        ("GET", "latest/meta-data/iam/security-credentials/") if has_ticket => {
            Turn::Say(Answer::new(200).body("the-role"))
        }
        ("GET", "latest/meta-data/iam/security-credentials/the-role") if has_ticket => keys("of-a-machine"),
        ("GET", "container") if has("authorization", "of-the-pod") => keys("of-a-pod"),
        _ => Turn::Serve,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn services_that_give_credentials_are_asked() {
    let stage = Stage::shared(Shape::Named).await;
    let store = S3::start().await;
    store.behaves(give_credentials);
    let token = stage.folder().join("token").display().to_string();
    let pod_token = stage.folder().join("token of the pod").display().to_string();
    fs::write(&token, "of-the-cluster").expect("a file");
    fs::write(&pod_token, "of-the-pod").expect("a file");
    let config = format!("[profile web]\nrole_arn = arn\nweb_identity_token_file = {token}\n");
    let bare = store.launch_bare(stage.launch()).with("HOME", &home(&stage, &config, ""));
    let sts = bare.clone().with("AWS_ENDPOINT_URL_STS", &store.endpoint());
    let of_environment = sts.clone().with("AWS_WEB_IDENTITY_TOKEN_FILE", &token).with("AWS_ROLE_ARN", "arn");
    let container = bare
        .clone()
        .with("AWS_CONTAINER_CREDENTIALS_FULL_URI", &format!("{}/container", store.endpoint()))
        .with("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", &pod_token);
    for (launch, key) in [
        (of_environment.clone(), "of-an-identity"),
        (sts.clone().with("AWS_PROFILE", "web"), "of-an-identity"),
        (container, "of-a-pod"),
        (bare.clone().with("AWS_METADATA_ENDPOINT", &store.endpoint()), "of-a-machine"),
    ] {
        let finding = storage_finding(&launch);
        assert!(finding.contains("can be written"), "{key}: {finding}");
        let written = store
            .requests()
            .into_iter()
            .rfind(|request| request.method == "PUT" && request.key.starts_with("drift"));
        let headers = written.unwrap_or_else(|| panic!("{key}: nothing was written")).headers;
        assert!(headers["authorization"].contains(&format!("Credential={key}/")), "{headers:?}");
        assert_eq!(headers["x-amz-security-token"], "of-the-session", "{headers:?}");
    }
    // A token that the service refuses, and a file that is not there.
    store.behaves(|request| match request.method.as_str() {
        "POST" => Turn::Say(Answer::error(400, "ExpiredTokenException", "Token expired")),
        _ => Turn::Serve,
    });
    for (launch, says) in [
        (of_environment.clone(), "ExpiredToken"),
        (of_environment.with("AWS_WEB_IDENTITY_TOKEN_FILE", "/nonexistent/token"), "/nonexistent/token"),
    ] {
        let finding = storage_finding(&launch);
        assert!(finding.contains(says) && !finding.contains("of-the-cluster"), "{says}: {finding}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_credentials_end_at_once() {
    let stage = Stage::shared(Shape::Named).await;
    let store = S3::start().await;
    // Nobody listens there; and somebody who takes a request and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent = format!("http://{}", silent.local_addr().expect("an address"));
    let bare = store.launch_bare(stage.launch());
    for launch in [
        bare.clone(),
        bare.clone().with("AWS_METADATA_ENDPOINT", &silent),
        bare.with("AWS_EC2_METADATA_DISABLED", "true"),
    ] {
        let started = Instant::now();
        let output = launch.output(&["setup"]);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        for name in ["AWS_ACCESS_KEY_ID", "AWS_PROFILE", "/nonexistent/.aws/credentials"] {
            assert!(said.contains(name), "{name}: {said}");
        }
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}: {said}", started.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn temporary_credentials_are_renewed() {
    let stage = Stage::shared(Shape::Named).await;
    let store = S3::start().await;
    let issuer = stage.folder().join("issue");
    // Of three seconds each, with another key every time.
    script(
        &issuer,
        r#"printf x >> "$0.count"
printf '{"Version": 1, "AccessKeyId": "key-%s", "SecretAccessKey": "hunter2", "SessionToken": "t", "Expiration": "%s"}' \
    "$(wc -c < "$0.count")" "$(date -u -d '+3 seconds' +%Y-%m-%dT%H:%M:%SZ)""#,
    );
    let config = format!("[default]\ncredential_process = '{}'\n", issuer.display());
    let launch = store.launch_bare(stage.launch()).with("HOME", &home(&stage, &config, ""));
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    let client = stage.connect().await;
    let target = stage.insert_one(&client, "one", None).await;
    stage.acknowledged(&client, target, DEADLINE).await;
    // The store takes no key that it has seen before this moment, as if they had expired.
    let old: Vec<String> = store
        .requests()
        .iter()
        .filter_map(|request| request.headers.get("authorization").cloned())
        .map(|header| header.split('/').next().unwrap_or_default().to_owned())
        .collect();
    store.behaves(move |request| {
        let key = request.headers.get("authorization").and_then(|header| header.split('/').next());
        match key.is_some_and(|key| old.iter().any(|old| old == key)) {
            true => Turn::Say(Answer::error(400, "ExpiredToken", "The provided token has expired.")),
            false => Turn::Serve,
        }
    });
    let target = stage.insert_one(&client, "two", None).await;
    stage.acknowledged(&client, target, DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    assert!(!sidecar.log().contains("hunter2"), "{}", sidecar.log());
    archive::assert_same(&client, store.download().path(), stage.shape).await;
}
