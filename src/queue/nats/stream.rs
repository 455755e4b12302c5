//! The stream and its consumer: how they are made, and which ones that others made would lose events.
//!
//! Made is a *work queue* in files: an event stays until a worker has acknowledged it, whether one has run yet or not, and goes then, so the
//! stream holds what still has to be stored and nothing else. It is bounded in bytes and refuses what is beyond (`discard: new`): the edge keeps
//! that event. It has no age: an age deletes events that nobody has stored yet.

use std::time::Duration;

use async_nats::jetstream::Context;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::consumer::{self, AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::context::{
    ConsumerInfoError, ConsumerInfoErrorKind, CreateStreamError, CreateStreamErrorKind, GetStreamErrorKind,
};
use async_nats::jetstream::stream::{
    Config, ConsumerError, ConsumerErrorKind, DiscardPolicy, Info, RetentionPolicy, StorageType, Stream,
};

use super::sight::Sight;
use super::{NatsConfig, Status};

/// The consumer that all workers share.
pub(super) const CONSUMER: &str = "workers";
/// An event that its worker has not acknowledged within this time goes to another: so long do the events of a worker wait that was killed. A
/// worker that lives and needs longer says so several times in between; if that came too late, another worker would store the event again, which
/// changes nothing.
pub(super) const ACK_WAIT: Duration = Duration::from_secs(5);
/// Events under way at all workers together: what each takes at once, times sixteen. No more are handed out until some are stored.
const MAX_ACK_PENDING: i64 = 16 * super::worker::AT_ONCE as i64;
/// A browser that repeats itself does so within seconds. What comes later is told apart by the tables.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);
/// Of the bound on bytes: from here on edges add nothing ...
const FULL: f64 = 0.9;
/// ... until so little is left.
const ROOM_AGAIN: f64 = 0.8;

/// What the subjects of a stream's events begin with.
pub(super) fn prefix(stream: &str) -> String {
    format!("{stream}.events")
}

fn subjects(stream: &str) -> String {
    format!("{}.*", prefix(stream))
}

/// What is in the stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub bytes: u64,
    /// Copies of it, on as many servers.
    pub copies: usize,
    /// Of the bounds, how much is used.
    used: f64,
    pub sight: Sight,
}

impl Load {
    /// Whether edges are to add nothing.
    pub fn is_full(&self, was_full: bool) -> bool {
        self.used >= if was_full { ROOM_AGAIN } else { FULL }
    }
}

/// Why the stream cannot be used.
#[derive(Debug)]
pub(super) enum Obstacle {
    Away(String),
    Unfit(String),
}

impl From<Obstacle> for Status {
    fn from(obstacle: Obstacle) -> Self {
        match obstacle {
            Obstacle::Away(why) => Self::Away(why),
            Obstacle::Unfit(why) => Self::Unfit(why),
        }
    }
}

/// Looks at the stream and its consumer, and makes what is missing.
pub(super) async fn look(jetstream: &Context, config: &NatsConfig) -> Result<Load, Obstacle> {
    let stream = match jetstream.get_stream(&config.stream).await {
        Ok(stream) => stream,
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                jetstream.create_stream(wanted(config)).await.map_err(|error| not_made(&error, config))?
            }
            GetStreamErrorKind::JetStream(error) => return Err(Obstacle::Away(error.to_string())),
            _ => return Err(Obstacle::Away(format!("JetStream does not answer; is it enabled? ({error})"))),
        },
    };
    let info = stream.cached_info();
    if let Some(fault) = fault(&info.config, config) {
        return Err(Obstacle::Unfit(format!("the stream `{}` {fault}", config.stream)));
    }
    let workers = consumer(&stream, config).await?;
    if let Some(fault) = consumer_fault(&workers.config, &config.stream) {
        let name = &config.stream;
        return Err(Obstacle::Unfit(format!("the consumer `{CONSUMER}` of the stream `{name}` {fault}")));
    }
    let sight = Sight {
        events: info.state.messages,
        oldest: info.state.first_sequence,
        newest: info.state.last_sequence,
        waiting: workers.num_pending,
        under_way: workers.num_ack_pending as u64,
        acknowledged: workers.ack_floor.stream_sequence,
        deliveries: workers.delivered.consumer_sequence,
        made: workers.created.unix_timestamp_nanos(),
    };
    Ok(Load { bytes: info.state.bytes, copies: info.config.num_replicas, used: used(info), sight })
}

/// Has everything in the stream handed out again, by a consumer that begins anew, unless somebody else has just made one.
///
/// Nothing depends on the consumer's memory: a work queue keeps events without one, and a second copy changes nothing.
pub(super) async fn hand_out_again(jetstream: &Context, config: &NatsConfig, seen: &Sight) -> Result<(), Obstacle> {
    let away = |error: &dyn std::fmt::Display| Obstacle::Away(error.to_string());
    let stream = jetstream.get_stream(&config.stream).await.map_err(|error| away(&error))?;
    if consumer(&stream, config).await?.created.unix_timestamp_nanos() != seen.made {
        return Ok(());
    }
    stream.delete_consumer(CONSUMER).await.map_err(|error| away(&error))?;
    consumer(&stream, config).await.map(drop)
}

fn used(info: &Info) -> f64 {
    let share = |used: u64, bound: i64| if bound > 0 { used as f64 / bound as f64 } else { 0.0 };
    share(info.state.bytes, info.config.max_bytes).max(share(info.state.messages, info.config.max_messages))
}

async fn consumer(stream: &Stream, config: &NatsConfig) -> Result<consumer::Info, Obstacle> {
    let found = |error: ConsumerInfoError| Obstacle::Away(error.to_string());
    match stream.consumer_info(CONSUMER).await {
        Ok(info) => Ok(info),
        Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => {
            stream.create_consumer(wanted_consumer()).await.map_err(|error| consumer_not_made(&error, config))?;
            stream.consumer_info(CONSUMER).await.map_err(found)
        }
        Err(error) => Err(found(error)),
    }
}

fn wanted(config: &NatsConfig) -> Config {
    Config {
        name: config.stream.clone(),
        description: Some("Events of OpsMantik that are not stored yet".to_owned()),
        subjects: vec![subjects(&config.stream)],
        retention: RetentionPolicy::WorkQueue,
        storage: StorageType::File,
        discard: DiscardPolicy::New,
        max_bytes: config.max_bytes,
        max_messages: -1,
        max_messages_per_subject: -1,
        max_age: Duration::ZERO,
        max_message_size: -1,
        max_consumers: -1,
        num_replicas: config.replicas,
        duplicate_window: DUPLICATE_WINDOW,
        ..Config::default()
    }
}

fn wanted_consumer() -> pull::Config {
    pull::Config {
        durable_name: Some(CONSUMER.to_owned()),
        description: Some("All workers of OpsMantik".to_owned()),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        max_deliver: -1,
        max_ack_pending: MAX_ACK_PENDING,
        ..pull::Config::default()
    }
}

fn not_made(error: &CreateStreamError, config: &NatsConfig) -> Obstacle {
    let name = &config.stream;
    match error.kind() {
        // Somebody else makes it right now; or the cluster elects its leader.
        CreateStreamErrorKind::JetStream(error)
            if [ErrorCode::STREAM_NAME_EXIST, ErrorCode::CLUSTER_NOT_AVAILABLE].contains(&error.error_code()) =>
        {
            Obstacle::Away(error.to_string())
        }
        CreateStreamErrorKind::JetStream(error) => Obstacle::Unfit(format!(
            "the stream `{name}` cannot be made with {} bytes (NATS_MAX_BYTES) and {} replicas (NATS_REPLICAS): {error}",
            config.max_bytes, config.replicas
        )),
        _ => Obstacle::Away(format!("the stream `{name}` cannot be made: {error}")),
    }
}

fn consumer_not_made(error: &ConsumerError, config: &NatsConfig) -> Obstacle {
    let why = format!("the consumer `{CONSUMER}` of the stream `{}` cannot be made: {error}", config.stream);
    match error.kind() {
        ConsumerErrorKind::JetStream(error) if error.error_code() != ErrorCode::CLUSTER_NOT_AVAILABLE => {
            Obstacle::Unfit(why)
        }
        _ => Obstacle::Away(why),
    }
}

/// What of a stream would lose events, or never take one; with the setting to change.
fn fault(found: &Config, config: &NatsConfig) -> Option<String> {
    let said = |text: &str| Some(text.to_owned());
    if found.storage != StorageType::File {
        return said("has `storage` memory, which a restart of NATS empties; it has to be file");
    }
    match found.retention {
        RetentionPolicy::WorkQueue => {}
        RetentionPolicy::Interest => {
            return said(
                "has `retention` interest, which drops events that come before a worker; it has to be workqueue",
            );
        }
        RetentionPolicy::Limits => {
            return said("has `retention` limits, which keeps what is stored until it is full; it has to be workqueue");
        }
    }
    if found.discard != DiscardPolicy::New {
        return said("has `discard` old, which deletes the oldest events when it is full; it has to be new");
    }
    if !found.max_age.is_zero() {
        let age = found.max_age.as_secs_f64();
        return Some(format!("has `max_age` {age} s, after which events are deleted, stored or not; it has to be 0"));
    }
    if found.max_messages_per_subject > 0 && !found.discard_new_per_subject {
        return said("has `max_msgs_per_subject`, which deletes a site's oldest events; it has to be -1");
    }
    if found.no_ack {
        return said("has `no_ack`, so nobody knows what it took; it has to be off");
    }
    if found.sealed {
        return said("is sealed and takes nothing; another one can be named by NATS_STREAM");
    }
    let needed = subjects(&config.stream);
    if !found.subjects.iter().any(|subject| covers(subject, &needed)) {
        return Some(format!("does not take `{needed}`; add that to its `subjects`"));
    }
    if found.num_replicas < config.replicas {
        let (has, asked) = (found.num_replicas, config.replicas);
        return Some(format!("has `num_replicas` {has}, and NATS_REPLICAS asks for {asked}"));
    }
    None
}

/// What of the workers' consumer would lose events.
fn consumer_fault(found: &consumer::Config, stream: &str) -> Option<String> {
    let said = |text: &str| Some(text.to_owned());
    if found.deliver_subject.is_some() {
        return said("is a push consumer; workers pull, so delete it");
    }
    if found.ack_policy != AckPolicy::Explicit {
        return said("has another `ack_policy` than explicit: what was handed out would count as stored");
    }
    if found.max_deliver > 0 {
        return said("has `max_deliver`: an event that cannot be stored so often would never be; it has to be -1");
    }
    if found.headers_only {
        return said("has `headers_only`: workers would see no event; it has to be off");
    }
    if found.deliver_policy != DeliverPolicy::All {
        return said("has another `deliver_policy` than all: older events would stay behind");
    }
    if !found.filter_subject.is_empty() && !covers(&found.filter_subject, &subjects(stream)) {
        return said("has a `filter_subject`: other sites' events would stay behind; it has to be empty");
    }
    None
}

/// Whether a subject of NATS takes all that another one takes.
fn covers(wide: &str, narrow: &str) -> bool {
    let mut narrow = narrow.split('.');
    for token in wide.split('.') {
        match (token, narrow.next()) {
            (">", Some(_)) => return true,
            ("*", Some(other)) if other != ">" => {}
            (token, Some(other)) if token == other => {}
            _ => return false,
        }
    }
    narrow.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::nats::Servers;

    fn config() -> NatsConfig {
        let servers = Servers::parse("nats://127.0.0.1").expect("a server");
        NatsConfig { servers, credentials: None, stream: "om".to_owned(), replicas: 1, max_bytes: 1 << 20 }
    }

    #[test]
    fn what_is_made_is_fit_and_whatever_loses_events_is_named() {
        let config = config();
        assert_eq!(fault(&wanted(&config), &config), None);
        type Spoil = fn(&mut Config);
        let spoilt: [(Spoil, &str); 10] = [
            (|c| c.storage = StorageType::Memory, "`storage`"),
            (|c| c.retention = RetentionPolicy::Interest, "`retention` interest"),
            (|c| c.retention = RetentionPolicy::Limits, "`retention` limits"),
            (|c| c.discard = DiscardPolicy::Old, "`discard`"),
            (|c| c.max_age = Duration::from_secs(60), "`max_age` 60 s"),
            (|c| c.max_messages_per_subject = 5, "`max_msgs_per_subject`"),
            (|c| c.no_ack = true, "`no_ack`"),
            (|c| c.sealed = true, "sealed"),
            (|c| c.subjects = vec!["om.events.*.x".to_owned()], "`om.events.*`"),
            (|c| c.num_replicas = 0, "NATS_REPLICAS"),
        ];
        for (spoil, named) in spoilt {
            let mut found = wanted(&config);
            spoil(&mut found);
            let said = fault(&found, &config).unwrap_or_default();
            assert!(said.contains(named), "{named}: {said}");
        }
    }

    #[test]
    fn a_consumer_that_leaves_events_behind_is_named() {
        use async_nats::jetstream::consumer::IntoConsumerConfig;
        let wanted = || wanted_consumer().into_consumer_config();
        assert_eq!(consumer_fault(&wanted(), "om"), None);
        type Spoil = fn(&mut consumer::Config);
        let spoilt: [(Spoil, &str); 6] = [
            (|c| c.deliver_subject = Some("x".to_owned()), "push"),
            (|c| c.ack_policy = AckPolicy::None, "`ack_policy`"),
            (|c| c.max_deliver = 3, "`max_deliver`"),
            (|c| c.headers_only = true, "`headers_only`"),
            (|c| c.deliver_policy = DeliverPolicy::New, "`deliver_policy`"),
            (|c| c.filter_subject = "om.events.one-site".to_owned(), "`filter_subject`"),
        ];
        for (spoil, named) in spoilt {
            let mut found = wanted();
            spoil(&mut found);
            let said = consumer_fault(&found, "om").unwrap_or_default();
            assert!(said.contains(named), "{named}: {said}");
        }
    }

    #[test]
    fn a_full_stream_has_room_again_only_when_some_is_gone() {
        let load = |used| Load { bytes: 0, copies: 1, used, sight: Sight::default() };
        let told = |used, was_full| load(used).is_full(was_full);
        assert_eq!(
            [told(0.89, false), told(0.9, false), told(0.85, true), told(0.79, true)],
            [false, true, true, false]
        );
    }

    #[test]
    fn subjects_cover_one_another_as_in_nats() {
        for (wide, narrow, covered) in [
            ("om.events.*", "om.events.*", true),
            ("om.>", "om.events.*", true),
            (">", "om.events.*", true),
            ("om.*.*", "om.events.*", true),
            ("om.events", "om.events.*", false),
            ("om.events.*.>", "om.events.*", false),
            ("om.events.a", "om.events.*", false),
            ("om.*", "om.>", false),
        ] {
            assert_eq!(covers(wide, narrow), covered, "{wide} {narrow}");
        }
    }
}
