//! The signature of a QStash delivery: header `Upstash-Signature`, a JWT.
//!
//! HS256 and nothing else, keyed with the current signing key as text, then with the next one. It holds for one receiver
//! (`sub`), a short time (`nbf`, `exp`) and exactly one body (`body`, the SHA-256 of its raw bytes). Whoever cannot produce it gets
//! nothing processed, buried or explained.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Signing keys of QStash's local development server. They are printed in its SDK, so they prove nothing.
const DEVELOPMENT_KEYS: [&str; 2] = ["sig_7kYjw48mhY7kAjqNGcy6cr29RJ6r", "sig_5ZB6DVzB1wjE8S6rZ7eenA8Pdnhs"];

/// Clocks may differ by this much, seconds.
const LEEWAY: u64 = 5;

pub fn is_development_key(key: &str) -> bool {
    DEVELOPMENT_KEYS.contains(&key)
}

/// Why a delivery is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    #[error("this server has no signing keys")]
    NoKeys,
    #[error("there is no signature")]
    Absent,
    #[error("neither signing key made this signature")]
    Forged,
    #[error("the signature is not for this time")]
    Expired,
    #[error("the signature has a claim that is absent or wrong, or was made for another receiver")]
    Claims,
    #[error("the signature was made for another body")]
    Body,
}

/// Checks signatures for one receiver.
pub struct Verifier {
    keys: Vec<DecodingKey>,
    validation: Validation,
    receiver: String,
}

impl Verifier {
    /// `keys` in the order in which they are tried; `receiver` is the public URL of the worker.
    pub fn new(keys: &[&str], receiver: &str) -> Self {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.leeway = LEEWAY;
        validation.validate_nbf = true;
        validation.validate_aud = false;
        validation.set_required_spec_claims(&["exp", "nbf", "iss", "sub"]);
        validation.set_issuer(&["Upstash"]);
        Self {
            keys: keys.iter().map(|key| DecodingKey::from_secret(key.as_bytes())).collect(),
            validation,
            receiver: receiver.trim_end_matches('/').to_owned(),
        }
    }

    /// Refuses everything.
    pub fn without_keys() -> Self {
        Self::new(&[], "")
    }

    /// Whether `signature` was made with one of the keys for this receiver, now, and for exactly this body.
    pub fn verify(&self, signature: Option<&str>, body: &[u8]) -> Result<(), SignatureError> {
        if self.keys.is_empty() {
            return Err(SignatureError::NoKeys);
        }
        let signature = signature.map(str::trim).filter(|text| !text.is_empty()).ok_or(SignatureError::Absent)?;
        let claims = self.claims(signature)?;
        let claim = |name: &str| claims.get(name).and_then(Value::as_str).ok_or(SignatureError::Claims);
        if claim("iss")? != "Upstash" || claim("sub")?.trim_end_matches('/') != self.receiver {
            return Err(SignatureError::Claims);
        }
        if equal(claim("body")?.trim_end_matches('=').as_bytes(), body_hash(body).as_bytes()) {
            Ok(())
        } else {
            Err(SignatureError::Body)
        }
    }

    fn claims(&self, signature: &str) -> Result<Value, SignatureError> {
        use jsonwebtoken::errors::ErrorKind;
        for key in &self.keys {
            match jsonwebtoken::decode::<Value>(signature, key, &self.validation) {
                Ok(token) => return Ok(token.claims),
                Err(refused) => match refused.kind() {
                    // The signature was right, so no other key has to be tried.
                    ErrorKind::ExpiredSignature | ErrorKind::ImmatureSignature => return Err(SignatureError::Expired),
                    ErrorKind::MissingRequiredClaim(_)
                    | ErrorKind::InvalidIssuer
                    | ErrorKind::InvalidClaimFormat(_) => {
                        return Err(SignatureError::Claims);
                    }
                    _ => {}
                },
            }
        }
        Err(SignatureError::Forged)
    }
}

/// Base64url without padding of the SHA-256.
fn body_hash(body: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(Sha256::digest(body))
}

/// Compares in a time that depends on the lengths only.
fn equal(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && std::hint::black_box(a.iter().zip(b).fold(0, |differs, (a, b)| differs | (a ^ b))) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use jsonwebtoken::{EncodingKey, Header};
    use serde_json::json;

    const RECEIVER: &str = "https://c.example/api/sync/worker";
    const BODY: &[u8] = br#"{"hello":"world"}"#;
    const BODY_HASH: &str = "k6I5cakU5erL8KjSUVTNownDwccvu5kU1Hxg88toFYg=";

    fn verifier() -> Verifier {
        Verifier::new(&["sig_current", "sig_next"], RECEIVER)
    }

    fn claims(change: impl FnOnce(&mut Value)) -> Value {
        let now = chrono::Utc::now().timestamp();
        let mut claims = json!({"iss": "Upstash", "sub": RECEIVER, "exp": now + 300, "nbf": now, "iat": now,
            "jti": "jwt_1", "body": BODY_HASH});
        change(&mut claims);
        claims
    }

    fn signed(algorithm: Algorithm, key: &str, claims: &Value) -> String {
        jsonwebtoken::encode(&Header::new(algorithm), claims, &EncodingKey::from_secret(key.as_bytes()))
            .expect("a test's own token")
    }

    fn verify(change: impl FnOnce(&mut Value)) -> Result<(), SignatureError> {
        verifier().verify(Some(&signed(Algorithm::HS256, "sig_current", &claims(change))), BODY)
    }

    #[test]
    fn the_hash_of_a_body_is_the_one_of_the_contract() {
        assert_eq!(format!("{}=", body_hash(BODY)), BODY_HASH);
        assert_eq!(format!("{}=", body_hash(b"")), "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU=");
    }

    #[test]
    fn both_keys_are_good_padded_or_not() {
        for key in ["sig_current", "sig_next"] {
            for body in [BODY_HASH, BODY_HASH.trim_end_matches('=')] {
                let token = signed(Algorithm::HS256, key, &claims(|c| c["body"] = body.into()));
                assert_eq!(verifier().verify(Some(&token), BODY), Ok(()), "{key} {body}");
            }
        }
        let token = signed(Algorithm::HS256, "sig_other", &claims(|_| ()));
        assert_eq!(verifier().verify(Some(&token), BODY), Err(SignatureError::Forged));
    }

    #[test]
    fn every_claim_counts() {
        let now = chrono::Utc::now().timestamp();
        assert_eq!(verify(|c| c["sub"] = format!("{RECEIVER}/").into()), Ok(()), "a slash at the end");
        assert_eq!(verify(|c| c["sub"] = "https://evil.example/api/sync/worker".into()), Err(SignatureError::Claims));
        for iss in [json!("upstash"), json!(["Upstash"]), Value::Null] {
            assert_eq!(verify(|c| c["iss"] = iss), Err(SignatureError::Claims));
        }
        assert_eq!(verify(|c| c["exp"] = (now - 3).into()), Ok(()), "within the leeway");
        assert_eq!(verify(|c| c["nbf"] = (now + 3).into()), Ok(()), "within the leeway");
        assert_eq!(verify(|c| c["exp"] = (now - 10).into()), Err(SignatureError::Expired));
        assert_eq!(verify(|c| c["nbf"] = (now + 10).into()), Err(SignatureError::Expired));
        for claim in ["exp", "nbf", "iss", "sub", "body"] {
            assert_eq!(
                verify(|c| _ = c.as_object_mut().map(|c| c.remove(claim))),
                Err(SignatureError::Claims),
                "{claim}"
            );
        }
    }

    #[test]
    fn a_body_that_was_touched_is_refused() {
        let token = signed(Algorithm::HS256, "sig_current", &claims(|_| ()));
        for body in [&br#"{"hello": "world"}"#[..], b"", br#"{"hello":"world"} "#] {
            assert_eq!(verifier().verify(Some(&token), body), Err(SignatureError::Body));
        }
        assert_eq!(verify(|c| c["body"] = "".into()), Err(SignatureError::Body));
    }

    #[test]
    fn no_other_algorithm_passes() {
        let good = signed(Algorithm::HS256, "sig_current", &claims(|_| ()));
        let parts: Vec<&str> = good.split('.').collect();
        let header = |alg: &str| URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"{alg}","typ":"JWT"}}"#));
        for alg in ["none", "None", "NONE", "RS256", "ES256", "HS512", "HS384", ""] {
            for signature in ["", parts[2]] {
                let token = format!("{}.{}.{signature}", header(alg), parts[1]);
                assert_eq!(verifier().verify(Some(&token), BODY), Err(SignatureError::Forged), "{alg}");
            }
        }
        for algorithm in [Algorithm::HS384, Algorithm::HS512] {
            let token = signed(algorithm, "sig_current", &claims(|_| ()));
            assert_eq!(verifier().verify(Some(&token), BODY), Err(SignatureError::Forged));
        }
        // RS256 confusion: the key is a text for HMAC, and never one that could be public.
        let pem = "-----BEGIN PUBLIC KEY-----\nMFwwDQYJKoZIhvcNAQEBBQADSwAwSAJBAK\n-----END PUBLIC KEY-----\n";
        let token = signed(Algorithm::HS256, pem, &claims(|_| ())).replacen(parts[0], &header("RS256"), 1);
        assert_eq!(Verifier::new(&[pem], RECEIVER).verify(Some(&token), BODY), Err(SignatureError::Forged));
    }

    #[test]
    fn without_a_key_or_a_token_nothing_passes() {
        let token = signed(Algorithm::HS256, "", &claims(|c| c["sub"] = "".into()));
        assert_eq!(Verifier::without_keys().verify(Some(&token), BODY), Err(SignatureError::NoKeys));
        assert_eq!(verifier().verify(None, BODY), Err(SignatureError::Absent));
        for rubbish in ["", " ", "a.b", "a.b.c", "...", "ü.ü.ü"] {
            assert!(verifier().verify(Some(rubbish), BODY).is_err(), "{rubbish}");
        }
    }
}
