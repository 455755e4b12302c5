//! What OpsMantik is about: a month, an event, a session, a score, an attribution, an origin, a call and its match.
//!
//! Everything here is pure: no tokio, no SQL, no tonic, no axum. A value of these types is already valid, so
//! the layers above only hand it on. Derived values are *merges* (commutative, associative, idempotent): what is
//! stored depends on the set of distinct events, never on their order, batching or repetition.
//!
//! Start with [`event::Draft`] (what a door read) and [`event::Event`] (what was accepted), then
//! [`session::Session`] (what the events of one visit add up to). Calls go the same way: [`push::Draft`],
//! [`push::Push`], [`call::Told`], and [`matching::decide`] finds their visit.

pub mod access;
pub mod ads_history;
pub mod attribution;
pub mod call;
pub mod campaign;
pub mod change;
pub mod client;
pub mod event;
pub mod evidence;
pub mod id;
pub mod job;
pub mod matching;
pub mod money;
pub mod month;
pub mod origin;
pub mod outcome;
pub mod page;

pub mod push;
pub mod recorded;
pub mod refusal;
pub mod rematch;
pub mod session;
pub mod signal;
pub mod site;
pub mod stored;
pub mod telephone;
pub mod text;
pub mod traffic;
