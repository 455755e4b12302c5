//! Installs what the machine lacks, by the machine's own package manager.
//!
//! apt as root or by sudo, or Homebrew. It asks for a password only where somebody
//! sits at a terminal. Where neither works, the error says what to type by hand. A package
//! that would start a server for the whole machine can be unpacked instead, into a folder of ours.

use std::io::IsTerminal;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard};

use nix::unistd::Uid;

use super::progress::{CommandError, Progress};

/// Seconds apt waits for another apt to finish.
const APT_LOCK_SECONDS: u32 = 300;

/// Debian starts a server for all users as soon as its package is installed. We run our own, so
/// the package is told not to; a cluster that is there already is left alone, and so is the
/// machine's own choice for later: the file is gone when apt is done.
const APT_SCRIPT: &str = r#"
set -e
export DEBIAN_FRONTEND=noninteractive
folder=/etc/postgresql-common/createcluster.d
note=$folder/opsmantik-install-$$.conf
trap 'rm -f "$note"; rmdir "$folder" /etc/postgresql-common 2>/dev/null || true' EXIT
mkdir -p "$folder"
echo 'create_main_cluster = false' > "$note"
lock=$1
shift
# Where this fails (offline, or another update is under way) the lists may still do; apt-get install tells.
apt-get update -o DPkg::Lock::Timeout="$lock" || echo 'apt-get update failed'
apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout="$lock" "$@"
"#;

/// Fetches a package and unpacks it here. No maintainer's script of it runs, so nothing of it is started or enabled.
const UNPACK_SCRIPT: &str = r#"
set -e
apt-get download "$1"
dpkg-deb -x ./*.deb .
rm -f ./*.deb
"#;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Held from looking for a program until it is installed: in between, a program may be unpacked
/// already, and its user or its libraries not be there yet.
pub(super) fn one_at_a_time() -> MutexGuard<'static, ()> {
    // A test that panicked while it held this has spoiled nothing.
    ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What a piece of software is called where.
#[derive(Clone, Copy, Debug)]
pub struct Packages {
    /// What it is, for people.
    pub what: &'static str,
    /// Debian, Ubuntu.
    pub apt: &'static [&'static str],
    /// Homebrew formulae; none where Homebrew does not have it as a formula.
    pub brew: &'static [&'static str],
}

/// Why a package could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error("{what} is missing, and there is no way to install it from here. By hand: {by_hand}")]
    NoWay { what: &'static str, by_hand: String },
    #[error("{what} is missing, and installing it failed. By hand: {by_hand}\n{source}")]
    Failed { what: &'static str, by_hand: String, source: CommandError },
}

impl Packages {
    /// Installs them, showing how it goes.
    pub fn install(&self, progress: Progress) -> Result<(), InstallError> {
        let step = format!("installing {}", self.what);
        let failed = |source| InstallError::Failed { what: self.what, by_hand: self.by_hand(), source };
        if Self::are_debians() {
            let mut command = match privilege(progress) {
                Some(Privilege::Root) => Command::new("sh"),
                Some(Privilege::Sudo) => {
                    let mut sudo = Command::new("sudo");
                    sudo.args(["-n", "sh"]);
                    sudo
                }
                None => return Err(self.no_way()),
            };
            command.args(["-c", APT_SCRIPT, "sh"]).arg(APT_LOCK_SECONDS.to_string()).args(self.apt);
            return progress.run(&step, &mut command).map_err(failed);
        }
        if !self.brew.is_empty() && !Uid::effective().is_root() && runs("brew", &["--version"]) {
            let mut command = Command::new("brew");
            command.env("HOMEBREW_NO_AUTO_UPDATE", "1").arg("install").args(self.brew);
            return progress.run(&step, &mut command).map_err(failed);
        }
        Err(self.no_way())
    }

    /// Whether this machine's packages are Debian's.
    pub(super) fn are_debians() -> bool {
        runs("apt-get", &["--version"])
    }

    /// Unpacks the one Debian package of this name into a folder, as whoever we are.
    pub(super) fn unpack(&self, package: &str, folder: &Path, progress: Progress) -> Result<(), InstallError> {
        let unpack = || {
            let mut command = Command::new("sh");
            command.args(["-c", UNPACK_SCRIPT, "sh", package]).current_dir(folder);
            progress.run(&format!("unpacking {}", self.what), &mut command)
        };
        let failed = |source| InstallError::Failed { what: self.what, by_hand: self.by_hand(), source };
        let Err(error) = unpack() else { return Ok(()) };
        // The lists of a fresh machine are empty.
        let mut update = match privilege(progress) {
            Some(Privilege::Root) => Command::new("apt-get"),
            Some(Privilege::Sudo) => {
                let mut sudo = Command::new("sudo");
                sudo.args(["-n", "apt-get"]);
                sudo
            }
            None => return Err(failed(error)),
        };
        update.args(["update", "-o", &format!("DPkg::Lock::Timeout={APT_LOCK_SECONDS}")]);
        progress.run("asking Debian what packages there are", &mut update).map_err(failed)?;
        unpack().map_err(failed)
    }

    fn no_way(&self) -> InstallError {
        InstallError::NoWay { what: self.what, by_hand: self.by_hand() }
    }

    fn by_hand(&self) -> String {
        let apt = format!("`sudo apt-get install {}` (Debian, Ubuntu)", self.apt.join(" "));
        if self.brew.is_empty() {
            return apt;
        }
        format!("{apt} or `brew install {}` (macOS)", self.brew.join(" "))
    }
}

enum Privilege {
    Root,
    Sudo,
}

fn privilege(progress: Progress) -> Option<Privilege> {
    if Uid::effective().is_root() {
        return Some(Privilege::Root);
    }
    if runs("sudo", &["-n", "true"]) {
        return Some(Privilege::Sudo);
    }
    if std::env::var_os("CI").is_some() || !std::io::stdin().is_terminal() {
        return None;
    }
    progress.say("  sudo may ask for your password, to install a package:");
    let granted = Command::new("sudo").arg("-v").status();
    granted.is_ok_and(|status| status.success()).then_some(Privilege::Sudo)
}

/// Whether a program is there and succeeds.
fn runs(program: &str, arguments: &[&str]) -> bool {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
