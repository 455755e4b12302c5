//! Refusing before the work: what a request costs that cannot be stored now.
//!
//! ```text
//! nobody finds room ─▶ a long body is not read, a short one not understood
//! some sites do not ─▶ a glance at whose events they are and how many, and only then the rest
//! ```
//!
//! Under pressure most requests may be refused, and the machine has better things to do than to understand them.

use std::borrow::Cow;

use axum::response::Response;
use serde::Deserialize;

use super::cors::Sender;
use super::trouble::logged;
use super::turn::Asking;
use super::{PublicState, sync};
use crate::domain::outcome::Unavailable;
use crate::pipeline::{Pressure, Wanted};

/// The answer, if it is certain that nothing of this body would be taken. None as well for what has to be read to know what is wrong with it.
pub(super) async fn refusal(state: &PublicState, sender: &Sender, asking: Asking, bytes: &[u8]) -> Option<Response> {
    match state.transport.pressure() {
        Pressure::Low => None,
        Pressure::Full => Some(sender.shown_to_customers(&state.directory, busy()).await),
        Pressure::High => {
            let Ok(glance) = asking.in_turn(|| serde_json::from_slice::<Glance<'_>>(bytes)).await else {
                return Some(sender.shown_to_customers(&state.directory, busy()).await);
            };
            let glance = glance.ok()?;
            let name = glance.site()?;
            let site = state.directory.site(name).await.ok()??;
            sender.admit(&site).ok()?;
            let events = glance.events.as_ref().map_or(1, Vec::len);
            let refused = state.transport.refuses(Wanted { site: site.id, events, bytes: bytes.len() });
            refused.then(|| sender.shown(busy()))
        }
    }
}

fn busy() -> Response {
    logged(sync::ROUTE, Unavailable::Busy.into())
}

/// As much of a body as tells whose it is.
#[derive(Deserialize)]
struct Glance<'a> {
    #[serde(borrow)]
    s: Option<Cow<'a, str>>,
    #[serde(borrow)]
    events: Option<Vec<Named<'a>>>,
}

#[derive(Deserialize)]
struct Named<'a> {
    #[serde(borrow)]
    s: Option<Cow<'a, str>>,
}

impl Glance<'_> {
    fn site(&self) -> Option<&str> {
        match &self.events {
            None => self.s.as_deref(),
            Some(events) => events.iter().find_map(|event| event.s.as_deref()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_glance_tells_whose_events_they_are() {
        let site = |body: &str| {
            let glance: Option<Glance<'_>> = serde_json::from_str(body).ok();
            glance.and_then(|glance| Some((glance.site()?.to_owned(), glance.events.as_ref().map_or(1, Vec::len))))
        };
        let told = |name: &str, events| Some((name.to_owned(), events));
        assert_eq!(site(r#"{"u":"https://a.example","s":"shop","meta":{"s":"other"}}"#), told("shop", 1));
        assert_eq!(site(r#"{"s":"sh\u006fp"}"#), told("shop", 1));
        assert_eq!(site(r#"{"events":[{"u":"x"},{"s":"shop"}],"s":"other"}"#), told("shop", 2));
        // What cannot be told at a glance is read as a whole.
        for odd in ["", "[]", "{}", r#"{"s":7}"#, r#"{"events":[]}"#, r#"{"events":7,"s":"shop"}"#, r#"{"s":"shop""#] {
            assert_eq!(site(odd), None, "{odd}");
        }
    }
}
