//! As whom the database runs.
//!
//! PostgreSQL refuses to run as root, and a machine where everybody is root (a
//! container, a CI runner) is an ordinary place to develop. So root runs it as the
//! `postgres` user that its package makes; anybody else runs it as himself.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::unistd::{Uid, User};

/// The user that PostgreSQL's packages make for it.
const POSTGRES_USER: &str = "postgres";

/// Whose processes and files the cluster's are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Account {
    /// The user who runs us.
    Own,
    /// We are root and step down to this user.
    Other { uid: u32, gid: u32 },
}

/// There is no account that may run PostgreSQL.
#[derive(Debug, thiserror::Error)]
pub enum AccountError {
    #[error(
        "PostgreSQL does not run as root, and there is no user `{POSTGRES_USER}` to run it as: \
         make one (useradd --system {POSTGRES_USER}), or run this as an ordinary user"
    )]
    NoSuchUser,
    #[error("cannot look up the user `{POSTGRES_USER}`: {0}")]
    LookUp(#[from] nix::Error),
}

impl Account {
    /// The account a cluster of ours runs under.
    pub fn for_cluster() -> Result<Self, AccountError> {
        if !Uid::effective().is_root() {
            return Ok(Account::Own);
        }
        let user = User::from_name(POSTGRES_USER)?.ok_or(AccountError::NoSuchUser)?;
        Ok(Account::Other { uid: user.uid.as_raw(), gid: user.gid.as_raw() })
    }

    /// The user id that owns the cluster's files.
    pub fn uid(self) -> u32 {
        match self {
            Account::Own => Uid::effective().as_raw(),
            Account::Other { uid, .. } => uid,
        }
    }

    /// A command that will run under this account, in `folder`, in a process group of its own (a
    /// Ctrl-C is for us, who then stop it in order), without the caller's PostgreSQL settings.
    pub fn command(self, program: &Path, folder: &Path) -> Command {
        let mut command = Command::new(program);
        if let Account::Other { uid, gid } = self {
            // The standard library drops root's supplementary groups along with the user id.
            command.uid(uid).gid(gid);
        }
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PG") {
                command.env_remove(name);
            }
        }
        command.current_dir(folder).process_group(0).env("LC_ALL", "C");
        command
    }

    /// Whether this account can work in `folder`: every folder above lets it pass.
    pub fn can_enter(self, folder: &Path) -> bool {
        match self {
            Account::Own => fs::read_dir(folder).is_ok(),
            // Asked of the system itself, so that ACLs and mounts have their say.
            Account::Other { .. } => self
                .command(Path::new("/bin/sh"), Path::new("/"))
                .args(["-c", "cd -- \"$1\"", "sh"])
                .arg(folder)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|status| status.success()),
        }
    }

    /// Makes `folder` for this account alone, or checks that it is one already: a folder that
    /// somebody else prepared in a shared place is refused.
    pub fn make_private_folder(self, folder: &Path) -> io::Result<()> {
        match fs::DirBuilder::new().mode(0o700).create(folder) {
            Ok(()) => self.give(folder)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        let found = fs::symlink_metadata(folder)?;
        if !found.is_dir() {
            return Err(io::Error::other("it is in the way and is no folder"));
        }
        if found.uid() != self.uid() {
            return Err(io::Error::other(format!(
                "it belongs to the user with id {}, not to {}",
                found.uid(),
                self.uid()
            )));
        }
        if found.permissions().mode() & 0o077 != 0 {
            fs::set_permissions(folder, fs::Permissions::from_mode(0o700))?;
        }
        Ok(())
    }

    /// Hands a file or folder of ours to this account.
    pub fn give(self, path: &Path) -> io::Result<()> {
        match self {
            Account::Own => Ok(()),
            Account::Other { uid, gid } => chown(path, Some(uid), Some(gid)),
        }
    }
}
