//! Sets of packages that a project pins: a lock file of npm, a list of requirements of Python.
//!
//! Each is installed once for what it pins, into a folder of `target/tools` whose name is derived from that, so a changed pin is another
//! folder and nothing is ever updated in place. An interrupted download never looks like a whole one.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use super::progress::Progress;
use super::tools::{Found, Why, on, tools_folder};

/// A `package.json` with its lock file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct NpmProject {
    pub name: &'static str,
    pub package: &'static str,
    pub lock: &'static str,
}

/// A `requirements.txt` in which every package has one exact version.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PythonProject {
    pub name: &'static str,
    pub requirements: &'static str,
}

impl fmt::Debug for NpmProject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NpmProject({})", self.name)
    }
}

impl fmt::Debug for PythonProject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PythonProject({})", self.name)
    }
}

impl NpmProject {
    fn folder(self) -> PathBuf {
        tools_folder().join("npm-projects").join(named(self.name, &[self.package, self.lock]))
    }

    pub(super) fn find(self) -> Option<Found> {
        let path = self.folder().join("node_modules");
        path.exists().then_some(Found { path })
    }

    pub(super) fn install(self, npm: &Path, progress: Progress) -> Result<Found, Why> {
        install_whole(&self.folder(), |fresh| {
            for (name, text) in [("package.json", self.package), ("package-lock.json", self.lock)] {
                fs::write(fresh.join(name), text).map_err(on(fresh))?;
            }
            let mut command = Command::new(npm);
            command.args(["ci", "--no-audit", "--no-fund", "--ignore-scripts"]).current_dir(fresh);
            Ok(progress.run(&format!("installing the packages of {} from npm", self.name), &mut command)?)
        })?;
        self.find().ok_or(Why::NotOnPath)
    }
}

impl PythonProject {
    fn folder(self) -> PathBuf {
        tools_folder().join("python").join(named(self.name, &[self.requirements]))
    }

    pub(super) fn find(self) -> Option<Found> {
        let path = self.folder().join("bin").join("python");
        path.exists().then_some(Found { path })
    }

    pub(super) fn install(self, python: &Path, progress: Progress) -> Result<Found, Why> {
        install_whole(&self.folder(), |fresh| {
            let requirements = fresh.join("requirements.txt");
            fs::write(&requirements, self.requirements).map_err(on(fresh))?;
            let step = format!("making a Python environment for {}", self.name);
            progress.run(&step, Command::new(python).args(["-m", "venv"]).arg(fresh))?;
            // By `-m`: the scripts of an environment name the folder in which it was made, and this one is moved when it is whole.
            let mut command = Command::new(fresh.join("bin").join("python"));
            command.args([
                "-m",
                "pip",
                "install",
                "--disable-pip-version-check",
                "--no-input",
                "--only-binary",
                ":all:",
                "-r",
            ]);
            command.arg(&requirements);
            Ok(progress.run(&format!("installing the packages of {} from PyPI", self.name), &mut command)?)
        })?;
        self.find().ok_or(Why::NotOnPath)
    }
}

/// A folder's name that changes with what it holds.
fn named(name: &str, pins: &[&str]) -> String {
    let mut digest = Sha256::new();
    for pin in pins {
        digest.update(pin);
        digest.update([0]);
    }
    let digest: [u8; 32] = digest.finalize().into();
    let short: String = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("{name}-{short}")
}

/// Fills a folder under another name, and gives it its own when it is whole. One process at a time.
fn install_whole(folder: &Path, fill: impl FnOnce(&Path) -> Result<(), Why>) -> Result<(), Why> {
    let above = folder.parent().map_or_else(tools_folder, Path::to_path_buf);
    fs::create_dir_all(&above).map_err(on(&above))?;
    let lock_path = above.join("lock");
    let lock = File::create(&lock_path).map_err(on(&lock_path))?;
    lock.lock().map_err(on(&lock_path))?;
    if folder.exists() {
        return Ok(());
    }
    let fresh = above.join(format!("new-{}", std::process::id()));
    if fresh.exists() {
        fs::remove_dir_all(&fresh).map_err(on(&fresh))?;
    }
    fs::create_dir_all(&fresh).map_err(on(&fresh))?;
    if let Err(error) = fill(&fresh) {
        // The download's own error is the one to tell.
        let _ = fs::remove_dir_all(&fresh);
        return Err(error);
    }
    fs::rename(&fresh, folder).map_err(on(folder))
}
