//! What an attribution rests on: the click that was paid for, and how old it was.
//!
//! A direct session rests on its own earliest click id of Google Ads; an assisted one on that of the latest earlier direct session, see
//! [`super::ads_history`]. Everything here is read off merged sessions, so it does not depend on the order of their events either.

use chrono::{DateTime, TimeDelta, Utc};

use super::ads_history::WINDOW;
use super::id::EventId;
use super::session::{Field, First, Session, Stamp};

/// The kinds of click id that make a session direct.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PaidClick {
    Gclid,
    Wbraid,
    Gbraid,
}

/// The click id that decides that a session is direct: the first that was told; of those that one event told, the first of this list.
pub fn paid_click(session: &Session) -> Option<(PaidClick, &First)> {
    let kinds =
        [(PaidClick::Gclid, Field::Gclid), (PaidClick::Wbraid, Field::Wbraid), (PaidClick::Gbraid, Field::Gbraid)];
    let clicks = kinds.into_iter().filter_map(|(kind, field)| Some((kind, session.firsts.get(&field)?)));
    clicks.min_by_key(|(_, click)| click.stamp)
}

/// How old a click was when a session began. A click that came after the beginning, or that a clock puts before the window, is held within.
pub fn age(began: DateTime<Utc>, seen_at: DateTime<Utc>) -> TimeDelta {
    (began - seen_at).clamp(TimeDelta::zero(), WINDOW)
}

/// The event behind a stamp; none where a row does not tell.
pub fn event_of(stamp: Stamp) -> Option<EventId> {
    (!stamp.event.as_uuid().is_nil()).then_some(stamp.event)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::event::{Arrival, Draft, Event, FieldNames};
    use crate::domain::id::{SessionId, SessionKey, SiteId};
    use uuid::Uuid;

    fn event(n: u128, second: i64, query: &str) -> Event {
        let draft = Draft {
            id: Some(Uuid::from_u128(n).to_string()),
            url: Some(format!("https://a.example/?{query}")),
            session: Some("s".into()),
            ..Draft::default()
        };
        let at = DateTime::from_timestamp(1_795_000_000 + second, 0).unwrap_or_default();
        let names = FieldNames { url: "u", session: "sid" };
        Event::accept(SiteId::from_uuid(Uuid::nil()), draft, &Arrival::at(at), names).expect("a whole draft")
    }

    #[test]
    fn the_first_click_decides_and_of_one_event_the_gclid() {
        let key = SessionKey {
            site_id: SiteId::from_uuid(Uuid::nil()),
            month: "2026-11-01".parse().expect("a month"),
            id: SessionId::from_uuid(Uuid::from_u128(1)),
        };
        let mut session = Session::begin(key, &event(9, 9, "fbclid=f"));
        assert_eq!(paid_click(&session), None, "another system's click decides nothing");
        session.merge(&event(3, 5, "gclid=late"));
        session.merge(&event(2, 4, "gbraid=gb&wbraid=wb"));
        let (kind, click) = paid_click(&session).expect("a click");
        assert_eq!((kind, click.value.as_str()), (PaidClick::Wbraid, "wb"));
        assert_eq!(event_of(click.stamp), Some(EventId::from_uuid(Uuid::from_u128(2))));
    }

    #[test]
    fn an_age_lies_within_the_window() {
        let began = DateTime::from_timestamp(1_795_000_000, 0).unwrap_or_default();
        assert_eq!(age(began, began - TimeDelta::hours(3)), TimeDelta::hours(3));
        assert_eq!(age(began, began + TimeDelta::hours(3)), TimeDelta::zero());
        assert_eq!(age(began, began - TimeDelta::days(91)), WINDOW);
    }
}
