//! Where the visit came from: `traffic_source` / `traffic_medium`, by the first rule that holds.
//!
//! The rules are ordered, so a session's source is a merge as well: the strongest rule over all of its events, and among equals the
//! first by (time, event id). Hosts are compared as parsed, never by substring.

use serde::{Deserialize, Serialize};

use super::campaign::{Campaign, ClickIds};
use super::page::{is_within, same_site};

/// The rule by which a source was found, strongest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrafficRule {
    GoogleClick,
    MetaClick,
    TiktokClick,
    MicrosoftClick,
    PaidMedium,
    SearchHost,
    SocialHost,
    Referral,
    Tagged,
    Direct,
}

/// A source with its medium and the rule behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    pub rule: TrafficRule,
    pub source: String,
    pub medium: String,
}

const PAID_MEDIA: [&str; 8] = ["cpc", "ppc", "paid", "ads", "paidsearch", "paid_search", "paid-social", "paid_social"];

const SEARCH_DOMAINS: [&str; 12] = [
    "bing.com",
    "duckduckgo.com",
    "search.brave.com",
    "ecosia.org",
    "startpage.com",
    "qwant.com",
    "baidu.com",
    "search.yahoo.com",
    "search.naver.com",
    "seznam.cz",
    "ask.com",
    "search.aol.com",
];

const SOCIAL_DOMAINS: [(&str, &str); 12] = [
    ("facebook.com", "Facebook"),
    ("fb.com", "Facebook"),
    ("fb.me", "Facebook"),
    ("instagram.com", "Instagram"),
    ("x.com", "X"),
    ("twitter.com", "X"),
    ("t.co", "X"),
    ("linkedin.com", "LinkedIn"),
    ("lnkd.in", "LinkedIn"),
    ("tiktok.com", "TikTok"),
    ("youtube.com", "YouTube"),
    ("youtu.be", "YouTube"),
];

impl Traffic {
    /// The source of one event. `page_host` and `referrer_host` are in lower case; a referrer on the page's own host counts as none.
    pub fn of(clicks: &ClickIds, campaign: &Campaign, page_host: Option<&str>, referrer_host: Option<&str>) -> Self {
        let referrer = referrer_host.filter(|host| page_host.is_none_or(|own| !same_site(own, host)));
        let made =
            |rule, source: &str, medium: &str| Self { rule, source: source.to_owned(), medium: medium.to_owned() };
        if let Some((rule, source)) = click_network(clicks) {
            return made(rule, source, "cpc");
        }
        let medium = campaign.utm_medium.as_deref();
        if medium.is_some_and(|medium| PAID_MEDIA.contains(&medium.to_ascii_lowercase().as_str())) {
            return made(TrafficRule::PaidMedium, campaign.utm_source.as_deref().unwrap_or("Paid"), "cpc");
        }
        match referrer {
            Some(host) if is_search_host(host) => made(TrafficRule::SearchHost, "SEO", "organic"),
            Some(host) => match social_network(host) {
                Some(network) => made(TrafficRule::SocialHost, network, "social"),
                None => made(TrafficRule::Referral, "Referral", "referral"),
            },
            None if campaign.has_utm() => made(
                TrafficRule::Tagged,
                campaign.utm_source.as_deref().unwrap_or("Tagged"),
                medium.unwrap_or("unknown"),
            ),
            None => made(TrafficRule::Direct, "Direct", "direct"),
        }
    }
}

fn click_network(clicks: &ClickIds) -> Option<(TrafficRule, &'static str)> {
    let google = [&clicks.gclid, &clicks.wbraid, &clicks.gbraid, &clicks.gclsrc, &clicks.dclid];
    if google.iter().any(|id| id.is_some()) {
        Some((TrafficRule::GoogleClick, "Google Ads"))
    } else if clicks.fbclid.is_some() {
        Some((TrafficRule::MetaClick, "Meta Ads"))
    } else if clicks.ttclid.is_some() {
        Some((TrafficRule::TiktokClick, "TikTok Ads"))
    } else if clicks.msclkid.is_some() {
        Some((TrafficRule::MicrosoftClick, "Microsoft Ads"))
    } else {
        None
    }
}

/// Whether `host` (lower case) serves Google's search pages: `google.com`, `www.google.co.uk`, `google.com.tr`, or the Android app.
pub fn is_google_search_host(host: &str) -> bool {
    if host == "com.google.android.googlequicksearchbox" {
        return true;
    }
    let bare = ["www.", "m.", "images.", "news."].iter().find_map(|front| host.strip_prefix(front)).unwrap_or(host);
    let Some(top) = bare.strip_prefix("google.") else { return false };
    let country = |label: &str| label.len() == 2 && label.bytes().all(|b| b.is_ascii_lowercase());
    match top.split_once('.') {
        None => top == "com" || top == "cat" || country(top),
        Some((second, last)) => matches!(second, "co" | "com") && country(last),
    }
}

fn is_search_host(host: &str) -> bool {
    let yandex = || {
        let bare = host.strip_prefix("www.").unwrap_or(host);
        matches!(bare, "ya.ru" | "yandex.com.tr")
            || bare.strip_prefix("yandex.").is_some_and(|top| top == "com" || (top.len() == 2 && !top.contains('.')))
    };
    is_google_search_host(host) || yandex() || SEARCH_DOMAINS.iter().any(|domain| is_within(host, domain))
}

fn social_network(host: &str) -> Option<&'static str> {
    SOCIAL_DOMAINS.iter().find(|(domain, _)| is_within(host, domain)).map(|(_, network)| *network)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::page::Page;

    fn traffic(url: &str, referrer: &str) -> (String, String) {
        let page = Page::read(url);
        let from = Page::read(referrer);
        let found = Traffic::of(&ClickIds::of(&page), &Campaign::of(&page), page.host(), from.host());
        (found.source, found.medium)
    }

    #[test]
    fn the_first_rule_that_holds_wins() {
        let google = "https://www.google.com/";
        for (url, referrer, source, medium) in [
            ("https://a.example/?gclid=1&utm_medium=cpc&utm_source=x", google, "Google Ads", "cpc"),
            ("https://a.example/?wbraid=1", "", "Google Ads", "cpc"),
            ("https://a.example/?gclsrc=aw.ds", "", "Google Ads", "cpc"),
            ("https://a.example/?fbclid=1&msclkid=2", "", "Meta Ads", "cpc"),
            ("https://a.example/?ttclid=1", "", "TikTok Ads", "cpc"),
            ("https://a.example/?msclkid=2", "", "Microsoft Ads", "cpc"),
            ("https://a.example/?utm_source=news&utm_medium=CPC", google, "news", "cpc"),
            ("https://a.example/?utm_medium=paid_social", "", "Paid", "cpc"),
            ("https://a.example/?utm_source=letter&utm_medium=email", google, "SEO", "organic"),
            ("https://a.example/", "https://yandex.com.tr/search", "SEO", "organic"),
            ("https://a.example/", "https://l.instagram.com/", "Instagram", "social"),
            ("https://a.example/", "https://t.co/xyz", "X", "social"),
            ("https://a.example/", "https://blog.example/", "Referral", "referral"),
            ("https://a.example/?utm_source=letter&utm_medium=email", "", "letter", "email"),
            ("https://a.example/?utm_campaign=spring", "https://www.a.example/", "Tagged", "unknown"),
            ("https://a.example/b", "https://a.example/", "Direct", "direct"),
            ("https://a.example/", "", "Direct", "direct"),
            ("https://a.example/", "not a url", "Direct", "direct"),
        ] {
            assert_eq!(traffic(url, referrer), (source.to_owned(), medium.to_owned()), "{url} from {referrer}");
        }
    }

    #[test]
    fn google_is_a_host_and_not_a_substring() {
        for host in ["google.com", "www.google.com.tr", "google.co.uk", "www.google.de", "images.google.fr"] {
            assert!(is_google_search_host(host), "{host}");
        }
        for host in
            ["google.com.evil.net", "notgoogle.com", "google.evil.com", "mail.google.com", "google", "googles.com"]
        {
            assert!(!is_google_search_host(host), "{host}");
        }
        assert_eq!(social_network("netflix.com"), None, "x.com is not a suffix of a label");
    }
}
