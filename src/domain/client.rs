//! The visitor's side of an event: device, place, and an address that is cut before anybody keeps it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::text::{MAX_SHORT, clean_some};

/// The longest user agent that is read, in bytes.
const MAX_AGENT: usize = 1024;
/// Most user agents that a thread remembers; then it forgets them all, and those that are about are soon there again.
const REMEMBERED: usize = 512;

thread_local! {
    /// What was read of user agents: a site's visitors have few different ones, and reading one costs more than the rest of an event.
    static READ: RefCell<HashMap<Box<str>, Option<Device>>> = RefCell::default();
}

/// What a user agent says of the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// `desktop`, `mobile`, `tablet`, `bot` or `other`.
    pub kind: String,
    pub os: Option<String>,
    pub browser: Option<String>,
}

impl Device {
    /// Reads a user agent; nothing for an empty one.
    pub fn of_user_agent(user_agent: &str) -> Option<Self> {
        if user_agent.len() > MAX_AGENT {
            return Self::read(user_agent);
        }
        READ.with_borrow_mut(|known| {
            if let Some(device) = known.get(user_agent) {
                return device.clone();
            }
            if known.len() >= REMEMBERED {
                known.clear();
            }
            let device = Self::read(user_agent);
            known.insert(user_agent.into(), device.clone());
            device
        })
    }

    fn read(user_agent: &str) -> Option<Self> {
        let agent = clean_some(user_agent, MAX_AGENT)?;
        let Some(parsed) = woothee::parser::Parser::new().parse(&agent) else {
            return Some(Self { kind: "other".to_owned(), os: None, browser: None });
        };
        let known = |text: &str| (text != "UNKNOWN").then(|| clean_some(text, MAX_SHORT)).flatten();
        let tablet =
            parsed.os == "iPad" || agent.contains("Tablet") || (parsed.os == "Android" && !agent.contains("Mobile"));
        let kind = match parsed.category {
            "crawler" => "bot",
            _ if tablet => "tablet",
            "pc" => "desktop",
            "smartphone" | "mobilephone" => "mobile",
            _ => "other",
        };
        Some(Self { kind: kind.to_owned(), os: known(parsed.os), browser: known(parsed.name) })
    }
}

/// Where the visitor is, as far as anybody told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Geo {
    pub city: Option<String>,
    pub district: Option<String>,
    /// ISO 3166-1 alpha-2 as sent by the edge.
    pub country: Option<String>,
    /// IANA name.
    pub timezone: Option<String>,
}

impl Geo {
    /// Field by field: what is known here, else what `other` knows.
    #[must_use]
    pub fn or(self, other: &Self) -> Self {
        Self {
            city: self.city.or_else(|| other.city.clone()),
            district: self.district.or_else(|| other.district.clone()),
            country: self.country.or_else(|| other.country.clone()),
            timezone: self.timezone.or_else(|| other.timezone.clone()),
        }
    }
}

/// A client address of which only the network is left: IPv4 /24, IPv6 /48. The full address cannot be put into one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TruncatedIp(String);

impl TruncatedIp {
    pub fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() & 0xffff_ff00).to_string(),
            IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 80)).to_string(),
        })
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_cut_to_its_network() {
        let cut = |text: &str| text.parse().ok().map(|ip| TruncatedIp::of(ip).0);
        assert_eq!(cut("203.0.113.77").as_deref(), Some("203.0.113.0"));
        assert_eq!(cut("2001:db8:1:2:3::4").as_deref(), Some("2001:db8:1::"));
        assert_eq!(cut("::ffff:203.0.113.77").as_deref(), Some("203.0.113.0"), "IPv4 in IPv6 clothes");
    }

    #[test]
    fn a_user_agent_tells_device_os_and_browser() {
        let read = |agent| {
            Device::of_user_agent(agent).map(|d| (d.kind, d.os.unwrap_or_default(), d.browser.unwrap_or_default()))
        };
        let is = |kind: &str, os: &str, browser: &str| Some((kind.to_owned(), os.to_owned(), browser.to_owned()));
        assert_eq!(
            read(
                "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 Safari/537.36"
            ),
            is("desktop", "Windows 10", "Chrome")
        );
        assert_eq!(
            read(
                "Mozilla/5.0 (iPhone; CPU iPhone OS 17_0 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.0 Mobile/15E148 Safari/604.1"
            ),
            is("mobile", "iPhone", "Safari")
        );
        assert_eq!(
            read("Mozilla/5.0 (Linux; Android 13; SM-X200) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 Safari/537.36").map(|d| d.0),
            Some("tablet".to_owned())
        );
        assert_eq!(read("Googlebot/2.1 (+http://www.google.com/bot.html)").map(|d| d.0), Some("bot".to_owned()));
        assert_eq!(read("\u{0} "), None);
        assert_eq!(read("ğ").map(|d| d.0), Some("other".to_owned()));
    }
}
