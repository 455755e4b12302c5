//! The whole system against a real PostgreSQL: one binary, one file a behaviour.

mod any_body;
mod browser;
mod cluster;
mod http;
mod merge;
mod pipeline;
mod schema;
mod statements;
mod support;
mod worker;
