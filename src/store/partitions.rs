//! Monthly partitions of `sessions` and `events`. The work is done by `opsmantik.ensure_month` in the database, whole: created,
//! dressed (identity, row level security, policies, grants, triggers), tied to its sessions, attached and published; see the migrations. How
//! months go is told by [`super::retention`].

use std::collections::HashMap;

use chrono::NaiveDate;

use super::Store;
use super::error::StoreError;
use super::statement::Months;
use super::transaction::Purpose;
use crate::domain::month::Month;

type Unreadable = Box<dyn std::error::Error + Send + Sync>;

crate::statement!(
    /// Makes or mends one month; tells the names of the leaves it made.
    ENSURE_MONTH,
    Months::None,
    [DATE],
    "SELECT unnest(opsmantik.ensure_month($1))"
);
crate::statement!(STORAGE_FAULTS, Months::None, [], "SELECT fault FROM opsmantik.storage_faults() AS fault");
crate::statement!(LEAF_FAULTS, Months::None, [], "SELECT leaf || ': ' || fault FROM opsmantik.leaf_faults()");
crate::statement!(
    MISSING_MONTHS,
    Months::None,
    [DATE, INT4],
    "SELECT month FROM opsmantik.missing_months($1, $2) AS month ORDER BY month"
);
crate::statement!(
    LEAF_STATES,
    Months::None,
    [],
    "SELECT tab, leaf, month, state, ours, estimate, bytes FROM opsmantik.leaf_states()"
);
crate::statement!(
    /// How many calls are matched to visits of each of these months.
    MATCHED_CALLS,
    Months::None,
    [DATE_ARRAY],
    "SELECT matched_session_month, count(*) FROM public.calls \
     WHERE matched_session_id IS NOT NULL AND matched_session_month = ANY ($1) GROUP BY matched_session_month"
);
crate::statement!(
    /// Clears away marks that a newer one makes superfluous.
    PRUNE_VANISHED,
    Months::None,
    [],
    "SELECT opsmantik.prune_vanished()"
);
crate::statement!(
    /// Leaves a mark for each leaf that somebody attached with rows, detached or dropped. Mostly there is none, and it only looks.
    NOTE_LEAVES,
    Months::None,
    [],
    "SELECT opsmantik.note_leaves()"
);

/// Whether the schema can take what comes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Why the server's role could not write, and leaves that lack identity, row level security, a policy or a grant, or have one too many.
    pub faults: Vec<String>,
    /// Of this month and the next: those without a partition.
    pub missing_months: Vec<Month>,
}

impl Readiness {
    pub fn is_ready(&self) -> bool {
        self.faults.is_empty() && self.missing_months.is_empty()
    }
}

/// How a leaf hangs on its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LeafState {
    Attached,
    /// A detaching that was interrupted has left it: its rows are not seen any more.
    Pending,
    /// Nobody sees its rows but by its own name.
    Detached,
}

impl LeafState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Pending => "pending",
            Self::Detached => "detached",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        [Self::Attached, Self::Pending, Self::Detached].into_iter().find(|state| state.name() == name)
    }
}

/// A month's part of `sessions` or `events`. Rows are the planner's estimate, bytes with indexes and TOAST.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Leaf {
    pub name: String,
    /// `sessions` or `events`.
    pub table: String,
    #[serde(skip)]
    pub month: Month,
    pub state: LeafState,
    /// Made like our leaves. A detached table that only has the name of one is left alone.
    pub ours: bool,
    pub rows: i64,
    pub bytes: i64,
}

fn read_leaf(row: &tokio_postgres::Row) -> Result<Leaf, Unreadable> {
    Ok(Leaf {
        table: row.try_get(0)?,
        name: row.try_get(1)?,
        month: Month::containing(row.try_get(2)?),
        state: LeafState::from_name(row.try_get(3)?).ok_or("unknown state")?,
        ours: row.try_get(4)?,
        rows: row.try_get(5)?,
        bytes: row.try_get(6)?,
    })
}

/// Why the server's role could not store an event now; nothing if it could.
pub(super) async fn storage_faults(store: &Store) -> Result<Vec<String>, StoreError> {
    let tx = store.begin(Purpose::Serve).await?;
    let rows = tx.query(&STORAGE_FAULTS, &[]).await?;
    tx.commit().await?;
    let faults = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>();
    faults.map_err(|error| StoreError::unreadable(STORAGE_FAULTS.name, error))
}

impl Store {
    /// Makes the month's leaves if they are missing and mends them if they are wrong; idempotent.
    pub async fn ensure_month(&self, month: Month) -> Result<Vec<String>, StoreError> {
        let tx = self.begin(Purpose::Keep).await?;
        let rows = tx.query(&ENSURE_MONTH, &[&month.first_day()]).await?;
        tx.commit().await?;
        let names = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>();
        names.map_err(|error| StoreError::unreadable(ENSURE_MONTH.name, error))
    }

    /// Whether every leaf is right and the months from `month` on, `ahead` of them, are there.
    pub async fn readiness(&self, month: Month, ahead: i32) -> Result<Readiness, StoreError> {
        let tx = self.begin(Purpose::Serve).await?;
        let mut faults = tx.query(&STORAGE_FAULTS, &[]).await?;
        faults.extend(tx.query(&LEAF_FAULTS, &[]).await?);
        let missing = tx.query(&MISSING_MONTHS, &[&month.first_day(), &ahead]).await?;
        tx.commit().await?;
        let read = || -> Result<Readiness, tokio_postgres::Error> {
            Ok(Readiness {
                faults: faults.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?,
                missing_months: missing
                    .iter()
                    .map(|row| row.try_get::<_, NaiveDate>(0).map(Month::containing))
                    .collect::<Result<_, _>>()?,
            })
        };
        read().map_err(|error| StoreError::unreadable("readiness", error))
    }

    /// The leaves of all months, the attached ones and what is left of others; by month, sessions first.
    pub async fn leaves(&self) -> Result<Vec<Leaf>, StoreError> {
        let tx = self.begin(Purpose::Operate).await?;
        let rows = tx.query(&LEAF_STATES, &[]).await?;
        tx.commit().await?;
        let leaves = rows.iter().map(read_leaf).collect::<Result<_, _>>();
        leaves.map_err(|error| StoreError::unreadable(LEAF_STATES.name, error))
    }

    /// How many calls are matched to visits of these months; none for a month that is not told.
    pub async fn matched_calls(&self, months: &[Month]) -> Result<HashMap<Month, i64>, StoreError> {
        let months: Vec<NaiveDate> = months.iter().map(|month| month.first_day()).collect();
        let tx = self.begin(Purpose::Serve).await?;
        let rows = tx.query(&MATCHED_CALLS, &[&months]).await?;
        tx.commit().await?;
        rows.iter()
            .map(|row| Ok((Month::containing(row.try_get(0)?), row.try_get(1)?)))
            .collect::<Result<_, tokio_postgres::Error>>()
            .map_err(|error| StoreError::unreadable(MATCHED_CALLS.name, error))
    }

    /// Leaves a mark for each leaf that was attached with rows, detached or dropped since anybody looked, by whatever hand. No trigger tells.
    pub async fn note_leaves(&self) -> Result<(), StoreError> {
        let tx = self.begin(Purpose::Keep).await?;
        tx.query(&NOTE_LEAVES, &[]).await?;
        tx.commit().await
    }

    /// Clears away marks of vanished rows that a newer one makes superfluous; how many.
    pub async fn prune_vanished(&self) -> Result<i64, StoreError> {
        let tx = self.begin(Purpose::Keep).await?;
        let rows = tx.query(&PRUNE_VANISHED, &[]).await?;
        tx.commit().await?;
        let pruned = rows.first().map_or(Ok(0), |row| row.try_get(0));
        pruned.map_err(|error| StoreError::unreadable(PRUNE_VANISHED.name, error))
    }
}
