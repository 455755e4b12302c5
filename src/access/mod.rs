//! Who is behind a bearer token: the proof, cached for seconds only.
//!
//! A machine's API token is looked up by its hash ([`token`], and `known.rs` for the cache in front of the database); a person's JWT is
//! checked against the secret or the published keys of the sign-in service (`jwt.rs`, [`jwks`]). What cannot be checked now is
//! [`Denied::Database`], [`Denied::Busy`] or [`Denied::Provider`], never a way in. A stream asks its [`Admission`] every few seconds whether
//! its caller is still welcome.

use std::sync::Arc;

use crate::domain::access::Caller;
use crate::secret::Secret;
use crate::store::Store;
use crate::store::error::StoreError;
use crate::store::tokens::TokenHash;
use crate::telemetry;

pub mod jwks;
mod jwt;
mod known;
pub mod token;

use jwks::JwksConfig;
use jwt::Users;
use known::Tokens;
pub use token::{ApiToken, hash};

/// Longest bearer token that is looked at, bytes. A user's JWT carries what their application keeps about them.
const MAX_BEARER: usize = 8 << 10;

/// Why nobody is let in.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Denied {
    /// It proves nobody: unknown, malformed, revoked, expired, forged, of another kind.
    #[error("the bearer token is not valid")]
    Invalid,
    /// The database does not say.
    #[error("the bearer token cannot be looked up")]
    Database(#[source] Arc<StoreError>),
    /// Too many tokens are being looked up.
    #[error("too many bearer tokens are being looked up")]
    Busy,
    /// It is signed with a key that the sign-in service may have published, and that cannot be asked.
    #[error("the keys of the sign-in service cannot be fetched")]
    Provider,
}

/// Whose JWTs are taken. The default takes none.
#[derive(Debug, Clone, Default)]
pub struct UserTokens {
    /// Key of HS256, as text.
    pub secret: Option<Secret>,
    /// Where the public keys of ES256 and RS256 are.
    pub jwks: Option<JwksConfig>,
    /// What `iss` must be, if it is to be anything.
    pub issuer: Option<String>,
}

/// Proves callers. Clones share it.
#[derive(Clone)]
pub struct Gate {
    tokens: Arc<Tokens>,
    users: Arc<Users>,
    #[cfg(test)]
    known: std::collections::HashMap<TokenHash, Arc<Caller>>,
}

/// A caller, and the proof by which they came in.
#[derive(Clone)]
pub struct Admission {
    gate: Gate,
    caller: Arc<Caller>,
    proof: Proof,
}

#[derive(Clone)]
enum Proof {
    Token(TokenHash),
    Jwt(Arc<str>),
}

impl Admission {
    pub fn caller(&self) -> &Arc<Caller> {
        &self.caller
    }

    /// Whether the same proof still opens the same doors. Cheap enough to be asked every two seconds, and then a revoked token ends a
    /// stream within five. [`Denied::Invalid`] means go; whoever hears that it cannot be checked now should soon ask again, or go as well.
    pub async fn renew(&self) -> Result<(), Denied> {
        let caller = match &self.proof {
            Proof::Token(hash) => self.gate.by_token(hash).await?,
            Proof::Jwt(text) => self.gate.users.verify(text).await?,
        };
        if caller == self.caller { Ok(()) } else { Err(Denied::Invalid) }
    }
}

impl Gate {
    /// A gate for API tokens alone. Needs a runtime: it keeps in the background when tokens were used.
    pub fn new(store: Store) -> Self {
        Self {
            tokens: Arc::new(Tokens::new(store)),
            users: Arc::new(Users::nobody()),
            #[cfg(test)]
            known: std::collections::HashMap::new(),
        }
    }

    /// Takes people's JWTs as well. With published keys it fetches them from now on, in the background.
    pub fn with_users(mut self, config: &UserTokens) -> anyhow::Result<Self> {
        self.users = Arc::new(Users::new(config)?);
        Ok(self)
    }

    /// A gate that knows one more token, without a database.
    #[cfg(test)]
    pub fn knowing(mut self, token: &str, caller: Caller) -> Self {
        self.known.insert(hash(token), Arc::new(caller));
        self
    }

    /// The caller whom this bearer token proves.
    pub async fn admit(&self, bearer: &str) -> Result<Admission, Denied> {
        let admitted = self.prove(bearer).await;
        let outcome = match &admitted {
            Ok(Admission { proof: Proof::Token(_), .. }) => "token",
            Ok(Admission { proof: Proof::Jwt(_), .. }) => "user",
            Err(Denied::Invalid) => "invalid",
            Err(Denied::Database(_) | Denied::Busy | Denied::Provider) => "unavailable",
        };
        metrics::counter!(telemetry::ADMISSIONS_TOTAL, "outcome" => outcome).increment(1);
        admitted
    }

    async fn prove(&self, bearer: &str) -> Result<Admission, Denied> {
        #[cfg(test)]
        if let Some(known) = self.known.get(&hash(bearer)) {
            return Ok(Admission { gate: self.clone(), caller: known.clone(), proof: Proof::Token(hash(bearer)) });
        }
        if bearer.len() > MAX_BEARER {
            return Err(Denied::Invalid);
        }
        let (caller, proof) = if bearer.starts_with(token::PREFIX) {
            let hash = bearer.parse::<ApiToken>().map_err(|_| Denied::Invalid)?.hash();
            (self.by_token(&hash).await?, Proof::Token(hash))
        } else {
            (self.users.verify(bearer).await?, Proof::Jwt(bearer.into()))
        };
        Ok(Admission { gate: self.clone(), caller, proof })
    }

    async fn by_token(&self, hash: &TokenHash) -> Result<Arc<Caller>, Denied> {
        #[cfg(test)]
        if let Some(known) = self.known.get(hash) {
            return Ok(known.clone());
        }
        self.tokens.find(hash).await
    }
}
