//! Ads-assisted: the visitor came back after an earlier visit that was paid for.
//!
//! A session without a click id of its own is assisted if an *earlier* session of the same site and fingerprint is direct, and not more than
//! 90 days older. Both are judged by what is finally known of them, so when the earlier session arrives late, the later one is corrected.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::id::{SessionId, SiteId};
use super::month::Month;
use super::session::Session;

/// How far back an ad counts.
pub const WINDOW: TimeDelta = TimeDelta::days(90);

/// The direct session's side: which sessions of its fingerprint have to be looked at again because it appeared or moved. Each is judged by all
/// that is known, so to look at one too many, or at one twice, changes nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reach {
    pub site_id: SiteId,
    pub fingerprint: String,
    /// Later than this ...
    pub after: DateTime<Utc>,
    /// ... up to and including this.
    pub until: DateTime<Utc>,
}

/// How far a reach has been looked at: sessions are, month by month, in the order of their time and id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub month: Month,
    pub created_at: DateTime<Utc>,
    pub id: SessionId,
}

impl Reach {
    /// Before all of its sessions.
    pub fn beginning(&self) -> Place {
        self.beginning_of(months_between(self.after, self.until).0)
    }

    /// After those of a month; none if there are no later ones.
    pub fn beyond(&self, month: Month) -> Option<Place> {
        (month < months_between(self.after, self.until).1).then(|| self.beginning_of(month.next()))
    }

    fn beginning_of(&self, month: Month) -> Place {
        Place { month, created_at: self.after, id: SessionId::from_uuid(Uuid::nil()) }
    }
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
        site_id: after.key.site_id,
        fingerprint: standing.fingerprint.to_owned(),
        after: standing.created_at,
        until: standing.created_at + WINDOW,
    };
    old.iter().chain(new.iter()).map(reach).collect()
}

/// One reach a fingerprint, which covers all of its reaches and what lies between them.
pub fn joined(reaches: impl Iterator<Item = Reach>) -> Vec<Reach> {
    let mut joined: BTreeMap<(SiteId, String), Reach> = BTreeMap::new();
    for reach in reaches {
        let covers = joined.entry((reach.site_id, reach.fingerprint.clone())).or_insert_with(|| reach.clone());
        covers.after = covers.after.min(reach.after);
        covers.until = covers.until.max(reach.until);
    }
    joined.into_values().collect()
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
    use crate::domain::id::SessionKey;

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

    #[test]
    fn reaches_of_one_fingerprint_are_one_that_covers_them() {
        let direct = |fp, day| session("https://a.example/?gclid=1", Some(fp), day);
        let (first, last, other) = (direct("f", 8), direct("f", 10), direct("g", 9));
        let all = [&last, &other, &first].map(|session| reaches(None, session)).concat();
        let told: Vec<_> = joined(all.into_iter()).into_iter().map(|r| (r.fingerprint, r.after, r.until)).collect();
        let whole = ("f".to_owned(), first.created_at, last.created_at + WINDOW);
        assert_eq!(told, [whole, ("g".to_owned(), other.created_at, other.created_at + WINDOW)]);
    }

    #[test]
    fn a_reach_is_walked_month_by_month_to_its_end() {
        let reach = reaches(None, &session("https://a.example/?gclid=1", Some("f"), 0)).remove(0);
        let places: Vec<Place> =
            std::iter::successors(Some(reach.beginning()), |place| reach.beyond(place.month)).collect();
        let (first, last) = months_between(reach.after, reach.until);
        assert_eq!((places[0].month, places[places.len() - 1].month), (first, last));
        assert!(places.is_sorted() && places.iter().all(|place| place.created_at == reach.after), "{places:?}");
    }
}
