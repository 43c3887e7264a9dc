"""Client: AsyncClient for callers without an event loop. All clients share one, on a thread of its own."""

import weakref
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Self, Unpack

from ringserve.client.async_client import AsyncClient, Messages
from ringserve.client.channel import Certificates
from ringserve.client.events import Answer, Estimated, Event, Model
from ringserve.client.loop_thread import LoopThread
from ringserve.client.options import Options
from ringserve.client.prompt import Prompt
from ringserve.client.upload import OnUpload


class Client:
    """A server. A context manager; the methods are AsyncClient's, and so are the arguments.

    May be used from several threads. `on_upload` is called on another thread, and must not wait there."""

    def __init__(self, target: str, *, api_key: str | None = None, root_certificates: Certificates | None = None,
                 client_certificate: tuple[Certificates, Certificates] | None = None, model: str | None = None,
                 keep_s: float = 60.0, connect_timeout_s: float = 10.0) -> None:
        self._client = AsyncClient(target, api_key=api_key, root_certificates=root_certificates,
                                   client_certificate=client_certificate, model=model, keep_s=keep_s,
                                   connect_timeout_s=connect_timeout_s)
        self._thread = LoopThread.of_process()
        self._closer = weakref.finalize(self, _close, self._client, self._thread)

    def generate(self, prompt: Prompt, *, model: str | None = None, on_upload: OnUpload | None = None,
                 **options: Unpack[Options]) -> Generator[Event, None, None]:
        return self._thread.iterate(self._client.generate(prompt, model=model, on_upload=on_upload, **options))

    def chat(self, messages: Messages, *, model: str | None = None,
             **options: Unpack[Options]) -> Generator[Event, None, None]:
        return self._thread.iterate(self._client.chat(messages, model=model, **options))

    def generate_text(self, prompt: Prompt, *, model: str | None = None, on_upload: OnUpload | None = None,
                      **options: Unpack[Options]) -> Answer:
        return self._thread.run(self._client.generate_text(prompt, model=model, on_upload=on_upload, **options))

    def estimate(self, prompt: str | Sequence[int] | None = None, *, prompt_tokens: int | None = None,
                 messages: Messages | None = None, model: str | None = None,
                 **options: Unpack[Options]) -> Estimated:
        return self._thread.run(self._client.estimate(prompt, prompt_tokens=prompt_tokens, messages=messages,
                                                      model=model, **options))

    def tokenize(self, prompt: str | Messages, *, model: str | None = None) -> list[int]:
        return self._thread.run(self._client.tokenize(prompt, model=model))

    def cancel(self, request_id: str) -> None:
        self._thread.run(self._client.cancel(request_id))

    def models(self) -> list[Model]:
        return self._thread.run(self._client.models())

    def close(self) -> None:
        """Cancel what is under way, and hang up."""
        self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _close(client: AsyncClient, thread: LoopThread) -> None:
    thread.finish(client.close())
