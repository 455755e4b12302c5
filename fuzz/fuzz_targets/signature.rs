//! `Upstash-Signature`: nobody gets in without the key, and with it only for the receiver, the time and the body that were signed.
//!
//! The first byte chooses: any text as a signature; claims of the fuzzer's, signed with a right key; a right signature that is disturbed; other
//! algorithms and keys.
#![no_main]

use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use libfuzzer_sys::fuzz_target;
use opsmantik_fuzz::http::signature::{SignatureError, Verifier};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

const RECEIVER: &str = "https://collect.example/api/sync/worker";
const KEYS: [&str; 2] = ["sig_current_7Yc1", "sig_next_Qm42"];

static VERIFIER: LazyLock<Verifier> = LazyLock::new(|| Verifier::new(&KEYS, RECEIVER));

fn hash(body: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(Sha256::digest(body))
}

fn sign(algorithm: Algorithm, claims: &Value, key: &str) -> String {
    let key = EncodingKey::from_secret(key.as_bytes());
    jsonwebtoken::encode(&Header::new(algorithm), claims, &key).expect("claims are JSON")
}

fn right_claims(body: &[u8]) -> Value {
    let now = chrono::Utc::now().timestamp();
    json!({"iss": "Upstash", "sub": RECEIVER, "exp": now + 300, "nbf": now - 1, "iat": now, "jti": "j", "body": hash(body)})
}

/// Claims that the fuzzer wrote. Its `@now` is the time, and `@body` the hash, so that it can come near.
fn claims_of(text: &str, body: &[u8]) -> Option<Value> {
    let now = chrono::Utc::now().timestamp();
    let told: Map<String, Value> = serde_json::from_str(text).ok()?;
    let mut claims = right_claims(body);
    for (key, value) in told {
        let value = match value.as_str() {
            Some("@absent") => {
                claims.as_object_mut()?.remove(&key);
                continue;
            }
            Some("@now") => now.into(),
            Some("@late") => (now - 30).into(),
            Some("@early") => (now + 30).into(),
            Some("@body") => hash(body).into(),
            Some("@padded") => format!("{}=", hash(body)).into(),
            _ => value,
        };
        claims[&key] = value;
    }
    Some(claims)
}

/// What must be true of claims that were believed.
fn check_believed(claims: &Value, body: &[u8]) {
    let now = chrono::Utc::now().timestamp() as f64;
    let number = |name: &str| claims[name].as_f64().unwrap_or_else(|| panic!("{name} of {claims}"));
    // A second may have passed since.
    assert!(number("exp") > now - 8.0 && number("nbf") < now + 8.0, "{claims} at {now}");
    assert_eq!(claims["iss"], "Upstash");
    let text = |name: &str| claims[name].as_str().unwrap_or_else(|| panic!("{name} of {claims}"));
    assert_eq!(text("sub").trim_end_matches('/'), RECEIVER);
    assert_eq!(text("body").trim_end_matches('='), hash(body));
}

fuzz_target!(|input: &[u8]| {
    let Some((choice, rest)) = input.split_first() else { return };
    let at = rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
    let (head, body) = (&rest[..at], rest.get(at + 1..).unwrap_or_default());
    let text = String::from_utf8_lossy(head);
    match choice % 4 {
        0 => {
            let refused = VERIFIER.verify(Some(&text), body).expect_err("nobody has signed that");
            assert!(
                matches!(refused, SignatureError::Absent | SignatureError::Forged),
                "{refused}: nothing is explained"
            );
        }
        1 => {
            let Some(claims) = claims_of(&text, body) else { return };
            let key = KEYS[usize::from(choice / 4) % 2];
            if VERIFIER.verify(Some(&sign(Algorithm::HS256, &claims, key)), body).is_ok() {
                check_believed(&claims, body);
            }
        }
        2 => {
            let signed = sign(Algorithm::HS256, &right_claims(body), KEYS[0]);
            assert_eq!(VERIFIER.verify(Some(&signed), body), Ok(()));
            // Pairs of place and change.
            let mut disturbed = signed.clone().into_bytes();
            for pair in head.chunks_exact(2) {
                let place = usize::from(pair[0]) % disturbed.len();
                disturbed[place] ^= pair[1] & 0x7f;
            }
            let disturbed = String::from_utf8_lossy(&disturbed).into_owned();
            if disturbed.trim() != signed {
                assert!(VERIFIER.verify(Some(&disturbed), body).is_err(), "{disturbed} is not {signed}");
            }
            let mut other = body.to_vec();
            other.push(b' ');
            assert_eq!(VERIFIER.verify(Some(&signed), &other), Err(SignatureError::Body));
        }
        _ => {
            let claims = right_claims(body);
            for algorithm in [Algorithm::HS384, Algorithm::HS512] {
                assert_eq!(
                    VERIFIER.verify(Some(&sign(algorithm, &claims, KEYS[0])), body),
                    Err(SignatureError::Forged)
                );
            }
            // HMAC fills a key up with NULs (RFC 2104), so one that ends with some is the same key.
            if !KEYS.contains(&text.trim_end_matches('\0')) {
                let strange = sign(Algorithm::HS256, &claims, &text);
                assert_eq!(VERIFIER.verify(Some(&strange), body), Err(SignatureError::Forged));
            }
            // A header of the fuzzer's over right claims, with the right key's signature of nothing, or none.
            let signed = sign(Algorithm::HS256, &claims, KEYS[0]);
            let mut parts = signed.splitn(3, '.').skip(1);
            let (payload, signature) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            let header = URL_SAFE_NO_PAD.encode(head);
            for signature in ["", signature] {
                let token = format!("{header}.{payload}.{signature}");
                assert!(token == signed || VERIFIER.verify(Some(&token), body).is_err(), "{token}");
            }
        }
    }
});
