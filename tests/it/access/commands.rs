//! `opsmantik token`: what it issues opens, what it revokes does not, and nothing that it lists is a token.

use opsmantik::access::{ApiToken, Gate};
use opsmantik::domain::access::Scope;
use opsmantik::domain::id::{SiteId, TokenId};
use serde_json::{Value, json};
use uuid::Uuid;

use super::admitted;
use crate::support::database::database;
use crate::support::process::run;

fn shows_no_token(listed: &Value, tokens: &[&str]) {
    let text = listed.to_string();
    for token in tokens {
        let hash: String = opsmantik::access::hash(token).iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(!text.contains(&token[3..]) && !text.contains(&hash), "{text}");
    }
}

#[tokio::test]
async fn tokens_are_issued_listed_revoked_and_rotated_by_the_command_line() {
    let database = database().await;
    let site = database.site("shop").await;
    let env = [("DATABASE_URL", database.url.as_str())];
    let token = |args: &[&str]| {
        let args: Vec<String> = std::iter::once("token").chain(args.iter().copied()).map(str::to_owned).collect();
        async move { run(&args.iter().map(String::as_str).collect::<Vec<_>>(), &env).await }
    };
    let gate = || Gate::new(database.store.clone());
    let issue = ["issue", "--site", "shop", "--scope", "calls:write,calls:read", "--scope", "calls:read"];
    let one = token(&[&issue[..], &["--name", "Santral", "--expires", "90d", "--json"]].concat()).await.json();
    let keys: Vec<&str> = one.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(keys.len(), 7, "{keys:?}");
    assert_eq!(
        (&one["site_id"], &one["all_sites"], &one["scopes"], &one["name"]),
        (&json!(site.id), &json!(false), &json!(["calls:read", "calls:write"]), &json!("Santral"))
    );
    let first = one["token"].as_str().expect("a token");
    assert!(admitted(&gate(), first).await);
    let all = token(&["issue", "--all-sites", "--scope", "ingest:write"]).await;
    let second = all.stdout.trim();
    assert_eq!(
        second.parse::<ApiToken>().map(|token| token.reveal().to_owned()),
        Ok(second.to_owned()),
        "the token alone"
    );
    assert!(all.stderr.contains("not shown again") && !all.stderr.contains(&second[3..]), "{all:?}");
    assert!(admitted(&gate(), second).await);

    let listed = token(&["list", "--json"]).await.json();
    assert_eq!(listed.as_array().map(Vec::len), Some(2));
    shows_no_token(&listed, &[first, second]);
    shows_no_token(&json!(token(&["list"]).await.stdout), &[first, second]);
    for name in [site.id.to_string(), "shop".to_owned()] {
        let of_site = token(&["list", "--site", &name, "--json"]).await.json();
        assert_eq!((&of_site[0]["id"], of_site.as_array().map(Vec::len)), (&one["id"], Some(1)));
    }

    let id = one["id"].as_str().expect("an id");
    let next = token(&["rotate", id, "--grace", "1h", "--json"]).await.json();
    let third = next["token"].as_str().expect("a token");
    for same in ["site_id", "scopes", "name", "all_sites"] {
        assert_eq!(next[same], one[same]);
    }
    assert!(next["expires_at"].as_str() > one["expires_at"].as_str(), "as long again: {next}");
    assert!(admitted(&gate(), first).await && admitted(&gate(), third).await, "both, within the grace");
    let left = "SELECT extract(epoch FROM expires_at - now())::bigint FROM api_tokens WHERE name = 'Santral' ORDER BY created_at LIMIT 1";
    assert!((3000..=3600).contains(&database.count(left).await));
    let refused = token(&["rotate", id, "--grace", "1h"]).await;
    assert!(refused.complaint().contains("rotated already"), "its end is its grace now: {refused:?}");
    let id = next["id"].as_str().expect("an id").to_owned();
    let last = token(&["rotate", &id, "--json"]).await.json();
    assert!(!admitted(&gate(), third).await && admitted(&gate(), last["token"].as_str().expect("a token")).await);
    assert!(token(&["rotate", &id]).await.complaint().contains("revoked already"));

    let id = last["id"].as_str().expect("an id");
    assert!(token(&["revoke", id]).await.stdout.contains("is revoked"));
    let again = token(&["revoke", id]).await;
    assert!(again.code == Some(0) && again.stdout.contains("was revoked already, at 20"), "{again:?}");
    assert!(!admitted(&gate(), last["token"].as_str().expect("a token")).await);
    let shown = token(&["list", "--json"]).await.json();
    assert_eq!(shown.as_array().map(Vec::len), Some(4), "what is revoked stays in the list");
    let nobody = TokenId::from_uuid(Uuid::from_u128(9)).to_string();
    for command in ["revoke", "rotate"] {
        assert!(token(&[command, &nobody]).await.complaint().contains(&nobody), "{command}");
    }
}

#[tokio::test]
async fn what_the_token_commands_refuse_names_its_flag_and_help_teaches() {
    let database = database().await;
    database.site("shop").await;
    let env = [("DATABASE_URL", database.url.as_str())];
    let unknown = SiteId::from_uuid(Uuid::from_u128(1)).to_string();
    for (says, args) in [
        ("--site", vec!["--scope", "calls:read"]),
        ("--site", vec!["--scope", "calls:read", "--site", "nobody"]),
        ("--site", vec!["--scope", "calls:read", "--site", &unknown]),
        ("--all-sites", vec!["--scope", "calls:read", "--site", "shop", "--all-sites"]),
        ("--scope", vec!["--site", "shop"]),
        ("--scope", vec!["--site", "shop", "--scope", "calls:admin"]),
        ("--scope", vec!["--site", "shop", "--scope", ""]),
        ("--expires", vec!["--site", "shop", "--scope", "calls:read", "--expires", "soon"]),
        ("--expires", vec!["--site", "shop", "--scope", "calls:read", "--expires", "2020-01-01T00:00:00Z"]),
    ] {
        let refused = run(&[&["token", "issue"][..], &args].concat(), &env).await;
        assert!(refused.complaint().contains(says), "{args:?}: {refused:?}");
        if says == "--scope" {
            assert!(Scope::ALL.iter().all(|scope| refused.stderr.contains(scope.name())), "{refused:?}");
        }
    }
    let refused = run(&["token", "rotate", &unknown, "--grace", "long"], &env).await;
    assert!(refused.complaint().contains("--grace"), "{refused:?}");
    assert_eq!(database.count("SELECT count(*) FROM api_tokens").await, 0);
    let forged = ["token", "issue", "--site", "shop", "--scope", "calls:read", "--name", "a\nb \u{1b}[31m"];
    assert_eq!(run(&forged, &env).await.code, Some(0));
    let list = run(&["token", "list"], &env).await.stdout;
    assert!(list.lines().count() == 1 && list.contains("a b") && !list.contains('\u{1b}'), "{list:?}");
    let help = run(&["token", "issue", "--help"], &env).await.stdout;
    for word in ["--all-sites", "--expires", "--json", "90d"].into_iter().chain(Scope::ALL.map(Scope::name)) {
        assert!(help.contains(word), "{word}: {help}");
    }
}
