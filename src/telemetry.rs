//! Logs and metrics: the names of all metrics are here, and nowhere a payload, an address or a secret.

use std::io::IsTerminal;
use std::sync::OnceLock;
use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::domain::outcome::Outcome;

/// Events by outcome: `stored`, `duplicate`, `dead`, `unavailable`; the last two with a reason.
pub const EVENTS_TOTAL: &str = "opsmantik_events_total";
/// Seconds of one SQL statement.
pub const STATEMENT_SECONDS: &str = "opsmantik_statement_seconds";
/// Failed SQL statements.
pub const STATEMENT_ERRORS_TOTAL: &str = "opsmantik_statement_errors_total";
/// Seconds from a batch's first statement to its commit, retries included.
pub const BATCH_SECONDS: &str = "opsmantik_batch_seconds";
/// Events in a batch.
pub const BATCH_EVENTS: &str = "opsmantik_batch_events";
/// Batches that were tried again, by fault.
pub const BATCH_RETRIES_TOTAL: &str = "opsmantik_batch_retries_total";
/// Fingerprints of which more sessions follow a paid visit than its batch corrects, and that wait to be corrected behind it.
pub const LATE_FOLLOWERS: &str = "opsmantik_late_followers";
/// Sessions that were looked at again behind the batch of a paid visit.
pub const LATE_FOLLOWERS_LOOKED_AT_TOTAL: &str = "opsmantik_late_followers_looked_at_total";
/// Requests answered on the public listener, by route and status.
pub const HTTP_REQUESTS_TOTAL: &str = "opsmantik_http_requests_total";
/// Seconds from the head of a request to its answer, by route.
pub const HTTP_REQUEST_SECONDS: &str = "opsmantik_http_request_seconds";
/// Events that QStash took.
pub const QSTASH_PUBLISHED_TOTAL: &str = "opsmantik_qstash_published_total";
/// Events that went to the pipeline instead of QStash, by reason.
pub const QSTASH_FELL_BACK_TOTAL: &str = "opsmantik_qstash_fell_back_total";
/// Whether NATS has the stream and it takes events: 1 or 0.
pub const NATS_READY: &str = "opsmantik_nats_ready";
/// Events that NATS took.
pub const NATS_PUBLISHED_TOTAL: &str = "opsmantik_nats_published_total";
/// Events that went to the pipeline instead of NATS, by reason.
pub const NATS_FELL_BACK_TOTAL: &str = "opsmantik_nats_fell_back_total";
/// Deliveries by what became of them: `stored`, `buried`, `again`.
pub const NATS_DELIVERIES_TOTAL: &str = "opsmantik_nats_deliveries_total";
/// The lag: events in the stream that no worker has taken yet.
pub const NATS_LAG_EVENTS: &str = "opsmantik_nats_lag_events";
/// Events that workers have taken and not acknowledged yet.
pub const NATS_UNACKNOWLEDGED_EVENTS: &str = "opsmantik_nats_unacknowledged_events";
/// Bytes of the stream, which is bounded by NATS_MAX_BYTES.
pub const NATS_STREAM_BYTES: &str = "opsmantik_nats_stream_bytes";
/// Calls that ended on the gRPC listener, by rpc and status code; `cancelled` when the caller hung up.
pub const GRPC_REQUESTS_TOTAL: &str = "opsmantik_grpc_requests_total";
/// Seconds from the head of a call to the end of its answer, by rpc.
pub const GRPC_REQUEST_SECONDS: &str = "opsmantik_grpc_request_seconds";
/// Calls that run now, by rpc.
pub const GRPC_IN_FLIGHT: &str = "opsmantik_grpc_in_flight";
/// Connections that did not get through the TLS handshake, by reason: `timeout`, `failed`.
pub const GRPC_HANDSHAKE_FAILURES_TOTAL: &str = "opsmantik_grpc_handshake_failures_total";
/// When the gRPC listener's certificate ends, seconds since 1970. Only with TLS.
pub const GRPC_CERTIFICATE_NOT_AFTER: &str = "opsmantik_grpc_certificate_not_after_timestamp_seconds";
/// Times that the gRPC listener's certificate files were read again, by outcome: `loaded`, or `failed` and the old ones stay.
pub const GRPC_CERTIFICATE_RELOADS_TOTAL: &str = "opsmantik_grpc_certificate_reloads_total";
/// Leaves made by the keeper, and by writers for imported history.
pub const PARTITIONS_MADE_TOTAL: &str = "opsmantik_partitions_made_total";
/// Bearer tokens that were looked at: `token`, `user`, `invalid`, `unavailable`.
pub const ADMISSIONS_TOTAL: &str = "opsmantik_admissions_total";
/// Fetches of the sign-in service's public keys: `fetched`, `failed`.
pub const JWKS_FETCHES_TOTAL: &str = "opsmantik_jwks_fetches_total";

/// Pushes of calls, by what they did (`created`, `merged`, `unchanged`) and by how the call is matched since.
pub const CALL_PUSHES_TOTAL: &str = "opsmantik_call_pushes_total";
/// Calls that were matched again because something late came in.
pub const CALLS_REMATCHED_TOTAL: &str = "opsmantik_calls_rematched_total";

/// Rows that watchers are not shown because no message can hold them, by table.
pub const WATCH_ROWS_NOT_SHOWN_TOTAL: &str = "opsmantik_watch_rows_not_shown_total";
/// Whether the change feed reads the database's log: 1 or 0.
pub const FEED_RUNNING: &str = "opsmantik_feed_running";
/// Who listens to it.
pub const FEED_SUBSCRIBERS: &str = "opsmantik_feed_subscribers";
/// Bytes of changes that it holds.
pub const FEED_LOG_BYTES: &str = "opsmantik_feed_log_bytes";
/// How far the database has written its log beyond what the feed has read.
pub const FEED_LAG_BYTES: &str = "opsmantik_feed_lag_bytes";
/// Changes that it read, by table.
pub const FEED_CHANGES_TOTAL: &str = "opsmantik_feed_changes_total";
/// Subscribers that were cut off because they read too slowly.
pub const FEED_CUT_OFF_TOTAL: &str = "opsmantik_feed_cut_off_total";
/// Times that it began again after its connection broke.
pub const FEED_RESTARTS_TOTAL: &str = "opsmantik_feed_restarts_total";

/// All of ours, no more of the NATS client than warnings, and nothing of its tries to reach a server that is away: we say once that it is.
const QUIET_INFO: &str = "info,async_nats=warn,async_nats::connector=off";

/// Logs to standard error: `RUST_LOG` filters (default `info`), `LOG_FORMAT=json` for machines.
pub fn start_logging() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(QUIET_INFO));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    let started = if std::env::var("LOG_FORMAT").is_ok_and(|format| format == "json") {
        logs.json().try_init()
    } else {
        logs.try_init()
    };
    // Only a second call in one process fails, and the first one's logger is as good.
    drop(started);
}

/// The process's metrics, in Prometheus' text form by `render()`.
pub fn prometheus() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let seconds = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
        let builder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &seconds)
            .and_then(|builder| {
                let sizes = [1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0];
                builder.set_buckets_for_metric(Matcher::Full(BATCH_EVENTS.to_owned()), &sizes)
            })
            .expect("bucket lists are not empty");
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        // Another recorder can only have been installed by an embedder; then these metrics stay empty.
        drop(metrics::set_global_recorder(recorder));
        handle
    })
}

/// Folds recorded samples into their histograms now and then, until `stop`: else they would pile up where nobody scrapes.
pub async fn fold_samples(stop: CancellationToken) {
    let mut tick = tokio::time::interval(Duration::from_secs(5));
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => prometheus().run_upkeep(),
        }
    }
}

/// Counts the one outcome of one event.
pub fn count_outcome(outcome: &Outcome) {
    let (name, reason) = match outcome {
        Outcome::Stored(_) => ("stored", ""),
        Outcome::Duplicate(_) => ("duplicate", ""),
        Outcome::Dead(reason) => ("dead", reason.code()),
        Outcome::Unavailable(why) => ("unavailable", why.code()),
    };
    metrics::counter!(EVENTS_TOTAL, "outcome" => name, "reason" => reason).increment(1);
}

/// Records how long a statement took and whether it failed.
pub fn time_statement(name: &'static str, took: Duration, ok: bool) {
    metrics::histogram!(STATEMENT_SECONDS, "statement" => name).record(took);
    if !ok {
        metrics::counter!(STATEMENT_ERRORS_TOTAL, "statement" => name).increment(1);
    }
}

/// Notes that a call began.
pub fn grpc_began(rpc: &'static str) {
    metrics::gauge!(GRPC_IN_FLIGHT, "rpc" => rpc).increment(1.0);
}

/// Notes how a call ended.
pub fn grpc_ended(rpc: &'static str, code: &'static str, took: Duration) {
    metrics::counter!(GRPC_REQUESTS_TOTAL, "rpc" => rpc, "code" => code).increment(1);
    metrics::histogram!(GRPC_REQUEST_SECONDS, "rpc" => rpc).record(took);
    metrics::gauge!(GRPC_IN_FLIGHT, "rpc" => rpc).decrement(1.0);
}
