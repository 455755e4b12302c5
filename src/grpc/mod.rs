//! The internal door: tonic services over the typed contract in `proto/`.

pub mod proto;
