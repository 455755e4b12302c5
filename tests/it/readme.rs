//! The README's walkthrough of the telephone, run as it stands there.

use std::path::Path;
use std::time::Duration;

use opsmantik::dev::tools::{BUF, require, skip_or_fail};

use crate::support::database::database;
use crate::support::process::Server;

const README: &str = include_str!("../../README.md");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_gets_from_a_token_to_a_call_with_its_visit() {
    let buf = match tokio::task::spawn_blocking(|| require(BUF)).await.expect("looking for a tool does not panic") {
        Ok(found) => found.path,
        Err(missing) => return skip_or_fail(&missing),
    };
    let (_, block) = README
        .split_once("<!-- tests/it/readme.rs runs this block as it stands. -->\n```sh\n")
        .expect("the block is there");
    let (block, _) = block.split_once("```").expect("it ends");
    assert_eq!(block.lines().count(), 5, "five commands");

    let database = database().await;
    let site = "INSERT INTO sites (public_id, name, domain, region) VALUES ('demo', 'Demo', 'localhost', 'US')";
    database.admin.batch_execute(site).await.expect("the demo site, as dev makes it");
    let mut server = Server::start_with(&database.url, &[("CALLER_KEY", &"k".repeat(32))]).await;
    let path = [Path::new(env!("CARGO_BIN_EXE_opsmantik")), &buf]
        .map(|program| program.parent().expect("a folder").display().to_string());
    let mut reader = tokio::process::Command::new("bash");
    reader
        .args(["-euo", "pipefail", "-c", block])
        .env("PATH", format!("{}:{}", path.join(":"), std::env::var("PATH").expect("there is one")))
        .env("DATABASE_URL", &database.url)
        .env("HTTP_ADDR", server.http.to_string())
        .env("GRPC_ADDR", server.grpc.to_string())
        .kill_on_drop(true);
    let output =
        tokio::time::timeout(Duration::from_secs(90), reader.output()).await.expect("it ends").expect("bash runs");
    let (told, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{told}\n{complained}");
    let told: String = told.split_whitespace().collect();
    for expected in [
        r#""status":"stored""#,
        "MATCH_METHOD_CLICK",
        "SIGNAL_PRIMARY_CONVERSION",
        "CLICK_ID_KIND_GCLID",
        r#""callId""#,
    ] {
        assert!(told.contains(expected), "no {expected} in {told}");
    }
    assert!(!told.contains("2025550187"), "the caller's number came back");
    server.program.stop(Duration::from_secs(30)).await;
}
