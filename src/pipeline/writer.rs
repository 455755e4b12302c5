//! One writer: takes a batch, makes every event durable or says why not.
//!
//! A batch is written in one transaction a month of arrival. Conflicts and lost connections are tried again within the patience. A batch that
//! PostgreSQL refuses is halved until the poisonous event stands alone; that one goes to `dead_letters`, its neighbours are stored. One that
//! waits for somebody's lock is parted until the visit that is locked stands alone; that one has to come again ([`super::locked`]). Months
//! that have no partition yet are made on the way, within bounds.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use tokio::time::timeout_at;

use super::PipelineConfig;
use super::batch;
use super::locked::{self, LockedVisits, Visit};
use crate::calls;
use crate::domain::event::Event;
use crate::domain::id::{DeadLetterId, SiteId};
use crate::domain::job::Job;
use crate::domain::month::Month;
use crate::domain::outcome::{DeathReason, Outcome, Unavailable};
use crate::keeper::{self, Nudge};
use crate::store::Store;
use crate::store::dead_letters::{DeadLetter, Undertaker};
use crate::store::error::{Fault, StoreError};
use crate::telemetry;

/// Pauses between the tries of a batch while the database is away: enough for a connection that was cut or a failover of a blink. Whoever waits
/// behind is told soon, and has a place of its own to keep the event.
const PAUSES: [Duration; 4] =
    [Duration::from_millis(20), Duration::from_millis(100), Duration::from_millis(300), Duration::from_millis(500)];
/// No further try that would begin later than this after the batch's oldest event came in: whoever waited behind others that found the
/// database away does not wait for the same news once more.
const RETRY_WITHIN: Duration = Duration::from_millis(1500);
/// Whoever waits for an event's answer does not wait for more of the calls that it touches than are begun within this time ...
const REMATCH_FOR: Duration = Duration::from_millis(200);
/// ... and no longer than this, whatever holds them up.
const REMATCH_WITHIN: Duration = Duration::from_secs(1);
/// A batch that has used up its patience still has so long for its dead letters.
const BURY_WITHIN: Duration = Duration::from_millis(500);
/// A conflict is tried again at once, this often.
const CONFLICT_TRIES: usize = 10;
/// A visit that is alone in its batch is tried so often while somebody has locked it, a second each; then it has to come again.
const ALONE_TRIES: usize = 3;
/// Parts of a group that is taken apart by its visits.
const PARTS: usize = 8;
/// Making a month waits up to two seconds for the writers that are in its way, and is tried again this often.
const MAKE_TRIES: usize = 3;

#[derive(Clone)]
pub(super) struct Writer {
    store: Store,
    keeper: Nudge,
    undertaker: Arc<dyn Undertaker>,
    locked: Arc<LockedVisits>,
    config: PipelineConfig,
}

/// Events of one batch, by their place in it.
type Group = Vec<(usize, Event)>;

impl Writer {
    pub(super) fn new(store: Store, keeper: Nudge, undertaker: Arc<dyn Undertaker>, config: PipelineConfig) -> Self {
        Self { store, keeper, undertaker, locked: Arc::default(), config }
    }

    /// One outcome an event, in the order of `events`, the oldest of which came in at `since`.
    pub(super) async fn write(&self, events: Vec<Event>, since: Instant) -> Vec<Outcome> {
        let started = Instant::now();
        metrics::histogram!(telemetry::BATCH_EVENTS).record(events.len() as f64);
        let mut outcomes = vec![Outcome::Unavailable(Unavailable::Database); events.len()];
        let mut by_month: BTreeMap<Month, Group> = BTreeMap::new();
        for (place, event) in events.into_iter().enumerate() {
            if self.locked.contains(visit(&event)) {
                continue;
            }
            by_month.entry(event.arrival_month()).or_default().push((place, event));
        }
        // From when the oldest came in: whoever waited behind batches that lost their patience does not wait for as long once more.
        let deadline = tokio::time::Instant::from_std(since) + self.config.patience;
        let mut asked_for = BTreeSet::new();
        for group in by_month.into_values() {
            self.settle(group, since, deadline, &mut asked_for, &mut outcomes).await;
        }
        metrics::histogram!(telemetry::BATCH_SECONDS).record(started.elapsed());
        outcomes
    }

    /// Writes a group, taking it apart around what the database refuses and what somebody has locked.
    async fn settle(
        &self,
        group: Group,
        since: Instant,
        deadline: tokio::time::Instant,
        asked_for: &mut BTreeSet<Month>,
        outcomes: &mut [Outcome],
    ) {
        let (mut any_stored, mut in_company, mut alone) = (false, false, 0);
        let mut groups = VecDeque::from([group]);
        while let Some(mut group) = groups.pop_front() {
            let written = self.write_patiently(&group, since, deadline).await;
            match written {
                Ok(results) => {
                    any_stored = true;
                    self.store.wrote();
                    for ((place, _), outcome) in group.iter().zip(results) {
                        outcomes[*place] = outcome;
                    }
                }
                Err(error) if error.is_locked_out() => match part(group) {
                    Parted::Visits(parts) => {
                        in_company = true;
                        groups.extend(parts);
                    }
                    // Others are stored, or it was alone and waited long enough: this visit is what is locked.
                    Parted::One(visit, _) if any_stored || alone + 1 == ALONE_TRIES => {
                        tracing::warn!(%error, site.id = %visit.0, session.id = %visit.1, "somebody has locked a visit: its events have to come again");
                        self.locked
                            .add(visit, if any_stored { locked::WHILE_OTHERS_ARE_STORED } else { locked::WHILE_ALONE });
                    }
                    Parted::One(_, group) => {
                        alone += usize::from(!in_company);
                        tokio::time::sleep(conflict_pause()).await;
                        groups.push_back(group);
                    }
                },
                Err(error) => match (error.fault, group.len()) {
                    (Fault::MissingPartition, _) if self.make_months(&group, asked_for, deadline).await => {
                        groups.push_back(group);
                    }
                    (Fault::Refused | Fault::UnknownSite | Fault::MissingPartition, 2..) => {
                        groups.push_back(group.split_off(group.len() / 2));
                        groups.push_back(group);
                    }
                    (fault, _) => {
                        for (place, event) in group {
                            outcomes[place] = self.give_up(event, fault, &error, deadline).await;
                        }
                    }
                },
            }
        }
    }

    /// Writes a group in one transaction, again and again while that may help.
    async fn write_patiently(
        &self,
        group: &Group,
        since: Instant,
        deadline: tokio::time::Instant,
    ) -> Result<Vec<Outcome>, StoreError> {
        let events: Vec<&Event> = group.iter().map(|(_, event)| event).collect();
        let mut pauses = PAUSES.iter();
        let mut conflicts = 0;
        loop {
            // What is begun and dropped at once costs a connection.
            if tokio::time::Instant::now() >= deadline {
                return Err(StoreError::too_slow("write batch"));
            }
            let written = timeout_at(deadline, batch::write(&self.store, &events)).await;
            let error = match written {
                Ok(Ok(written)) => {
                    self.rematch(&written.rematch).await;
                    return Ok(written.outcomes);
                }
                Ok(Err(error)) => error,
                Err(_) => return Err(StoreError::too_slow("write batch")),
            };
            let pause = match error.fault {
                Fault::Conflict if error.is_locked_out() => return Err(error),
                Fault::Conflict if conflicts < CONFLICT_TRIES => {
                    conflicts += 1;
                    conflict_pause()
                }
                Fault::Away => match pauses.next() {
                    Some(pause) if since.elapsed() + *pause < RETRY_WITHIN => *pause,
                    _ => return Err(error),
                },
                _ => return Err(error),
            };
            metrics::counter!(telemetry::BATCH_RETRIES_TOTAL, "fault" => format!("{:?}", error.fault)).increment(1);
            tracing::warn!(%error, events = group.len(), "a batch is tried again");
            if tokio::time::Instant::now() + pause >= deadline {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Matches again the calls that the batch has touched. They are noted, so what fails here is done soon after.
    async fn rematch(&self, sites: &[SiteId]) {
        let began = Instant::now();
        let (until, deadline) = (began + REMATCH_FOR, tokio::time::Instant::from_std(began + REMATCH_WITHIN));
        for site in sites.iter().take_while(|_| Instant::now() < until) {
            match timeout_at(deadline, calls::settle(&self.store, *site, Some(until))).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, site.id = %site, "calls are matched again later"),
                Err(_) => tracing::warn!(site.id = %site, "calls are matched again later: it takes too long"),
            }
        }
    }

    /// Makes the months that the group's events may need, each once a batch: whether there is a reason to write the group again.
    async fn make_months(
        &self,
        group: &Group,
        asked_for: &mut BTreeSet<Month>,
        deadline: tokio::time::Instant,
    ) -> bool {
        let now = Utc::now();
        let needed = group.iter().map(|(_, event)| Month::for_new_session(event.month_hint, event.received_at));
        let needed: BTreeSet<Month> =
            needed.filter(|month| keeper::may_make(*month, now) && asked_for.insert(*month)).collect();
        let mut made_any = false;
        for month in needed {
            made_any |= self.make_month(month, deadline).await;
        }
        made_any
    }

    async fn make_month(&self, month: Month, deadline: tokio::time::Instant) -> bool {
        let mut tries = 1;
        loop {
            let made = timeout_at(deadline, self.store.ensure_month(month)).await;
            match made.unwrap_or_else(|_| Err(StoreError::too_slow("make month"))) {
                Ok(made) => {
                    if !made.is_empty() {
                        tracing::info!(partitions = ?made, "made partitions for events that came in");
                        metrics::counter!(telemetry::PARTITIONS_MADE_TOTAL).increment(made.len() as u64);
                    }
                    return true;
                }
                Err(error) if error.fault == Fault::Conflict && tries < MAKE_TRIES => tries += 1,
                Err(error) => {
                    tracing::warn!(%error, %month, "cannot make the month that an event needs");
                    return false;
                }
            }
        }
    }

    async fn give_up(&self, event: Event, fault: Fault, error: &StoreError, deadline: tokio::time::Instant) -> Outcome {
        let reason = match fault {
            Fault::Away | Fault::Conflict => {
                self.store.could_not_write(error);
                return Outcome::Unavailable(Unavailable::Database);
            }
            Fault::MissingPartition => {
                let month = Month::for_new_session(event.month_hint, event.received_at);
                self.keeper.want(month);
                // An odd month of somebody's history is no trouble of everybody's.
                if keeper::kept(Utc::now()).any(|kept| kept == month) {
                    self.store.could_not_write(error);
                }
                return Outcome::Unavailable(Unavailable::Partition);
            }
            Fault::UnknownSite => DeathReason::UnknownSite,
            Fault::Refused => DeathReason::RefusedByDatabase,
        };
        let payload = match Job::of(&event).to_json() {
            Ok(payload) => payload,
            Err(error) => {
                // A letter without its event would be a loss; the sender still has it.
                tracing::error!(%error, event.id = %event.id, "an event cannot be written into a dead letter");
                return Outcome::Unavailable(Unavailable::Database);
            }
        };
        let letter = DeadLetter {
            id: DeadLetterId::derived(format!("{} {}", event.site_id, event.id).as_bytes()),
            site_id: Some(event.site_id),
            event_id: Some(event.id),
            source: "pipeline",
            reason,
            detail: error.to_string(),
            payload,
            received_at: event.arrived_at(),
        };
        let buried = timeout_at(deadline + BURY_WITHIN, self.undertaker.keep(&letter)).await;
        match buried.unwrap_or_else(|_| Err(StoreError::too_slow("bury"))) {
            Ok(()) => Outcome::Dead(reason),
            Err(error) => {
                tracing::error!(%error, "cannot keep a dead letter");
                Outcome::Unavailable(Unavailable::Database)
            }
        }
    }
}

fn conflict_pause() -> Duration {
    Duration::from_millis(rand::random_range(1..=10))
}

/// A group by its visits.
enum Parted {
    Visits(Vec<Group>),
    One(Visit, Group),
}

fn visit(event: &Event) -> Visit {
    (event.site_id, event.session_id)
}

fn part(group: Group) -> Parted {
    let mut by_visit: BTreeMap<Visit, Group> = BTreeMap::new();
    for (place, event) in group {
        by_visit.entry(visit(&event)).or_default().push((place, event));
    }
    if by_visit.len() < 2
        && let Some(one) = by_visit.pop_first()
    {
        return Parted::One(one.0, one.1);
    }
    let visits: Vec<Group> = by_visit.into_values().collect();
    let size = visits.len().div_ceil(PARTS);
    let mut parts: Vec<Group> = Vec::with_capacity(PARTS);
    for (at, visit) in visits.into_iter().enumerate() {
        match parts.last_mut() {
            Some(part) if at % size != 0 => part.extend(visit),
            _ => parts.push(visit),
        }
    }
    Parted::Visits(parts)
}
