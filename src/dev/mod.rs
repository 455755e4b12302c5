//! What makes two commands enough on a bare machine.
//!
//! `opsmantik dev` and the tests both need a PostgreSQL of their own, and the
//! tests a browser and a few tools besides. The modules here find those on the
//! machine, install what is missing, and run a private database cluster that
//! nobody else shares and that never outlives its owner. Nothing of this is used
//! by `opsmantik serve`.
//!
//! Everything here blocks while it works: async callers go through
//! `tokio::task::spawn_blocking`.

pub mod account;
pub mod cluster;
pub mod demo;
pub mod packages;
pub mod postgres;
pub mod progress;
pub mod projects;
pub mod run;
pub mod tools;

mod folder;
mod leftover;
mod watchdog;
