//! `opsmantik dev`: everything on one machine by one command, and what to open and call.

use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::cluster::{Cluster, ClusterOptions};
use super::demo::Demo;
use super::postgres::Postgres;
use super::progress::Progress;
use crate::access::ApiToken;
use crate::calls::caller_key::CallerKey;
use crate::config::{Mode, Settings};
use crate::domain::access::{Caller, Reach, Scope};
use crate::domain::site::Site;
use crate::grpc::Protection;
use crate::http::serve::{Limits, serve};
use crate::secret::Secret;
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
        let mut settings = self.settings.clone();
        if settings.caller_key()?.is_none() {
            settings.caller_key = Some(caller_key(&self.data_dir.join("caller-key"))?);
        }
        let token = demo_token(&store, &site, &self.data_dir.join("token")).await?;
        let api_base = format!("http://{http_addr}");
        let demo = Demo { store, site_id: site.id, public_id: site.public_id.clone(), api_base };

        let server = Server::start(&settings, Mode::Dev, &url, listeners, demo.clone().router("/demo")).await?;
        let stop_demo = CancellationToken::new();
        let demo_page = tokio::spawn(serve(demo_listener, demo.router(""), Limits::default(), stop_demo.clone()));
        print_what_to_do(&server, demo_addr, &site, &token, &url, &cluster.psql_line(DATABASE));

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

/// The token that the last run left in this file while it opens the demo site by every scope, or a new one.
async fn demo_token(store: &Store, site: &Site, file: &Path) -> anyhow::Result<ApiToken> {
    if let Some(token) = std::fs::read_to_string(file).ok().and_then(|text| text.trim().parse::<ApiToken>().ok())
        && let Some(found) = store.find_token(&token.hash()).await?
        && let Caller::Token { scopes, reach: Reach::Site { id, .. }, .. } = &*found.caller
        && *id == site.id
        && Scope::ALL.iter().all(|scope| scopes.contains(scope))
    {
        return Ok(token);
    }
    let token = ApiToken::generate()?;
    store.issue_token(&token.hash(), "dev", &Scope::ALL, Some(site.id), None).await?;
    keep(file, token.reveal()).with_context(|| format!("cannot keep the token in {}", file.display()))?;
    Ok(token)
}

/// The key for callers' numbers, made once: with another one the same caller would be another.
fn caller_key(file: &Path) -> anyhow::Result<Secret> {
    if let Ok(kept) = std::fs::read_to_string(file)
        && CallerKey::new(&kept).is_ok()
    {
        return Ok(kept.parse()?);
    }
    let made = format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
    keep(file, &made).with_context(|| format!("cannot keep the key for callers' numbers in {}", file.display()))?;
    Ok(made.parse()?)
}

/// Writes a file that is nobody else's to read, whole or not at all.
fn keep(file: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write;
    let part = file.with_extension("part");
    match std::fs::remove_file(&part) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut new = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
    writeln!(new, "{text}")?;
    std::fs::rename(part, file)
}

fn print_what_to_do(server: &Server, demo: SocketAddr, site: &Site, token: &ApiToken, database: &str, psql: &str) {
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

  Token       {token}   (every scope, the demo site)

  gRPC        rpc() {{ npx -y @bufbuild/buf@1.75.0 curl --protocol grpc --http2-prior-knowledge --schema proto \
                -H 'authorization: Bearer {token}' -d "$2" http://{grpc}/opsmantik.v1.$1; }}
              rpc ScoringService/ScoreSignals '{{"signals":["SIGNAL_PRIMARY_CONVERSION","SIGNAL_SCROLL_90"]}}'

  A call      rpc CallsService/RecordCall '{{"call":{{"site":"{public_id}","key":{{"provider":"demo","provider_call_id":"1"}},
                "dialled_number":"+12025550123","caller_number":"+12025550187","started_at":"'"$(date -u +%FT%TZ)"'"}}}}'
              # It finds the visit that clicked on the telephone link, if there is one.

  Watch       rpc IngestService/WatchEvents '{{"site":"{public_id}"}}'
              # What is there, then each event as it is stored: click on the page meanwhile. Ctrl-C ends it.

  Commands    DATABASE_URL={database} opsmantik token list

  SQL         {psql}

  Operator    http://{admin}/readyz   http://{admin}/metrics
"#,
        site_id = site.id,
        public_id = site.public_id,
        token = token.reveal(),
    );
}
