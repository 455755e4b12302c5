//! `dead-letters replay`: a page after the other through the pipeline, each with its marks, until there are no more or somebody stops it.
//!
//! What is in memory is a page. A page's marks are committed before the next one is read; whoever dies in between has stored events without a
//! mark, and the next run finds that they are there.

use anyhow::{Context, bail};
use clap::ArgGroup;
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::Filter;
use super::fate::{Fate, MORE_CONNECTIONS, Months, Replayer};
use super::list::second;
use super::progress::Progress;
use crate::cli::Database;
use crate::cli::output::{Voice, print_json};
use crate::domain::id::DeadLetterId;
use crate::pipeline::PipelineConfig;
use crate::store::Store;
use crate::store::dead_letters::{BuriedLetter, Chosen, Mark, Place};

/// Letters of a page: as many as fit in one of the pipeline's batches.
const PAGE: i64 = 256;
/// And bytes of their payloads, about; a letter that is larger comes alone.
const PAGE_BYTES: i64 = 4 << 20;
/// What failed is named in the summary of `--json`; beyond so many only counted.
const NAMED: usize = 1000;

#[derive(Debug, clap::Args)]
#[command(group(ArgGroup::new("which").required(true).multiple(true).args(["ids", "site", "reason", "source", "since", "until", "all"])))]
pub(in crate::cli) struct Replay {
    #[command(flatten)]
    database: Database,
    /// These letters, by their ids from `list`
    #[arg(value_name = "ID", conflicts_with_all = ["site", "reason", "source", "since", "until", "all"])]
    ids: Vec<DeadLetterId>,
    #[command(flatten)]
    filter: Filter,
    /// All of them; has to be said where nothing else is
    #[arg(long, conflicts_with_all = ["site", "reason", "source", "since", "until"])]
    all: bool,
    /// Also those that were replayed already
    #[arg(long)]
    again: bool,
    /// Go on after this letter, the one that an interrupted replay names: also what failed before it is not tried again
    #[arg(long, value_name = "ID")]
    after: Option<DeadLetterId>,
    /// At most this many
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..))]
    limit: Option<i64>,
    /// Change nothing and tell what would become of each: what can be read, has a site and has a month. What PostgreSQL would refuse is not
    /// known before it is tried
    #[arg(long)]
    dry_run: bool,
    /// Print a summary as JSON instead of lines; progress goes to standard error
    #[arg(long)]
    json: bool,
}

/// What became of them, as a script reads it.
#[derive(Debug, Default, Serialize)]
struct Summary {
    dry_run: bool,
    /// Letters that were looked at.
    letters: u64,
    /// All of their events are there now; of a dry run, would be.
    replayed: u64,
    failed: u64,
    cannot_be_replayed: u64,
    /// Named by their id, but replayed before.
    skipped: u64,
    /// Events of those that were replayed.
    events_stored: u64,
    events_duplicate: u64,
    seconds: f64,
    interrupted: bool,
    /// The letter that was looked at last: where `--after` goes on.
    last: Option<DeadLetterId>,
    /// The first thousand of those that failed or cannot be replayed.
    left: Vec<Left>,
}

/// A letter that stays.
#[derive(Debug, Serialize)]
struct Left {
    id: DeadLetterId,
    fate: &'static str,
    error: String,
}

/// A run, as far as it has come.
struct Run<'r> {
    replay: &'r Replay,
    chosen: Chosen,
    summary: Summary,
    progress: Progress,
    voice: Voice,
}

impl Replay {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let config = PipelineConfig::default();
        let store = self.database.store_of(u32::try_from(config.writers)? + MORE_CONNECTIONS).await?;
        let stop = Stop::by_signals()?;
        let mut chosen = Chosen { replayed_too: self.again, ..self.filter.clone().chosen() };
        let (mut after, mut skipped) = (None, 0);
        if !self.ids.is_empty() {
            skipped = self.check_ids(&store).await?;
            chosen.ids = Some(self.ids.clone());
        }
        if let Some(id) = self.after {
            let letter = store.find_dead_letter(id).await?;
            after = Some(letter.with_context(|| format!("--after: there is no dead letter {id}"))?.place());
        }
        let counts = store.count_dead_letters(&chosen, after).await?;
        let there: i64 = counts.iter().map(|count| count.letters).sum();
        let total = there.min(self.limit.unwrap_or(i64::MAX)).unsigned_abs();
        let summary = Summary { dry_run: self.dry_run, skipped, ..Summary::default() };
        let mut run = Run { replay: &self, chosen, summary, progress: Progress::of(total), voice: Voice::default() };
        let replayer = Replayer::start(store.clone(), config);
        let ended = tokio::select! {
            ended = run.all(&store, &replayer, after, &stop) => Some(ended),
            () = stop.now.cancelled() => None,
        };
        run.progress.clear();
        match ended {
            Some(ended) => {
                replayer.stop().await;
                ended.with_context(|| run.told_until_now())?;
            }
            None => run.summary.interrupted = true,
        }
        run.end()
    }

    /// Letters that are asked for by name are there, all of them; how many of them there is nothing to do for.
    async fn check_ids(&self, store: &Store) -> anyhow::Result<u64> {
        let mut skipped = 0;
        for id in &self.ids {
            let Some(letter) = store.find_dead_letter(*id).await? else { bail!("there is no dead letter {id}") };
            if let Some(at) = letter.replayed_at.filter(|_| !self.again) {
                note!("{id} was replayed already, at {}: --again replays it once more", second(at));
                skipped += 1;
            }
        }
        Ok(skipped)
    }
}

impl Run<'_> {
    async fn all(
        &mut self,
        store: &Store,
        replayer: &Replayer,
        mut after: Option<Place>,
        stop: &Stop,
    ) -> anyhow::Result<()> {
        let mut left = self.replay.limit.unwrap_or(i64::MAX);
        let months = if self.replay.dry_run { Some(Months::of(store).await?) } else { None };
        while left > 0 {
            if stop.soon.is_cancelled() {
                self.summary.interrupted = true;
                break;
            }
            let asked = left.min(PAGE);
            let (letters, fates) = match &months {
                Some(months) => {
                    let letters = store.look_at_dead_letters(&self.chosen, after, asked, PAGE_BYTES).await?;
                    let fates = replayer.foresee(&letters, months).await?;
                    (letters, fates)
                }
                None => {
                    let mut page = store.next_dead_letters(&self.chosen, after, asked, PAGE_BYTES).await?;
                    let letters = std::mem::take(&mut page.letters);
                    let fates = replayer.replay(&letters).await?;
                    page.mark(&marks(&letters, &fates)).await?;
                    (letters, fates)
                }
            };
            let Some(last) = letters.last() else { break };
            after = Some(last.place());
            left -= i64::try_from(letters.len())?;
            for (letter, fate) in letters.iter().zip(fates) {
                self.settle(letter, fate)?;
            }
            self.progress.tell(self.summary.letters, self.summary.failed);
        }
        Ok(())
    }

    fn settle(&mut self, letter: &BuriedLetter, fate: Fate) -> anyhow::Result<()> {
        let summary = &mut self.summary;
        summary.letters += 1;
        summary.last = Some(letter.id);
        let id = letter.id;
        let dry_run = summary.dry_run;
        let (fate, error) = match fate {
            Fate::Replayed { stored, duplicates } => {
                summary.replayed += 1;
                summary.events_stored += stored;
                summary.events_duplicate += duplicates;
                // What went well is a number; of a dry run somebody wants to see each.
                if dry_run && !self.replay.json && self.voice.is_heard() {
                    self.progress.clear();
                    self.voice
                        .heed(say!("{id}  would be replayed: {stored} events to store, {duplicates} stored already"))?;
                }
                return Ok(());
            }
            Fate::Failed(error) => {
                summary.failed += 1;
                (if dry_run { "would fail again" } else { "failed again" }, error)
            }
            Fate::NotReplayable(why) => {
                summary.cannot_be_replayed += 1;
                ("cannot be replayed", why.to_owned())
            }
        };
        if self.replay.json {
            if summary.left.len() < NAMED {
                summary.left.push(Left { id, fate, error });
            }
        } else if self.voice.is_heard() {
            self.progress.clear();
            self.voice.heed(say!("{id}  {fate}: {error}"))?;
        }
        Ok(())
    }

    /// For whoever reads why it broke off.
    fn told_until_now(&self) -> String {
        let Summary { letters, replayed, failed, .. } = &self.summary;
        format!(
            "after {letters} letters ({replayed} replayed, {failed} failed again); the same command goes on from there"
        )
    }

    fn end(mut self) -> anyhow::Result<()> {
        self.summary.seconds = self.progress.seconds();
        let Summary { letters, replayed, failed, cannot_be_replayed, skipped, .. } = self.summary;
        let Summary { events_stored, events_duplicate, seconds, interrupted, last, dry_run, .. } = self.summary;
        let said = if self.replay.json {
            print_json(&self.summary)
        } else {
            let would = if dry_run { "would be " } else { "" };
            let again = if dry_run { "would fail" } else { "failed" };
            let skipped = if skipped > 0 { format!(", {skipped} skipped") } else { String::new() };
            say!(
                "{letters} letters in {seconds:.1} s: {replayed} {would}replayed ({events_stored} events {would}stored, {events_duplicate} were \
                 already), {failed} {again} again, {cannot_be_replayed} cannot be replayed{skipped}"
            )
        };
        self.voice.heed(said)?;
        match (interrupted, last) {
            (true, Some(last)) => {
                bail!("interrupted: the same command goes on, with `--after {last}` without what failed")
            }
            (true, None) => bail!("interrupted before it began"),
            (false, _) if failed > 0 && dry_run => bail!("{failed} letters would fail again"),
            (false, _) if failed > 0 => bail!("{failed} letters failed again, and stay"),
            (false, _) => Ok(()),
        }
    }
}

/// Each try counts but that of a letter that nobody can replay.
fn marks(letters: &[BuriedLetter], fates: &[Fate]) -> Vec<Mark> {
    let mark = |(letter, fate): (&BuriedLetter, &Fate)| match fate {
        Fate::Replayed { .. } => Some(Mark { id: letter.id, error: None }),
        Fate::Failed(error) => Some(Mark { id: letter.id, error: Some(error.clone()) }),
        Fate::NotReplayable(_) => None,
    };
    letters.iter().zip(fates).filter_map(mark).collect()
}

/// How somebody stops a replay, by Ctrl-C or SIGTERM.
#[derive(Clone, Default)]
struct Stop {
    /// The page that is worked on is finished first.
    soon: CancellationToken,
    /// Asked once more: nothing is waited for. What is lost is a mark, not an event.
    now: CancellationToken,
}

impl Stop {
    fn by_signals() -> anyhow::Result<Self> {
        let mut signals = [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?];
        let stop = Self::default();
        let asked = stop.clone();
        tokio::spawn(async move {
            either(&mut signals).await;
            asked.soon.cancel();
            note!("stopping after the letters that are being replayed; once more stops at once");
            either(&mut signals).await;
            asked.now.cancel();
        });
        Ok(stop)
    }
}

async fn either([interrupt, terminate]: &mut [Signal; 2]) {
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
