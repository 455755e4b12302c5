use super::*;
use clap::Parser;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

fn settings(flags: &[&str]) -> Settings {
    Line::try_parse_from(["x"].iter().chain(flags)).expect("flags of a test").settings
}

const QSTASH: [&str; 4] =
    ["--queue=qstash", "--public-url=https://c.example/", "--qstash-token=t0p", "--qstash-current-signing-key=k3y"];

#[test]
fn what_is_missing_is_named() {
    let error = |flags: &[&str], mode| settings(flags).check(mode).err().map(|error| error.to_string());
    assert_eq!(error(&[], Mode::Dev), None);
    assert!(error(&["--database-url="], Mode::Serve).is_some_and(|e| e.starts_with("DATABASE_URL is not set")));
    assert_eq!(error(&QSTASH, Mode::Dev), None);
    for (left_out, name) in [(1, "PUBLIC_URL"), (2, "QSTASH_TOKEN"), (3, "QSTASH_CURRENT_SIGNING_KEY")] {
        let flags: Vec<&str> = (0..4).filter(|i| *i != left_out).map(|i| QSTASH[i]).collect();
        assert!(error(&flags, Mode::Dev).is_some_and(|e| e.starts_with(&format!("{name} is not set"))), "{name}");
    }
    let wrong = error(&["--qstash-current-signing-key=k", "--public-url=c.example"], Mode::Dev);
    assert!(wrong.is_some_and(|e| e.starts_with("PUBLIC_URL is wrong")));
    let wrong = error(&[QSTASH[0], QSTASH[1], QSTASH[3], "--qstash-token=t\u{fc}"], Mode::Dev);
    assert!(wrong.is_some_and(|e| e.starts_with("QSTASH_TOKEN is wrong") && !e.contains('\u{fc}')));
}

#[test]
fn grpc_has_tls_plaintext_by_order_or_loopback_alone() {
    let protection = |flags: &[&str]| settings(flags).grpc_protection(Mode::Serve);
    let (cert, key, ca) = ("--grpc-tls-cert=/c", "--grpc-tls-key=/k", "--grpc-tls-client-ca=/a");
    assert_eq!(protection(&["--grpc-tls-cert=", "--grpc-plaintext="]), Ok(Protection::Loopback));
    assert_eq!(protection(&["--grpc-plaintext"]), Ok(Protection::Elsewhere));
    assert_eq!(protection(&["--grpc-plaintext=false"]), Ok(Protection::Loopback));
    for (flags, client_ca) in [(vec![cert, key], None), (vec![cert, key, ca], Some("/a".into()))] {
        let files = TlsFiles { cert: "/c".into(), key: "/k".into(), client_ca };
        assert_eq!(protection(&flags), Ok(Protection::Tls(files)));
        assert_eq!(settings(&flags).grpc_protection(Mode::Dev), Ok(Protection::Loopback));
    }
    for (flags, complaint) in [
        (vec![cert], "GRPC_TLS_KEY is not set"),
        (vec![key, ca], "GRPC_TLS_CERT is not set"),
        (vec![ca], "GRPC_TLS_CERT is not set"),
        (vec![cert, key, "--grpc-plaintext"], "GRPC_PLAINTEXT is wrong"),
    ] {
        let error = protection(&flags).expect_err("they do not go together").to_string();
        assert!(error.starts_with(complaint), "{flags:?}: {error}");
    }
    let typed = Line::try_parse_from(["x", "--grpc-plaintext=ture"]).expect_err("a slip").to_string();
    assert!(typed.contains("GRPC_PLAINTEXT") || typed.contains("--grpc-plaintext"), "{typed}");
}

#[test]
fn the_keys_everybody_knows_are_for_developers() {
    for flag in ["current", "next"] {
        let key = format!("--qstash-{flag}-signing-key=sig_7kYjw48mhY7kAjqNGcy6cr29RJ6r");
        let settings = settings(&["--database-url=x", "--public-url=https://c.example", &key]);
        assert!(matches!(settings.check(Mode::Serve), Err(ConfigError::DevelopmentKey(_))), "{flag}");
        assert_eq!(settings.check(Mode::Dev), Ok(()));
    }
}

#[test]
fn people_are_let_in_only_by_a_long_secret_or_keys_that_nobody_can_swap() {
    let long = format!("--supabase-jwt-secret={}", "s".repeat(32));
    let users = |flag: &str| settings(&[flag]).users();
    assert!(users("--supabase-jwt-secret=").is_ok_and(|users| users.secret.is_none() && users.jwks.is_none()));
    assert!(users(&long).is_ok_and(|users| users.secret.is_some()));
    let short = settings(&[&long[..long.len() - 1]]).check(Mode::Dev).map_err(|error| error.to_string());
    assert!(short.is_err_and(|error| error.starts_with("SUPABASE_JWT_SECRET is wrong") && !error.contains("ss")));
    for good in
        ["https://x.supabase.co/auth/v1/jwks?a=1", "http://127.0.0.1:1/k", "http://[::1]/k", "http://localhost/"]
    {
        assert!(users(&format!("--supabase-jwks-url={good}")).is_ok_and(|users| users.jwks.is_some()), "{good}");
    }
    for bad in
        ["http://x.supabase.co/k", "http://127.0.0.1.x.example/", "ftp://localhost/", "x", "https://u:p@x.example/"]
    {
        let refused = users(&format!("--supabase-jwks-url={bad}")).map(drop).map_err(|error| error.to_string());
        assert!(refused.is_err_and(|error| error.starts_with("SUPABASE_JWKS_URL is wrong")), "{bad}");
    }
}

#[test]
fn the_destination_has_one_slash_whatever_public_url_ends_with() {
    for public in ["https://c.example", "https://c.example/", "https://c.example//"] {
        let settings = settings(&[QSTASH[0], QSTASH[2], QSTASH[3], "--public-url", public]);
        let config = settings.qstash(Mode::Dev).ok().flatten();
        assert_eq!(config.map(|c| c.destination), Some("https://c.example/api/sync/worker".to_owned()));
    }
}

#[test]
fn secrets_are_not_shown_and_proxies_are_networks() {
    let shown = format!("{:?}", settings(&QSTASH));
    assert!(!shown.contains("t0p") && !shown.contains("k3y"), "{shown}");
    let proxies = settings(&["--trusted-proxies=10.0.0.0/8, ::1"]).trusted_proxies.0;
    assert_eq!(proxies.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.0/8", "::1/128"]);
    let wrong = Line::try_parse_from(["x", "--trusted-proxies=all"]).expect_err("not a network").to_string();
    assert!(wrong.contains("TRUSTED_PROXIES") && wrong.contains("`all`"), "{wrong}");
}

#[test]
fn nats_is_found_by_its_url_and_the_roles_need_it() {
    let error = |flags: &[&str]| {
        let flags: Vec<&str> = ["--database-url=x"].iter().chain(flags).copied().collect();
        settings(&flags).check(Mode::Serve).err().map(|error| error.to_string()).unwrap_or_default()
    };
    let nats = ["--queue=nats", "--nats-url=nats://u:p4ss@a:4222,nats://b"];
    for role in ["all", "edge", "worker"] {
        assert_eq!(error(&[nats[0], nats[1], "--role", role]), "");
    }
    for queue in ["inline", "qstash"] {
        let flags = [&QSTASH[1..], &["--queue", queue, "--role=worker"]].concat();
        assert!(error(&flags).starts_with("ROLE is wrong: only QUEUE=nats"), "{queue}: {}", error(&flags));
    }
    let in_dev = settings(&[nats[0], nats[1], "--role=edge"]).check(Mode::Dev);
    assert_eq!(in_dev, Err(ConfigError::Invalid("ROLE", "dev runs everything in one process")));
    assert!(error(&[nats[0]]).starts_with("NATS_URL is not set"));
    let wrong = error(&[nats[0], "--nats-url=nats://u:p4ss@a,tls://b"]);
    assert!(wrong.starts_with("NATS_URL is wrong") && !wrong.contains("p4ss"), "{wrong}");
    let twice = error(&[nats[0], nats[1], "--nats-credentials=/c"]);
    assert!(twice.starts_with("NATS_CREDENTIALS is wrong"), "{twice}");
    assert!(error(&[nats[0], nats[1], "--nats-stream=a.b"]).starts_with("NATS_STREAM is wrong"));
    let shown = format!("{:?}", settings(&nats));
    assert!(!shown.contains("p4ss"), "{shown}");
}
