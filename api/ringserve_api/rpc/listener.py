"""RpcListener: a gRPC server on a port, with health and reflection beside its own services."""

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ringserve_api.config import ServerConfig
from ringserve_api.errors import ListenError

MAX_MESSAGE_BYTES = 4 << 20
"""gRPC's own limit: larger prompts come in chunks."""
MAX_STREAMS = 1024
"""Calls at a time on one connection."""
LAST_WORDS_S = 5.0

Service = tuple[str, Any]
"""Its full name, and what adds it to a server."""


class RpcListener:
    """`bind` first, so that a taken port is told before a model is loaded; then `start` with the services."""

    def __init__(self, host: str, port: int, config: ServerConfig) -> None:
        self._host, self._wanted, self._config = host, port, config
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []

    def bind(self) -> None:
        """Needs a running event loop. Raises ListenError."""
        self._server = grpc.aio.server(options=(
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_concurrent_streams", MAX_STREAMS),
            ("grpc.so_reuseport", 0),
            # A client that waits an hour in silence for its prefill may ask whether the server is still there.
            ("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
            # And this server asks too: a client that vanished without a word is gone after these.
            ("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 20_000)))
        address = f"[{self._host}]:{self._wanted}" if ":" in self._host else f"{self._host}:{self._wanted}"
        try:
            credentials = _credentials(self._config)
            self.port = (self._server.add_secure_port(address, credentials) if credentials is not None
                         else self._server.add_insecure_port(address))
        except RuntimeError:
            raise ListenError(f"cannot listen on {address} for gRPC: {self._why()}") from None

    def _why(self) -> str:
        """gRPC does not say: try."""
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((self._host, self._wanted))
            return "the address cannot be used"
        return "the port is in use by another process, or the address is not this machine's"

    @property
    def target(self) -> str:
        return f"[{self._host}]:{self.port}" if ":" in self._host else f"{self._host}:{self.port}"

    async def start(self, services: Sequence[Service]) -> None:
        for name, add in services:
            add(self._server)
            self._names.append(name)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def drain(self) -> None:
        """Tell load balancers that no new requests are taken."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, *, abort: bool) -> None:
        """Open calls get a moment for their last event."""
        await self._server.stop(None if abort else LAST_WORDS_S)


def _credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """The files were found to be sound when the server read its configuration."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    roots = Path(config.tls_client_ca).read_bytes() if config.tls_client_ca is not None else None
    return grpc.ssl_server_credentials(
        [(Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes())], roots, roots is not None)
