"""Server: the life of the HTTP and gRPC servers around one engine.

serve -> startup / main_loop / shutdown. It ends when it is asked to (SIGINT, SIGTERM or `shut_down`)
or when the engine dies. The first signal drains: open requests go on, new ones are refused; a second aborts.
"""

import asyncio
import contextlib
import errno
import socket
import ssl
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from ringserve.errors import EngineDeadError
from ringserve_api.app import create_app
from ringserve_api.config import ServerConfig
from ringserve_api.engine_port import Engine, Tokenizer
from ringserve_api.errors import ApiError, ListenError
from ringserve_api.rpc.server import RpcServer
from ringserve_api.state import ServerState
from ringserve_api.tls import server_context

MAX_HEADER_BYTES = 64 << 10
CONNECTION_IDLE_S = 75
LAST_WORDS_S = 5
"""For streams to write their last event and for connections to close, once nothing is left to wait for."""
GOODBYE_S = 1
"""For an idle client to answer TLS's `close_notify`; one that reads only when it asks never does."""


async def run_server(engine: Engine, tokenizer: Tokenizer, config: ServerConfig, *,
                     listener: socket.socket | None = None) -> int:
    """Serve until a signal or the engine's death; closes the engine. Returns the process's exit code.

    0 after a drain, 1 when the engine died, 128 + the signal's number after a second signal.
    `listener` is what `bind_socket` gave, for whoever wants to know that the port is free before loading a
    model; without it the address is bound here, and ListenError raised when it is taken.
    """
    return await Server(engine, tokenizer, config, listener=listener).serve()


def bind_socket(config: ServerConfig) -> socket.socket:
    """A listening socket, made before a model is loaded, so that a taken port is one clear line."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ListenError(f"cannot listen on {config.host!r}: {error.strerror or error}") from None
    config.require_safe(str(address[0]))
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        reason = ("the port is in use by another process" if error.errno == errno.EADDRINUSE
                  else error.strerror or str(error))
        raise ListenError(f"cannot listen on {config.host}:{config.port}: {reason}") from None
    return sock


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def say(line: str) -> None:
    """To whoever started the server; a terminal that is gone is no reason to fail."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def announce(url: str) -> None:
    say(f"ringserve is listening on {url}")


class Server:
    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: ServerConfig, *,
                 listener: socket.socket | None = None, rpc: RpcServer | None = None,
                 on_ready: Callable[[str], None] = announce) -> None:
        """`listener` and `rpc`: bound already, for whoever wants to know that the ports are free before a model is
        loaded."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._config = config
        self._listener = listener
        self.rpc = rpc
        self._on_ready = on_ready
        self._exit_code = 0
        self._impatient = False
        """It was asked once; the next time aborts."""

    async def serve(self) -> int:
        try:
            await self.startup()
            try:
                await self.main_loop()
            finally:
                await self.shutdown()
        finally:
            if self._listener is not None:
                self._listener.close()
            await self._engine.close()
        return self._exit_code

    async def startup(self) -> None:
        tls = server_context(self._config)
        self.state = ServerState(self._engine, self._tokenizer, self._config)
        self._socket = self._listener or bind_socket(self._config)
        self._loop = asyncio.get_running_loop()
        self._asked = asyncio.Event()
        self._aborted = asyncio.Event()
        self._http = _HttpServer(
            uvicorn.Config(
                create_app(self.state), http="h11", ws="none", lifespan="off", loop="asyncio",
                h11_max_incomplete_event_size=MAX_HEADER_BYTES, timeout_keep_alive=CONNECTION_IDLE_S,
                timeout_graceful_shutdown=LAST_WORDS_S, proxy_headers=False, server_header=False,
                access_log=self._config.access_log,
                log_config=_ACCESS_LOG if self._config.access_log else None,
                log_level="info" if self._config.access_log else "warning"),
            tls=tls, on_started=lambda: self._on_ready(url_of(self._socket, "https" if tls else "http")),
            on_signal=lambda number: self.shut_down(128 + number))
        if self.rpc is None:
            self.rpc = RpcServer(self._config)
            self.rpc.bind()
        for line in await self.rpc.start(self.state, self.drain):
            say(f"ringserve is listening for {line}")
        self._serving = asyncio.create_task(self._http.serve(sockets=[self._socket]))

    async def main_loop(self) -> None:
        """Until there is nothing left to wait for: drained, aborted, or the engine is dead."""
        await self.state.prompt_worker.start()
        died = asyncio.create_task(self._engine.died())
        asked = asyncio.create_task(self._asked.wait())
        try:
            await asyncio.wait({died, asked, self._serving}, return_when=asyncio.FIRST_COMPLETED)
            if self._asked.is_set():
                await self._drain(died)
            if died.done():
                self._bury(died.result())
        finally:
            for task in (died, asked):
                task.cancel()
            await asyncio.gather(died, asked, return_exceptions=True)

    async def shutdown(self) -> None:
        # What is still open has had its time; streams end with this error and not in the middle.
        self.state.stop(self._engine.dead or ApiError("draining", "the server was shut down"))
        if self._aborted.is_set():
            self._http.force_exit = True
        self._http.should_exit = True
        assert self.rpc is not None
        try:
            await asyncio.gather(self._serving, self.rpc.stop(abort=self._aborted.is_set()))
        finally:
            self._socket.close()
            await self.state.prompt_worker.close()

    def shut_down(self, abort_code: int = 1) -> None:
        """Ask the server to drain and end; from any thread. A second call aborts and sets the exit code."""
        self._loop.call_soon_threadsafe(self._ask, abort_code)

    def _ask(self, abort_code: int) -> None:
        if self._impatient:
            self._exit_code = abort_code
            self._aborted.set()
        self._impatient = True
        self._asked.set()

    def drain(self) -> None:
        """Likewise, for an operator's call: as often as it comes, and the first signal after it does not abort."""
        self._asked.set()

    async def _drain(self, died: "asyncio.Task[EngineDeadError]") -> None:
        assert self.rpc is not None
        self.state.drain()
        await self.rpc.drain()
        if count := self.state.open_requests:
            say(f"ringserve ends when its open requests have ended ({count}), in {self._config.drain_timeout_s:g} s "
                "at the latest; Ctrl-C again ends it now")
        idle = asyncio.create_task(self.state.idle.wait())
        aborted = asyncio.create_task(self._aborted.wait())
        await asyncio.wait({idle, aborted, died}, timeout=self._config.drain_timeout_s,
                           return_when=asyncio.FIRST_COMPLETED)
        for task in (idle, aborted):
            task.cancel()
        await asyncio.gather(idle, aborted, return_exceptions=True)

    def _bury(self, error: EngineDeadError) -> None:
        self._exit_code = 1
        say(f"ringserve: the engine died: {error.message}")


_ACCESS_LOG = {**LOGGING_CONFIG, "handlers": {
    name: {**handler, "stream": "ext://sys.stderr"} for name, handler in LOGGING_CONFIG["handlers"].items()}}


class _HttpServer(uvicorn.Server):
    """uvicorn with our TLS, telling us when it listens and leaving signals to us."""

    def __init__(self, config: uvicorn.Config, *, tls: ssl.SSLContext | None, on_started: Callable[[], None],
                 on_signal: Callable[[int], None]) -> None:
        super().__init__(config)
        config.load()  # else `serve` does, and overwrites the context
        config.ssl = tls
        self._on_started = on_started
        self._on_signal = on_signal

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        goodbye = asyncio.get_running_loop().call_later(GOODBYE_S, self._leave_the_idle)
        try:
            await super().shutdown(sockets)
        finally:
            goodbye.cancel()
            for connection in self.server_state.connections:
                connection.transport.abort()

    def _leave_the_idle(self) -> None:
        for connection in self.server_state.connections:
            if connection.transport.is_closing() and connection.transport.get_write_buffer_size() == 0:
                connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_signal(sig)
