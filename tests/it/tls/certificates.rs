//! Files that are no good in less obvious ways than half of one: whatever is put there, the old certificates serve on.

use std::process::Command;

use super::*;

/// PEM form around something that is no certificate.
const NO_CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----\nbm8gY2VydGlmaWNhdGU=\n-----END CERTIFICATE-----\n";

/// A server's pair that is valid in these years only.
fn valid(authority: &Authority, from: i32, to: i32) -> Pair {
    let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).expect("an address");
    params.not_before = rcgen::date_time_ymd(from, 1, 1);
    params.not_after = rcgen::date_time_ymd(to, 1, 1);
    let key = KeyPair::generate().expect("a key");
    let cert = params.signed_by(&key, &authority.0).expect("a certificate");
    Pair { cert: cert.pem(), key: key.serialize_pem() }
}

/// Has the files read again and waits until the log names the file and what is wrong with it.
async fn refused(server: &mut Server, variable: &str, fault: &str) {
    server.program.signal(Signal::SIGHUP);
    let named = |said: &str| {
        let mut lines = said.lines().filter(|line| line.contains("\"ERROR\""));
        lines.any(|line| line.contains(variable) && line.contains(fault)).then_some(())
    };
    let what = format!("that {variable} {fault}");
    tokio::time::timeout(NOTICED, server.program.until(&what, named))
        .await
        .unwrap_or_else(|_| panic!("not said: {what}"));
}

#[tokio::test]
async fn a_block_that_is_no_certificate_behind_a_good_one_changes_nothing() {
    let (database, folder, ours) = (database().await, Folder::new(), Authority::new());
    let pair = ours.server();
    let mut server = serve(&database, &folder, &pair, Some(&ours)).await;
    let trusted = || ours.trusted().identity(ours.client());
    let next = ours.server();
    folder.write("tls.key", &next.key);
    folder.write("tls.crt", &format!("{}{NO_CERTIFICATE}", next.cert));
    refused(&mut server, "GRPC_TLS_CERT", "no certificate").await;
    served(secure(&server, trusted())).await.expect("the old chain is whole");

    folder.write("tls.crt", &next.cert);
    folder.write("ca.crt", &format!("{}{NO_CERTIFICATE}", ours.0.pem()));
    refused(&mut server, "GRPC_TLS_CLIENT_CA", "no certificate").await;
    served(secure(&server, trusted())).await.expect("the old authority is known");

    let broken = folder.write("broken.crt", &format!("{}{NO_CERTIFICATE}", pair.cert));
    let key = folder.write("pair.key", &pair.key);
    let env = [("DATABASE_URL", &*database.url), ("HTTP_ADDR", "127.0.0.1:0"), ("ADMIN_ADDR", "127.0.0.1:0")];
    let tls = [("GRPC_ADDR", "127.0.0.1:0"), ("GRPC_TLS_CERT", &*broken), ("GRPC_TLS_KEY", &*key)];
    let ended = run(&["serve"], &[&env[..], &tls].concat()).await;
    assert!(ended.complaint().contains(&broken), "{}", ended.complaint());
}

#[tokio::test]
async fn a_certificate_out_of_its_time_is_served_from_the_start_but_replaces_none() {
    let (database, folder, ours) = (database().await, Folder::new(), Authority::new());
    let mut server = serve(&database, &folder, &ours.server(), None).await;
    for (from, to, fault) in [(2001, 2002, "has run out"), (2098, 2099, "not yet valid")] {
        let pair = valid(&ours, from, to);
        folder.write("tls.crt", &pair.cert);
        folder.write("tls.key", &pair.key);
        refused(&mut server, "GRPC_TLS_CERT", fault).await;
        served(secure(&server, ours.trusted())).await.expect("the old one stays");
    }
    let metrics = Metrics::of(&server).await;
    let failed = metrics.value("opsmantik_grpc_certificate_reloads_total", &[("outcome", "failed")]);
    assert!(failed.is_some_and(|times| times >= 2.0), "{metrics:?}");

    let late = serve(&database, &folder, &valid(&ours, 2001, 2002), None).await;
    assert!(late.program.said().contains("it has run out"), "{}", late.program.said());
    let early = serve(&database, &folder, &valid(&ours, 2098, 2099), None).await;
    assert!(early.program.said().contains("it is not yet valid"), "{}", early.program.said());
}

#[tokio::test]
async fn what_is_no_file_is_said_and_blocks_nothing() {
    let (database, folder, ours) = (database().await, Folder::new(), Authority::new());
    let mut server = serve(&database, &folder, &ours.server(), None).await;
    let pipe = folder.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo is part of every Unix").success());
    std::fs::create_dir(folder.path("folder")).expect("the folder is ours");
    std::fs::write(folder.path("large"), vec![b' '; (1 << 20) + 1]).expect("the folder is ours");
    for (thing, fault) in [
        (&*pipe, "no regular file"),
        ("folder", "no regular file"),
        ("/dev/zero", "no regular file"),
        ("large", "larger"),
    ] {
        // Each is told of a variable of its own turn: what was said before is not what is waited for.
        let variable = if thing == "folder" { "tls.key" } else { "tls.crt" };
        let whole = std::fs::read(folder.path(variable)).expect("it is there");
        let before = complaints(&server);
        folder.point(variable, thing);
        refused(&mut server, variable, fault).await;
        eventually("a new complaint", || async { complaints(&server) > before }).await;
        served(secure(&server, ours.trusted())).await.expect("the old one stays");
        std::fs::remove_file(folder.path(variable)).expect("it is a link");
        std::fs::write(folder.path(variable), whole).expect("the folder is ours");
    }
    let other = Authority::new();
    let pair = other.server();
    folder.write("tls.crt", &pair.cert);
    folder.write("tls.key", &pair.key);
    server.program.signal(Signal::SIGHUP);
    eventually("good files are read again", || async { served(secure(&server, other.trusted())).await.is_ok() }).await;
    server.program.stop(Duration::from_secs(15)).await;
}

fn complaints(server: &Server) -> usize {
    server.program.said().matches("were not replaced").count()
}
