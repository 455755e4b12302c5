//! The disk is full. A small file system of its own carries the database's tables; a file of ours takes what is left of it.

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::unistd::{Uid, User};
use tokio_postgres::NoTls;

use super::Plan;
use super::kill::{shop, token};
use crate::outage::{Bounds, Stage};
use crate::report::Report;
use crate::support::database::{connect, database};

const MIB: usize = 64;

/// A file system in memory, gone with its row.
struct Disk(PathBuf);

impl Disk {
    fn mount() -> Result<Self, String> {
        if !Uid::effective().is_root() {
            return Err("only root may mount a small file system".to_owned());
        }
        let postgres = User::from_name("postgres").ok().flatten().ok_or("there is no user `postgres`")?;
        let place = std::env::temp_dir().join(format!("opsmantik-disk-{}", uuid::Uuid::new_v4().simple()));
        std::fs::create_dir(&place).map_err(|error| error.to_string())?;
        let disk = Self(place);
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={MIB}m"), "tmpfs"]).arg(&disk.0))?;
        let data = disk.data();
        std::fs::create_dir(&data).map_err(|error| error.to_string())?;
        chown(&data, Some(postgres.uid.as_raw()), Some(postgres.gid.as_raw())).map_err(|error| error.to_string())?;
        Ok(disk)
    }

    fn data(&self) -> PathBuf {
        self.0.join("data")
    }

    /// Takes what is left.
    fn fill(&self) {
        use std::io::Write;
        let mut file = std::fs::File::create(self.ballast()).expect("a file of ours");
        let piece = [0; 4096];
        while file.write_all(&piece).is_ok() {}
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    fn empty(&self) {
        std::fs::remove_file(self.ballast()).expect("it is there");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: whoever still has a file open does not keep it from going.
        drop(run(Command::new("umount").arg("--lazy").arg(&self.0)));
        drop(std::fs::remove_dir(&self.0));
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()) }
}

pub async fn full(plan: Plan) -> Report {
    let disk = match Disk::mount() {
        Ok(disk) => disk,
        Err(why) => return Report::skipped(why),
    };
    let database = shop(database().await).await;
    let token = token(&database).await;
    let (url, name) = (database.url.clone(), database.name.clone());
    let space = format!("small_{}", std::process::id());
    // Nobody may be in a database that moves.
    drop(database);
    if let Err(why) = move_to(&url.replace(&name, "postgres"), &name, &space, &disk.data()).await {
        return Report::broken(&why);
    }
    let mut stage = Stage::set(&plan, &url, &token, &[]).await;
    let hold = Duration::from_secs(if plan.long { 8 } else { 6 });
    for _ in 0..plan.rounds {
        // What pages still have room for is stored and answered so.
        stage.outage(hold, Bounds::QUICK, async || disk.fill(), async || disk.empty()).await;
    }
    let report = stage.end(&connect(&url).await, Duration::from_secs(20)).await;
    let other = connect(&url.replace(&name, "postgres")).await;
    let leave = [format!("DROP DATABASE {name} WITH (FORCE)"), format!("DROP TABLESPACE {space}")];
    for sql in leave {
        other.batch_execute(&sql).await.expect("the row's own database");
    }
    report
}

async fn move_to(server: &str, name: &str, space: &str, place: &Path) -> Result<(), String> {
    let (admin, connection) = tokio_postgres::connect(server, NoTls).await.map_err(|error| error.to_string())?;
    tokio::spawn(connection);
    let cut = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'");
    let make = format!("CREATE TABLESPACE {space} LOCATION '{}'", place.display());
    admin.batch_execute(&make).await.map_err(|error| format!("{error:?}"))?;
    let mut tries = 0;
    loop {
        admin.batch_execute(&cut).await.map_err(|error| format!("{error:?}"))?;
        match admin.batch_execute(&format!("ALTER DATABASE {name} SET TABLESPACE {space}")).await {
            Ok(()) => return Ok(()),
            Err(error) if tries > 50 => return Err(format!("{error:?}")),
            Err(_) => tries += 1,
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
