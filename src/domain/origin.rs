//! Which web origins may send events for a site.
//!
//! A site allows its domain, the domain's subdomains and its extra origins; scheme and host are compared as parsed, never by
//! substring. `*` allows every origin, and only if the site says so.

use url::{Host, Url};

use super::page::is_within;

/// Longest host name, in bytes: the DNS has no longer ones.
const MAX_HOST: usize = 253;

/// A parsed `Origin` header: `scheme://host[:port]`. `null`, paths and other schemes are none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Origin {
    scheme: String,
    host: String,
    port: Option<u16>,
}

impl Origin {
    pub fn parse(text: &str) -> Option<Self> {
        let url = Url::parse(text.trim()).ok()?;
        let bare = url.path() == "/" && url.query().is_none() && url.fragment().is_none() && url.username().is_empty();
        if !bare || !matches!(url.scheme(), "http" | "https") {
            return None;
        }
        let host = match url.host()? {
            Host::Domain(domain) => domain.trim_end_matches('.').to_owned(),
            address => address.to_string(),
        };
        if host.len() > MAX_HOST {
            return None;
        }
        Some(Self { scheme: url.scheme().to_owned(), host, port: url.port_or_known_default() })
    }

    pub fn host(&self) -> &str {
        &self.host
    }

    /// The host and every domain above it, longest first: what a look-up by domain has to ask for.
    pub fn domains(&self) -> Vec<String> {
        let mut domains = vec![self.host.clone()];
        if !self.host.starts_with('[') && self.host.parse::<std::net::Ipv4Addr>().is_err() {
            let mut rest = self.host.as_str();
            while let Some((_, above)) = rest.split_once('.') {
                domains.push(above.to_owned());
                rest = above;
            }
        }
        domains
    }

    /// The forms in which a site's extra origins may name this one.
    pub fn spellings(&self) -> Vec<String> {
        let default = matches!((self.scheme.as_str(), self.port), ("http", Some(80)) | ("https", Some(443)));
        let mut spellings = vec!["*".to_owned()];
        if let Some(port) = self.port {
            spellings.push(format!("{}://{}:{port}", self.scheme, self.host));
        }
        if default || self.port.is_none() {
            spellings.push(format!("{}://{}", self.scheme, self.host));
        }
        spellings
    }
}

/// The domain of a site: a host in lower case, as it stands in `sites.domain`.
///
/// Accepts `Example.com`, `https://example.com/path` and `example.com:8443`; anything else is none.
pub fn parse_domain(text: &str) -> Option<String> {
    let text = text.trim();
    let address = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let url = Url::parse(&address).ok()?;
    let host = match url.host()? {
        Host::Domain(domain) => domain.trim_end_matches('.').to_owned(),
        address => address.to_string(),
    };
    // One label alone would let in a whole top-level domain; only a developer's own machine is named like that.
    let is_one = host.contains('.') || host.starts_with('[') || host == "localhost";
    let is_name = !host.contains('*') && host.len() <= MAX_HOST;
    (is_one && is_name).then_some(host)
}

/// An extra origin in its one stored form, `scheme://host[:port]` or `*`.
pub fn parse_extra_origin(text: &str) -> Option<String> {
    if text.trim() == "*" {
        return Some("*".to_owned());
    }
    Origin::parse(text).and_then(|origin| origin.spellings().pop())
}

/// Whether a site with this domain and these extra origins allows `origin`.
pub fn allows(domain: &str, extra: &[String], origin: &Origin) -> bool {
    is_within(&origin.host, domain)
        || extra.iter().any(|allowed| allowed == "*" || Origin::parse(allowed).as_ref() == Some(origin))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(extra: &[&str], origin: &str) -> bool {
        let extra: Vec<String> = extra.iter().map(|s| (*s).to_owned()).collect();
        Origin::parse(origin).is_some_and(|origin| allows("example.com", &extra, &origin))
    }

    #[test]
    fn a_site_allows_its_domain_subdomains_and_extra_origins() {
        for good in
            ["https://example.com", "http://example.com:8080", "https://WWW.Example.com", "https://a.b.example.com"]
        {
            assert!(allowed(&[], good), "{good}");
        }
        for bad in [
            "null",
            "",
            "https://example.com.evil.net",
            "https://notexample.com",
            "https://evil.net/?example.com",
            "https://evil.net#example.com",
            "https://example.com@evil.net",
            "file://example.com",
            "https://evil.net",
        ] {
            assert!(!allowed(&[], bad), "{bad}");
        }
        assert!(!allowed(&[], &format!("https://{}.example.com", "a".repeat(300))), "longer than any host");
        assert!(allowed(&["http://127.0.0.1:8090"], "http://127.0.0.1:8090"));
        assert!(!allowed(&["http://127.0.0.1:8090"], "http://127.0.0.1:8091"));
        assert!(!allowed(&["https://shop.example.net"], "http://shop.example.net"), "the scheme counts");
        assert!(allowed(&["https://shop.example.net:443"], "https://shop.example.net"));
        assert!(allowed(&["*"], "https://anything.invalid") && !allowed(&["*"], "null"));
    }

    #[test]
    fn what_is_looked_up_is_what_is_compared() {
        let origin = Origin::parse("https://a.b.example.com");
        let domains = origin.as_ref().map(Origin::domains).unwrap_or_default();
        assert_eq!(domains, ["a.b.example.com", "b.example.com", "example.com", "com"]);
        assert_eq!(Origin::parse("http://127.0.0.1:8090").map(|o| o.domains()), Some(vec!["127.0.0.1".to_owned()]));
        for extra in ["https://shop.example.net:443", "https://Shop.example.net/", "http://[::1]:90", "*"] {
            let stored = parse_extra_origin(extra);
            let asked = Origin::parse(extra).map(|o| o.spellings()).unwrap_or_else(|| vec!["*".to_owned()]);
            assert!(stored.is_some_and(|stored| asked.contains(&stored)), "{extra}");
        }
        assert_eq!(parse_domain("https://Example.com/x"), Some("example.com".to_owned()));
        assert_eq!(parse_domain("example.com:8443"), Some("example.com".to_owned()));
        for bad in ["exa mple", "*", "*.example.com", "com", ""] {
            assert_eq!(parse_domain(bad), None, "{bad}");
        }
        assert_eq!(parse_domain("localhost"), Some("localhost".to_owned()));
    }
}
