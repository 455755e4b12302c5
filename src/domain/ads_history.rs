//! Ads-assisted: the visitor came back after an earlier visit that was paid for.
//!
//! A session without a click id of its own is assisted if an *earlier* session of the same site and fingerprint is direct, and not more than
//! 90 days older. Both are judged by what is finally known of them, so when the earlier session arrives late, the later one is corrected.

use chrono::{DateTime, TimeDelta, Utc};

use super::id::SessionKey;
use super::month::Month;
use super::session::Session;

/// How far back an ad counts.
pub const WINDOW: TimeDelta = TimeDelta::days(90);

/// The direct session's side: which sessions of its fingerprint have to be looked at again because it appeared or moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reach {
    pub key: SessionKey,
    pub fingerprint: String,
    /// Later than this ...
    pub after: DateTime<Utc>,
    /// ... up to and including this.
    pub until: DateTime<Utc>,
}

/// What of a session matters to the history of others.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Standing<'a> {
    fingerprint: &'a str,
    created_at: DateTime<Utc>,
}

fn standing(session: &Session) -> Option<Standing<'_>> {
    let fingerprint = session.fingerprint()?;
    session.is_direct().then_some(Standing { fingerprint, created_at: session.created_at })
}

/// Whose history changes when a session goes from `before` (none: it is new) to `after`. Nothing, for most.
pub fn reaches(before: Option<&Session>, after: &Session) -> Vec<Reach> {
    let (old, new) = (before.and_then(standing), standing(after));
    if old == new {
        return Vec::new();
    }
    let reach = |standing: &Standing<'_>| Reach {
        key: after.key,
        fingerprint: standing.fingerprint.to_owned(),
        after: standing.created_at,
        until: standing.created_at + WINDOW,
    };
    old.iter().chain(new.iter()).map(reach).collect()
}

/// Whether what was found of a stored session's history still holds: nothing that it rests on has changed with the session itself.
pub fn settled(before: Option<&Session>, after: &Session) -> bool {
    let rests_on =
        |session: &Session| (session.fingerprint().map(str::to_owned), session.created_at, session.is_direct());
    before.is_some_and(|before| rests_on(before) == rests_on(after))
}

/// The months in which a session that was created at such a time can be stored: a session's month is the month of one of its
/// arrivals or a neighbour of it, and so is every arrival a neighbour of its session's month.
pub fn months_between(from: DateTime<Utc>, until: DateTime<Utc>) -> (Month, Month) {
    (Month::of(from).previous(), Month::of(until).next())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::event::{Arrival, Draft, Event, FieldNames};
    use crate::domain::id::{SessionId, SiteId};
    use uuid::Uuid;

    fn session(url: &str, fp: Option<&str>, day: i64) -> Session {
        let key = SessionKey {
            site_id: SiteId::from_uuid(Uuid::from_u128(1)),
            month: "2026-11-01".parse().expect("a month"),
            id: SessionId::from_uuid(Uuid::from_u128(2)),
        };
        let mut draft = Draft { url: Some(url.into()), session: Some("s".into()), ..Draft::default() };
        if let Some(fp) = fp {
            draft.meta.insert("fp".into(), fp.into());
        }
        let at = DateTime::from_timestamp(1_795_000_000 + day * 86_400, 0).unwrap_or_default();
        let names = FieldNames { url: "u", session: "sid" };
        Session::begin(key, &Event::accept(key.site_id, draft, &Arrival::at(at), names).expect("a whole draft"))
    }

    #[test]
    fn only_a_direct_session_with_a_fingerprint_reaches_others() {
        let direct = session("https://a.example/?gclid=1", Some("f"), 10);
        assert!(reaches(None, &session("https://a.example/", Some("f"), 10)).is_empty());
        assert!(reaches(None, &session("https://a.example/?gclid=1", None, 10)).is_empty());
        assert!(reaches(Some(&direct), &direct).is_empty(), "nothing changed");
        let new = reaches(None, &direct);
        assert_eq!(new.len(), 1);
        assert_eq!((new[0].after, new[0].until), (direct.created_at, direct.created_at + WINDOW));
    }

    #[test]
    fn a_direct_session_that_moves_reaches_both_its_old_and_its_new_followers() {
        let (late, early) =
            (session("https://a.example/?gclid=1", Some("f"), 10), session("https://a.example/?gclid=1", Some("f"), 8));
        let moved = reaches(Some(&late), &early);
        assert_eq!(moved.iter().map(|reach| reach.after).collect::<Vec<_>>(), [late.created_at, early.created_at]);
    }
}
