//! How a feed begins and ends: no slot stays behind, a cut connection is told, and two servers name the same places.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_ends_when_nobody_listens_and_leaves_no_slot() {
    let database = database().await;
    let shop = database.site("shop").await.id;
    let options = FeedOptions { linger: Duration::from_millis(300), subscribers: 3, ..FeedOptions::default() };
    let rig = Rig::new(&database, options);
    assert_eq!(slots(&database).await, 0, "it begins when it is asked");
    let watch = || rig.feed.subscribe(Table::Events, shop);
    let (one, two, three, four) = tokio::join!(watch(), watch(), watch(), watch());
    let met = [one, two, three, four].map(|one| one.map_err(|error| assert_eq!(error, FeedError::Full)));
    assert_eq!(met.iter().filter(|one| one.is_ok()).count(), 3);
    assert_eq!(slots(&database).await, 1, "it began once");
    drop(met);
    until("the slot goes", async || slots(&database).await == 0).await;

    let mut again = rig.watch(Table::Events, shop).await;
    let (stopped, lost) = (rig.feed.clone(), tokio::spawn(async move { end(&mut again).await }));
    rig.stop.cancel();
    assert_eq!(lost.await.expect("no panic"), Lost::Away);
    tokio::time::timeout(LIMIT, stopped.stopped()).await.expect("it stops");
    until("the slot goes", async || slots(&database).await == 0).await;
    assert_eq!(rig.feed.subscribe(Table::Events, shop).await.err(), Some(FeedError::Away));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_connection_is_told_and_the_next_subscriber_begins_anew() {
    let database = database().await;
    let shop = database.site("shop").await.id;
    let rig = Rig::new(&database, FeedOptions::default());
    let mut watch = rig.watch(Table::Calls, shop).await;
    let lineage = watch.lineage();
    let cut = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE database = current_database()";
    run(&database, cut).await;
    assert_eq!(end(&mut watch).await, Lost::Away);
    assert_eq!(watch.try_next().err(), Some(Lost::Away));
    run(&database, &insert_calls(shop, "generate_series(1, 1)", "'missed'")).await;
    let mut again = rig.watch(Table::Calls, shop).await;
    assert_eq!(again.lineage(), lineage);
    assert!(!again.seek(watch.position()), "what came between was read by nobody");
    run(&database, &insert_calls(shop, "generate_series(2, 2)", "'told'")).await;
    assert_eq!(text(row(&mut again).await.after(), "recording_ref"), "told");
    until("one slot is left", async || slots(&database).await == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_feeds_name_the_same_places() {
    let database = database().await;
    let shop = database.site("shop").await.id;
    let rigs = [Rig::new(&database, FeedOptions::default()), Rig::new(&database, FeedOptions::default())];
    let mut one = rigs[0].watch(Table::Calls, shop).await;
    let mut two = rigs[1].watch(Table::Calls, shop).await;
    assert_eq!(one.lineage(), two.lineage());
    run(&database, &insert_calls(shop, "generate_series(1, 3)", "'x'")).await;
    run(&database, &insert_calls(shop, "generate_series(4, 4)", "'y'")).await;
    let mut places = Vec::new();
    for _ in 0..4 {
        let (here, there) = (entry(&mut one).await, entry(&mut two).await);
        assert_eq!((here.position, here.xid), (there.position, there.xid));
        places.push(here.position);
    }
    assert!(two.seek(places[1]));
    assert_eq!(entry(&mut two).await.position, places[2]);
    // Where one has come to with nothing to tell, the other comes to as well.
    run(&database, "CREATE TABLE something_else (n int); INSERT INTO something_else VALUES (1)").await;
    until("the position moves", async || {
        drop(tokio::time::timeout(Duration::from_secs(2), one.next()).await);
        one.position() > places[3]
    })
    .await;
    assert!(two.seek(one.position()));
    run(&database, &insert_calls(shop, "generate_series(5, 5)", "'z'")).await;
    assert_eq!(text(row(&mut two).await.after(), "recording_ref"), "z");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_transaction_holds_the_start_up_for_a_while_and_no_longer() {
    let database = database().await;
    let shop = database.site("shop").await.id;
    let options =
        FeedOptions { start_limit: Duration::from_secs(1), back_off: Duration::ZERO, ..FeedOptions::default() };
    let rig = Rig::new(&database, options);
    run(&database, "BEGIN; SELECT pg_current_xact_id()").await;
    let began = Instant::now();
    assert_eq!(rig.feed.subscribe(Table::Calls, shop).await.err(), Some(FeedError::Held));
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    until("PostgreSQL gives up", async || slots(&database).await == 0).await;
    run(&database, "COMMIT").await;
    until("it begins", async || rig.feed.subscribe(Table::Calls, shop).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_goes_on_without_who_asked_for_it() {
    let database = database().await;
    let shop = database.site("shop").await.id;
    let rig = Rig::new(&database, FeedOptions { patience: Duration::from_millis(300), ..FeedOptions::default() });
    run(&database, "BEGIN; SELECT pg_current_xact_id()").await;
    assert_eq!(rig.feed.subscribe(Table::Calls, shop).await.err(), Some(FeedError::Held));
    let made = "SELECT slot_name::text AS name FROM pg_replication_slots WHERE database = current_database()";
    let first = database.rows(made).await;
    assert_eq!(first.len(), 1, "it still begins");
    assert_eq!(rig.feed.subscribe(Table::Calls, shop).await.err(), Some(FeedError::Held));
    run(&database, "COMMIT").await;
    until("it has begun", async || rig.feed.subscribe(Table::Calls, shop).await.is_ok()).await;
    assert_eq!(database.rows(made).await, first, "who asked again waited for the same");
}
