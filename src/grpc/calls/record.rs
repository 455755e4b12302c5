//! From pushed calls to recorded ones: first all sites, then the pushes one by one, then the store.
//!
//! A site that is not the caller's ends the whole request before anything is recorded; what else is wrong with a push is its own affair. What the
//! database refuses is looked for one push at a time, so that its neighbours are recorded; it leaves a dead letter, which names the call
//! and no number.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::json;
use tonic::Status;

use super::asked;
use crate::calls::caller_key::CallerKey;
use crate::calls::{CHUNK, Failed, Recorded};
use crate::domain::access::Caller;
use crate::domain::id::{CallId, DeadLetterId, SiteId};
use crate::domain::month::Month;
use crate::domain::outcome::{DeathReason, Unavailable};
use crate::domain::push::Push;
use crate::domain::refusal::Refusal;
use crate::domain::site::Site;
use crate::grpc::proto::{PushedCall, Rejection};
use crate::grpc::{GrpcState, access};
use crate::store::dead_letters::DeadLetter;
use crate::store::error::{Fault, StoreError};

/// Records pushes of calls that came in at one time.
pub(super) struct Recorder<'r> {
    pub(super) state: &'r GrpcState,
    pub(super) key: &'r CallerKey,
    pub(super) received_at: DateTime<Utc>,
}

impl Recorder<'_> {
    /// Reads each push, as one of the site that it names. An error is one of the whole request: a site that is not the caller's, or nobody
    /// who could tell.
    pub(super) async fn admit(
        &self,
        caller: &Caller,
        calls: Vec<PushedCall>,
    ) -> Result<Vec<Result<Push, Rejection>>, Status> {
        let mut sites: HashMap<String, Option<Arc<Site>>> = HashMap::new();
        let mut admitted = Vec::with_capacity(calls.len());
        for call in calls {
            let name = call.site.trim();
            if name.is_empty() {
                admitted.push(Err(Refusal::missing("site", "the site's public id or UUID").into()));
                continue;
            }
            if !sites.contains_key(name) {
                let found = access::find_site(self.state, caller, name).await?;
                sites.insert(name.to_owned(), found);
            }
            admitted.push(match sites.get(name) {
                Some(Some(site)) => self.read(site, call),
                Some(None) | None => Err(Refusal::unknown_site("site").into()),
            });
        }
        Ok(admitted)
    }

    /// A push of a call of this site, or what is wrong with it.
    pub(super) fn read(&self, site: &Site, call: PushedCall) -> Result<Push, Rejection> {
        let draft = asked::draft(call)?;
        let hash = |number: &_| self.key.hash(site.id, number);
        Ok(Push::accept(site.id, draft, site.region.as_deref(), self.received_at, hash)?)
    }

    /// Records what was admitted; one result a push, in the same order.
    pub(super) async fn record(
        &self,
        admitted: Vec<Result<Push, Rejection>>,
    ) -> Result<Vec<Result<Recorded, Rejection>>, Unavailable> {
        // What is recorded together shares a transaction, and is recorded whole or not at all.
        let mut together: BTreeMap<(SiteId, Month), (Vec<usize>, Vec<Push>)> = BTreeMap::new();
        let mut results: Vec<Option<Result<Recorded, Rejection>>> = Vec::with_capacity(admitted.len());
        for (place, push) in admitted.into_iter().enumerate() {
            results.push(match push {
                Ok(push) => {
                    let of = (push.key.site_id(), Month::of(push.started_at));
                    let (places, pushes) = together.entry(of).or_default();
                    places.push(place);
                    pushes.push(push);
                    None
                }
                Err(rejection) => Some(Err(rejection)),
            });
        }
        let mut latest: HashMap<CallId, usize> = HashMap::new();
        for ((site, _), (places, pushes)) in together {
            for (places, chunk) in places.chunks(CHUNK).zip(pushes.chunks(CHUNK)) {
                let recorded = self.record_together(site, chunk).await?;
                for (place, result) in places.iter().zip(recorded) {
                    if let Ok(recorded) = &result {
                        latest.insert(recorded.call.id, *place);
                    }
                    results[*place] = Some(result);
                }
            }
        }
        // A call that was pushed twice here is told as it is in the end, each time.
        for place in 0..results.len() {
            let Some(Ok(recorded)) = &results[place] else { continue };
            let Some(last) = latest.get(&recorded.call.id).filter(|last| **last != place) else { continue };
            let Some(Ok(Recorded { call, .. })) = results[*last].clone() else { continue };
            if let Some(Ok(recorded)) = &mut results[place] {
                recorded.call = call;
            }
        }
        Ok(results.into_iter().flatten().collect())
    }

    async fn record_together(
        &self,
        site: SiteId,
        pushes: &[Push],
    ) -> Result<Vec<Result<Recorded, Rejection>>, Unavailable> {
        match self.state.calls.record(site, pushes).await {
            Ok(recorded) => Ok(recorded.into_iter().map(Ok).collect()),
            Err(Failed::Unavailable(why)) => Err(why),
            Err(Failed::Refused(_)) => {
                let mut results = Vec::with_capacity(pushes.len());
                for push in pushes {
                    results.push(self.record_alone(site, push).await?);
                }
                Ok(results)
            }
        }
    }

    async fn record_alone(&self, site: SiteId, push: &Push) -> Result<Result<Recorded, Rejection>, Unavailable> {
        match self.state.calls.record(site, std::slice::from_ref(push)).await {
            // One push has one result; without it nothing is known.
            Ok(recorded) => recorded.into_iter().next().map(Ok).ok_or(Unavailable::Database),
            Err(Failed::Unavailable(why)) => Err(why),
            Err(Failed::Refused(error)) => Ok(Err(self.bury(push, &error).await?)),
        }
    }

    /// Keeps what is left of a push that the database refuses.
    async fn bury(&self, push: &Push, error: &StoreError) -> Result<Rejection, Unavailable> {
        let (site, call) = (push.key.site_id(), push.key.call_id());
        let reason = match error.fault {
            Fault::UnknownSite => DeathReason::UnknownSite,
            Fault::Refused | Fault::Away | Fault::Conflict | Fault::MissingPartition => DeathReason::RefusedByDatabase,
        };
        let (provider, provider_call_id) = (push.key.provider(), push.key.provider_call_id());
        let payload = json!({"site_id": site, "provider": provider, "provider_call_id": provider_call_id});
        let letter = DeadLetter {
            id: DeadLetterId::derived(format!("call {site} {call}").as_bytes()),
            site_id: Some(site),
            event_id: None,
            source: "calls",
            reason,
            detail: error.to_string(),
            payload: payload.to_string(),
            received_at: self.received_at,
        };
        match self.state.store.bury(&letter).await {
            Ok(()) => {
                tracing::warn!(call.id = %call, site.id = %site, reason = reason.code(), %error, "a pushed call died");
                Ok(reason.into())
            }
            Err(error) => {
                tracing::error!(%error, "cannot keep a dead letter");
                Err(Unavailable::Database)
            }
        }
    }
}
