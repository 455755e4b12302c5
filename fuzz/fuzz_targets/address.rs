//! Addresses of pages and referrers, a line each in turn, as one visit: parameters, click ids, source, attribution.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use opsmantik_fuzz::domain::campaign::{Campaign, ClickIds};
use opsmantik_fuzz::domain::event::{Arrival, Draft, Event, FieldNames};
use opsmantik_fuzz::domain::page::{Page, is_within, same_site};
use opsmantik_fuzz::domain::text::{MAX_SHORT, clean_some};
use opsmantik_fuzz::domain::traffic::{Traffic, TrafficRule, is_google_search_host};
use opsmantik_fuzz::{SITE, check_event, check_merge, now};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

const NAMES: FieldNames = FieldNames { url: "u", session: "sid" };
const KEYS: [&str; 9] =
    ["gclid", "wbraid", "gbraid", "gclsrc", "fbclid", "msclkid", "utm_source", "utm_medium", "matchtype"];

fn check_page(address: &str) {
    let page = Page::read(address);
    for key in KEYS {
        let value = page.parameter(key);
        assert!(value.is_none_or(|value| clean_some(value, MAX_SHORT).as_deref() == Some(value)), "{key}: {value:?}");
    }
    if let Some(host) = page.host() {
        assert!(!host.contains(['/', '@', '?', '#', ' ', '\0']) && !host.ends_with('.'), "{host}");
        assert_eq!(host, host.to_ascii_lowercase());
        assert!(is_within(host, host) && same_site(host, host) && !is_within(host, &format!("x{host}")));
        assert!(!is_google_search_host(&format!("{host}.evil.example")), "a host is not its front: {host}");
    }
    let (clicks, campaign) = (ClickIds::of(&page), Campaign::of(&page));
    assert_eq!(clicks.gclid.as_deref(), page.parameter("gclid"));
    assert_eq!(campaign.utm_source.as_deref(), page.parameter("utm_source"));
    let own = Traffic::of(&clicks, &campaign, page.host(), page.host());
    let none = Traffic::of(&clicks, &campaign, page.host(), None);
    assert!(page.host().is_none() || own == none, "a referrer on the page's own host counts as none");

    // White space around it, and an encoded whole, are the same page.
    let same = |other: &str| {
        let other = Page::read(other);
        assert_eq!((ClickIds::of(&other), Campaign::of(&other)), (clicks.clone(), campaign.clone()), "{address:?}");
        assert_eq!(other.host(), page.host(), "{address:?}");
    };
    same(&format!(" \t{address}\n "));
    let bare = address.trim();
    if bare.contains("://") {
        same(&utf8_percent_encode(bare, NON_ALPHANUMERIC).to_string());
    }
    // A click id that is told first is the one that counts.
    if let Some((before, after)) =
        bare.split_once('?').filter(|(before, _)| before.contains("://") && !before.contains('#'))
    {
        let told = Page::read(&format!("{before}?GCLID=told&{after}"));
        assert_eq!(told.parameter("gclid"), Some("told"));
        assert_eq!(Traffic::of(&ClickIds::of(&told), &campaign, None, None).rule, TrafficRule::GoogleClick);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.split('\n').take(4).collect();
    let mut events = Vec::new();
    for (place, line) in lines.iter().enumerate() {
        if place < 2 {
            check_page(line);
        }
        let draft = || Draft {
            id: Some(format!("event {place}")),
            url: Some((*line).to_owned()),
            session: Some("visit".to_owned()),
            referrer: lines.get(place + 1).map(|line| (*line).to_owned()),
            ..Draft::default()
        };
        // Some at the same moment, so that ids decide.
        let arrival = Arrival::at(now() - Duration::from_secs(place as u64 / 2));
        let accepted = Event::accept(SITE, draft(), &arrival, NAMES);
        assert_eq!(accepted, Event::accept(SITE, draft(), &arrival, NAMES));
        match accepted {
            Ok(event) => {
                check_event(&event);
                events.push(event);
            }
            Err(refusal) => assert_eq!(refusal.field, "u", "{refusal}"),
        }
    }
    check_merge(&events);
});
