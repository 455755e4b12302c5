//! Generated clients in other languages, the judges of the contract: the examples of the repository run against the real server, as a
//! reader of the README would run them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use opsmantik::dev::projects::{NpmProject, PythonProject};
use opsmantik::dev::tools::{BUF, Found, Tool, require, skip_or_fail};
use opsmantik::domain::access::Scope;
use tokio::process::Command;
use uuid::Uuid;

use crate::support::calls::KEY;
use crate::support::database::{Database, database};
use crate::support::process::{Program, Server};

const PYTHON: Tool = Tool::PythonProject(PythonProject {
    name: "examples",
    requirements: include_str!("../../examples/python/requirements.txt"),
});

const TYPESCRIPT: Tool = Tool::NpmProject(NpmProject {
    name: "examples",
    package: include_str!("../../examples/typescript/package.json"),
    lock: include_str!("../../examples/typescript/package-lock.json"),
});

/// The parts of the contract that this version serves.
const SERVED: [&str; 10] =
    ["ingest", "stream", "scoring", "calls", "watch", "errors", "deadline", "cancellation", "health", "reflection"];
/// No program of a client takes longer, compiling included.
const LIMIT: Duration = Duration::from_secs(120);

/// A tool, or none if the test has to be skipped, which is said then.
async fn tool(tool: Tool) -> Option<PathBuf> {
    match tokio::task::spawn_blocking(move || require(tool)).await.expect("looking for a tool does not panic") {
        Ok(Found { path }) => Some(path),
        Err(missing) => {
            skip_or_fail(&missing);
            None
        }
    }
}

/// A server, and what it answers to the programs of a client.
struct Judged {
    database: Database,
    server: Server,
}

impl Judged {
    async fn start() -> Self {
        let database = database().await;
        let server = Server::start_with(&database.url, &[("CALLER_KEY", KEY)]).await;
        Self { database, server }
    }

    /// Runs a program on a site that nobody has used, with a token for it, and returns what it printed.
    async fn passes(&self, site: &str, program: &Path, args: &[&str], folder: &Path) -> String {
        let id = self.database.site(site).await.id;
        let token = self.database.token(&Scope::ALL, Some(id)).await;
        let mut command = Command::new(program);
        command.args(args).env("OPSMANTIK_ADDR", self.server.grpc.to_string()).env("OPSMANTIK_TOKEN", token);
        run(command, folder).await
    }
}

/// A proxy of the machine's is not for the loopback.
fn without_proxy(command: &mut Command) {
    for proxy in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "grpc_proxy"] {
        command.env_remove(proxy);
    }
}

/// Runs a program to its end, which must be a good one.
async fn run(mut command: Command, folder: &Path) -> String {
    without_proxy(&mut command);
    let ended = tokio::time::timeout(LIMIT, command.current_dir(folder).kill_on_drop(true).output()).await;
    let output = ended.unwrap_or_else(|_| panic!("{command:?} does not end")).expect("the program starts");
    let [said, complained] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(output.status.success(), "{command:?} ended with {}\n{said}\n{complained}", output.status);
    said
}

/// Runs the example that watches, and leaves it alone: it goes on after its server was killed and is there again, and ends when its token is
/// revoked.
async fn watches_by_itself(program: &Path, script: &[&str], folder: &Path) {
    let Judged { database, server } = Judged::start().await;
    let site = database.site("windows").await.id;
    let token = database.token(&[Scope::EventsRead], Some(site)).await;
    let mut command = Command::new(program);
    command.args(script).args(["windows", "events"]).current_dir(folder);
    command.env("OPSMANTIK_ADDR", server.grpc.to_string()).env("OPSMANTIK_TOKEN", token);
    without_proxy(&mut command);
    let by_hand = async |what: &str| {
        let visit = "INSERT INTO sessions (site_id, created_month, id, created_at, last_seen_at, event_count, entry_page, attribution, \
             traffic_source, traffic_medium, lead_score) SELECT id, date_trunc('month', now() AT TIME ZONE 'UTC')::date, gen_random_uuid(), \
             now(), now(), 1, '/', 'Organic/Referral', 'Direct', 'direct', 0 FROM sites WHERE public_id = 'windows' RETURNING *";
        let event = format!(
            "WITH visit AS ({visit}) INSERT INTO events (site_id, session_month, id, session_id, created_at, occurred_at, url, \
             event_category, event_action, lead_score) \
             SELECT site_id, created_month, gen_random_uuid(), id, now(), now(), '/', 'system', '{what}', 0 FROM visit"
        );
        database.admin.execute(&event, &[]).await.expect("a row by hand");
    };
    let tells = async |watcher: &mut Program, what: &str| {
        watcher.until(what, |said| said.contains(&format!("\"{what}\"")).then_some(())).await;
    };

    by_hand("there-before").await;
    let mut watcher = Program::of(command);
    tells(&mut watcher, "there-before").await;
    by_hand("while-it-watches").await;
    tells(&mut watcher, "while-it-watches").await;
    let address = server.grpc.to_string();
    server.program.kill().await;
    by_hand("while-nobody-serves").await;
    let _server = Server::start_with(&database.url, &[("CALLER_KEY", KEY), ("GRPC_ADDR", &address)]).await;
    tells(&mut watcher, "while-nobody-serves").await;
    by_hand("at-last").await;
    tells(&mut watcher, "at-last").await;

    let said = watcher.said();
    assert_eq!(said.matches("ANEW").count(), 1, "it went on where it was: {said}");
    for once in ["while-nobody-serves", "at-last"] {
        assert_eq!(said.matches(&format!("\"{once}\"")).count(), 1, "told twice: {said}");
    }
    assert!(said.contains("trying again"), "it says what happened: {said}");
    database.admin.batch_execute("UPDATE api_tokens SET revoked_at = now()").await.expect("revoked");
    let ended = watcher.ended().await;
    assert_eq!(ended.code(), Some(1), "{}", watcher.said());
    assert!(watcher.said().contains("UNAUTHENTICATED: "), "{}", watcher.said());
}

/// A part an argument, after the script and the site; and what is said when all of them hold.
fn conformance<'a>(before: &[&'a str]) -> (Vec<&'a str>, String) {
    let said = SERVED.iter().map(|part| format!("ok {part}\n")).collect();
    (before.iter().copied().chain(SERVED).collect(), said)
}

/// The walkthrough of the README: the call has found its visit, which says why it is a good lead.
fn matched(said: &str) {
    assert!(said.contains("MATCH_METHOD_CLICK session ") && said.contains("\nscore 50\n"), "{said}");
}

/// A copy of the repository's definitions and of one client, in which packages and generated code may lie; gone with the test.
struct Workshop {
    root: PathBuf,
}

impl Drop for Workshop {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

impl Workshop {
    fn of(client: &str) -> Self {
        let workshop =
            Self { root: std::env::temp_dir().join(format!("opsmantik-clients-{}", Uuid::new_v4().simple())) };
        for folder in ["proto", &format!("examples/{client}")] {
            copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &workshop.root.join(folder));
        }
        workshop
    }

    fn client(&self, client: &str) -> PathBuf {
        self.root.join("examples").join(client)
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a new folder");
    for entry in fs::read_dir(from).expect("a folder of the repository").flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        // What somebody has installed or generated there by hand is not the repository's.
        if ["node_modules", "gen", "__pycache__"].iter().any(|made| name == *made) {
            continue;
        }
        if path.is_dir() {
            copy(&path, &to.join(name));
        } else {
            fs::copy(&path, to.join(name)).expect("a copy");
        }
    }
}

#[tokio::test]
async fn a_python_client_finds_the_server_as_the_contract_says() {
    let Some(python) = tool(PYTHON).await else { return };
    let workshop = Workshop::of("python");
    let judged = Judged::start().await;
    let (args, said) = conformance(&["conformance.py", "shop"]);
    let folder = workshop.client("python");
    assert_eq!(judged.passes("shop", &python, &args, &folder).await, said);
    matched(&judged.passes("walk", &python, &["calls.py", "walk"], &folder).await);
}

#[tokio::test]
async fn a_python_watcher_goes_on_by_itself_after_its_server_was_killed() {
    let Some(python) = tool(PYTHON).await else { return };
    let workshop = Workshop::of("python");
    watches_by_itself(&python, &["watch.py"], &workshop.client("python")).await;
}

/// The folder of the TypeScript examples with its packages and the generated clients.
async fn typescript() -> Option<(Workshop, PathBuf)> {
    let node_modules = tool(TYPESCRIPT).await?;
    let buf = tool(BUF).await?;
    let workshop = Workshop::of("typescript");
    let folder = workshop.client("typescript");
    symlink(&node_modules, folder.join("node_modules")).expect("a link");
    let mut generate = Command::new(buf);
    generate.arg("generate");
    run(generate, &folder).await;
    Some((workshop, node_modules))
}

#[tokio::test]
async fn a_typescript_watcher_goes_on_by_itself_after_its_server_was_killed() {
    let Some((workshop, _)) = typescript().await else { return };
    let Some(node) = tool(Tool::Node).await else { return };
    // As `npx tsx` does it, in one process: nothing is left of a test that fails.
    watches_by_itself(&node, &["--import", "tsx", "watch.ts"], &workshop.client("typescript")).await;
}

#[tokio::test]
async fn a_typescript_client_compiles_strictly_and_finds_the_server_as_the_contract_says() {
    let Some((workshop, node_modules)) = typescript().await else { return };
    let folder = workshop.client("typescript");
    let mut check = Command::new(node_modules.join(".bin/tsc"));
    check.arg("--noEmit");
    run(check, &folder).await;
    let judged = Judged::start().await;
    let tsx = node_modules.join(".bin/tsx");
    let (args, said) = conformance(&["conformance.ts", "shop"]);
    assert_eq!(judged.passes("shop", &tsx, &args, &folder).await, said);
    matched(&judged.passes("walk", &tsx, &["calls.ts", "walk"], &folder).await);
}
