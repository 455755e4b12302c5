//! How messages of the contract are read and written: prost, with its own word for bytes that are no message.
//!
//! Bytes that cannot be decoded are the caller's mistake and INVALID_ARGUMENT, for unary calls and streams alike; tonic's own codec
//! calls them INTERNAL, which sends whoever is on call looking for a fault of ours. `build.rs` puts this codec into the generated
//! code, so our clients read with it, too.
//!
//! An empty item of a list is two bytes on the wire and hundreds in memory, so a message of far more items than any list may have is
//! refused before it is decoded.

use std::any::TypeId;
use std::marker::PhantomData;

use prost::bytes::Buf;
use prost::encoding::{WireType, decode_key, decode_varint};
use prost::{DecodeError, Message};
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder};
use tonic_prost::ProstEncoder;

use super::proto::{IngestRequest, RecordCallsRequest, Rejection, RejectionReason, ScoreSignalsRequest};
use super::status::bad_request;

/// Most fields with a length at the top of a message. More than any list of the contract may have, and all other fields.
const MAX_FIELDS: usize = 4096;
/// Most items of the lists that a request may bring.
const MAX_ITEMS: usize = 1000;

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

impl<U: Message + Default + 'static> Decoder for ContractDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // What arrived is one piece. If it were not, only the first would be looked at.
        debug_assert_eq!(bytes.chunk().len(), bytes.remaining());
        if let Some(violation) = crowd(bytes.chunk(), list_of::<U>()) {
            return Err(bad_request(vec![violation]));
        }
        U::decode(bytes).map(Some).map_err(undecodable)
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::default()
    }
}

/// The tag and the name of the list that makes a message large, if it has one.
fn list_of<U: 'static>() -> Option<(u32, &'static str)> {
    let lists = [
        (TypeId::of::<IngestRequest>(), 1, "events"),
        (TypeId::of::<RecordCallsRequest>(), 1, "calls"),
        (TypeId::of::<ScoreSignalsRequest>(), 2, "facts"),
    ];
    lists.into_iter().find(|(id, ..)| *id == TypeId::of::<U>()).map(|(_, tag, name)| (tag, name))
}

/// What is wrong with a message of too many fields. Steps from tag to tag as prost does, and stops where prost will: what is wrong there,
/// prost tells.
fn crowd(mut bytes: &[u8], list: Option<(u32, &str)>) -> Option<Rejection> {
    let (mut fields, mut items) = (0, 0);
    while !bytes.is_empty() {
        let (tag, kind) = decode_key(&mut bytes).ok()?;
        let length = match kind {
            WireType::Varint => decode_varint(&mut bytes).map(|_| 0).ok()?,
            WireType::SixtyFourBit => 8,
            WireType::ThirtyTwoBit => 4,
            // What is in a group counts like what is around it: no message of the contract has one.
            WireType::StartGroup | WireType::EndGroup => 0,
            WireType::LengthDelimited => {
                fields += 1;
                items += usize::from(list.is_some_and(|(list, _)| list == tag));
                if fields > MAX_FIELDS {
                    return Some(too_many(list.filter(|_| items > MAX_ITEMS)));
                }
                usize::try_from(decode_varint(&mut bytes).ok()?).ok()?
            }
        };
        bytes = bytes.get(length..)?;
    }
    None
}

fn too_many(list: Option<(u32, &str)>) -> Rejection {
    match list {
        Some((_, name)) => {
            Rejection::of(RejectionReason::OutOfRange, name, format!("`{name}` has more than {MAX_ITEMS} items"))
        }
        None => {
            Rejection::of(RejectionReason::OutOfRange, "", format!("the message has more than {MAX_FIELDS} fields"))
        }
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

    fn refused(bytes: &[u8], list: Option<(u32, &str)>) -> Option<String> {
        crowd(bytes, list).map(|violation| violation.field)
    }

    #[test]
    fn a_crowd_of_fields_is_told_from_a_full_message() {
        let events = list_of::<IngestRequest>();
        assert_eq!(events, Some((1, "events")));
        assert_eq!((list_of::<RecordCallsRequest>(), list_of::<Event>()), (Some((1, "calls")), None));
        assert_eq!(refused(&b"\x0a\x00".repeat(MAX_FIELDS), events), None, "the handler refuses it");
        assert_eq!(refused(&b"\x0a\x00".repeat(MAX_FIELDS + 1), events).as_deref(), Some("events"));
        assert_eq!(refused(&b"\x12\x01x".repeat(MAX_FIELDS + 1), events).as_deref(), Some(""), "another field");
        assert_eq!(refused(&b"\x0a\x00".repeat(MAX_FIELDS + 1), None).as_deref(), Some(""));
        // Numbers are no crowd: they are small in memory, too.
        for number in [&b"\x08\x80\x01"[..], b"\x09\0\0\0\0\0\0\0\0", b"\x0d\0\0\0\0"] {
            assert_eq!(refused(&number.repeat(MAX_FIELDS + 1), events), None);
        }
    }

    #[test]
    fn a_crowd_hides_neither_in_a_group_nor_before_damage_nor_behind_other_fields() {
        let crowd = b"\x0a\x00".repeat(MAX_FIELDS + 1);
        for (before, after) in [
            (&b"\x1b"[..], &b"\x1c"[..]),
            (b"\x1b\x1c\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b""),
            (b"\x19\0\0\0\0\0\0\0\0\x1d\0\0\0\0\x1a\x02\x0a\x00", b"\x07"),
        ] {
            let bytes = [before, &crowd, after].concat();
            assert_eq!(refused(&bytes, list_of::<IngestRequest>()).as_deref(), Some("events"), "{before:?}");
        }
        // Where prost would stop, the search stops as well.
        for damage in [&b"\x00"[..], b"\x0f", b"\x0a\xff\xff\xff\x7f", b"\x09\x00"] {
            assert_eq!(refused(damage, list_of::<IngestRequest>()), None);
            assert!(IngestRequest::decode(damage).is_err());
        }
    }
}
