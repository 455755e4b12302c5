//! What the change feed asks the database: whether it could run, what its slot's snapshot saw, and how far the log is written.

use super::Store;
use super::error::StoreError;
use super::statement::Months;
use super::transaction::{Purpose, Transaction};
use crate::domain::change::Snapshot;

crate::statement!(
    /// The statement's snapshot is taken before the place in the log is read, so what had ended by then lies before that place.
    FEED_MOMENT,
    Months::None,
    [],
    "SELECT pg_current_snapshot()::text, pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::int8"
);
crate::statement!(
    FEED_ORIGIN,
    Months::None,
    [],
    "SELECT pg_current_snapshot()::text, oid FROM pg_catalog.pg_database WHERE datname = current_database()"
);
crate::statement!(
    FEED_FITNESS,
    Months::None,
    [],
    "SELECT current_setting('wal_level'), pg_is_in_recovery(), session_user::text, \
            coalesce((SELECT rolsuper OR rolreplication FROM pg_catalog.pg_roles WHERE rolname = session_user), false), \
            current_setting('max_replication_slots')::int8 - (SELECT count(*) FROM pg_catalog.pg_replication_slots), \
            current_setting('max_wal_senders')::int8 - (SELECT count(*) FROM pg_catalog.pg_stat_get_wal_senders())"
);
crate::statement!(
    /// Whether the publication tells everything of all four tables, by their parents.
    FEED_PUBLICATION,
    Months::None,
    [],
    "SELECT EXISTS (SELECT FROM pg_catalog.pg_publication p WHERE p.pubname = 'opsmantik_feed' \
                AND p.pubinsert AND p.pubupdate AND p.pubdelete AND p.pubtruncate AND p.pubviaroot AND 4 = ( \
                    SELECT count(*) FROM pg_catalog.pg_publication_rel r JOIN pg_catalog.pg_class c ON c.oid = r.prrelid \
                    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                    WHERE r.prpubid = p.oid AND r.prqual IS NULL AND r.prattrs IS NULL AND (n.nspname, c.relname) IN ( \
                        ('public', 'sessions'), ('public', 'events'), ('public', 'calls'), ('opsmantik', 'vanished'))))"
);

/// A moment of the database.
#[derive(Debug, Clone)]
pub struct Moment {
    pub snapshot: Snapshot,
    /// The log's end, read after the snapshot was taken.
    pub written: u64,
    /// Whether the publication tells everything.
    pub published: bool,
}

/// Where a feed begins.
#[derive(Debug, Clone)]
pub struct Origin {
    /// What lies before its slot.
    pub snapshot: Snapshot,
    /// The database's oid.
    pub database: u32,
}

/// What decides whether the log can be read.
#[derive(Debug, Clone)]
pub struct Fitness {
    pub wal_level: String,
    pub standby: bool,
    /// Who logs in, and whether they may replicate.
    pub login: String,
    pub may_replicate: bool,
    pub published: bool,
    pub free_slots: i64,
    pub free_senders: i64,
}

impl Store {
    /// What the database shows now, and how far its log is written.
    pub async fn feed_moment(&self) -> Result<Moment, StoreError> {
        // Not of this transaction: its marks are told by the log. What it misses now it finds a moment later.
        self.note_leaves()
            .await
            .unwrap_or_else(|error| tracing::warn!(%error, "cannot look for leaves that came or went"));
        let tx = self.begin(Purpose::Serve).await?;
        let rows = tx.query(&FEED_MOMENT, &[]).await?;
        let published = is_published(&tx).await?;
        tx.commit().await?;
        let row = rows.first().ok_or_else(|| StoreError::unreadable("FEED_MOMENT", "no row"))?;
        let read = || -> Result<Moment, Box<dyn std::error::Error>> {
            let (snapshot, written): (String, i64) = (row.try_get(0)?, row.try_get(1)?);
            Ok(Moment { snapshot: snapshot.parse()?, written: u64::try_from(written)?, published })
        };
        read().map_err(|why| StoreError::unreadable("FEED_MOMENT", why))
    }

    /// What an exported snapshot saw.
    pub async fn feed_origin(&self, snapshot: &str) -> Result<Origin, StoreError> {
        let connection = tokio::time::timeout(super::CONNECTION_WAIT, self.connection())
            .await
            .unwrap_or_else(|_| Err(StoreError::away("connect", "no connection became free in time")))?;
        let tx = Transaction::begin_at(connection, snapshot).await?;
        let rows = tx.query(&FEED_ORIGIN, &[]).await?;
        tx.commit().await?;
        let row = rows.first().ok_or_else(|| StoreError::unreadable("FEED_ORIGIN", "no row"))?;
        let read = || -> Result<Origin, Box<dyn std::error::Error>> {
            let snapshot: String = row.try_get(0)?;
            Ok(Origin { snapshot: snapshot.parse()?, database: row.try_get(1)? })
        };
        read().map_err(|why| StoreError::unreadable("FEED_ORIGIN", why))
    }

    /// Whether the log could be read, as far as a query can tell.
    pub async fn feed_fitness(&self) -> Result<Fitness, StoreError> {
        let tx = self.begin(Purpose::Serve).await?;
        let rows = tx.query(&FEED_FITNESS, &[]).await?;
        let published = is_published(&tx).await?;
        tx.commit().await?;
        let row = rows.first().ok_or_else(|| StoreError::unreadable("FEED_FITNESS", "no row"))?;
        let read = || -> Result<Fitness, tokio_postgres::Error> {
            Ok(Fitness {
                wal_level: row.try_get(0)?,
                standby: row.try_get(1)?,
                login: row.try_get(2)?,
                may_replicate: row.try_get(3)?,
                published,
                free_slots: row.try_get(4)?,
                free_senders: row.try_get(5)?,
            })
        };
        read().map_err(|why| StoreError::unreadable("FEED_FITNESS", why))
    }
}

async fn is_published(tx: &Transaction<'_>) -> Result<bool, StoreError> {
    let rows = tx.query(&FEED_PUBLICATION, &[]).await?;
    let published = rows.first().map(|row| row.try_get(0)).transpose();
    Ok(published.map_err(|error| StoreError::unreadable(FEED_PUBLICATION.name, error))?.unwrap_or(false))
}
