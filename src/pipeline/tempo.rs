//! When the next batch is due, and how many events it may have.
//!
//! The first begins at once. One beside it begins as soon as it is worthwhile, and no later than a moment after: a batch costs the database as
//! much as a dozen events, so what comes in one by one is better written together. Two beside each other leave the machine idle while one of
//! them waits for the disk; where more than they can hold is waiting, a third begins as soon as it is half full. Each further one gathers a
//! little longer, or until it is full. Batches that come near the end of the patience become smaller.

use std::time::{Duration, Instant};

use super::PipelineConfig;
use crate::fair_queue::Load;

/// Up to so many batches are written beside each other of what comes in one by one, each with its share of the sites that have something ...
const ABREAST: usize = 2;
/// ... and so many where there is more.
const MOST_ABREAST: usize = 3;
/// So many events are worth a batch beside another at once. With fewer it is better to wait for the moment: who heard of the batch before comes
/// back within it, and half as many batches cost the database a sixth less for an event.
const WORTHWHILE: usize = 64;
/// So long fewer of them wait for others, unless nothing is being written.
const MOMENT: Duration = Duration::from_millis(3);
/// So long a batch gathers beyond those abreast, unless it is full before. Half as many batches of twice the size cost the database far
/// less; where it is far away, its writers still overlap.
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
    /// Most events of a batch, as things are: one that takes longer than the patience is written for nothing, and all after it.
    batch: usize,
    config: PipelineConfig,
}

impl Tempo {
    pub fn new(config: PipelineConfig) -> Self {
        Self { gathering: None, writing: 0, batch: config.batch.max(1), config }
    }

    /// Most events of a batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Among how many batches beside each other the sites are shared of which so much may be written.
    pub fn shares(&self, ready: Load) -> usize {
        let fills_one = ready.items >= self.batch || ready.weight >= self.config.batch_bytes;
        if fills_one { MOST_ABREAST } else { ABREAST }
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
        self.gathering = (events > 0).then(Instant::now);
    }

    /// A batch was taken, and so many events may still be written.
    pub fn taken(&mut self, left: usize) {
        self.writing += 1;
        self.gather_anew(left);
    }

    /// A batch is settled: how many were being written, this one among them.
    pub fn settled(&mut self) -> usize {
        self.writing -= 1;
        self.writing + 1
    }

    /// When the next batch is to be taken, of what may be written.
    pub fn due(&self, ready: Load, closed: bool) -> Due {
        let Some(since) = self.gathering else { return Due::Never };
        let full = Load { items: self.batch, weight: self.config.batch_bytes };
        let (enough, patience) = match self.writing {
            0 => return Due::Now,
            1..ABREAST => (Load { items: WORTHWHILE.min(full.items), ..full }, MOMENT),
            ABREAST..MOST_ABREAST => (Load { items: full.items.div_ceil(2), weight: full.weight / 2 }, GATHERING),
            _ => (full, GATHERING),
        };
        let gathered = ready.items >= enough.items || ready.weight >= enough.weight;
        if closed || gathered || since.elapsed() >= patience { Due::Now } else { Due::At(since + patience) }
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
