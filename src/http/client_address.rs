//! Who sends: the client's address, and what headers say of the place and the device.
//!
//! The address is the socket's, unless the socket belongs to a proxy that the operator trusts: then it is the rightmost entry of
//! `X-Forwarded-For` that is no trusted proxy itself (whatever stands left of it, the client may have invented), or
//! `CF-Connecting-IP`. Whole addresses live here and in the rate limit only; an [`Arrival`] has a truncated one.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};

use chrono::{DateTime, Utc};
use http::header::USER_AGENT;
use http::{HeaderMap, HeaderName};
use ipnet::IpNet;
use percent_encoding::percent_decode_str;

use crate::domain::client::{Device, Geo, TruncatedIp};
use crate::domain::event::Arrival;
use crate::domain::text::{MAX_SHORT, clean_some};

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const CF_CONNECTING_IP: HeaderName = HeaderName::from_static("cf-connecting-ip");

/// The proxies whose forwarding headers are believed.
#[derive(Debug, Clone, Default)]
pub struct TrustedProxies(Vec<IpNet>);

impl TrustedProxies {
    pub fn new(networks: Vec<IpNet>) -> Self {
        Self(networks)
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }

    /// The client's address.
    pub fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let peer = peer.to_canonical();
        if !self.trusts(peer) {
            return peer;
        }
        let lines: Vec<Cow<'_, str>> = headers.get_all(FORWARDED_FOR).iter().map(|line| lossy(line)).collect();
        let mut hops = lines.iter().rev().flat_map(|line| line.rsplit(','));
        let mut nearest = None;
        // Rubbish ends the chain: nobody trusted has written it, or anything to its left.
        while let Some(address) = hops.next().and_then(parse_address) {
            nearest = Some(address);
            if !self.trusts(address) {
                break;
            }
        }
        let cloudflare = || headers.get(CF_CONNECTING_IP).and_then(|value| parse_address(&lossy(value)));
        nearest.or_else(cloudflare).unwrap_or(peer)
    }
}

/// The part of a client's address that counts where clients are told apart: an IPv4 address, or an IPv6 /64, which is what one subscriber gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Client {
    V4(u32),
    /// The first 64 bits.
    V6(u64),
}

impl Client {
    pub fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => Self::V4(v4.to_bits()),
            #[allow(clippy::cast_possible_truncation)] // shifted down to 64 bits
            IpAddr::V6(v6) => Self::V6((v6.to_bits() >> 64) as u64),
        }
    }
}

/// An address as proxies write it: with a port, in brackets or quotes, with a zone, IPv4 in IPv6 clothes.
fn parse_address(text: &str) -> Option<IpAddr> {
    let text = text.trim().trim_matches('"');
    let without_zone = |text: &str| text.split('%').next().and_then(|address| address.parse::<IpAddr>().ok());
    let bracketed = || text.strip_prefix('[')?.split(']').next().and_then(without_zone);
    let with_port = || text.parse::<SocketAddr>().ok().map(|socket| socket.ip());
    without_zone(text).or_else(with_port).or_else(bracketed).map(|address| address.to_canonical())
}

/// What the edge knows of an event's sender, the moment it comes in.
///
/// The headers of the place are taken from anybody: they carry no authority, and a sender can mislabel nothing but its own event with them.
pub fn arrival(headers: &HeaderMap, client: IpAddr, received_at: DateTime<Utc>) -> Arrival {
    Arrival {
        received_at,
        ip: Some(TruncatedIp::of(client)),
        device: headers.get(USER_AGENT).and_then(|value| Device::of_user_agent(&lossy(value))),
        geo: geo(headers),
    }
}

fn geo(headers: &HeaderMap) -> Geo {
    let plain = |name: &str| headers.get(name).and_then(|value| clean_some(&lossy(value), MAX_SHORT));
    let encoded = |name: &str| {
        let text = headers.get(name).map(|value| lossy(value))?;
        clean_some(&percent_decode_str(&text).decode_utf8_lossy(), MAX_SHORT)
    };
    // Cloudflare writes XX when it does not know.
    let country = |name: &str| plain(name).filter(|code| !code.eq_ignore_ascii_case("XX"));
    Geo {
        city: plain("cf-ipcity"),
        district: plain("cf-ipdistrict"),
        country: country("cf-ipcountry"),
        timezone: plain("cf-timezone"),
    }
    .or(&Geo {
        city: encoded("x-vercel-ip-city"),
        district: encoded("x-vercel-ip-country-region"),
        country: country("x-vercel-ip-country"),
        timezone: encoded("x-vercel-ip-timezone"),
    })
}

fn lossy(value: &http::HeaderValue) -> Cow<'_, str> {
    String::from_utf8_lossy(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn headers(lines: &[(&'static str, &[u8])]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_bytes(value).expect("a test's own header"));
        }
        headers
    }

    fn client(peer: &str, lines: &[(&'static str, &str)]) -> String {
        let proxies = TrustedProxies::new(["10.0.0.0/8", "fd00::/8"].iter().filter_map(|n| n.parse().ok()).collect());
        let lines: Vec<_> = lines.iter().map(|(name, value)| (*name, value.as_bytes())).collect();
        proxies.client(peer.parse().expect("a test's own address"), &headers(&lines)).to_string()
    }

    const XFF: &str = "x-forwarded-for";
    const CF: &str = "cf-connecting-ip";

    #[test]
    fn a_stranger_is_not_believed() {
        assert_eq!(client("203.0.113.7", &[(XFF, "198.51.100.1"), (CF, "198.51.100.2")]), "203.0.113.7");
        assert_eq!(client("::ffff:203.0.113.7", &[]), "203.0.113.7");
    }

    #[test]
    fn behind_a_trusted_proxy_the_rightmost_stranger_is_the_client() {
        assert_eq!(client("10.0.0.1", &[(XFF, "1.1.1.1, 198.51.100.1")]), "198.51.100.1", "1.1.1.1 is invented");
        assert_eq!(client("10.0.0.1", &[(XFF, "198.51.100.1, 10.2.3.4, 10.9.9.9")]), "198.51.100.1");
        assert_eq!(client("10.0.0.1", &[(XFF, "1.1.1.1"), (XFF, "198.51.100.1")]), "198.51.100.1", "two lines");
        assert_eq!(client("::ffff:10.0.0.1", &[(XFF, "::ffff:198.51.100.1")]), "198.51.100.1");
        assert_eq!(client("10.0.0.1", &[(XFF, "10.5.5.5, 10.2.3.4")]), "10.5.5.5", "a client of the inner network");
        assert_eq!(client("10.0.0.1", &[(CF, "2001:db8::1")]), "2001:db8::1");
        assert_eq!(client("10.0.0.1", &[(CF, "1.1.1.1"), (XFF, "198.51.100.1")]), "198.51.100.1");
    }

    #[test]
    fn every_way_to_write_an_address_is_read_and_rubbish_is_survived() {
        for (text, address) in [
            ("198.51.100.1:4711", "198.51.100.1"),
            ("[2001:db8::1]:4711", "2001:db8::1"),
            ("[2001:db8::1]", "2001:db8::1"),
            ("\"[2001:db8::1]:80\"", "2001:db8::1"),
            ("fe80::1%eth0", "fe80::1"),
            ("unknown", "10.0.0.1"),
            ("", "10.0.0.1"),
            (",,", "10.0.0.1"),
            ("198.51.100.1, rubbish", "10.0.0.1"),
            ("198.51.100.1, rubbish, 10.1.1.1", "10.1.1.1"),
        ] {
            assert_eq!(client("10.0.0.1", &[(XFF, text)]), address, "{text}");
        }
        let proxies = TrustedProxies::new("10.0.0.0/8".parse().into_iter().collect());
        let bytes = headers(&[(XFF, b"\xff\xfe"), (CF, b"\xff")]);
        assert_eq!(proxies.client([10, 0, 0, 1].into(), &bytes).to_string(), "10.0.0.1");
    }

    #[test]
    fn the_place_comes_from_cloudflare_then_vercel_field_by_field() {
        let headers = headers(&[
            ("cf-ipcity", "İzmir".as_bytes()),
            ("cf-ipcountry", b"XX"),
            ("x-vercel-ip-city", b"S%C3%A3o%20Paulo"),
            ("x-vercel-ip-country-region", b"35"),
            ("x-vercel-ip-country", b"TR"),
            ("x-vercel-ip-timezone", b"Europe%2FIstanbul"),
            ("user-agent", b"Mozilla/5.0 (Windows NT 10.0; Win64; x64) Chrome/120.0.0.0 Safari/537.36 \xff"),
        ]);
        let arrival = arrival(&headers, [203, 0, 113, 77].into(), Utc::now());
        let some = |text: &str| Some(text.to_owned());
        assert_eq!((arrival.geo.city, arrival.geo.country), (some("İzmir"), some("TR")));
        assert_eq!((arrival.geo.district, arrival.geo.timezone), (some("35"), some("Europe/Istanbul")));
        assert_eq!(arrival.ip.as_ref().map(TruncatedIp::as_str), Some("203.0.113.0"));
        assert_eq!(arrival.device.map(|device| device.kind), some("desktop"));
        assert_eq!(geo(&self::headers(&[("x-vercel-ip-city", b"S%C3%A3o%20Paulo")])).city, some("São Paulo"));
    }
}
