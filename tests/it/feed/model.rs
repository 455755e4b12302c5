//! A client as the contract describes it: a map by key, the latest token, and no patience for a gap, a double or a stale old value.
//!
//! It holds the server to `watch.proto` at every message, not only at the end: a map that comes out right by luck would pass there.

use std::collections::{BTreeMap, BTreeSet};

use opsmantik::grpc::proto::ChangeKind;

use super::watched::{Scope, Told, Watched, What};

/// What the contract allows next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// A watch without a token: nothing but a snapshot can come.
    Anew,
    /// A watch with a token, before it is known how it goes on.
    Resumed,
    /// Between `SnapshotStart` and `SnapshotEnd`. Changes of rows that were shown come in between.
    Shown,
    /// Rows that were written meanwhile are told, as in a snapshot, and on top of what the client has; `SnapshotEnd` ends it. Until then
    /// the client may have rows as they were once, so what comes is applied and not judged.
    CaughtUp,
    Live,
}

/// What a client has been through.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    pub messages: u64,
    pub changes: u64,
    /// Snapshots from their beginning.
    pub starts: u32,
    /// Resumed with the rows that were written meanwhile.
    pub caught_up: u32,
    /// Resumed with the very next change.
    pub went_on: u32,
}

#[derive(Debug)]
pub struct Model<R> {
    scope: Scope,
    pub rows: BTreeMap<String, R>,
    pub token: Option<String>,
    phase: Phase,
    /// The snapshot, or what was written meanwhile, has not been told whole yet.
    incomplete: bool,
    /// A change has come on the watch that was resumed.
    went_on: bool,
    /// Shown since the snapshot, or what is left of it, began.
    shown: BTreeSet<String>,
    pub tally: Tally,
}

impl<R: Watched> Model<R> {
    pub fn new(scope: Scope) -> Self {
        Self {
            scope,
            rows: BTreeMap::new(),
            token: None,
            phase: Phase::Anew,
            incomplete: true,
            went_on: false,
            shown: BTreeSet::new(),
            tally: Tally::default(),
        }
    }

    /// A watch begins, with the token that it has by now.
    pub fn opened(&mut self) {
        self.phase = match (&self.token, self.incomplete) {
            (None, _) => Phase::Anew,
            (Some(_), true) => Phase::CaughtUp,
            (Some(_), false) => Phase::Resumed,
        };
        self.went_on = false;
        self.shown.clear();
    }

    /// Whether everything that was there has been told.
    pub fn is_live(&self) -> bool {
        !self.incomplete && (self.phase == Phase::Live || self.went_on)
    }

    /// Takes a message, or says what is wrong with it.
    pub fn take(&mut self, told: Told<R>) -> Result<(), String> {
        if !(1..=256).contains(&told.token.len()) {
            return Err(format!("a token of {} bytes", told.token.len()));
        }
        self.tally.messages += 1;
        match told.what {
            What::Heartbeat => {}
            What::Start => {
                (self.phase, self.incomplete) = (Phase::Shown, true);
                self.rows.clear();
                self.shown.clear();
                self.tally.starts += 1;
            }
            What::End => {
                match self.phase {
                    Phase::Shown | Phase::CaughtUp => {}
                    Phase::Resumed => self.tally.caught_up += 1,
                    Phase::Anew | Phase::Live => return Err(format!("SnapshotEnd while {:?}", self.phase)),
                }
                (self.phase, self.incomplete) = (Phase::Live, false);
            }
            What::Change { kind: ChangeKind::Snapshot, old, new, committed_at } => match (old, new, committed_at) {
                (None, Some(new), None) => self.show(new)?,
                odd => return Err(format!("a row of a snapshot has a new value only: {odd:?}")),
            },
            What::Change { kind, old, new, committed_at } => {
                if committed_at.is_none() {
                    return Err(format!("{kind:?} without its time"));
                }
                self.change(kind, old, new)?;
            }
        }
        // After the change: a client that dies in between is told the change again, and not never.
        self.token = Some(told.token);
        Ok(())
    }

    fn own(&self, row: R) -> Result<(String, R), String> {
        if row.within(&self.scope) {
            Ok((row.key(), row))
        } else {
            Err(format!("not to be seen in {:?}: {row:?}", self.scope))
        }
    }

    fn show(&mut self, new: R) -> Result<(), String> {
        match self.phase {
            Phase::Shown | Phase::CaughtUp => {}
            Phase::Resumed => {
                (self.phase, self.incomplete) = (Phase::CaughtUp, true);
                self.tally.caught_up += 1;
            }
            Phase::Anew | Phase::Live => return Err(format!("a row of a snapshot while {:?}: {new:?}", self.phase)),
        }
        let (key, new) = self.own(new)?;
        if !self.shown.insert(key.clone()) {
            return Err(format!("shown twice: {new:?}"));
        }
        self.rows.insert(key, new);
        Ok(())
    }

    fn change(&mut self, kind: ChangeKind, old: Option<R>, new: Option<R>) -> Result<(), String> {
        match self.phase {
            Phase::Anew => return Err(format!("{kind:?} while Anew: {old:?} {new:?}")),
            Phase::Resumed if !self.went_on => {
                self.went_on = true;
                self.tally.went_on += 1;
            }
            Phase::Resumed | Phase::Shown | Phase::CaughtUp | Phase::Live => {}
        }
        self.tally.changes += 1;
        match (kind, old, new) {
            (ChangeKind::Insert, None, Some(new)) => self.enter(new),
            (ChangeKind::Update, Some(old), Some(new)) => {
                self.leave(old, kind)?;
                self.enter(new)
            }
            (ChangeKind::Delete, Some(old), None) => self.leave(old, kind),
            odd => Err(format!("not the values of such a change: {odd:?}")),
        }
    }

    fn enter(&mut self, new: R) -> Result<(), String> {
        let (key, new) = self.own(new)?;
        match self.rows.insert(key, new) {
            Some(there) if self.phase != Phase::CaughtUp => Err(format!("told twice: {there:?} was there already")),
            Some(_) | None => Ok(()),
        }
    }

    fn leave(&mut self, old: R, kind: ChangeKind) -> Result<(), String> {
        let (key, old) = self.own(old)?;
        let there = self.rows.remove(&key);
        if self.phase == Phase::CaughtUp || there.as_ref() == Some(&old) {
            return Ok(());
        }
        if self.phase == Phase::Resumed && kind == ChangeKind::Delete {
            // Of a row that was written meanwhile: then all that was written is told, to its end.
            (self.phase, self.incomplete) = (Phase::CaughtUp, true);
            self.tally.caught_up += 1;
            return Ok(());
        }
        Err(match there {
            Some(there) => {
                format!("the old value is not what was told last:\n  told last {there:?}\n  old now   {old:?}")
            }
            None => format!("never told, and now it was there before: {old:?}"),
        })
    }
}

mod tests {
    use opsmantik::grpc::proto::{Call, ProviderCallKey};

    use super::*;

    fn scope() -> Scope {
        Scope { site: "a".to_owned(), month: None }
    }

    fn row(id: &str, version: &str) -> Call {
        let key = ProviderCallKey { provider: version.to_owned(), provider_call_id: String::new() };
        Call { id: id.to_owned(), site_id: "a".to_owned(), key: Some(key), ..Call::default() }
    }

    fn told(what: What<Call>) -> Told<Call> {
        Told { token: "t".to_owned(), what }
    }

    fn shown(new: Call) -> Told<Call> {
        told(What::Change { kind: ChangeKind::Snapshot, old: None, new: Some(new), committed_at: None })
    }

    fn change(kind: ChangeKind, old: Option<Call>, new: Option<Call>) -> Told<Call> {
        told(What::Change { kind, old, new, committed_at: Some(prost_types::Timestamp::default()) })
    }

    fn inserted(new: Call) -> Told<Call> {
        change(ChangeKind::Insert, None, Some(new))
    }

    fn updated(old: Call, new: Call) -> Told<Call> {
        change(ChangeKind::Update, Some(old), Some(new))
    }

    /// What a client comes to that hears this on one watch.
    fn heard(messages: impl IntoIterator<Item = Told<Call>>) -> Result<Model<Call>, String> {
        let mut model = Model::new(scope());
        model.opened();
        messages.into_iter().try_for_each(|told| model.take(told))?;
        Ok(model)
    }

    /// A client that has seen row `1`, as it was first, and is live.
    fn live() -> Model<Call> {
        heard([told(What::Start), shown(row("1", "first")), told(What::End)]).expect("a whole snapshot")
    }

    fn fails(mut model: Model<Call>, message: Told<Call>, why: &str) {
        let complaint = model.take(message.clone()).expect_err(why);
        assert!(complaint.contains(why), "{complaint}");
    }

    #[test]
    fn a_client_that_hears_everything_once_has_the_rows() {
        let mut model = live();
        for message in [
            inserted(row("2", "first")),
            told(What::Heartbeat),
            updated(row("1", "first"), row("1", "second")),
            change(ChangeKind::Delete, Some(row("2", "first")), None),
        ] {
            model.take(message).expect("as the contract has it");
        }
        assert_eq!(model.rows.into_values().collect::<Vec<_>>(), [row("1", "second")]);
    }

    #[test]
    fn a_client_sees_a_gap_a_double_a_stale_old_value_and_a_neighbours_row() {
        fails(live(), inserted(row("1", "first")), "told twice");
        fails(live(), updated(row("2", "first"), row("2", "second")), "never told");
        fails(live(), change(ChangeKind::Delete, Some(row("2", "first")), None), "never told");
        fails(live(), updated(row("1", "second"), row("1", "third")), "not what was told last");
        fails(live(), change(ChangeKind::Delete, Some(row("1", "second")), None), "not what was told last");
        fails(live(), shown(row("2", "first")), "while Live");
        fails(live(), told(What::End), "while Live");
        fails(live(), inserted(Call { site_id: "b".to_owned(), ..row("2", "first") }), "not to be seen");
        fails(live(), updated(row("1", "first"), row("1", "second")).clone_without_old(), "not the values");
        fails(live(), Told { token: String::new(), what: What::Heartbeat }, "0 bytes");
        let begun = || heard([told(What::Start), shown(row("1", "first"))]).expect("a snapshot that is under way");
        fails(begun(), inserted(row("1", "first")), "told twice");
        fails(begun(), updated(row("2", "first"), row("2", "second")), "never told");
        fails(begun(), shown(row("1", "second")), "shown twice");
        fails(Model::new(scope()), shown(row("1", "first")), "while Anew");
        fails(Model::new(scope()), inserted(row("1", "first")), "while Anew");
    }

    #[test]
    fn a_client_that_resumes_is_told_the_next_change_or_what_was_written_or_everything_anew() {
        let resumed = |mut model: Model<Call>| {
            model.opened();
            model
        };
        let mut next = resumed(live());
        next.take(updated(row("1", "first"), row("1", "second"))).expect("the next change");
        assert!(next.is_live());
        fails(next, updated(row("1", "first"), row("1", "second")), "not what was told last");
        fails(resumed(live()), inserted(row("1", "first")), "told twice");

        let mut written = resumed(live());
        written
            .take(change(ChangeKind::Delete, Some(row("1", "second")), None))
            .expect("of a row that was written meanwhile");
        assert!(!written.is_live(), "that is not all");
        written.take(shown(row("3", "third"))).expect("what was written meanwhile");
        written.take(told(What::End)).expect("that was all");
        written.take(updated(row("3", "third"), row("3", "fourth"))).expect("live again");
        assert_eq!((written.tally.caught_up, written.rows.len(), written.is_live()), (1, 1, true));
        fails(written, inserted(row("3", "first")), "told twice");
        fails(resumed(live()), shown(Call { site_id: "b".to_owned(), ..row("2", "first") }), "not to be seen");

        let mut anew = resumed(live());
        for message in [told(What::Start), shown(row("2", "first")), told(What::End)] {
            anew.take(message).expect("everything anew");
        }
        assert_eq!(anew.rows.into_values().collect::<Vec<_>>(), [row("2", "first")]);

        // Cut off within the snapshot, it is not complete until its end is told; and what had been shown may be told again.
        let mut begun = heard([told(What::Start), shown(row("1", "first"))]).expect("a snapshot that is under way");
        begun.opened();
        begun.take(inserted(row("1", "first"))).expect("again");
        assert!(!begun.is_live());
        begun.take(shown(row("2", "first"))).expect("the rest of the rows");
        begun.take(told(What::End)).expect("that was all");
        fails(begun, inserted(row("1", "first")), "told twice");
    }

    impl Told<Call> {
        fn clone_without_old(mut self) -> Self {
            if let What::Change { old, .. } = &mut self.what {
                *old = None;
            }
            self
        }
    }
}
