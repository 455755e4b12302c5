use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const QUANTUM: usize = 100;

fn queue() -> FairQueue<u8, (u8, u32)> {
    FairQueue::new(QUANTUM)
}

fn drained(queue: &mut FairQueue<u8, (u8, u32)>) -> Vec<(u8, u32)> {
    std::iter::from_fn(|| queue.pop().map(|(_, item)| item)).collect()
}

#[test]
fn one_lane_is_a_plain_queue() {
    let mut queue = queue();
    (0..1000).for_each(|n| queue.push(1, 70, (1, n)));
    assert_eq!((queue.ready().weight, queue.next_weight()), (70_000, Some(70)));
    assert_eq!(drained(&mut queue), (0..1000).map(|n| (1, n)).collect::<Vec<_>>());
    assert!(queue.is_empty() && queue.pop().is_none() && queue.next_weight().is_none());
}

#[test]
fn whoever_comes_to_a_flood_is_next_and_then_has_half() {
    let mut queue = queue();
    (0..1000).for_each(|n| queue.push(1, 10, (1, n)));
    (0..25).for_each(|_| assert!(queue.pop().is_some()));
    (0..100).for_each(|n| queue.push(2, 10, (2, n)));
    let next: Vec<u8> = (0..120).filter_map(|_| queue.pop().map(|(lane, _)| lane)).collect();
    assert_eq!(next[..10], [2; 10], "a quantum at once");
    let shares = next[10..].iter().filter(|lane| **lane == 2).count();
    assert!((50..=60).contains(&shares), "{shares} of 110");
}

#[test]
fn a_lane_is_gone_when_it_is_empty() {
    let mut queue = queue();
    queue.push(0, 1, (0, 0));
    for round in 0..10_000_u32 {
        let lane = u8::try_from(round % 200).expect("below 256");
        queue.push(lane, 1, (lane, round));
        queue.pop();
    }
    assert!(queue.lanes.len() <= 2, "{}", queue.lanes.len());
    drained(&mut queue);
    assert_eq!((queue.lanes.len(), queue.fresh.len(), queue.ring.len()), (0, 0, 0));
}

#[derive(Debug, Clone)]
enum Step {
    Push { lane: u8, weight: usize },
    Pop,
    Remove { modulus: u32 },
    Hold { lane: u8 },
    Release { lane: u8 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0_u8..6, prop_oneof![1_usize..40, 90_usize..110, Just(700_usize)])
            .prop_map(|(lane, weight)| Step::Push { lane, weight }),
        5 => Just(Step::Pop),
        1 => (2_u32..9).prop_map(|modulus| Step::Remove { modulus }),
        1 => (0_u8..6).prop_map(|lane| Step::Hold { lane }),
        2 => (0_u8..6).prop_map(|lane| Step::Release { lane }),
    ];
    proptest::collection::vec(step, 0..400)
}

proptest! {
    #[test]
    fn everything_comes_out_once_and_in_the_order_of_its_lane(steps in steps()) {
        let (mut queue, mut next) = (queue(), 0);
        let (mut inside, mut last) = (BTreeMap::new(), BTreeMap::new());
        let mut held = BTreeSet::new();
        let mut came = |item: (u8, u32), inside: &mut BTreeMap<u32, (u8, usize)>| {
            prop_assert!(inside.remove(&item.1).is_some(), "{item:?} came twice, or from nowhere");
            let before = last.insert(item.0, item.1);
            prop_assert!(before < Some(item.1), "{item:?} after {before:?}");
            Ok(())
        };
        for step in steps {
            match step {
                Step::Push { lane, weight } => {
                    queue.push(lane, weight, (lane, next));
                    inside.insert(next, (lane, weight));
                    next += 1;
                }
                Step::Pop => {
                    let (lane, weight, popped) = (queue.next_lane(), queue.next_weight(), queue.pop());
                    prop_assert_eq!(popped.is_some(), inside.values().any(|(lane, _)| !held.contains(lane)));
                    if let Some((key, item)) = popped {
                        prop_assert!(!held.contains(&key), "lane {} is held", key);
                        prop_assert_eq!((lane, key), (Some(item.0), item.0));
                        prop_assert_eq!(weight, inside.get(&item.1).map(|(_, weight)| *weight));
                        came(item, &mut inside)?;
                    }
                }
                Step::Hold { lane } => {
                    queue.hold(lane);
                    held.insert(lane);
                }
                Step::Release { lane } => {
                    queue.release(lane);
                    held.remove(&lane);
                }
                Step::Remove { modulus } => {
                    let removed = queue.remove_where(|(_, n)| n % modulus == 0);
                    let expected: BTreeSet<u32> = inside.keys().copied().filter(|n| n % modulus == 0).collect();
                    prop_assert_eq!(removed.iter().map(|(_, item)| item.1).collect::<BTreeSet<_>>(), expected);
                    inside.retain(|n, _| n % modulus != 0);
                }
            }
            let ready: Vec<(u8, usize)> = inside.values().copied().filter(|(lane, _)| !held.contains(lane)).collect();
            let weight = ready.iter().map(|(_, weight)| weight).sum::<usize>();
            prop_assert_eq!(queue.ready(), Load { items: ready.len(), weight });
            for lane in 0..6 {
                let items = inside.values().filter(|(of, _)| *of == lane).count();
                prop_assert_eq!(queue.waiting(lane).items, items, "held or not");
            }
            prop_assert_eq!(queue.is_empty(), inside.is_empty());
            let listed = queue.lanes.values().filter(|lane| lane.listed).count();
            prop_assert_eq!(queue.fresh.len() + queue.ring.len(), listed, "a lane is in one list, once");
            prop_assert!(queue.lanes.iter().all(|(key, lane)| lane.listed || held.contains(key)), "or it is held");
        }
        (0..6).for_each(|lane| queue.release(lane));
        for item in drained(&mut queue) {
            came(item, &mut inside)?;
        }
        prop_assert!(inside.is_empty(), "lost: {inside:?}");
        prop_assert!(queue.lanes.is_empty());
    }

    /// Whatever the others bring, as much and as often as they like, under keys that nobody has seen before and under those of a moment ago:
    /// each that comes to stand first in a lane comes out before the others had more than they were promised.
    #[test]
    fn nobody_waits_for_more_than_two_turns_of_each_other_lane_and_two_more(
        before in proptest::collection::vec((0_u32..6, 1_usize..=QUANTUM), 0..100),
        pops in 0_usize..80,
        flood in proptest::collection::vec((prop_oneof![0_u32..6, Just(6), 7_u32..400], 1_usize..=QUANTUM), 1000),
        at_once in 1_usize..12,
    ) {
        let mut queue = FairQueue::<u32, ()>::new(QUANTUM);
        before.into_iter().for_each(|(lane, weight)| queue.push(lane, weight, ()));
        (0..pops).for_each(|_| _ = queue.pop());
        // One that has only just come, if there is nothing there.
        queue.push(0, 50, ());
        let most = |queue: &FairQueue<u32, ()>| (2 * (queue.lanes.len() - 1) + 2) * 2 * QUANTUM;
        let (mut served, mut allowed, mut next) = (0, most(&queue), 1000);
        for some in flood.chunks(at_once) {
            for (lane, weight) in some {
                // Many are new, and a few of these come again soon.
                let lane = if *lane < 7 { *lane } else { next + lane % 4 };
                next += u32::from(lane >= 1000);
                queue.push(lane, *weight, ());
            }
            let weight = queue.next_weight().unwrap_or_default();
            match queue.pop() {
                Some((0, ())) if queue.lanes.get(&0).is_some_and(|lane| !lane.waiting.is_empty()) => {
                    (served, allowed) = (0, most(&queue));
                }
                Some((0, ())) => break,
                Some(_) => served += weight,
                None => prop_assert!(false, "lost"),
            }
            prop_assert!(served <= allowed, "the others had {served} in the meantime, not {allowed}");
        }
    }

    /// However heavy their items are, and those of the one who was there before.
    #[test]
    fn newcomers_that_never_end_get_half_at_most(
        heavy in 1_usize..300,
        newcomers in proptest::collection::vec(1_usize..300, 500),
    ) {
        let (mut queue, mut served) = (FairQueue::<usize, ()>::new(QUANTUM), [0_usize; 2]);
        (0..newcomers.len() + 2 * QUANTUM).for_each(|_| queue.push(0, heavy, ()));
        (0..=QUANTUM).for_each(|_| _ = queue.pop());
        for (key, weight) in newcomers.into_iter().enumerate() {
            queue.push(key + 1, weight, ());
            let weight = queue.next_weight().unwrap_or_default();
            let Some((key, ())) = queue.pop() else { break };
            served[usize::from(key > 0)] += weight;
        }
        prop_assert!(served[1] <= served[0] + 2 * (QUANTUM + 300), "{served:?}");
    }

    /// Those who always have something waiting get the same, however large or small their items are.
    #[test]
    fn shares_are_equal_by_weight(small in 1_usize..30, large in 30_usize..900) {
        let mut queue = queue();
        for n in 0..60_000 / small {
            queue.push(1, small, (1, u32::try_from(n).unwrap_or(0)));
        }
        for n in 0..60_000 / large {
            queue.push(2, large, (2, u32::try_from(n).unwrap_or(0)));
        }
        let mut served = [0_usize; 3];
        while served[1] + served[2] < 40_000 {
            let weight = queue.next_weight().unwrap_or_default();
            let Some((lane, _)) = queue.pop() else { break };
            served[usize::from(lane)] += weight;
        }
        prop_assert!(served[1].abs_diff(served[2]) <= 2 * (QUANTUM + large), "{served:?}");
    }
}

#[test]
fn a_lane_that_is_held_keeps_its_place_and_is_served_after_the_others() {
    let mut queue = queue();
    queue.push(1, 10, (1, 0));
    queue.hold(1);
    queue.push(1, 10, (1, 1));
    queue.push(2, 10, (2, 0));
    assert_eq!((queue.ready().items, queue.waiting(1).items), (1, 2));
    assert_eq!(queue.pop(), Some((2, (2, 0))));
    assert_eq!((queue.pop(), queue.is_empty()), (None, false));
    queue.release(1);
    queue.push(3, 10, (3, 0));
    assert_eq!(drained(&mut queue), [(3, 0), (1, 0), (1, 1)], "who has just come first, then in its own order");
}

#[test]
fn a_lane_that_was_put_off_is_the_next_one_whoever_has_just_begun() {
    let mut queue = queue();
    for lane in 1..=4 {
        queue.push(lane, 10, (lane, 0));
    }
    for lane in 1..=3 {
        assert_eq!(queue.next_lane(), Some(lane));
        queue.hold(lane);
    }
    assert_eq!(queue.pop(), Some((4, (4, 0))));
    queue.push(5, 10, (5, 0));
    [3, 2].into_iter().for_each(|lane| queue.release_next(lane));
    queue.release(1);
    let order: Vec<u8> = drained(&mut queue).into_iter().map(|(lane, _)| lane).collect();
    assert_eq!(order[0], 2, "{order:?}");
    assert_eq!(order.len(), 4, "{order:?}");
    assert!(order.iter().position(|lane| *lane == 3) < order.iter().position(|lane| *lane == 1), "{order:?}");
}
