//! OpsMantik tells an advertiser which ad click, visit and page made the phone ring.
//!
//! Data walks one way: door → domain → pipeline → store. Nothing lower knows anything higher.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`domain`] | what a month, an event, a session, a score, an attribution *are*; pure |
//! | [`http`] | the public door: `/api/sync`, the QStash worker, the tracker, and the operator's listener |
//! | [`grpc`] | the internal door: typed services |
//! | [`access`] | who is behind a bearer token |
//! | [`directory`] | which sites exist and which origins they allow, cached |
//! | [`queue`] | who owns an event before the pipeline: nobody (inline), QStash or NATS |
//! | [`pipeline`] | batching: from accepted events to outcomes |
//! | [`calls`] | from pushes to matched calls; again, when something late arrives |
//! | [`feed`] | the change feed: PostgreSQL's log, read once a server and told to everybody who watches |
//! | [`store`] | the repository: all SQL, addressed by keys that contain the month |
//! | [`keeper`] | makes monthly partitions ahead of time |
//! | [`server`] | wires it all together; [`cli`] and [`config`] are its front, [`telemetry`] its voice, [`secret`] what it never says |
//! | `fair_queue` | a queue with a lane for everybody, served in turn: where more wait than can be served |
//! | `bounded` | no more of another server's answer than it may have: keys of JWTs, QStash |
//! | [`dev`] | what makes two commands enough on a bare machine |

pub mod access;
mod bounded;
pub mod calls;
pub mod cli;
pub mod config;
pub mod dev;
pub mod directory;
pub mod domain;
mod fair_queue;
pub mod feed;
pub mod grpc;
pub mod http;
pub mod keeper;
pub mod pipeline;
pub mod queue;
mod seats;
pub mod secret;
pub mod server;
pub mod store;
pub mod telemetry;
