//! `opsmantik dead-letters`: what was accepted and could not be stored: listed, shown, and stored again.

use anyhow::{Context, bail};
use chrono::{DateTime, NaiveDate, NaiveTime, TimeDelta, Utc};
use clap::Subcommand;

use super::output::print_json;
use super::{Database, duration};
use crate::domain::id::{DeadLetterId, SiteId};
use crate::domain::outcome::DeathReason;
use crate::store::dead_letters::Chosen;

mod fate;
mod list;
mod progress;
mod replay;

/// Look at dead letters and replay them.
#[derive(Debug, Subcommand)]
pub(super) enum DeadLetters {
    /// List the newest, or count them by reason
    List(list::List),
    /// Show one whole, with its payload, as JSON
    Show {
        #[command(flatten)]
        database: Database,
        /// Its id, from `list`
        id: DeadLetterId,
    },
    /// Store them again, by the way that every event takes; what fails again stays
    ///
    /// A letter keeps its time of arrival, so a late event lands in the month where it belongs; an event that is stored already counts as
    /// replayed. The oldest come first. Interrupted, however, it is run again and goes on: what was replayed is skipped. Two
    /// replays at once take turns.
    ///
    /// Letters of calls cannot be replayed, because telephone numbers are not kept: each is named, and the telephone integration pushes the
    /// call again. Exit code 0: all others are stored; 1: some failed again or are left; 2: not a valid command.
    Replay(replay::Replay),
}

/// Which letters are meant: those that all of it is true of.
#[derive(Debug, Clone, clap::Args)]
struct Filter {
    /// Only of this site (UUID)
    #[arg(long)]
    site: Option<SiteId>,
    /// Only of this reason
    #[arg(long, value_parser = DeathReason::ALL.map(DeathReason::code))]
    reason: Option<String>,
    /// Only those that died there: `worker`, `nats`, `pipeline`, `calls`
    #[arg(long)]
    source: Option<String>,
    /// Only those that died at or after this: `2026-11-01`, `2026-11-01T10:30:00Z`, or so long ago: `90m`, `12h`, `7d`
    #[arg(long, value_name = "WHEN", value_parser = moment)]
    since: Option<DateTime<Utc>>,
    /// Only those that died before this
    #[arg(long, value_name = "WHEN", value_parser = moment)]
    until: Option<DateTime<Utc>>,
}

impl Filter {
    fn chosen(self) -> Chosen {
        let Self { site, reason, source, since, until } = self;
        Chosen { site, reason, source, since, until, ..Chosen::default() }
    }
}

/// A day (its beginning, UTC), a moment, or a time before now.
fn moment(text: &str) -> anyhow::Result<DateTime<Utc>> {
    let wrong =
        "neither a day such as 2026-11-01, nor a moment such as 2026-11-01T10:30:00Z, nor a time ago such as 12h";
    if let Some(ago) = duration::read(text).and_then(|ago| TimeDelta::from_std(ago).ok()) {
        return Utc::now().checked_sub_signed(ago).context(wrong);
    }
    match NaiveDate::parse_from_str(text.trim(), "%Y-%m-%d") {
        Ok(day) => Ok(day.and_time(NaiveTime::MIN).and_utc()),
        Err(_) => Ok(DateTime::parse_from_rfc3339(text.trim()).context(wrong)?.to_utc()),
    }
}

impl DeadLetters {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List(list) => list.run().await,
            Self::Show { database, id } => match database.store().await?.find_dead_letter(id).await? {
                Some(letter) => print_json(&letter),
                None => bail!("there is no dead letter {id}"),
            },
            Self::Replay(replay) => replay.run().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_day_a_time_of_day_or_a_while_ago() {
        let at = |text: &str| moment(text).map(|at| at.to_rfc3339()).unwrap_or_default();
        assert_eq!(at("2026-11-01"), "2026-11-01T00:00:00+00:00");
        assert_eq!(at(" 2026-11-01T10:30:00+02:00 "), "2026-11-01T08:30:00+00:00");
        let ago = Utc::now() - moment("2h").unwrap_or_default();
        assert!((119..=121).contains(&ago.num_minutes()), "{ago}");
        for bad in ["", "yesterday", "2026-13-01", "2026-11-01 10:30", "0h", "12"] {
            assert!(moment(bad).is_err(), "{bad}");
        }
    }
}
