//! Begins to read the log: connects, makes a temporary slot, and learns which transactions lie before it.

use std::time::Duration;

use rand::Rng;

use super::FeedError;
use super::fitness::{HELD, OTHER_DATABASE, judge, obstacle};
use super::link::{Link, LinkError, Rows};
use crate::domain::change::Lineage;
use crate::store::Store;
use crate::store::feed::Origin;
use crate::store::pool::Manager;

/// A log that is being sent.
pub(super) struct Source {
    pub link: Link,
    pub lineage: Lineage,
    /// Everything committed from here on is told, and nothing before.
    pub start: u64,
    /// What lies before.
    pub origin: Origin,
}

/// Where the log is read, and where questions go.
#[derive(Clone)]
pub(super) struct Places {
    pub store: Store,
    pub direct: Manager,
    /// Whether both log in alike.
    pub same: bool,
}

impl Places {
    fn login(&self) -> &str {
        self.direct.config().get_user().unwrap_or_default()
    }

    /// What a query can see that is in the way; none if nothing is, or the database is away.
    pub async fn obstacle(&self, running: bool) -> Option<String> {
        let fitness = self.store.feed_fitness().await.ok()?;
        obstacle(&fitness, self.same, running)
    }

    /// Begins. A slot waits until every transaction that writes now has ended, one after the other. The caller bounds the whole by `limit`;
    /// PostgreSQL is told to give up by itself a little sooner, as it does not notice in there that nobody waits any more.
    pub async fn start(&self, limit: Duration) -> Result<Source, FeedError> {
        if let Some(why) = self.obstacle(false).await {
            return Err(FeedError::Unfit(why));
        }
        let (mut link, lineage, slot, start, snapshot) = self.slot(limit * 4 / 5).await.map_err(|error| {
            match error.code() {
                "55P03" => tracing::warn!("the change feed cannot begin: {HELD}"),
                _ => tracing::warn!(%error, "the change feed cannot begin"),
            }
            judge(&error, self.login())
        })?;
        // The snapshot lives until the next command on the connection.
        let origin = self.store.feed_origin(&snapshot).await.map_err(|error| {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the change feed cannot see what lies before its slot"
            );
            let other = ["22023", "0A000", "42704"].iter().any(|code| error.detail.to_string().starts_with(code));
            if other { FeedError::Unfit(OTHER_DATABASE.to_owned()) } else { FeedError::Away }
        })?;
        let begin = format!(
            "START_REPLICATION SLOT \"{slot}\" LOGICAL {:X}/{:X} \
             (proto_version '1', publication_names 'opsmantik_feed', binary 'true')",
            start >> 32,
            start & 0xffff_ffff
        );
        link.start_replication(&begin).await.map_err(|error| {
            tracing::warn!(%error, "the change log is not sent");
            judge(&error, self.login())
        })?;
        Ok(Source { link, lineage: Lineage { database: origin.database, ..lineage }, start, origin })
    }

    async fn slot(&self, patience: Duration) -> Result<(Link, Lineage, String, u64, String), LinkError> {
        let mut link = Link::connect(&self.direct).await?;
        let identity = link.query("IDENTIFY_SYSTEM").await?;
        let lineage = lineage(&identity).ok_or(LinkError::Protocol("the database does not say which one it is"))?;
        link.query(&format!("SET lock_timeout = {}", patience.as_millis())).await?;
        link.query("SET statement_timeout = 0").await?;
        let slot = format!("opsmantik_{:032x}", rand::rng().random::<u128>());
        let create = format!("CREATE_REPLICATION_SLOT \"{slot}\" TEMPORARY LOGICAL pgoutput (SNAPSHOT 'export')");
        let made = match link.query(&create).await {
            // Before PostgreSQL 15 the options had no brackets.
            Err(error) if error.code() == "42601" => {
                let create = format!("CREATE_REPLICATION_SLOT \"{slot}\" TEMPORARY LOGICAL pgoutput EXPORT_SNAPSHOT");
                link.query(&create).await?
            }
            made => made?,
        };
        let (start, snapshot) =
            slot_of(&made).ok_or(LinkError::Protocol("the database does not say where its slot begins"))?;
        Ok((link, lineage, slot, start, snapshot))
    }
}

fn lineage(rows: &Rows) -> Option<Lineage> {
    let [row] = rows.as_slice() else { return None };
    let number = |at: usize| row.get(at)?.as_deref();
    Some(Lineage { system: number(0)?.parse().ok()?, timeline: number(1)?.parse().ok()?, database: 0 })
}

fn slot_of(rows: &Rows) -> Option<(u64, String)> {
    let [row] = rows.as_slice() else { return None };
    let (high, low) = row.get(1)?.as_deref()?.split_once('/')?;
    let half = |text| u64::from_str_radix(text, 16).ok();
    Some(((half(high)? << 32) | half(low)?, row.get(2)?.clone()?))
}
