//! Makes messages: each is tame or wild, and every choice in it goes odd as often as it is wild.

use std::collections::HashMap;
use std::sync::Arc;

use prost::Message;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, Value};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use uuid::Uuid;

/// What strings are taken from: what fits a field by its name, and what fits nowhere.
#[derive(Default)]
pub struct Words {
    pub apt: HashMap<&'static str, Vec<String>>,
}

pub struct Maker {
    pub rng: StdRng,
    pub words: Arc<Words>,
}

/// Deepest nesting but for the few that are deep on purpose.
const DEPTH: usize = 7;

impl Maker {
    /// A message, or something like one.
    pub fn bytes(&mut self, of: &MessageDescriptor) -> Vec<u8> {
        // Half of them come far; whoever comes far costs the most.
        let wild = *[0.01, 0.05, 0.2, 0.4].choose(&mut self.rng).unwrap_or(&0.1);
        let mut bytes = self.message(of, wild, 0).encode_to_vec();
        if self.rng.random_bool(0.2) {
            self.mangle(&mut bytes);
        }
        bytes
    }

    fn mangle(&mut self, bytes: &mut Vec<u8>) {
        match self.rng.random_range(0..4) {
            0 => bytes.truncate(self.rng.random_range(0..=bytes.len())),
            1 => {
                for _ in 0..self.rng.random_range(1..4) {
                    if !bytes.is_empty() {
                        let at = self.rng.random_range(0..bytes.len());
                        bytes[at] = self.rng.random();
                    }
                }
            }
            2 => {
                let at = self.rng.random_range(0..=bytes.len());
                let more: Vec<u8> = (0..self.rng.random_range(1..20)).map(|_| self.rng.random()).collect();
                bytes.splice(at..at, more);
            }
            _ => *bytes = (0..self.rng.random_range(0..200)).map(|_| self.rng.random()).collect(),
        }
    }

    fn odd(&mut self, wild: f64) -> bool {
        self.rng.random_bool(wild)
    }

    fn message(&mut self, of: &MessageDescriptor, wild: f64, depth: usize) -> DynamicMessage {
        if of.full_name() == "google.protobuf.Timestamp" {
            return self.timestamp(of, wild);
        }
        let mut message = DynamicMessage::new(of.clone());
        // What is absent is absent by chance, and what is deep ends somewhere.
        let mut fields: Vec<FieldDescriptor> =
            of.fields().filter(|field| field.containing_oneof().is_none() && !self.odd(wild)).collect();
        for choice in of.oneofs() {
            let likely = if choice.is_synthetic() { 0.4 } else { 0.97 };
            let options: Vec<FieldDescriptor> = choice.fields().collect();
            if self.rng.random_bool(likely) {
                fields.extend(options.choose(&mut self.rng).cloned());
            }
        }
        for field in fields {
            let nested = matches!(field.kind(), Kind::Message(_));
            if nested && (depth >= DEPTH || (field.is_list() && depth > 2 && self.rng.random_bool(0.7))) {
                continue;
            }
            let value = if field.is_map() {
                self.map(&field, wild, depth)
            } else if field.is_list() {
                let length = self.length(&field, wild);
                Value::List((0..length).map(|_| self.value(&field, wild, depth)).collect())
            } else {
                self.value(&field, wild, depth)
            };
            message.set_field(&field, value);
        }
        message
    }

    fn length(&mut self, field: &FieldDescriptor, wild: f64) -> usize {
        if self.odd(wild / 30.0) {
            // More than any list may have; of messages only a few, so that a run ends.
            return if matches!(field.kind(), Kind::Enum(_)) { 1500 } else { self.rng.random_range(10..40) };
        }
        // A filter that names everything finds nothing.
        let usual: &[usize] =
            if matches!(field.kind(), Kind::Enum(_)) { &[0, 0, 0, 1, 2, 4] } else { &[1, 1, 1, 2, 3, 0] };
        usual.choose(&mut self.rng).copied().unwrap_or(1)
    }

    fn map(&mut self, field: &FieldDescriptor, wild: f64, depth: usize) -> Value {
        let Kind::Message(entry) = field.kind() else { return Value::Map(HashMap::new()) };
        let value = entry.map_entry_value_field();
        let count = self.rng.random_range(0..3);
        let entries = (0..count).map(|_| {
            let key = self.text("key", wild);
            (MapKey::String(key), self.value(&value, wild, depth))
        });
        Value::Map(entries.collect())
    }

    fn value(&mut self, field: &FieldDescriptor, wild: f64, depth: usize) -> Value {
        match field.kind() {
            Kind::Double => Value::F64(self.real(wild)),
            #[allow(clippy::cast_possible_truncation)] // any number will do
            Kind::Float => Value::F32(self.real(wild) as f32),
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(self.nanos(wild)),
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(self.whole(wild)),
            Kind::Uint32 | Kind::Fixed32 => {
                let edges = [0, 1, 99, 100, 101, 500, 501, 86_400, 86_401, u32::MAX];
                // Long pages tell no more than short ones, and take their time.
                let usual = if field.name() == "page_size" { 1..6 } else { 0..100 };
                Value::U32(if self.odd(wild) { self.one_of(&edges) } else { self.rng.random_range(usual) })
            }
            Kind::Uint64 | Kind::Fixed64 => {
                Value::U64(if self.odd(wild) { u64::MAX } else { self.rng.random_range(0..100) })
            }
            Kind::Bool => Value::Bool(self.rng.random()),
            Kind::String => Value::String(self.text(field.name(), wild)),
            Kind::Bytes => Value::Bytes(vec![0; self.rng.random_range(0..50)].into()),
            Kind::Message(of) => Value::Message(self.message(&of, wild, depth + 1)),
            Kind::Enum(of) => {
                let known: Vec<i32> = of.values().map(|value| value.number()).collect();
                let edges = [0, -1, 99, i32::MIN, i32::MAX];
                // The first of each is the unspecified one.
                let usual = if known.len() > 1 { &known[1..] } else { &known[..] };
                Value::EnumNumber(if self.odd(wild) { self.one_of(&edges) } else { self.one_of(usual) })
            }
        }
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        *of.choose(&mut self.rng).expect("there is something to choose")
    }

    fn whole(&mut self, wild: f64) -> i64 {
        let edges = [-1, 999_999_999_999, 1_000_000_000_000, i64::MIN, i64::MAX];
        if self.odd(wild) { self.one_of(&edges) } else { self.rng.random_range(0..100_000) }
    }

    fn nanos(&mut self, wild: f64) -> i32 {
        let edges = [-1, 1, 10_000_000, 999_999_999, 1_000_000_000, i32::MIN, i32::MAX];
        if self.odd(wild) { self.one_of(&edges) } else { 0 }
    }

    fn real(&mut self, wild: f64) -> f64 {
        let edges = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN_POSITIVE, -0.0, 1e16, -1.5];
        if self.odd(wild) { self.one_of(&edges) } else { self.rng.random_range(0.0..100.0) }
    }

    fn timestamp(&mut self, of: &MessageDescriptor, wild: f64) -> DynamicMessage {
        let (seconds, nanos) = if self.odd(wild) {
            // The type's own edges, the epoch's, PostgreSQL's, and those of what may have been long ago.
            let edges = [
                i64::MIN,
                i64::MAX,
                -62_135_596_800,
                -62_135_596_801,
                253_402_300_799,
                253_402_300_800,
                0,
                -1,
                8_210_266_876_799,
                chrono::Utc::now().timestamp() + 119,
                chrono::Utc::now().timestamp() - 731 * 86_400,
            ];
            (self.one_of(&edges), self.nanos(0.5))
        } else {
            // Some are near enough to each other that calls find visits; were all, each would touch hundreds.
            let back = if self.odd(0.1) { 20_000 } else { 20 * 86_400 };
            (chrono::Utc::now().timestamp() - self.rng.random_range(0..back), self.rng.random_range(0..1_000_000_000))
        };
        let mut message = DynamicMessage::new(of.clone());
        message.set_field_by_name("seconds", Value::I64(seconds));
        message.set_field_by_name("nanos", Value::I32(nanos));
        message
    }

    fn text(&mut self, field: &str, wild: f64) -> String {
        if !self.odd(wild) {
            if ["id", "message_id"].contains(&field) {
                return Uuid::from_u128(self.rng.random()).to_string();
            }
            // Few names of calls, so that pushes meet.
            if field == "provider_call_id" {
                return format!("CA{}", self.rng.random_range(0..400));
            }
            let words = self.words.clone();
            if let Some(word) = words.apt.get(field).and_then(|apt| apt.choose(&mut self.rng)) {
                return word.clone();
            }
            return format!("{field}-{}", self.rng.random_range(0..1000));
        }
        match self.rng.random_range(0..14) {
            0 => String::new(),
            1 => " \t\n".to_owned(),
            2 => "\0".to_owned(),
            3 => "a\0b".to_owned(),
            4 => "x".repeat(5000),
            5 => "ü".repeat(300),
            6 => "👩‍👩‍👧‍👦📞".repeat(self.rng.random_range(1..60)),
            7 => "'; DROP TABLE calls; --".to_owned(),
            8 => "\u{202E}%00\u{FEFF}\\u0000{}\"".to_owned(),
            9 => Uuid::nil().to_string(),
            10 => "9".repeat(self.rng.random_range(1..40)),
            11 => format!("+{}", self.rng.random::<u64>()),
            12 => (0..self.rng.random_range(1..40)).map(|_| self.rng.random::<char>()).collect(),
            // What fits some other field.
            _ => {
                let words = self.words.clone();
                let mut all: Vec<&String> = words.apt.values().flatten().collect();
                all.sort();
                all.choose(&mut self.rng).map(|word| (*word).clone()).unwrap_or_default()
            }
        }
    }
}
