//! The rate limit of the public door: requests a minute for a site and client.
//!
//! A client is a subscriber ([`Client`]). The whole minute's allowance may come at once (a tracker that
//! was offline), then it refills evenly. Memory is bounded: who has been quiet is forgotten, and a flood of addresses empties the table,
//! because a limit by address means nothing against it.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota};

use super::client_address::Client;
use crate::domain::id::SiteId;

/// Most pairs of site and client that are remembered; some 100 bytes each.
const MOST_KEYS: usize = 200_000;
/// Housekeeping happens once in so many requests.
const HOUSEKEEPING: u32 = 8192;

type Limiter = DefaultKeyedRateLimiter<(SiteId, Client)>;

/// Counts requests by site and client.
pub struct RateLimit {
    /// None: no limit.
    quota: Option<Quota>,
    limiter: RwLock<Arc<Limiter>>,
    requests: AtomicU32,
    most_keys: usize,
}

impl RateLimit {
    /// `per_minute` requests; 0 is no limit.
    pub fn new(per_minute: u32) -> Self {
        Self::bounded(per_minute, MOST_KEYS)
    }

    fn bounded(per_minute: u32, most_keys: usize) -> Self {
        let quota = NonZeroU32::new(per_minute).map(Quota::per_minute);
        let limiter = Limiter::keyed(quota.unwrap_or(Quota::per_minute(NonZeroU32::MIN)));
        Self { quota, limiter: RwLock::new(Arc::new(limiter)), requests: AtomicU32::new(0), most_keys }
    }

    /// Counts one request. Over the limit: how long to wait, in whole seconds, at least one.
    pub fn check(&self, site: SiteId, client: IpAddr) -> Result<(), Duration> {
        let Some(quota) = self.quota else { return Ok(()) };
        let limiter = self.limiter.read().unwrap_or_else(PoisonError::into_inner).clone();
        if self.requests.fetch_add(1, Ordering::Relaxed) % HOUSEKEEPING == HOUSEKEEPING - 1 {
            self.tidy(&limiter, quota);
        }
        limiter.check_key(&(site, Client::of(client))).map_err(|not_until| {
            let wait = not_until.wait_time_from(DefaultClock::default().now());
            Duration::from_secs(wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(Duration::from_secs(1))
        })
    }

    fn tidy(&self, limiter: &Limiter, quota: Quota) {
        limiter.retain_recent();
        if limiter.len() > self.most_keys {
            *self.limiter.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Limiter::keyed(quota));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn site(n: u128) -> SiteId {
        SiteId::from_uuid(Uuid::from_u128(n))
    }

    fn address(text: &str) -> IpAddr {
        text.parse().expect("a test's own address")
    }

    #[test]
    fn one_client_of_one_site_is_limited_and_told_when_to_come_back() {
        let limit = RateLimit::new(2);
        let client = address("203.0.113.7");
        assert_eq!(limit.check(site(1), client), Ok(()));
        assert_eq!(limit.check(site(1), address("::ffff:203.0.113.7")), Ok(()));
        let wait = limit.check(site(1), client).expect_err("the third of two");
        assert!((Duration::from_secs(29)..=Duration::from_secs(30)).contains(&wait), "{wait:?}");
        assert_eq!(wait.subsec_nanos(), 0);
        assert_eq!(limit.check(site(2), client), Ok(()), "another site");
        assert_eq!(limit.check(site(1), address("203.0.113.8")), Ok(()), "another client");
    }

    #[test]
    fn an_ipv6_subscriber_is_one_client() {
        let limit = RateLimit::new(1);
        assert_eq!(limit.check(site(1), address("2001:db8:1:2::1")), Ok(()));
        assert!(limit.check(site(1), address("2001:db8:1:2:ffff::9")).is_err());
        assert_eq!(limit.check(site(1), address("2001:db8:1:3::1")), Ok(()));
    }

    #[test]
    fn zero_is_no_limit_and_memory_is_bounded() {
        let off = RateLimit::new(0);
        assert!((0..1000).all(|_| off.check(site(1), address("203.0.113.7")).is_ok()));
        let limit = RateLimit::bounded(1, 100);
        for n in 0..HOUSEKEEPING {
            let _ = limit.check(site(1), IpAddr::V4(n.into()));
        }
        let keys = limit.limiter.read().unwrap_or_else(PoisonError::into_inner).len();
        assert!(keys <= 100, "{keys}");
    }
}
