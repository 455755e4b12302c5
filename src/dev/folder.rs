//! The folder of a cluster: where it is, whose it is, and what lies in it beside the data.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::account::Account;
use super::cluster::{ClusterError, ClusterOptions, on};
use super::progress::Progress;

/// A log beyond this begins anew.
const LOG_LIMIT: u64 = 8 << 20;

/// The folder to use: the one asked for, or where PostgreSQL's user cannot get there (a checkout
/// under `/root`), a folder of this checkout's own under `/var/tmp`.
pub(super) fn place(options: &ClusterOptions, account: Account, progress: Progress) -> Result<PathBuf, ClusterError> {
    let wanted = options.data_dir.as_path();
    let parent = match wanted.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(on(parent))?;
    let parent = fs::canonicalize(parent).map_err(on(parent))?;
    let name = wanted.file_name().unwrap_or("postgres".as_ref());
    let wanted = parent.join(name);
    if account.can_enter(&parent) {
        account.make_private_folder(&wanted).map_err(on(&wanted))?;
        return Ok(wanted);
    }
    let key = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_URL, wanted.as_os_str().as_encoded_bytes());
    let elsewhere = PathBuf::from(format!("/var/tmp/opsmantik-{}", key.simple()));
    account.make_private_folder(&elsewhere).map_err(on(&elsewhere))?;
    if !options.keep {
        return Ok(elsewhere);
    }
    let mut note = wanted.into_os_string();
    note.push(".location");
    fs::write(&note, format!("{}\n", elsewhere.display())).map_err(on(Path::new(&note)))?;
    progress.say(format!(
        "  the database lives in {}: PostgreSQL's user may not enter {}",
        elsewhere.display(),
        parent.display()
    ));
    Ok(elsewhere)
}

/// Makes this process the owner of the folder, or says who is.
pub(super) fn take_lock(folder: &Path) -> Result<File, ClusterError> {
    let path = folder.join("lock");
    let mut lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(on(&path))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut owner = String::new();
            lock.read_to_string(&mut owner).map_err(on(&path))?;
            return Err(ClusterError::InUse { folder: folder.to_path_buf(), owner: owner.trim().to_owned() });
        }
        Err(TryLockError::Error(source)) => return Err(on(&path)(source)),
    }
    lock.set_len(0).map_err(on(&path))?;
    writeln!(lock, "process {}", std::process::id()).map_err(on(&path))?;
    Ok(lock)
}

/// The superuser's password: made once, kept beside the data it opens.
pub(super) fn password(folder: &Path, account: Account) -> Result<String, ClusterError> {
    let path = folder.join("password");
    if folder.join("data").exists() {
        let password = fs::read_to_string(&path).map_err(on(&path))?;
        return Ok(password.trim().to_owned());
    }
    // A version 4 UUID: 122 random bits, and nothing that a URL would have to escape.
    let password = uuid::Uuid::new_v4().simple().to_string();
    let mut file =
        OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&path).map_err(on(&path))?;
    writeln!(file, "{password}").map_err(on(&path))?;
    account.give(&path).map_err(on(&path))?;
    Ok(password)
}

/// The log, at its end.
pub(super) fn open_log(folder: &Path, account: Account) -> Result<File, ClusterError> {
    let path = folder.join("log");
    let mut log = OpenOptions::new().create(true).append(true).read(true).mode(0o600).open(&path).map_err(on(&path))?;
    account.give(&path).map_err(on(&path))?;
    if log.metadata().map_err(on(&path))?.len() > LOG_LIMIT {
        log.set_len(0).map_err(on(&path))?;
    }
    log.seek(SeekFrom::End(0)).map_err(on(&path))?;
    Ok(log)
}

/// What was written since the log was opened.
pub(super) fn read_log(folder: &Path, mut log: File) -> String {
    let mut text = Vec::new();
    match log.read_to_end(&mut text) {
        Ok(_) => String::from_utf8_lossy(&text).into_owned(),
        Err(error) => format!("({} cannot be read: {error})", folder.join("log").display()),
    }
}
