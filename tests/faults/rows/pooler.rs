//! Debian's PgBouncer in transaction mode stands between the server and the database, as Supabase's pooler does: every door works through it, only the
//! change feed goes past it; and when it is killed under load nothing is lost.

use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::{Uid, User};
use opsmantik::dev::tools::{Tool, require};
use tokio::net::{TcpListener, TcpStream};

use super::Plan;
use super::kill::{Scene, shop, token};
use super::two::Watch;
use crate::doors::{Doors, OPEN};
use crate::report::Report;
use crate::support::database::database;
use crate::support::process::{Server, run};

/// Connections to the database that it shares among all: fewer than the server's own pool has.
const POOL: u32 = 6;

/// PgBouncer with its folder; gone with its row.
struct Pooler {
    program: PathBuf,
    folder: PathBuf,
    port: u16,
    child: Option<Child>,
}

impl Pooler {
    async fn before(program: PathBuf, database_url: &str) -> Self {
        let url: url::Url = database_url.parse().expect("a URL");
        let free = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = free.local_addr().expect("a bound socket").port();
        drop(free);
        let folder = std::env::temp_dir().join(format!("opsmantik-pooler-{}", uuid::Uuid::new_v4().simple()));
        std::fs::create_dir(&folder).expect("a folder of ours");
        let (user, password) = (url.username(), url.password().unwrap_or_default());
        let users = format!("\"{user}\" \"{password}\"\n");
        let settings = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\npool_mode = transaction\n\
             default_pool_size = {POOL}\nmax_client_conn = 200\nlogfile = {}\npidfile = {}\n",
            url.port().expect("it has a port"),
            folder.join("users").display(),
            folder.join("log").display(),
            folder.join("pid").display(),
        );
        for (name, text) in [("users", users), ("settings", settings)] {
            std::fs::write(folder.join(name), text).expect("a file of ours");
        }
        let mut pooler = Self { program, folder, port, child: None };
        if Uid::effective().is_root() {
            // It refuses to run as root, as PostgreSQL does.
            let postgres = User::from_name("postgres").ok().flatten().expect("PostgreSQL's package made it");
            for path in [pooler.folder.clone(), pooler.folder.join("users"), pooler.folder.join("settings")] {
                chown(path, Some(postgres.uid.as_raw()), Some(postgres.gid.as_raw())).expect("root may");
            }
        }
        pooler.start().await;
        pooler
    }

    async fn start(&mut self) {
        let mut command = Command::new(&self.program);
        if Uid::effective().is_root() {
            use std::os::unix::process::CommandExt;
            let postgres = User::from_name("postgres").ok().flatten().expect("PostgreSQL's package made it");
            command.uid(postgres.uid.as_raw()).gid(postgres.gid.as_raw());
        }
        drop(std::fs::remove_file(self.folder.join("pid")));
        command.arg("--quiet").arg(self.folder.join("settings")).current_dir(&self.folder);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().expect("it runs"));
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).await.is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "PgBouncer does not listen:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Only gone already, and then that is what was wanted.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn url(&self, database_url: &str) -> String {
        let mut url: url::Url = database_url.parse().expect("a URL");
        url.set_port(Some(self.port)).expect("it has a port");
        url.into()
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        self.kill();
        drop(std::fs::remove_dir_all(&self.folder));
    }
}

pub async fn row(plan: Plan) -> Report {
    let found = tokio::task::spawn_blocking(|| require(Tool::Pgbouncer)).await.expect("it does not panic");
    let program = match found {
        Ok(found) => found.path,
        Err(missing) => return Report::without(missing),
    };
    let mut scene = Scene::new(&plan);
    let database = shop(database().await).await;
    let token = token(&database).await;
    let mut pooler = Pooler::before(program, &database.url).await;
    let url = pooler.url(&database.url);
    let direct = [("FEED_DATABASE_URL", database.url.as_str())];
    let mut server = Server::start_with(&url, &[&OPEN[..], &direct].concat()).await;
    let doors = Doors::of(&server, &token);
    let watch = Watch::begin(&server, &token);
    for round in 0..plan.rounds {
        let work = scene.work(round);
        let sending = scene.begin(&doors, &work).await;
        pooler.kill();
        tokio::time::sleep(Duration::from_millis(300)).await;
        pooler.start().await;
        let knocking = scene.knock(&doors, &work);
        sending.end().await;
        scene.report.recovered_after(knocking.await.expect("it does not panic"));
        scene.check_answered(&database.admin, round, &work).await;
        scene.retry(&doors, &database.admin, round, &work).await;
    }
    // The command line's statements, and the keeper's, go through it as well.
    for command in [
        &["site", "list", "--json"][..],
        &["token", "list", "--json"],
        &["partitions", "list", "--json"],
        &["partitions", "ensure"],
    ] {
        let ended = run(command, &[("DATABASE_URL", &url)]).await;
        scene.report.demand(ended.code == Some(0), format!("{command:?} through the pooler: {}", ended.stderr));
    }
    let ready = crate::support::process::client().get(server.ready_url()).send().await.expect("an answer");
    let (status, text) = (ready.status(), ready.text().await.expect("a whole answer"));
    scene.report.demand(status == 200 && !text.contains("warnings"), format!("/readyz: {status} {text}"));
    watch.end(&database.admin, &mut scene.report).await;
    let report = scene.finish(&database.admin, plan.rounds).await;
    server.program.stop(Duration::from_secs(20)).await;
    report
}
