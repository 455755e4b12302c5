//! A push: one telling of a call by its provider, as it was accepted at the door.
//!
//! The door reads its vocabulary into a [`Draft`]; [`Push::accept`] checks and derives, once. Unlike an event, a push is
//! refused when it cannot be read: a machine sends it, and its maker can mend it. The caller's number is read and hashed
//! here and goes no further; no refusal repeats what was sent.

use chrono::{DateTime, Months, SubsecRound, TimeDelta, Utc};
use url::Url;

use super::call::{CallKey, Caller, Channel, ClickId, ClickIdKind, Direction, Status};
use super::id::SiteId;
use super::refusal::Refusal;
use super::telephone::{self, E164};
use super::text::{MAX_SHORT, clean_some};

/// How far back a call may have begun: what an import of history may bring.
const MONTHS_BACK: Months = Months::new(24);
/// How far a provider's clock may run ahead.
const AHEAD: TimeDelta = TimeDelta::minutes(2);
const MAX_DURATION_SEC: u64 = 24 * 60 * 60;
const MAX_RECORDING: usize = 2048;

/// How long a call lasted, as it was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Duration {
    Seconds(u32),
    Text(String),
}

/// A push as a door has read it: nothing is checked yet. None and empty text say "not known yet".
#[derive(Debug, Clone, Default)]
pub struct Draft {
    pub provider: String,
    pub provider_call_id: String,
    pub channel: Option<Channel>,
    pub direction: Option<Direction>,
    pub dialled_number: String,
    pub caller_number: Option<String>,
    pub started_at: Option<DateTime<Utc>>,
    pub duration: Option<Duration>,
    pub status: Option<Status>,
    pub recording_reference: Option<String>,
    pub fingerprint: Option<String>,
    /// Kind and text; the kind is None when it was left unspecified.
    pub click_id: Option<(Option<ClickIdKind>, String)>,
}

/// What one accepted push tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Push {
    pub key: CallKey,
    pub channel: Option<Channel>,
    pub direction: Option<Direction>,
    pub dialled: E164,
    pub caller: Option<Caller>,
    /// In whole microseconds, as PostgreSQL keeps them.
    pub started_at: DateTime<Utc>,
    pub duration_sec: Option<u32>,
    pub status: Option<Status>,
    pub recording: Option<String>,
    pub fingerprint: Option<String>,
    pub click_id: Option<ClickId>,
}

impl Push {
    /// Checks a draft. National numbers are read in `region`, the site's; `hash` is the keyed hash of a caller's number.
    pub fn accept(
        site: SiteId,
        draft: Draft,
        region: Option<&str>,
        received_at: DateTime<Utc>,
        hash: impl Fn(&E164) -> [u8; 32],
    ) -> Result<Self, Refusal> {
        let key = CallKey::new(site, &draft.provider, &draft.provider_call_id)?;
        let dialled = dialled(&draft.dialled_number, region)?;
        let started_at = started_at(draft.started_at, received_at)?;
        let caller = draft.caller_number.and_then(|number| telephone::caller(&number, region));
        Ok(Self {
            key,
            channel: draft.channel,
            direction: draft.direction,
            dialled,
            caller: caller.map(|number| Caller { hash: hash(&number), last_digits: number.last_digits().to_owned() }),
            started_at,
            duration_sec: draft.duration.map(seconds).transpose()?.flatten(),
            status: draft.status,
            recording: recording(draft.recording_reference)?,
            // As an event's, so that the two can be equal.
            fingerprint: draft.fingerprint.and_then(|text| clean_some(&text, MAX_SHORT)),
            click_id: draft.click_id.map(click_id).transpose()?,
        })
    }
}

fn dialled(text: &str, region: Option<&str>) -> Result<E164, Refusal> {
    const FIELD: &str = "dialled_number";
    if text.trim().is_empty() {
        return Err(Refusal::missing(FIELD, "the number of the business"));
    }
    let otherwise = match region {
        Some(_) => "it is no telephone number",
        None => "it is no international telephone number, and the site has no region in which to read a national one",
    };
    E164::read(text, region).ok_or_else(|| Refusal::invalid(FIELD, otherwise))
}

fn started_at(started_at: Option<DateTime<Utc>>, received_at: DateTime<Utc>) -> Result<DateTime<Utc>, Refusal> {
    const FIELD: &str = "started_at";
    let started_at = started_at.ok_or_else(|| Refusal::missing(FIELD, "when the call began"))?;
    let late = received_at.checked_sub_months(MONTHS_BACK).is_some_and(|earliest| started_at < earliest);
    let early = received_at.checked_add_signed(AHEAD).is_some_and(|latest| started_at > latest);
    if late || early {
        let bound = "a call may have begun up to 24 months before it is received and two minutes after";
        return Err(Refusal::out_of_range(FIELD, bound));
    }
    Ok(started_at.trunc_subsecs(6))
}

fn seconds(duration: Duration) -> Result<Option<u32>, Refusal> {
    let (field, seconds) = match duration {
        Duration::Seconds(seconds) => ("duration_seconds", u64::from(seconds)),
        Duration::Text(text) if text.trim().is_empty() => return Ok(None),
        Duration::Text(text) => {
            let field = "duration_text";
            let unreadable = || Refusal::invalid(field, "write `192`, `192s`, `3:12`, `00:03:12` or `PT3M12S`");
            (field, seconds_of(&text.trim().to_ascii_lowercase()).ok_or_else(unreadable)?)
        }
    };
    let bounded = u32::try_from(seconds).ok().filter(|_| seconds <= MAX_DURATION_SEC);
    bounded.map(Some).ok_or_else(|| Refusal::out_of_range(field, "a call may last 24 hours"))
}

/// Seconds in text of any of the forms, in lower case. More than can be counted is the greatest number.
fn seconds_of(text: &str) -> Option<u64> {
    if let Some(iso) = text.strip_prefix("pt") {
        return seconds_of_iso(iso);
    }
    let parts: Vec<&str> = text.split(':').collect();
    match parts.as_slice() {
        [seconds] => whole(seconds.strip_suffix('s').unwrap_or(seconds)),
        [minutes, seconds] => Some(whole(minutes)?.saturating_mul(60).saturating_add(sixtieth(seconds)?)),
        [hours, minutes, seconds] => {
            let below_an_hour = sixtieth(minutes)? * 60 + sixtieth(seconds)?;
            Some(whole(hours)?.saturating_mul(3600).saturating_add(below_an_hour))
        }
        _ => None,
    }
}

/// What stands behind `PT`: hours, minutes and seconds in this order, at least one of them. Parts of a second, which
/// only seconds may have, are dropped.
fn seconds_of_iso(text: &str) -> Option<u64> {
    let (mut rest, mut sum) = (text, 0u64);
    for (unit, worth) in [('h', 3600), ('m', 60), ('s', 1)] {
        if let Some((count, behind)) = rest.split_once(unit) {
            let count = match count.split_once(['.', ',']) {
                Some((count, parts)) if unit == 's' => whole(parts).map(|_| count)?,
                _ => count,
            };
            sum = sum.saturating_add(whole(count)?.saturating_mul(worth));
            rest = behind;
        }
    }
    (rest.is_empty() && !text.is_empty()).then_some(sum)
}

fn whole(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

fn sixtieth(text: &str) -> Option<u64> {
    whole(text).filter(|count| text.len() == 2 && *count < 60)
}

fn recording(reference: Option<String>) -> Result<Option<String>, Refusal> {
    const FIELD: &str = "recording_reference";
    let Some(reference) = reference.and_then(|text| clean_some(&text, usize::MAX)) else { return Ok(None) };
    if reference.len() > MAX_RECORDING {
        return Err(Refusal::out_of_range(FIELD, "it may have 2048 bytes"));
    }
    if has_credentials(&reference) {
        return Err(Refusal::invalid(FIELD, "it has a user's name or password in it"));
    }
    Ok(Some(reference))
}

/// Whether a reference names a user for its host. An id with an `@`, such as SIP makes them, does not.
fn has_credentials(reference: &str) -> bool {
    if Url::parse(reference).is_ok_and(|url| !url.username().is_empty() || url.password().is_some()) {
        return true;
    }
    // What is no URL to a parser may still be one to a person: `//user:pw@host/`, `user:pw@host/`.
    let (rooted, rest) = match reference.split_once("//") {
        Some((before, rest)) if before.is_empty() || before.ends_with(':') => (true, rest),
        _ => (false, reference),
    };
    let authority = rest.split(['/', '?', '#', '\\']).next().unwrap_or_default();
    authority.rsplit_once('@').is_some_and(|(user, _)| rooted || user.contains(':'))
}

fn click_id((kind, value): (Option<ClickIdKind>, String)) -> Result<ClickId, Refusal> {
    let kind = kind.ok_or_else(|| Refusal::missing("click_id.kind", "whose click id it is"))?;
    let value = clean_some(&value, usize::MAX).ok_or_else(|| Refusal::missing("click_id.value", "the click id"))?;
    if value.len() > MAX_SHORT {
        return Err(Refusal::out_of_range("click_id.value", "it may have 512 bytes"));
    }
    Ok(ClickId { kind, value })
}

#[cfg(test)]
#[path = "push_tests.rs"]
mod tests;
