"""A telephone call finds the visit that it came from.

    python calls.py SITE

SITE is the public id of your site. The site's tracker usually reports the click on the number; here we do it.
"""

import sys
import uuid

from google.protobuf.timestamp_pb2 import Timestamp

import connect
from opsmantik.v1 import call_pb2, calls_pb2, calls_pb2_grpc, event_pb2, ingest_pb2, ingest_pb2_grpc
from opsmantik.v1 import scoring_pb2, scoring_pb2_grpc

site = sys.argv[1]
channel = connect.channel()
ingest = ingest_pb2_grpc.IngestServiceStub(channel)
calls = calls_pb2_grpc.CallsServiceStub(channel)
scoring = scoring_pb2_grpc.ScoringServiceStub(channel)

# A visitor who came by an ad clicks on the telephone number.
click = event_pb2.Event(
    id=str(uuid.uuid4()),  # made once; sent again with every retry
    site=site,
    url="https://shop.example/?gclid=Cj0KCQ-example",
    session_id="a-visit",
    category="conversion",
    action="phone_call",
    label="tel:+12025550123",
)
print(ingest.Ingest(ingest_pb2.IngestRequest(events=[click]), timeout=10).results[0])

# The telephone rings. Push what is known ...
call = call_pb2.PushedCall(
    site=site,
    key=call_pb2.ProviderCallKey(provider="example", provider_call_id=str(uuid.uuid4())),
    direction=call_pb2.CALL_DIRECTION_INBOUND,
    dialled_number="+12025550123",
    caller_number="+12025550187",  # hashed before it is stored
    status=call_pb2.CALL_STATUS_RINGING,
    started_at=Timestamp(),
)
call.started_at.GetCurrentTime()
calls.RecordCall(calls_pb2.RecordCallRequest(call=call), timeout=10)

# ... and again whenever there is news: it stays one call.
call.status = call_pb2.CALL_STATUS_COMPLETED
call.duration_text = "3:12"
stored = calls.RecordCall(calls_pb2.RecordCallRequest(call=call), timeout=10).recorded.call
print(call_pb2.MatchMethod.Name(stored.match.method), "session", stored.match.session.session_id)

# Why the visit is a good lead: an event or a call behind each signal.
if stored.match.HasField("session"):
    answer = scoring.GetSessionScore(scoring_pb2.GetSessionScoreRequest(session=stored.match.session), timeout=10)
    print("score", answer.score.value)
    for line in answer.evidence:
        print(line)

# It was a sale.
confirm = calls_pb2.ConfirmCall(sale_amount=call_pb2.Money(currency_code="USD", units=120, nanos=500_000_000))
request = calls_pb2.ReviewCallRequest(site=site, call_id=stored.id, confirm=confirm)
print(calls.ReviewCall(request, timeout=10).call.review)
