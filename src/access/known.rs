//! API tokens that were looked up a moment ago.
//!
//! An answer is believed for [`BELIEVED_FOR`], so a revoked token stops on every server within that time and the time of a look-up, under
//! five seconds together; its expiry is kept beside it and holds to the moment. One look-up a token runs at a time, and few in all:
//! whoever sends made-up tokens waits in a lane of their own, beside the one for tokens that were good before, and takes neither the
//! database's connections nor memory.

use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use moka::future::Cache;
use tokio::sync::{Semaphore, mpsc};

use super::Denied;
use crate::domain::access::Caller;
use crate::domain::id::TokenId;
use crate::store::Store;
use crate::store::tokens::{FoundToken, TokenHash};

/// How long the database's word on a token is taken for granted, a yes and a no.
const BELIEVED_FOR: Duration = Duration::from_secs(2);
/// A look-up that takes longer is given up; its word would be old by then.
const LOOK_UP_LIMIT: Duration = Duration::from_secs(2);
/// Whoever has waited this long for their turn is told to come again.
const TURN_PATIENCE: Duration = Duration::from_secs(1);
/// Look-ups at a time, of a lane.
const TURNS: usize = 2;
/// Answers that are kept. A flood of unknown tokens does not push out one that is in use: the cache keeps what is asked for often.
const MOST_ANSWERS: u64 = 20_000;
/// How long a good token is remembered as such, for the choice of its lane only.
const REGULAR_FOR: Duration = Duration::from_secs(15 * 60);
/// `last_used_at` is kept no finer than this.
const USE_NOTED_FOR: Duration = Duration::from_secs(60);
/// Uses that wait to be written down; more are not worth the memory and are noted the next time.
const WAITING_USES: usize = 1024;
/// Pause between two writes of uses.
const USES_PAUSE: Duration = Duration::from_secs(1);

pub(super) struct Tokens {
    store: Store,
    answers: Cache<TokenHash, Option<FoundToken>>,
    regulars: Cache<TokenHash, ()>,
    regulars_turn: Semaphore,
    strangers_turn: Semaphore,
    noted: Cache<TokenId, ()>,
    uses: mpsc::Sender<TokenId>,
}

impl Tokens {
    pub(super) fn new(store: Store) -> Self {
        let (uses, used) = mpsc::channel(WAITING_USES);
        tokio::spawn(write_uses(store.clone(), used));
        Self {
            store,
            answers: Cache::builder().max_capacity(MOST_ANSWERS).time_to_live(BELIEVED_FOR).build(),
            regulars: Cache::builder().max_capacity(MOST_ANSWERS).time_to_live(REGULAR_FOR).build(),
            regulars_turn: Semaphore::new(TURNS),
            strangers_turn: Semaphore::new(TURNS),
            noted: Cache::builder().max_capacity(MOST_ANSWERS).time_to_live(USE_NOTED_FOR).build(),
            uses,
        }
    }

    /// The caller with the token of this hash.
    pub(super) async fn find(&self, hash: &TokenHash) -> Result<Arc<Caller>, Denied> {
        let answer = self.answers.try_get_with_by_ref(hash, self.look_up(hash)).await;
        let found = answer.map_err(|denied: Arc<Denied>| (*denied).clone())?.ok_or(Denied::Invalid)?;
        if found.expires_at.is_some_and(|at| at <= Utc::now()) {
            return Err(Denied::Invalid);
        }
        self.note_use(&found.caller).await;
        Ok(found.caller)
    }

    async fn look_up(&self, hash: &TokenHash) -> Result<Option<FoundToken>, Denied> {
        let lane = if self.regulars.contains_key(hash) { &self.regulars_turn } else { &self.strangers_turn };
        // The lanes are never closed, so there is no other failure.
        let Ok(_turn) = tokio::time::timeout(TURN_PATIENCE, lane.acquire()).await else { return Err(Denied::Busy) };
        let asked = tokio::time::timeout(LOOK_UP_LIMIT, self.store.find_token(hash)).await;
        let found = asked.unwrap_or_else(|_| Err(crate::store::error::StoreError::too_slow("look up a token")));
        let found = found.map_err(|error| Denied::Database(Arc::new(error)))?;
        if found.is_some() {
            self.regulars.insert(*hash, ()).await;
        }
        Ok(found)
    }

    /// Has the use written down, soon and elsewhere.
    async fn note_use(&self, caller: &Caller) {
        let Caller::Token { id, .. } = caller else { return };
        if !self.noted.contains_key(id) && self.uses.try_send(*id).is_ok() {
            self.noted.insert(*id, ()).await;
        }
    }
}

/// Writes down when tokens were used, until nobody is left who could tell.
async fn write_uses(store: Store, mut used: mpsc::Receiver<TokenId>) {
    let mut tokens = Vec::new();
    while used.recv_many(&mut tokens, WAITING_USES).await > 0 {
        if let Err(error) = store.note_token_uses(&tokens).await {
            tracing::debug!(%error, "cannot keep when tokens were last used");
        }
        tokens.clear();
        tokio::time::sleep(USES_PAUSE).await;
    }
}
