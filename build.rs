//! Compiles the protobuf contract under `proto/` with `protox`, so that no `protoc` is needed on the machine.
//!
//! Leaves two things in `OUT_DIR`: the Rust code of package `opsmantik.v1`, and `opsmantik.bin`, the descriptor set that
//! the reflection service serves. A mistake in a `.proto` stops the build with its file, line and column.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs, io};

use prost::Message;
use prost_types::FileDescriptorSet;
use prost_types::field_descriptor_proto::{Label, Type};

const ROOT: &str = "proto";
/// Fields whose messages the code takes as bytes, which on the wire are the same: an event is decoded by itself, so that one which cannot be
/// decoded spoils nothing else. What reflection tells is the contract as it is written.
const TAKEN_AS_BYTES: [(&str, &str); 2] = [("IngestRequest", "events"), ("StreamIngestRequest", "event")];

fn main() -> ExitCode {
    match compile() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("cannot compile the protobuf contract: {message}");
            ExitCode::FAILURE
        }
    }
}

fn compile() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build.rs");
    let mut files = Vec::new();
    find_protos(Path::new(ROOT), &mut files).map_err(|error| format!("{ROOT}: {error}"))?;
    if files.is_empty() {
        return Err(format!("{ROOT}: there is no .proto file in it"));
    }
    // The order of a directory differs between machines; generated code must not.
    files.sort();

    // The Debug form of a protox error is the one that names file, line and column.
    let mut descriptors = protox::compile(&files, [ROOT]).map_err(|error| format!("{error:?}"))?;
    tonic_prost_build::configure()
        .codec_path("crate::grpc::codec::ContractCodec")
        .compile_fds(with_bytes(descriptors.clone())?)
        .map_err(|error| format!("code generation: {error}"))?;

    // Reflection needs no comments, and they are most of the bytes.
    for file in &mut descriptors.file {
        file.source_code_info = None;
    }
    let out_dir = env::var_os("OUT_DIR").ok_or("OUT_DIR is not set; run this through cargo")?;
    let path = PathBuf::from(out_dir).join("opsmantik.bin");
    fs::write(&path, descriptors.encode_to_vec()).map_err(|error| format!("{}: {error}", path.display()))
}

/// The descriptors that code is generated from.
fn with_bytes(mut descriptors: FileDescriptorSet) -> Result<FileDescriptorSet, String> {
    for (message, field) in TAKEN_AS_BYTES {
        let ours = descriptors.file.iter_mut().filter(|file| file.package() == "opsmantik.v1");
        let mut messages = ours.flat_map(|file| &mut file.message_type);
        let found = messages.find(|found| found.name() == message);
        let found = found.and_then(|message| message.field.iter_mut().find(|found| found.name() == field));
        let found = found.ok_or_else(|| format!("there is no field {message}.{field}"))?;
        found.set_type(Type::Bytes);
        found.type_name = None;
        // A message can be absent; bytes can only if they are told to be optional.
        let single = found.label() == Label::Optional;
        found.proto3_optional = single.then_some(true);
    }
    Ok(descriptors)
}

/// Collects every `.proto` below `dir`. The folders are watched as well as the files, so that a new file is noticed.
fn find_protos(dir: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    println!("cargo::rerun-if-changed={}", dir.display());
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            find_protos(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "proto") {
            println!("cargo::rerun-if-changed={}", path.display());
            found.push(path);
        }
    }
    Ok(())
}
