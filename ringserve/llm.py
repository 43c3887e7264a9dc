"""LLM: offline generation in vLLM's shape. It has an engine, on an event loop of its own thread."""

import asyncio
import itertools
import json
import threading
import weakref
from array import array
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar

from ringserve.async_engine import AsyncEngine, EngineInfo
from ringserve.config import CacheConfig, Dtype, EngineConfig, ModelConfig, RingConfig, SchedulerConfig
from ringserve.errors import ConfigError, InvalidValueError
from ringserve.outputs import Completion, CompletionOutput, RequestOutput
from ringserve.sampling_params import SamplingParams
from ringserve.tokenizer import Tokenizer

T = TypeVar("T")

SETTLE_S = 10.0


class TokensPrompt(TypedDict):
    prompt_token_ids: Sequence[int]


Prompt = str | TokensPrompt


class LLM:
    """A model on a ring, for scripts. A context manager; leaves no process behind.

        with LLM("needle", ring_size=2, dtype="float32") as llm:
            [result] = llm.generate(["one two three one two"], SamplingParams(max_tokens=4, temperature=0))
            print(result.outputs[0].text)

    Keyword arguments are the fields of ModelConfig (`rope_scaling` may be a dict), CacheConfig, RingConfig and
    SchedulerConfig. Raises StartupError when the model or an option cannot work, EngineError when the engine stops.
    What was not closed is closed when the object, or the interpreter, ends.
    """

    def __init__(self, model: str, *, dtype: Dtype = "auto", **options: Any) -> None:
        config = engine_config(model=model, dtype=dtype, **options)
        self._ids = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ringserve", daemon=True)
        self._thread.start()
        try:
            self._engine = self._run(AsyncEngine.start(config))
        except BaseException:
            self._settle()
            _stop_loop(self._loop, self._thread)
            raise
        self._closer = weakref.finalize(self, _close, self._loop, self._thread, self._engine)

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | None = None, *,
                 on_progress: Callable[[int, RequestOutput], None] | None = None) -> list[Completion]:
        """Complete all prompts together; results in their order.

        `on_progress` is called with (number of the prompt, output) for each event, prefill progress included.
        Raises RequestError before any work when one of them cannot be served."""
        several = [prompts] if isinstance(prompts, str | dict) else list(prompts)
        params = sampling_params or SamplingParams()
        token_ids = [self._engine.validate(self._ids_of(prompt), params) for prompt in several]
        return self._run(self._generate(token_ids, params, on_progress))

    def close(self) -> None:
        """End the engine and its ranks."""
        self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _ids_of(self, prompt: Prompt) -> "array[int] | Sequence[int]":
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, dict) and set(prompt) == {"prompt_token_ids"}:
            return prompt["prompt_token_ids"]
        raise InvalidValueError(f"a prompt is a text or {{'prompt_token_ids': [...]}}, got {type(prompt).__name__}",
                                "prompt")

    async def _generate(self, prompts: "list[array[int]]", params: SamplingParams,
                        on_progress: Callable[[int, RequestOutput], None] | None) -> list[Completion]:
        names = [f"offline-{next(self._ids)}" for _ in prompts]
        places = asyncio.Semaphore(self._engine.most_requests)

        async def complete(number: int) -> Completion:
            async with places:
                return await self._complete(number, names[number], prompts[number], params, on_progress)

        try:
            return list(await asyncio.gather(*map(complete, range(len(prompts)))))
        except BaseException:
            for name in names:
                await self._engine.cancel(name)
            raise

    async def _complete(self, number: int, name: str, token_ids: "array[int]", params: SamplingParams,
                        on_progress: Callable[[int, RequestOutput], None] | None) -> Completion:
        text: list[str] = []
        output: list[int] = []
        logprobs = []
        events = await self._engine.submit(token_ids, params, request_id=name,
                                           return_progress=on_progress is not None)
        async for event in events:
            text.append(event.text)
            output += event.token_ids
            logprobs += event.logprobs
            if on_progress is not None:
                on_progress(number, event)
        assert event.finish_reason is not None and event.usage is not None
        return Completion(
            request_id=name, prompt_token_ids=list(token_ids), usage=event.usage,
            outputs=[CompletionOutput(text="".join(text), token_ids=output, finish_reason=event.finish_reason,
                                      logprobs=logprobs if params.logprobs is not None else None,
                                      stop_reason=event.stop_reason)])

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _settle(self) -> None:
        """Wait for what was cancelled to clean up after itself: an engine that was starting ends its processes."""
        async def others() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            if tasks:
                await asyncio.wait(tasks, timeout=SETTLE_S)

        asyncio.run_coroutine_threadsafe(others(), self._loop).result(2 * SETTLE_S)


def _close(loop: asyncio.AbstractEventLoop, thread: threading.Thread, engine: AsyncEngine) -> None:
    if threading.current_thread() is thread:
        # The last reference was dropped by the loop itself, which cannot wait for its own end.
        threading.Thread(target=_close, args=(loop, thread, engine)).start()
        return
    asyncio.run_coroutine_threadsafe(engine.let_go(), loop).result(SETTLE_S)
    engine.join()
    _stop_loop(loop, thread)


def _stop_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def engine_config(*, model: str, **options: Any) -> EngineConfig:
    """An EngineConfig from the fields of its parts. Raises ConfigError for a name that none of them has."""
    if isinstance(options.get("rope_scaling"), dict):
        options["rope_scaling"] = json.dumps(options["rope_scaling"])
    parts: dict[str, Any] = {}
    for name, kind in (("model", ModelConfig), ("cache", CacheConfig), ("ring", RingConfig),
                       ("scheduler", SchedulerConfig)):
        known = {key: options.pop(key) for key in list(options) if key in kind.__dataclass_fields__}
        parts[name] = kind(model=model, **known) if kind is ModelConfig else kind(**known)
    if options:
        raise ConfigError(f"unknown options: {', '.join(sorted(options))}")
    return EngineConfig(**parts)
