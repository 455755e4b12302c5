//! What a watch makes of an entry of the log: whether it is news for this client, and what of it.

use uuid::Uuid;

use super::super::coverage::{Key, Verdict};
use super::super::rows::{Said, Watched};
use super::super::sources::{Log, Tables, show};
use super::super::token::Mark;
use super::{Stop, Watcher};
use crate::domain::change::{Change, Place, Position};
use crate::feed::{Entry, What};
use crate::store::columns::{Columns, Tuple};

impl<W: Watched, L: Log, T: Tables<W>> Watcher<W, L, T> {
    /// Tells what of an entry is news.
    pub(super) async fn hear(&mut self, entry: &Entry) -> Result<(), Stop> {
        let halved = std::mem::take(&mut self.halved);
        let change = match &entry.what {
            What::Anew { site, month } => {
                let other_month = month.is_some_and(|month| self.scope.month.is_some_and(|scope| scope != month));
                let elsewhere = other_month || site.is_some_and(|site| site != self.scope.site);
                return if elsewhere { Ok(()) } else { Err(Stop::Anew) };
            }
            What::Row(change) => change,
        };
        let Some(change) = self.within(change) else { return Ok(()) };
        match change {
            Change::Update { old: (from, old), new: (to, new) } if from != to => {
                // It leaves one key and appears under another. In between the client stands before the entry.
                if !halved && self.leaves(from, entry.xid)? {
                    let before = right_before(entry.position);
                    let mark = Mark { position: before, halved: true, ..self.mark() };
                    self.say_changed(entry, Some(mark), Change::Delete { old }).await?;
                }
                if self.coverage.verdict(to, entry.xid) == Verdict::News {
                    self.say_changed(entry, None, Change::Insert { new }).await?;
                }
                Ok(())
            }
            Change::Delete { old: (key, old) } => match self.leaves(key, entry.xid)? {
                true => self.say_changed(entry, None, Change::Delete { old }).await,
                false => Ok(()),
            },
            Change::Insert { new: (key, _) } | Change::Update { new: (key, _), .. }
                if self.coverage.verdict(key, entry.xid) != Verdict::News =>
            {
                Ok(())
            }
            Change::Insert { new: (_, new) } => self.say_changed(entry, None, Change::Insert { new }).await,
            Change::Update { old: (_, old), new: (_, new) } => {
                self.say_changed(entry, None, Change::Update { old, new }).await
            }
        }
    }

    /// The change as far as it lies in what is watched, with the keys.
    fn within<'e>(&self, change: &'e Change<(Place, Tuple)>) -> Option<Change<(Key, &'e Tuple)>> {
        let keyed = |row: &'e (Place, Tuple)| {
            let (place, tuple) = row;
            let watched =
                place.site == self.scope.site && self.scope.month.is_none_or(|month| place.month == Some(month));
            // Every row has an id. Without one there is nothing that could be told of it.
            let id = tuple.column::<Uuid>("id").ok().filter(|_| watched)?;
            Some((Key { month: place.month, id }, tuple))
        };
        change.within(keyed)
    }

    /// Whether to tell that a row is gone.
    fn leaves(&self, key: Key, xid: u64) -> Result<bool, Stop> {
        let had = self.had.is_some_and(|had| had.to.is_after(key));
        match self.coverage.verdict(key, xid) {
            Verdict::News => Ok(true),
            // A page does not show what is not there any more; only who had the row has to be told.
            Verdict::Unshown => Ok(had),
            // The page may show another row in its place.
            Verdict::Seen if had => Err(Stop::Anew),
            Verdict::Seen => Ok(false),
        }
    }

    /// Says a change as far as its rows can be shown.
    async fn say_changed(&mut self, entry: &Entry, mark: Option<Mark>, change: Change<&Tuple>) -> Result<(), Stop> {
        let shown = |tuple: Option<&&Tuple>| match tuple {
            // The tables know better, once they are as they should be.
            Some(tuple) => show::<W>(*tuple).map_err(|_other| Stop::Anew),
            None => Ok(None),
        };
        let (old, new) = (shown(change.before())?, shown(change.after())?);
        let Some(change) = Change::of(old, new) else { return Ok(()) };
        let mark = mark.unwrap_or_else(|| self.mark());
        self.say(mark, Said::Changed(change, entry.committed_at)).await
    }
}

/// Right before a change: after everything else.
fn right_before(position: Position) -> Position {
    match position.seq.checked_sub(1) {
        Some(seq) => Position { lsn: position.lsn, seq },
        None => Position { lsn: position.lsn.saturating_sub(1), seq: u32::MAX },
    }
}
