//! A session as the wire shows it: its row, whole, and what its attribution rests on.

use std::collections::HashMap;

use chrono::{DateTime, Utc};

use super::{convert, proto};
use crate::domain::attribution::Attribution;
use crate::domain::event::Gauges;
use crate::domain::id::SessionKey;
use crate::domain::session::{Field, Session};

pub(super) fn key(key: SessionKey) -> proto::SessionKey {
    proto::SessionKey {
        site_id: key.site_id.to_string(),
        session_month: key.month.to_string(),
        session_id: key.id.to_string(),
    }
}

pub(super) fn timestamp(at: DateTime<Utc>) -> prost_types::Timestamp {
    // Below a second by construction; a leap second's tail is held at its end.
    let nanos = i32::try_from(at.timestamp_subsec_nanos()).unwrap_or_default().min(999_999_999);
    prost_types::Timestamp { seconds: at.timestamp(), nanos }
}

pub(super) fn attribution(attribution: Attribution) -> proto::Attribution {
    match attribution {
        Attribution::OrganicReferral => proto::Attribution::OrganicReferral,
        Attribution::AdsAssisted => proto::Attribution::AdsAssisted,
        Attribution::DirectToAds => proto::Attribution::DirectToAds,
    }
}

pub(super) fn traffic_source(session: &Session) -> proto::TrafficSource {
    let traffic = &session.source.traffic;
    proto::TrafficSource { source: traffic.source.clone(), medium: traffic.medium.clone() }
}

/// A session as it is stored.
pub(super) fn session(session: &Session) -> proto::Session {
    let first = |field| session.first(field).map(str::to_owned);
    proto::Session {
        key: Some(key(session.key)),
        created_at: Some(timestamp(session.created_at)),
        last_event_at: Some(timestamp(session.last_seen_at)),
        event_count: u64::try_from(session.event_count).unwrap_or_default(),
        fingerprint: first(Field::Fingerprint),
        entry_page: first(Field::EntryPage).unwrap_or_default(),
        exit_page: Some(session.exit.value.clone()).filter(|page| !page.is_empty()),
        referrer: first(Field::Referrer),
        click_ids: Some(click_ids(session)),
        attribution: attribution(session.attribution()).into(),
        traffic_source: Some(traffic_source(session)),
        utm: Some(proto::Utm {
            source: first(Field::UtmSource),
            medium: first(Field::UtmMedium),
            campaign: first(Field::UtmCampaign),
            term: first(Field::UtmTerm),
            content: first(Field::UtmContent),
        }),
        value_track: Some(proto::ValueTrack {
            matchtype: first(Field::Matchtype),
            device: first(Field::AdsDevice),
            network: first(Field::AdsNetwork),
            placement: first(Field::AdsPlacement),
        }),
        score: Some(convert::score(session.signals())),
        device: Some(proto::Device {
            r#type: first(Field::DeviceType),
            os: first(Field::DeviceOs),
            browser: first(Field::Browser),
        }),
        language: first(Field::Language),
        geo: Some(proto::Geo {
            city: first(Field::City),
            district: first(Field::District),
            country: first(Field::Country),
            timezone: first(Field::Timezone),
        }),
        gauges: Some(gauges(session.gauges)),
        ip_truncated: first(Field::IpTruncated),
    }
}

fn click_ids(session: &Session) -> proto::ClickIds {
    let first = |field| session.first(field).map(str::to_owned);
    let others = [
        ("gclsrc", Field::Gclsrc),
        ("dclid", Field::Dclid),
        ("fbclid", Field::Fbclid),
        ("ttclid", Field::Ttclid),
        ("msclkid", Field::Msclkid),
    ];
    let others: HashMap<_, _> =
        others.into_iter().filter_map(|(name, field)| Some((name.to_owned(), first(field)?))).collect();
    proto::ClickIds { gclid: first(Field::Gclid), wbraid: first(Field::Wbraid), gbraid: first(Field::Gbraid), others }
}

fn gauges(gauges: Gauges) -> proto::Gauges {
    let Gauges { duration_sec, scroll_pct, cta_hovers, focus_dur, active_sec } = gauges;
    // A negative one can only have been written by hand, and measures nothing.
    let measured = |gauge: Option<i32>| gauge.and_then(|gauge| u32::try_from(gauge).ok());
    proto::Gauges {
        duration_sec: measured(duration_sec),
        scroll_pct: measured(scroll_pct),
        cta_hovers: measured(cta_hovers),
        focus_dur: measured(focus_dur),
        active_sec: measured(active_sec),
        exit_page: None,
    }
}
