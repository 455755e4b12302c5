//! Calls find their visit, whatever comes first, and a session keeps what a call gave it as long as the call is its own.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use opsmantik::calls::{self, Calls, Decision, Effect, Recorded};
use opsmantik::domain::call::{MatchMethod, ReviewStatus, Status};
use opsmantik::domain::id::{CallId, SessionId, SiteId};
use opsmantik::domain::outcome::Outcome;
use opsmantik::domain::push::Draft;
use opsmantik::domain::recorded::{Call, Sale};
use opsmantik::keeper::Nudge;
use opsmantik::pipeline::{Pipeline, PipelineConfig};
use rand::seq::SliceRandom;
use serde_json::{Value, json};

use crate::support::calls::{BUSINESS, call, ended, outbound, push, with_fingerprint};
use crate::support::database::{Database, connect, database};
use crate::support::events::{Spec, at};

struct Stage {
    database: Database,
    pipeline: Pipeline,
    calls: Calls,
    site: SiteId,
    other: SiteId,
}

fn noon() -> DateTime<Utc> {
    at("2026-03-15T12:00:00Z")
}

fn after(seconds: i64) -> DateTime<Utc> {
    noon() + TimeDelta::seconds(seconds)
}

impl Stage {
    async fn set() -> Self {
        let database = database().await;
        for month in ["2026-01-01", "2026-02-01", "2026-03-01", "2026-04-01"] {
            database.ensure_month(month).await;
        }
        let (site, other) = (database.site("shop").await.id, database.site("neighbour").await.id);
        let config = PipelineConfig { patience: Duration::from_secs(60), ..PipelineConfig::default() };
        let pipeline = Pipeline::start(database.store.clone(), Nudge::default(), config);
        let calls = Calls::new(database.store.clone());
        Self { database, pipeline, calls, site, other }
    }

    async fn events(&self, site: SiteId, specs: &[Spec]) {
        let outcomes = self.pipeline.submit(specs.iter().map(|spec| spec.event(site)).collect()).await;
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Stored(_))), "{outcomes:?}");
    }

    async fn record(&self, drafts: Vec<Draft>) -> Vec<Recorded> {
        let pushes: Vec<_> = drafts.into_iter().map(|draft| push(self.site, draft)).collect();
        self.calls.record(self.site, &pushes).await.expect("the database answers")
    }

    async fn push(&self, draft: Draft) -> Recorded {
        self.record(vec![draft]).await.remove(0)
    }

    /// How the call is matched, and to which session.
    async fn found(&self, id: &str) -> (String, Option<String>) {
        let rows = self
            .database
            .rows(&format!("SELECT match_method, matched_session_id FROM calls WHERE provider_call_id = '{id}'"))
            .await;
        let text = |key: &str| rows[0][key].as_str().map(str::to_owned);
        (text("match_method").expect("never NULL"), text("matched_session_id"))
    }

    async fn session(&self, name: &str) -> Value {
        let id = SessionId::from_text(self.site, name);
        self.database
            .rows(&format!(
                "SELECT signals, call_signals, lead_score FROM sessions WHERE id = '{id}' AND site_id = '{}'",
                self.site
            ))
            .await
            .remove(0)
    }

    fn id(&self, name: &str) -> Option<String> {
        Some(SessionId::from_text(self.site, name).to_string())
    }
}

fn credited(call: &Call) -> Option<SessionId> {
    call.credited().map(|credit| credit.session.id)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_call_finds_the_click_before_it_and_the_visit_is_credited() {
    let stage = Stage::set().await;
    stage.events(stage.site, &[Spec::new(1, "A", after(-300)), Spec::new(2, "A", after(-60)).clicks(BUSINESS)]).await;
    let Recorded { call, effect } = stage.push(call("c1", noon())).await;
    assert_eq!((effect, call.found.decision.method), (Effect::Created, MatchMethod::Click));
    assert_eq!(credited(&call).map(|id| id.to_string()), stage.id("A"));
    assert_eq!(call.found.signals.score().get(), 60, "an interaction, and the click's own conversion");
    assert_eq!(call.credited().map(|credit| credit.at), Some(after(-60)));
    assert_eq!(stage.session("A").await, json!({"signals": 3, "call_signals": 1, "lead_score": 60}));
    // Nothing of the caller's number is anywhere but its hash.
    let row = stage.database.rows("SELECT * FROM calls").await[0].to_string();
    assert!(!row.contains("2025550187") && row.contains("\"caller_last_digits\":\"87\""), "{row}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_call_before_its_click_and_before_its_fingerprint_ends_with_the_same_match() {
    let stage = Stage::set().await;
    stage.push(call("by-click", noon())).await;
    stage.push(with_fingerprint(call("by-fingerprint", after(3600)), "F")).await;
    stage.push(outbound(call("ours", noon()))).await;
    assert_eq!(stage.found("by-click").await.0, "UNMATCHED");

    stage.events(stage.other, &[Spec::new(1, "A", after(-60)).clicks(BUSINESS).fingerprint("F")]).await;
    assert_eq!(stage.found("by-click").await.0, "UNMATCHED", "another site's click");
    stage.events(stage.site, &[Spec::new(1, "A", after(-60)).clicks(BUSINESS)]).await;
    assert_eq!(stage.found("by-click").await, ("CLICK".to_owned(), stage.id("A")));
    assert_eq!(stage.found("ours").await.0, "UNMATCHED", "the business called");
    // A second visitor clicks within the minute: nobody is credited any more, and the first visit loses what the call gave it.
    stage.events(stage.site, &[Spec::new(2, "B", after(-30)).clicks(BUSINESS)]).await;
    assert_eq!(stage.found("by-click").await, ("AMBIGUOUS".to_owned(), None));
    assert_eq!(stage.session("A").await["call_signals"], 0);

    // The visit was there in the window of the second call; only later it tells whose it is.
    stage.events(stage.site, &[Spec::new(3, "C", after(3500))]).await;
    assert_eq!(stage.found("by-fingerprint").await.0, "UNMATCHED");
    stage.events(stage.site, &[Spec::new(4, "C", after(9000)).fingerprint("F")]).await;
    assert_eq!(stage.found("by-fingerprint").await, ("FINGERPRINT".to_owned(), stage.id("C")));
    let session = stage.session("C").await;
    assert_eq!(session, json!({"signals": 3, "call_signals": 1, "lead_score": 60}), "the call is its only conversion");
    // An earlier event tells another fingerprint: the session was somebody else's, and all it got is taken back.
    stage.events(stage.site, &[Spec::new(5, "C", after(3000)).fingerprint("E")]).await;
    assert_eq!(stage.found("by-fingerprint").await, ("UNMATCHED".to_owned(), None));
    assert_eq!(stage.session("C").await, json!({"signals": 2, "call_signals": 0, "lead_score": 10}));
    assert_eq!(stage.database.count("SELECT count(*) FROM opsmantik.call_rematches").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_click_whose_visit_a_hand_has_taken_away_credits_nobody() {
    let stage = Stage::set().await;
    stage.events(stage.site, &[Spec::new(1, "A", after(-60)).clicks(BUSINESS)]).await;
    let gone = "SET session_replication_role = replica; DELETE FROM sessions; RESET session_replication_role";
    stage.database.admin.batch_execute(gone).await.expect("its own checks are off");
    let call = stage.push(call("c", noon())).await.call;
    assert_eq!((call.found.decision.method, credited(&call)), (MatchMethod::Unmatched, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_there_when_the_call_came_is_frozen_whatever_order_it_came_in() {
    let stage = Stage::set().await;
    let frozen = "SELECT lead_score_at_match AS score, score_breakdown_at_match AS lines FROM calls";
    stage.events(stage.site, &[Spec::new(2, "A", after(-60)).fingerprint("F")]).await;
    stage.push(with_fingerprint(call("c", noon()), "F")).await;
    let lines = json!([{"signal": "interaction", "points": 10}]);
    assert_eq!(stage.database.rows(frozen).await, [json!({"score": 10, "lines": lines})]);
    stage.events(stage.site, &[Spec::new(60, "A", after(60)).fingerprint("F")]).await;
    assert_eq!(stage.database.rows(frozen).await[0]["score"], 10, "a scroll after the call");
    stage.events(stage.site, &[Spec::new(61, "A", after(-120)).fingerprint("F")]).await;
    assert_eq!(stage.database.rows(frozen).await[0]["score"], 20, "a scroll before the call that arrives late");
    // The paid visit that explains this one arrives last of all.
    let paid = Spec::new(9, "paid", at("2026-02-01T12:00:00Z")).fingerprint("F").url("https://a.example/?gclid=1");
    stage.events(stage.site, &[paid]).await;
    assert_eq!(stage.database.rows(frozen).await[0]["score"], 45);
    assert_eq!(stage.session("A").await["lead_score"], 95, "with the call's conversion");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_same_call_pushed_ten_times_at_once_in_parts_of_any_order_is_one_call() {
    let stage = Stage::set().await;
    stage.events(stage.site, &[Spec::new(1, "A", after(-10)).clicks(BUSINESS)]).await;
    let parts = [
        call("c", after(1)),
        ended(call("c", noon()), Status::InProgress, 3),
        ended(call("c", after(1)), Status::Completed, 61),
        ended(call("c", after(1)), Status::Ringing, 0),
        Draft { recording_reference: Some("rec-1".to_owned()), ..call("c", after(2)) },
    ];
    for round in 0..10 {
        let mut pushes: Vec<Draft> = parts.iter().cycle().take(10).cloned().collect();
        pushes.shuffle(&mut rand::rng());
        for draft in &mut pushes {
            draft.provider_call_id = format!("c{round}");
        }
        let recorded = futures::future::join_all(pushes.into_iter().map(|draft| stage.push(draft))).await;
        let created = recorded.iter().filter(|recorded| recorded.effect == Effect::Created).count();
        assert_eq!(created, 1, "{recorded:?}");
    }
    let rows = stage
        .database
        .rows("SELECT count(*), status, duration_sec, recording_ref, started_at, match_method FROM calls GROUP BY 2, 3, 4, 5, 6")
        .await;
    let whole = json!({"count": 10, "status": "COMPLETED", "duration_sec": 61, "recording_ref": "rec-1",
        "started_at": "2026-03-15T12:00:00+00:00", "match_method": "CLICK"});
    assert_eq!(rows, [whole]);
    // In one batch, too, and each of its results tells the call as it is in the end.
    let recorded = stage.record(parts.map(|part| Draft { provider_call_id: "batch".into(), ..part }).to_vec()).await;
    assert!(recorded.iter().all(|recorded| recorded.call.told.duration_sec == Some(61)), "{recorded:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_judged_call_keeps_its_match_and_an_opened_one_is_matched_again() {
    let stage = Stage::set().await;
    let store = &stage.database.store;
    stage.events(stage.site, &[Spec::new(1, "A", after(-300)).clicks(BUSINESS)]).await;
    let id: CallId = stage.push(call("c", noon())).await.call.id;
    let review = async |decision: Decision| {
        let judged = stage.calls.review(stage.site, id, &decision, "token:t").await;
        judged.expect("the database answers").expect("there is such a call")
    };
    let sale = Sale { amount: "12.30".to_owned(), currency: "TRY".to_owned() };
    let judged = review(Decision::Confirm(Some(sale.clone()))).await;
    assert_eq!((judged.review.status, judged.review.sale), (ReviewStatus::Confirmed, Some(sale)));
    stage.events(stage.site, &[Spec::new(2, "B", after(-60)).clicks(BUSINESS)]).await;
    assert_eq!(stage.found("c").await.1, stage.id("A"), "a nearer click does not move a judged call");
    let told = stage.push(ended(call("c", noon()), Status::Completed, 30)).await;
    assert_eq!(told.effect, Effect::Merged, "a judged call is still told about");
    assert_eq!(
        (told.call.review.status, credited(&told.call).map(|id| id.to_string())),
        (ReviewStatus::Confirmed, stage.id("A"))
    );

    let opened = review(Decision::Reopen).await;
    assert_eq!((opened.review.sale.as_ref(), credited(&opened).map(|id| id.to_string())), (None, stage.id("B")));
    assert_eq!(
        (stage.session("A").await["call_signals"].clone(), stage.session("B").await["call_signals"].clone()),
        (json!(0), json!(1))
    );

    // Judged and opened by hand, as a dashboard does: the sweep of any server matches it again.
    let admin = &stage.database.admin;
    admin.batch_execute("UPDATE calls SET review = 'JUNK'").await.expect("judged");
    stage.events(stage.site, &[Spec::new(3, "C", after(-1)).clicks(BUSINESS)]).await;
    assert_eq!(stage.found("c").await.1, stage.id("B"));
    admin.batch_execute("UPDATE calls SET review = 'OPEN'").await.expect("opened");
    let stop = tokio_util::sync::CancellationToken::new();
    let sweep = tokio::spawn(calls::sweep(store.clone(), stop.clone()));
    crate::support::browser::eventually("the opened call is matched again", async || {
        (stage.found("c").await.0 == "AMBIGUOUS").then_some(())
    })
    .await;
    stop.cancel();
    sweep.await.expect("the sweep ends");
    assert!(stage.calls.review(stage.other, id, &Decision::Junk, "token:t").await.expect("it answers").is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_call_and_its_click_that_are_stored_at_the_same_time_find_each_other() {
    let stage = Stage::set().await;
    let pipeline = Pipeline::start(stage.database.store.clone(), Nudge::default(), PipelineConfig::default());
    let mut racing = tokio::task::JoinSet::new();
    for n in 0..60u32 {
        // Twenty minutes apart, each with two rivals of its own minute.
        let moment = at("2026-02-01T00:00:00Z") + TimeDelta::minutes(i64::from(n) * 40);
        for (rival, server) in [stage.pipeline.clone(), pipeline.clone()].into_iter().enumerate() {
            let id = n * 2 + u32::try_from(rival).expect("0 or 1");
            let event = Spec::new(id, &format!("v{id}"), moment).clicks(BUSINESS).event(stage.site);
            racing.spawn(async move { drop(server.submit(vec![event]).await) });
        }
        let (calls, site) = (stage.calls.clone(), stage.site);
        let pushed = push(site, call(&format!("c{n}"), moment + TimeDelta::seconds(5)));
        racing.spawn(async move {
            calls.record(site, &[pushed]).await.expect("the database answers");
        });
    }
    while let Some(ended) = racing.join_next().await {
        ended.expect("no panic");
    }
    let seen = stage
        .database
        .rows("SELECT match_method, jsonb_array_length(match_candidates) AS n, count(*) FROM calls GROUP BY 1, 2")
        .await;
    assert_eq!(seen, [json!({"match_method": "AMBIGUOUS", "n": 2, "count": 60})]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_call_at_months_end_finds_the_visit_that_began_the_month_before() {
    let stage = Stage::set().await;
    let midnight = at("2026-04-01T00:00:00Z");
    let began = Spec::new(1, "A", midnight - TimeDelta::minutes(20)).hint("2026-03-01");
    let click = Spec::new(2, "A", midnight + TimeDelta::seconds(30)).hint("2026-03-01").clicks(BUSINESS);
    stage.events(stage.site, &[began, click]).await;
    let call = stage.push(call("c", midnight + TimeDelta::seconds(60))).await.call;
    let key = call.credited().expect("a click before the call").session;
    assert_eq!(key.month.to_string(), "2026-03-01");
}

/// What is written last is committed along with it, without a look at its answer: still it is all or nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_call_that_cannot_be_written_leaves_nothing_in_its_visit_and_the_next_one_is_recorded() {
    let stage = Stage::set().await;
    stage.events(stage.site, &[Spec::new(1, "A", after(-60)).clicks(BUSINESS)]).await;
    let untouched = stage.session("A").await;
    let in_the_way = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \
         $$BEGIN RAISE EXCEPTION 'no' USING ERRCODE = 'check_violation'; END$$; \
         CREATE TRIGGER refuse BEFORE INSERT ON calls FOR EACH ROW EXECUTE FUNCTION refuse()";
    stage.database.admin.batch_execute(in_the_way).await.expect("a trigger");
    for n in 0..6 {
        let pushes = [push(stage.site, call(&format!("c{n}"), noon()))];
        let refused = stage.calls.record(stage.site, &pushes).await;
        assert!(matches!(refused, Err(calls::Failed::Refused(_))), "{refused:?}");
    }
    assert_eq!(stage.session("A").await, untouched);
    stage.database.admin.batch_execute("DROP FUNCTION refuse CASCADE").await.expect("it is gone");
    let recorded = stage.push(call("c", noon())).await.call;
    assert_eq!(credited(&recorded).map(|id| id.to_string()), stage.id("A"));
    assert_ne!(stage.session("A").await, untouched);
    assert_eq!(stage.database.count("SELECT count(*) FROM calls").await, 1);
}

/// The windows of many calls are looked through at once, each in its own months.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn calls_of_two_months_recorded_together_each_find_the_click_of_their_own_window() {
    let stage = Stage::set().await;
    let midnight = at("2026-04-01T00:00:00Z");
    let [early, late] = [midnight - TimeDelta::minutes(10), midnight + TimeDelta::minutes(50)];
    let clicks = [
        Spec::new(1, "A", early).clicks(BUSINESS),
        // Of a visit that began in the month before, and one of the month itself.
        Spec::new(2, "B", late - TimeDelta::minutes(3)).hint("2026-03-01").clicks(BUSINESS),
        Spec::new(3, "C", late).clicks(BUSINESS),
        Spec::new(4, "D", noon()).clicks(BUSINESS),
    ];
    stage.events(stage.site, &clicks).await;
    let times = [("first", early), ("before", late - TimeDelta::minutes(2)), ("second", late), ("third", noon())];
    let calls = times.map(|(name, at)| call(name, at + TimeDelta::seconds(20))).to_vec();
    let recorded = stage.record(calls).await;
    let found: Vec<_> = recorded.iter().map(|one| credited(&one.call).map(|id| id.to_string())).collect();
    assert_eq!(found, ["A", "B", "C", "D"].map(|name| stage.id(name)));
    assert_eq!(
        recorded[1].call.credited().map(|credit| credit.session.month.to_string()),
        Some("2026-03-01".to_owned())
    );
    let counts: Vec<usize> = recorded.iter().map(|one| one.call.found.decision.candidates.len()).collect();
    assert_eq!(counts, [1, 2, 2, 1], "{recorded:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_fingerprint_that_many_share_is_looked_up_whole_for_each_of_many_calls() {
    let stage = Stage::set().await;
    let many: Vec<Spec> =
        (0..130).map(|n| Spec::new(n, &format!("v{n}"), after(i64::from(n))).fingerprint("F")).collect();
    stage.events(stage.site, &many).await;
    let calls: Vec<Draft> = (0..40).map(|n| with_fingerprint(call(&format!("c{n}"), after(200)), "F")).collect();
    let recorded = stage.record(calls).await;
    let found = recorded.iter().filter(|one| credited(&one.call).map(|id| id.to_string()) == stage.id("v129")).count();
    assert_eq!(found, 40, "each is credited to the session that was active last");
    stage.events(stage.site, &[Spec::new(500, "v129", after(130)).fingerprint("F")]).await;
    assert_eq!(stage.database.count("SELECT count(*) FROM calls WHERE match_method = 'FINGERPRINT'").await, 40);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_locked_call_keeps_neither_its_sites_other_calls_waiting_nor_another_sites() {
    let mut stage = Stage::set().await;
    stage.push(call("held", noon())).await;
    let holder = stage.database.admin.transaction().await.expect("a transaction");
    holder.batch_execute("SELECT FROM calls FOR UPDATE").await.expect("held");
    let flood: Vec<_> = (0..20)
        .map(|_| {
            let (calls, site) = (stage.calls.clone(), stage.site);
            tokio::spawn(async move { calls.record(site, &[push(site, call("held", noon()))]).await.map(drop) })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let began = std::time::Instant::now();
    let elsewhere = stage.calls.record(stage.other, &[push(stage.other, call("free", noon()))]).await;
    assert!(elsewhere.is_ok() && began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let began = std::time::Instant::now();
    let beside = stage.calls.record(stage.site, &[push(stage.site, call("beside", noon()))]).await;
    assert!(beside.is_ok() && began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    holder.rollback().await.expect("let go");
    for waiting in flood {
        drop(waiting.await.expect("no panic"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_learnt_of_a_candidate_later_does_not_move_the_match() {
    let stage = Stage::set().await;
    let clicks = [Spec::new(1, "A", after(-240)).clicks(BUSINESS), Spec::new(2, "B", after(-60)).clicks(BUSINESS)];
    stage.events(stage.site, &clicks).await;
    let before = stage.push(call("c", noon())).await.call;
    stage.events(stage.site, &[Spec::new(3, "A", after(2700)).fingerprint("LATE")]).await;
    let again = stage.push(call("c", noon())).await;
    assert_eq!((again.effect, again.call), (Effect::Unchanged, before));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_a_server_noted_and_died_before_it_was_matched_is_matched_by_another() {
    let stage = Stage::set().await;
    stage.push(call("c", noon())).await;
    // As a batch leaves it that was committed by a server which was killed then: the click, its session, and the note.
    let site = stage.site;
    let left = format!(
        "WITH session AS (INSERT INTO sessions (site_id, created_month, id, created_at, last_seen_at, event_count, entry_page, attribution, \
             traffic_source, traffic_medium, signals, lead_score) VALUES ('{site}', '2026-03-01', '{id}', '2026-03-15T11:59:00Z', \
             '2026-03-15T11:59:00Z', 1, '/', 'Organic/Referral', 'Direct', 'direct', 1, 50) RETURNING site_id, id), \
         click AS (INSERT INTO events (site_id, session_month, id, session_id, created_at, occurred_at, url, event_category, event_action, \
             event_label, signals, lead_score) SELECT site_id, '2026-03-01', id, id, '2026-03-15T11:59:00Z', '2026-03-15T11:59:00Z', '/', \
             'conversion', 'phone_call', 'tel:{BUSINESS}', 1, 50 FROM session) \
         INSERT INTO opsmantik.call_rematches (site_id, call_id) SELECT site_id, id FROM calls",
        id = SessionId::from_text(site, "A"),
    );
    stage.database.admin.batch_execute(&left).await.expect("left behind");
    let stop = tokio_util::sync::CancellationToken::new();
    let sweep = tokio::spawn(calls::sweep(stage.database.store.clone(), stop.clone()));
    crate::support::browser::eventually("the call is matched", async || {
        (stage.found("c").await == ("CLICK".to_owned(), stage.id("A"))).then_some(())
    })
    .await;
    stop.cancel();
    sweep.await.expect("the sweep ends");
    assert_eq!(stage.session("A").await["call_signals"], 1);
    assert_eq!(stage.database.count("SELECT count(*) FROM opsmantik.call_rematches").await, 0);
}

/// Each of them would be looked for in all the clicks of its window, while the events of its site wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_click_has_only_calls_matched_again_that_it_can_speak_for() {
    let stage = Stage::set().await;
    stage.events(stage.site, &[Spec::new(1, "A", after(-600)).fingerprint("F")]).await;
    stage.push(call("its", noon())).await;
    stage.push(outbound(call("ours", noon()))).await;
    assert_eq!(
        stage.push(with_fingerprint(call("known", noon()), "F")).await.call.found.decision.method,
        MatchMethod::Fingerprint
    );
    stage.push(Draft { caller_number: None, ..call("hidden", noon()) }).await;
    // What is noted stays noted while they are locked.
    let holder = connect(&stage.database.url).await;
    holder.batch_execute("BEGIN; SELECT FROM calls FOR NO KEY UPDATE").await.expect("nobody else has them");
    let noted = "SELECT c.provider_call_id FROM opsmantik.call_rematches r JOIN calls c ON c.id = r.call_id";
    stage.events(stage.site, &[Spec::new(2, "B", after(-60)).clicks("+13035550177")]).await;
    assert!(stage.database.rows(noted).await.is_empty(), "another number's click");
    stage.events(stage.site, &[Spec::new(3, "C", after(-30)).clicks(BUSINESS)]).await;
    assert_eq!(stage.database.rows(noted).await, [json!({"provider_call_id": "its"})]);
}

/// A person may lock their own calls, as whoever judges one does for a moment. No other site waits for them, and no event of theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_call_that_somebody_has_locked_holds_up_no_event() {
    let stage = Stage::set().await;
    stage.push(call("c1", noon())).await;
    let mut person = connect(&stage.database.url).await;
    let open = person.transaction().await.expect("a transaction");
    open.batch_execute("SELECT FROM calls FOR UPDATE").await.expect("locked");
    let began = std::time::Instant::now();
    for n in 0..5 {
        let clicks =
            [Spec::new(10 + n, "A", after(-60)).clicks(BUSINESS), Spec::new(30 + n, "B", after(-60)).clicks(BUSINESS)];
        let outcomes = stage.pipeline.submit(vec![clicks[0].event(stage.site), clicks[1].event(stage.other)]).await;
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Stored(_))), "{outcomes:?}");
    }
    assert!(began.elapsed() < Duration::from_secs(8), "five batches took {:?}", began.elapsed());
    assert_eq!(stage.found("c1").await.0, "UNMATCHED");
    open.rollback().await.expect("let go");
    calls::settle(&stage.database.store, stage.site, None).await.expect("nobody is in the way");
    assert_eq!(stage.found("c1").await.0, "CLICK");
}
