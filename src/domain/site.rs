//! A tenant's site, as far as the doors need it.

use super::id::SiteId;
use super::origin::{self, Origin};

/// A site that exists. Only the store makes one, so holding a [`Site`] is the proof that it was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    pub id: SiteId,
    /// What the tracker snippet carries.
    pub public_id: String,
    /// Host in lower case.
    pub domain: String,
    /// Extra origins, `scheme://host[:port]` or `*`.
    pub origins: Vec<String>,
    /// ISO 3166 country in which a national telephone number is read.
    pub region: Option<String>,
}

impl Site {
    pub fn allows(&self, origin: &Origin) -> bool {
        origin::allows(&self.domain, &self.origins, origin)
    }
}
