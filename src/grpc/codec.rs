//! How messages of the contract are read and written: prost, with its own word for bytes that are no message.
//!
//! Bytes that cannot be decoded are the caller's mistake and INVALID_ARGUMENT, for unary calls and streams alike; tonic's own codec
//! calls them INTERNAL, which sends whoever is on call looking for a fault of ours. `build.rs` puts this codec into the generated
//! code, so our clients read with it, too.

use std::marker::PhantomData;

use prost::{DecodeError, Message};
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder};
use tonic_prost::ProstEncoder;

use super::proto::{Rejection, RejectionReason};
use super::status::bad_request;

/// Writes messages of type `T`, reads messages of type `U`.
pub struct ContractCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for ContractCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for ContractCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ContractDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        ContractDecoder(PhantomData)
    }
}

/// Reads messages of type `U`.
pub struct ContractDecoder<U>(PhantomData<U>);

impl<U: Message + Default> Decoder for ContractDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        U::decode(bytes).map(Some).map_err(undecodable)
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::default()
    }
}

/// prost names messages and fields of the contract and numbers, and nothing of what was sent.
fn undecodable(error: DecodeError) -> Status {
    bad_request(vec![Rejection::of(RejectionReason::Invalid, "", error.to_string())])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::proto::Event;
    use http_body_util::Full;
    use hyper::body::Bytes;
    use tonic::codec::Streaming;
    use tonic::{Code, Request};
    use tonic_types::StatusExt;

    fn framed(message: &[u8]) -> Vec<u8> {
        let length = u32::try_from(message.len()).expect("a test's own message").to_be_bytes();
        [&[0][..], &length, message].concat()
    }

    fn stream(frames: &[Vec<u8>]) -> Request<Streaming<Event>> {
        let mut codec = ContractCodec::<Event, Event>::default();
        let body = Full::new(Bytes::from(frames.concat()));
        Request::new(Streaming::new_request(codec.decoder(), body, None, None))
    }

    #[tokio::test]
    async fn a_stream_gives_its_messages_until_one_cannot_be_decoded() {
        let good = Event { label: Some("call".to_owned()), ..Event::default() };
        // Field 1 with a wire type that does not exist, and text that is no UTF-8.
        for bad in [&b"\x0fsecret"[..], b"\x0a\x06\xffsecre"] {
            let mut messages = stream(&[framed(&good.encode_to_vec()), framed(bad)]).into_inner();
            assert_eq!(messages.message().await.expect("a message"), Some(good.clone()));
            let status = messages.message().await.expect_err("no message");
            assert_eq!(status.code(), Code::InvalidArgument);
            assert!(!status.message().contains("secre"), "no payload: {}", status.message());
            assert_eq!(status.get_details_bad_request().map(|details| details.field_violations.len()), Some(1));
        }
    }
}
