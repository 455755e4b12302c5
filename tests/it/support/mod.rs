//! The one rig: a private cluster a process, a migrated database a test, events from a few words, the program itself.

#![allow(dead_code)] // each test uses its part of the rig

pub mod app;
pub mod browser;
pub mod calls;
pub mod cluster;
pub mod database;
pub mod events;
pub mod line;
pub mod metrics;
pub mod nats;
pub mod private;
pub mod process;
pub mod qstash;
pub mod raw;
pub mod stage;
pub mod supabase;
