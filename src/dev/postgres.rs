//! Finds PostgreSQL's server programs, or installs them.
//!
//! A client alone is often on the PATH while the server's programs lie in a folder
//! of their own that is on nobody's PATH, several versions side by side. A folder
//! counts only if `postgres`, `initdb` and `pg_ctl` are all in it, they run, and
//! the version is recent enough. The newest wins, unless `OPSMANTIK_PG_BIN` names
//! the folder to use.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::packages::{InstallError, Packages, one_at_a_time};
use super::progress::Progress;

/// The oldest version that has what the schema and the change feed use.
pub const OLDEST: u32 = 15;

/// Names the folder of the server programs, and ends the search.
const BIN_VARIABLE: &str = "OPSMANTIK_PG_BIN";

const PROGRAMS: [&str; 3] = ["postgres", "initdb", "pg_ctl"];

const PACKAGES: Packages = Packages { what: "the PostgreSQL server", apt: &["postgresql"], brew: &["postgresql@17"] };

/// The server programs of one installed PostgreSQL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Postgres {
    bin: PathBuf,
    major: u32,
}

/// There is no PostgreSQL to run.
#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    #[error("no PostgreSQL server of version {OLDEST} or newer was found on this machine{}", only(.older))]
    Missing { older: Vec<Postgres> },
    #[error("{BIN_VARIABLE} is {folder}, but {why}")]
    Named { folder: PathBuf, why: String },
    #[error(transparent)]
    Install(#[from] InstallError),
}

fn only(older: &[Postgres]) -> String {
    let names: Vec<String> = older.iter().map(Postgres::to_string).collect();
    match names.as_slice() {
        [] => String::new(),
        names => format!(" (too old: {})", names.join(", ")),
    }
}

impl Postgres {
    /// The newest PostgreSQL on this machine, or the one that the environment names.
    pub fn find() -> Result<Self, PostgresError> {
        let mut older = Self::all()?;
        match older.first() {
            Some(newest) if newest.major >= OLDEST => Ok(older.swap_remove(0)),
            _ => Err(PostgresError::Missing { older }),
        }
    }

    /// Finds PostgreSQL, or installs it.
    pub fn find_or_install(progress: Progress) -> Result<Self, PostgresError> {
        let _alone = one_at_a_time();
        match Self::find() {
            Err(PostgresError::Missing { .. }) => {
                PACKAGES.install(progress)?;
                Self::find()
            }
            found => found,
        }
    }

    /// The installed PostgreSQL of one major version: a cluster is only opened by the version
    /// that made it.
    pub fn find_major(major: u32) -> Result<Option<Self>, PostgresError> {
        Ok(Self::all()?.into_iter().find(|found| found.major == major))
    }

    /// The major version, such as 15.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// One of its programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// The psql to tell people about: the one that came along, else whichever they have.
    pub fn psql(&self) -> PathBuf {
        let beside = self.bin.join("psql");
        match search_path("psql") {
            None if beside.is_file() => beside,
            _ => PathBuf::from("psql"),
        }
    }

    /// Everything usable or too old on this machine, the newest first; of one version the place
    /// that is looked at first.
    fn all() -> Result<Vec<Self>, PostgresError> {
        if let Some(folder) = std::env::var_os(BIN_VARIABLE) {
            let folder = PathBuf::from(folder);
            return match Self::at(&folder) {
                Ok(found) if found.major >= OLDEST => Ok(vec![found]),
                Ok(found) => Err(PostgresError::Named {
                    folder,
                    why: format!("that is version {}, older than {OLDEST}", found.major),
                }),
                Err(why) => Err(PostgresError::Named { folder, why }),
            };
        }
        let mut found: Vec<Self> = Vec::new();
        for folder in places() {
            if let Ok(candidate) = Self::at(&folder)
                && !found.iter().any(|known| known.major == candidate.major)
            {
                found.push(candidate);
            }
        }
        found.sort_by_key(|candidate| std::cmp::Reverse(candidate.major));
        Ok(found)
    }

    /// What is in one folder. A link to a server's program leads to the folder it truly lies in,
    /// where its companions are.
    fn at(folder: &Path) -> Result<Self, String> {
        let server = folder.join("postgres");
        let server =
            fs::canonicalize(&server).map_err(|error| format!("{} is not there: {error}", server.display()))?;
        let bin = server.parent().unwrap_or(folder).to_path_buf();
        let mut majors = PROGRAMS.iter().map(|name| major_of(&bin.join(name)));
        let major = majors.next().unwrap_or(Err(String::new()))?;
        for other in majors {
            if other? != major {
                return Err(format!("{} mixes several versions", bin.display()));
            }
        }
        Ok(Postgres { bin, major })
    }
}

impl fmt::Display for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PostgreSQL {} in {}", self.major, self.bin.display())
    }
}

/// The folders worth looking into, the preferred first.
fn places() -> Vec<PathBuf> {
    let mut places = Vec::new();
    for (above, below) in [("/usr/lib/postgresql", "bin"), ("/Applications/Postgres.app/Contents/Versions", "bin")] {
        places.extend(subfolders(above, "").map(|version| version.join(below)));
    }
    for above in ["/opt/homebrew/opt", "/usr/local/opt", "/home/linuxbrew/.linuxbrew/opt"] {
        places.extend(subfolders(above, "postgresql").map(|formula| formula.join("bin")));
    }
    places.extend(subfolders("/usr", "pgsql-").map(|version| version.join("bin")));
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output()
        && output.status.success()
    {
        let folder = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        places.push(PathBuf::from(folder));
    }
    places.extend(search_path("postgres"));
    places
}

fn subfolders(above: &str, prefix: &'static str) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(above).into_iter().flatten().flatten();
    entries.filter(move |entry| entry.file_name().to_string_lossy().starts_with(prefix)).map(|entry| entry.path())
}

/// The first folder on the PATH that has this program.
fn search_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).find(|folder| folder.join(program).is_file())
}

/// The major version that a program says it has: `postgres (PostgreSQL) 15.16 (Debian …)`.
fn major_of(program: &Path) -> Result<u32, String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .map_err(|error| format!("{} does not run: {error}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_major(&text)
        .filter(|_| output.status.success())
        .ok_or_else(|| format!("{} tells no version: {}", program.display(), text.trim()))
}

fn parse_major(text: &str) -> Option<u32> {
    let (_, version) = text.split_once("(PostgreSQL) ")?;
    let digits = version.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn versions_are_read_as_the_programs_write_them() {
        for (text, major) in [
            ("postgres (PostgreSQL) 15.16 (Debian 15.16-0+deb12u1)\n", Some(15)),
            ("pg_ctl (PostgreSQL) 18beta1", Some(18)),
            ("initdb (PostgreSQL) 9.6.24", Some(9)),
            ("postgres 15", None),
            ("", None),
        ] {
            assert_eq!(parse_major(text), major, "{text}");
        }
    }

    #[test]
    fn a_folder_counts_only_with_all_its_programs_of_one_version() {
        let folder = std::env::temp_dir().join(format!("opsmantik-bin-{}", uuid::Uuid::new_v4()));
        fs::create_dir(&folder).expect("the temporary folder is writable");
        let real = folder.join("real");
        let linked = folder.join("linked");
        fs::create_dir(&real).expect("a new folder can be made");
        fs::create_dir(&linked).expect("a new folder can be made");
        let write = |name: &str, version: &str| {
            // By a shell: were it written here, a test that forks meanwhile would hold it open,
            // and what is open for writing cannot be run.
            let script = "printf '#!/bin/sh\\necho \"%s (PostgreSQL) %s\"\\n' $2 $3 >$1; chmod 755 $1";
            let written =
                Command::new("sh").args(["-c", script, "sh"]).arg(real.join(name)).args([name, version]).status();
            assert!(written.is_ok_and(|status| status.success()));
        };
        write("postgres", "16.2");
        write("initdb", "16.2");
        assert!(Postgres::at(&real).is_err(), "pg_ctl is missing");
        write("pg_ctl", "15.1");
        assert!(Postgres::at(&real).is_err(), "two versions");
        write("pg_ctl", "16.2");
        symlink(real.join("postgres"), linked.join("postgres")).expect("a link can be made");
        let found = Postgres::at(&linked).expect("the link leads to a whole folder");
        assert_eq!(found.major(), 16);
        assert_eq!(found.program("initdb"), fs::canonicalize(real.join("initdb")).expect("it was written above"),);
        fs::remove_dir_all(&folder).expect("it is ours");
    }
}
