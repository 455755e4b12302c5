//! `dead-letters list`: the newest first, by pages, or counted.

use anyhow::Context;
use chrono::{DateTime, SecondsFormat, Utc};

use super::Filter;
use crate::cli::Database;
use crate::cli::output::{JsonList, print_json};
use crate::domain::id::DeadLetterId;
use crate::store::dead_letters::{BuriedLetter, Chosen, Count};

/// Letters that are read at once; with payloads, of which each may have a MiB, fewer.
const PAGE: i64 = 1000;
const PAGE_OF_PAYLOADS: i64 = 32;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct List {
    #[command(flatten)]
    database: Database,
    #[command(flatten)]
    filter: Filter,
    /// Only those that are still dead: not replayed, or dead again since
    #[arg(long)]
    not_replayed: bool,
    /// Go on after this letter, the last one of the list before
    #[arg(long, value_name = "ID")]
    after: Option<DeadLetterId>,
    /// At most this many
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i64).range(1..))]
    limit: i64,
    /// Count them by reason instead
    #[arg(long, conflicts_with_all = ["after", "limit"])]
    count: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl List {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let store = self.database.store().await?;
        let chosen = Chosen { replayed_too: !self.not_replayed, ..self.filter.chosen() };
        if self.count {
            let counts = store.count_dead_letters(&chosen, None).await?;
            return if self.json { print_json(&counts) } else { counts.iter().try_for_each(print_count) };
        }
        let mut place = match self.after {
            None => None,
            Some(id) => {
                let letter = store.find_dead_letter(id).await?;
                Some(letter.with_context(|| format!("--after: there is no dead letter {id}"))?.place())
            }
        };
        let mut list = JsonList::default();
        let (mut left, most) = (self.limit, if self.json { PAGE_OF_PAYLOADS } else { PAGE });
        while left > 0 {
            let asked = left.min(most);
            let letters = store.list_dead_letters(&chosen, place, self.json, asked).await?;
            for letter in &letters {
                if self.json { list.push(letter)? } else { print(letter)? }
            }
            let read = i64::try_from(letters.len())?;
            left -= read;
            place = letters.last().map(BuriedLetter::place);
            if read < asked {
                break;
            }
        }
        if self.json { list.end() } else { Ok(()) }
    }
}

fn print_count(count: &Count) -> anyhow::Result<()> {
    let Count { reason, letters, not_replayed, oldest, newest } = count;
    say!("{letters:>9}  {not_replayed:>9} not replayed  {reason}  {} to {}", second(*oldest), second(*newest))
}

fn print(letter: &BuriedLetter) -> anyhow::Result<()> {
    let site = letter.site_id.map_or_else(|| "-".to_owned(), |site| site.to_string());
    let replayed = letter.replayed_at.map_or_else(|| "-".to_owned(), |at| format!("replayed {}", second(at)));
    let last = match &letter.last_error {
        Some(error) if *error != letter.detail => format!("  last error: {}", first_line(error)),
        _ => String::new(),
    };
    let BuriedLetter { id, source, reason, tries, .. } = letter;
    let (when, detail) = (second(letter.created_at), first_line(&letter.detail));
    say!("{id}  {when}  {site}  {source}  {reason}  {tries}×  {replayed}  {detail}{last}")
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

pub(super) fn second(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}
