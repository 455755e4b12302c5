//! Sees to it that a cluster never outlives its owner.
//!
//! A database that goes on after `kill -9` of whoever started it holds a port, a
//! folder and memory that nobody will ever free. So a small shell waits beside it on
//! a pipe that the owner holds open. However the owner ends, the system closes the
//! pipe; the shell then stops the database and, if the cluster was a throw-away one,
//! removes its folder.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

/// `$1` the cluster's folder, `$2` the signal that stops it, `$3` `keep` or `remove`.
///
/// A pid is only signalled while PostgreSQL's own file names it, so that a cluster that was
/// started anew in the meantime is left alone. Waiting goes by that file too: where nobody reaps
/// orphans, a pid stays for ever.
const SCRIPT: &str = r#"
trap '' HUP INT TERM
pid=
while read -r word value; do
  case $word in
    started) pid=$value ;;
    stopped) pid=none ;;
  esac
done
named() { [ "$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null)" = "$pid" ]; }
if [ -z "$pid" ] && [ "$3" = remove ]; then
  sleep 1
  pid=$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null)
fi
case $pid in
  '' | none) ;;
  *)
    named "$1" && kill -s "$2" "$pid" 2>/dev/null
    tries=0
    while named "$1" && kill -0 "$pid" 2>/dev/null && [ $tries -lt 150 ]; do
      tries=$((tries + 1))
      if [ $tries = 100 ]; then kill -s QUIT "$pid" 2>/dev/null; fi
      sleep 0.1
    done
    ;;
esac
if [ "$3" = remove ]; then
  tries=0
  while [ -e "$1" ] && [ $tries -lt 50 ]; do
    rm -rf "$1" 2>/dev/null && break
    tries=$((tries + 1))
    sleep 0.1
  done
fi
"#;

/// The shell beside a cluster.
#[derive(Debug)]
pub(super) struct Watchdog {
    shell: Child,
    pipe: Option<ChildStdin>,
}

impl Watchdog {
    /// Starts watching this process for the cluster in `folder`.
    pub fn start(folder: &Path, keep: bool) -> io::Result<Self> {
        let (signal, fate) = if keep { ("INT", "keep") } else { ("QUIT", "remove") };
        let mut shell = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "opsmantik-watchdog"])
            .arg(folder)
            .args([signal, fate])
            .current_dir("/")
            // A group of its own, and nobody's stdout: neither a Ctrl-C nor a reader that waits
            // for the end of our output may be kept waiting by it.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let pipe = shell.stdin.take();
        Ok(Watchdog { shell, pipe })
    }

    /// Tells which process to stop should we die.
    pub fn started(&mut self, pid: u32) -> io::Result<()> {
        self.tell(&format!("started {pid}\n"))
    }

    /// The database is stopped: the watchdog cleans up and ends.
    pub fn stopped(mut self) -> io::Result<()> {
        self.tell("stopped\n")?;
        drop(self.pipe.take());
        self.shell.wait().map(drop)
    }

    fn tell(&mut self, line: &str) -> io::Result<()> {
        match &mut self.pipe {
            Some(pipe) => pipe.write_all(line.as_bytes()),
            None => Ok(()),
        }
    }
}
