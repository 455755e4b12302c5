//! Who may call what: every RPC but health needs a caller with its scope, and a site that is theirs.
//!
//! [`AccessLayer`] proves the caller before anything of the request is read, and leaves them in its extensions. A handler asks
//! [`site`] for the site that the request names: whoever may not see it hears the same whether it exists or not. [`reader`] says under
//! whose policies the database is read. A stream outlives the moment of its admission, so it asks [`Admission::renew`] every two seconds.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::AUTHORIZATION;
use tonic::body::Body;
use tonic::{Code, Request, Status};
use tonic_types::{ErrorDetails, StatusExt};
use tower::{Layer, Service};

use super::newcomers::Welcome;
use super::proto::RejectionReason;
use super::{GrpcState, proto, status};
use crate::access::{Admission, Denied, Gate};
use crate::domain::access::{Caller, Reach, Scope};
use crate::domain::id::SiteId;
use crate::domain::outcome::Unavailable;
use crate::domain::site::Site;
use crate::store::transaction::Reader;

/// The scope of every RPC, and whether a person may call it, too.
const RPCS: [(&str, Scope, bool); 13] = [
    ("/opsmantik.v1.IngestService/Ingest", Scope::IngestWrite, false),
    ("/opsmantik.v1.IngestService/StreamIngest", Scope::IngestWrite, false),
    ("/opsmantik.v1.IngestService/WatchEvents", Scope::EventsRead, true),
    ("/opsmantik.v1.ScoringService/ScoreSignals", Scope::ScoringRead, true),
    ("/opsmantik.v1.ScoringService/GetSessionScore", Scope::ScoringRead, true),
    ("/opsmantik.v1.ScoringService/ListTopSessions", Scope::ScoringRead, true),
    ("/opsmantik.v1.ScoringService/WatchSessions", Scope::ScoringRead, true),
    ("/opsmantik.v1.CallsService/RecordCall", Scope::CallsWrite, false),
    ("/opsmantik.v1.CallsService/RecordCalls", Scope::CallsWrite, false),
    ("/opsmantik.v1.CallsService/GetCall", Scope::CallsRead, true),
    ("/opsmantik.v1.CallsService/ListCalls", Scope::CallsRead, true),
    ("/opsmantik.v1.CallsService/ReviewCall", Scope::CallsWrite, true),
    ("/opsmantik.v1.CallsService/WatchCalls", Scope::CallsRead, true),
];

/// Where the RPCs of the contract are.
const CONTRACT: &str = "/opsmantik.";
/// Longest text that can name a site, bytes.
const MAX_SITE_TEXT: usize = 128;
/// After this a caller whom the sign-in service's keys could not prove may try again.
const PROVIDER_DELAY: Duration = Duration::from_secs(5);

/// What is open to everybody: health, which a load balancer asks without a token.
const OPEN: &str = "/grpc.health.v1.Health/";

#[derive(Clone)]
pub(super) struct AccessLayer {
    gate: Gate,
}

impl AccessLayer {
    pub(super) fn new(gate: Gate) -> Self {
        Self { gate }
    }
}

impl<S> Layer<S> for AccessLayer {
    type Service = Access<S>;

    fn layer(&self, inner: S) -> Access<S> {
        Access { inner, gate: self.gate.clone() }
    }
}

#[derive(Clone)]
pub(super) struct Access<S> {
    inner: S,
    gate: Gate,
}

impl<S> Service<http::Request<Body>> for Access<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<http::Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        // The clone takes the place; what was polled ready is what is called.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        if request.uri().path().starts_with(OPEN) {
            return Box::pin(inner.call(request));
        }
        let gate = self.gate.clone();
        Box::pin(async move {
            // A body cannot be shared between threads, which asking the gate may need.
            let (parts, body) = request.into_parts();
            let admitted = admit(&gate, &parts).await;
            let mut request = http::Request::from_parts(parts, body);
            match admitted {
                Ok(admission) => {
                    if let Some(connection) = request.extensions().get::<Welcome>() {
                        connection.known();
                    }
                    request.extensions_mut().insert(admission.caller().clone());
                    request.extensions_mut().insert(admission);
                    inner.call(request).await
                }
                Err(refusal) => Ok(refusal.into_http()),
            }
        })
    }
}

/// Lets the caller in, if they have the scope of what they call.
async fn admit(gate: &Gate, request: &http::request::Parts) -> Result<Admission, Status> {
    let mut headers = request.headers.get_all(AUTHORIZATION).iter();
    let bearer = match (headers.next(), headers.next()) {
        // Two proofs are none: one of them is not the caller's.
        (Some(only), None) => bearer(only),
        (None, _) | (Some(_), Some(_)) => None,
    };
    let bearer = bearer.ok_or_else(nobody)?;
    let admission = gate.admit(bearer).await.map_err(denied)?;
    let path = request.uri.path();
    let Some((_, scope, people_too)) = RPCS.iter().find(|(rpc, ..)| *rpc == path) else {
        // What is not in the table is reflection, or nothing that this version has.
        let unknown = path.starts_with(CONTRACT);
        return if unknown { Err(Status::unimplemented("there is no such RPC")) } else { Ok(admission) };
    };
    let caller = admission.caller();
    if matches!(**caller, Caller::User { .. }) && !people_too {
        return Err(Status::permission_denied("this RPC is for API tokens, not for people who signed in"));
    }
    if caller.has(*scope) {
        Ok(admission)
    } else {
        Err(Status::permission_denied(format!("the token has no scope `{scope}`")))
    }
}

fn bearer(header: &http::HeaderValue) -> Option<&str> {
    let (scheme, token) = header.to_str().ok()?.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case("bearer ").then(|| token.trim())
}

fn nobody() -> Status {
    Status::unauthenticated("`authorization: Bearer TOKEN` is required in the metadata")
}

/// What somebody hears who is not let in, or no longer.
pub(super) fn denied(denied: Denied) -> Status {
    match denied {
        Denied::Invalid => Status::unauthenticated("the bearer token is not valid"),
        Denied::Busy => status::unavailable(Unavailable::Busy),
        Denied::Database(error) => {
            tracing::warn!(%error, "cannot check a token");
            status::unavailable(Unavailable::Database)
        }
        Denied::Provider => Status::with_error_details(
            Code::Unavailable,
            "the keys of the sign-in service cannot be fetched; send the request again",
            ErrorDetails::with_retry_info(Some(PROVIDER_DELAY)),
        ),
    }
}

/// Who calls.
pub(super) fn caller<T>(request: &Request<T>) -> Result<Arc<Caller>, Status> {
    let caller = request.extensions().get::<Arc<Caller>>().cloned();
    // The layer lets nobody pass without one.
    caller.ok_or_else(nobody)
}

/// Who calls and by what proof, for a stream that has to ask again.
pub(super) fn admission<T>(request: &Request<T>) -> Result<Admission, Status> {
    request.extensions().get::<Admission>().cloned().ok_or_else(nobody)
}

/// A site that is not the caller's: said alike whether it exists or not.
pub(super) fn not_yours() -> Status {
    Status::permission_denied("`site` is not among the sites of this token")
}

/// The site that a request names, if it is the caller's. `Ok(None)`: there is none, which only a caller for all sites is told.
pub(super) async fn find_site(state: &GrpcState, caller: &Caller, text: &str) -> Result<Option<Arc<Site>>, Status> {
    let text = text.trim();
    match caller {
        Caller::Token { reach: Reach::AllSites, .. } => state.directory.site(text).await.map_err(status::unavailable),
        Caller::Token { reach: Reach::Site { id, public_id }, .. } => {
            if text != public_id && text.parse::<SiteId>().ok().as_ref() != Some(id) {
                return Err(not_yours());
            }
            // The token refers to it, so it exists.
            let site = state.directory.site_by_id(*id).await.map_err(status::unavailable)?;
            site.map(Some).ok_or_else(not_yours)
        }
        Caller::User { id } => {
            if text.len() > MAX_SITE_TEXT || text.contains('\0') {
                return Err(not_yours());
            }
            let found = state.store.find_site_as(Reader::User(*id), text, text.parse().ok()).await;
            let site = found.map_err(|error| {
                tracing::warn!(%error, "cannot look up a site");
                status::unavailable(Unavailable::Database)
            })?;
            site.map(|site| Some(Arc::new(site))).ok_or_else(not_yours)
        }
    }
}

/// As [`find_site`], for a request about one site: INVALID_ARGUMENT without a name, NOT_FOUND for a site that does not exist.
pub(super) async fn site(
    state: &GrpcState,
    caller: &Caller,
    field: &'static str,
    text: &str,
) -> Result<Arc<Site>, Status> {
    if text.trim().is_empty() {
        let message = format!("`{field}` is required: the site's public id or UUID");
        return Err(status::bad_request(vec![proto::Rejection::of(RejectionReason::Missing, field, message)]));
    }
    let site = find_site(state, caller, text).await?;
    site.ok_or_else(|| Status::not_found(format!("`{field}` names no known site")))
}

/// Under whose policies the caller reads a site.
pub(super) fn reader(caller: &Caller, site: SiteId) -> Reader {
    match caller {
        Caller::Token { reach: Reach::Site { id, .. }, .. } => Reader::Site(*id),
        Caller::Token { reach: Reach::AllSites, .. } => Reader::Site(site),
        Caller::User { id } => Reader::User(*id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::Directory;
    use crate::domain::id::TokenId;
    use crate::keeper::Nudge;
    use crate::pipeline::{Pipeline, PipelineConfig};
    use crate::store::Store;
    use uuid::Uuid;

    #[tokio::test]
    async fn a_site_outside_the_token_is_refused_without_asking_anybody() {
        // A database that is not there: whoever asked it could only say UNAVAILABLE.
        let store = Store::new("postgres://nobody@127.0.0.1:1/none", 1).await.expect("a URL");
        let state = GrpcState {
            pipeline: Pipeline::start(store.clone(), Nudge::default(), PipelineConfig::default()),
            directory: Directory::new(store.clone()),
            gate: Gate::new(store.clone()),
            calls: crate::calls::Calls::new(store.clone()),
            caller_key: None,
            feed: crate::feed::Feed::unfit("no feed here"),
            store,
            stop: tokio_util::sync::CancellationToken::new(),
        };
        let mine = SiteId::from_uuid(Uuid::from_u128(1));
        let reach = Reach::Site { id: mine, public_id: "mine".to_owned() };
        let caller = Caller::Token { id: TokenId::from_uuid(Uuid::nil()), scopes: Scope::ALL.to_vec(), reach };
        let theirs = Uuid::from_u128(2).to_string();
        for name in [theirs.as_str(), "theirs", "MINE", "mine\0", "\u{f6}", &"x".repeat(10_000)] {
            let status = site(&state, &caller, "site", name).await.expect_err("not theirs");
            assert_eq!(
                (status.code(), status.message()),
                (Code::PermissionDenied, not_yours().message()),
                "{name:.20}"
            );
            assert!(status.details().is_empty());
        }
        for name in ["mine", " mine ", &mine.to_string(), &mine.as_uuid().simple().to_string()] {
            let status = site(&state, &caller, "site", name).await.expect_err("no database");
            assert_eq!(status.code(), Code::Unavailable, "{name}");
        }
        assert_eq!(site(&state, &caller, "site", " ").await.expect_err("no name").code(), Code::InvalidArgument);
        let person = Caller::User { id: crate::domain::id::UserId::from_uuid(Uuid::nil()) };
        let long = site(&state, &person, "site", &"x".repeat(MAX_SITE_TEXT + 1)).await.expect_err("no such site");
        assert_eq!(long.code(), Code::PermissionDenied);
        let other = SiteId::from_uuid(Uuid::from_u128(2));
        assert_eq!(reader(&caller, other), Reader::Site(mine), "whatever a handler asks for");
        assert_eq!(reader(&person, other), Reader::User(crate::domain::id::UserId::from_uuid(Uuid::nil())));
    }
}
