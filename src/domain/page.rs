//! What a page address tells: click ids, campaign parameters, the host.
//!
//! Addresses come from browsers of every age, so nothing here fails: keys in any letter case, percent-encoding (also of the
//! whole address), parameters in the query, in the fragment (`#gclid=…`), in a fragment route (`#/page?gclid=…`), `&amp;` for `&`.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;
use url::Url;

use super::text::{MAX_SHORT, clean_some};

/// A page address, read leniently.
#[derive(Debug)]
pub struct Page {
    parameters: Vec<(String, String)>,
    host: Option<String>,
}

impl Page {
    pub fn read(address: &str) -> Self {
        let address = unwrap_encoding(address.trim());
        let (before_fragment, fragment) = address.split_once('#').unwrap_or((&address, ""));
        let query = before_fragment.split_once('?').map_or("", |(_, query)| query);
        let fragment_query = fragment.split_once('?').map_or(fragment, |(_, query)| query);
        let parameters = [query, fragment_query]
            .into_iter()
            .flat_map(|part| url::form_urlencoded::parse(part.as_bytes()))
            .filter_map(|(key, value)| {
                let key = key.strip_prefix("amp;").unwrap_or(&key).trim().to_ascii_lowercase();
                Some((key, clean_some(&value, MAX_SHORT)?))
            })
            .collect();
        let host = Url::parse(&address).ok().and_then(|url| url.host_str().map(bare_host));
        Self { parameters, host }
    }

    /// The first non-empty value of a parameter; `key` in lower case. The query comes before the fragment.
    pub fn parameter(&self, key: &str) -> Option<&str> {
        self.parameters.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// The host in lower case, without a trailing dot.
    pub fn host(&self) -> Option<&str> {
        self.host.as_deref()
    }
}

fn bare_host(host: &str) -> String {
    host.trim_end_matches('.').to_ascii_lowercase()
}

fn unwrap_encoding(address: &str) -> Cow<'_, str> {
    let encoded_whole = !address.contains("://") && address.to_ascii_lowercase().contains("%3a%2f%2f");
    if encoded_whole { percent_decode_str(address).decode_utf8_lossy() } else { Cow::Borrowed(address) }
}

/// Whether `host` is `domain` or below it; both in lower case.
pub fn is_within(host: &str, domain: &str) -> bool {
    host == domain || host.strip_suffix(domain).is_some_and(|front| front.ends_with('.'))
}

/// Whether two hosts are one site: equal but for `www.`.
pub fn same_site(a: &str, b: &str) -> bool {
    let bare = |host: &'_ str| host.strip_prefix("www.").map_or_else(|| host.to_owned(), str::to_owned);
    bare(a) == bare(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn click_ids_are_found_wherever_they_hide() {
        for address in [
            "https://a.example/?gclid=X1",
            "https://a.example/?GCLID=X1&b=2",
            "https://a.example/?a=1&amp;gclid=X1",
            "https://a.example/#gclid=X1",
            "https://a.example/#/contact?gclid=X1",
            "HTTPS%3A%2F%2Fa.example%2F%3Fgclid%3DX1",
            "https://a.example/?%67clid=X1",
            "https://a.example/?gclid=&x=y#Gclid=X1",
            "/relative?gclid=X1",
            "https://a.example/?gclid=X1%00",
        ] {
            assert_eq!(Page::read(address).parameter("gclid"), Some("X1"), "{address}");
        }
        assert_eq!(Page::read("https://a.example/gclid=X1").parameter("gclid"), None);
        assert_eq!(Page::read("https://a.example/?notgclid=X1").parameter("gclid"), None);
    }

    #[test]
    fn a_host_is_parsed_and_never_a_substring() {
        assert_eq!(Page::read("https://user@WWW.Example.COM.:8443/x").host(), Some("www.example.com"));
        assert_eq!(Page::read("https://evil.example/?u=https://google.com/").host(), Some("evil.example"));
        assert_eq!(Page::read("not a url").host(), None);
        assert!(is_within("a.example.com", "example.com") && is_within("example.com", "example.com"));
        assert!(!is_within("notexample.com", "example.com") && !is_within("example.com.evil.net", "example.com"));
        assert!(same_site("www.example.com", "example.com") && !same_site("a.example.com", "example.com"));
    }

    proptest! {
        #[test]
        fn any_text_is_read(address in ".{0,300}") {
            let page = Page::read(&address);
            prop_assert!(page.parameter("gclid").is_none_or(|id| !id.is_empty() && !id.contains('\0')));
        }
    }
}
