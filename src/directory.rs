//! Which sites exist and which origins they allow, cached for seconds.
//!
//! Every door asks here before it processes anything. The caches are bounded, also for ids and origins that nobody knows, so that a
//! flood of rubbish neither grows memory nor reaches the database twice; a site that was just added is known within seconds. Whoever
//! buries what belongs to nobody asks [`Directory::site_for_sure`] or [`Directory::site_by_id`], which believe no remembered *unknown*.
//!
//! Nearly every answer is remembered. What asks the database has a box of its own, so that not each request carries room for it: it is several
//! times of what the rest of a request needs, and a request is moved a few times on its way.

use std::sync::Arc;
use std::time::Duration;

use moka::Expiry;
use moka::future::Cache;
use uuid::Uuid;

use crate::domain::id::SiteId;
use crate::domain::origin::Origin;
use crate::domain::outcome::Unavailable;
use crate::domain::site::Site;
use crate::store::Store;
use crate::store::error::StoreError;

/// How long a known site is believed without asking again.
const KNOWN_FOR: Duration = Duration::from_secs(30);
/// How long an unknown one is.
const UNKNOWN_FOR: Duration = Duration::from_secs(2);
/// Longest site id that is looked up, in bytes.
const MAX_SITE_TEXT: usize = 128;

/// Cached look-ups; clones share the caches.
#[derive(Clone)]
pub struct Directory {
    store: Store,
    sites: Cache<String, Option<Arc<Site>>>,
    origins: Cache<Origin, bool>,
}

/// Positive answers live longer than negative ones.
struct ByAnswer;

impl Expiry<String, Option<Arc<Site>>> for ByAnswer {
    fn expire_after_create(&self, _: &String, site: &Option<Arc<Site>>, _: std::time::Instant) -> Option<Duration> {
        Some(if site.is_some() { KNOWN_FOR } else { UNKNOWN_FOR })
    }
}

impl Expiry<Origin, bool> for ByAnswer {
    fn expire_after_create(&self, _: &Origin, allowed: &bool, _: std::time::Instant) -> Option<Duration> {
        Some(if *allowed { KNOWN_FOR } else { UNKNOWN_FOR })
    }
}

impl Directory {
    pub fn new(store: Store) -> Self {
        Self {
            store,
            sites: Cache::builder().max_capacity(50_000).expire_after(ByAnswer).build(),
            origins: Cache::builder().max_capacity(50_000).expire_after(ByAnswer).build(),
        }
    }

    /// The site that a client names: its public id, or its UUID with or without hyphens.
    pub async fn site(&self, text: &str) -> Result<Option<Arc<Site>>, Unavailable> {
        let text = text.trim();
        if text.is_empty() || text.len() > MAX_SITE_TEXT || text.contains('\0') {
            return Ok(None);
        }
        match self.sites.get(text).await {
            Some(remembered) => Ok(remembered),
            None => Box::pin(self.look_up(text)).await,
        }
    }

    async fn look_up(&self, text: &str) -> Result<Option<Arc<Site>>, Unavailable> {
        let id = Uuid::try_parse(text).ok().map(SiteId::from_uuid);
        let found = self
            .sites
            .try_get_with_by_ref(text, async { self.store.find_site(text, id).await.map(|site| site.map(Arc::new)) });
        found.await.map_err(|error| unavailable(&error))
    }

    /// As [`Directory::site`], and *unknown* holds for this moment.
    pub async fn site_for_sure(&self, text: &str) -> Result<Option<Arc<Site>>, Unavailable> {
        if let Some(site) = self.site(text).await? {
            return Ok(Some(site));
        }
        self.sites.invalidate(text.trim()).await;
        self.site(text).await
    }

    /// The site with this id; *unknown* holds for this moment.
    pub async fn site_by_id(&self, id: SiteId) -> Result<Option<Arc<Site>>, Unavailable> {
        // A public id could be spelled like another site's UUID; by id only the id counts.
        if let Some(site) = self.site(&id.to_string()).await?.filter(|site| site.id == id) {
            return Ok(Some(site));
        }
        // No public id is empty.
        let found = Box::pin(self.store.find_site("", Some(id))).await;
        found.map(|site| site.map(Arc::new)).map_err(|error| unavailable(&error))
    }

    /// Whether any site allows this origin: all that a preflight can ask, since it has no body.
    pub async fn any_site_allows(&self, origin: &Origin) -> Result<bool, Unavailable> {
        if let Some(remembered) = self.origins.get(origin).await {
            return Ok(remembered);
        }
        let found = self.origins.try_get_with_by_ref(origin, self.store.any_site_allows(origin));
        Box::pin(found).await.map_err(|error| unavailable(&error))
    }
}

fn unavailable(error: &StoreError) -> Unavailable {
    tracing::warn!(%error, "cannot look up a site");
    Unavailable::Database
}
