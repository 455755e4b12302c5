//! Who is behind a bearer token: the proof, cached for seconds only.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::domain::access::Caller;
use crate::store::Store;
use crate::store::error::StoreError;
use crate::store::tokens::TokenHash;

/// What every token of ours begins with.
pub const TOKEN_PREFIX: &str = "om_";

/// Why nobody is let in.
#[derive(Debug, thiserror::Error)]
pub enum Denied {
    /// It proves nobody: unknown, malformed, revoked, expired.
    #[error("the bearer token is not valid")]
    Invalid,
    /// Whether it does cannot be found out now.
    #[error("the bearer token cannot be checked now")]
    Unavailable(#[from] StoreError),
}

/// Proves callers. Clones share it.
#[derive(Clone)]
pub struct Gate {
    store: Store,
    #[cfg(test)]
    known: std::collections::HashMap<TokenHash, Arc<Caller>>,
}

/// What is stored of a token.
pub fn hash(token: &str) -> TokenHash {
    Sha256::digest(token).into()
}

impl Gate {
    pub fn new(store: Store) -> Self {
        Self {
            store,
            #[cfg(test)]
            known: std::collections::HashMap::new(),
        }
    }

    /// A gate that knows one more token, without a database.
    #[cfg(test)]
    pub fn knowing(mut self, token: &str, caller: Caller) -> Self {
        self.known.insert(hash(token), Arc::new(caller));
        self
    }

    /// The caller whom this bearer token proves.
    pub async fn admit(&self, bearer: &str) -> Result<Arc<Caller>, Denied> {
        if !bearer.starts_with(TOKEN_PREFIX) {
            return Err(Denied::Invalid);
        }
        let hash = hash(bearer);
        #[cfg(test)]
        if let Some(known) = self.known.get(&hash) {
            return Ok(known.clone());
        }
        self.store.find_token(&hash).await?.map(Arc::new).ok_or(Denied::Invalid)
    }
}
