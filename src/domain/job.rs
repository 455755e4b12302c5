//! The job: an accepted event on its way through a queue, and in a dead letter.
//!
//! It carries the whole [`Event`], so the worker needs nothing of the request that brought it: the id makes a second delivery harmless,
//! and `received_at` (taken at the edge) puts a late delivery into the month where it belongs. `v` is raised when a reader of today
//! could no longer understand what is written.

use std::borrow::Cow;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::domain::event::Event;

/// The version that is written and read.
const VERSION: u32 = 1;

/// Two machines' clocks may differ by this much.
const SKEW: TimeDelta = TimeDelta::minutes(5);

/// No queue holds a message longer than a year; an arrival before that is somebody's mistake.
const OLDEST: TimeDelta = TimeDelta::days(366);

/// An event and the version of its writing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job<'a> {
    v: u32,
    event: Cow<'a, Event>,
}

/// Why a text is no job. No payload in it: it is logged and shown.
#[derive(Debug, thiserror::Error)]
pub enum NotAJob {
    #[error("`event` cannot be read: {0}")]
    Unreadable(String),
    #[error("`v` is {0}, and this server reads {VERSION}")]
    Version(u32),
    #[error("the event's arrival lies in the future")]
    FromTheFuture,
    #[error("the event's arrival is more than a year ago")]
    TooOld,
    #[error("`event` was never accepted anywhere: `{0}` is not what an event has")]
    NoEvent(&'static str),
}

impl<'a> Job<'a> {
    pub fn of(event: &'a Event) -> Self {
        Self { v: VERSION, event: Cow::Borrowed(event) }
    }

    /// The text that goes into the queue.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }
}

impl Job<'static> {
    /// A job that owns its event.
    pub fn new(event: Event) -> Self {
        Self { v: VERSION, event: Cow::Owned(event) }
    }

    /// Reads a job and checks what only the reader can know: that it did not arrive after now, or before anybody cared.
    pub fn event_from_json(text: &str, now: DateTime<Utc>) -> Result<Event, NotAJob> {
        // The version first: a later job may look different altogether.
        #[derive(Deserialize)]
        struct Version {
            v: u32,
        }
        let unreadable = |error: serde_json::Error| {
            NotAJob::Unreadable(format!("{:?} at column {}", error.classify(), error.column()))
        };
        let Version { v } = serde_json::from_str(text).map_err(unreadable)?;
        if v != VERSION {
            return Err(NotAJob::Version(v));
        }
        let event = serde_json::from_str::<Self>(text).map_err(unreadable)?.event.into_owned();
        // Imported history may be older than any job.
        let arrived_at = event.arrived_at();
        if arrived_at > now + SKEW {
            Err(NotAJob::FromTheFuture)
        } else if arrived_at < now - OLDEST {
            Err(NotAJob::TooOld)
        } else if let Some(field) = event.defect() {
            Err(NotAJob::NoEvent(field))
        } else {
            Ok(event)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::event::{Arrival, Draft, FieldNames};
    use crate::domain::id::SiteId;
    use uuid::Uuid;

    fn event(received_at: DateTime<Utc>) -> Event {
        let draft = Draft { url: Some("https://a.example/".into()), session: Some("s".into()), ..Draft::default() };
        let names = FieldNames { url: "u", session: "sid" };
        Event::accept(SiteId::from_uuid(Uuid::from_u128(1)), draft, &Arrival::at(received_at), names)
            .expect("a whole draft")
    }

    #[test]
    fn a_job_brings_its_event_unchanged() {
        let now = Utc::now();
        let event = event(now - TimeDelta::days(30));
        let text = Job::of(&event).to_json().unwrap_or_default();
        assert!(text.starts_with(r#"{"v":1,"event":{"#), "{text}");
        assert_eq!(Job::event_from_json(&text, now).ok(), Some(event));
    }

    #[test]
    fn numbers_arrive_to_the_last_bit() {
        let now = Utc::now();
        for number in [4.408_103_815_583_577_5e-39, 0.1 + 0.2, 1.797_693_134_862_315_7e308, 7.038_531e-26, 5e-324] {
            let mut event = event(now);
            event.value = Some(number);
            event.metadata.insert("n".to_owned(), number.into());
            let text = Job::of(&event).to_json().unwrap_or_default();
            assert_eq!(Job::event_from_json(&text, now).ok(), Some(event), "{number:e}");
        }
    }

    #[test]
    fn what_is_no_job_is_told_apart() {
        let now = Utc::now();
        let read = |received_at| {
            let text = Job::of(&event(received_at)).to_json().unwrap_or_default();
            Job::event_from_json(&text, now).err().map(|error| error.to_string())
        };
        assert_eq!(read(now + TimeDelta::minutes(4)), None, "a clock may run ahead a little");
        assert!(read(now + TimeDelta::minutes(6)).is_some_and(|error| error.contains("future")));
        assert!(read(now - TimeDelta::days(400)).is_some_and(|error| error.contains("year")));
        let error = |text| Job::event_from_json(text, now).err().map(|error| error.to_string()).unwrap_or_default();
        let mut hollow = event(now);
        hollow.url.clear();
        let hollow = Job::of(&hollow).to_json().unwrap_or_default();
        assert!(error(&hollow).contains("`url`"), "{}", error(&hollow));
        assert!(error(r#"{"v":2,"event":null}"#).contains("`v` is 2"));
        let unreadable = error(r#"{"v":1,"event":"a visitor's secret"}"#);
        assert!(unreadable.contains("cannot be read") && !unreadable.contains("secret"), "{unreadable}");
    }

    #[test]
    fn a_job_of_imported_history_is_judged_by_its_arrival_and_an_older_job_has_none() {
        let now = Utc::now();
        let import = |arrived_at: DateTime<Utc>, happened: DateTime<Utc>| {
            let draft = Draft {
                url: Some("https://a.example/".into()),
                session: Some("s".into()),
                occurred_at: Some(happened),
                ..Draft::default()
            };
            let names = FieldNames { url: "u", session: "sid" };
            Event::accept(SiteId::from_uuid(Uuid::from_u128(1)), draft, &Arrival::at(arrived_at), names)
                .expect("inside of the window")
        };
        let old = import(now, now - TimeDelta::days(700));
        let text = Job::of(&old).to_json().unwrap_or_default();
        assert_eq!(Job::event_from_json(&text, now).ok(), Some(old));
        let stale = import(now - TimeDelta::days(400), now - TimeDelta::days(400));
        let text = Job::of(&stale).to_json().unwrap_or_default();
        assert!(matches!(Job::event_from_json(&text, now), Err(NotAJob::TooOld)));
        let mut forged = import(now, now - TimeDelta::days(700));
        forged.received_at -= TimeDelta::days(700);
        forged.occurred_at = forged.received_at;
        let text = Job::of(&forged).to_json().unwrap_or_default();
        assert!(matches!(Job::event_from_json(&text, now), Err(NotAJob::NoEvent("received_at"))));

        let text = Job::of(&event(now)).to_json().unwrap_or_default();
        assert!(!text.contains("imported_at"), "as jobs have always been written: {text}");
    }
}
