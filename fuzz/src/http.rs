//! Of the public door, what reads bytes.

#[path = "../../src/http/signature.rs"]
pub mod signature;
#[path = "../../src/http/wire.rs"]
pub mod wire;
