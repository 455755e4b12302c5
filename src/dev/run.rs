//! `opsmantik dev`: everything on one machine by one command, and what to open and call.

use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, ClusterOptions};
use super::demo::Demo;
use super::postgres::Postgres;
use super::progress::Progress;
use crate::config::{Mode, Settings};
use crate::domain::site::Site;
use crate::grpc::Protection;
use crate::http::serve::{Limits, serve};
use crate::server::{Listeners, Server, asked_to_stop, hang_ups};
use crate::store::Store;
use crate::store::sites::NewSite;

/// The database in the private cluster.
const DATABASE: &str = "opsmantik";
/// The demo site's public id.
const DEMO_SITE: &str = "demo";

/// Raise everything on this machine.
#[derive(Debug, clap::Args)]
pub struct Dev {
    #[command(flatten)]
    settings: Settings,
    /// Listener of the demo page, on another port than the API as a customer's site is
    #[arg(long, env = "DEMO_ADDR", default_value = "127.0.0.1:8090", value_name = "DEMO_ADDR")]
    demo_addr: SocketAddr,
    /// Where the private database lives; it is kept between runs
    #[arg(long, env = "OPSMANTIK_DATA_DIR", default_value = ".opsmantik", value_name = "FOLDER")]
    data_dir: PathBuf,
}

impl Dev {
    /// Runs until asked to stop.
    pub async fn run(self) -> anyhow::Result<()> {
        if self.settings.database_url.is_some() {
            eprintln!("DATABASE_URL is ignored: dev never touches a database that is not its own");
        }
        if self.settings.grpc_protection(Mode::Serve) != Ok(Protection::Loopback) {
            eprintln!("GRPC_TLS_* and GRPC_PLAINTEXT are ignored: dev serves gRPC to this machine only");
        }
        self.settings.check(Mode::Dev)?;
        let data_dir = self.data_dir.join("postgres");
        let cluster = tokio::task::spawn_blocking(move || raise(data_dir)).await??;
        let url = cluster.url(DATABASE);
        Store::create_database(&cluster.url("postgres"), DATABASE).await?;
        let store = Store::new(&url, 2).await?;
        let applied = store.migrate().await?;
        if !applied.is_empty() {
            eprintln!("  ✓ {} migrations applied", applied.len());
        }

        let listeners = Listeners {
            http: bind("HTTP_ADDR", self.settings.http_addr).await?,
            grpc: bind("GRPC_ADDR", self.settings.grpc_addr).await?,
            admin: bind("ADMIN_ADDR", self.settings.admin_addr).await?,
        };
        let demo_listener = bind("DEMO_ADDR", self.demo_addr).await?;
        let (http_addr, demo_addr) = (listeners.http.local_addr()?, demo_listener.local_addr()?);
        let site = demo_site(&store, &[http_addr, demo_addr]).await?;
        let api_base = format!("http://{http_addr}");
        let demo = Demo { store, site_id: site.id, public_id: site.public_id.clone(), api_base };

        let server = Server::start(&self.settings, Mode::Dev, &url, listeners, demo.clone().router("/demo")).await?;
        let stop_demo = CancellationToken::new();
        let demo_page = tokio::spawn(serve(demo_listener, demo.router(""), Limits::default(), stop_demo.clone()));
        print_what_to_do(&server, demo_addr, &site, &cluster.psql_line(DATABASE));

        asked_to_stop(hang_ups()?, || ControlFlow::Break(())).await?;
        stop_demo.cancel();
        server.stop().await;
        demo_page.await?;
        tokio::task::spawn_blocking(move || cluster.stop()).await??;
        Ok(())
    }
}

fn raise(data_dir: PathBuf) -> anyhow::Result<Cluster> {
    let progress = Progress::stderr();
    let postgres = Postgres::find_or_install(progress)?;
    let options = ClusterOptions { postgres, data_dir, port: None, durable: true, settings: Vec::new(), keep: true };
    Ok(Cluster::start(options, progress)?)
}

/// Binds the address, or else a free port beside it, and says so.
async fn bind(name: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            let listener = TcpListener::bind(SocketAddr::new(address.ip(), 0)).await?;
            eprintln!("  ! {name}: {address} is taken, using {} instead", listener.local_addr()?);
            Ok(listener)
        }
        bound => bound.with_context(|| format!("{name}: cannot listen on {address}")),
    }
}

/// The demo site, which allows the origins that its page has this time.
async fn demo_site(store: &Store, pages: &[SocketAddr]) -> anyhow::Result<Site> {
    let origins: Vec<String> = pages.iter().map(|address| format!("http://{address}")).collect();
    let new = NewSite {
        public_id: DEMO_SITE.to_owned(),
        owner: None,
        name: "Keyhole Locksmiths (demo)".to_owned(),
        domain: "localhost".to_owned(),
        origins: origins.clone(),
        region: Some("US".to_owned()),
    };
    if let Some(site) = store.add_site(&new).await? {
        return Ok(site);
    }
    let site = store.find_site(DEMO_SITE, None).await?.context("the demo site cannot be read back")?;
    store.set_site_origins(site.id, &origins).await?.context("the demo site is gone")
}

fn print_what_to_do(server: &Server, demo: SocketAddr, site: &Site, psql: &str) {
    let (http, grpc, admin) = (server.http_addr, server.grpc_addr, server.admin_addr);
    println!(
        r#"
OpsMantik is running. Ctrl-C stops it; the data stays.

  Open        http://{demo}/          (the page and the API on two origins, as on a customer's site)
              http://{http}/demo      (the same page on the API's own origin)
              then click the telephone link and watch the panel.

  Demo site   {site_id}   public id: {public_id}

  HTTP        curl -i http://{http}/api/sync -H 'Origin: http://{demo}' -H 'Content-Type: application/json' \
                -d '{{"s":"{public_id}","u":"http://{demo}/?gclid=curl","sid":"from-curl","ec":"conversion","ea":"phone_call","el":"tel:+12025550123"}}'

  gRPC        grpcurl -plaintext -d '{{"signals":["SIGNAL_PRIMARY_CONVERSION","SIGNAL_SCROLL_90"]}}' \
                {grpc} opsmantik.v1.ScoringService/ScoreSignals

  SQL         {psql}

  Operator    http://{admin}/readyz   http://{admin}/metrics
"#,
        site_id = site.id,
        public_id = site.public_id,
    );
}
