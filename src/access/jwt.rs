//! A person's JWT, as the sign-in service (Supabase Auth) gives it out.
//!
//! Which algorithm may have signed it is decided by the kind of key that we hold, never by the token: HS256 only with our secret, ES256
//! and RS256 only with a published key of that kind. It must be for signed-in people (`aud` and `role` are `authenticated`), now, and name
//! a user. The keys `anon` and `service_role` are JWTs as well, and prove nobody.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::Utc;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use uuid::Uuid;

use super::jwks::KeySet;
use super::{Denied, UserTokens};
use crate::domain::access::Caller;
use crate::domain::id::UserId;

/// What `aud` and `role` of a signed-in person are.
const SIGNED_IN: &str = "authenticated";
/// Clocks may differ by this much, seconds.
const LEEWAY: f64 = 5.0;

pub(super) struct Users {
    secret: Option<DecodingKey>,
    published: Option<KeySet>,
    issuer: Option<String>,
}

/// What of the head counts. `crit` lists what must be understood, and nothing that can stand there is.
#[derive(Deserialize)]
struct Head {
    alg: String,
    kid: Option<String>,
    crit: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
    exp: f64,
    nbf: Option<f64>,
    aud: Audience,
    role: String,
    iss: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

impl Users {
    /// Takes no JWT at all.
    pub(super) fn nobody() -> Self {
        Self { secret: None, published: None, issuer: None }
    }

    pub(super) fn new(config: &UserTokens) -> anyhow::Result<Self> {
        Ok(Self {
            secret: config.secret.as_ref().map(|secret| DecodingKey::from_secret(secret.reveal().as_bytes())),
            published: config.jwks.clone().map(KeySet::start).transpose()?,
            issuer: config.issuer.clone(),
        })
    }

    /// The person whom this JWT proves at this moment.
    pub(super) async fn verify(&self, jwt: &str) -> Result<Arc<Caller>, Denied> {
        let head = head(jwt).filter(|head| head.crit.is_none()).ok_or(Denied::Invalid)?;
        let claims = match (head.alg.as_str(), &self.secret, &self.published, &head.kid) {
            ("HS256", Some(secret), _, _) => signed(jwt, Algorithm::HS256, secret),
            ("ES256" | "RS256", _, Some(published), Some(kid)) => {
                let key = published.find(kid).await?.ok_or(Denied::Invalid)?;
                if key.name != head.alg {
                    return Err(Denied::Invalid);
                }
                signed(jwt, key.algorithm, &key.key)
            }
            _ => None,
        };
        let user = claims.and_then(|claims| self.user(&claims)).ok_or(Denied::Invalid)?;
        Ok(Arc::new(Caller::User { id: user }))
    }

    /// Who they are, if the claims are for us and for now.
    fn user(&self, claims: &Claims) -> Option<UserId> {
        #[allow(clippy::cast_precision_loss)] // exact for some hundred thousand years
        let now = Utc::now().timestamp_millis() as f64 / 1000.0;
        // Written so that a number that is none refuses.
        let in_time = now < claims.exp + LEEWAY && claims.nbf.is_none_or(|from| from - LEEWAY <= now);
        let for_us = match &claims.aud {
            Audience::One(one) => one == SIGNED_IN,
            Audience::Many(many) => many.iter().any(|one| one == SIGNED_IN),
        };
        let from_them = self.issuer.is_none() || self.issuer == claims.iss;
        if !(in_time && for_us && from_them && claims.role == SIGNED_IN && claims.sub.len() == 36) {
            return None;
        }
        Uuid::try_parse(&claims.sub).ok().map(UserId::from_uuid)
    }
}

fn head(jwt: &str) -> Option<Head> {
    let (head, _) = jwt.split_once('.')?;
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(head).ok()?).ok()
}

/// The claims, if this key made the signature by this algorithm.
fn signed(jwt: &str, algorithm: Algorithm, key: &DecodingKey) -> Option<Claims> {
    let mut validation = Validation::new(algorithm);
    // The claims are judged here, where a missing or odd one refuses.
    validation.required_spec_claims.clear();
    (validation.validate_exp, validation.validate_nbf, validation.validate_aud) = (false, false, false);
    jsonwebtoken::decode(jwt, key, &validation).ok().map(|token| token.claims)
}
