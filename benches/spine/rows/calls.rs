//! `calls`: how long it takes to record a call and to match it, with two years behind it.
//!
//! Of ten calls four bring the fingerprint of a visitor who was on the page just now, four were dialled after a click on their number, and two
//! belong to nobody. Each caller waits for its answer, as a telephone integration does.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, ensure};
use chrono::Utc;
use opsmantik::grpc::proto::calls_service_client::CallsServiceClient;
use opsmantik::grpc::proto::{MatchMethod, ProviderCallKey, PushedCall, RecordCallRequest, RecordCallResponse};
use uuid::Uuid;

use super::Bench;
use crate::grpc_load::{self, channel, with_token};
use crate::http_load::Answers;
use crate::report::{Bar, Line};
use crate::workload::{Beat, public_id};

/// Integrations that push at once.
const CALLERS: usize = 2;
/// A number that nobody has clicked on.
const UNKNOWN: &str = "+13035550100";

pub async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Line>> {
    let database = bench.history().await?;
    let server = bench.server(&database).await?;
    // Who is on the pages at the moment.
    let beats = bench.workload_after_past(8000).take(bench.size(5_000, 2_000));
    grpc_load::ingest(server.grpc, &bench.ground.token, &grpc_load::batches(&beats), 4).await?;
    let clicks: Vec<&Beat> =
        beats.iter().filter(|beat| beat.label.as_deref().is_some_and(|label| label.starts_with("tel:"))).collect();
    ensure!(!clicks.is_empty(), "nobody clicked");
    let calls: Arc<[PushedCall]> = (0..bench.size(5_000, 300) + 100)
        .map(|at| match at % 10 {
            0..4 => PushedCall {
                fingerprint: Some(beats[at % beats.len()].fingerprint.clone()),
                ..call(&beats[at % beats.len()], UNKNOWN)
            },
            4..8 => {
                let click = clicks[at % clicks.len()];
                call(click, click.label.as_deref().unwrap_or_default().trim_start_matches("tel:"))
            }
            _ => call(&beats[at % beats.len()], UNKNOWN),
        })
        .collect();
    let next = Arc::new(AtomicUsize::new(0));
    let mut tasks = Vec::new();
    let before = server.meter().read()?;
    for _ in 0..CALLERS {
        let mut client = CallsServiceClient::new(channel(server.grpc).await?);
        let (calls, next, token) = (calls.clone(), next.clone(), bench.ground.token.clone());
        tasks.push(tokio::spawn(async move {
            let mut taken = Vec::new();
            while let Some(call) = calls.get(next.fetch_add(1, Ordering::Relaxed)) {
                let call = PushedCall { started_at: Some(now()), ..call.clone() };
                let request = with_token(RecordCallRequest { call: Some(call) }, &token)?;
                let began = Instant::now();
                let answer = client.record_call(request).await?.into_inner();
                taken.push((u32::try_from(began.elapsed().as_micros()).unwrap_or(u32::MAX), method(&answer)?));
            }
            anyhow::Ok(taken)
        }));
    }
    let mut taken = Vec::new();
    for task in tasks {
        taken.extend(task.await?.context("RecordCall")?.into_iter().skip(100 / CALLERS));
    }
    let spent = server.meter().read()?.since(before).per_thousand(calls.len());
    let matched = |wanted: MatchMethod| taken.iter().filter(|(_, method)| *method == wanted).count();
    let (by_fingerprint, by_click) = (matched(MatchMethod::Fingerprint), matched(MatchMethod::Click));
    let (ambiguous, unmatched) = (matched(MatchMethod::Ambiguous), matched(MatchMethod::Unmatched));
    ensure!(
        by_fingerprint > 0 && by_click + ambiguous > 0 && unmatched > 0,
        "calls were not matched as they should be: {}",
        server.log()
    );
    server.stop().await?;
    let mut latencies: Vec<u32> = taken.iter().map(|(micros, _)| *micros).collect();
    latencies.sort_unstable();
    let answers = Answers { latencies, ..Answers::default() };
    let bar = Bar::AtMost { bar: 10.0, stretch: None };
    let what = format!("RecordCall with match over {} sessions, {CALLERS} callers: p99", bench.past.sessions);
    let line = Line::figure("calls", what, "ms", answers.percentile(0.99), Some(bar))
        .with("p50_ms", answers.percentile(0.5))
        .with("max_ms", answers.percentile(1.0))
        .with("fingerprint", by_fingerprint)
        .with("click", by_click)
        .with("ambiguous", ambiguous)
        .with("unmatched", unmatched)
        .with("server_cpu_ms", spent.server)
        .with("postgresql_cpu_ms", spent.database);
    Ok(vec![line])
}

fn call(beat: &Beat, number: &str) -> PushedCall {
    PushedCall {
        site: public_id(beat.site),
        key: Some(ProviderCallKey { provider: "bench".to_owned(), provider_call_id: Uuid::new_v4().to_string() }),
        dialled_number: number.to_owned(),
        caller_number: Some("+12025550187".to_owned()),
        ..PushedCall::default()
    }
}

fn now() -> prost_types::Timestamp {
    let now = Utc::now();
    prost_types::Timestamp { seconds: now.timestamp(), nanos: now.timestamp_subsec_nanos().cast_signed() }
}

fn method(answer: &RecordCallResponse) -> anyhow::Result<MatchMethod> {
    let call = answer.recorded.as_ref().and_then(|recorded| recorded.call.as_ref()).context("a recorded call")?;
    Ok(call.r#match.as_ref().context("a match")?.method())
}
