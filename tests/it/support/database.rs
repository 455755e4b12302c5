//! A database of its own for every test: a clone of one migrated template, dropped when the test is done.

use std::sync::atomic::{AtomicU32, Ordering};

use opsmantik::access::ApiToken;
use opsmantik::domain::access::Scope;
use opsmantik::domain::id::SiteId;
use opsmantik::domain::site::Site;
use opsmantik::store::Store;
use opsmantik::store::sites::NewSite;
use serde_json::Value;
use tokio::sync::{Mutex, OnceCell};
use tokio_postgres::{Client, NoTls};
use tonic::metadata::MetadataValue;
use tonic::{Request, Status};

use super::cluster::cluster;

const TEMPLATE: &str = "opsmantik_template";
static NEXT: AtomicU32 = AtomicU32::new(0);
static MAKING: Mutex<()> = Mutex::const_new(());

/// A migrated database that nobody else uses.
pub struct Database {
    pub name: String,
    pub url: String,
    pub store: Store,
    /// The superuser, for looking behind the walls.
    pub admin: Client,
}

/// Connects as the superuser.
pub async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("the test's cluster answers");
    tokio::spawn(connection);
    client
}

/// Adds a token to every request of a client.
#[allow(clippy::result_large_err)] // the shape of an interceptor
pub fn bearer(token: &str) -> impl FnMut(Request<()>) -> Result<Request<()>, Status> + Clone + use<> {
    let value: MetadataValue<_> = format!("Bearer {token}").parse().expect("a token is visible text");
    move |mut request| {
        request.metadata_mut().insert("authorization", value.clone());
        Ok(request)
    }
}

/// An empty database.
pub async fn empty(name: &str) -> Client {
    let admin = connect(&cluster().await.url("postgres")).await;
    admin.batch_execute(&format!("CREATE DATABASE {name}")).await.expect("a new database");
    connect(&cluster().await.url(name)).await
}

/// A migrated database.
pub async fn database() -> Database {
    static TEMPLATE_MADE: OnceCell<()> = OnceCell::const_new();
    let cluster = cluster().await;
    let url = |name: &str| cluster.url(name);
    TEMPLATE_MADE
        .get_or_init(|| async {
            drop(empty(TEMPLATE).await);
            let store = Store::new(&url(TEMPLATE), 1).await.expect("the cluster's URL is one");
            store.migrate().await.expect("the migrations run on an empty database");
        })
        .await;
    let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
    {
        let _one_at_a_time = MAKING.lock().await;
        let admin = connect(&url("postgres")).await;
        let clone = format!("CREATE DATABASE {name} TEMPLATE {TEMPLATE}");
        let mut tries = 0;
        while let Err(error) = admin.batch_execute(&clone).await {
            // The migrator's connection may take a moment to leave the template.
            tries += 1;
            assert!(tries < 100, "cannot clone the template: {error:?}");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }
    let url = url(&name);
    Database { store: Store::new(&url, 8).await.expect("a URL"), admin: connect(&url).await, name, url }
}

impl Database {
    /// A site of this public id, with `<public_id>.example` as its domain.
    pub async fn site(&self, public_id: &str) -> Site {
        let new = NewSite {
            public_id: public_id.to_owned(),
            owner: None,
            name: public_id.to_owned(),
            domain: format!("{public_id}.example"),
            origins: Vec::new(),
            region: Some("US".to_owned()),
        };
        self.store.add_site(&new).await.expect("the database answers").expect("the public id is free")
    }

    /// A new token's text. No site: every site.
    pub async fn token(&self, scopes: &[Scope], site: Option<SiteId>) -> String {
        let token = ApiToken::generate().expect("random numbers");
        let issued = self.store.issue_token(&token.hash(), "test", scopes, site, None).await;
        issued.expect("the database answers");
        token.reveal().to_owned()
    }

    /// Makes the leaves of a month.
    pub async fn ensure_month(&self, month: &str) {
        let month = month.parse().expect("a test's own month");
        self.store.ensure_month(month).await.expect("the month can be made");
    }

    /// All rows of a query as JSON, one an element.
    pub async fn rows(&self, query: &str) -> Vec<Value> {
        let rows = self.admin.query(&format!("SELECT to_jsonb(r) FROM ({query}) AS r"), &[]).await;
        rows.expect("the test's own query").iter().map(|row| row.get(0)).collect()
    }

    /// Every session counts what is stored of it, not more and not less, and nothing died.
    pub async fn assert_counted(&self) {
        let miscounted = "SELECT count(*) FROM sessions s WHERE event_count <> (SELECT count(*) FROM events e \
            WHERE (e.site_id, e.session_month, e.session_id) = (s.site_id, s.created_month, s.id))";
        assert_eq!(self.count(miscounted).await, 0);
        assert_eq!(self.count("SELECT count(*) FROM dead_letters").await, 0);
    }

    /// One number.
    pub async fn count(&self, query: &str) -> i64 {
        self.admin.query_one(query, &[]).await.expect("the test's own query").get(0)
    }

    /// Everything that is stored of the traffic, in a form that two databases can be compared by.
    pub async fn traffic(&self) -> [Vec<Value>; 2] {
        [
            self.rows("SELECT * FROM sessions ORDER BY site_id, created_month, id").await,
            self.rows("SELECT * FROM events ORDER BY site_id, session_month, id").await,
        ]
    }

    /// Gives a site a fixed id, so that two databases can be compared.
    pub async fn site_with_id(&self, public_id: &str, id: SiteId) {
        let insert = "INSERT INTO sites (id, public_id, name, domain) VALUES ($1, $2, $2, $2 || '.example')";
        self.admin.execute(insert, &[&id.as_uuid(), &public_id]).await.expect("a new site");
    }
}
