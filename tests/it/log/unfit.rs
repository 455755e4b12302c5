//! Databases that cannot be watched: what is in the way is named with its cure, and everything else is served.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_the_way_is_named_with_its_cure() {
    let database = database().await;
    let shop = database.site("shop").await.id;
    let login = format!("plain_{}", database.name);
    let role = format!("CREATE ROLE {login} LOGIN PASSWORD 'hunter2'; GRANT opsmantik_service TO {login}");
    run(&database, &role).await;
    let (head, tail) = database.url.split_once("://").expect("a URL");
    let url = format!("{head}://{login}:hunter2@{}", tail.split_once('@').expect("a host").1);
    let unfit = async |rig: &Rig| match rig.feed.subscribe(Table::Calls, shop).await {
        Err(FeedError::Unfit(why)) => {
            assert!(!why.contains("hunter2"), "{why}");
            assert_eq!(rig.feed.obstacle().await.as_ref(), Some(&why));
            why
        }
        other => panic!("{other:?}"),
    };
    // Seen by a query, and met by the connection alone.
    let store = Store::new(&url, 2).await.expect("a URL");
    let why = unfit(&Rig::at(&store, &url, None, FeedOptions::default())).await;
    assert!(why.contains(&format!("ALTER ROLE \"{login}\" REPLICATION")), "{why}");
    let met = Rig::at(&database.store, &database.url, Some(&url), FeedOptions::default());
    assert!(unfit(&met).await.contains("REPLICATION"));
    let wrong = url.replace("hunter2", "hunter3");
    let why = unfit(&Rig::at(&database.store, &database.url, Some(&wrong), FeedOptions::default())).await;
    assert!(why.contains("FEED_DATABASE_URL") && !why.contains("hunter3"), "{why}");
    run(&database, &format!("ALTER ROLE {login} REPLICATION")).await;
    let allowed = Rig::at(&store, &url, None, FeedOptions::default());
    allowed.watch(Table::Calls, shop).await;
    assert_eq!(allowed.feed.obstacle().await, None);

    let elsewhere = crate::support::database::database().await;
    let why = unfit(&Rig::at(&database.store, &database.url, Some(&elsewhere.url), FeedOptions::default())).await;
    assert!(why.contains("another database"), "{why}");
    run(&elsewhere, "DROP PUBLICATION opsmantik_feed").await;
    let why = unfit(&Rig::new(&elsewhere, FeedOptions::default())).await;
    assert!(why.contains("CREATE PUBLICATION opsmantik_feed"), "{why}");
    let nowhere =
        Rig::at(&database.store, &database.url, Some("postgres://u:hunter2@127.0.0.1:1/x"), FeedOptions::default());
    assert_eq!(nowhere.feed.subscribe(Table::Calls, shop).await.err(), Some(FeedError::Away));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_without_logical_decoding_or_without_room_is_served_all_the_same() {
    let Private { store, url, .. } = &Private::start(&[("wal_level", "replica")]).await;
    let rig = Rig::at(store, url, None, FeedOptions::default());
    let site = SiteId::from_uuid(Uuid::from_u128(1));
    let refused = rig.feed.subscribe(Table::Calls, site).await.err();
    let Some(FeedError::Unfit(why)) = refused else { panic!("{refused:?}") };
    assert!(why.contains("wal_level is replica") && why.contains("ALTER SYSTEM SET wal_level = logical"), "{why}");
    let mut server = Server::start(url).await;
    let ready = async || {
        let ready = client().get(server.ready_url()).send().await.expect("it answers");
        (ready.status().as_u16(), ready.json::<Value>().await.expect("JSON"))
    };
    until("the months are made", async || ready().await.0 == 200).await;
    let body = ready().await.1;
    assert_eq!(body["ready"], true);
    assert_eq!(Metrics::of(&server).await.value("opsmantik_feed_running", &[]), Some(0.0));
    assert!(
        body["warnings"][0].as_str().is_some_and(|warning| warning.starts_with("feed: ") && warning.contains(&why)),
        "{body}"
    );
    server.program.until("the warning", |said| said.contains("Watch cannot be served: wal_level").then_some(())).await;
    server.program.stop(Duration::from_secs(10)).await;

    for (setting, name) in [("max_replication_slots", "a slot"), ("max_wal_senders", "a sender")] {
        let Private { store, url, .. } = &Private::start(&[(setting, "1")]).await;
        let first = Rig::at(store, url, None, FeedOptions::default());
        let _held = first.watch(Table::Calls, site).await;
        let second = Rig::at(store, url, None, FeedOptions::default());
        let refused = second.feed.subscribe(Table::Calls, site).await.err();
        assert!(matches!(&refused, Some(FeedError::Unfit(why)) if why.contains(setting)), "{name}: {refused:?}");
        assert_eq!(first.feed.obstacle().await, None, "its own is not in its way");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_is_read_as_sslmode_asks_for() {
    let private = Private::start(&[]).await;
    let admin = connect(&private.url).await;
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    for (file, pem) in [("server.crt", made.cert.pem()), ("server.key", made.signing_key.serialize_pem())] {
        let pem = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, pem);
        let write = format!("COPY (SELECT '{pem}') TO PROGRAM 'umask 077; base64 -d > {file}'");
        admin.batch_execute(&write).await.expect("a superuser");
    }
    let with = |mode: &str| private.url.replace("sslmode=disable", &format!("sslmode={mode}"));
    let site = private.site().await;
    let begins = async |mode: &str| {
        let rig = Rig::at(&private.store, &private.url, Some(&with(mode)), FeedOptions::default());
        let mut watch = rig.feed.subscribe(Table::Calls, site).await?;
        let own = "SELECT ssl, application_name FROM pg_stat_ssl JOIN pg_stat_replication USING (pid)";
        let row = admin.query_one(own, &[]).await.expect("one reads");
        assert_eq!(row.get::<_, &str>(1), "opsmantik feed");
        rig.stop.cancel();
        assert_eq!(end(&mut watch).await, Lost::Away);
        rig.feed.stopped().await;
        let readers = "SELECT count(*) FROM pg_stat_replication";
        until("it is gone", async || admin.query_one(readers, &[]).await.expect("a look").get::<_, i64>(0) == 0).await;
        Ok::<bool, FeedError>(row.get(0))
    };
    assert_eq!(begins("prefer").await, Ok(false), "the server has no TLS yet");
    assert_eq!(begins("require").await, Err(FeedError::Away));
    admin.batch_execute("ALTER SYSTEM SET ssl = on").await.expect("a superuser");
    admin.batch_execute("SELECT pg_reload_conf()").await.expect("a superuser");
    until("TLS is on", async || {
        connect(&with("disable")).await.query_one("SHOW ssl", &[]).await.expect("a look").get::<_, &str>(0) == "on"
    })
    .await;
    assert_eq!(begins("disable").await, Ok(false));
    for mode in ["prefer", "require"] {
        assert_eq!(begins(mode).await, Ok(true), "{mode}");
    }
    // Nobody vouches for it.
    assert_eq!(begins("verify-full").await, Err(FeedError::Away));
}
