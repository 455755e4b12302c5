use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const MIB: usize = 1 << 20;
const EVENT: usize = 3 << 10;

/// As much as it gets, an event at a time.
fn fill(room: &mut Room<u32>, site: u32) -> usize {
    let mut got = 0;
    while room.admits(site, EVENT) {
        room.enter(site, EVENT);
        got += EVENT;
    }
    got
}

#[test]
fn alone_a_site_gets_most_of_the_room_and_the_next_one_still_finds_space() {
    let mut room = Room::of(32 * MIB);
    let alone = fill(&mut room, 1);
    assert!((24 * MIB - EVENT..=24 * MIB).contains(&alone), "{alone}");
    // A batch of 512 KiB on the wire, several times that in memory.
    assert!(room.admits(2, 4 * MIB));
    let second = fill(&mut room, 2);
    assert!(second > 5 * MIB && room.admits(3, EVENT), "{second}");
}

#[test]
fn sites_that_take_all_they_can_end_with_the_same() {
    for sites in [2_u32, 10, 50] {
        let mut room = Room::of(8 * MIB);
        fill(&mut room, 0);
        // Each has its turn with the writers, and whenever an event is written some of those who want to come in have theirs.
        for round in 0..5000 * sites {
            if room.held.contains_key(&(round % sites)) {
                room.leave(round % sites, EVENT);
            }
            for turn in 0..3 {
                let site = (round * 7 + turn) % sites;
                if room.admits(site, EVENT) {
                    room.enter(site, EVENT);
                }
            }
        }
        let held: Vec<usize> = (0..sites).map(|site| room.held.get(&site).copied().unwrap_or(0)).collect();
        let (least, most) = (held.iter().min().expect("some"), held.iter().max().expect("some"));
        assert!(*least * 2 >= *most, "{sites} sites: {least} and {most}");
        assert!(held.iter().sum::<usize>() > 5 * MIB, "{sites} sites leave the room empty: {held:?}");
        assert!(room.admits(9999, EVENT), "{sites} sites leave nothing for another");
    }
}

#[test]
fn what_is_larger_than_the_room_gets_in_when_there_is_nobody_else() {
    let mut room = Room::of(MIB);
    let counted = room.counted(100 * MIB);
    assert!(room.admits(1, counted));
    room.enter(1, counted);
    assert!(!room.admits(1, counted) && !room.admits(2, counted) && room.admits(2, EVENT));
}

#[test]
fn slow_writers_make_a_small_window_and_it_opens_again() {
    let mut room = Room::of(32 * MIB);
    // 256 events in two seconds by each of four writers: four such batches fit into two seconds.
    for _ in 0..10 {
        room.wrote(256 * EVENT, Duration::from_secs(2), 4, true);
    }
    let got = fill(&mut room, 1);
    assert!((MIB / 2..=3 * MIB / 2).contains(&got), "{got}");
    assert!(room.is_pressed() && !room.is_full());
    // Those who come are not the ones who made it slow.
    assert!(fill(&mut room, 2) >= MIB / 4);
    // Batches that were not full say nothing bad, and full ones that are quick open the window.
    let mut quick = Room::of(32 * MIB);
    quick.wrote(EVENT, Duration::from_secs(1), 4, false);
    assert!(fill(&mut quick, 1) > 20 * MIB);
    for _ in 0..20 {
        room.wrote(256 * EVENT, Duration::from_millis(20), 4, true);
    }
    assert!(fill(&mut room, 1) > 20 * MIB);
}

proptest! {
    #[test]
    fn nothing_is_counted_twice_and_the_bound_holds(
        steps in proptest::collection::vec((0_u32..8, 1_usize..200_000, any::<bool>(), 0_u64..2000), 1..400),
    ) {
        let mut room = Room::of(MIB);
        let mut inside: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (site, weight, comes, millis) in steps {
            if comes {
                let counted = room.counted(weight);
                if room.admits(site, counted) {
                    room.enter(site, counted);
                    inside.entry(site).or_default().push(counted);
                }
            } else if let Some(counted) = inside.get_mut(&site).and_then(Vec::pop) {
                room.leave(site, counted);
                room.wrote(counted, Duration::from_millis(millis), 4, weight % 2 == 0);
            }
            inside.retain(|_, held| !held.is_empty());
            let sum = inside.values().flatten().sum::<usize>();
            prop_assert_eq!(room.used, sum);
            prop_assert!(sum <= MIB);
            prop_assert_eq!(room.held.len(), inside.len(), "a site without anything inside is forgotten");
        }
    }
}
