//! The deployment's key for callers' numbers: what is stored of a number is a keyed hash, and nobody without the key can try numbers
//! against it. The site goes into the hash, so equal hashes mean equal callers within one site and nothing across sites.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::domain::id::SiteId;
use crate::domain::telephone::E164;

/// Shortest key that is taken, bytes.
const MIN_KEY: usize = 32;

/// The key, which shows itself to nobody.
#[derive(Clone)]
pub struct CallerKey(Hmac<Sha256>);

/// The key cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it has fewer than {MIN_KEY} characters; `openssl rand -hex 32` makes one")]
pub struct TooShort;

impl CallerKey {
    pub fn new(text: &str) -> Result<Self, TooShort> {
        let text = text.trim();
        if text.len() < MIN_KEY {
            return Err(TooShort);
        }
        Hmac::new_from_slice(text.as_bytes()).map(Self).map_err(|_| TooShort)
    }

    /// What is kept of a caller's number.
    pub fn hash(&self, site: SiteId, number: &E164) -> [u8; 32] {
        let mac = self.0.clone().chain_update(site.as_uuid().as_bytes()).chain_update(number.as_str());
        mac.finalize().into_bytes().into()
    }
}

impl std::fmt::Debug for CallerKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CallerKey(secret)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn a_number_is_one_hash_within_a_site_and_a_key_and_another_elsewhere() {
        let keys = ["k".repeat(32), "l".repeat(32)].map(|text| CallerKey::new(&text).expect("long enough"));
        let sites = [1, 2].map(|n| SiteId::from_uuid(Uuid::from_u128(n)));
        let number = E164::read("+12025550187", None).expect("a number");
        let hashes = [(0, 0), (0, 1), (1, 0)].map(|(key, site)| keys[key].hash(sites[site], &number));
        assert_eq!(hashes[0], keys[0].hash(sites[0], &number));
        assert!(hashes[0] != hashes[1] && hashes[0] != hashes[2] && hashes[1] != hashes[2]);
        assert_eq!(CallerKey::new(&"k".repeat(31)).err(), Some(TooShort));
        assert!(!format!("{:?}", keys[0]).contains('k'.to_string().repeat(3).as_str()));
    }
}
