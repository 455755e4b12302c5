//! Does nothing. Whoever builds an example gets the crates with the features that tests ask for; so `fuzz/run`, which asks for this one beside its
//! targets, finds them as `cargo test` has built them.

fn main() {}
