//! A real browser: headless Chromium with its WebDriver server, in a process group of its own.
//!
//! A shell kills the group when a pipe closes, so nothing of it outlives the test, however that ends. A browser can be
//! killed in the middle and opened again on the same profile.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use fantoccini::actions::{InputSource, MouseActions, PointerAction, WheelAction, WheelActions};
use fantoccini::wd::{Capabilities, WebDriverCompatibleCommand};
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use opsmantik::dev::tools::{Found, Missing, Tool, require, skip_or_fail};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, SemaphorePermit};
use uuid::Uuid;

/// What the browser calls itself: its own name would be that of a headless one.
pub const AGENT: &str =
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 Safari/537.36";
/// Where the browser believes to be.
pub const TIME_ZONE: &str = "Europe/Istanbul";
/// Everything that the tests wait for happens within this.
const PATIENCE: Duration = Duration::from_secs(30);
/// A browser that hangs answers no command, and no limit of WebDriver's ends the wait for it. It is killed when it has lived for so many seconds, and
/// whoever waits for it gets an error.
const LIFE_SECONDS: u32 = 240;
/// Chromium does not always come up on a busy machine; a healthy one does within this.
const START: Duration = Duration::from_secs(60);
const STARTS: u32 = 3;

/// Waits until there is what is looked for.
pub async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The programs; a browser at a time, because one keeps a small machine busy.
pub struct Tools {
    chromium: PathBuf,
    driver: PathBuf,
    _turn: SemaphorePermit<'static>,
}

impl Tools {
    /// None if the test has to be skipped, which is said then.
    pub async fn find() -> Option<Self> {
        static TURN: Semaphore = Semaphore::const_new(1);
        let turn = TURN.acquire().await.expect("the semaphore is never closed");
        let look = || Ok::<_, Missing>((require(Tool::Chromium)?, require(Tool::Chromedriver)?));
        match tokio::task::spawn_blocking(look).await.expect("looking for a program does not panic") {
            Ok((Found { path: chromium }, Found { path: driver })) => Some(Self { chromium, driver, _turn: turn }),
            Err(missing) => {
                skip_or_fail(&missing);
                None
            }
        }
    }

    /// A browser on a profile, with preferences of its own, that has shown a page.
    pub async fn open(&self, profile: &Profile, preferences: Value) -> Chromium {
        for start in 1..=STARTS {
            let started = tokio::time::timeout(START, self.start(profile, &preferences)).await;
            match started {
                Ok(Ok(browser)) => return browser,
                Ok(Err(error)) => eprintln!("start {start} of the browser: {error}"),
                Err(_) => eprintln!("start {start} of the browser: not within {START:?}"),
            }
        }
        panic!("the browser does not start");
    }

    async fn start(&self, profile: &Profile, preferences: &Value) -> anyhow::Result<Chromium> {
        // $0 is the driver. The shell leads the group; `kill 0` is the group, and itself the last of it.
        let script = format!(r#""$0" --port=0 </dev/null & (sleep {LIFE_SECONDS}; kill -9 0) & read -r _; kill -9 0"#);
        let mut group = Command::new("sh")
            .args(["-c", &script])
            .arg(&self.driver)
            .env("TZ", TIME_ZONE)
            .env("TMPDIR", profile.temporary())
            .env("XDG_CONFIG_HOME", profile.0.join("config"))
            .env("XDG_CACHE_HOME", profile.0.join("cache"))
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let output = group.stdout.take().context("the shell's output is a pipe")?;
        // From here on the group ends with it.
        let group = Group(group);
        let port = tokio::task::spawn_blocking(move || driver_port(BufReader::new(output))).await?;
        let port = port.context("the driver does not say its port")?;
        let argument = |name: &str, value: &dyn std::fmt::Display| format!("--{name}={value}");
        let mut arguments: Vec<String> = [
            "headless",
            "no-sandbox",
            "disable-gpu",
            "disable-quic",
            "no-first-run",
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
            "disable-dev-shm-usage",
            "noerrdialogs",
        ]
        .iter()
        .map(|name| format!("--{name}"))
        .collect();
        arguments.push(argument("user-data-dir", &profile.0.join("chromium").display()));
        arguments.push(argument("user-agent", &AGENT));
        arguments.push(argument("lang", &"en-US"));
        arguments.push(argument("window-size", &"1280,900"));
        let capabilities = json!({
            "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"binary": self.chromium, "args": arguments, "prefs": preferences},
        });
        let capabilities: Capabilities = serde_json::from_value(capabilities)?;
        let driver = format!("http://127.0.0.1:{port}");
        let client = ClientBuilder::new(HttpConnector::new()).capabilities(capabilities).connect(&driver).await?;
        client.goto("about:blank").await?;
        Ok(Chromium { client, _group: group })
    }
}

/// The driver takes a free port and says which.
fn driver_port(output: impl BufRead) -> Option<u16> {
    let mut lines = output.lines().map_while(Result::ok);
    let line = lines.find(|line| line.contains("started successfully on port"))?;
    line.trim_end_matches('.').rsplit(' ').next()?.parse().ok()
}

/// A user's folder of the browser, removed in the end.
pub struct Profile(PathBuf);

impl Profile {
    /// Directly in `/tmp`: the browser makes a socket some folders below, whose path must not be long.
    pub fn new() -> Self {
        let profile = Self(Path::new("/tmp").join(format!("om-browser-{:.12}", Uuid::new_v4().simple().to_string())));
        std::fs::create_dir_all(profile.temporary()).expect("a folder in /tmp");
        profile
    }

    /// For what the browser leaves lying about when it is killed.
    fn temporary(&self) -> PathBuf {
        self.0.join("tmp")
    }

    /// Whether any file of local storage on disk holds this text.
    pub fn has_on_disk(&self, text: &str) -> bool {
        let folder = self.0.join("chromium/Default/Local Storage/leveldb");
        let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let holds = |path: &Path| {
            std::fs::read(path).is_ok_and(|bytes| bytes.windows(text.len()).any(|window| window == text.as_bytes()))
        };
        files.map(|file| file.path()).any(|path| holds(&path))
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        // A process that was killed just now may still be writing.
        for _ in 0..20 {
            match std::fs::remove_dir_all(&self.0) {
                Ok(()) => return,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

/// A browser.
pub struct Chromium {
    pub client: Client,
    _group: Group,
}

impl Chromium {
    /// `kill -9` of all its processes at once.
    pub fn kill(self) {
        drop(self);
    }

    pub async fn open(&self, url: &str) {
        self.client.goto(url).await.expect("the page opens");
    }

    /// Runs JavaScript, the body of a function.
    pub async fn run(&self, script: &str) -> Value {
        self.client.execute(script, Vec::new()).await.expect("the test's own script")
    }

    /// The ids of the events that the tracker still keeps for the site.
    pub async fn outbox(&self) -> Vec<String> {
        let keys = self.run("return Object.keys(localStorage).filter((k) => k.startsWith('om:demo:q:'))").await;
        let id = |key: &Value| key.as_str().and_then(|key| key.rsplit(':').next()).map(str::to_owned);
        let mut ids: Vec<String> = keys.as_array().into_iter().flatten().filter_map(id).collect();
        ids.sort();
        ids
    }

    /// Waits until the tracker keeps nothing more.
    pub async fn sent_all(&self) {
        eventually("an empty outbox", async || self.outbox().await.is_empty().then_some(())).await;
    }

    /// Turns the wheel until the page ends.
    pub async fn scroll_to_the_end(&self) {
        let scroll = WheelAction::Scroll { duration: None, x: 400, y: 400, delta_x: 0, delta_y: 20_000 };
        self.client.perform_actions(WheelActions::new("wheel".to_owned()).then(scroll)).await.expect("a wheel");
        let end = "return scrollY + innerHeight >= document.documentElement.scrollHeight - 1";
        eventually("the end of the page", async || (self.run(end).await == true).then_some(())).await;
    }

    /// Rests with the mouse on an element at the top of the page, long enough to be an intent.
    pub async fn hover(&self, selector: &str) {
        self.run("scrollTo(0, 0)").await;
        let element = self.client.find(Locator::Css(selector)).await.expect("something to rest on");
        let over = PointerAction::MoveToElement { element, duration: None, x: 0.0, y: 0.0 };
        let rest = PointerAction::Pause { duration: Duration::from_millis(800) };
        let mouse = MouseActions::new("mouse".to_owned()).then(over).then(rest);
        self.client.perform_actions(mouse).await.expect("a mouse");
    }

    /// A command of the DevTools protocol.
    pub async fn devtools(&self, command: &str, parameters: Value) {
        let body = json!({"cmd": command, "params": parameters});
        self.vendor("goog/cdp/execute", body).await;
    }

    /// Pulls the plug of this tab, or puts it back.
    pub async fn offline(&self, offline: bool) {
        self.devtools("Network.enable", json!({})).await;
        let conditions = json!({"offline": offline, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1});
        self.devtools("Network.emulateNetworkConditions", conditions).await;
    }

    /// The errors on the console since the last look.
    pub async fn errors(&self) -> Vec<Value> {
        let log = self.vendor("se/log", json!({"type": "browser"})).await;
        let entries = log.as_array().cloned().unwrap_or_default();
        entries.into_iter().filter(|entry| entry["level"] == "SEVERE").collect()
    }

    async fn vendor(&self, path: &'static str, body: Value) -> Value {
        self.client.issue_cmd(Vendor { path, body }).await.expect("the driver knows the command")
    }
}

/// The driver, the browser and all its processes, and the shell that leads them.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // The shell is killed with its group; what is left to do is to reap it.
        let _ = self.0.wait();
    }
}

/// A command that only Chromium's driver has.
#[derive(Debug)]
struct Vendor {
    path: &'static str,
    body: Value,
}

impl WebDriverCompatibleCommand for Vendor {
    fn endpoint(&self, base: &url::Url, session: Option<&str>) -> Result<url::Url, url::ParseError> {
        base.join(&format!("session/{}/{}", session.unwrap_or_default(), self.path))
    }

    fn method_and_body(&self, _: &url::Url) -> (http::Method, Option<String>) {
        (http::Method::POST, Some(self.body.to_string()))
    }
}
