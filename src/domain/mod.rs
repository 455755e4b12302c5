//! What OpsMantik is about: a month, an event, a session, a score, an attribution, an origin.
//!
//! Everything here is pure: no tokio, no SQL, no tonic, no axum. A value of these types is already valid, so
//! the layers above only hand it on. Derived values are *merges* (commutative, associative, idempotent): what is
//! stored depends on the set of distinct events, never on their order, batching or repetition.
//!
//! Start with [`event::Draft`] (what a door read) and [`event::Event`] (what was accepted), then
//! [`session::Session`] (what the events of one visit add up to).

pub mod access;
pub mod ads_history;
pub mod attribution;
pub mod campaign;
pub mod client;
pub mod event;
pub mod evidence;
pub mod id;
pub mod job;
pub mod month;
pub mod origin;
pub mod outcome;
pub mod page;
pub mod refusal;
pub mod session;
pub mod signal;
pub mod site;
pub mod text;
pub mod traffic;
