//! `api_tokens`: who may come in by a token. Only the hash of a token is ever here.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio_postgres::Row;
use uuid::Uuid;

use super::Store;
use super::error::StoreError;
use super::statement::Months;
use super::transaction::Purpose;
use crate::domain::access::{Caller, Reach, Scope};
use crate::domain::id::{SiteId, TokenId};

/// SHA-256 of a token.
pub type TokenHash = [u8; 32];

/// What a list shows of a token `t` and its site `s`.
macro_rules! shown {
    () => {
        "t.id, t.name, t.site_id, s.public_id, t.all_sites, t.scopes, t.created_at, t.expires_at, t.revoked_at, t.last_used_at"
    };
}

crate::statement!(
    FIND_TOKEN,
    Months::None,
    [BYTEA],
    "SELECT t.id, t.scopes, t.site_id, s.public_id, t.expires_at \
     FROM public.api_tokens t LEFT JOIN public.sites s ON s.id = t.site_id \
     WHERE t.token_hash = $1 AND t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > now())"
);

// Another server may be at the same rows: what is locked is being noted.
crate::statement!(
    NOTE_TOKEN_USES,
    Months::None,
    [UUID_ARRAY],
    "UPDATE public.api_tokens SET last_used_at = now() WHERE id IN ( \
         SELECT id FROM public.api_tokens \
         WHERE id = ANY ($1) AND (last_used_at IS NULL OR last_used_at < now() - interval '55 seconds') \
         FOR NO KEY UPDATE SKIP LOCKED)"
);

crate::statement!(
    ISSUE_TOKEN,
    Months::None,
    [UUID, BYTEA, TEXT, TEXT_ARRAY, TIMESTAMPTZ],
    concat!(
        "WITH t AS ( \
             INSERT INTO public.api_tokens (site_id, all_sites, token_hash, name, scopes, expires_at) \
             VALUES ($1, $1 IS NULL, $2, $3, $4, $5) RETURNING *) \
         SELECT ",
        shown!(),
        " FROM t LEFT JOIN public.sites s ON s.id = t.site_id"
    )
);

crate::statement!(
    LIST_TOKENS,
    Months::None,
    [UUID],
    concat!(
        "SELECT ",
        shown!(),
        " FROM public.api_tokens t LEFT JOIN public.sites s ON s.id = t.site_id \
          WHERE $1::uuid IS NULL OR t.site_id = $1 ORDER BY t.created_at, t.id"
    )
);

// The outer SELECT reads what was there before: no time means that it is revoked now.
crate::statement!(
    REVOKE_TOKEN,
    Months::None,
    [UUID],
    "WITH revoked AS (UPDATE public.api_tokens SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL) \
     SELECT revoked_at FROM public.api_tokens WHERE id = $1"
);

crate::statement!(
    LOCK_TOKEN,
    Months::None,
    [UUID],
    "SELECT revoked_at IS NOT NULL, coalesce(expires_at <= now(), false), rotated_at IS NOT NULL \
     FROM public.api_tokens WHERE id = $1 FOR UPDATE"
);

crate::statement!(
    COPY_TOKEN,
    Months::None,
    [UUID, BYTEA],
    concat!(
        "WITH t AS ( \
             INSERT INTO public.api_tokens (site_id, all_sites, token_hash, name, scopes, expires_at) \
             SELECT site_id, all_sites, $2, name, scopes, now() + (expires_at - created_at) \
             FROM public.api_tokens WHERE id = $1 RETURNING *) \
         SELECT ",
        shown!(),
        " FROM t LEFT JOIN public.sites s ON s.id = t.site_id"
    )
);

// `least` passes over NULL: a token that never expired does so now.
crate::statement!(
    END_TOKEN,
    Months::None,
    [UUID, INT8],
    "UPDATE public.api_tokens SET rotated_at = now(), \
         revoked_at = CASE WHEN $2 <= 0 THEN now() END, \
         expires_at = CASE WHEN $2 <= 0 THEN expires_at ELSE least(expires_at, now() + $2 * interval '1 second') END \
     WHERE id = $1"
);

/// A token that is good now, and until when.
#[derive(Debug, Clone)]
pub struct FoundToken {
    pub caller: Arc<Caller>,
    pub expires_at: Option<DateTime<Utc>>,
}

/// All of a token but itself.
#[derive(Debug, Clone, Serialize)]
pub struct TokenRow {
    pub id: TokenId,
    pub name: String,
    /// None: every site.
    pub site_id: Option<SiteId>,
    /// The site's public id.
    pub site: Option<String>,
    pub all_sites: bool,
    pub scopes: Vec<String>,
    pub created_at: DateTime<Utc>,
    pub expires_at: Option<DateTime<Utc>>,
    pub revoked_at: Option<DateTime<Utc>>,
    pub last_used_at: Option<DateTime<Utc>>,
}

/// Why a token is not rotated.
#[derive(Debug, thiserror::Error)]
pub enum NotRotated {
    #[error("there is no such token")]
    Unknown,
    #[error("it is revoked already")]
    Revoked,
    #[error("it has expired already")]
    Expired,
    #[error("it was rotated already and lives on for its grace only; rotate its successor")]
    Rotated,
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What became of a token that was to be revoked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revoked {
    Now,
    Before(DateTime<Utc>),
}

fn read(row: &Row) -> Result<TokenRow, tokio_postgres::Error> {
    Ok(TokenRow {
        id: TokenId::from_uuid(row.try_get(0)?),
        name: row.try_get(1)?,
        site_id: row.try_get::<_, Option<Uuid>>(2)?.map(SiteId::from_uuid),
        site: row.try_get(3)?,
        all_sites: row.try_get(4)?,
        scopes: row.try_get(5)?,
        created_at: row.try_get(6)?,
        expires_at: row.try_get(7)?,
        revoked_at: row.try_get(8)?,
        last_used_at: row.try_get(9)?,
    })
}

fn read_found(row: &Row) -> Result<FoundToken, tokio_postgres::Error> {
    // A scope that this version does not know opens nothing.
    let scopes: Vec<String> = row.try_get(1)?;
    let reach = match row.try_get::<_, Option<Uuid>>(2)? {
        None => Reach::AllSites,
        Some(id) => Reach::Site { id: SiteId::from_uuid(id), public_id: row.try_get(3)? },
    };
    let caller = Caller::Token {
        id: TokenId::from_uuid(row.try_get(0)?),
        scopes: scopes.iter().filter_map(|name| Scope::from_name(name)).collect(),
        reach,
    };
    Ok(FoundToken { caller: Arc::new(caller), expires_at: row.try_get(4)? })
}

fn only(operation: &'static str, rows: &[Row]) -> Result<TokenRow, StoreError> {
    let row = rows.first().ok_or_else(|| StoreError::unreadable(operation, "no row came back"))?;
    read(row).map_err(|error| StoreError::unreadable(operation, error))
}

impl Store {
    /// Whose token this is; nothing if it is unknown, revoked or expired.
    pub async fn find_token(&self, hash: &TokenHash) -> Result<Option<FoundToken>, StoreError> {
        let tx = self.begin(Purpose::Serve).await?;
        let rows = tx.query(&FIND_TOKEN, &[&hash.as_slice()]).await?;
        tx.commit().await?;
        let found = rows.first().map(read_found).transpose();
        found.map_err(|error| StoreError::unreadable(FIND_TOKEN.name, error))
    }

    /// Keeps that these tokens were used just now, to the minute.
    pub async fn note_token_uses(&self, ids: &[TokenId]) -> Result<(), StoreError> {
        let ids: Vec<Uuid> = ids.iter().map(TokenId::as_uuid).collect();
        let tx = self.begin(Purpose::Serve).await?;
        tx.query(&NOTE_TOKEN_USES, &[&ids]).await?;
        tx.commit().await
    }

    /// Keeps a new token's hash. No site: every site.
    pub async fn issue_token(
        &self,
        hash: &TokenHash,
        name: &str,
        scopes: &[Scope],
        site: Option<SiteId>,
        expires_at: Option<DateTime<Utc>>,
    ) -> Result<TokenRow, StoreError> {
        let names: Vec<&str> = scopes.iter().map(|scope| scope.name()).collect();
        let site = site.map(|id| id.as_uuid());
        let tx = self.begin(Purpose::Operate).await?;
        let rows = tx.query(&ISSUE_TOKEN, &[&site, &hash.as_slice(), &name, &names, &expires_at]).await?;
        let issued = only(ISSUE_TOKEN.name, &rows)?;
        tx.commit().await?;
        Ok(issued)
    }

    /// All tokens, or those of one site alone, oldest first.
    pub async fn list_tokens(&self, site: Option<SiteId>) -> Result<Vec<TokenRow>, StoreError> {
        let tx = self.begin(Purpose::Operate).await?;
        let rows = tx.query(&LIST_TOKENS, &[&site.map(|id| id.as_uuid())]).await?;
        tx.commit().await?;
        rows.iter().map(|row| read(row).map_err(|error| StoreError::unreadable(LIST_TOKENS.name, error))).collect()
    }

    /// Revokes a token; nothing if there is none with this id.
    pub async fn revoke_token(&self, id: TokenId) -> Result<Option<Revoked>, StoreError> {
        let tx = self.begin(Purpose::Operate).await?;
        let rows = tx.query(&REVOKE_TOKEN, &[&id.as_uuid()]).await?;
        tx.commit().await?;
        let before = rows.first().map(|row| row.try_get::<_, Option<DateTime<Utc>>>(0)).transpose();
        let before = before.map_err(|error| StoreError::unreadable(REVOKE_TOKEN.name, error))?;
        Ok(before.map(|at| at.map_or(Revoked::Now, Revoked::Before)))
    }

    /// A new token in the place of another: of the same name, scopes and sites, and good for as long as that one was when it was new. That
    /// one ends at once, or, to give its users time, after `grace`.
    pub async fn rotate_token(&self, id: TokenId, hash: &TokenHash, grace: Duration) -> Result<TokenRow, NotRotated> {
        let tx = self.begin(Purpose::Operate).await?;
        let rows = tx.query(&LOCK_TOKEN, &[&id.as_uuid()]).await?;
        let row = rows.first().ok_or(NotRotated::Unknown)?;
        let is = |column| row.try_get(column).map_err(|error| StoreError::unreadable(LOCK_TOKEN.name, error));
        let [revoked, expired, rotated] = [is(0)?, is(1)?, is(2)?];
        if revoked {
            return Err(NotRotated::Revoked);
        } else if expired {
            return Err(NotRotated::Expired);
        } else if rotated {
            return Err(NotRotated::Rotated);
        }
        let rows = tx.query(&COPY_TOKEN, &[&id.as_uuid(), &hash.as_slice()]).await?;
        let seconds = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        tx.query(&END_TOKEN, &[&id.as_uuid(), &seconds]).await?;
        let rotated = only(COPY_TOKEN.name, &rows)?;
        tx.commit().await?;
        Ok(rotated)
    }
}
