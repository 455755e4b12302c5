//! `sessions`: the root of the traffic pool. A row is read and written whole, under the session's lock, see [`super::locks`].
//!
//! One list of columns makes both statements, so reading and writing cannot drift apart; `provenance` carries which event told what, which
//! makes a row a complete merge state again.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use tokio_postgres::types::{Json, ToSql, Type};
use uuid::Uuid;

use super::columns::{self, Lenient, Ordered, Unreadable};
use super::error::StoreError;
use super::rows::{Record, RowType, RowWriter, Rows};
use super::statement::Months;
use super::transaction::Transaction;
use crate::domain::attribution::Attribution;
use crate::domain::event::Gauges;
use crate::domain::id::{EventId, SessionId, SessionKey, SiteId};
use crate::domain::month::Month;
use crate::domain::session::{Field, First, Provenance, Session, Source, Stamp};
use crate::domain::signal::{Signal, SignalSet};
use crate::domain::traffic::{Traffic, TrafficRule};

/// Columns that are not first-told texts.
static OWN_COLUMNS: [(&str, Type); 20] = [
    ("site_id", Type::UUID),
    ("created_month", Type::DATE),
    ("id", Type::UUID),
    ("created_at", Type::TIMESTAMPTZ),
    ("last_seen_at", Type::TIMESTAMPTZ),
    ("event_count", Type::INT8),
    ("attribution", Type::TEXT),
    ("signals", Type::INT4),
    ("lead_score", Type::INT2),
    ("traffic_source", Type::TEXT),
    ("traffic_medium", Type::TEXT),
    ("exit_page", Type::TEXT),
    ("click_ids", Type::JSONB),
    ("provenance", Type::JSONB),
    ("duration_sec", Type::INT4),
    ("scroll_pct", Type::INT4),
    ("cta_hovers", Type::INT4),
    ("focus_dur", Type::INT4),
    ("active_sec", Type::INT4),
    ("call_signals", Type::INT4),
];

/// First-told texts with a column of their own.
const TEXT_COLUMNS: [(Field, &str); 24] = [
    (Field::EntryPage, "entry_page"),
    (Field::Referrer, "referrer"),
    (Field::Fingerprint, "fingerprint"),
    (Field::Gclid, "gclid"),
    (Field::Wbraid, "wbraid"),
    (Field::Gbraid, "gbraid"),
    (Field::UtmSource, "utm_source"),
    (Field::UtmMedium, "utm_medium"),
    (Field::UtmCampaign, "utm_campaign"),
    (Field::UtmTerm, "utm_term"),
    (Field::UtmContent, "utm_content"),
    (Field::Matchtype, "matchtype"),
    (Field::AdsDevice, "ads_device"),
    (Field::AdsNetwork, "ads_network"),
    (Field::AdsPlacement, "ads_placement"),
    (Field::DeviceType, "device_type"),
    (Field::DeviceOs, "device_os"),
    (Field::Browser, "browser"),
    (Field::City, "city"),
    (Field::District, "district"),
    (Field::Country, "country"),
    (Field::Timezone, "timezone"),
    (Field::IpTruncated, "ip_truncated"),
    (Field::Language, "language"),
];

/// First-told click ids that share the column `click_ids`.
const OTHER_CLICKS: [(Field, &str); 5] = [
    (Field::Gclsrc, "gclsrc"),
    (Field::Dclid, "dclid"),
    (Field::Fbclid, "fbclid"),
    (Field::Ttclid, "ttclid"),
    (Field::Msclkid, "msclkid"),
];

/// In the order of [`Record::put`] and [`read`].
static COLUMNS: LazyLock<Vec<(&str, Type)>> = LazyLock::new(|| {
    let texts = TEXT_COLUMNS.iter().map(|(_, name)| (*name, Type::TEXT));
    OWN_COLUMNS.iter().cloned().chain(texts).collect()
});

pub(super) static COLUMN_NAMES: LazyLock<Vec<&str>> = LazyLock::new(|| COLUMNS.iter().map(|(name, _)| *name).collect());

static SESSION_ROW: RowType = RowType { name: "opsmantik.session_row", columns: || &COLUMNS };

crate::statement!(
    /// Looked up one by one (LATERAL, and OFFSET 0 keeps it so): of a month that is new the planner knows nothing, and would rather read all of it.
    /// And month by month, so that the primary key finds them: with the month left open it reads every session of the site.
    LOAD_SESSIONS,
    Months::In(&[1, 2, 3]),
    [DATE, DATE, DATE, UUID_ARRAY, UUID_ARRAY],
    format!(
        "SELECT {columns} FROM unnest($4, $5) AS wanted (site_id, id) CROSS JOIN (VALUES ($1), ($2), ($3)) AS near (month) \
         CROSS JOIN LATERAL (SELECT * FROM public.sessions s \
           WHERE s.site_id = wanted.site_id AND s.created_month = near.month AND s.id = wanted.id \
             AND s.created_month IN ($1, $2, $3) OFFSET 0) AS s",
        columns = COLUMN_NAMES.iter().map(|name| format!("s.{name}")).collect::<Vec<_>>().join(", "),
    )
);

crate::statement!(
    FIND_SESSION,
    Months::In(&[2]),
    [UUID, DATE, UUID],
    format!(
        "SELECT {} FROM public.sessions WHERE site_id = $1 AND created_month = $2 AND id = $3",
        COLUMN_NAMES.join(", "),
    )
);

crate::statement!(
    UPSERT_SESSIONS,
    Months::Rows,
    [rows SESSION_ROW],
    {
        let key = ["site_id", "created_month", "id"];
        let updates = COLUMN_NAMES.iter().filter(|name| !key.contains(name));
        format!(
            "INSERT INTO public.sessions ({columns}) SELECT {columns} FROM unnest($1::opsmantik.session_row[]) \
             ON CONFLICT (site_id, created_month, id) DO UPDATE SET {updates}",
            columns = COLUMN_NAMES.join(", "),
            updates = updates.map(|name| format!("{name} = excluded.{name}")).collect::<Vec<_>>().join(", "),
        )
    }
);

crate::statement!(
    /// Looked up one by one, as `LOAD_SESSIONS`.
    LOAD_SESSIONS_BY_KEY,
    Months::Between(2, 3),
    [UUID, DATE, DATE, DATE_ARRAY, UUID_ARRAY],
    format!(
        "SELECT {columns} FROM unnest($4, $5) AS wanted (month, id) \
         CROSS JOIN LATERAL (SELECT * FROM public.sessions s \
           WHERE s.site_id = $1 AND s.created_month = wanted.month AND s.id = wanted.id \
             AND s.created_month BETWEEN $2 AND $3 OFFSET 0) AS s \
         ORDER BY s.created_month, s.id",
        columns = COLUMN_NAMES.iter().map(|name| format!("s.{name}")).collect::<Vec<_>>().join(", "),
    )
);

crate::statement!(
    SET_CALL_SIGNALS,
    Months::Between(2, 3),
    [UUID, DATE, DATE, DATE_ARRAY, UUID_ARRAY, INT4_ARRAY, INT4_ARRAY, INT2_ARRAY],
    "UPDATE public.sessions s SET call_signals = new.call_signals, signals = new.signals, lead_score = new.lead_score \
     FROM unnest($4, $5, $6, $7, $8) AS new (month, id, call_signals, signals, lead_score) \
     WHERE s.site_id = $1 AND s.created_month = new.month AND s.created_month BETWEEN $2 AND $3 AND s.id = new.id"
);

/// The sessions with these ids in any of three months (the month of an arrival and its neighbours).
pub async fn load(
    tx: &Transaction<'_>,
    months: [Month; 3],
    ids: &[(SiteId, SessionId)],
) -> Result<Vec<Session>, StoreError> {
    let [first, second, third] = months.map(Month::first_day);
    let (sites, ids): (Vec<Uuid>, Vec<Uuid>) = ids.iter().map(|(site, id)| (site.as_uuid(), id.as_uuid())).unzip();
    let rows = tx.query(&LOAD_SESSIONS, &[&first, &second, &third, &sites, &ids]).await?;
    rows.iter()
        .map(|row| read(&Ordered::from(row)).map_err(|error| StoreError::unreadable(LOAD_SESSIONS.name, error)))
        .collect()
}

/// One session by its key.
pub async fn find(tx: &Transaction<'_>, key: SessionKey) -> Result<Option<Session>, StoreError> {
    let params: [&(dyn ToSql + Sync); 3] = [&key.site_id.as_uuid(), &key.month.first_day(), &key.id.as_uuid()];
    let rows = tx.query(&FIND_SESSION, &params).await?;
    let session = rows.first().map(|row| read(&Ordered::from(row))).transpose();
    session.map_err(|error| StoreError::unreadable(FIND_SESSION.name, error))
}

/// Sessions of one site by their keys, sorted by them. The caller has closed the site's gate.
pub async fn load_keys(tx: &Transaction<'_>, site: SiteId, keys: &[SessionKey]) -> Result<Vec<Session>, StoreError> {
    let Some((from, to)) = span(keys.iter().copied()) else { return Ok(Vec::new()) };
    let months: Vec<chrono::NaiveDate> = keys.iter().map(|key| key.month.first_day()).collect();
    let ids: Vec<Uuid> = keys.iter().map(|key| key.id.as_uuid()).collect();
    let rows = tx.query(&LOAD_SESSIONS_BY_KEY, &[&site.as_uuid(), &from, &to, &months, &ids]).await?;
    rows.iter()
        .map(|row| read(&Ordered::from(row)).map_err(|error| StoreError::unreadable(LOAD_SESSIONS_BY_KEY.name, error)))
        .collect()
}

/// Writes what calls raise, with the signals and the score that follow from it. The caller has closed the site's gate.
pub async fn set_call_signals(tx: &Transaction<'_>, site: SiteId, sessions: &[Session]) -> Result<(), StoreError> {
    let Some((from, to)) = span(sessions.iter().map(|session| session.key)) else { return Ok(()) };
    fn column<T>(sessions: &[Session], pick: impl Fn(&Session) -> T) -> Vec<T> {
        sessions.iter().map(pick).collect()
    }
    let params: [&(dyn ToSql + Sync); 8] = [
        &site.as_uuid(),
        &from,
        &to,
        &column(sessions, |session| session.key.month.first_day()),
        &column(sessions, |session| session.key.id.as_uuid()),
        &column(sessions, |session| session.call_signals.bits()),
        &column(sessions, |session| session.signals().bits()),
        &column(sessions, |session| i16::from(session.score().get())),
    ];
    tx.query(&SET_CALL_SIGNALS, &params).await?;
    Ok(())
}

/// The first and the last month of these keys.
fn span(keys: impl Iterator<Item = SessionKey> + Clone) -> Option<(chrono::NaiveDate, chrono::NaiveDate)> {
    let months = keys.map(|key| key.month);
    Some((months.clone().min()?.first_day(), months.max()?.first_day()))
}

/// Writes sessions whole. `sessions` are sorted and distinct by key, and locked.
pub async fn upsert(tx: &Transaction<'_>, sessions: &[&Session]) -> Result<(), StoreError> {
    tx.query(&UPSERT_SESSIONS, &[&Rows(sessions)]).await?;
    Ok(())
}

/// The same as the last of a transaction, which is committed along with it. There may be none.
pub async fn upsert_and_commit(tx: Transaction<'_>, sessions: &[&Session]) -> Result<(), StoreError> {
    if sessions.is_empty() {
        return tx.commit().await;
    }
    tx.query_and_commit(&UPSERT_SESSIONS, &[&Rows(sessions)]).await
}

impl Record for &Session {
    fn put(&self, row: &mut RowWriter<'_>) -> Result<(), Unreadable> {
        row.put(&self.key.site_id.as_uuid())?;
        row.put(&self.key.month.first_day())?;
        row.put(&self.key.id.as_uuid())?;
        row.put(&self.created_at)?;
        row.put(&self.last_seen_at)?;
        row.put(&self.event_count)?;
        row.put(&self.attribution().name())?;
        let signals = self.signals();
        row.put(&signals.bits())?;
        row.put(&i16::from(signals.score().get()))?;
        row.put(&self.source.traffic.source)?;
        row.put(&self.source.traffic.medium)?;
        row.put(&self.exit.value)?;
        let clicks = OTHER_CLICKS.iter().filter_map(|(field, name)| Some((*name, self.first(*field)?)));
        row.put(&Json(clicks.collect::<BTreeMap<_, _>>()))?;
        row.put(&Json(self.provenance()))?;
        let Gauges { duration_sec, scroll_pct, cta_hovers, focus_dur, active_sec } = self.gauges;
        for gauge in [duration_sec, scroll_pct, cta_hovers, focus_dur, active_sec] {
            row.put(&gauge)?;
        }
        row.put(&self.call_signals.bits())?;
        for (field, _) in TEXT_COLUMNS {
            row.put(&self.first(field))?;
        }
        Ok(())
    }
}

/// A row as the session it was. What a hand-written row does not tell in `provenance` counts as told when the session began.
pub fn read(row: &impl columns::Columns) -> Result<Session, Unreadable> {
    let month = Month::containing(row.column("created_month")?);
    let key = SessionKey {
        site_id: SiteId::from_uuid(row.column("site_id")?),
        month,
        id: SessionId::from_uuid(row.column("id")?),
    };
    let created_at: DateTime<Utc> = row.column("created_at")?;
    // Of a hand that wrote something else into these two, only the values count: one odd row must not hold up its neighbours.
    let Lenient(Provenance(evidence)) = row.column("provenance")?;
    let untold = Stamp { at: created_at, event: EventId::from_uuid(Uuid::nil()) };

    let mut told_fields = BTreeMap::new();
    let mut told_signals = BTreeMap::new();
    let (mut exit_stamp, mut source_stamp, mut rule) = (untold, untold, TrafficRule::Direct);
    let mut rest_stamp = untold;
    for entry in evidence {
        let stamp = entry.stamp();
        told_fields.extend(entry.fields.into_iter().map(|field| (field, stamp)));
        told_signals.extend(SignalSet::from_bits(entry.signals).iter().map(|signal| (signal, stamp)));
        if entry.rest {
            rest_stamp = stamp;
        }
        if entry.exit {
            exit_stamp = stamp;
        }
        if let Some(told) = entry.traffic {
            (rule, source_stamp) = (told, stamp);
        }
    }

    let Lenient(clicks): Lenient<Map<String, Value>> = row.column("click_ids")?;
    let mut firsts = BTreeMap::new();
    let mut put = |field: Field, value: Option<String>| {
        if let Some(value) = value {
            let stamp = told_fields.get(&field).copied().unwrap_or(rest_stamp);
            firsts.insert(field, First { stamp, value });
        }
    };
    for (field, name) in TEXT_COLUMNS {
        put(field, row.column(name)?);
    }
    for (field, name) in OTHER_CLICKS {
        put(field, clicks.get(name).and_then(Value::as_str).map(str::to_owned));
    }

    let attribution: &str = row.column("attribution")?;
    let attribution = Attribution::from_name(attribution).ok_or("unknown attribution")?;
    let call_signals = SignalSet::from_bits(row.column("call_signals")?);
    // What calls raise counts as an event's, too, only if an event told it.
    let own = SignalSet::from_bits(row.column("signals")?).without(Signal::ReturningAdsAssisted);
    let own = own.iter().filter(|signal| told_signals.contains_key(signal) || !call_signals.contains(*signal));
    Ok(Session {
        key,
        created_at,
        last_seen_at: row.column("last_seen_at")?,
        event_count: row.column("event_count")?,
        firsts,
        exit: First { stamp: exit_stamp, value: row.column::<Option<String>>("exit_page")?.unwrap_or_default() },
        source: Source {
            stamp: source_stamp,
            traffic: Traffic { rule, source: row.column("traffic_source")?, medium: row.column("traffic_medium")? },
        },
        gauges: Gauges {
            duration_sec: row.column("duration_sec")?,
            scroll_pct: row.column("scroll_pct")?,
            cta_hovers: row.column("cta_hovers")?,
            focus_dur: row.column("focus_dur")?,
            active_sec: row.column("active_sec")?,
        },
        raised: own.map(|signal| (signal, told_signals.get(&signal).copied().unwrap_or(untold))).collect(),
        call_signals,
        ads_assisted: attribution == Attribution::AdsAssisted,
    })
}
