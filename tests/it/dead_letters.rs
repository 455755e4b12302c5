//! What died is stored again: by the same way, once, where it belongs; and a million of them are no more in memory than a few.

use std::process::Stdio;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use opsmantik::domain::id::{DeadLetterId, SiteId};
use opsmantik::domain::job::Job;
use opsmantik::domain::outcome::{DeathReason, Outcome};
use opsmantik::keeper::Nudge;
use opsmantik::pipeline::{Pipeline, PipelineConfig};
use opsmantik::store::dead_letters::DeadLetter;
use opsmantik::store::statement::STATEMENTS;
use serde_json::{Value, json};
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use crate::support::database::{Database, database};
use crate::support::events::Spec;
use crate::support::process::{Ended, Program, run};

const POISON: &str = "CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
       IF NEW.url LIKE '%poison%' THEN RAISE EXCEPTION 'poison'; END IF; RETURN NEW; END $$; \
     CREATE TRIGGER poison BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION poison()";
const CURE: &str = "DROP TRIGGER poison ON events; DROP FUNCTION poison()";

async fn letters(database: &Database, args: &[&str]) -> Ended {
    run(&[&["dead-letters"], args].concat(), &[("DATABASE_URL", database.url.as_str())]).await
}

/// The summary of a replay, and how it ended.
async fn replay(database: &Database, args: &[&str]) -> (Value, Ended) {
    let ended = letters(database, &[&["replay", "--json"], args].concat()).await;
    let summary = serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    (summary, ended)
}

fn counts(summary: &Value) -> [u64; 3] {
    ["replayed", "failed", "cannot_be_replayed"].map(|key| summary[key].as_u64().expect("a number"))
}

async fn letter_of(database: &Database, id: DeadLetterId) -> Value {
    database.rows(&format!("SELECT * FROM dead_letters WHERE id = '{id}'")).await.remove(0)
}

/// Buries a delivery as the worker does.
async fn bury(database: &Database, source: &'static str, body: &str, received_at: DateTime<Utc>) -> DeadLetterId {
    let letter = DeadLetter {
        id: DeadLetterId::derived(body.as_bytes()),
        site_id: None,
        event_id: None,
        source,
        reason: DeathReason::UnknownSite,
        detail: "no site".to_owned(),
        payload: body.to_owned(),
        received_at,
    };
    database.store.bury(&letter).await.expect("it is kept");
    letter.id
}

fn wire(id: u128, site: &str) -> Value {
    json!({"id": Uuid::from_u128(id), "s": site, "u": "https://later.example/", "sid": format!("visit {id}")})
}

fn job(id: u32, site: SiteId, at: DateTime<Utc>) -> String {
    Job::new(Spec::new(id, &format!("s{id}"), at).event(site)).to_json().expect("a job")
}

#[tokio::test]
async fn each_kind_of_letter_is_stored_by_a_replay_where_and_when_it_belongs() {
    let database = database().await;
    let site = database.site("shop").await.id;
    database.admin.batch_execute(POISON).await.expect("a trigger that refuses");
    let pipeline = Pipeline::start(database.store.clone(), Nudge::default(), PipelineConfig::default());
    let late = Utc::now() - TimeDelta::days(70);
    let poisonous = Spec::new(1, "s", late).url("https://a.example/poison").event(site);
    assert_eq!(pipeline.submit(vec![poisonous.clone()]).await, [Outcome::Dead(DeathReason::RefusedByDatabase)]);
    let later = SiteId::from_uuid(Uuid::from_u128(77));
    let month_ago = Utc::now() - TimeDelta::days(35);
    let delivered_job = bury(&database, "worker", &job(2, later, month_ago), Utc::now()).await;
    let form = bury(&database, "worker", &wire(3, "later").to_string(), month_ago).await;
    let batch = json!({"events": [wire(4, "later"), wire(5, "later"), wire(4, "later")]}).to_string();
    let batch = bury(&database, "worker", &batch, Utc::now()).await;
    let call = bury(&database, "calls", "{\"provider\":\"p\"}", Utc::now()).await;

    // Nothing is mended yet.
    let (summary, ended) = replay(&database, &["--all"]).await;
    assert_eq!((counts(&summary), ended.code), ([0, 4, 1], Some(1)), "{summary}");
    assert!(ended.stderr.contains("4 letters failed again"), "{}", ended.stderr);
    let left = summary["left"].as_array().expect("those that stay");
    let error = |id: DeadLetterId| {
        let letter = left.iter().find(|letter| letter["id"] == json!(id)).expect("it is named");
        letter["error"].as_str().expect("and why").to_owned()
    };
    assert!(error(delivered_job).starts_with("unknown_site: "), "{summary}");
    assert!(error(form).contains("unknown_site: `s` names no known site"), "{summary}");
    assert!(error(call).contains("numbers are not kept"), "{summary}");
    let tried = database.rows("SELECT last_error, tries FROM dead_letters WHERE source = 'pipeline'").await;
    assert_eq!(tried.len(), 1, "the same letter: {tried:?}");
    assert!(
        tried[0]["tries"] == 2 && tried[0]["last_error"].as_str().is_some_and(|e| e.contains("poison")),
        "{tried:?}"
    );
    assert_eq!(letter_of(&database, call).await["tries"], 1, "nobody can try it");
    assert_eq!(database.count("SELECT count(*) FROM events").await, 0);

    database.admin.batch_execute(CURE).await.expect("cured");
    database.site_with_id("later", later).await;
    let (summary, ended) = replay(&database, &["--all"]).await;
    assert_eq!((counts(&summary), ended.code), ([4, 0, 1], Some(0)), "{summary} {}", ended.stderr);
    assert_eq!((&summary["events_stored"], &summary["events_duplicate"]), (&json!(5), &json!(1)));
    let months = database
        .rows("SELECT id, session_month = date_trunc('month', created_at AT TIME ZONE 'UTC')::date AS right, created_at FROM events ORDER BY id")
        .await;
    assert!(months.len() == 5 && months.iter().all(|event| event["right"] == true), "{months:#?}");
    let at = |row: &Value| row["created_at"].as_str().and_then(|at| at.parse::<DateTime<Utc>>().ok()).expect("a time");
    assert_eq!(at(&months[0]), poisonous.received_at, "as it arrived");
    assert!((at(&months[2]) - month_ago).abs() < TimeDelta::seconds(1), "as the delivery arrived");
    let done = letter_of(&database, batch).await;
    assert!(done["replayed_at"].is_string() && done["tries"] == 3 && done["last_error"].is_string(), "{done}");

    // Once more changes nothing: by default none is left, and all of them again are copies.
    let traffic = database.traffic().await;
    let (summary, ended) = replay(&database, &["--all"]).await;
    assert_eq!((counts(&summary), ended.code), ([0, 0, 1], Some(0)), "{summary}");
    let (summary, _) = replay(&database, &["--all", "--again"]).await;
    assert_eq!(
        (counts(&summary), &summary["events_stored"], &summary["events_duplicate"]),
        ([4, 0, 1], &json!(0), &json!(6))
    );
    let (summary, ended) = replay(&database, &[&form.to_string()]).await;
    assert_eq!((counts(&summary), &summary["skipped"], ended.code), ([0, 0, 0], &json!(1), Some(0)));
    assert!(ended.stderr.contains("--again"), "{}", ended.stderr);
    assert_eq!(database.traffic().await, traffic);
}

#[tokio::test]
async fn a_letter_that_fails_again_stays_the_same_letter_with_one_try_more() {
    let database = database().await;
    let (gone, here) = (database.site("gone").await.id, database.site("here").await.id);
    database.admin.batch_execute(POISON).await.expect("a trigger that refuses");
    let pipeline = Pipeline::start(database.store.clone(), Nudge::default(), PipelineConfig::default());
    let poisonous = |id, site| Spec::new(id, "s", Utc::now()).url("https://a.example/poison").event(site);
    pipeline.submit(vec![poisonous(1, gone), poisonous(2, here)]).await;
    let mut half = wire(4, "here");
    half["u"] = json!("https://here.example/poison");
    let mixed = json!({"events": [wire(3, "here"), half, {"id": "x", "s": "here", "sid": "no page"}]}).to_string();
    let mixed = bury(&database, "worker", &mixed, Utc::now()).await;
    database.admin.execute("DELETE FROM sites WHERE id = $1", &[&gone.as_uuid()]).await.expect("deleted");
    for tries in 2..=3 {
        let (summary, ended) = replay(&database, &["--reason", "refused_by_database"]).await;
        assert_eq!((counts(&summary), ended.code), ([0, 2, 0], Some(1)), "{summary}");
        let rows = database
            .rows("SELECT tries, last_error, replayed_at FROM dead_letters WHERE source = 'pipeline' ORDER BY event_id")
            .await;
        assert_eq!(rows.len(), 2, "{rows:?}");
        let told = |row: &Value| row["last_error"].as_str().unwrap_or_default().to_owned();
        assert!(told(&rows[0]).starts_with("unknown_site: ") && told(&rows[1]).contains("poison"), "{rows:?}");
        assert!(rows.iter().all(|row| row["tries"] == tries && row["replayed_at"].is_null()), "{rows:?}");
    }
    let (summary, _) = replay(&database, &[&mixed.to_string()]).await;
    assert_eq!(counts(&summary), [0, 1, 0], "{summary}");
    assert_eq!(
        database.count("SELECT count(*) FROM dead_letters").await,
        3,
        "what died of it has no letter of its own"
    );
    assert_eq!(database.count("SELECT count(*) FROM events").await, 1, "what is good of it is stored");
    let old = bury(
        &database,
        "worker",
        &job(9, here, Utc::now() - TimeDelta::days(3000)),
        Utc::now() - TimeDelta::days(3000),
    )
    .await;
    let (summary, _) = replay(&database, &[&old.to_string()]).await;
    assert!(summary["left"][0]["error"].as_str().is_some_and(|e| e.contains("partition_missing")), "{summary}");

    // Replayed, and dead again: it waits for the next replay.
    database.admin.batch_execute(CURE).await.expect("cured");
    assert_eq!(counts(&replay(&database, &["--site", &here.to_string()]).await.0), [1, 0, 0]);
    database.admin.batch_execute("DELETE FROM events").await.expect("deleted");
    database.admin.batch_execute(POISON).await.expect("poisoned again");
    assert_eq!(pipeline.submit(vec![poisonous(2, here)]).await, [Outcome::Dead(DeathReason::RefusedByDatabase)]);
    let count =
        letters(&database, &["list", "--count", "--json", "--not-replayed", "--site", &here.to_string()]).await.json();
    assert_eq!(count[0]["not_replayed"], 1, "{count}");
}

#[tokio::test]
async fn a_dry_run_tells_each_fate_and_changes_nothing() {
    let database = database().await;
    let site = database.site("dry").await.id;
    let now = Utc::now();
    let pipeline = Pipeline::start(database.store.clone(), Nudge::default(), PipelineConfig::default());
    pipeline.submit(vec![Spec::new(1, "s1", now).event(site)]).await;
    let bodies = [
        ("worker", job(1, site, now)),
        ("worker", job(2, site, now - TimeDelta::days(200))),
        ("worker", job(3, site, now - TimeDelta::days(3000))),
        ("worker", "hello".to_owned()),
        ("worker", wire(6, "nobody").to_string()),
        ("calls", "{}".to_owned()),
    ];
    let mut ids = Vec::new();
    for (source, body) in &bodies {
        // A delivery that died long ago had arrived then.
        let at = if body.contains("page-3\"") { now - TimeDelta::days(3000) } else { now };
        ids.push(bury(&database, source, body, at).await);
    }
    let state = || async { (database.rows("SELECT * FROM dead_letters ORDER BY id").await, database.traffic().await) };
    let before = state().await;
    let ended = letters(&database, &["replay", "--dry-run", "--all"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for (id, fate) in ids.iter().zip([
        "would be replayed: 0 events to store, 1 stored already",
        "would be replayed: 1 events to store, 0 stored already",
        "would fail again: partition_missing",
        "would fail again: malformed_job",
        "would fail again: unknown_site",
        "cannot be replayed",
    ]) {
        let line = ended.stdout.lines().find(|line| line.starts_with(&id.to_string())).unwrap_or_default();
        assert!(line.contains(fate), "{line} is not {fate}");
    }
    assert!(ended.stdout.contains("2 would be replayed"), "{}", ended.stdout);
    assert!(ended.stderr.contains("6 letters are chosen"), "{}", ended.stderr);
    // What is left out is not counted.
    let first = ids[0].to_string();
    for (some, chosen) in [(&["--after", &first][..], 5), (&["--after", &first, "--limit", "2"], 2)] {
        let ended = letters(&database, &[&["replay", "--dry-run", "--all"], some].concat()).await;
        assert!(ended.stderr.contains(&format!("{chosen} letters are chosen")), "{some:?}: {}", ended.stderr);
    }
    assert_eq!(state().await, before);
}

#[tokio::test]
async fn what_is_meant_has_to_be_said() {
    let database = database().await;
    let site = database.site("said").await.id;
    let id = bury(&database, "worker", &job(1, site, Utc::now()), Utc::now()).await.to_string();
    let nobody = Uuid::from_u128(9).to_string();
    let unsaid = letters(&database, &["replay"]).await;
    assert_eq!((unsaid.code, unsaid.complaint().contains("--all")), (Some(2), true), "{unsaid:?}");
    for wrong in [&["--all", "--source", "worker"][..], &[&id, "--all"], &["--reason", "bad"], &["--since", "soon"]] {
        assert_eq!(letters(&database, &[&["replay"], wrong].concat()).await.code, Some(2), "{wrong:?}");
    }
    assert!(letters(&database, &["replay", &id, &nobody]).await.complaint().contains(&nobody));
    for nothing in [
        &["--since", "2040-01-01"][..],
        &["--until", "1h"],
        &["--source", "pipeline"],
        &["--reason", "malformed_job"],
        &["--site", &nobody],
    ] {
        assert_eq!(counts(&replay(&database, nothing).await.0), [0, 0, 0], "{nothing:?}");
    }
    assert_eq!(database.count("SELECT count(*) FROM events").await, 0, "nothing was meant");
    let all = ["--since", "1h", "--until", "2040-01-01T00:00:00Z", "--source", "worker", "--reason", "unknown_site"];
    assert_eq!(counts(&replay(&database, &all).await.0), [1, 0, 0]);
}

/// So many letters of one moment, each of an event with a visit of its own.
async fn fill(database: &Database, site: SiteId, letters: i32) {
    let event = Spec::new(0, "s", Utc::now()).event(site);
    let (id, session) = (event.id.to_string(), event.session_id.to_string());
    let mut event = event;
    // As heavy as a usual one, and not to be compressed.
    event.metadata.insert("filling".to_owned(), "FILLING".into());
    let job = Job::new(event).to_json().expect("a job");
    let insert = "INSERT INTO dead_letters (site_id, event_id, source, reason, detail, payload, received_at, tries) \
        SELECT $1, md5('e' || n)::uuid, 'pipeline', 'refused_by_database', 'd', \
          replace(replace(replace($2, $3, md5('e' || n)::uuid::text), $4, md5('s' || n)::uuid::text), 'FILLING', \
            (SELECT string_agg(md5(n::text || i), '') FROM generate_series(1, 12) AS i)), now(), 1 \
        FROM generate_series(1, $5) AS n";
    // What is not yet in the log cannot be marked as seen by all, and an index alone tells of nothing else.
    database.admin.batch_execute("SET synchronous_commit = on").await.expect("set");
    database.admin.execute(insert, &[&site.as_uuid(), &job, &id, &session, &letters]).await.expect("letters");
    // Nor while anybody on the cluster, such as a feed that begins, holds on to what was seen before.
    let seen = "SELECT relallvisible = relpages FROM pg_class WHERE oid = 'public.dead_letters'::regclass";
    crate::support::browser::eventually("all letters are seen by all", async || {
        database.admin.batch_execute("VACUUM ANALYZE dead_letters").await.expect("looked at");
        database.admin.query_one(seen, &[]).await.expect("a table").get::<_, bool>(0).then_some(())
    })
    .await;
}

/// The most that the process has held, KiB.
fn peak(pid: i32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches("kB").trim().parse().ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_that_is_killed_goes_on_where_it_was_and_holds_a_page_however_many_there_are() {
    let asked_for = std::env::var("LETTERS").ok().and_then(|letters| letters.parse().ok());
    let letters: i32 = asked_for.unwrap_or(10_000);
    let database = database().await;
    let site = database.site("many").await.id;
    fill(&database, site, letters).await;
    let env = [("DATABASE_URL", database.url.as_str())];
    let replayed = "SELECT count(*) FROM dead_letters WHERE replayed_at IS NOT NULL";

    let program = Program::start(&["dead-letters", "replay", "--all"], &env);
    while database.count(replayed).await < 1500 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    program.kill().await;
    let before = database.count(replayed).await;
    assert!((1500..i64::from(letters)).contains(&before), "killed in the middle: {before}");

    // Asked to stop, it ends in order, and says where.
    let mut program = Program::start(&["dead-letters", "replay", "--all"], &env);
    while database.count(replayed).await < before + 1500 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    program.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(program.ended().await.code(), Some(1), "{}", program.said());
    let said = program.until("where it was", |said| said.contains("interrupted").then(|| said.to_owned())).await;
    assert!(said.contains("--after ") && !said.contains("panicked"), "{said}");
    let before = database.count(replayed).await;
    assert!(before < i64::from(letters), "stopped in the middle: {before}");

    // Two at once do the rest.
    let mut both = [(); 2].map(|()| Program::start(&["dead-letters", "replay", "--all", "--json"], &env));
    let mut most = 0;
    while database.count(replayed).await < i64::from(letters) {
        most = both.iter().filter_map(|program| peak(program.pid())).max().unwrap_or(0).max(most);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for program in &mut both {
        assert_eq!(program.ended().await.code(), Some(0), "{}", program.said());
    }
    let untold = "SELECT count(*) FROM dead_letters WHERE replayed_at IS NULL OR tries <> 2 OR last_error IS NOT NULL";
    assert_eq!(database.count(untold).await, 0, "each was replayed once and once only");
    assert_eq!(database.count("SELECT count(*) FROM events").await, i64::from(letters));
    assert_eq!(database.count("SELECT sum(event_count)::bigint FROM sessions").await, i64::from(letters));
    assert!((1..64 << 10).contains(&most), "a replay held {most} KiB");
}

#[tokio::test]
async fn a_long_list_is_read_by_pages_counted_from_an_index_and_cut_off_without_complaint() {
    const LETTERS: i32 = 20_000;
    let database = database().await;
    let site = database.site("long").await.id;
    fill(&database, site, LETTERS).await;
    let _other = bury(&database, "worker", "hello", Utc::now()).await;

    let count = letters(&database, &["list", "--count", "--json"]).await.json();
    assert_eq!((&count[0]["reason"], &count[0]["letters"]), (&json!("refused_by_database"), &json!(LETTERS)));
    assert_eq!((&count[1]["reason"], &count[1]["letters"]), (&json!("unknown_site"), &json!(1)));

    // Twice a page is the list of two pages, also among letters of one moment.
    let ids = |ended: &Ended| -> Vec<String> {
        ended.stdout.lines().filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect()
    };
    let whole = ids(&letters(&database, &["list", "--limit", "2500"]).await);
    assert_eq!(whole.len(), 2500);
    let first = ids(&letters(&database, &["list", "--limit", "1200"]).await);
    let rest = letters(&database, &["list", "--limit", "1300", "--after", &first[1199]]).await;
    assert_eq!([first, ids(&rest)].concat(), whole);
    let json = letters(&database, &["list", "--limit", "70", "--json"]).await.json();
    let of_json: Vec<_> =
        json.as_array().expect("a list").iter().map(|letter| letter["id"].as_str().unwrap_or_default()).collect();
    assert_eq!(of_json, whole[..70]);
    let nobody = Uuid::from_u128(9).to_string();
    assert!(letters(&database, &["list", "--after", &nobody]).await.complaint().contains(&nobody));

    // A reader who has had enough.
    for what in ["list --limit 20000", "list --limit 2000 --json"] {
        let script = format!("set -o pipefail; {} dead-letters {what} | head -n 1", env!("CARGO_BIN_EXE_opsmantik"));
        let shell = tokio::process::Command::new("bash")
            .args(["-c", &script])
            .env("DATABASE_URL", &database.url)
            .stdin(Stdio::null())
            .output();
        let output = shell.await.expect("bash runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && said.is_empty() && !output.stdout.is_empty(),
            "{what}: {:?} {said}",
            output.status
        );
    }

    // Of a million, too: a page is found and not sorted out, and what is counted is read from an index.
    let at = Utc::now();
    let nothing = (None::<Vec<Uuid>>, None::<Uuid>, None::<String>, None::<DateTime<Utc>>);
    let (ids, uuid, text, time) = (&nothing.0, &nothing.1, &nothing.2, &nothing.3);
    let (id, nowhere) = (Uuid::max(), None::<Uuid>);
    let chosen: [&(dyn ToSql + Sync); 7] = [ids, uuid, text, text, time, time, &false];
    let page: [&(dyn ToSql + Sync); 5] = [&true, &at, &id, &256i64, &1_000_000i64];
    let (all, after): ([&(dyn ToSql + Sync); 2], [&(dyn ToSql + Sync); 2]) = ([time, &nowhere], [&at, &id]);
    for (name, more, index) in [
        ("NEXT_DEAD_LETTERS", &page[..], "Index Scan using dead_letters_to_replay"),
        ("LIST_DEAD_LETTERS", &page[..4], "Index Scan Backward using dead_letters_"),
        ("COUNT_DEAD_LETTERS", &all, "Index Only Scan using dead_letters_"),
        ("COUNT_DEAD_LETTERS", &after, "Index Only Scan using dead_letters_"),
    ] {
        let statement = STATEMENTS.iter().find(|statement| statement.name == name).expect("it is registered");
        let values = [&chosen[..], more].concat();
        assert_eq!(values.len(), statement.params.len(), "{name}");
        let typed: Vec<_> = values.into_iter().zip(statement.params.iter().cloned()).collect();
        let explain = format!("EXPLAIN {}", (statement.sql)());
        let plan = database.admin.query_typed(&explain, &typed).await.expect("it can be explained");
        let plan: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
        let plan = plan.join("\n");
        assert!(plan.contains(index) && !plan.contains("Seq Scan"), "{name}:\n{plan}");
    }
}
