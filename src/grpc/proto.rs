//! The wire vocabulary: what `build.rs` generates from `proto/opsmantik/v1`.
//!
//! Messages, clients and servers of package `opsmantik.v1`, and the descriptor set for reflection. These types stop at the
//! door: the rest of the crate speaks the domain's words, and the conversion happens in the service that took the call.
//! The documentation of every item is the comment in its `.proto`. The events of a request are here the bytes of an [`Event`] each.

#![allow(clippy::all, clippy::pedantic, missing_docs)] // Generated: its form is not ours to choose.

tonic::include_proto!("opsmantik.v1");

/// The encoded descriptors of the package and of all it imports, for `tonic-reflection`.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("opsmantik");

impl IngestRequest {
    /// A request with these events.
    pub fn of(events: Vec<Event>) -> Self {
        Self { events: events.iter().map(prost::Message::encode_to_vec).collect() }
    }
}

impl StreamIngestRequest {
    /// A message with this event.
    pub fn of(message_id: impl Into<String>, event: Option<Event>) -> Self {
        Self { message_id: message_id.into(), event: event.as_ref().map(prost::Message::encode_to_vec) }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use prost_types::FileDescriptorSet;

    #[test]
    fn the_descriptor_set_names_every_rpc_of_the_contract() {
        let set = FileDescriptorSet::decode(super::FILE_DESCRIPTOR_SET).expect("build.rs wrote it");
        let rpcs: Vec<String> = set
            .file
            .iter()
            .flat_map(|file| &file.service)
            .flat_map(|service| {
                let methods = service.method.iter();
                methods.map(|method| format!("{}/{}", service.name(), method.name()))
            })
            .collect();

        assert_eq!(
            rpcs,
            [
                "CallsService/RecordCall",
                "CallsService/RecordCalls",
                "CallsService/GetCall",
                "CallsService/ListCalls",
                "CallsService/ReviewCall",
                "CallsService/WatchCalls",
                "IngestService/Ingest",
                "IngestService/StreamIngest",
                "IngestService/WatchEvents",
                "ScoringService/ScoreSignals",
                "ScoringService/GetSessionScore",
                "ScoringService/ListTopSessions",
                "ScoringService/WatchSessions",
            ]
        );
    }

    #[test]
    fn reflection_accepts_the_descriptor_set() {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(super::FILE_DESCRIPTOR_SET)
            .build_v1()
            .expect("the set contains everything that it imports");
    }
}
