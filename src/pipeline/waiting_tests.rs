use chrono::Utc;
use uuid::Uuid;

use super::super::tempo::GATHERING;
use super::*;
use crate::domain::event::{Arrival, Draft, FieldNames};

fn event(site: u128, n: u32) -> Event {
    let draft = Draft {
        id: Some(n.to_string()),
        url: Some("https://shop.example/".to_owned()),
        session: Some("visit".to_owned()),
        label: Some(n.to_string()),
        ..Draft::default()
    };
    let names = FieldNames { url: "u", session: "sid" };
    let site = SiteId::from_uuid(Uuid::from_u128(site));
    Event::accept(site, draft, &Arrival::at(Utc::now()), names).expect("a whole draft")
}

fn room(batch: usize, events: usize) -> Arc<WaitingRoom> {
    let bytes = events * weight(&event(1, 0));
    Arc::new(WaitingRoom::new(PipelineConfig {
        batch,
        room_bytes: bytes,
        patient_room_bytes: bytes,
        ..PipelineConfig::default()
    }))
}

fn said(batch: &Batch) -> Vec<(u128, u32)> {
    let number = |event: &Event| event.label.as_deref().and_then(|label| label.parse().ok()).expect("the test's own");
    batch.events.iter().map(|event| (event.site_id.as_uuid().as_u128(), number(event))).collect()
}

fn busy(batch: Batch) {
    let outcomes = vec![Outcome::Unavailable(Unavailable::Database); batch.answers.len()];
    batch.settle(outcomes);
}

#[tokio::test]
async fn a_request_is_taken_as_a_whole_or_not_at_all_and_its_space_comes_back() {
    let room = room(256, 100);
    let request = |n: u32| (0..50).map(|at| event(1, n + at)).collect::<Vec<_>>();
    let first = room.take(request(0)).expect("there is space");
    assert_eq!(room.take(request(100)).map(|taken| taken.len()), Err(Unavailable::Busy));
    // Of two sites one has no space: neither is taken.
    let mixed = [request(200), (0..5).map(|n| event(2, n)).collect()].concat();
    assert_eq!(room.take(mixed).map(|taken| taken.len()), Err(Unavailable::Busy));
    let quiet = room.take(vec![event(2, 7)]).expect("another site");
    let batch = room.batch().await.expect("it is open");
    let other = room.batch().await.expect("it is open");
    assert_eq!((batch.events.len(), other.events.len()), (50, 1), "a site each");
    assert_eq!(
        room.take(request(300)).map(|taken| taken.len()),
        Err(Unavailable::Busy),
        "what is being written counts"
    );
    [batch, other].into_iter().for_each(busy);
    for answer in first.into_iter().chain(quiet) {
        assert_eq!(answer.await, Ok(Outcome::Unavailable(Unavailable::Database)));
    }
    let again = room.take(request(400)).expect("the space is free again");
    // A writer that broke gives it back as well, and nobody waits for ever.
    drop(room.batch().await);
    assert!(again.into_iter().next().expect("fifty").await.is_err());
    room.take(request(500)).expect("the space is free again");
}

#[tokio::test]
async fn a_quiet_site_is_written_with_a_flood_or_beside_it_and_its_batches_stay_large() {
    let room = room(256, 4000);
    for n in 0..2000 {
        room.take(vec![event(1, n)]).expect("there is space");
    }
    for round in 0..3 {
        room.take(vec![event(2, round)]).expect("there is space");
        let mut abreast = vec![room.batch().await.expect("it is open")];
        let sites: BTreeSet<u128> = said(&abreast[0]).into_iter().map(|(site, _)| site).collect();
        if sites.len() == 1 {
            abreast.push(room.batch().await.expect("one writes"));
        }
        let (quiet, flood): (Vec<_>, Vec<_>) = abreast.iter().flat_map(said).partition(|(site, _)| *site == 2);
        assert_eq!(quiet, [(2, round)], "it came last, and waits for nobody");
        let said: Vec<u32> = flood.into_iter().map(|(_, n)| n).collect();
        assert_eq!(said.len(), 256 - usize::from(abreast.len() == 1), "a full batch, the quiet one in it or beside it");
        assert!(said.is_sorted(), "in the order of their coming: {said:?}");
        assert_eq!(room.pressure(), Pressure::High);
        let wanted = |site: u128, events| Wanted { site: site.to_site(), events, bytes: 0 };
        assert!(room.refuses(&[wanted(1, 2000)]) && !room.refuses(&[wanted(2, 100)]));
        assert!(room.refuses(&[wanted(2, 100), wanted(1, 2000)]), "one of them is enough");
        assert!(room.refuses(&[Wanted { bytes: 64 << 20, ..wanted(2, 1) }]), "what came is kept");
        abreast.into_iter().for_each(busy);
    }
}

#[tokio::test]
async fn who_was_left_for_another_batch_is_in_the_next_one_though_there_is_one_writer_and_the_flood_begins_anew() {
    let room = room(256, 4000);
    for round in 1..=5 {
        for batch in 0.. {
            room.take((0..100).map(|n| event(1, n)).collect()).expect("there is space");
            if batch == 0 {
                room.take(vec![event(2, round)]).expect("there is space");
            }
            let written = room.batch().await.expect("it is open");
            let sites: BTreeSet<u128> = said(&written).into_iter().map(|(site, _)| site).collect();
            busy(written);
            if sites.contains(&2) {
                break;
            }
            assert!(batch < 1, "passed over in {batch} batches");
        }
    }
}

#[tokio::test]
async fn batches_that_take_too_long_become_smaller_and_large_again() {
    let config =
        PipelineConfig { patience: Duration::from_millis(200), room_bytes: 64 << 20, ..PipelineConfig::default() };
    let room = Arc::new(WaitingRoom::new(config));
    room.take((0..4000).map(|n| event(1, n)).collect()).expect("there is space");
    let mut sizes = Vec::new();
    for slow in [true, true, true, true, true, false, false, false, false, false] {
        let batch = room.batch().await.expect("it is open");
        sizes.push(batch.events.len());
        if slow {
            tokio::time::sleep(Duration::from_millis(120)).await;
        }
        busy(batch);
    }
    assert_eq!(sizes[..6], [512, 256, 128, 64, 32, 16]);
    assert_eq!(sizes[6..], [32, 64, 128, 256]);
}

#[tokio::test]
async fn who_waits_for_space_gets_it_in_turn_by_site() {
    let room = room(100, 200);
    let mut flood = tokio::task::JoinSet::new();
    for n in 0..900 {
        let room = room.clone();
        flood.spawn(async move { room.take_patiently(event(1, n)).await.is_ok() });
        tokio::task::yield_now().await;
    }
    let quiet = tokio::spawn({
        let room = room.clone();
        async move { room.take_patiently(event(2, 0)).await.is_ok() }
    });
    tokio::task::yield_now().await;
    let (mut batches, mut order) = (0, Vec::new());
    while order.len() < 901 {
        let batch = room.batch().await.expect("it is open");
        batches += 1;
        let said = said(&batch);
        if said.contains(&(2, 0)) {
            assert!(batches <= 3, "the quiet site was written in batch {batches}");
        }
        order.extend(said);
        busy(batch);
        tokio::task::yield_now().await;
    }
    assert!(quiet.await.expect("no panic"));
    assert!(flood.join_all().await.into_iter().all(|taken| taken));
    order.retain(|(site, _)| *site == 1);
    assert_eq!(order, (0..900).map(|n| (1, n)).collect::<Vec<_>>(), "all, once, in order");
}

#[tokio::test]
async fn who_waits_too_long_for_a_writer_is_told_and_who_is_patient_is_not() {
    let room = room(10, 100);
    let hurried = room.take(vec![event(1, 0), event(1, 1)]).expect("there is space");
    let patient = room.take_patiently(event(1, 2)).await.expect("there is space");
    room.send_away(Duration::from_secs(60));
    tokio::time::sleep(Duration::from_millis(20)).await;
    room.send_away(Duration::from_millis(5));
    for answer in hurried {
        assert_eq!(answer.await, Ok(Outcome::Unavailable(Unavailable::Busy)));
    }
    let batch = room.batch().await.expect("it is open");
    assert_eq!(said(&batch), [(1, 2)]);
    busy(batch);
    patient.await.expect("it was settled");
    assert_eq!(room.inside().room.counted(usize::MAX), 50 * weight(&event(1, 0)));
    assert!(room.inside().room.admits(1_u128.to_site(), 50 * weight(&event(1, 0))), "their space is free");
}

#[tokio::test]
async fn who_waited_for_longer_than_the_patience_leaves_some_of_it() {
    let patience = Duration::from_millis(400);
    let room = Arc::new(WaitingRoom::new(PipelineConfig { patience, ..PipelineConfig::default() }));
    let _patient = room.take_patiently(event(1, 1)).await.expect("there is space");
    tokio::time::sleep(patience * 2).await;
    let batch = room.batch().await.expect("it is open");
    assert!(batch.since.elapsed() < patience, "{:?}", batch.since.elapsed());
    busy(batch);
    let hurried = room.take(vec![event(1, 2)]).expect("there is space");
    tokio::time::sleep(patience / 2).await;
    let batch = room.batch().await.expect("it is open");
    assert!(batch.since.elapsed() >= patience / 2, "from its coming");
    drop((batch, hurried));
}

trait ToSite {
    fn to_site(self) -> SiteId;
}

impl ToSite for u128 {
    fn to_site(self) -> SiteId {
        SiteId::from_uuid(Uuid::from_u128(self))
    }
}

#[tokio::test]
async fn closed_it_takes_nothing_and_gives_out_what_it_took() {
    let room = room(10, 10);
    let taken = room.take(vec![event(1, 0)]).expect("there is space");
    let mut asking = tokio::task::JoinSet::new();
    for n in 0..30 {
        let room = room.clone();
        asking.spawn(async move { room.take_patiently(event(1, n)).await.map(drop) });
        tokio::task::yield_now().await;
    }
    room.close();
    assert_eq!(room.take(vec![event(1, 9)]).map(drop), Err(Unavailable::Stopping));
    assert_eq!(room.take_patiently(event(1, 9)).await.map(drop), Err(Unavailable::Stopping));
    let mut written = 0;
    while let Some(batch) = room.batch().await {
        written += batch.events.len();
        busy(batch);
    }
    assert!(room.batch().await.is_none(), "every writer is told");
    let told = asking.join_all().await;
    let in_time = told.iter().filter(|taken| taken.is_ok()).count();
    assert_eq!((written, told.len()), (1 + in_time, 30));
    assert!(in_time >= 9 && told.contains(&Err(Unavailable::Stopping)), "{told:?}");
    assert!(taken.into_iter().next().expect("one").await.is_ok());
}

#[tokio::test]
async fn batches_beside_each_other_have_sites_of_their_own() {
    let room = room(256, 400);
    let all: Vec<Event> = (0..40).map(|n| event(u128::from(n % 4) + 1, n)).collect();
    room.take(all).expect("there is space");
    let first = room.batch().await.expect("nobody writes");
    let second = room.batch().await.expect("one writes");
    let sites = |batch: &Batch| said(batch).into_iter().map(|(site, _)| site).collect::<BTreeSet<u128>>();
    assert_eq!((sites(&first).len(), sites(&second).len()), (2, 2), "half each");
    assert!(sites(&first).is_disjoint(&sites(&second)));
    assert_eq!((first.events.len(), second.events.len()), (20, 20), "all that came in of them");
    assert!(!first.full && !second.full, "neither tells how fast the writers are at best");

    // What comes in of the first waits for it, though a writer is free and nothing else waits.
    let site = *sites(&first).first().expect("two");
    room.take(vec![event(site, 1000)]).expect("there is space");
    busy(second);
    assert!(tokio::time::timeout(GATHERING * 4, room.batch()).await.is_err(), "its visits are being written");
    busy(first);
    assert_eq!(said(&room.batch().await.expect("it is open")), [(site, 1000)]);
}

#[tokio::test]
async fn a_batch_has_a_bound_of_visits() {
    let room = Arc::new(WaitingRoom::new(PipelineConfig { batch_visits: 3, ..PipelineConfig::default() }));
    let visit = |n: u32| {
        let mut event = event(1, n);
        event.session_id = crate::domain::id::SessionId::from_uuid(Uuid::from_u128(u128::from(n)));
        event
    };
    room.take((0..10).map(|n| visit(n / 2)).collect()).expect("there is space");
    let batch = room.batch().await.expect("it is open");
    assert_eq!(said(&batch).len(), 5, "two events of two visits, and the one that begins the third");
    assert!(batch.full);
}

#[tokio::test]
async fn with_more_than_two_can_hold_a_third_is_written_beside_them() {
    let room = room(8, 400);
    let few = |sites: std::ops::RangeInclusive<u128>, each: u32| -> Vec<Event> {
        sites.flat_map(|site| (0..each).map(move |n| event(site, n))).collect()
    };
    room.take(few(1..=6, 4)).expect("there is space");
    let mut abreast = Vec::new();
    for nth in 0..3 {
        let batch = tokio::time::timeout(GATHERING / 4, room.batch()).await.expect("at once").expect("it is open");
        assert_eq!(said(&batch).len(), 8, "two sites of six for the {nth}.");
        abreast.push(batch);
    }
    // The next one gathers, though it is half full.
    room.take(few(7..=7, 4)).expect("there is space");
    assert!(tokio::time::timeout(GATHERING / 4, room.batch()).await.is_err(), "three are writing");
    abreast.into_iter().for_each(busy);
}

#[tokio::test]
async fn beside_others_a_batch_gathers_until_it_is_half_full_or_its_moment_has_passed() {
    let room = room(4, 100);
    let request = |site: u128, events: u32| (0..events).map(|at| event(site, at)).collect::<Vec<_>>();
    room.take(request(1, 1)).expect("there is space");
    let first = room.batch().await.expect("an idle server waits for nothing");
    room.take(request(2, 2)).expect("there is space");
    let second = room.batch().await.expect("it is half full");

    room.take(request(3, 1)).expect("there is space");
    let early = tokio::time::timeout(GATHERING / 4, room.batch()).await;
    assert!(early.is_err(), "one of four");
    room.take(request(3, 1)).expect("there is space");
    let half = room.batch().await.expect("it is half full");
    assert_eq!(half.events.len(), 2);

    room.take(request(4, 2)).expect("there is space");
    let since = Instant::now();
    let late = room.batch().await.expect("its moment has passed");
    assert!(since.elapsed() >= GATHERING / 2, "{:?}", since.elapsed());
    assert_eq!(late.events.len(), 2);

    room.take(request(5, 2)).expect("there is space");
    let next = tokio::spawn({
        let room = room.clone();
        async move { room.batch().await.map(|batch| batch.events.len()) }
    });
    tokio::task::yield_now().await;
    [first, second, half].into_iter().for_each(busy);
    assert_eq!(next.await.expect("no panic"), Some(2), "one still writes");
}
