//! Attribution: did an ad bring this visit about?
//!
//! Ordered: Direct > Assisted > Organic, and a session has the maximum over its evidence. Direct comes from the session's own click ids,
//! Assisted from the history of its fingerprint, see [`super::ads_history`].

use serde::{Deserialize, Serialize};

/// Whether an ad click led to this session. Ordered by strength.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Attribution {
    /// Neither a click id here nor an ad in the history.
    #[serde(rename = "Organic/Referral")]
    OrganicReferral,
    /// No click id here, but an earlier session of the same fingerprint on this site had one, within 90 days.
    #[serde(rename = "Ads-Assisted")]
    AdsAssisted,
    /// A GCLID, WBRAID or GBRAID in this session.
    #[serde(rename = "Direct-to-Ads")]
    DirectToAds,
}

impl Attribution {
    pub const ALL: [Self; 3] = [Self::OrganicReferral, Self::AdsAssisted, Self::DirectToAds];

    /// As it is stored and shown.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OrganicReferral => "Organic/Referral",
            Self::AdsAssisted => "Ads-Assisted",
            Self::DirectToAds => "Direct-to-Ads",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|attribution| attribution.name() == name)
    }
}
