//! Where a watch has its news from: the log, and the tables of the database. Behind traits, so that the watch can be tried against a
//! database that misbehaves at will.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::sync::{Semaphore, SemaphorePermit};
use uuid::Uuid;

use super::super::page;
use super::rows::Watched;
use crate::domain::change::{Lineage, Position, Snapshot};
use crate::domain::id::SiteId;
use crate::domain::month::Month;
use crate::feed::{Entry, Lost, Step, Subscription};
use crate::store::Store;
use crate::store::columns::{Columns, OtherColumns};
use crate::store::error::StoreError;
use crate::store::transaction::Reader;
use crate::store::watch::{Seen, Span};
use crate::telemetry;

/// Rows of a page, at most.
const PAGE: u32 = 500;
/// Bytes of a page that are kept until the client has taken them, roughly.
const PAGE_BYTES: usize = 1 << 20;
/// Pages that are read at once, over all watches: many new watchers must not take the database from those who write.
const READERS: usize = 2;
/// The largest row that can be shown: an update shows two of them in one message.
const MAX_ROW: usize = page::MAX_ANSWER / 2;

static READING: Semaphore = Semaphore::const_new(READERS);

/// The change log, from some place on.
pub(super) trait Log: Send {
    fn lineage(&self) -> Lineage;
    fn position(&self) -> Position;
    fn seek(&mut self, after: Position) -> bool;
    fn horizon(&self) -> u64;
    fn covers(&self, snapshot: &Snapshot) -> bool;
    fn try_next(&mut self) -> Result<Option<Arc<Entry>>, Lost>;
    fn next(&mut self) -> impl Future<Output = Result<Step, Lost>> + Send;
}

impl Log for Subscription {
    fn lineage(&self) -> Lineage {
        self.lineage()
    }

    fn position(&self) -> Position {
        self.position()
    }

    fn seek(&mut self, after: Position) -> bool {
        self.seek(after)
    }

    fn horizon(&self) -> u64 {
        self.horizon()
    }

    fn covers(&self, snapshot: &Snapshot) -> bool {
        self.covers(snapshot)
    }

    fn try_next(&mut self) -> Result<Option<Arc<Entry>>, Lost> {
        self.try_next()
    }

    fn next(&mut self) -> impl Future<Output = Result<Step, Lost>> + Send {
        self.next()
    }
}

/// Why the tables cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unread {
    Database,
    /// The reader sees no such site any more.
    NotYours,
}

/// Rows in the order of their ids, and the id up to which there are no others.
#[derive(Debug)]
pub(super) struct Page<R> {
    pub(super) rows: Vec<(Uuid, R)>,
    pub(super) end: Uuid,
    /// There are rows among them that cannot be shown.
    pub(super) odd: bool,
}

/// The tables, as the reader may see them.
pub(super) trait Tables<W: Watched>: Send + Sync + 'static {
    /// The first pause before something is asked again that came too early.
    const AGAIN: Duration;

    /// The first month at `from` or after it in which the site has rows.
    fn next_month(&self, from: Option<Month>) -> impl Future<Output = Result<Seen<Option<Month>>, Unread>> + Send;
    fn page(&self, span: Span) -> impl Future<Output = Result<Seen<Page<W::Row>>, Unread>> + Send;
    /// Whether a transaction from `since` on took rows away.
    fn vanished(&self, month: Option<Month>, since: u64) -> impl Future<Output = Result<Seen<bool>, Unread>> + Send;
}

/// The tables of the database.
pub(super) struct Stored {
    pub(super) store: Store,
    pub(super) reader: Reader,
    pub(super) site: SiteId,
}

impl<W: Watched> Tables<W> for Stored {
    const AGAIN: Duration = Duration::from_millis(10);

    async fn next_month(&self, from: Option<Month>) -> Result<Seen<Option<Month>>, Unread> {
        let _turn = turn().await;
        let seen = self.store.watched_month(self.reader, W::TABLE, self.site, from).await.map_err(unread)?;
        seen.ok_or(Unread::NotYours)
    }

    async fn page(&self, span: Span) -> Result<Seen<Page<W::Row>>, Unread> {
        let _turn = turn().await;
        let seen = self.store.watched_page(self.reader, W::TABLE, self.site, span, PAGE).await.map_err(unread)?;
        let Seen { snapshot, lsn, what } = seen.ok_or(Unread::NotYours)?;
        let mut page = Page { rows: Vec::with_capacity(what.rows.len()), end: what.end, odd: false };
        let mut bytes = 0;
        for row in &what.rows {
            let id = row.column("id").map_err(|error| unread(StoreError::unreadable("watch", error)))?;
            match show::<W>(row).map_err(|_other| Unread::Database)? {
                Some(shown) => {
                    bytes += shown.encoded_len();
                    page.rows.push((id, shown));
                }
                None => page.odd = true,
            }
            if bytes > PAGE_BYTES {
                // The beginning of a page is a page.
                page.end = id;
                break;
            }
        }
        Ok(Seen { snapshot, lsn, what: page })
    }

    async fn vanished(&self, month: Option<Month>, since: u64) -> Result<Seen<bool>, Unread> {
        let _turn = turn().await;
        self.store.vanished_since(W::TABLE, self.site, month, since).await.map_err(unread)
    }
}

async fn turn() -> Option<SemaphorePermit<'static>> {
    // It is never closed.
    READING.acquire().await.ok()
}

fn unread(error: StoreError) -> Unread {
    tracing::warn!(%error, "cannot read rows for a watch");
    Unread::Database
}

/// The row as the wire shows it. One that cannot be shown counts as not there: a hand has written into it what no message can hold, such
/// as an infinite time, or more than fits into one. An error if it is the table that is not as this program knows it.
pub(super) fn show<W: Watched>(row: &impl Columns) -> Result<Option<W::Row>, OtherColumns> {
    let why = match W::read(row) {
        Ok(shown) if shown.encoded_len() <= MAX_ROW => return Ok(Some(shown)),
        Ok(shown) => format!("it has {} bytes", shown.encoded_len()),
        Err(why) => match why.downcast::<OtherColumns>() {
            Ok(other) => {
                tracing::warn!(table = W::TABLE.name(), why = %other, "the schema is not this program's");
                return Err(*other);
            }
            Err(why) => why.to_string(),
        },
    };
    let id = row.column::<Uuid>("id").unwrap_or_default();
    tracing::warn!(table = W::TABLE.name(), row.id = %id, %why, "a row cannot be shown to watchers");
    metrics::counter!(telemetry::WATCH_ROWS_NOT_SHOWN_TOTAL, "table" => W::TABLE.name()).increment(1);
    Ok(None)
}
