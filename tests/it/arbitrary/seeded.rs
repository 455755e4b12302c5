//! Something to find: visits, calls and pages that the dictionary names, so that messages get past the first look.

use std::collections::HashMap;

use chrono::Utc;
use opsmantik::grpc::proto::calls_service_client::CallsServiceClient;
use opsmantik::grpc::proto::ingest_result::Outcome as Ingested;
use opsmantik::grpc::proto::ingest_service_client::IngestServiceClient;
use opsmantik::grpc::proto::record_call_result::Outcome;
use opsmantik::grpc::proto::scoring_service_client::ScoringServiceClient;
use opsmantik::grpc::proto::{
    Event, IngestRequest, ListCallsRequest, ListTopSessionsRequest, ProviderCallKey, PushedCall, RecordCallsRequest,
};
use tonic::transport::Channel;

use super::maker::Words;
use crate::support::calls::{BUSINESS, CALLER};
use crate::support::database::{Database, bearer};

fn owned<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

/// Fills the site `shop`, and returns the words that are known there.
pub async fn words(database: &Database, channel: &Channel, token: &str) -> Words {
    let now = prost_types::Timestamp { seconds: Utc::now().timestamp() - 60, nanos: 0 };
    let event = |n: usize| Event {
        site: "shop".to_owned(),
        url: "https://shop.example/?gclid=G".to_owned(),
        session_id: format!("session_id-{n}"),
        category: "conversion".to_owned(),
        action: "phone_call".to_owned(),
        label: Some(format!("tel:{BUSINESS}")),
        fingerprint: Some(format!("fingerprint-{n}")),
        ..Event::default()
    };
    let mut ingest = IngestServiceClient::with_interceptor(channel.clone(), bearer(token));
    let events = (0..8).map(event).collect();
    let stored = ingest.ingest(IngestRequest::of(events)).await.expect("stored").into_inner().results;
    let sessions = stored.iter().filter_map(|result| match &result.outcome {
        Some(Ingested::Stored(placement)) => placement.session.clone(),
        _ => None,
    });
    let sessions: Vec<_> = sessions.collect();
    assert_eq!(sessions.len(), 8);

    let mut calls = CallsServiceClient::with_interceptor(channel.clone(), bearer(token));
    let pushed = (0..8).map(|n| PushedCall {
        site: "shop".to_owned(),
        key: Some(ProviderCallKey { provider: "twilio".to_owned(), provider_call_id: format!("CA{n}") }),
        dialled_number: BUSINESS.to_owned(),
        caller_number: Some(CALLER.to_owned()),
        started_at: Some(now),
        ..PushedCall::default()
    });
    let recorded = calls.record_calls(RecordCallsRequest { calls: pushed.collect() }).await.expect("recorded");
    let ids = recorded.into_inner().results.into_iter().filter_map(|result| match result.outcome {
        Some(Outcome::Recorded(recorded)) => recorded.call.map(|call| call.id),
        _ => None,
    });
    let ids: Vec<String> = ids.collect();
    assert_eq!(ids.len(), 8);

    let list = ListCallsRequest { site: "shop".to_owned(), page_size: 1, ..ListCallsRequest::default() };
    let calls_page = calls.list_calls(list).await.expect("a page").into_inner().next_page_token;
    let month = sessions[0].session_month.clone();
    let top = ListTopSessionsRequest {
        site: "shop".to_owned(),
        session_month: month.clone(),
        page_size: 1,
        ..ListTopSessionsRequest::default()
    };
    let mut scoring = ScoringServiceClient::with_interceptor(channel.clone(), bearer(token));
    let top_page = scoring.list_top_sessions(top).await.expect("a page").into_inner().next_page_token;
    assert!(!calls_page.is_empty() && !top_page.is_empty());

    let shop = sessions[0].site_id.clone();
    let rows = database.rows("SELECT id FROM sites WHERE public_id = 'neighbour'").await;
    let neighbour = rows[0]["id"].as_str().expect("a UUID").to_owned();
    let mut sites = vec!["shop".to_owned(); 12];
    sites.extend([shop.clone(), shop, neighbour, "neighbour".to_owned()]);
    let session_ids = sessions.into_iter().map(|key| key.session_id).chain((0..40).map(|n| format!("session_id-{n}")));
    let labels =
        ["", "tel:+12025550123", "tel:2025550123", "https://wa.me/12025550123", "https://wa.me/message/X", "Call us"];
    // Most pages are first pages.
    let mut tokens = vec![String::new(); 20];
    tokens.extend([calls_page, top_page]);
    let mut hints = owned(["2026-13-01", "1999-01-01", "9999-12-01"]);
    hints.extend(vec![month.clone(); 12]);
    Words {
        apt: HashMap::from([
            ("site", sites.clone()),
            ("site_id", sites),
            ("session_month", vec![month]),
            ("session_month_hint", hints),
            ("session_id", session_ids.collect()),
            (
                "url",
                owned([
                    "https://shop.example/",
                    "https://shop.example/?gclid=G#x",
                    "/relative",
                    "HTTPS%3A%2F%2Fa.example",
                ]),
            ),
            ("category", owned(["conversion", "interaction", "system", ""])),
            ("action", owned(["phone_call", "whatsapp", "view", "scroll_depth", ""])),
            ("label", owned(labels)),
            ("referrer", owned(["https://www.google.com/", "https://ads.example/?q=1", ""])),
            ("provider", owned(["twilio", "Twilio", "a_b-9"])),
            ("dialled_number", owned([BUSINESS, BUSINESS, "(202) 555-0123", "+902120000000", "tel:+12025550123"])),
            ("caller_number", owned([CALLER, "202-555-0187", "anonymous", "", "+266696687", "+33 1 23 45 67 89"])),
            ("duration_text", owned(["192", "3:12", "00:03:12", "PT3M12S", "192s", ""])),
            ("recording_reference", owned(["rec-1", "https://provider.example/rec/1", ""])),
            ("currency_code", owned(["TRY", "USD", "JPY", "KWD"])),
            ("call_id", ids),
            ("page_token", tokens),
            ("client_ip", owned(["203.0.113.7", "2001:db8::1", "203.0.113.7:443"])),
            ("user_agent", owned(["Mozilla/5.0 (iPhone; CPU iPhone OS 17_0 like Mac OS X)", ""])),
            ("key", owned(["gclid", "fbclid", "scroll_pct", "fp", "a", "b"])),
        ]),
    }
}
