//! The text of an API token: `om_` and 256 random bits.
//!
//! It is shown once, to whoever issues it; only its hash is stored. A plain SHA-256 does, because nobody guesses 256 random bits, and
//! it makes a look-up by hash tell nothing about how near a guess was. Text of another shape is refused before anything is asked.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::TryRngCore;
use rand::rngs::OsRng;
use sha2::{Digest, Sha256};

use crate::secret::Secret;
use crate::store::tokens::TokenHash;

/// What every token of ours begins with, so that a leaked one is recognised by scanners.
pub const PREFIX: &str = "om_";
/// Characters after the prefix: 32 bytes in base64url without padding.
const DIGITS: usize = 43;

/// The text of an API token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiToken(Secret);

/// The text has not the shape of an API token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an API token is `om_` and 43 characters of base64url")]
pub struct Malformed;

/// What is stored of a token.
pub fn hash(token: &str) -> TokenHash {
    Sha256::digest(token).into()
}

impl ApiToken {
    /// A new one, from the operating system's random numbers.
    pub fn generate() -> Result<Self, rand::rand_core::OsError> {
        let mut bits = [0; 32];
        OsRng.try_fill_bytes(&mut bits)?;
        Ok(Self(secret(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bits)))))
    }

    /// The text itself, for the one who is to have it.
    pub fn reveal(&self) -> &str {
        self.0.reveal()
    }

    pub fn hash(&self) -> TokenHash {
        hash(self.reveal())
    }
}

impl std::str::FromStr for ApiToken {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let digits = text.strip_prefix(PREFIX).filter(|digits| digits.len() == DIGITS).ok_or(Malformed)?;
        URL_SAFE_NO_PAD.decode(digits).map_err(|_| Malformed)?;
        Ok(Self(secret(text.to_owned())))
    }
}

fn secret(text: String) -> Secret {
    text.parse().unwrap_or_else(|never| match never {})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_its_shape_is_not_seen_and_is_never_the_same() {
        let [one, other] = [ApiToken::generate(), ApiToken::generate()].map(|token| token.expect("random numbers"));
        assert_ne!(one, other);
        assert_eq!(one.reveal().len(), 46);
        assert_eq!(one.reveal().parse(), Ok(one.clone()));
        assert!(!format!("{one:?}").contains(&one.reveal()[3..]));
        assert_eq!(one.hash(), hash(one.reveal()));
    }

    #[test]
    fn text_of_another_shape_is_no_token() {
        let good = format!("om_{}", "A".repeat(43));
        assert!(good.parse::<ApiToken>().is_ok());
        // The last but one has bits that no 32 bytes have.
        let bad = [
            "",
            "om_",
            &good[..45],
            &format!("{good}A"),
            &good.replace("om_", "OM_"),
            &good.replace("AAA", "A+A"),
            &good.replace("AAA", "A=A"),
            &format!("om_{}B", "A".repeat(42)),
            &good.replace("AAA", "A\u{e4}"),
        ];
        for text in bad {
            assert_eq!(text.parse::<ApiToken>(), Err(Malformed), "{text}");
        }
    }
}
