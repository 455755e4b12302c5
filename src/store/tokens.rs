//! `api_tokens`: who may come in by a token. Only the hash of a token is ever here.

use uuid::Uuid;

use super::Store;
use super::error::StoreError;
use super::statement::Months;
use super::transaction::Purpose;
use crate::domain::access::{Caller, Reach, Scope};
use crate::domain::id::{SiteId, TokenId};

/// SHA-256 of a token.
pub type TokenHash = [u8; 32];

crate::statement!(
    FIND_TOKEN,
    Months::None,
    [BYTEA],
    "SELECT t.id, t.scopes, t.site_id, s.public_id FROM public.api_tokens t LEFT JOIN public.sites s ON s.id = t.site_id \
     WHERE t.token_hash = $1 AND t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > now())"
);

crate::statement!(
    ISSUE_TOKEN,
    Months::None,
    [UUID, BYTEA, TEXT, TEXT_ARRAY],
    "INSERT INTO public.api_tokens (site_id, all_sites, token_hash, name, scopes) VALUES ($1, $1 IS NULL, $2, $3, $4) RETURNING id"
);

impl Store {
    /// Whose token this is; nothing if it is unknown, revoked or expired.
    pub async fn find_token(&self, hash: &TokenHash) -> Result<Option<Caller>, StoreError> {
        let tx = self.begin(Purpose::Serve).await?;
        let rows = tx.query(&FIND_TOKEN, &[&hash.as_slice()]).await?;
        tx.commit().await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let read = || -> Result<Caller, tokio_postgres::Error> {
            // A scope that this version does not know opens nothing.
            let scopes: Vec<String> = row.try_get(1)?;
            let site: Option<Uuid> = row.try_get(2)?;
            let reach = match site {
                None => Reach::AllSites,
                Some(id) => Reach::Site { id: SiteId::from_uuid(id), public_id: row.try_get(3)? },
            };
            Ok(Caller::Token {
                id: TokenId::from_uuid(row.try_get(0)?),
                scopes: scopes.iter().filter_map(|name| Scope::from_name(name)).collect(),
                reach,
            })
        };
        read().map(Some).map_err(|error| StoreError::unreadable(FIND_TOKEN.name, error))
    }

    /// Keeps a new token's hash. No site: every site.
    pub async fn issue_token(
        &self,
        hash: &TokenHash,
        name: &str,
        scopes: &[Scope],
        site: Option<SiteId>,
    ) -> Result<TokenId, StoreError> {
        let tx = self.begin(Purpose::Operate).await?;
        let names: Vec<&str> = scopes.iter().map(|scope| scope.name()).collect();
        let rows = tx.query(&ISSUE_TOKEN, &[&site.map(|id| id.as_uuid()), &hash.as_slice(), &name, &names]).await?;
        tx.commit().await?;
        let id = rows.first().map(|row| row.try_get(0)).transpose();
        let id = id.map_err(|error| StoreError::unreadable(ISSUE_TOKEN.name, error))?;
        id.map(TokenId::from_uuid).ok_or_else(|| StoreError::unreadable(ISSUE_TOKEN.name, "no id came back"))
    }
}
