//! `worker`: signed single deliveries as QStash sends them, against the same kind of events through the public door.

use std::sync::Arc;

use anyhow::{Context, anyhow, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::Utc;
use opsmantik::domain::client::Device;
use opsmantik::domain::event::Arrival;
use opsmantik::domain::id::SiteId;
use opsmantik::domain::job::Job;
use opsmantik::http::wire::{self, Body};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{Bench, CONNECTIONS, all_stored, sync_volley};
use crate::ground::{SITES, site_id};
use crate::http_load::Volley;
use crate::report::{Bar, Line, Side};
use crate::server::{PUBLIC_URL, SIGNING_KEY};
use crate::workload::{Beat, Workload};

pub async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Line>> {
    let (rounds, events) = (bench.rounds(), bench.size(30_000, 3_000));
    let (mut delivered, mut inline) = (Side::default(), Side::default());
    let database = bench.ground.database().await?;
    let server = bench.server(&database).await?;
    let warm_up = Workload::new(3000, SITES).take(2000);
    all_stored(&server, &sync_volley(&warm_up[..1000]), 1000).await?;
    all_stored(&server, &deliveries(&warm_up[1000..])?, 1000).await?;
    for round in 1..=rounds {
        let mut workload = Workload::new(3000 + round as u64, SITES);
        let volleys = [deliveries(&workload.take(events))?, sync_volley(&workload.take(events))];
        // The tables grow on the way, so who comes first changes from round to round.
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for which in order {
            database.checkpoint().await?;
            let side = if which == 0 { &mut delivered } else { &mut inline };
            super::measured(side, events, &server, all_stored(&server, &volleys[which], events)).await?;
        }
        bench.say_round(round, rounds, [&delivered, &inline]);
    }
    let (stored, sent) = (database.count("events").await?, 2000 + 2 * rounds * events);
    ensure!(stored == sent, "{stored} of {sent} events are stored: {}", server.log());
    server.stop().await?;
    bench.ground.drop(database).await?;
    let bar = Bar::AtLeast { bar: 0.85, stretch: Some(0.95) };
    let what =
        format!("POST /api/sync/worker, signed single deliveries, {CONNECTIONS} at once; reference: /api/sync inline");
    Ok(vec![Line::ratio("worker", what, ["delivered", "inline"], delivered, inline, bar)])
}

/// Deliveries of what our own edge would have published, signed beforehand.
fn deliveries(beats: &[Beat]) -> anyhow::Result<Arc<Volley>> {
    let receiver = format!("{PUBLIC_URL}/api/sync/worker");
    let key = jsonwebtoken::EncodingKey::from_secret(SIGNING_KEY.as_bytes());
    let mut volley = Volley::default();
    for beat in beats {
        let body = job(beat)?;
        let now = Utc::now().timestamp();
        let hash = URL_SAFE_NO_PAD.encode(Sha256::digest(&body));
        let claims = json!({"iss": "Upstash", "sub": receiver, "exp": now + 3600, "nbf": now, "iat": now, "jti": beat.id, "body": hash});
        let signature = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key)?;
        let headers = format!(
            "Upstash-Signature: {signature}\r\nUpstash-Message-Id: msg_{}\r\nUpstash-Retried: 0\r\nUser-Agent: Upstash-QStash\r\nContent-Type: application/json\r\n",
            beat.id.simple()
        );
        volley.post("/api/sync/worker", &headers, &body);
    }
    Ok(Arc::new(volley))
}

fn job(beat: &Beat) -> anyhow::Result<String> {
    let site = SiteId::from_uuid(site_id(beat.site));
    let arrival = Arrival { device: Device::of_user_agent(beat.agent), ..Arrival::at(Utc::now()) };
    let event = match wire::read(beat.to_json().to_string().as_bytes()) {
        Ok(Body::One(event)) => event.accept(site, &arrival).map_err(|refusal| anyhow!("{refusal}"))?,
        Ok(Body::Batch(_)) => bail!("one event was read as a batch"),
        Err(refusal) => bail!("{refusal}"),
    };
    Job::of(&event).to_json().context("a job")
}
