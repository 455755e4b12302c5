//! `sites`: the tenants. Looked up by public id or id, and by the origins they allow.

use uuid::Uuid;

use super::Store;
use super::error::StoreError;
use super::statement::Months;
use super::transaction::{Purpose, Reader, Transaction};
use crate::domain::id::SiteId;
use crate::domain::origin::Origin;
use crate::domain::site::Site;

crate::statement!(
    FIND_SITE,
    Months::None,
    [TEXT, UUID],
    "SELECT id, public_id, domain, origins, region FROM public.sites WHERE public_id = $1 OR id = $2 \
     ORDER BY (public_id = $1) DESC LIMIT 1"
);

crate::statement!(
    ANY_SITE_ALLOWS,
    Months::None,
    [TEXT_ARRAY, TEXT_ARRAY],
    "SELECT EXISTS (SELECT FROM public.sites WHERE domain = ANY ($1)) \
     OR EXISTS (SELECT FROM public.sites WHERE origins && $2)"
);

crate::statement!(
    ADD_SITE,
    Months::None,
    [TEXT, UUID, TEXT, TEXT, TEXT_ARRAY, TEXT],
    "INSERT INTO public.sites (public_id, user_id, name, domain, origins, region) VALUES ($1, $2, $3, $4, $5, $6) \
     ON CONFLICT (public_id) DO NOTHING RETURNING id, public_id, domain, origins, region"
);

crate::statement!(
    SET_SITE_ORIGINS,
    Months::None,
    [UUID, TEXT_ARRAY],
    "UPDATE public.sites SET origins = $2 WHERE id = $1 RETURNING id, public_id, domain, origins, region"
);

crate::statement!(
    LIST_SITES,
    Months::None,
    [],
    "SELECT id, public_id, domain, origins, region, name FROM public.sites ORDER BY created_at, id"
);

crate::statement!(SITE_REGION, Months::None, [UUID], "SELECT region FROM public.sites WHERE id = $1");

/// The country in which the site's national telephone numbers are read.
pub async fn region(tx: &Transaction<'_>, id: SiteId) -> Result<Option<String>, StoreError> {
    let rows = tx.query(&SITE_REGION, &[&id.as_uuid()]).await?;
    let region = rows.first().map(|row| row.try_get(0)).transpose();
    Ok(region.map_err(|error| StoreError::unreadable(SITE_REGION.name, error))?.flatten())
}

fn site(row: &tokio_postgres::Row) -> Result<Site, StoreError> {
    let read = || -> Result<Site, tokio_postgres::Error> {
        Ok(Site {
            id: SiteId::from_uuid(row.try_get(0)?),
            public_id: row.try_get(1)?,
            domain: row.try_get(2)?,
            origins: row.try_get(3)?,
            region: row.try_get(4)?,
        })
    };
    read().map_err(|error| StoreError::unreadable("read site", error))
}

/// A site to be added. `domain` and `origins` are in their stored form, see [`crate::domain::origin`].
#[derive(Debug)]
pub struct NewSite {
    pub public_id: String,
    pub owner: Option<Uuid>,
    pub name: String,
    pub domain: String,
    pub origins: Vec<String>,
    /// ISO 3166 country, upper case.
    pub region: Option<String>,
}

impl Store {
    /// The site with this public id, or else with this id.
    pub async fn find_site(&self, public_id: &str, id: Option<SiteId>) -> Result<Option<Site>, StoreError> {
        let tx = self.begin(Purpose::Serve).await?;
        let rows = tx.query(&FIND_SITE, &[&public_id, &id.map(|id| id.as_uuid())]).await?;
        tx.commit().await?;
        rows.first().map(site).transpose()
    }

    /// The site with this public id or id, if the reader may see it.
    pub async fn find_site_as(
        &self,
        reader: Reader,
        public_id: &str,
        id: Option<SiteId>,
    ) -> Result<Option<Site>, StoreError> {
        let tx = self.begin(Purpose::Read(reader)).await?;
        let rows = tx.query(&FIND_SITE, &[&public_id, &id.map(|id| id.as_uuid())]).await?;
        tx.commit().await?;
        rows.first().map(site).transpose()
    }

    /// Whether any site allows this origin.
    pub async fn any_site_allows(&self, origin: &Origin) -> Result<bool, StoreError> {
        let tx = self.begin(Purpose::Serve).await?;
        let rows = tx.query(&ANY_SITE_ALLOWS, &[&origin.domains(), &origin.spellings()]).await?;
        tx.commit().await?;
        let allowed = rows.first().map(|row| row.try_get(0)).transpose();
        Ok(allowed.map_err(|error| StoreError::unreadable(ANY_SITE_ALLOWS.name, error))?.unwrap_or(false))
    }

    /// Adds a site; nothing if the public id is taken.
    pub async fn add_site(&self, new: &NewSite) -> Result<Option<Site>, StoreError> {
        let tx = self.begin(Purpose::Operate).await?;
        let rows = tx
            .query(&ADD_SITE, &[&new.public_id, &new.owner, &new.name, &new.domain, &new.origins, &new.region])
            .await?;
        tx.commit().await?;
        rows.first().map(site).transpose()
    }

    /// Replaces the extra origins of a site.
    pub async fn set_site_origins(&self, id: SiteId, origins: &[String]) -> Result<Option<Site>, StoreError> {
        let tx = self.begin(Purpose::Operate).await?;
        let rows = tx.query(&SET_SITE_ORIGINS, &[&id.as_uuid(), &origins]).await?;
        tx.commit().await?;
        rows.first().map(site).transpose()
    }

    /// All sites with their names, oldest first.
    pub async fn list_sites(&self) -> Result<Vec<(Site, String)>, StoreError> {
        let tx = self.begin(Purpose::Operate).await?;
        let rows = tx.query(&LIST_SITES, &[]).await?;
        tx.commit().await?;
        rows.iter()
            .map(|row| {
                let name = row.try_get(5).map_err(|error| StoreError::unreadable(LIST_SITES.name, error))?;
                Ok((site(row)?, name))
            })
            .collect()
    }
}
