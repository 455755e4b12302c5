//! Monthly partitions of `sessions` and `events`. The work is done by `opsmantik.ensure_month` in the database, whole: created,
//! dressed (identity, row level security, policies, grants) and attached; see the migrations.

use chrono::NaiveDate;

use super::Store;
use super::error::StoreError;
use super::statement::Months;
use super::transaction::Purpose;
use crate::domain::month::Month;

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
    LIST_MONTHS,
    Months::None,
    [],
    "SELECT month, sessions_leaf, events_leaf, sessions_rows, events_rows, bytes FROM opsmantik.months() ORDER BY month"
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

/// A month with its leaves. Rows are the planner's estimates.
#[derive(Debug, Clone, serde::Serialize)]
pub struct MonthOfData {
    pub month: Month,
    pub sessions_leaf: Option<String>,
    pub events_leaf: Option<String>,
    pub sessions_rows: Option<i64>,
    pub events_rows: Option<i64>,
    pub bytes: Option<i64>,
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

    /// All months that have leaves.
    pub async fn list_months(&self) -> Result<Vec<MonthOfData>, StoreError> {
        let tx = self.begin(Purpose::Operate).await?;
        let rows = tx.query(&LIST_MONTHS, &[]).await?;
        tx.commit().await?;
        rows.iter()
            .map(|row| {
                Ok(MonthOfData {
                    month: Month::containing(row.try_get(0)?),
                    sessions_leaf: row.try_get(1)?,
                    events_leaf: row.try_get(2)?,
                    sessions_rows: row.try_get(3)?,
                    events_rows: row.try_get(4)?,
                    bytes: row.try_get(5)?,
                })
            })
            .collect::<Result<_, tokio_postgres::Error>>()
            .map_err(|error| StoreError::unreadable(LIST_MONTHS.name, error))
    }
}
