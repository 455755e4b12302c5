//! `opsmantik dead-letters`: what was accepted and could not be stored.

use anyhow::bail;
use clap::Subcommand;

use super::{Database, print_json};
use crate::domain::id::{DeadLetterId, SiteId};
use crate::domain::outcome::DeathReason;

/// Look at dead letters.
#[derive(Debug, Subcommand)]
pub(super) enum DeadLetters {
    /// List the newest
    List {
        #[command(flatten)]
        database: Database,
        /// Only of this site (UUID)
        #[arg(long)]
        site: Option<SiteId>,
        /// Only of this reason
        #[arg(long, value_parser = DeathReason::ALL.map(DeathReason::code))]
        reason: Option<String>,
        /// At most this many
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i64).range(1..=10_000))]
        limit: i64,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one whole, with its payload, as JSON
    Show {
        #[command(flatten)]
        database: Database,
        /// Its id, from `list`
        id: DeadLetterId,
    },
}

impl DeadLetters {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List { database, site, reason, limit, json } => {
                let letters = database.store().await?.list_dead_letters(site, reason.as_deref(), limit).await?;
                if json {
                    return print_json(&letters);
                }
                for letter in letters {
                    let site = letter.site_id.map_or_else(|| "-".to_owned(), |site| site.to_string());
                    let first_line = letter.detail.lines().next().unwrap_or_default();
                    let when = letter.created_at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
                    println!("{}  {when}  {site}  {}  {}×  {first_line}", letter.id, letter.reason, letter.tries);
                }
                Ok(())
            }
            Self::Show { database, id } => match database.store().await?.find_dead_letter(id).await? {
                Some(letter) => print_json(&letter),
                None => bail!("there is no dead letter {id}"),
            },
        }
    }
}
