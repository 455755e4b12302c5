//! What becomes of a page of letters: each read as it was read when it died, all their events through the pipeline together.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use chrono::Utc;

use crate::directory::Directory;
use crate::domain::event::Event;
use crate::domain::id::{EventId, SiteId};
use crate::domain::month::Month;
use crate::domain::outcome::{Outcome, Unavailable};
use crate::http::delivery;
use crate::keeper::{self, Nudge};
use crate::pipeline::{Pipeline, PipelineConfig};
use crate::store::dead_letters::{BuriedLetter, DeadLetter, Undertaker};
use crate::store::error::StoreError;
use crate::store::partitions::LeafState;
use crate::store::transaction::Purpose;
use crate::store::{self, Store};

/// What was pushed through `CallsService`; see [`crate::grpc`].
const CALLS: &str = "calls";
const NO_NUMBERS: &str =
    "a call cannot be replayed, because its numbers are not kept: push it again from the telephone integration";

/// Pauses before an event that could not be stored now is tried again.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3)];

/// Connections that a replay needs besides the writers': its page's, one for look-ups, one for calls that are matched again.
pub(super) const MORE_CONNECTIONS: u32 = 3;

/// What becomes of a letter, or of a dry run what would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fate {
    /// All its events are there: so many were stored now, so many were before.
    Replayed { stored: u64, duplicates: u64 },
    /// And why.
    Failed(String),
    /// And why nobody can.
    NotReplayable(&'static str),
}

/// Sends letters through a pipeline of its own.
pub(super) struct Replayer {
    store: Store,
    directory: Directory,
    pipeline: Pipeline,
    graves: Arc<Graves>,
}

/// Takes note of what dies again. The letter that is replayed is its grave already.
#[derive(Default)]
struct Graves(Mutex<HashMap<(SiteId, EventId), String>>);

impl Graves {
    fn take(&self) -> HashMap<(SiteId, EventId), String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[async_trait]
impl Undertaker for Graves {
    async fn keep(&self, letter: &DeadLetter) -> Result<(), StoreError> {
        if let Some(event) = letter.site_id.zip(letter.event_id) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(event, letter.detail.clone());
        }
        Ok(())
    }
}

/// A letter as it was read.
enum Content {
    Events(Vec<Event>),
    /// What can be stored of it, and why that is not all.
    Damaged(Vec<Event>, String),
    NotReplayable(&'static str),
}

impl Content {
    fn events(&self) -> &[Event] {
        match self {
            Self::Events(events) | Self::Damaged(events, _) => events,
            Self::NotReplayable(_) => &[],
        }
    }

    /// From what became of its events.
    fn fate(&self, stored: u64, duplicates: u64, error: Option<String>) -> Fate {
        match (self, error) {
            (Self::NotReplayable(why), _) => Fate::NotReplayable(why),
            (Self::Damaged(_, why), _) => Fate::Failed(why.clone()),
            (Self::Events(_), Some(error)) => Fate::Failed(error),
            (Self::Events(_), None) => Fate::Replayed { stored, duplicates },
        }
    }
}

impl Replayer {
    pub(super) fn start(store: Store, config: PipelineConfig) -> Self {
        let graves = Arc::<Graves>::default();
        let pipeline = Pipeline::start_with(store.clone(), Nudge::default(), graves.clone(), config);
        Self { directory: Directory::new(store.clone()), store, pipeline, graves }
    }

    pub(super) async fn stop(self) {
        self.pipeline.drain().await;
    }

    /// Stores what can be stored; a fate a letter, in the same order. An error is one of the database, and says nothing of any letter.
    pub(super) async fn replay(&self, letters: &[BuriedLetter]) -> anyhow::Result<Vec<Fate>> {
        let contents = self.read(letters).await?;
        let events: Vec<&Event> = contents.iter().flat_map(Content::events).collect();
        let outcomes = self.store(&events).await;
        let details = self.graves.take();
        let mut settled = events.iter().zip(outcomes);
        let mut fates = Vec::with_capacity(contents.len());
        for content in &contents {
            let (mut stored, mut duplicates, mut error) = (0, 0, None);
            for (event, outcome) in settled.by_ref().take(content.events().len()) {
                match outcome {
                    Outcome::Stored(_) => stored += 1,
                    Outcome::Duplicate(_) => duplicates += 1,
                    Outcome::Dead(reason) => {
                        let detail = details.get(&(event.site_id, event.id)).map_or("no more is known", String::as_str);
                        error = error.or(Some(format!("{}: {detail}", reason.code())));
                    }
                    Outcome::Unavailable(why) => error = error.or(Some(not_now(event, why))),
                }
            }
            fates.push(content.fate(stored, duplicates, error));
        }
        Ok(fates)
    }

    /// Tells what a replay would do, as far as that can be known without doing it. What PostgreSQL would refuse is not known.
    pub(super) async fn foresee(&self, letters: &[BuriedLetter], months: &Months) -> anyhow::Result<Vec<Fate>> {
        let contents = self.read(letters).await?;
        let mut there = self.stored_already(contents.iter().flat_map(Content::events)).await?;
        let mut fates = Vec::with_capacity(contents.len());
        for content in &contents {
            let (mut stored, mut duplicates, mut error) = (0, 0, None);
            for event in content.events() {
                let month = Month::for_new_session(event.month_hint, event.received_at);
                // What the first letter would store is there for the second.
                if !there.insert((event.site_id, event.id)) {
                    duplicates += 1;
                } else if months.can_take(month) {
                    stored += 1;
                } else {
                    error = error.or(Some(not_now(event, Unavailable::Partition)));
                }
            }
            fates.push(content.fate(stored, duplicates, error));
        }
        Ok(fates)
    }

    async fn read(&self, letters: &[BuriedLetter]) -> anyhow::Result<Vec<Content>> {
        let mut contents = Vec::with_capacity(letters.len());
        for letter in letters {
            if letter.source == CALLS {
                contents.push(Content::NotReplayable(NO_NUMBERS));
                continue;
            }
            let read = delivery::read(&self.directory, letter.payload.as_bytes(), letter.received_at).await;
            let (events, corpse) = read.map_err(|why| anyhow::anyhow!("cannot look up a site: {}", why.code()))?;
            contents.push(match corpse {
                Some(corpse) => Content::Damaged(events, format!("{}: {}", corpse.reason.code(), corpse.detail)),
                None => Content::Events(events),
            });
        }
        Ok(contents)
    }

    /// One outcome an event, in the same order.
    async fn store(&self, events: &[&Event]) -> Vec<Outcome> {
        let mut outcomes = vec![Outcome::Unavailable(Unavailable::Database); events.len()];
        let mut left: Vec<usize> = (0..events.len()).collect();
        let mut pauses = PAUSES.iter();
        loop {
            let mut taken = Vec::with_capacity(left.len());
            for place in left {
                taken.push((place, self.pipeline.take_when_room(events[place].clone()).await));
            }
            left = Vec::new();
            for (place, taken) in taken {
                outcomes[place] = match taken {
                    Ok(taken) => taken.outcome().await,
                    Err(why) => Outcome::Unavailable(why),
                };
                if let Outcome::Unavailable(Unavailable::Database | Unavailable::Busy) = outcomes[place] {
                    left.push(place);
                }
            }
            match pauses.next() {
                Some(pause) if !left.is_empty() => tokio::time::sleep(*pause).await,
                _ => return outcomes,
            }
        }
    }

    /// Those of the events that the tables have.
    async fn stored_already(
        &self,
        events: impl Iterator<Item = &Event>,
    ) -> Result<HashSet<(SiteId, EventId)>, StoreError> {
        let mut by_month: BTreeMap<Month, Vec<(SiteId, EventId)>> = BTreeMap::new();
        for event in events {
            by_month.entry(event.arrival_month()).or_default().push((event.site_id, event.id));
        }
        let tx = self.store.begin(Purpose::Serve).await?;
        let mut found = HashSet::new();
        for (month, ids) in by_month {
            found.extend(store::events::sessions_of(&tx, Month::neighbourhood(month), &ids).await?.into_keys());
        }
        tx.rollback().await?;
        Ok(found)
    }
}

/// The months that are there.
pub(super) struct Months(BTreeSet<Month>);

impl Months {
    pub(super) async fn of(store: &Store) -> Result<Self, StoreError> {
        let attached = store.leaves().await?.into_iter().filter(|leaf| leaf.state == LeafState::Attached);
        Ok(Self(attached.map(|leaf| leaf.month).collect()))
    }

    /// A month that is not there is made, within bounds.
    fn can_take(&self, month: Month) -> bool {
        self.0.contains(&month) || keeper::may_make(month, Utc::now())
    }
}

fn not_now(event: &Event, why: Unavailable) -> String {
    match why {
        Unavailable::Partition => {
            let month = Month::for_new_session(event.month_hint, event.received_at);
            format!("{}: the month {month} is not there and cannot be made", why.code())
        }
        Unavailable::Busy | Unavailable::Database | Unavailable::Stopping => {
            format!("{}: it could not be stored now", why.code())
        }
    }
}
