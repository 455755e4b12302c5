//! The messages of the contract, without services: what a conversion reads and writes.

use std::path::Path;

const ROOT: &str = "../proto";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed={ROOT}");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(Path::new(ROOT).join("opsmantik/v1"))? {
        files.push(entry?.path());
    }
    files.sort();
    prost_build::Config::new().compile_fds(protox::compile(&files, [ROOT])?)?;
    Ok(())
}
