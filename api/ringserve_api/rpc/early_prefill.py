"""EarlyPrefill: a prompt is computed while it comes.

As much as is known is prefilled as a request of its own, again and again; what these leave in the prefix cache is what
the real request begins with. So nothing below knows of prompts that are not complete.
"""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from ringserve.errors import RingserveError
from ringserve.outputs import Progress
from ringserve.sampling_params import SamplingParams
from ringserve_api.engine_port import Engine
from ringserve_api.generation import Generation, Stopped, cancelled
from ringserve_api.prepare import Prepared, little_endian
from ringserve_api.rpc.upload import Upload

LEAST = 1024
"""Tokens that are worth a request."""
SHARE = 1 / 32
"""Of the prompt so far, likewise: each request is hashed, looked up and announced from its beginning."""

logger = logging.getLogger("ringserve.api")


class EarlyPrefill:
    def __init__(self, engine: Engine, upload: Upload, prepared: Prepared, request_id: str, stopped: Stopped,
                 on_progress: Callable[[Progress], None]) -> None:
        self._engine, self._upload, self._stopped = engine, upload, stopped
        self._request_id, self._on_progress = request_id, on_progress
        self._prepared = msgspec.structs.replace(
            prepared, params=SamplingParams(max_tokens=1, temperature=0), return_progress=True)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """What it has computed stays in the prefix cache."""
        await cancelled(self._task)

    async def _run(self) -> None:
        done, number = 0, 0
        try:
            while True:
                while len(self._upload.ids) - done < max(LEAST, SHARE * done):
                    self._upload.grew.clear()
                    await self._upload.grew.wait()
                if self._upload.committed.is_set():
                    return
                done, number = len(self._upload.ids), number + 1
                await self._prefill(done, number)
        except RingserveError as error:
            # The real request will meet the same, or will not; it has a client who is told.
            logger.info("a prompt is not prefilled while it comes: %s", error.message)
        except Exception:
            logger.exception("prefilling a prompt while it comes failed")

    async def _prefill(self, count: int, number: int) -> None:
        prompt = msgspec.structs.replace(self._prepared, prompt_ids=little_endian(self._upload.ids[:count]))
        async with Generation(self._engine, prompt, f"{self._request_id}-{number}", self._stopped) as generation:
            await generation.submit()
            while True:
                output = await generation.next()
                assert output is not None, "without a time-out there is always an event"
                if output.progress is not None:
                    self._on_progress(output.progress)
                if output.finish_reason is not None:
                    return
