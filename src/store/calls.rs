//! `calls`: what providers told, the match, and the judgement. Every statement names the site; what speaks for a match is looked for in
//! [`super::call_evidence`].
//!
//! Whoever matches has closed the gate of the site, see [`super::locks`]; the row itself is locked, too, against a judgement by SQL.
//! Nobody waits for such a lock behind a closed gate: who finds a row locked opens the gate again and comes back.

use chrono::{DateTime, NaiveDate, Utc};
use serde_json::{Value, json};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::columns::{Columns, Decimal, Unreadable};
use super::error::StoreError;
use super::statement::Months;
use super::transaction::Transaction;
use crate::domain::call::{
    CallKey, Caller, Channel, ClickId, ClickIdKind, Direction, MatchMethod, ReviewStatus, Status, Told,
};
use crate::domain::id::{CallId, SessionId, SessionKey, SiteId};
use crate::domain::matching::{Candidate, Match, Noted};
use crate::domain::month::Month;
use crate::domain::recorded::{Call, Found, Review, Sale};
use crate::domain::session::Session;
use crate::domain::signal::SignalSet;

pub(super) const COLUMNS: &str = "c.id, c.site_id, c.provider, c.provider_call_id, c.channel, c.direction, c.dialled_number, c.caller_hmac, \
     c.caller_last_digits, c.started_at, c.duration_sec, c.status, c.recording_ref, c.fingerprint, c.click_id_kind, c.click_id, \
     c.match_method, c.match_confidence, c.match_candidates, c.match_evidence, c.matched_fingerprint, c.matched_session_id, \
     c.matched_session_month, c.matched_at, c.lead_score_at_match, c.score_breakdown_at_match, c.review, \
     c.sale_amount, c.sale_currency, c.reviewed_at, c.reviewed_by, c.created_at, c.updated_at";

crate::statement!(
    /// Looked up one by one: planned without their number, all calls of the site would be read for one. Nobody waits here, so the order of the
    /// locks is nobody's matter.
    LOCK_CALLS_BY_KEY,
    Months::None,
    [UUID, TEXT_ARRAY, TEXT_ARRAY],
    format!(
        "SELECT {COLUMNS} FROM unnest($2, $3) AS wanted (provider, provider_call_id) \
         CROSS JOIN LATERAL (SELECT * FROM public.calls k WHERE k.site_id = $1 AND k.provider = wanted.provider \
           AND k.provider_call_id = wanted.provider_call_id OFFSET 0 FOR UPDATE NOWAIT) AS c \
         ORDER BY c.id"
    )
);

crate::statement!(
    LOCK_CALLS,
    Months::None,
    [UUID, UUID_ARRAY],
    format!(
        "SELECT {COLUMNS} FROM public.calls c WHERE c.site_id = $1 AND c.id = ANY ($2) ORDER BY c.id FOR UPDATE OF c NOWAIT"
    )
);

crate::statement!(
    FIND_CALL,
    Months::None,
    [UUID, UUID],
    format!("SELECT {COLUMNS} FROM public.calls c WHERE c.site_id = $1 AND c.id = $2")
);

crate::statement!(
    FIND_CALL_BY_KEY,
    Months::None,
    [UUID, TEXT, TEXT],
    format!(
        "SELECT {COLUMNS} FROM public.calls c WHERE c.site_id = $1 AND c.provider = $2 AND c.provider_call_id = $3"
    )
);

crate::statement!(
    /// A page, the latest first. $4 and $5 are the last call of the page before; empty lists filter nothing.
    LIST_CALLS,
    Months::None,
    [UUID, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, UUID, TEXT_ARRAY, TEXT_ARRAY, TEXT_ARRAY, INT8],
    format!(
        "SELECT {COLUMNS} FROM public.calls c \
         WHERE c.site_id = $1 AND c.started_at >= $2 AND c.started_at < $3 \
           AND ($4 IS NULL OR (c.started_at <= $4 AND (c.started_at < $4 OR c.id > $5))) \
           AND (cardinality($6) = 0 OR c.status = ANY ($6)) \
           AND (cardinality($7) = 0 OR c.review = ANY ($7)) \
           AND (cardinality($8) = 0 OR c.match_method = ANY ($8)) \
         ORDER BY c.started_at DESC, c.id LIMIT $9"
    )
);

crate::statement!(
    /// Everything but the judgement, which others write. `matched_at` is the time of this transaction.
    WRITE_CALLS,
    Months::None,
    [
        UUID, UUID_ARRAY, TEXT_ARRAY, TEXT_ARRAY, TEXT_ARRAY, TEXT_ARRAY, TEXT_ARRAY, BYTEA_ARRAY, TEXT_ARRAY,
        TIMESTAMPTZ_ARRAY, INT4_ARRAY, TEXT_ARRAY, TEXT_ARRAY, TEXT_ARRAY, TEXT_ARRAY, TEXT_ARRAY, TEXT_ARRAY,
        FLOAT8_ARRAY, JSONB_ARRAY, JSONB_ARRAY, TEXT_ARRAY, UUID_ARRAY, DATE_ARRAY, TIMESTAMPTZ_ARRAY, INT2_ARRAY,
        JSONB_ARRAY,
    ],
    format!(
        "INSERT INTO public.calls AS c (site_id, id, provider, provider_call_id, channel, direction, dialled_number, \
             caller_hmac, caller_last_digits, started_at, duration_sec, status, recording_ref, fingerprint, click_id_kind, \
             click_id, match_method, match_confidence, match_candidates, match_evidence, matched_fingerprint, \
             matched_session_id, matched_session_month, matched_at, lead_score_at_match, score_breakdown_at_match) \
         SELECT $1, told.* FROM unnest($2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, \
             $21, $22, $23, $24, $25, $26) AS told \
         ON CONFLICT (site_id, provider, provider_call_id) DO UPDATE SET \
             channel = excluded.channel, direction = excluded.direction, dialled_number = excluded.dialled_number, \
             caller_hmac = excluded.caller_hmac, caller_last_digits = excluded.caller_last_digits, \
             started_at = excluded.started_at, duration_sec = excluded.duration_sec, status = excluded.status, \
             recording_ref = excluded.recording_ref, fingerprint = excluded.fingerprint, \
             click_id_kind = excluded.click_id_kind, click_id = excluded.click_id, match_method = excluded.match_method, \
             match_confidence = excluded.match_confidence, match_candidates = excluded.match_candidates, \
             match_evidence = excluded.match_evidence, matched_fingerprint = excluded.matched_fingerprint, \
             matched_session_id = excluded.matched_session_id, matched_session_month = excluded.matched_session_month, \
             matched_at = excluded.matched_at, lead_score_at_match = excluded.lead_score_at_match, \
             score_breakdown_at_match = excluded.score_breakdown_at_match \
         RETURNING {COLUMNS}"
    )
);

crate::statement!(
    /// A judgement. As a person, the policies decide whether there is such a row.
    REVIEW_CALL,
    Months::None,
    [UUID, UUID, TEXT, TEXT, TEXT, TEXT],
    format!(
        "UPDATE public.calls AS c SET review = $3, sale_amount = CAST($4 AS numeric), sale_currency = $5, reviewed_at = now(), \
             reviewed_by = $6 WHERE c.site_id = $1 AND c.id = $2 RETURNING {COLUMNS}"
    )
);

/// A row as the call it is.
pub fn read(row: &impl Columns) -> Result<Call, Unreadable> {
    let site = SiteId::from_uuid(row.column("site_id")?);
    let text = |column: &str| row.column::<Option<String>>(column);
    let caller = match row.column::<Option<&[u8]>>("caller_hmac")? {
        Some(hash) => {
            Some(Caller { hash: hash.try_into()?, last_digits: text("caller_last_digits")?.unwrap_or_default() })
        }
        None => None,
    };
    let duration: Option<i32> = row.column("duration_sec")?;
    let kind = text("click_id_kind")?.and_then(|kind| ClickIdKind::from_name(&kind));
    let sale = row.column::<Option<Decimal>>("sale_amount")?.zip(text("sale_currency")?);
    let sale = sale.map(|(Decimal(amount), currency)| Sale { amount, currency });
    Ok(Call {
        id: CallId::from_uuid(row.column("id")?),
        key: CallKey::stored(site, row.column("provider")?, row.column("provider_call_id")?),
        told: Told {
            channel: Channel::from_name(row.column("channel")?).ok_or("unknown channel")?,
            direction: Direction::from_name(row.column("direction")?).ok_or("unknown direction")?,
            dialled: row.column::<&str>("dialled_number")?.parse()?,
            caller,
            started_at: row.column("started_at")?,
            duration_sec: duration.and_then(|seconds| u32::try_from(seconds).ok()),
            status: row.column::<Option<&str>>("status")?.and_then(Status::from_name),
            recording: text("recording_ref")?,
            fingerprint: text("fingerprint")?,
            click_id: kind.zip(text("click_id")?).map(|(kind, value)| ClickId { kind, value }),
        },
        found: read_match(row, site)?,
        matched_at: row.column("matched_at")?,
        review: Review {
            status: ReviewStatus::from_name(row.column("review")?).ok_or("unknown review")?,
            sale,
            by: text("reviewed_by")?,
            at: row.column("reviewed_at")?,
        },
        created_at: row.column("created_at")?,
        updated_at: row.column("updated_at")?,
    })
}

fn read_match(row: &impl Columns, site: SiteId) -> Result<Found, Unreadable> {
    let id: Option<Uuid> = row.column("matched_session_id")?;
    let month: Option<NaiveDate> = row.column("matched_session_month")?;
    let session = id.zip(month).map(|(id, month)| SessionKey {
        site_id: site,
        month: Month::containing(month),
        id: SessionId::from_uuid(id),
    });
    let evidence = row.column::<Option<Value>>("match_evidence")?.and_then(|value| serde_json::from_value(value).ok());
    let evidence: Noted = evidence.unwrap_or_default();
    let fingerprint: Option<String> = row.column("matched_fingerprint")?;
    let credited = session.zip(evidence.event_id.zip(evidence.event_at));
    let candidates: Value = row.column("match_candidates")?;
    let breakdown: Option<Value> = row.column("score_breakdown_at_match")?;
    Ok(Found {
        decision: Match {
            method: MatchMethod::from_name(row.column("match_method")?).ok_or("unknown method")?,
            confidence: row.column("match_confidence")?,
            credited: credited.map(|(session, (event, at))| Candidate {
                session,
                event,
                at,
                fingerprint,
                clicked: evidence.clicked_number,
            }),
            candidates: Noted::list(&candidates).into_iter().filter_map(|noted| noted.candidate(site)).collect(),
        },
        signals: breakdown.map(|value| SignalSet::from_breakdown(&value)).unwrap_or_default(),
    })
}

fn read_all(rows: &[Row], operation: &'static str) -> Result<Vec<Call>, StoreError> {
    rows.iter().map(|row| read(row).map_err(|error| StoreError::unreadable(operation, error))).collect()
}

/// The calls with these keys, locked; the caller has closed the site's gate.
pub async fn lock_by_key(tx: &Transaction<'_>, site: SiteId, keys: &[&CallKey]) -> Result<Vec<Call>, StoreError> {
    let (providers, ids): (Vec<&str>, Vec<&str>) =
        keys.iter().map(|key| (key.provider(), key.provider_call_id())).unzip();
    let rows = tx.query(&LOCK_CALLS_BY_KEY, &[&site.as_uuid(), &providers, &ids]).await?;
    let mut calls = read_all(&rows, LOCK_CALLS_BY_KEY.name)?;
    calls.dedup_by_key(|call| call.id);
    Ok(calls)
}

/// The calls with these ids, locked; the caller has closed the site's gate.
pub async fn lock(tx: &Transaction<'_>, site: SiteId, ids: &[CallId]) -> Result<Vec<Call>, StoreError> {
    let ids: Vec<Uuid> = ids.iter().map(CallId::as_uuid).collect();
    let rows = tx.query(&LOCK_CALLS, &[&site.as_uuid(), &ids]).await?;
    read_all(&rows, LOCK_CALLS.name)
}

/// One call.
pub async fn find(tx: &Transaction<'_>, site: SiteId, id: CallId) -> Result<Option<Call>, StoreError> {
    let rows = tx.query(&FIND_CALL, &[&site.as_uuid(), &id.as_uuid()]).await?;
    Ok(read_all(&rows, FIND_CALL.name)?.pop())
}

/// One call by its provider's id.
pub async fn find_by_key(tx: &Transaction<'_>, key: &CallKey) -> Result<Option<Call>, StoreError> {
    let params: [&(dyn ToSql + Sync); 3] = [&key.site_id().as_uuid(), &key.provider(), &key.provider_call_id()];
    let rows = tx.query(&FIND_CALL_BY_KEY, &params).await?;
    Ok(read_all(&rows, FIND_CALL_BY_KEY.name)?.pop())
}

/// Which calls to list. Empty lists filter nothing.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    pub from: DateTime<Utc>,
    pub before: DateTime<Utc>,
    pub statuses: Vec<Status>,
    pub reviews: Vec<ReviewStatus>,
    pub methods: Vec<MatchMethod>,
}

/// A page of calls, the latest first, behind `after` (the beginning and id of the last call of the page before).
pub async fn list(
    tx: &Transaction<'_>,
    site: SiteId,
    filter: &Filter,
    after: Option<(DateTime<Utc>, CallId)>,
    limit: i64,
) -> Result<Vec<Call>, StoreError> {
    let statuses: Vec<&str> = filter.statuses.iter().map(|status| status.name()).collect();
    let reviews: Vec<&str> = filter.reviews.iter().map(|review| review.name()).collect();
    let methods: Vec<&str> = filter.methods.iter().map(|method| method.name()).collect();
    let (at, id) = after.map(|(at, id)| (at, id.as_uuid())).unzip();
    let params: [&(dyn ToSql + Sync); 9] =
        [&site.as_uuid(), &filter.from, &filter.before, &at, &id, &statuses, &reviews, &methods, &limit];
    let rows = tx.query(&LIST_CALLS, &params).await?;
    read_all(&rows, LIST_CALLS.name)
}

/// Writes calls, all but their judgement, and returns them as they are then. Locked, or new.
pub async fn write(tx: &Transaction<'_>, site: SiteId, calls: &[Call]) -> Result<Vec<Call>, StoreError> {
    if calls.is_empty() {
        return Ok(Vec::new());
    }
    fn column<'c, T>(calls: &'c [Call], pick: impl Fn(&'c Call) -> T) -> Vec<T> {
        calls.iter().map(pick).collect()
    }
    let credited = |call: &Call| call.credited().map(|credit| credit.session);
    let breakdown = |call: &Call| call.credited().map(|_| call.found.signals.breakdown());
    let noted =
        |call: &Call| -> Value { call.found.decision.candidates.iter().map(|one| json!(Noted::from(one))).collect() };
    let evidence = |call: &Call| {
        call.credited().map(|credit| {
            // Whose evidence it is stands in columns of its own.
            json!(Noted { session_id: None, session_month: None, fingerprint: None, ..Noted::from(credit) })
        })
    };
    let rows = tx
        .query(
            &WRITE_CALLS,
            &[
                &site.as_uuid(),
                &column(calls, |call| call.id.as_uuid()),
                &column(calls, |call| call.key.provider()),
                &column(calls, |call| call.key.provider_call_id()),
                &column(calls, |call| call.told.channel.name()),
                &column(calls, |call| call.told.direction.name()),
                &column(calls, |call| call.told.dialled.as_str()),
                &column(calls, |call| call.told.caller.as_ref().map(|caller| caller.hash.as_slice())),
                &column(calls, |call| call.told.caller.as_ref().map(|caller| caller.last_digits.as_str())),
                &column(calls, |call| call.told.started_at),
                &column(calls, |call| call.told.duration_sec.and_then(|seconds| i32::try_from(seconds).ok())),
                &column(calls, |call| call.told.status.map(Status::name)),
                &column(calls, |call| call.told.recording.as_deref()),
                &column(calls, |call| call.told.fingerprint.as_deref()),
                &column(calls, |call| call.told.click_id.as_ref().map(|id| id.kind.name())),
                &column(calls, |call| call.told.click_id.as_ref().map(|id| id.value.as_str())),
                &column(calls, |call| call.found.decision.method.name()),
                &column(calls, |call| call.found.decision.confidence),
                &column(calls, noted),
                &column(calls, evidence),
                &column(calls, |call| call.credited().and_then(|credit| credit.fingerprint.as_deref())),
                &column(calls, |call| credited(call).map(|session| session.id.as_uuid())),
                &column(calls, |call| credited(call).map(|session| session.month.first_day())),
                &column(calls, |call| call.matched_at),
                &column(calls, |call| call.credited().map(|_| i16::from(call.found.signals.score().get()))),
                &column(calls, breakdown),
            ],
        )
        .await?;
    read_all(&rows, WRITE_CALLS.name)
}

/// The same together with what calls raise in these sessions, as the last of a transaction, which is committed along with it. There may be none of
/// either.
pub async fn write_and_commit(
    tx: Transaction<'_>,
    site: SiteId,
    calls: &[Call],
    raised: &[Session],
) -> Result<Vec<Call>, StoreError> {
    let raise = super::sessions::set_call_signals(&tx, site, raised);
    let (_, written) = tx.finish(raise, write(&tx, site, calls)).await?;
    Ok(written)
}

/// Writes a judgement; the call as it is then, or nothing if there is none that the transaction's role may judge.
pub async fn review(
    tx: &Transaction<'_>,
    site: SiteId,
    id: CallId,
    status: ReviewStatus,
    sale: Option<&Sale>,
    by: &str,
) -> Result<Option<Call>, StoreError> {
    let (amount, currency) = sale.map(|sale| (sale.amount.as_str(), sale.currency.as_str())).unzip();
    let params: [&(dyn ToSql + Sync); 6] = [&site.as_uuid(), &id.as_uuid(), &status.name(), &amount, &currency, &by];
    let rows = tx.query(&REVIEW_CALL, &params).await?;
    Ok(read_all(&rows, REVIEW_CALL.name)?.pop())
}
