//! The command line as a person and as a script meet it: what it prints, how it refuses, and `dev` from nothing.

use std::collections::HashSet;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{self, kill};
use nix::unistd::Pid;
use opsmantik::dev::tools::{BUF, require, skip_or_fail};
use serde_json::{Value, json};
use tokio::process::Command;
use uuid::Uuid;

use crate::support::cluster::cluster;
use crate::support::database::{connect, database, empty};
use crate::support::process::{Ended, Program, client, run};

#[tokio::test]
async fn serve_refuses_what_cannot_work_with_a_sentence_that_names_it_and_tells_no_secret() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("some port is free");
    let taken = taken.local_addr().map(|address| (address.to_string(), taken)).expect("it is bound");
    let url = "postgres://u:hunter2@127.0.0.1:1/none";
    let free = ["HTTP_ADDR", "GRPC_ADDR", "ADMIN_ADDR"].map(|name| (name, "127.0.0.1:0"));
    let (unset, wrong, typo) = ("DATABASE_URL", "postgres://u:hunter2@[", "u:hunter2@127.0.0.1/none");
    for (named, env) in [
        (unset, vec![]),
        (unset, vec![("DATABASE_URL", "")]),
        ("DATABASE_URL", vec![("DATABASE_URL", wrong)]),
        ("DATABASE_URL", vec![("DATABASE_URL", typo)]),
        ("DATABASE_URL", vec![("DATABASE_URL", "mysql://u:hunter2@127.0.0.1/none")]),
        ("HTTP_ADDR", vec![("DATABASE_URL", url), ("HTTP_ADDR", &taken.0)]),
        ("GRPC_ADDR", vec![("DATABASE_URL", url), ("GRPC_ADDR", &taken.0)]),
        ("ADMIN_ADDR", vec![("DATABASE_URL", url), ("ADMIN_ADDR", &taken.0)]),
        ("HTTP_ADDR", vec![("DATABASE_URL", url), ("HTTP_ADDR", "localhost")]),
        ("GRPC_ADDR", vec![("DATABASE_URL", url), ("GRPC_ADDR", "0.0.0.0:0")]),
        ("RATE_LIMIT", vec![("DATABASE_URL", url), ("RATE_LIMIT", "many")]),
        ("QSTASH_TOKEN", vec![("DATABASE_URL", url), ("QUEUE", "qstash")]),
        ("QUEUE", vec![("DATABASE_URL", url), ("QUEUE", "pigeon")]),
    ] {
        let env: Vec<_> = free.iter().copied().chain(env).collect();
        let ended = run(&["serve"], &env).await;
        let said = ended.complaint();
        assert!(said.contains(named), "{env:?}: {said}");
        assert!(!said.contains("hunter2"), "{env:?}: {said}");
    }
}

#[tokio::test]
async fn migrating_twice_and_twice_at_once_is_migrating_once() {
    drop(empty("migrated_twice").await);
    let url = cluster().await.url("migrated_twice");
    let env = [("DATABASE_URL", url.as_str())];
    let (one, other) = tokio::join!(run(&["migrate"], &env), run(&["migrate"], &env));
    let third = run(&["migrate"], &env).await;
    let said: Vec<&Ended> = vec![&one, &other, &third];
    assert!(said.iter().all(|ended| ended.code == Some(0)), "{said:?}");
    let applied = said.iter().filter(|ended| ended.stdout.contains("migrations applied")).count();
    let up_to_date = said.iter().filter(|ended| ended.stdout.contains("up to date")).count();
    assert_eq!((applied, up_to_date), (1, 2), "{said:?}");
    let nowhere = run(&["migrate"], &[("DATABASE_URL", "postgres://u:hunter2@127.0.0.1:1/none")]).await;
    assert!(nowhere.complaint().contains("database"), "{nowhere:?}");
    assert!(!nowhere.stderr.contains("hunter2"), "{nowhere:?}");
}

#[tokio::test]
async fn sites_are_added_for_scripts_and_each_refusal_names_its_flag() {
    let database = database().await;
    let env = [("DATABASE_URL", database.url.as_str())];
    let owner = Uuid::from_u128(7).to_string();
    let add = ["site", "add", "--name", "Şık & Söhne", "--domain", "Shop.Example", "--json"];
    let all = ["--origin", "https://a.example:8443", "--origin", "*", "--public-id", "shop-1", "--owner", &owner];
    let added = run(&[&add[..], &all].concat(), &env).await.json();
    assert!(added["id"].as_str().is_some_and(|id| Uuid::try_parse(id).is_ok()), "{added}");
    assert_eq!((&added["public_id"], &added["name"]), (&json!("shop-1"), &json!("Şık & Söhne")));
    assert_eq!(
        (&added["domain"], &added["origins"]),
        (&json!("shop.example"), &json!(["https://a.example:8443", "*"]))
    );
    let made_up = run(&add, &env).await.json();
    assert!(made_up["public_id"].as_str().is_some_and(|id| id.len() == 10), "{made_up}");
    let owned = format!("SELECT count(*) FROM sites WHERE user_id = '{owner}' AND public_id = 'shop-1'");
    assert_eq!(database.count(&owned).await, 1);

    for (flag, value) in [
        ("--public-id", "shop-1"),
        ("--public-id", "shop 1"),
        ("--public-id", ""),
        ("--public-id", owner.as_str()),
        ("--domain", ""),
        ("--domain", "shop example"),
        ("--origin", "shop.example"),
        ("--origin", "ftp://shop.example"),
        ("--origin", "https://shop.example/path"),
        ("--owner", "me"),
        ("--region", "ZZ"),
        ("--region", "001"),
        ("--region", "Turkey"),
        ("--name", " "),
    ] {
        let mut args = vec!["site", "add"];
        for (name, good) in [("--name", "x"), ("--domain", "x.example")] {
            if name != flag {
                args.extend([name, good]);
            }
        }
        let refused = run(&[&args[..], &[flag, value]].concat(), &env).await;
        assert!(refused.complaint().contains(flag), "{flag} `{value}`: {refused:?}");
    }
    let listed = run(&["site", "list", "--json"], &env).await.json();
    assert_eq!(listed, json!([added, made_up]), "and nothing of what was refused");
}

#[tokio::test]
async fn months_are_listed_and_made_and_dead_letters_are_shown() {
    let database = database().await;
    let env = [("DATABASE_URL", database.url.as_str())];
    let months = |listed: &Value| -> HashSet<String> {
        let months = listed.as_array().expect("a list").iter();
        months.map(|month| month["month"].as_str().expect("a month").to_owned()).collect()
    };
    let before = months(&run(&["partitions", "list", "--json"], &env).await.json());
    let this_month = chrono::Utc::now().format("%Y-%m-01").to_string();
    assert!(before.len() >= 5 && before.contains(&this_month), "{before:?}");
    let ensure = ["partitions", "ensure", "--month", "2024-02-01", "--month", "2024-03", "--json"];
    let made = json!(["sessions_2024_02", "events_2024_02", "sessions_2024_03", "events_2024_03"]);
    assert_eq!(run(&ensure, &env).await.json(), made);
    assert_eq!(run(&ensure, &env).await.json(), json!([]), "they are there");
    let after = run(&["partitions", "list", "--json"], &env).await.json();
    let added: HashSet<_> = months(&after).difference(&before).cloned().collect();
    assert_eq!(added, HashSet::from(["2024-02-01".to_owned(), "2024-03-01".to_owned()]));
    for bad in ["2024-13", "1999-01", "soon"] {
        let refused = run(&["partitions", "ensure", "--month", bad], &env).await;
        assert!(refused.complaint().contains("month"), "{bad}: {refused:?}");
    }

    assert_eq!(run(&["dead-letters", "list", "--json"], &env).await.json(), json!([]));
    let (id, site) = (Uuid::from_u128(1), Uuid::from_u128(2));
    let insert = "INSERT INTO dead_letters (id, site_id, source, reason, detail, payload, received_at) \
        VALUES ($1, $2, 'pipeline', 'refused_by_database', 'write batch: 23514 no', '{\"v\":1}', now())";
    database.admin.execute(insert, &[&id, &site]).await.expect("a letter");
    let list = |args: &'static [&str]| async move {
        let args = [&["dead-letters", "list", "--json"], args].concat();
        let letters = run(&args, &env).await.json();
        letters.as_array().expect("a list").len()
    };
    assert_eq!(list(&[]).await, 1);
    assert_eq!(list(&["--reason", "refused_by_database"]).await, 1);
    assert_eq!(list(&["--reason", "unknown_site"]).await, 0);
    assert_eq!(list(&["--site", "00000000-0000-0000-0000-000000000002"]).await, 1);
    assert_eq!(list(&["--site", "00000000-0000-0000-0000-000000000003"]).await, 0);
    let shown = run(&["dead-letters", "show", &id.to_string()], &env).await.json();
    assert_eq!((&shown["reason"], &shown["payload"]), (&json!("refused_by_database"), &json!("{\"v\":1}")));
    let nobody = Uuid::from_u128(9).to_string();
    assert!(run(&["dead-letters", "show", &nobody], &env).await.complaint().contains(&nobody));
}

#[tokio::test]
async fn help_teaches_and_names_the_variables() {
    let (database, data) = ("[env: DATABASE_URL", "[env: OPSMANTIK_DATA_DIR");
    let server = [
        "HTTP_ADDR",
        "GRPC_ADDR",
        "ADMIN_ADDR",
        "RATE_LIMIT",
        "TRUSTED_PROXIES",
        "QUEUE",
        "PUBLIC_URL",
        "QSTASH_TOKEN",
    ];
    let serve: Vec<String> = server.iter().map(|name| format!("[env: {name}")).collect();
    let of_serve: Vec<&str> = serve.iter().map(String::as_str).chain([database]).collect();
    for (args, says) in [
        (&[][..], vec!["serve", "dev", "migrate", "site", "partitions", "dead-letters"]),
        (&["serve"], of_serve),
        (&["dev"], vec![data, "[env: DEMO_ADDR", "kept between runs"]),
        (&["migrate"], vec![database]),
        (&["site", "add"], vec![database, "--domain", "--origin", "--public-id", "--owner", "--json"]),
        (&["site", "list"], vec![database, "--json"]),
        (&["partitions", "list"], vec![database, "--json"]),
        (&["partitions", "ensure"], vec![database, "--month", "--json"]),
        (&["dead-letters", "list"], vec![database, "--reason", "--count", "--after", "--json"]),
        (&["dead-letters", "replay"], vec![database, "--all", "--dry-run", "--again", "--since", "--json"]),
        (&["dead-letters", "show"], vec![database]),
    ] {
        let help = run(&[args, &["--help"]].concat(), &[("DATABASE_URL", "postgres://u:hunter2@h/d")]).await;
        assert_eq!(help.code, Some(0), "{help:?}");
        // As wide as the terminal, so a line may end anywhere.
        let text = help.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
        for word in says {
            assert!(text.contains(word), "{args:?} does not tell of {word}:\n{text}");
        }
        assert!(!help.stdout.contains("hunter2"), "{args:?}");
    }
}

/// A folder for `dev`, gone with the test. Its database may lie elsewhere and is found by the note beside it.
struct DataDir(PathBuf);

impl DataDir {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("opsmantik-test-dev-{}", Uuid::new_v4().simple()));
        std::fs::create_dir(&path).expect("the temporary folder is writable");
        Self(path)
    }

    /// Where PostgreSQL's files are.
    fn postgres(&self) -> PathBuf {
        let here = self.0.join("postgres");
        match std::fs::read_to_string(self.0.join("postgres.location")) {
            Ok(elsewhere) => PathBuf::from(elsewhere.trim()),
            Err(_) => here,
        }
    }
}

impl Drop for DataDir {
    fn drop(&mut self) {
        for folder in [self.postgres(), self.0.clone()] {
            drop(std::fs::remove_dir_all(folder));
        }
    }
}

/// A running `dev` and what it printed.
struct Dev {
    program: Program,
    page: String,
    api_page: String,
    site: String,
    curl: String,
    grpc: String,
    call: String,
    psql: String,
    ready: String,
}

impl Dev {
    async fn start(data_dir: &Path, env: &[(&str, &str)]) -> Self {
        let free = ["HTTP_ADDR", "GRPC_ADDR", "ADMIN_ADDR", "DEMO_ADDR"].map(|name| (name, "127.0.0.1:0"));
        let env: Vec<_> = free.iter().chain(env).copied().collect();
        let folder = data_dir.to_str().expect("a test's own path");
        let mut program = Program::start(&["dev", "--data-dir", folder], &env);
        let printed = |said: &str| {
            let (_, lines) = said.split_once("OpsMantik is running.")?;
            let (lines, operator) = lines.split_once("\n  Operator")?;
            operator.contains("/metrics").then(|| (lines.to_owned(), operator.to_owned()))
        };
        let (lines, operator) = program.until("what to open and call", printed).await;
        // A label, then a command that may go on over lines that end with a backslash.
        let after = |label: &str| {
            let (_, rest) =
                lines.split_once(&format!("\n  {label} ")).unwrap_or_else(|| panic!("no {label}:\n{lines}"));
            let command = rest.split("\n\n").next().unwrap_or_default();
            command.trim().to_owned()
        };
        let url = |text: &str| text.split_whitespace().find(|word| word.starts_with("http://")).map(str::to_owned);
        let open = after("Open");
        Self {
            page: url(&open).expect("the demo page"),
            api_page: url(open.split_once('\n').expect("two pages").1).expect("the page on the API's origin"),
            site: after("Demo site").split_whitespace().next().expect("an id").to_owned(),
            curl: after("HTTP"),
            grpc: after("gRPC"),
            call: after("A call"),
            psql: after("SQL"),
            ready: url(&operator).expect("the operator's listener"),
            program,
        }
    }
}

/// What a line of the printed ones does in a shell.
async fn shell(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).kill_on_drop(true).output();
    let output =
        tokio::time::timeout(Duration::from_secs(20), output).await.expect("it ends").expect("there is a shell");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{line}\n{text}");
    text
}

/// What the printed lines for gRPC are answered, by the client that they name, which `npx` would fetch.
async fn called(dev: &Dev, buf: &std::path::Path) -> String {
    let lines = format!("{}\n{}", dev.grpc, dev.call);
    assert!(lines.contains("npx -y @bufbuild/buf@1.75.0"), "{lines}");
    shell(&lines.replace("npx -y @bufbuild/buf@1.75.0", &buf.display().to_string())).await
}

/// PostgreSQL of this folder, if it runs.
fn postgres_of(data_dir: &DataDir) -> Option<Pid> {
    let pid = std::fs::read_to_string(data_dir.postgres().join("data/postmaster.pid")).ok()?;
    let pid = Pid::from_raw(pid.lines().next()?.trim().parse().ok()?);
    kill(pid, None).is_ok().then_some(pid)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_raises_everything_and_what_it_prints_works_and_its_data_stays() {
    let data_dir = DataDir::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("some port is free");
    let address = taken.local_addr().expect("it is bound").to_string();
    let other =
        [("DATABASE_URL", "postgres://u:hunter2@127.0.0.1:1/other"), ("HTTP_ADDR", &address), ("DEMO_ADDR", &address)];
    let mut dev = Dev::start(&data_dir.0, &other).await;
    let said = dev.program.said();
    for name in ["HTTP_ADDR", "DEMO_ADDR"] {
        let told = said.lines().find(|line| line.contains(name) && line.contains(&address));
        assert!(told.is_some_and(|line| line.contains("taken")), "{name}: {said}");
    }
    assert!(said.contains("DATABASE_URL is ignored") && !said.contains("hunter2"), "{said}");

    let client = client();
    for page in [&dev.page, &dev.api_page] {
        let answer = client.get(page).send().await.expect("an answer");
        assert_eq!(answer.status(), 200, "{page}");
        let html = answer.text().await.expect("a page");
        assert!(html.contains("tracker.js") && html.contains("tel:") && !html.contains("{{"), "{page}");
    }
    assert_eq!(client.get(&dev.ready).send().await.expect("an answer").status(), 200);
    let answer = shell(&dev.curl).await;
    assert!(answer.contains("200 OK") && answer.contains(r#""status":"stored""#), "{answer}");
    assert!(answer.contains(r#""score":50"#), "{answer}");
    match tokio::task::spawn_blocking(|| require(BUF)).await.expect("looking for a tool does not panic") {
        Ok(buf) => {
            let answer: String = called(&dev, &buf.path).await.split_whitespace().collect();
            assert!(answer.contains(r#""value":80"#), "{answer}");
            assert!(answer.contains("MATCH_METHOD_CLICK"), "the call finds the click of the line before: {answer}");
        }
        Err(missing) => skip_or_fail(&missing),
    }
    let ask = |dev: &Dev, what: &str| format!("{} -At -c \"{what}\"", dev.psql);
    let landing = "SELECT site_id, gclid, attribution FROM sessions";
    let expected = format!("{}|curl|Direct-to-Ads\n", dev.site);
    assert_eq!(shell(&ask(&dev, landing)).await, expected);

    let token_file = data_dir.0.join("token");
    let token = std::fs::read_to_string(&token_file).expect("the token is kept").trim().to_owned();
    let mode = std::fs::metadata(&token_file).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "and nobody else's to read");
    assert!(dev.grpc.contains(&token));

    assert!(postgres_of(&data_dir).is_some());
    dev.program.stop(Duration::from_secs(15)).await;
    assert_eq!(postgres_of(&data_dir), None, "it took its database with it");
    let mut again = Dev::start(&data_dir.0, &[]).await;
    assert_eq!(again.site, dev.site);
    assert!(again.grpc.contains(&token), "a token that is good is used again");
    assert_eq!(shell(&ask(&again, landing)).await, expected, "the data stayed");
    // The page's origins are new ones, and allowed.
    assert!(shell(&again.curl).await.contains("200 OK"));
    // A closed terminal stops it, too.
    again.program.signal(signal::Signal::SIGHUP);
    assert_eq!(again.program.ended().await.code(), Some(0), "{}", again.program.said());
    assert_eq!(postgres_of(&data_dir), None, "nothing is left behind");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_that_was_killed_leaves_no_database_behind_and_the_next_one_recovers_it() {
    let data_dir = DataDir::new();
    let dev = Dev::start(&data_dir.0, &[]).await;
    assert!(shell(&dev.curl).await.contains("200 OK"));
    let folder = data_dir.0.to_str().expect("a test's own path");
    let env = ["HTTP_ADDR", "GRPC_ADDR", "ADMIN_ADDR", "DEMO_ADDR"].map(|name| (name, "127.0.0.1:0"));
    let second = run(&["dev", "--data-dir", folder], &env).await;
    assert!(second.complaint().contains("in use"), "{second:?}");
    let (site, psql) = (dev.site.clone(), dev.psql.clone());
    dev.program.kill().await;
    // At once, while the orphaned database is still about to notice.
    let mut next = Dev::start(&data_dir.0, &[]).await;
    assert_eq!((&next.site, &next.psql), (&site, &psql));
    assert_eq!(shell(&format!("{psql} -At -c 'SELECT count(*) FROM events'")).await, "1\n");
    next.program.stop(Duration::from_secs(15)).await;

    let killed = Dev::start(&data_dir.0, &[]).await;
    assert!(postgres_of(&data_dir).is_some());
    killed.program.kill().await;
    let began = Instant::now();
    while postgres_of(&data_dir).is_some() {
        assert!(began.elapsed() < Duration::from_secs(20), "the database outlives its owner");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_database_that_is_not_migrated_is_named_as_such() {
    drop(empty("bare").await);
    let url = cluster().await.url("bare");
    let env = [("DATABASE_URL", url.as_str())];
    for args in [&["site", "list"][..], &["partitions", "list"], &["dead-letters", "list"]] {
        let refused = run(args, &env).await;
        assert!(refused.complaint().contains("opsmantik migrate"), "{args:?}: {refused:?}");
    }
    drop(connect(&url).await);
}
