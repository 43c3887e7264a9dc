"""ServerState: what all requests of one server share, and whether it takes new ones."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from ringserve.errors import EngineDeadError
from ringserve_api.body import BodyReader
from ringserve_api.config import ServerConfig
from ringserve_api.engine_port import Engine, ServedModel, Tokenizer
from ringserve_api.errors import ApiError
from ringserve_api.generation import Generation
from ringserve_api.prepare import Prepared
from ringserve_api.worker_pool import PromptWorker

MAX_RETRY_AFTER_S = 120
"""Clients take a longer Retry-After for `do not retry`."""


class ServerState:
    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: ServerConfig) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.model = ServedModel.of(engine.info, config.served_model_name)
        self.created = int(time.time())
        self.bodies = BodyReader(config)
        self.prompt_worker = PromptWorker(tokenizer, self.model, config.prompt_timeout_s)
        self.idle = asyncio.Event()
        """No request is open."""
        self.idle.set()
        self._drain_deadline: float | None = None
        self.open_requests = 0
        self._generations: set[Generation] = set()
        self._stop_error: Exception | None = None

    @property
    def draining(self) -> bool:
        return self._drain_deadline is not None

    def drain(self) -> None:
        """Take no new requests; open ones go on."""
        if self._drain_deadline is None:
            self._drain_deadline = time.monotonic() + self.config.drain_timeout_s

    def stop(self, error: Exception) -> None:
        """End every open request with `error`, and those that are still on their way into the engine."""
        self._stop_error = error
        for generation in self._generations:
            generation.stop(error)

    def unavailable(self) -> ApiError | EngineDeadError | None:
        """Why no new request is taken; None when they are."""
        if self.engine.dead is not None:
            return self.engine.dead
        if self._drain_deadline is not None:
            remaining = math.ceil(self._drain_deadline - time.monotonic())
            return ApiError("draining", "the server is shutting down",
                            retry_after_s=min(max(remaining, 1), MAX_RETRY_AFTER_S))
        return None

    @contextmanager
    def open_request(self) -> Iterator[None]:
        """Count a request as open inside of the block; raises when none is taken."""
        refusal = self.unavailable()
        if refusal is not None:
            raise refusal
        self.open_requests += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.open_requests -= 1
            if self.open_requests == 0:
                self.idle.set()

    @asynccontextmanager
    async def open_generation(self, prepared: Prepared, request_id: str) -> AsyncIterator[Generation]:
        """Submit a request that `stop` reaches; it is left at the end of the block."""
        generation = Generation(self.engine, prepared, request_id)
        self._generations.add(generation)
        if self._stop_error is not None:
            generation.stop(self._stop_error)
        try:
            yield generation
        finally:
            self._generations.discard(generation)
            await generation.leave()
