"""Holds a running server to its contract, as a Python client sees it. The first wrong answer ends it with an error.

    OPSMANTIK_TOKEN=om_… python conformance.py SITE [PART …]

The token needs all scopes and exactly this site, whose region is US and on whose number nobody else has clicked.
Without a PART all of them are run.
"""

import itertools
import sys
import uuid

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

import connect
from opsmantik.v1 import call_pb2, calls_pb2, calls_pb2_grpc, event_pb2, ingest_pb2, ingest_pb2_grpc
from opsmantik.v1 import rejection_pb2, scoring_pb2, scoring_pb2_grpc, session_pb2, signal_pb2, watch_pb2

SITE = sys.argv[1]
NUMBER, CALLER = "+12025550123", "+12025550187"
SERVICES = [f"opsmantik.v1.{name}" for name in ("IngestService", "ScoringService", "CallsService")]

bare = connect.bare_channel()
channel = connect.channel()
ingest = ingest_pb2_grpc.IngestServiceStub(channel)
scoring = scoring_pb2_grpc.ScoringServiceStub(channel)
calls = calls_pb2_grpc.CallsServiceStub(channel)
health = health_pb2_grpc.HealthStub(bare)


def equal(found, expected):
    if found != expected:
        raise AssertionError(f"expected {expected!r}, found {found!r}")


def refused(code, call, *arguments, **options):
    """The error of a call that must fail with this code."""
    try:
        call(*arguments, timeout=10, **options)
    except grpc.RpcError as error:
        equal(error.code(), code)
        return error
    raise AssertionError(f"expected {code}, found an answer")


def ended(code, call, request):
    """The error of a stream that must end with this code before it tells anything."""
    return refused(code, lambda request, **options: next(call(request, **options)), request)


def violations(error):
    """What a `google.rpc.BadRequest` in the details of an INVALID_ARGUMENT complains of."""
    for detail in rpc_status.from_call(error).details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            return [(violation.field, violation.reason) for violation in bad_request.field_violations]
    raise AssertionError(f"no google.rpc.BadRequest in {error}")


def event(session, **more):
    fields = dict(id=str(uuid.uuid4()), site=SITE, url="https://shop.example/", session_id=session, category="system")
    return event_pb2.Event(**{**fields, **more})


def store(*events):
    results = ingest.Ingest(ingest_pb2.IngestRequest(events=events), timeout=10).results
    equal([result.event_id for result in results], [event.id for event in events])
    return results


def test_ingest():
    session = str(uuid.uuid4())
    first = event(session, category="interaction", action="view")
    second = event(session, category="conversion", action="form_submit", url="https://shop.example/?gclid=python")
    results = store(first, second, event(session, url=""))
    equal([result.WhichOneof("outcome") for result in results], ["stored", "stored", "rejected"])
    equal(results[2].rejected.field, "url")
    equal(results[2].rejected.reason, rejection_pb2.REJECTION_REASON_MISSING)
    placement = results[1].stored
    equal((placement.session.session_id, placement.session_score.value), (session, 60))
    equal(placement.attribution, session_pb2.ATTRIBUTION_DIRECT_TO_ADS)
    equal(store(first)[0].WhichOneof("outcome"), "duplicate")


def test_stream():
    session = str(uuid.uuid4())
    events = [event(session, action=f"step-{n}") for n in range(200)] + [event(session, url="")]
    messages = (ingest_pb2.StreamIngestRequest(message_id=f"m{n}", event=event) for n, event in enumerate(events))
    told = {answer.message_id: answer.result for answer in ingest.StreamIngest(messages, timeout=30)}
    equal(sorted(told), sorted(f"m{n}" for n in range(201)))
    equal({told[f"m{n}"].WhichOneof("outcome") for n in range(200)}, {"stored"})
    equal([told[f"m{n}"].event_id for n in range(200)], [event.id for event in events[:-1]])
    equal(told["m200"].WhichOneof("outcome"), "rejected")


def test_scoring():
    request = scoring_pb2.ScoreSignalsRequest(
        signals=[signal_pb2.SIGNAL_HOVER_INTENT], facts=[scoring_pb2.SignalFacts(scroll_pct=90)]
    )
    score = scoring.ScoreSignals(request, timeout=10).score
    equal((score.value, [line.points for line in score.breakdown]), (45, [10, 20, 15]))

    visits = [str(uuid.uuid4()) for _ in range(3)]
    clicks = [event(visit, category="interaction", url="https://shop.example/?wbraid=python") for visit in visits]
    placed = [result.stored.session for result in store(*clicks)]
    answer = scoring.GetSessionScore(scoring_pb2.GetSessionScoreRequest(session=placed[0]), timeout=10)
    equal(answer.session, placed[0])
    equal([(line.signal, line.event.event_id) for line in answer.evidence],
          [(signal_pb2.SIGNAL_INTERACTION, clicks[0].id)])
    evidence = answer.attribution_evidence
    equal((evidence.click_id.value, evidence.event_id, evidence.age.seconds), ("python", clicks[0].id, 0))
    equal(evidence.origin, session_pb2.CLICK_ID_ORIGIN_THIS_SESSION)

    request = scoring_pb2.ListTopSessionsRequest(
        site=SITE, session_month=placed[0].session_month, min_score=10, page_size=1
    )
    listed = []
    while True:
        page = scoring.ListTopSessions(request, timeout=10)
        listed += page.sessions
        request.page_token = page.next_page_token
        if not request.page_token:
            break
        equal(len(page.sessions), 1)
    order = [(-session.score.value, session.key.session_id) for session in listed]
    equal(order, sorted(set(order)))
    equal(set(visits) - {session.key.session_id for session in listed}, set())


def test_calls():
    visit, now = str(uuid.uuid4()), Timestamp()
    click = event(visit, category="conversion", action="phone_call", label=f"tel:{NUMBER}")
    session = store(click)[0].stored.session
    now.GetCurrentTime()
    pushed = call_pb2.PushedCall(
        site=SITE,
        key=call_pb2.ProviderCallKey(provider="Example", provider_call_id=str(uuid.uuid4())),
        dialled_number="(202) 555-0123",  # read in the site's region
        caller_number=CALLER,
        started_at=now,
        status=call_pb2.CALL_STATUS_RINGING,
    )

    def push():
        recorded = calls.RecordCall(calls_pb2.RecordCallRequest(call=pushed), timeout=10).recorded
        return recorded.effect, recorded.call

    effect, call = push()
    equal(effect, calls_pb2.RECORD_EFFECT_CREATED)
    equal((call.key.provider, call.dialled_number, call.status), ("example", NUMBER, call_pb2.CALL_STATUS_RINGING))
    equal((call.caller.last_digits, call.caller.anonymous, CALLER[2:] in str(call)), ("87", False, False))
    equal((call.match.method, call.match.session), (call_pb2.MATCH_METHOD_CLICK, session))
    equal((call.match.evidence.event_id, call.match.evidence.clicked_number), (click.id, NUMBER))
    equal(push()[0], calls_pb2.RECORD_EFFECT_UNCHANGED)
    pushed.status, pushed.duration_text = call_pb2.CALL_STATUS_COMPLETED, "3:12"
    effect, merged = push()
    equal((effect, merged.id, merged.duration_seconds), (calls_pb2.RECORD_EFFECT_MERGED, call.id, 192))

    other, bad = call_pb2.PushedCall(), call_pb2.PushedCall()
    other.CopyFrom(pushed)
    other.key.provider_call_id = str(uuid.uuid4())
    bad.CopyFrom(other)
    bad.dialled_number = "no number"
    batch = calls.RecordCalls(calls_pb2.RecordCallsRequest(calls=[other, bad, pushed]), timeout=10).results
    equal([result.WhichOneof("outcome") for result in batch], ["recorded", "rejected", "recorded"])
    equal((batch[1].rejected.field, batch[2].recorded.call.id), ("dialled_number", call.id))

    by_id = calls.GetCall(calls_pb2.GetCallRequest(site=SITE, call_id=call.id), timeout=10).call
    by_key = calls.GetCall(calls_pb2.GetCallRequest(site=SITE, key=pushed.key), timeout=10).call
    equal((by_id.id, by_key), (call.id, by_id))
    refused(grpc.StatusCode.NOT_FOUND, calls.GetCall, calls_pb2.GetCallRequest(site=SITE, call_id=str(uuid.uuid4())))
    request = calls_pb2.ListCallsRequest(site=SITE, match_methods=[call_pb2.MATCH_METHOD_CLICK], page_size=1)
    listed = []
    while True:
        page = calls.ListCalls(request, timeout=10)
        listed += [found.id for found in page.calls]
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    equal((call.id in listed, len(listed)), (True, len(set(listed))))

    answer = scoring.GetSessionScore(scoring_pb2.GetSessionScoreRequest(session=session), timeout=10)
    equal([line.WhichOneof("cause") for line in answer.evidence], ["event", "call"])

    def review(**decision):
        request = calls_pb2.ReviewCallRequest(site=SITE, call_id=call.id, **decision)
        return calls.ReviewCall(request, timeout=10).call.review

    sale = call_pb2.Money(currency_code="USD", units=120, nanos=500_000_000)
    confirmed = review(confirm=calls_pb2.ConfirmCall(sale_amount=sale))
    equal((confirmed.status, confirmed.sale_amount), (call_pb2.REVIEW_STATUS_CONFIRMED, sale))
    equal(confirmed.reviewed_by.startswith("token:"), True)
    junk = review(junk=calls_pb2.JunkCall())
    equal((junk.status, junk.HasField("sale_amount")), (call_pb2.REVIEW_STATUS_JUNK, False))
    equal(review(reopen=calls_pb2.ReopenCall()).status, call_pb2.REVIEW_STATUS_OPEN)
    owed = calls_pb2.ConfirmCall(sale_amount=call_pb2.Money(currency_code="USD", units=-1))
    refused(grpc.StatusCode.INVALID_ARGUMENT, calls.ReviewCall,
            calls_pb2.ReviewCallRequest(site=SITE, call_id=call.id, confirm=owed))


class Watch:
    """A watch of this site, message by message."""

    def __init__(self, call, request):
        self.stream = call(request, timeout=30)

    def until(self, wanted):
        """What is told until a message is wanted, which is the last of them; heartbeats aside."""
        told = []
        for message in self.stream:
            equal(len(message.resume_token) in range(1, 257), True)
            if message.WhichOneof("payload") != "heartbeat":
                told.append(message)
                if wanted(message):
                    return told
        raise AssertionError("a watch has no end")

    def snapshot(self):
        """The rows that are there."""
        start, *rows, end = self.until(lambda message: message.WhichOneof("payload") == "snapshot_end")
        equal(start.WhichOneof("payload"), "snapshot_start")
        equal({row.change.kind for row in rows} - {watch_pb2.CHANGE_KIND_SNAPSHOT}, set())
        equal(any(row.change.HasField("old") or row.change.HasField("committed_at") for row in rows), False)
        return [row.change.new for row in rows], end.resume_token

    def change(self, key):
        """The first change of a row that comes, with its token."""
        told = self.until(lambda message: message.HasField("change") and key in str(message.change.new))
        return told[-1].change, told[-1].resume_token


def test_watch():
    visit, now = str(uuid.uuid4()), Timestamp()
    now.GetCurrentTime()
    first, second, third = (event(visit, action=f"step-{n}") for n in range(3))
    session = store(first)[0].stored.session
    request = ingest_pb2.WatchEventsRequest(site=SITE, session_month=session.session_month)
    events = Watch(ingest.WatchEvents, request)
    sessions = Watch(scoring.WatchSessions, scoring_pb2.WatchSessionsRequest(site=SITE))
    rung = Watch(calls.WatchCalls, calls_pb2.WatchCallsRequest(site=SITE))
    equal(first.id in [row.id for row in events.snapshot()[0]], True)
    equal(session in [row.key for row in sessions.snapshot()[0]], True)
    rung.snapshot()

    store(second)
    change, token = events.change(second.id)
    equal((change.kind, change.HasField("old"), change.new.action), (watch_pb2.CHANGE_KIND_INSERT, False, "step-1"))
    equal(change.HasField("committed_at"), True)
    change, _ = sessions.change(visit)
    equal((change.kind, change.old.key, change.new.key), (watch_pb2.CHANGE_KIND_UPDATE, session, session))
    equal((change.old.event_count, change.new.event_count), (1, 2))
    pushed = call_pb2.PushedCall(
        site=SITE,
        key=call_pb2.ProviderCallKey(provider="watch", provider_call_id=str(uuid.uuid4())),
        dialled_number="+12025550199",
        started_at=now,
    )
    recorded = calls.RecordCall(calls_pb2.RecordCallRequest(call=pushed), timeout=10).recorded.call
    change, _ = rung.change(recorded.id)
    equal((change.kind, change.new), (watch_pb2.CHANGE_KIND_INSERT, recorded))

    # Whoever comes back is told what happened meanwhile, and nothing of before.
    events.stream.cancel()
    store(third)
    request.resume_token = token
    told = Watch(ingest.WatchEvents, request).until(lambda message: third.id in str(message))
    equal([row.change.new.id for row in told if row.HasField("change")], [third.id])
    other = scoring_pb2.WatchSessionsRequest(site=SITE, resume_token=token)
    ended(grpc.StatusCode.INVALID_ARGUMENT, scoring.WatchSessions, other)
    request.resume_token = token[:-4]
    ended(grpc.StatusCode.INVALID_ARGUMENT, ingest.WatchEvents, request)
    bad = ingest_pb2.WatchEventsRequest(site=SITE, session_month="2026-11-02")
    error = ended(grpc.StatusCode.INVALID_ARGUMENT, ingest.WatchEvents, bad)
    equal(violations(error), [("session_month", "REJECTION_REASON_INVALID")])
    foreign = calls_pb2.WatchCallsRequest(site=str(uuid.uuid4()))
    ended(grpc.StatusCode.PERMISSION_DENIED, calls.WatchCalls, foreign)


def test_errors():
    bad = scoring_pb2.ScoreSignalsRequest(signals=[signal_pb2.SIGNAL_UNSPECIFIED])
    error = refused(grpc.StatusCode.INVALID_ARGUMENT, scoring.ScoreSignals, bad)
    equal(violations(error), [("signals[0]", "REJECTION_REASON_INVALID")])
    month = session_pb2.SessionKey(site_id=SITE, session_month="2026-13-01", session_id="a-visit")
    error = refused(grpc.StatusCode.INVALID_ARGUMENT, scoring.GetSessionScore,
                    scoring_pb2.GetSessionScoreRequest(session=month))
    equal(violations(error), [("session.session_month", "REJECTION_REASON_INVALID")])
    error = refused(grpc.StatusCode.INVALID_ARGUMENT, ingest.Ingest, ingest_pb2.IngestRequest())
    equal(violations(error), [("events", "REJECTION_REASON_MISSING")])

    month.session_month = "2026-01-01"
    asked = scoring_pb2.GetSessionScoreRequest(session=month)
    refused(grpc.StatusCode.NOT_FOUND, scoring.GetSessionScore, asked)
    month.site_id = str(uuid.uuid4())
    asked = scoring_pb2.GetSessionScoreRequest(session=month)
    refused(grpc.StatusCode.PERMISSION_DENIED, scoring.GetSessionScore, asked)
    anonymous = scoring_pb2_grpc.ScoringServiceStub(bare)
    refused(grpc.StatusCode.UNAUTHENTICATED, anonymous.GetSessionScore, asked)
    stranger = scoring_pb2_grpc.ScoringServiceStub(connect.channel(token="om_" + "0" * 43))
    refused(grpc.StatusCode.UNAUTHENTICATED, stranger.GetSessionScore, asked)

    _, call = scoring.ScoreSignals.with_call(
        scoring_pb2.ScoreSignalsRequest(), timeout=10, metadata=[("x-request-id", "order-17")]
    )
    equal(("x-request-id", "order-17") in call.initial_metadata(), True)


def test_deadline():
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=0.5)
    try:
        for _ in watch:
            pass
    except grpc.RpcError as error:
        equal(error.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
    else:
        raise AssertionError("a watch has no end")


def test_cancellation():
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=10)
    next(watch)
    watch.cancel()
    try:
        for _ in itertools.islice(watch, 100):
            pass
    except grpc.RpcError as error:
        equal(error.code(), grpc.StatusCode.CANCELLED)
    else:
        raise AssertionError("a cancelled call ends")
    health.Check(health_pb2.HealthCheckRequest(), timeout=10)


def test_health():
    serving = health_pb2.HealthCheckResponse.SERVING
    for service in ["", *SERVICES]:
        request = health_pb2.HealthCheckRequest(service=service)
        equal(health.Check(request, timeout=10).status, serving)
        watch = health.Watch(request, timeout=10)
        equal(next(watch).status, serving)
        watch.cancel()
    refused(grpc.StatusCode.NOT_FOUND, health.Check, health_pb2.HealthCheckRequest(service="nobody"))


def test_reflection():
    services = ProtoReflectionDescriptorDatabase(channel).get_services()
    equal({*SERVICES, "grpc.health.v1.Health"} - set(services), set())


parts = {name.removeprefix("test_"): part for name, part in list(globals().items()) if name.startswith("test_")}
for name in sys.argv[2:] or parts:
    parts[name]()
    print(f"ok {name}", flush=True)
