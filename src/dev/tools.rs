//! The programs that some tests need: a browser, Node, Python, NATS, and packages of npm and PyPI.
//!
//! Each is looked for, and installed if it is not there: system programs by the
//! machine's package manager, npm packages of one exact version into
//! `target/tools/npm`, where nothing else is touched. A test that cannot have its
//! tool says so loudly and is skipped; with `CI=true` it fails, so that no build is
//! green for want of tools.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::packages::{InstallError, Packages, one_at_a_time};
use super::progress::{CommandError, Progress, write_stderr};
use super::projects::{NpmProject, PythonProject};

/// Something a test needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// Chromium or Chrome.
    Chromium,
    /// The WebDriver server that fits it.
    Chromedriver,
    Node,
    Npm,
    /// Python 3 that can make a virtual environment.
    Python,
    /// A pooler of connections to PostgreSQL.
    Pgbouncer,
    /// The NATS server.
    NatsServer,
    /// A package of npm, of one exact version.
    NpmPackage(NpmPackage),
    /// Everything that a lock file of npm names.
    NpmProject(NpmProject),
    /// A virtual environment of Python with pinned packages.
    PythonProject(PythonProject),
}

/// A package of npm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NpmPackage {
    pub name: &'static str,
    pub version: &'static str,
    /// The program in it that is wanted; none if it is a library.
    pub program: Option<&'static str>,
}

/// Lints the protocol's definitions.
pub const BUF: Tool = Tool::NpmPackage(NpmPackage { name: "@bufbuild/buf", version: "1.75.0", program: Some("buf") });

/// QStash's own client library: the judge of our signatures and our publishing.
pub const QSTASH: Tool = Tool::NpmPackage(NpmPackage { name: "@upstash/qstash", version: "2.12.0", program: None });

/// Where a tool is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The program; for a library of npm its own folder, which `require` takes; for a project of npm its `node_modules`, and for one
    /// of Python the interpreter.
    pub path: PathBuf,
}

/// A tool that is not there and could not be installed.
#[derive(Debug, thiserror::Error)]
#[error("{tool:?} is not available: {why}")]
pub struct Missing {
    pub tool: Tool,
    #[source]
    pub why: Box<Why>,
}

/// Why it is not.
#[derive(Debug, thiserror::Error)]
pub enum Why {
    #[error(transparent)]
    Install(#[from] InstallError),
    #[error(transparent)]
    Npm(#[from] CommandError),
    #[error("it was installed, but its program is still not on the PATH")]
    NotOnPath,
    #[error("{0} is missing, which is needed to install it")]
    Needs(Missing),
    #[error("cannot use {path}: {source}")]
    Folder { path: PathBuf, source: io::Error },
}

/// Finds a tool, or installs it.
pub fn require(tool: Tool) -> Result<Found, Missing> {
    let _alone = one_at_a_time();
    find_or_install(tool, Progress::stderr())
}

/// Says that the test that called is skipped, and why; the test then returns.
///
/// # Panics
///
/// With `CI=true`: there a tool that is missing is a failure.
pub fn skip_or_fail(missing: &Missing) {
    let test = std::thread::current();
    let test = test.name().unwrap_or("a test").to_owned();
    if std::env::var("CI").is_ok_and(|value| value == "true" || value == "1") {
        panic!("{test} cannot run: {missing}");
    }
    write_stderr(&format!("\n*** SKIPPED {test}\n*** {missing}\n*** With CI=true this is a failure.\n\n"));
}

fn find_or_install(tool: Tool, progress: Progress) -> Result<Found, Missing> {
    if let Some(found) = find(tool) {
        return Ok(found);
    }
    let missing = |why| Missing { tool, why: Box::new(why) };
    match tool {
        Tool::NpmPackage(package) => {
            let npm = find_or_install(Tool::Npm, progress).map_err(|needs| missing(Why::Needs(needs)))?;
            package.install(&npm.path, progress).map_err(missing)
        }
        Tool::NpmProject(project) => {
            let npm = find_or_install(Tool::Npm, progress).map_err(|needs| missing(Why::Needs(needs)))?;
            project.install(&npm.path, progress).map_err(missing)
        }
        Tool::PythonProject(project) => {
            let python = find_or_install(Tool::Python, progress).map_err(|needs| missing(Why::Needs(needs)))?;
            project.install(&python.path, progress).map_err(missing)
        }
        // Debian's package would start a server for everybody, on all addresses, now and after every boot.
        Tool::NatsServer if Packages::are_debians() => unpack_nats(progress).map_err(missing),
        Tool::NatsServer => install(tool, &NATS_PACKAGES, progress),
        Tool::Python => install(tool, &PYTHON_PACKAGES, progress),
        Tool::Pgbouncer => install(tool, &PGBOUNCER_PACKAGES, progress),
        Tool::Chromium | Tool::Chromedriver => install(tool, &CHROMIUM_PACKAGES, progress),
        Tool::Node | Tool::Npm => install(tool, &NODE_PACKAGES, progress),
    }
}

const CHROMIUM_PACKAGES: Packages =
    Packages { what: "Chromium and its driver", apt: &["chromium", "chromium-driver"], brew: &[] };

const NODE_PACKAGES: Packages = Packages { what: "Node and npm", apt: &["nodejs", "npm"], brew: &["node"] };

const PYTHON_PACKAGES: Packages =
    Packages { what: "Python with venv", apt: &["python3", "python3-venv"], brew: &["python3"] };

const PGBOUNCER_PACKAGES: Packages = Packages { what: "PgBouncer", apt: &["pgbouncer"], brew: &["pgbouncer"] };
const NATS_PACKAGES: Packages = Packages { what: "the NATS server", apt: &["nats-server"], brew: &["nats-server"] };

/// Where it is unpacked.
fn nats_folder() -> PathBuf {
    tools_folder().join("nats-server")
}

fn unpack_nats(progress: Progress) -> Result<Found, Why> {
    let folder = nats_folder();
    let above = tools_folder();
    fs::create_dir_all(&above).map_err(on(&above))?;
    let lock_path = above.join("lock");
    let lock = File::create(&lock_path).map_err(on(&lock_path))?;
    lock.lock().map_err(on(&lock_path))?;
    let path = folder.join("usr/sbin/nats-server");
    if path.exists() {
        return Ok(Found { path });
    }
    // Under another name first: half a package never looks like a tool.
    let fresh = above.join(format!("new-{}", std::process::id()));
    fs::create_dir_all(&fresh).map_err(on(&fresh))?;
    if let Err(error) = NATS_PACKAGES.unpack("nats-server", &fresh, progress) {
        // Why it could not be unpacked is what there is to tell.
        let _ = fs::remove_dir_all(&fresh);
        return Err(error.into());
    }
    fs::rename(&fresh, &folder).map_err(on(&folder))?;
    if path.exists() { Ok(Found { path }) } else { Err(Why::NotOnPath) }
}

fn install(tool: Tool, packages: &Packages, progress: Progress) -> Result<Found, Missing> {
    let missing = |why| Missing { tool, why: Box::new(why) };
    packages.install(progress).map_err(|error| missing(error.into()))?;
    find(tool).ok_or_else(|| missing(Why::NotOnPath))
}

/// Looks, and installs nothing.
fn find(tool: Tool) -> Option<Found> {
    let names: &[&str] = match tool {
        Tool::Chromium => &["chromium", "chromium-browser", "google-chrome"],
        Tool::Chromedriver => &["chromedriver"],
        Tool::Node => &["node"],
        Tool::Npm => &["npm"],
        Tool::Python => &["python3"],
        Tool::Pgbouncer => &["pgbouncer"],
        Tool::NatsServer => &["nats-server"],
        Tool::NpmPackage(package) => {
            let path = package.path_in(&package.folder());
            return path.exists().then_some(Found { path });
        }
        Tool::NpmProject(project) => return project.find(),
        Tool::PythonProject(project) => return project.find(),
    };
    let path = std::env::var_os("PATH")?;
    let mut places: Vec<PathBuf> =
        std::env::split_paths(&path).flat_map(|folder| names.iter().map(move |name| folder.join(name))).collect();
    if tool == Tool::Pgbouncer {
        // Debian puts it where only root's PATH leads.
        places.push(PathBuf::from("/usr/sbin/pgbouncer"));
    }
    if tool == Tool::NatsServer {
        places.extend([nats_folder().join("usr/sbin/nats-server"), PathBuf::from("/usr/sbin/nats-server")]);
    }
    if tool == Tool::Chromium {
        for app in ["Google Chrome", "Chromium"] {
            let inside = format!("/Applications/{app}.app/Contents/MacOS/{app}");
            places.push(PathBuf::from(inside));
        }
    }
    // Debian has a Python without what makes environments.
    let complete = |place: &PathBuf| tool != Tool::Python || makes_environments(place);
    let path = places.into_iter().find(|place| place.is_file() && complete(place))?;
    Some(Found { path })
}

fn makes_environments(python: &Path) -> bool {
    let asked = Command::new(python).args(["-c", "import venv, ensurepip"]).stdin(Stdio::null()).output();
    asked.is_ok_and(|output| output.status.success())
}

impl NpmPackage {
    /// The folder of this version, such as `target/tools/npm/@bufbuild/buf@1.75.0`.
    fn folder(self) -> PathBuf {
        npm_folder().join(format!("{}@{}", self.name, self.version))
    }

    fn path_in(self, folder: &Path) -> PathBuf {
        let modules = folder.join("node_modules");
        match self.program {
            Some(program) => modules.join(".bin").join(program),
            None => modules.join(self.name),
        }
    }

    fn install(self, npm: &Path, progress: Progress) -> Result<Found, Why> {
        let folder = self.folder();
        let above = folder.parent().map_or_else(npm_folder, Path::to_path_buf);
        fs::create_dir_all(&above).map_err(on(&above))?;
        let lock_path = npm_folder().join("lock");
        let lock = File::create(&lock_path).map_err(on(&lock_path))?;
        lock.lock().map_err(on(&lock_path))?;
        let path = self.path_in(&folder);
        if path.exists() {
            return Ok(Found { path });
        }
        // Under another name first: an interrupted download never looks like a tool.
        let fresh = above.join(format!("new-{}", std::process::id()));
        fs::create_dir_all(&fresh).map_err(on(&fresh))?;
        let name = format!("{}@{}", self.name, self.version);
        let mut command = Command::new(npm);
        command
            .args(["install", "--prefix"])
            .arg(&fresh)
            .args(["--no-save", "--no-audit", "--no-fund", "--ignore-scripts"])
            .arg(&name)
            .current_dir(&fresh);
        let installed = progress.run(&format!("installing {name} from npm"), &mut command);
        if let Err(error) = installed {
            // The download's own error is the one to tell.
            let _ = fs::remove_dir_all(&fresh);
            return Err(error.into());
        }
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(on(&folder))?;
        }
        fs::rename(&fresh, &folder).map_err(on(&folder))?;
        match path.exists() {
            true => Ok(Found { path }),
            false => Err(Why::NotOnPath),
        }
    }
}

fn npm_folder() -> PathBuf {
    tools_folder().join("npm")
}

/// Beside the build, wherever that is.
pub(super) fn tools_folder() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let package = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let package = package.unwrap_or_default();
    let target = target.unwrap_or_else(|| PathBuf::from("target"));
    package.join(target).join("tools")
}

pub(super) fn on(path: &Path) -> impl Fn(io::Error) -> Why + use<> {
    let path = path.to_path_buf();
    move |source| Why::Folder { path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_installed_once_and_found_in_its_own_folder() {
        let buf = match require(BUF) {
            Ok(found) => found,
            Err(missing) => return skip_or_fail(&missing),
        };
        assert!(buf.path.ends_with("@bufbuild/buf@1.75.0/node_modules/.bin/buf"));
        let output = Command::new(&buf.path).arg("--version").output();
        let output = output.expect("an installed program runs");
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "1.75.0");
        assert_eq!(require(BUF).expect("it is there now"), buf);
    }

    #[test]
    fn a_package_that_does_not_exist_is_missing_and_says_why() {
        let tool = Tool::NpmPackage(NpmPackage {
            name: "@bufbuild/buf",
            version: "0.0.0-no-such-version",
            program: Some("buf"),
        });
        let missing = require(tool).expect_err("there is no such version");
        assert!(missing.to_string().contains("0.0.0-no-such-version"), "{missing}");
        assert_eq!(find(tool), None, "and leaves nothing that looks like it");
    }
}
