//! The rows of the tables as a watcher must have them, read by SQL and written down by hand: nothing here is the server's own reading.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, NaiveDate, Utc};
use opsmantik::grpc::proto::{
    Attribution, Call, CallChannel, CallDirection, CallMatch, CallStatus, Caller, ClickId, ClickIds, Device, Gauges,
    Geo, MatchMethod, ProviderCallKey, Review, ReviewStatus, Score, Session, SessionKey, Signal, SignalPoints,
    StoredEvent, TrafficSource, Utm, ValueTrack,
};
use prost_types::{ListValue, Struct, Timestamp, Value, value::Kind};
use tokio_postgres::types::FromSql;
use tokio_postgres::{Client, Row};
use uuid::Uuid;

use super::watched::{Scope, Watched};

/// A kind of row that can be read by SQL.
pub trait Stored: Watched {
    const TABLE: &str;
    /// The column of the partition, if there are any.
    const MONTH: Option<&str>;

    /// None: what the row says cannot be put down in a few words, and the door has to be asked.
    fn read(row: &Row) -> Option<Self>;
}

/// All rows that a watcher of this scope must have; and the ids of those that are there and have to be asked for.
pub async fn expected<R: Stored>(client: &Client, scope: &Scope) -> (BTreeMap<String, R>, Vec<String>) {
    let mut query = format!("SELECT * FROM {} WHERE site_id = '{}'", R::TABLE, scope.site);
    if let (Some(column), Some(month)) = (R::MONTH, &scope.month) {
        query.push_str(&format!(" AND {column} = '{month}'"));
    }
    let rows = client.query(&query, &[]).await.expect("the test's own query");
    let (mut read, mut ask) = (BTreeMap::new(), Vec::new());
    for row in &rows {
        match R::read(row) {
            Some(known) => drop(read.insert(known.key(), known)),
            None => ask.push(id(row, "id")),
        }
    }
    (read, ask)
}

fn get<'r, T: FromSql<'r>>(row: &'r Row, column: &str) -> T {
    row.try_get(column).unwrap_or_else(|error| panic!("{column}: {error}"))
}

fn time(at: DateTime<Utc>) -> Timestamp {
    Timestamp { seconds: at.timestamp(), nanos: i32::try_from(at.timestamp_subsec_nanos()).expect("below a second") }
}

fn at(row: &Row, column: &str) -> Option<Timestamp> {
    get::<Option<DateTime<Utc>>>(row, column).map(time)
}

fn text(row: &Row, column: &str) -> Option<String> {
    get(row, column)
}

fn id(row: &Row, column: &str) -> String {
    get::<Uuid>(row, column).to_string()
}

fn session_key(row: &Row, month: &str, session: &str) -> SessionKey {
    let month: NaiveDate = get(row, month);
    SessionKey { site_id: id(row, "site_id"), session_month: month.to_string(), session_id: id(row, session) }
}

/// The points of the signals by their bits, as the contract tells them.
fn score(row: &Row) -> Option<Score> {
    let bits: i32 = get(row, "signals");
    let points = [
        (Signal::PrimaryConversion, 50),
        (Signal::Interaction, 10),
        (Signal::Scroll50, 10),
        (Signal::Scroll90, 20),
        (Signal::HoverIntent, 15),
        (Signal::GoogleReferrer, 5),
        (Signal::ReturningAdsAssisted, 25),
    ];
    let raised = points.into_iter().enumerate().filter(|(bit, _)| bits >> bit & 1 == 1);
    let breakdown: Vec<_> =
        raised.map(|(_, (signal, points))| SignalPoints { signal: signal.into(), points }).collect();
    let sum: u32 = breakdown.iter().map(|line| line.points).sum();
    Some(Score { value: sum.min(100), breakdown, capped: sum > 100 })
}

fn object(value: serde_json::Value) -> Struct {
    match value {
        serde_json::Value::Object(fields) => {
            Struct { fields: fields.into_iter().map(|(name, value)| (name, wire(value))).collect() }
        }
        other => panic!("no object: {other}"),
    }
}

fn wire(value: serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match value {
        Json::Null => Kind::NullValue(0),
        Json::Bool(bool) => Kind::BoolValue(bool),
        Json::Number(number) => Kind::NumberValue(number.as_f64().expect("a double")),
        Json::String(text) => Kind::StringValue(text),
        Json::Array(values) => Kind::ListValue(ListValue { values: values.into_iter().map(wire).collect() }),
        object @ Json::Object(_) => Kind::StructValue(self::object(object)),
    };
    Value { kind: Some(kind) }
}

impl Stored for StoredEvent {
    const TABLE: &str = "events";
    const MONTH: Option<&str> = Some("session_month");

    fn read(row: &Row) -> Option<Self> {
        Some(StoredEvent {
            id: id(row, "id"),
            session: Some(session_key(row, "session_month", "session_id")),
            created_at: at(row, "created_at"),
            url: get(row, "url"),
            category: get(row, "event_category"),
            action: get(row, "event_action"),
            label: text(row, "event_label"),
            value: get(row, "event_value"),
            score: score(row),
            metadata: Some(object(get(row, "metadata"))),
            received_at: at(row, "received_at").or_else(|| at(row, "created_at")),
        })
    }
}

impl Stored for Session {
    const TABLE: &str = "sessions";
    const MONTH: Option<&str> = Some("created_month");

    fn read(row: &Row) -> Option<Self> {
        let text = |column| text(row, column);
        let gauge = |column| get::<Option<i32>>(row, column).and_then(|gauge| u32::try_from(gauge).ok());
        let others: HashMap<String, String> = serde_json::from_value(get(row, "click_ids")).expect("texts by name");
        let attribution = match get::<&str>(row, "attribution") {
            "Direct-to-Ads" => Attribution::DirectToAds,
            "Ads-Assisted" => Attribution::AdsAssisted,
            _ => Attribution::OrganicReferral,
        };
        Some(Session {
            key: Some(session_key(row, "created_month", "id")),
            created_at: at(row, "created_at"),
            last_event_at: at(row, "last_seen_at"),
            event_count: u64::try_from(get::<i64>(row, "event_count")).expect("the table checks it"),
            fingerprint: text("fingerprint"),
            entry_page: get(row, "entry_page"),
            exit_page: text("exit_page").filter(|page| !page.is_empty()),
            referrer: text("referrer"),
            click_ids: Some(ClickIds { gclid: text("gclid"), wbraid: text("wbraid"), gbraid: text("gbraid"), others }),
            attribution: attribution.into(),
            traffic_source: Some(TrafficSource {
                source: get(row, "traffic_source"),
                medium: get(row, "traffic_medium"),
            }),
            utm: Some(Utm {
                source: text("utm_source"),
                medium: text("utm_medium"),
                campaign: text("utm_campaign"),
                term: text("utm_term"),
                content: text("utm_content"),
            }),
            value_track: Some(ValueTrack {
                matchtype: text("matchtype"),
                device: text("ads_device"),
                network: text("ads_network"),
                placement: text("ads_placement"),
            }),
            score: score(row),
            device: Some(Device { r#type: text("device_type"), os: text("device_os"), browser: text("browser") }),
            language: text("language"),
            geo: Some(Geo {
                city: text("city"),
                district: text("district"),
                country: text("country"),
                timezone: text("timezone"),
            }),
            gauges: Some(Gauges {
                duration_sec: gauge("duration_sec"),
                scroll_pct: gauge("scroll_pct"),
                cta_hovers: gauge("cta_hovers"),
                focus_dur: gauge("focus_dur"),
                active_sec: gauge("active_sec"),
                exit_page: None,
            }),
            ip_truncated: text("ip_truncated"),
        })
    }
}

/// Of calls that no visit is credited with and nobody has judged.
impl Stored for Call {
    const TABLE: &str = "calls";
    const MONTH: Option<&str> = None;

    fn read(row: &Row) -> Option<Self> {
        let text = |column| text(row, column);
        let word = |column| get::<Option<&str>>(row, column).unwrap_or_default();
        if (word("match_method"), word("review")) != ("UNMATCHED", "OPEN") {
            return None;
        }
        let name = |prefix: &str, column| format!("{prefix}{}", word(column));
        let status = text("status").and_then(|_| CallStatus::from_str_name(&name("CALL_STATUS_", "status")));
        let hash: Option<&[u8]> = get(row, "caller_hmac");
        Some(Call {
            id: id(row, "id"),
            site_id: id(row, "site_id"),
            key: Some(ProviderCallKey {
                provider: get(row, "provider"),
                provider_call_id: get(row, "provider_call_id"),
            }),
            channel: CallChannel::from_str_name(&name("CALL_CHANNEL_", "channel")).expect("a channel").into(),
            direction: CallDirection::from_str_name(&name("CALL_DIRECTION_", "direction")).expect("one").into(),
            dialled_number: get(row, "dialled_number"),
            caller: Some(Caller {
                anonymous: hash.is_none(),
                number_hash: hash.into_iter().flatten().map(|byte| format!("{byte:02x}")).collect(),
                last_digits: text("caller_last_digits").unwrap_or_default(),
            }),
            started_at: at(row, "started_at"),
            duration_seconds: get::<Option<i32>>(row, "duration_sec").and_then(|seconds| u32::try_from(seconds).ok()),
            status: status.unwrap_or_default().into(),
            recording_reference: text("recording_ref"),
            fingerprint: text("fingerprint"),
            click_id: text("click_id").map(|value| ClickId {
                kind: opsmantik::grpc::proto::ClickIdKind::from_str_name(&format!(
                    "CLICK_ID_KIND_{}",
                    word("click_id_kind").to_uppercase()
                ))
                .expect("a kind")
                .into(),
                value,
            }),
            r#match: Some(CallMatch {
                method: MatchMethod::Unmatched.into(),
                matched_at: at(row, "matched_at"),
                ..CallMatch::default()
            }),
            review: Some(Review { status: ReviewStatus::Open.into(), ..Review::default() }),
            created_at: at(row, "created_at"),
            updated_at: at(row, "updated_at"),
        })
    }
}
