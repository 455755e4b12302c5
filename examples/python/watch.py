"""Watches the events, sessions or calls of a site, and goes on where it was, whatever happens in between.

    python watch.py SITE [events|sessions|calls] [TOKEN_FILE]

Prints each change as a line of JSON. The resume token is kept in TOKEN_FILE, so that this program, started again, is
told what it missed. After a crash the last change may be told once more: apply changes by the row's key. If you keep a
copy of the rows, store the token in the same transaction as the row.
"""

import os
import pathlib
import random
import sys
import time

import grpc
from google.protobuf import json_format

import connect
from opsmantik.v1 import calls_pb2, calls_pb2_grpc, ingest_pb2, ingest_pb2_grpc, scoring_pb2, scoring_pb2_grpc

site = sys.argv[1]
what = sys.argv[2] if len(sys.argv) > 2 else "events"
file = pathlib.Path(sys.argv[3] if len(sys.argv) > 3 else f"{site}-{what}.token")

channel = connect.channel()
watch, Request = {
    "events": (ingest_pb2_grpc.IngestServiceStub(channel).WatchEvents, ingest_pb2.WatchEventsRequest),
    "sessions": (scoring_pb2_grpc.ScoringServiceStub(channel).WatchSessions, scoring_pb2.WatchSessionsRequest),
    "calls": (calls_pb2_grpc.CallsServiceStub(channel).WatchCalls, calls_pb2.WatchCallsRequest),
}[what]

# To try again does not help: somebody has to look.
FINAL = {
    grpc.StatusCode.FAILED_PRECONDITION,  # the database is not set up for it; the message names the cure
    grpc.StatusCode.INVALID_ARGUMENT,  # the token file belongs to another watch, or is damaged: remove it
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}
SHORTEST, LONGEST = 0.5, 30.0  # seconds


def kept_token():
    return file.read_text() if file.exists() else None


def keep_token(token):
    part = file.with_name(file.name + ".part")
    part.write_text(token)
    os.replace(part, file)  # whole or not at all


def apply(message):
    if message.HasField("snapshot_start"):
        print('{"kind": "ANEW"}', flush=True)  # forget all rows that you have: those that are there follow
    elif message.HasField("change"):
        print(json_format.MessageToJson(message.change, indent=None), flush=True)


pause = SHORTEST
while True:
    try:
        for message in watch(Request(site=site, resume_token=kept_token())):
            apply(message)
            keep_token(message.resume_token)  # after the change: rather told twice than never
            pause = SHORTEST
    except grpc.RpcError as error:
        if error.code() in FINAL:
            sys.exit(f"{error.code().name}: {error.details()}")
        print(f"{error.code().name}: {error.details()}; trying again", file=sys.stderr, flush=True)
    time.sleep(pause * random.uniform(0.5, 1))  # so that not everybody comes back at once
    pause = min(2 * pause, LONGEST)
