use super::*;
use std::collections::BTreeMap;

fn load(uri: Option<&str>, environment: &[(&str, &str)]) -> Result<SourceConfig> {
    let variables: BTreeMap<_, _> = environment.iter().copied().collect();
    SourceConfig::new(uri, &|name| variables.get(name).map(|value| (*value).to_owned()))
}

fn shown(uri: &str) -> String {
    load(Some(uri), &[("USER", "me")]).unwrap().to_string()
}

#[test]
fn reads_the_forms_of_a_uri() {
    for (uri, expected) in [
        ("postgres://u:p@h:1/d", "u@h:1/d"),
        ("postgresql://h", "me@h:5432/me"),
        ("postgresql://u@h", "u@h:5432/u"),
        ("postgresql://u@[::1]:7/d", "u@[::1]:7/d"),
        ("postgresql://u@[::1]/d", "u@[::1]:5432/d"),
        ("postgresql://a,b:2,c/d", "me@a:5432,b:2,c:5432/d"),
        ("postgresql://a,b/d?port=9", "me@a:9,b:9/d"),
        ("postgresql://u%40x:p%2F%3A@h/d%20e", "u@x@h:5432/d e"),
        ("postgresql:///d?host=/run/postgresql", "me@/run/postgresql:5432/d"),
        ("postgresql://%2Frun%2Fpg:6/d", "me@/run/pg:6/d"),
        ("postgresql:///?host=/s&user=x&dbname=y", "x@/s:5432/y"),
        ("  ", "postgres@localhost:5432/postgres"),
    ] {
        assert_eq!(shown(uri), expected, "{uri}");
    }
}

#[test]
fn keeps_what_the_parameters_say() {
    let config = load(
        Some(
            "postgres://u:s%25ecret@h/d?sslmode=verify-full&sslrootcert=/ca.pem&sslcert=/c&sslkey=/k\
             &connect_timeout=3&application_name=x&options=-c%20work_mem%3D1MB",
        ),
        &[],
    )
    .unwrap();
    assert_eq!(config.password.as_ref().unwrap().reveal(), "s%ecret");
    assert_eq!(config.ssl_mode, SslMode::VerifyFull);
    assert_eq!(config.ssl_root_cert, Some("/ca.pem".into()));
    assert_eq!(config.ssl_identity, Some(("/c".into(), "/k".into())));
    assert_eq!(config.connect_timeout, Duration::from_secs(3));
    assert_eq!(config.application_name, "x");
    assert_eq!(config.options.as_deref(), Some("-c work_mem=1MB"));
    assert!(!format!("{config:?} {config}").contains("ecret"));
}

#[test]
fn the_uri_wins_over_the_environment_and_both_over_defaults() {
    let environment =
        [("PGHOST", "e"), ("PGPORT", "7"), ("PGUSER", "eu"), ("PGPASSWORD", "ep"), ("PGDATABASE", "ed")];
    assert_eq!(load(None, &environment).unwrap().to_string(), "eu@e:7/ed");
    let both = load(Some("postgres://u@h"), &environment).unwrap();
    assert_eq!(both.to_string(), "u@h:7/ed");
    assert_eq!(both.password.as_ref().unwrap().reveal(), "ep");
    let neither = load(None, &[("PGSSLMODE", "require")]).unwrap();
    assert_eq!(neither.to_string(), "postgres@localhost:5432/postgres");
    assert_eq!(neither.ssl_mode, SslMode::Require);
    assert_eq!(neither.application_name, "highwater");
}

#[test]
fn refuses_by_name_and_without_the_password() {
    for (uri, named) in [
        ("mysql://u:secret@h/d", "DATABASE_URI"),
        ("secret", "DATABASE_URI"),
        ("postgres://u:secret@h%/d", "DATABASE_URI"),
        ("postgres://u:secret%0@h/d", "DATABASE_URI"),
        ("postgres://u:sec%00ret@h/d", "DATABASE_URI"),
        ("postgres://u:secret@[::1/d", "DATABASE_URI"),
        ("postgres://h/d?password=secret&x", "DATABASE_URI"),
        ("postgres://u:secret@h:port/d", "h:port/d"),
        ("postgres://u:sec/secret@h/d", "***@h/d"),
        ("postgres://u:1/secret@h/d", "***@h/d"),
        ("postgres://u:secret?x@h/d", "***@h/d"),
        ("postgres://u:secret@h/d?port=1,2", "\"1,2\""),
        ("postgres://u:secret@h/d?sslmode=always", "verify-full"),
        ("postgres://u:secret@h/d?sslcert=/c", "sslkey"),
        ("postgres://u:secret@h/d?connect_timeout=soon", "connect_timeout"),
        ("host=h user=u password='secret", "single quote"),
        ("host=h passwort=secret", "\"passwort\", but must be one of host"),
        ("host=h password=my-secret /secret=x", "\"***\", but must be one of"),
        ("postgres://u:secret@h/d?pasword=secret", "\"pasword\", but must be one of host"),
    ] {
        let error = load(Some(uri), &[]).unwrap_err();
        assert!(matches!(error, Error::Setting { .. }), "{uri}: {error:?}");
        assert!(error.to_string().contains(named), "{uri}: {error}");
        assert!(!format!("{error} {error:?}").contains("secret"), "{uri}: {error}");
    }
    let error = load(None, &[("PGHOST", "h"), ("PGSSLMODE", "x")]).unwrap_err();
    assert!(error.to_string().starts_with("PGSSLMODE is \"x\""), "{error}");
}

#[test]
fn what_libpq_takes_is_taken() {
    for text in [
        "host=a,b port=5,6 user=u dbname=d target_session_attrs=read-write load_balance_hosts=random",
        "postgres://u@a:5,b:6/d?target_session_attrs=primary&load_balance_hosts=random&gssencmode=prefer",
        "host=a,b port=5,6 user=u dbname=d load_balance_hosts=random krbsrvname=x sslcompression=0 \
         client_encoding=auto max_protocol_version=latest replication=database",
    ] {
        let config = load(Some(text), &[]).unwrap();
        assert_eq!(config.to_string(), "u@a:5,b:6/d", "{text}");
        assert!(config.shuffles && config.target == Target::Primary, "{text}");
    }
    let config = load(
        Some(
            "host=h hostaddr=::1 sslmode=allow sslcrl=/a sslcrldir=/b sslsni=0 ssl_min_protocol_version=TLSv1.3 \
             channel_binding=require require_auth='!password, !none' target_session_attrs=any connect_timeout=0 \
             keepalives_idle=7 keepalives_count=0 tcp_user_timeout=1500 fallback_application_name=y",
        ),
        &[],
    )
    .unwrap();
    assert_eq!(config.endpoints[0].host_address, Some("::1".parse().unwrap()));
    assert_eq!(config.endpoints[0].address, Address::Tcp { host: "h".into(), port: 5432 });
    assert_eq!(config.ssl_crls, [PathBuf::from("/a"), PathBuf::from("/b")]);
    assert_eq!((config.ssl_mode, config.ssl_sni), (SslMode::Allow, false));
    assert_eq!(config.ssl_versions, (TlsVersion::V13, TlsVersion::V13));
    assert_eq!(config.channel_binding, ChannelBinding::Require);
    assert_eq!(config.require_auth, Some(vec![AuthMethod::Md5, AuthMethod::Scram]));
    assert_eq!((config.target, config.connect_timeout), (Target::Any, Duration::MAX));
    let idle = Some(Duration::from_secs(7));
    assert_eq!(config.keepalive, Some(Keepalive { idle, ..Keepalive::default() }));
    assert_eq!(config.tcp_user_timeout, Some(Duration::from_millis(1500)));
    assert_eq!(config.application_name, "y");
    assert_eq!(load(Some("keepalives=0"), &[]).unwrap().keepalive, None);
    let system = load(Some("host=h sslrootcert=system"), &[]).unwrap();
    assert_eq!((system.ssl_mode, system.ssl_root_cert), (SslMode::VerifyFull, None));
    assert_eq!(load(Some("postgres://h/d?ssl=true"), &[]).unwrap().ssl_mode, SslMode::Require);
    assert!(load(Some("postgres://h/d?sslmode=require&sslnegotiation=direct"), &[]).unwrap().ssl_direct);
}

#[test]
fn what_can_not_be_honoured_is_refused_by_name_wherever_it_was_written() {
    for (name, variable, value) in [
        ("gssencmode", "PGGSSENCMODE", "require"),
        ("requirepeer", "PGREQUIREPEER", "postgres"),
        ("sslcertmode", "PGSSLCERTMODE", "require"),
        ("require_auth", "PGREQUIREAUTH", "gss"),
        ("require_auth", "PGREQUIREAUTH", "md5,!none"),
        ("channel_binding", "PGCHANNELBINDING", "required"),
        ("target_session_attrs", "PGTARGETSESSIONATTRS", "standby"),
        ("target_session_attrs", "PGTARGETSESSIONATTRS", "prefer-standby"),
        ("sslnegotiation", "PGSSLNEGOTIATION", "direct"),
        ("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION", "TLSv1.1"),
        ("min_protocol_version", "PGMINPROTOCOLVERSION", "3.2"),
        ("sslpassword", "", "secret"),
        ("scram_client_key", "", "secret"),
    ] {
        let mut errors = vec![load(Some(&format!("host=h {name}={value}")), &[]).unwrap_err()];
        if !variable.is_empty() {
            errors.push(load(Some("host=h"), &[(variable, value)]).unwrap_err());
        }
        for error in errors {
            let text = error.to_string();
            assert!(text.starts_with(name) || text.starts_with(variable), "{text}");
            assert!(matches!(error, Error::Setting { .. }) && !text.contains("secret"), "{text}");
        }
    }
    for (text, named) in [
        ("host=h sslrootcert=system sslmode=require", "sslmode"),
        ("host=a,b hostaddr=::1", "hostaddr"),
        ("host=h hostaddr=localhost", "hostaddr"),
        ("host=h ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2", "ssl_max"),
    ] {
        let error = load(Some(text), &[]).unwrap_err().to_string();
        assert!(error.starts_with(named), "{text}: {error}");
    }
}

#[test]
fn a_service_file_completes_the_string_before_the_environment_does() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().to_str().unwrap();
    std::fs::write(home.path().join(".pg_service.conf"), "[own]\nhost=from_file\nuser=fu\n").unwrap();
    std::fs::write(home.path().join("pg_service.conf"), "[shared]\nhost=sh\nport=9\npassword=p\n").unwrap();
    let variables = [("HOME", folder), ("PGSYSCONFDIR", folder), ("PGUSER", "eu"), ("PGDATABASE", "d")];
    let shown = |uri: &str| load(Some(uri), &variables).unwrap().to_string();
    assert_eq!(shown("service=own"), "fu@from_file:5432/d");
    assert_eq!(shown("postgres://h?service=own"), "fu@h:5432/d");
    assert_eq!(shown("postgres:///?service=shared"), "eu@sh:9/d");
    let by_variable: Vec<_> = variables.iter().copied().chain([("PGSERVICE", "shared")]).collect();
    assert_eq!(load(None, &by_variable).unwrap().to_string(), "eu@sh:9/d");
    let error = load(Some("service=none"), &variables).unwrap_err().to_string();
    assert!(error.contains("\"none\"") && error.contains("pg_service.conf"), "{error}");
}

#[cfg(unix)]
#[test]
fn each_host_gets_its_own_line_of_the_password_file() {
    use std::os::unix::fs::PermissionsExt as _;
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join(".pgpass");
    std::fs::write(&file, "a:5432:d:u:for a\nlocalhost:*:*:*:socket\n").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let home = home.path().to_str().unwrap();
    let uri = "postgres://u@a,b/d";
    let found = |uri: &str, environment: &[(&str, &str)]| {
        let config = load(Some(uri), environment).unwrap();
        let of = |one| config.password(one).map(|it| it.reveal().to_owned());
        config.endpoints.iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!(found(uri, &[("HOME", home)]), [Some("for a".to_owned()), None]);
    assert_eq!(
        found(uri, &[("HOME", home), ("PGPASSWORD", "x")]),
        [Some("x".to_owned()), Some("x".to_owned())]
    );
    assert_eq!(found(uri, &[("PGPASSFILE", file.to_str().unwrap())]), [Some("for a".to_owned()), None]);
    assert_eq!(
        found("postgres://u@/d?host=/var/run/postgresql", &[("HOME", home)]),
        [Some("socket".to_owned())]
    );
}
