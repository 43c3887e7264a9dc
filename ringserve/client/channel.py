"""The connection to one server."""

from pathlib import Path

import grpc

from ringserve.v1.inference_pb2_grpc import InferenceServiceStub

KEEPALIVE_S = 30.0
"""Between pings where nothing comes. Servers must allow it."""
KEEPALIVE_TIMEOUT_S = 10.0

Certificates = bytes | Path | str
"""PEM, or the path of a file of it."""


def open_channel(target: str, root_certificates: Certificates | None,
                 client_certificate: tuple[Certificates, Certificates] | None,
                 connect_timeout_s: float) -> grpc.aio.Channel:
    """Encrypted when there is a certificate. Needs a running event loop."""
    options = [
        # An answer to a Tokenize of a long text is long.
        ("grpc.max_receive_message_length", -1),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        # How long one attempt may take, in spite of its name; then, how soon the next one comes.
        ("grpc.min_reconnect_backoff_ms", int(connect_timeout_s * 1000)),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # What is sent again is our own matter: it needs the server's word on how far it came.
        ("grpc.enable_retries", 0),
        # A connection of its own, that nobody else closes or fills.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if root_certificates is None and client_certificate is None:
        return grpc.aio.insecure_channel(target, options=options)
    key, chain = client_certificate if client_certificate is not None else (None, None)
    credentials = grpc.ssl_channel_credentials(_pem(root_certificates), _pem(key), _pem(chain))
    return grpc.aio.secure_channel(target, credentials, options=options)


def stub_of(channel: grpc.aio.Channel) -> InferenceServiceStub:
    return InferenceServiceStub(channel)


def _pem(certificates: Certificates | None) -> bytes | None:
    if certificates is None or isinstance(certificates, bytes):
        return certificates
    return Path(certificates).read_bytes()
