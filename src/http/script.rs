//! `GET /tracker.js`: the tracker, as it was built into the binary.
//!
//! Its ETag is the hash of its text, so a browser asks once an hour and gets 304 until a release changes it.

use std::sync::LazyLock;

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::header::{ACCESS_CONTROL_ALLOW_ORIGIN, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use sha2::{Digest, Sha256};

use super::answer::Problem;

const SCRIPT: &str = include_str!("tracker.js");

static TAG: LazyLock<String> = LazyLock::new(|| {
    let hash: String = Sha256::digest(SCRIPT).iter().take(12).map(|byte| format!("{byte:02x}")).collect();
    format!("\"{hash}\"")
});

pub async fn script(request: Request) -> Response {
    let head = match *request.method() {
        Method::GET => false,
        Method::HEAD => true,
        _ => return Problem::method_not_allowed("GET, HEAD").into_response(),
    };
    let known = is_known(request.headers());
    let status = if known { StatusCode::NOT_MODIFIED } else { StatusCode::OK };
    let body = if known || head { Body::empty() } else { Body::from(SCRIPT) };
    let mut response = (status, body).into_response();
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("public, max-age=3600, stale-while-revalidate=86400"));
    // Any page may load it, also one that isolates itself.
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("cross-origin"));
    if let Ok(tag) = HeaderValue::from_str(&TAG) {
        headers.insert(ETAG, tag);
    }
    if !known {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/javascript; charset=utf-8"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(SCRIPT.len()));
    }
    response
}

fn is_known(headers: &HeaderMap) -> bool {
    let tags = headers.get_all(IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    tags.flat_map(|tags| tags.split(',')).map(str::trim).any(|tag| {
        // A proxy that compresses makes it weak.
        tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == *TAG
    })
}
