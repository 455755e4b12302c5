//! Which pages may send and which may read the answer.
//!
//! An origin is allowed by the site that the event names. Before the site is known (a preflight has no body, a body may be rubbish) it is
//! enough that *any* site allows it: that page is a customer's, and its developer should be able to read what is wrong. A refused origin
//! never sees an `Access-Control-Allow-Origin`. Credentials are allowed because beacons always send them; we set no cookies.

use axum::response::{IntoResponse, Response};
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderValue, StatusCode};

use super::answer::Problem;
use crate::directory::Directory;
use crate::domain::origin::Origin;
use crate::domain::site::Site;

/// The `Origin` of a request: as sent, which is what is echoed, and as parsed, which is what is compared.
#[derive(Debug, Clone)]
pub enum Sender {
    Anonymous,
    /// `null`, several, or nothing that is an origin.
    Unreadable,
    Page(HeaderValue, Origin),
}

impl Sender {
    pub fn of(headers: &HeaderMap) -> Self {
        let mut values = headers.get_all(ORIGIN).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return if headers.contains_key(ORIGIN) { Self::Unreadable } else { Self::Anonymous };
        };
        match value.to_str().ok().and_then(Origin::parse) {
            Some(origin) => Self::Page(value.clone(), origin),
            None => Self::Unreadable,
        }
    }

    /// Lets the page in if `site` allows it.
    pub fn admit(&self, site: &Site) -> Result<(), Problem> {
        match self {
            Self::Anonymous => Err(Problem::origin_required()),
            Self::Page(_, origin) if site.allows(origin) => Ok(()),
            Self::Unreadable | Self::Page(..) => Err(Problem::origin_not_allowed()),
        }
    }

    /// Lets the page read the answer. Only for one that was admitted.
    pub fn shown(&self, response: impl IntoResponse) -> Response {
        let mut response = hidden(response);
        if let Self::Page(value, _) = self {
            let headers = response.headers_mut();
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, value.clone());
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("Retry-After"));
        }
        response
    }

    /// Lets the page read the answer if any site allows it: for errors that come before the site is known.
    pub async fn shown_to_customers(&self, directory: &Directory, problem: impl IntoResponse) -> Response {
        match self {
            Self::Page(_, origin) if directory.any_site_allows(origin).await.unwrap_or(false) => self.shown(problem),
            _ => hidden(problem),
        }
    }

    /// The answer to a preflight.
    pub async fn preflight(&self, directory: &Directory) -> Response {
        let allowed = match self {
            Self::Anonymous => return hidden(Problem::origin_required()),
            Self::Unreadable => Ok(false),
            Self::Page(_, origin) => directory.any_site_allows(origin).await,
        };
        match allowed {
            Err(unavailable) => hidden(Problem::from(unavailable)),
            Ok(false) => hidden(Problem::origin_not_allowed()),
            Ok(true) => {
                let mut response = self.shown(StatusCode::NO_CONTENT);
                let headers = response.headers_mut();
                headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("POST, OPTIONS"));
                headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("content-type"));
                // A day; browsers cap it at less.
                headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400"));
                response
            }
        }
    }
}

/// An answer that no page can read. It varies by origin all the same.
pub fn hidden(response: impl IntoResponse) -> Response {
    let mut response = response.into_response();
    response.headers_mut().append(VARY, HeaderValue::from_static("Origin"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::id::SiteId;
    use uuid::Uuid;

    fn sender(origins: &[&'static str]) -> Sender {
        let mut headers = HeaderMap::new();
        for origin in origins {
            headers.append(ORIGIN, HeaderValue::from_static(origin));
        }
        Sender::of(&headers)
    }

    #[test]
    fn a_page_is_admitted_by_its_site_and_its_origin_echoed_as_sent() {
        let site = Site {
            id: SiteId::from_uuid(Uuid::from_u128(1)),
            public_id: "p".into(),
            domain: "a.example".into(),
            origins: vec![],
            region: None,
        };
        let page = sender(&["https://WWW.a.example"]);
        assert_eq!(page.admit(&site), Ok(()));
        let response = page.shown(StatusCode::OK);
        assert_eq!(response.headers()[ACCESS_CONTROL_ALLOW_ORIGIN], "https://WWW.a.example");
        assert_eq!(response.headers()[VARY], "Origin");
        assert_eq!(sender(&[]).admit(&site), Err(Problem::origin_required()));
        for other in [&["null"][..], &["https://evil.example"], &["https://a.example", "https://a.example"], &[""]] {
            assert_eq!(sender(other).admit(&site), Err(Problem::origin_not_allowed()), "{other:?}");
        }
    }
}
