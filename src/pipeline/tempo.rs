//! When the next batch is due, and how many events it may have.
//!
//! What waits while nothing is being written is written in a round: by two batches beside each other, each with its share of the sites, since one
//! leaves a processor idle. The next round begins when as many events wait as were answered meanwhile, and no later than a moment after: who was
//! answered comes back at once, mostly, and a batch costs the database as much as a dozen events. Whoever comes while nothing was
//! answered waits for nothing.
//!
//! When one of a round is settled, what waits by then need not wait for the other: a batch beside one begins when it is worthwhile, beside two when it
//! is half full, beside more when it is full, and each when it has gathered for a while. So nobody waits for somebody else's locks, and a database
//! that is far away has enough to do. Batches that come near the end of the patience become smaller.

use std::time::{Duration, Instant};

use super::PipelineConfig;
use crate::fair_queue::Load;

/// The batches of a round ...
const ABREAST: usize = 2;
/// ... where more waits than fits into one, and the most beside each other that do not have to be full. Two leave the machine idle while one of
/// them waits for the disk; with more waiting there are large ones for a third.
const MOST_ABREAST: usize = 3;
/// Fewer events are not shared: two small batches cost more than what they gain by being beside each other.
const WORTH_SHARING: usize = 16;
/// So many events are a round, however many were answered, and a batch beside one other.
const WORTHWHILE: usize = 64;
/// So long a round waits for each event that was answered: somewhat more than a server of two processors needs to answer one and to take the next.
const RETURN: Duration = Duration::from_micros(100);
/// So long a batch gathers beside others, unless it has enough before. Half as many batches of twice the size cost the database far less.
pub(super) const GATHERING: Duration = Duration::from_millis(20);
/// However slow the database is, a batch has room for so many events.
const SMALLEST_BATCH: usize = 16;

/// When the next batch is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    Now,
    At(Instant),
    /// Nothing waits that may be written.
    Never,
}

/// What is told of a batch that was written.
pub(super) struct Written {
    pub events: usize,
    pub bytes: usize,
    pub took: Duration,
    /// More was waiting than it could hold.
    pub full: bool,
}

#[derive(Debug)]
pub(super) struct Tempo {
    /// Since when a batch gathers; none while there is nothing that may be written.
    gathering: Option<Instant>,
    /// Batches that were taken and are not settled.
    writing: usize,
    /// Batches of this round that are still to be taken.
    following: usize,
    /// Events that were answered since the last batch was taken, and when the last of them were.
    answered: usize,
    answered_at: Instant,
    /// Most events of a batch, as things are: one that takes longer than the patience is written for nothing, and all after it.
    batch: usize,
    config: PipelineConfig,
}

impl Tempo {
    pub fn new(config: PipelineConfig) -> Self {
        Self {
            gathering: None,
            writing: 0,
            following: 0,
            answered: 0,
            answered_at: Instant::now(),
            batch: config.batch.max(1),
            config,
        }
    }

    /// Most events of a batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// About how many events the next batch is to have, of those that may be written and of `all` that wait: its share with those that are to be
    /// beside it. Beside a round it leaves those that wait for others their sites as well, so that none ends with most of them.
    pub fn share(&mut self, ready: Load, all: Load) -> usize {
        let fills_one = ready.items >= self.batch || ready.weight >= self.config.batch_bytes;
        let abreast = match ready.items {
            _ if fills_one => MOST_ABREAST,
            ..WORTH_SHARING => 1,
            _ => ABREAST,
        };
        if self.writing == 0 {
            self.following = abreast;
        }
        let share = match self.following {
            0 => all.items.div_ceil(abreast),
            following => ready.items.div_ceil(following),
        };
        self.following = self.following.saturating_sub(1);
        share
    }

    /// Whether a batch gathers.
    pub fn gathers(&self) -> bool {
        self.gathering.is_some()
    }

    /// So many events may be written now. The first of them begin a batch.
    pub fn gather(&mut self, events: usize) {
        if self.gathering.is_none() {
            self.gather_anew(events);
        }
    }

    /// Some have left, and so many are left: they begin the next batch.
    pub fn gather_anew(&mut self, events: usize) {
        if events == 0 {
            self.following = 0;
        }
        self.gathering = (events > 0).then(Instant::now);
    }

    /// A batch was taken, and so many events may still be written.
    pub fn taken(&mut self, left: usize) {
        self.writing += 1;
        self.answered = 0;
        self.gather_anew(left);
    }

    /// A batch of so many events is settled: how many were being written, this one among them.
    pub fn settled(&mut self, events: usize) -> usize {
        self.answered += events;
        self.answered_at = Instant::now();
        self.following = 0;
        self.writing -= 1;
        self.writing + 1
    }

    /// When the next batch is to be taken, of what may be written `now`.
    pub fn due(&self, now: Instant, ready: Load, closed: bool) -> Due {
        let Some(since) = self.gathering else { return Due::Never };
        let full = Load { items: self.batch, weight: self.config.batch_bytes };
        let half = Load { items: full.items.div_ceil(2), weight: full.weight / 2 };
        let (enough, until) = match self.writing {
            0 => {
                let back = self.answered.min(WORTHWHILE);
                let moment = RETURN * u32::try_from(back).unwrap_or(u32::MAX);
                (Load { items: back.min(full.items), ..full }, self.answered_at + moment)
            }
            _ if self.following > 0 => return Due::Now,
            1..ABREAST => (Load { items: WORTHWHILE.min(half.items), ..half }, since + GATHERING),
            ABREAST..MOST_ABREAST => (half, since + GATHERING),
            _ => (full, since + GATHERING),
        };
        let gathered = ready.items >= enough.items || ready.weight >= enough.weight;
        if closed || gathered || until <= now { Due::Now } else { Due::At(until) }
    }

    /// Batches that come near the end of the patience are halved, and grow again when there is time enough. What takes as long for few events as
    /// for many is left in between: smaller batches would only make it worse.
    pub fn fit(&mut self, written: &Written) {
        let most = self.config.batch.max(1);
        // What takes long with so few events takes long for another reason than their number.
        if written.took > self.config.patience / 2 && written.events > SMALLEST_BATCH {
            self.batch = self.batch.min((written.events / 2).max(SMALLEST_BATCH.min(most)));
        } else if written.took < self.config.patience / 4 && written.events >= self.batch {
            self.batch = (self.batch * 2).min(most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OF_ALL: Load = Load { items: 40, weight: 40 };

    /// What waits now, and a while after.
    fn due(tempo: &Tempo, items: usize) -> (bool, bool) {
        let (ready, at_once) = (Load { items, weight: items }, tempo.answered_at);
        (tempo.due(at_once, ready, false) == Due::Now, tempo.due(at_once + GATHERING * 2, ready, false) == Due::Now)
    }

    #[test]
    fn a_round_waits_for_those_that_were_answered_and_for_nobody_else() {
        let mut tempo = Tempo::new(PipelineConfig::default());
        tempo.gather(1);
        assert_eq!(due(&tempo, 1), (true, true), "nobody was answered");
        let shares = [tempo.share(OF_ALL, OF_ALL), {
            tempo.taken(20);
            tempo.share(Load { items: 20, ..OF_ALL }, OF_ALL)
        }];
        assert_eq!(shares, [20, 20], "half each");
        tempo.taken(0);
        tempo.gather(10);
        assert_eq!(due(&tempo, 10), (false, true), "beside a round a batch gathers");
        tempo.settled(20);
        assert_eq!(due(&tempo, 10), (false, true), "one is being written");
        tempo.settled(20);
        assert_eq!([due(&tempo, 39), due(&tempo, 40)], [(false, true), (true, true)], "as many as were answered");
        tempo.taken(0);
        tempo.settled(300);
        tempo.gather(1);
        assert_eq!([due(&tempo, 63), due(&tempo, 64)], [(false, true), (true, true)], "enough for a round");
        assert_eq!(tempo.due(tempo.answered_at, Load { items: 1, weight: 1 }, true), Due::Now, "nobody else comes");
    }

    #[test]
    fn few_events_are_one_batch_and_more_than_one_can_hold_are_three() {
        let tempo = || Tempo::new(PipelineConfig { batch: 100, ..PipelineConfig::default() });
        let share = |items: usize| tempo().share(Load { items, weight: items }, Load { items, weight: items });
        assert_eq!([15, 16, 99, 100, 900].map(share), [15, 8, 50, 34, 300]);
        let mut beside = tempo();
        beside.taken(0);
        let all = Load { items: 60, weight: 60 };
        assert_eq!(beside.share(OF_ALL, all), 30, "and what waits for the other is for its sites");
        assert_eq!(beside.share(Load { items: 9, weight: 9 }, all), 60, "few are not shared");
    }
}
