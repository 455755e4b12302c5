//! Events that nobody will be handed any more, told by what the stream has and what its consumer knows.
//!
//! A NATS that was killed may remember that an event was acknowledged and forget that it left the stream; or wait for the acknowledgement of an
//! event that it does not have any more, and then not move on. Three signs say so, from the quickest to the surest: the oldest event counts as
//! acknowledged; nothing moves and the consumer knows of fewer events than there are; the oldest event stays the oldest for a long time,
//! whatever the consumer believes. Handing out again changes nothing that is stored, so a wrong alarm costs work and nothing else;
//! each one that did not help makes the next one later.

use std::time::{Duration, Instant};

/// However slow the database is, an event is settled or given back within this time.
const PATIENCE: Duration = Duration::from_secs(30);
/// So often for the same event without that patience. A consumer that begins anew may take over what the last one wrote down.
const AT_ONCE: u32 = 3;
/// The patience is doubled this often at most: a quarter of an hour.
const DOUBLINGS: u32 = 5;

/// The stream and its consumer at one look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sight {
    /// Events in the stream.
    pub events: u64,
    /// The numbers that the first and the last of them have in it.
    pub oldest: u64,
    pub newest: u64,
    /// Events that no worker has taken yet.
    pub waiting: u64,
    /// Events that a worker has taken and not acknowledged yet.
    pub under_way: u64,
    /// All up to this number count as acknowledged.
    pub acknowledged: u64,
    /// Deliveries so far.
    pub deliveries: u64,
    /// When the consumer was made, in nanoseconds of NATS's clock: which consumer it is.
    pub made: i128,
}

impl Sight {
    fn oldest_is_acknowledged(&self) -> bool {
        self.oldest <= self.acknowledged
    }

    fn has_more_than_is_known(&self) -> bool {
        self.events > self.waiting + self.under_way
    }
}

/// What was seen before.
#[derive(Debug, Default)]
pub(super) struct Watch(Option<Seen>);

#[derive(Debug)]
struct Seen {
    last: Sight,
    /// When this event was first the oldest with this consumer.
    since: Instant,
    /// How often a new consumer has begun with it, whoever made that.
    begun_anew: u32,
}

impl Watch {
    /// Whether the events are to be handed out again. One look may fall between an acknowledgement and what it does, so two have to agree.
    pub fn sees(&mut self, sight: Sight, now: Instant) -> bool {
        let before = self.0.take().filter(|seen| sight.events > 0 && seen.last.oldest == sight.oldest);
        let Some(mut seen) = before else {
            self.0 = (sight.events > 0).then_some(Seen { last: sight, since: now, begun_anew: 0 });
            return false;
        };
        let last = std::mem::replace(&mut seen.last, sight);
        if last.made != sight.made {
            (seen.since, seen.begun_anew) = (now, seen.begun_anew + 1);
        }
        let acknowledged = last.oldest_is_acknowledged() && sight.oldest_is_acknowledged();
        let unknown = last == sight && sight.has_more_than_is_known();
        let patience = PATIENCE * 2u32.pow(seen.begun_anew.min(DOUBLINGS));
        let stays = now.duration_since(seen.since) >= patience;
        let stranded = last.made == sight.made && (stays || seen.begun_anew < AT_ONCE && (acknowledged || unknown));
        self.0 = Some(seen);
        stranded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEALTHY: Sight =
        Sight { events: 5, oldest: 10, newest: 14, waiting: 2, under_way: 3, acknowledged: 9, deliveries: 12, made: 1 };

    /// What is said of these looks, a second apart.
    fn said(watch: &mut Watch, from: Instant, looks: impl IntoIterator<Item = Sight>) -> Vec<bool> {
        let second = |n: usize| from + Duration::from_secs(n as u64);
        looks.into_iter().enumerate().map(|(n, sight)| watch.sees(sight, second(n))).collect()
    }

    #[test]
    fn an_event_that_counts_as_acknowledged_or_is_unknown_is_stranded_at_the_second_look() {
        let acknowledged = Sight { acknowledged: 10, ..HEALTHY };
        let busy = |n| Sight { deliveries: n, newest: n, ..acknowledged };
        let unknown = Sight { under_way: 2, ..HEALTHY };
        let now = Instant::now();
        assert_eq!(said(&mut Watch::default(), now, [acknowledged; 2]), [false, true]);
        assert_eq!(said(&mut Watch::default(), now, [busy(20), busy(30)]), [false, true], "under load, too");
        assert_eq!(said(&mut Watch::default(), now, [unknown; 2]), [false, true]);
        let moving = [unknown, Sight { deliveries: 13, ..unknown }, Sight { newest: 15, ..unknown }];
        assert_eq!(said(&mut Watch::default(), now, moving), [false; 3], "two answers of NATS are not of one moment");
        assert_eq!(said(&mut Watch::default(), now, [HEALTHY; 20]), [false; 20]);
        let gone = Sight { oldest: 11, acknowledged: 10, ..HEALTHY };
        assert_eq!(said(&mut Watch::default(), now, [acknowledged, gone, acknowledged]), [false; 3]);
        let empty = Sight { events: 0, oldest: 15, acknowledged: 15, waiting: 0, under_way: 0, ..HEALTHY };
        assert_eq!(said(&mut Watch::default(), now, [empty; 3]), [false; 3]);
    }

    #[test]
    fn an_oldest_event_that_stays_is_handed_out_again_whatever_the_consumer_believes() {
        let busy = |n: u64| Sight { deliveries: n, newest: n, events: n + 1, waiting: n, ..HEALTHY };
        let alarms =
            |looks: &[bool]| looks.iter().enumerate().filter(|(_, said)| **said).map(|(n, _)| n).collect::<Vec<_>>();
        let said_of_all = said(&mut Watch::default(), Instant::now(), (0..32).map(busy));
        assert_eq!(alarms(&said_of_all), [30, 31]);
        let moving = (0..200).map(|n| Sight { oldest: 10 + n / 20, ..busy(n) });
        assert_eq!(alarms(&said(&mut Watch::default(), Instant::now(), moving)), [0usize; 0]);
        // What did not help is tried again later and later.
        let anew = (0..250).map(|n| Sight { made: [1, 2, 3][usize::from(n >= 31) + usize::from(n >= 92)], ..busy(n) });
        assert_eq!(alarms(&said(&mut Watch::default(), Instant::now(), anew)).first_chunk(), Some(&[30, 91, 212]));
    }

    #[test]
    fn whoever_was_quicker_is_given_time_and_nobody_begins_anew_for_ever() {
        let unknown = |made| Sight { under_way: 0, made, ..HEALTHY };
        let looks = [1, 1, 2, 2, 3, 3, 4, 4, 4].map(unknown);
        let told = said(&mut Watch::default(), Instant::now(), looks);
        assert_eq!(told, [false, true, false, true, false, true, false, false, false]);
    }
}
