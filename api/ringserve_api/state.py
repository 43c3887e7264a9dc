"""ServerState: what all requests of one server share, and whether it takes new ones."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ringserve.errors import EngineDeadError
from ringserve_api.access import read_keys
from ringserve_api.body import BodyReader
from ringserve_api.config import ServerConfig
from ringserve_api.engine_port import Engine, ServedModel, Tokenizer
from ringserve_api.errors import ApiError
from ringserve_api.generation import Stopped
from ringserve_api.worker_pool import PromptWorker


class ServerState:
    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: ServerConfig) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.keys = read_keys(config)
        """None where there are none, and everybody may use the server."""
        self.model = ServedModel.of(engine.info, config.served_model_name)
        self.created = int(time.time())
        self.bodies = BodyReader(config)
        self.prompt_worker = PromptWorker(tokenizer, self.model, config.prompt_timeout_s)
        self.idle = asyncio.Event()
        """No request is open."""
        self.idle.set()
        self._drain_deadline: float | None = None
        self._open: set[Stopped] = set()
        self._stop_error: Exception | None = None

    @property
    def draining(self) -> bool:
        return self._drain_deadline is not None

    def drain(self) -> None:
        """Take no new requests; open ones go on."""
        if self._drain_deadline is None:
            self._drain_deadline = time.monotonic() + self.config.drain_timeout_s

    def stop(self, error: Exception) -> None:
        """End every open request with `error`, wherever on its way it is."""
        self._stop_error = error
        for stopped in self._open:
            _give(stopped, error)

    def unavailable(self) -> ApiError | EngineDeadError | None:
        """Why no new request is taken; None when they are."""
        if self.engine.dead is not None:
            return self.engine.dead
        if self._drain_deadline is not None:
            return ApiError("draining", "the server is shutting down",
                            retry_after_s=self._drain_deadline - time.monotonic())
        return None

    @property
    def open_requests(self) -> int:
        return len(self._open)

    @contextmanager
    def open_request(self) -> Iterator[Stopped]:
        """Count a request as open inside of the block, which gets what `stop` ends it with; raises when none is
        taken."""
        refusal = self.unavailable()
        if refusal is not None:
            raise refusal
        stopped: Stopped = asyncio.get_running_loop().create_future()
        if self._stop_error is not None:
            _give(stopped, self._stop_error)
        self._open.add(stopped)
        self.idle.clear()
        try:
            yield stopped
        finally:
            self._open.discard(stopped)
            if not self._open:
                self.idle.set()


def _give(stopped: Stopped, error: Exception) -> None:
    if not stopped.done():
        stopped.set_exception(error)
        stopped.exception()  # seen: a request that never asks again is no forgotten error
