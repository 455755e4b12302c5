//! The whole system against a real PostgreSQL: one binary, one file a behaviour.

// The tests look behind the store's walls; the program may not.
#![allow(clippy::disallowed_methods)]

mod access;
mod any_body;
mod arbitrary;
mod browser;
mod calls;
mod catalog;
mod cli;
mod clients;
mod cluster;
mod connections;
mod dead_letters;
mod feed;
mod followers;
mod grpc;
mod http;
mod import;
mod log;
mod manners;
mod merge;
mod nats;
mod nats_forgets;
mod nats_kills;
mod odd_event;
mod overload;
mod pipeline;
mod process;
mod qstash;
mod readme;
mod realtime;
mod retention;
mod schema;
mod scoring;
mod statements;
mod stream;
mod support;
mod telephony;
mod tls;
mod walls;
mod watch;
mod worker;
