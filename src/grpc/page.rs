//! Pages: how long they are, and the tokens by which a listing goes on.
//!
//! A token is a place in a sorted list, not a number of rows to skip, so rows that are added move nothing. It is opaque, has a version, and
//! is bound to its listing: sent with another filter, or damaged, it is refused instead of showing something else. It is no secret
//! and gives no access: whatever it says, a page is read under the policies of its caller.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::MAX_MESSAGE;
use super::proto::{Rejection, RejectionReason};

/// Items of a page whose size nobody asked for.
const DEFAULT_SIZE: u16 = 50;
/// Items of the largest page.
const MAX_SIZE: u16 = 500;
/// Most bytes of items in one answer: a message's bound, and room for what else is in it.
pub(super) const MAX_ANSWER: usize = MAX_MESSAGE - (64 << 10);
/// What stands before each item in a message, at most.
const FRAMING: usize = 16;
/// Longest token that is read; ours are a fraction of it.
const MAX_TOKEN: usize = 1024;
/// What this version's tokens begin with.
const VERSION: u8 = 1;
/// Bytes of the digest in a token.
const DIGEST: usize = 16;

/// How many items a page has at most, from the `page_size` of a request.
pub(super) fn size(asked: u32) -> Result<u16, Rejection> {
    match u16::try_from(asked) {
        Ok(0) => Ok(DEFAULT_SIZE),
        Ok(size) if size <= MAX_SIZE => Ok(size),
        _ => {
            let message = format!("`page_size` is more than {MAX_SIZE}");
            Err(Rejection::of(RejectionReason::OutOfRange, "page_size", message))
        }
    }
}

/// The first items, as many as fit into `bound` bytes; at least one, so that a listing goes on.
pub(super) fn fitting<M: Message>(mut items: Vec<M>, bound: usize) -> Vec<M> {
    let mut taken = 0;
    let fit = items.iter().take_while(|item| {
        taken += item.encoded_len() + FRAMING;
        taken <= bound
    });
    let count = fit.count().max(1);
    items.truncate(count);
    items
}

/// The pages of one listing: makes its tokens, and reads no other's.
pub(super) struct Pages {
    listing: Vec<u8>,
}

impl Pages {
    /// `filter` is all that decides what is listed and in which order.
    pub(super) fn of(rpc: &'static str, filter: &impl Serialize) -> Self {
        Self { listing: json(&(rpc, filter)) }
    }

    /// The token of the page that goes on after `place`.
    pub(super) fn seal(&self, place: &impl Serialize) -> String {
        let place = json(place);
        let token = [&[VERSION], self.digest(&place).as_slice(), &place].concat();
        URL_SAFE_NO_PAD.encode(token)
    }

    /// The place that a `page_token` names; none for the empty one, which asks for the first page.
    pub(super) fn open<P: DeserializeOwned>(&self, token: &str) -> Result<Option<P>, Rejection> {
        if token.is_empty() {
            return Ok(None);
        }
        let place = self.place(token);
        place.map(Some).ok_or_else(|| {
            let message =
                "`page_token` is invalid: send the `next_page_token` of the page before, with the same filter";
            Rejection::of(RejectionReason::Invalid, "page_token", message)
        })
    }

    fn place<P: DeserializeOwned>(&self, token: &str) -> Option<P> {
        if token.len() > MAX_TOKEN {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (version, rest) = bytes.split_first()?;
        let (digest, place) = rest.split_at_checked(DIGEST)?;
        (*version == VERSION && digest == self.digest(place)).then(|| serde_json::from_slice(place).ok())?
    }

    fn digest(&self, place: &[u8]) -> [u8; DIGEST] {
        let whole: [u8; 32] =
            Sha256::new().chain_update(&self.listing).chain_update([0]).chain_update(place).finalize().into();
        std::array::from_fn(|at| whole[at])
    }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("ids, months and numbers can be written as JSON")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pages(filter: &str) -> Pages {
        Pages::of("List", &filter)
    }

    #[test]
    fn a_token_opens_the_listing_that_it_is_from_and_no_other() {
        let place = (70, "an id".to_owned());
        let token = pages("a").seal(&place);
        assert_eq!(pages("a").open(&token), Ok(Some(place)));
        assert_eq!(pages("a").open::<(i32, String)>(""), Ok(None));
        for other in [pages("b"), Pages::of("Other", &"a")] {
            assert_eq!(other.open::<(i32, String)>(&token).map_err(|wrong| wrong.field), Err("page_token".to_owned()));
        }
        assert!(pages("a").open::<(i32, String)>(&"A".repeat(MAX_TOKEN + 1)).is_err());
    }

    proptest! {
        #[test]
        fn a_damaged_token_is_refused(at: prop::sample::Index, by in 1u8.., cut: prop::sample::Index, any in ".{1,80}") {
            let token = pages("a").seal(&(70, "an id"));
            let mut bytes = token.clone().into_bytes();
            let at = at.index(bytes.len());
            bytes[at] ^= by;
            let damaged = String::from_utf8_lossy(&bytes).into_owned();
            for bad in [damaged.as_str(), &token[..cut.index(token.len() - 1) + 1], &any] {
                prop_assume!(bad != token);
                prop_assert!(pages("a").open::<(i32, String)>(bad).is_err());
            }
        }
    }
}
