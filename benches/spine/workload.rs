//! The traffic that is measured: visits as our tracker reports them, several sites at once, their events interleaved.
//!
//! Deterministic by its seed but for the time, and the same event can be had for every door: as JSON of `/api/sync`, and as a message of `IngestService`. A
//! visit is a view and what follows it, about five events; some come by an ad, some visitors come back. No visitor here is a real one.

use std::sync::Arc;

use chrono::{Datelike, Utc};
use opsmantik::grpc::proto;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::past::Past;

/// Visits that are under way at the same time.
pub const ACTIVE: usize = 64;
/// Of a hundred visits, those that an ad brought.
const PAID: u32 = 25;
/// Of a hundred visits, those of a visitor who was here before.
const RETURNING: u32 = 30;
/// Visitors who are remembered so that they can return.
const REMEMBERED: usize = 512;
/// Numbers that visitors can call: a pool, as with a provider that tracks calls.
const NUMBERS: u32 = 100;

const AGENTS: [&str; 4] = [
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.6 Mobile/15E148 Safari/604.1",
    "Mozilla/5.0 (Linux; Android 15; Pixel 9) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Mobile Safari/537.36",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.6 Safari/605.1.15",
];
const PATHS: [&str; 6] =
    ["/", "/services", "/emergency-locksmith", "/prices", "/contact", "/blog/how-to-choose-a-lock"];
const REFERRERS: [Option<&str>; 5] = [
    Some("https://www.google.com/"),
    Some("https://www.google.com/"),
    Some("https://www.facebook.com/"),
    Some("https://neighbourhood.example/links?page=3"),
    None,
];
const PLACES: [(&str, &str, &str); 4] = [
    ("Istanbul", "Kadikoy", "Europe/Istanbul"),
    ("Ankara", "Cankaya", "Europe/Istanbul"),
    ("Izmir", "Bornova", "Europe/Istanbul"),
    ("Springfield", "Old Town", "America/New_York"),
];

/// The public id of the site with this number.
pub fn public_id(site: usize) -> String {
    format!("bench-{site:05}")
}

/// What a visit begins with and keeps.
struct Visit {
    site: usize,
    id: Uuid,
    fingerprint: String,
    gclid: Option<String>,
    url: String,
    referrer: Option<&'static str>,
    agent: &'static str,
    place: (&'static str, &'static str, &'static str),
    /// What is still to happen, the last first.
    ahead: Vec<Step>,
    seconds: u32,
}

#[derive(Clone, Copy)]
enum Step {
    View,
    Scroll(u32),
    Hover,
    Call,
    Heartbeat,
    End,
}

/// One event, in nobody's vocabulary yet.
#[derive(Debug, Clone)]
pub struct Beat {
    pub site: usize,
    pub id: Uuid,
    pub session: Uuid,
    pub fingerprint: String,
    pub agent: &'static str,
    url: String,
    referrer: Option<&'static str>,
    category: &'static str,
    action: &'static str,
    pub label: Option<String>,
    value: Option<f64>,
    gclid: Option<String>,
    place: (&'static str, &'static str, &'static str),
    gauges: Option<[u32; 5]>,
    /// Milliseconds since 1970 by the visitor's clock.
    at: i64,
}

/// A stream of events without end.
pub struct Workload {
    rng: StdRng,
    /// Milliseconds since 1970 when the next id is made.
    clock: u64,
    sites: usize,
    active: Vec<Visit>,
    /// Site and fingerprint.
    remembered: Vec<(usize, String)>,
    /// Visitors of the stored history, for those who return.
    past: Option<Arc<Past>>,
}

impl Workload {
    pub fn new(seed: u64, sites: usize) -> Self {
        Self {
            rng: StdRng::seed_from_u64(seed),
            clock: Utc::now().timestamp_millis().unsigned_abs(),
            sites,
            active: Vec::with_capacity(ACTIVE),
            remembered: Vec::new(),
            past: None,
        }
    }

    /// The same, but who returns was here in the months before.
    pub fn after(self, past: Arc<Past>) -> Self {
        Self { past: Some(past), ..self }
    }

    pub fn take(&mut self, events: usize) -> Vec<Beat> {
        (0..events).map(|_| self.beat()).collect()
    }

    fn beat(&mut self) -> Beat {
        while self.active.len() < ACTIVE {
            let visit = self.visit();
            self.active.push(visit);
        }
        let at = self.rng.random_range(0..self.active.len());
        let Some(step) = self.active[at].ahead.pop() else {
            self.active.swap_remove(at);
            return self.beat();
        };
        let id = self.uuid();
        let visit = &mut self.active[at];
        visit.seconds += 1 + random_part(id) % 20;
        let beat = visit.beat(step, id);
        if visit.ahead.is_empty() {
            self.active.swap_remove(at);
        }
        beat
    }

    /// As our tracker makes them: time first.
    fn uuid(&mut self) -> Uuid {
        self.clock += 1;
        uuid::Builder::from_unix_timestamp_millis(self.clock, &self.rng.random()).into_uuid()
    }

    fn visit(&mut self) -> Visit {
        let id = self.uuid();
        let rng = &mut self.rng;
        let known = match (rng.random_range(0..100) < RETURNING, &self.past) {
            (false, _) => None,
            (true, Some(past)) => past.visitor(rng),
            (true, None) => self.remembered.choose(rng).cloned(),
        };
        let (site, fingerprint) =
            known.unwrap_or_else(|| (rng.random_range(0..self.sites), format!("{:025x}", rng.random::<u128>() >> 28)));
        let place = rng.random_range(0..REMEMBERED);
        match self.remembered.get_mut(place) {
            Some(remembered) => *remembered = (site, fingerprint.clone()),
            None => self.remembered.push((site, fingerprint.clone())),
        }
        let gclid = (rng.random_range(0..100) < PAID)
            .then(|| format!("Cj0KCQ{:032X}{:022X}", rng.random::<u128>(), rng.random::<u64>()));
        let path = PATHS.choose(rng).unwrap_or(&"/");
        let host = public_id(site);
        let url = match &gclid {
            Some(gclid) => format!(
                "https://{host}.example{path}?utm_source=google&utm_medium=cpc&utm_campaign=emergency%20{}&matchtype=e&device=m&network=g&gclid={gclid}",
                rng.random_range(1..9)
            ),
            None => format!("https://{host}.example{path}"),
        };
        let mut ahead = vec![Step::View];
        for (step, chance) in [
            (Step::Scroll(50), 80),
            (Step::Hover, 40),
            (Step::Scroll(90), 50),
            (Step::Call, 20),
            (Step::Heartbeat, 90),
            (Step::Heartbeat, 50),
            (Step::End, 75),
        ] {
            if rng.random_range(0..100) < chance {
                ahead.push(step);
            }
        }
        ahead.reverse();
        Visit {
            site,
            id,
            fingerprint,
            referrer: if gclid.is_some() { REFERRERS[0] } else { *REFERRERS.choose(rng).unwrap_or(&None) },
            gclid,
            url,
            agent: AGENTS.choose(rng).unwrap_or(&AGENTS[0]),
            place: *PLACES.choose(rng).unwrap_or(&PLACES[0]),
            ahead,
            seconds: 0,
        }
    }
}

/// Events of which each site has its share, for a server that is to know them all.
pub fn one_of_each(seed: u64, sites: usize, events: usize) -> Vec<Beat> {
    let mut beats = Workload::new(seed, 1).take(events);
    for (at, beat) in beats.iter_mut().enumerate() {
        beat.site = at % sites;
    }
    beats
}

/// What of an id is drawn by lot, or some of it.
fn random_part(id: Uuid) -> u32 {
    let [.., a, b, c, d] = *id.as_bytes();
    u32::from_be_bytes([a, b, c, d])
}

/// One of the numbers of every business.
pub fn number(at: u32) -> String {
    format!("+1202555{:04}", 100 + at % NUMBERS)
}

impl Visit {
    fn beat(&self, step: Step, id: Uuid) -> Beat {
        let (category, action, label, value) = match step {
            Step::View => ("interaction", "view", None, None),
            Step::Scroll(depth) => ("interaction", "scroll_depth", None, Some(f64::from(depth))),
            Step::Hover => ("interaction", "hover_intent", Some("call-now".to_owned()), None),
            Step::Call => ("conversion", "phone_call", Some(format!("tel:{}", number(random_part(id)))), None),
            Step::Heartbeat => ("system", "heartbeat", None, None),
            Step::End => ("system", "session_end", None, None),
        };
        let gauges = matches!(step, Step::End).then_some([self.seconds, 75, 1, self.seconds / 2, self.seconds / 3]);
        let at = Utc::now().timestamp_millis() - 1000 + i64::from(self.seconds);
        Beat {
            site: self.site,
            id,
            session: self.id,
            fingerprint: self.fingerprint.clone(),
            agent: self.agent,
            url: self.url.clone(),
            referrer: self.referrer,
            category,
            action,
            label,
            value,
            gclid: self.gclid.clone(),
            place: self.place,
            gauges,
            at,
        }
    }
}

impl Beat {
    /// Another event of another session, alike but for their ids.
    pub fn in_round(&self, round: u32) -> Self {
        let moved = |id: Uuid| {
            let (_, b, c, d) = id.as_fields();
            Uuid::from_fields(round, b, c, d)
        };
        Self { id: moved(self.id), session: moved(self.session), ..self.clone() }
    }

    /// The body of `/api/sync`.
    pub fn to_json(&self) -> Value {
        let now = Utc::now();
        let mut body = json!({
            "id": self.id, "s": public_id(self.site), "u": self.url, "sid": self.session,
            "sm": format!("{:04}-{:02}-01", now.year(), now.month()),
            "ec": self.category, "ea": self.action, "ts": self.at,
        });
        let mut meta = self.traits();
        let (city, district, timezone) = self.place;
        meta.extend(
            [("fp", &*self.fingerprint), ("city", city), ("district", district), ("timezone", timezone)]
                .map(|(key, text)| (key.to_owned(), text.into())),
        );
        for (key, value) in [
            ("lan", json!("tr-TR")),
            ("mem", json!(8)),
            ("con", json!(8)),
            ("sw", json!(390)),
            ("sh", json!(844)),
            ("dpr", json!(3)),
            ("con_type", json!("4g")),
        ] {
            meta.insert(key.to_owned(), value);
        }
        if let Some(gclid) = &self.gclid {
            meta.insert("gclid".to_owned(), json!(gclid));
        }
        if let Some(gauges) = self.gauges {
            let names = ["duration_sec", "scroll_pct", "cta_hovers", "focus_dur", "active_sec"];
            meta.extend(names.iter().zip(gauges).map(|(name, gauge)| ((*name).to_owned(), json!(gauge))));
            meta.insert("exit_page".to_owned(), json!(self.url));
        }
        body["meta"] = Value::Object(meta);
        let optional = [
            ("el", self.label.clone().map(Value::from)),
            ("ev", self.value.map(Value::from)),
            ("r", self.referrer.map(Value::from)),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                body[key] = value;
            }
        }
        body
    }

    /// What no door has a field for.
    fn traits(&self) -> Map<String, Value> {
        let page =
            json!({"title": "Keyhole Locksmiths: day and night", "template": "landing-b", "ab": ["cta-2", "hero-1"]});
        page.as_object().cloned().unwrap_or_default()
    }

    /// The message of `IngestService`.
    pub fn to_proto(&self) -> proto::Event {
        let now = Utc::now();
        let (city, district, timezone) = self.place;
        let text = |text: &str| Some(text.to_owned());
        proto::Event {
            id: Some(self.id.to_string()),
            site: public_id(self.site),
            url: self.url.clone(),
            session_id: self.session.to_string(),
            session_month_hint: Some(format!("{:04}-{:02}-01", now.year(), now.month())),
            category: self.category.to_owned(),
            action: self.action.to_owned(),
            label: self.label.clone(),
            value: self.value,
            referrer: self.referrer.map(str::to_owned),
            fingerprint: Some(self.fingerprint.clone()),
            click_ids: self
                .gclid
                .as_ref()
                .map(|gclid| proto::ClickIds { gclid: Some(gclid.clone()), ..Default::default() }),
            client_hints: Some(proto::ClientHints {
                language: text("tr-TR"),
                memory_gib: Some(8.0),
                processors: Some(8),
                screen_width: Some(390),
                screen_height: Some(844),
                device_pixel_ratio: Some(3.0),
                gpu: None,
                connection_type: text("4g"),
            }),
            geo: Some(proto::Geo {
                city: text(city),
                district: text(district),
                country: None,
                timezone: text(timezone),
            }),
            gauges: self.gauges.map(|[duration_sec, scroll_pct, cta_hovers, focus_dur, active_sec]| proto::Gauges {
                duration_sec: Some(duration_sec),
                scroll_pct: Some(scroll_pct),
                cta_hovers: Some(cta_hovers),
                focus_dur: Some(focus_dur),
                active_sec: Some(active_sec),
                exit_page: Some(self.url.clone()),
            }),
            metadata: Some(prost_struct(self.traits())),
            client_time: Some(prost_types::Timestamp { seconds: self.at / 1000, nanos: 0 }),
            user_agent: text(self.agent),
            client_ip: text("203.0.113.7"),
            ..Default::default()
        }
    }
}

fn prost_struct(map: Map<String, Value>) -> prost_types::Struct {
    prost_types::Struct { fields: map.into_iter().map(|(key, value)| (key, prost_value(value))).collect() }
}

fn prost_value(value: Value) -> prost_types::Value {
    use prost_types::value::Kind;
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(yes) => Kind::BoolValue(yes),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text),
        Value::Array(values) => {
            Kind::ListValue(prost_types::ListValue { values: values.into_iter().map(prost_value).collect() })
        }
        Value::Object(map) => Kind::StructValue(prost_struct(map)),
    };
    prost_types::Value { kind: Some(kind) }
}
