"""The generated clients of OpsMantik, and a channel that carries a token.

The modules `opsmantik.v1.*_pb2` and `*_pb2_grpc` are made from `proto/` when this is imported, into a temporary
folder. In a project of your own, generate them once with the same arguments of `protoc`.

    OPSMANTIK_ADDR    where the server listens for gRPC (127.0.0.1:50051)
    OPSMANTIK_TOKEN   what `opsmantik token issue` printed
    OPSMANTIK_CA      the certificate authority of the server, a PEM file; without one the channel is plain text
"""

import collections
import importlib.resources
import os
import pathlib
import sys
import tempfile

import grpc
from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
_generated = tempfile.TemporaryDirectory(prefix="opsmantik-")  # removed when the program ends


def _generate():
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    arguments = [f"-I{PROTO}", f"-I{well_known}", f"--python_out={_generated.name}", f"--grpc_python_out={_generated.name}"]
    if protoc.main(["protoc", *arguments, *sorted(map(str, PROTO.rglob("*.proto")))]) != 0:
        sys.exit("the .proto files cannot be compiled")
    sys.path.insert(0, _generated.name)


_generate()

# A connection that is lost without a word is noticed; one that is refused is tried again before long.
_OPTIONS = [("grpc.keepalive_time_ms", 30_000), ("grpc.max_reconnect_backoff_ms", 10_000)]


class _Details(
    collections.namedtuple("_Details", "method timeout metadata credentials wait_for_ready compression"),
    grpc.ClientCallDetails,
):
    pass


class Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the token to the metadata of every call."""

    def __init__(self, token):
        self.header = ("authorization", f"Bearer {token}")

    def _with_token(self, proceed, details, request):
        metadata = [*(details.metadata or ()), self.header]
        details = _Details(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready, details.compression
        )
        return proceed(details, request)

    intercept_unary_unary = intercept_unary_stream = _with_token
    intercept_stream_unary = intercept_stream_stream = _with_token


def bare_channel():
    """A channel without a token: enough for health, and for nothing else."""
    address, authority = os.environ.get("OPSMANTIK_ADDR", "127.0.0.1:50051"), os.environ.get("OPSMANTIK_CA")
    if authority is None:
        return grpc.insecure_channel(address, _OPTIONS)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(pathlib.Path(authority).read_bytes()), _OPTIONS)


def channel(token=None):
    return grpc.intercept_channel(bare_channel(), Bearer(token or os.environ["OPSMANTIK_TOKEN"]))
