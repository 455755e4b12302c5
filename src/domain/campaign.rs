//! The ad behind a visit, as far as a page's address tells: click ids and campaign parameters.

use serde::{Deserialize, Serialize};

use super::page::Page;

/// Ad networks' click ids.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClickIds {
    pub gclid: Option<String>,
    pub wbraid: Option<String>,
    pub gbraid: Option<String>,
    pub gclsrc: Option<String>,
    pub dclid: Option<String>,
    pub fbclid: Option<String>,
    pub ttclid: Option<String>,
    pub msclkid: Option<String>,
}

impl ClickIds {
    /// The click ids in a page's address.
    pub fn of(page: &Page) -> Self {
        Self::from_lookup(|key| page.parameter(key).map(str::to_owned))
    }

    pub(super) fn from_lookup(find: impl Fn(&str) -> Option<String>) -> Self {
        Self {
            gclid: find("gclid"),
            wbraid: find("wbraid"),
            gbraid: find("gbraid"),
            gclsrc: find("gclsrc"),
            dclid: find("dclid"),
            fbclid: find("fbclid"),
            ttclid: find("ttclid"),
            msclkid: find("msclkid"),
        }
    }

    pub(super) fn or(self, other: Self) -> Self {
        Self {
            gclid: self.gclid.or(other.gclid),
            wbraid: self.wbraid.or(other.wbraid),
            gbraid: self.gbraid.or(other.gbraid),
            gclsrc: self.gclsrc.or(other.gclsrc),
            dclid: self.dclid.or(other.dclid),
            fbclid: self.fbclid.or(other.fbclid),
            ttclid: self.ttclid.or(other.ttclid),
            msclkid: self.msclkid.or(other.msclkid),
        }
    }
}

/// Campaign parameters of the address: UTM, and Google's ValueTrack.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Campaign {
    pub utm_source: Option<String>,
    pub utm_medium: Option<String>,
    pub utm_campaign: Option<String>,
    pub utm_term: Option<String>,
    pub utm_content: Option<String>,
    pub matchtype: Option<String>,
    pub device: Option<String>,
    pub network: Option<String>,
    pub placement: Option<String>,
}

impl Campaign {
    pub fn of(page: &Page) -> Self {
        let find = |key| page.parameter(key).map(str::to_owned);
        Self {
            utm_source: find("utm_source"),
            utm_medium: find("utm_medium"),
            utm_campaign: find("utm_campaign"),
            utm_term: find("utm_term"),
            utm_content: find("utm_content"),
            matchtype: find("matchtype"),
            device: find("device"),
            network: find("network"),
            placement: find("placement"),
        }
    }

    pub fn has_utm(&self) -> bool {
        [&self.utm_source, &self.utm_medium, &self.utm_campaign, &self.utm_term, &self.utm_content]
            .iter()
            .any(|field| field.is_some())
    }
}
