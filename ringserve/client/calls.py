"""The two kinds of requests that can lose their connection: how their calls begin, and how they are taken up again."""

from collections.abc import Sequence
from typing import Any, Protocol

from ringserve.client.events import Accepted, Delta, Event, Finished
from ringserve.client.upload import Upload
from ringserve.v1 import inference_pb2 as pb
from ringserve.v1.inference_pb2_grpc import InferenceServiceStub

Metadata = Sequence[tuple[str, str]]


class Calls(Protocol):
    request_id: str
    greets: bool
    """The call that was begun last brings an Accepted event at once."""

    @property
    def failure(self) -> BaseException | None:
        """Why the request cannot go on, whatever the server says."""

    def begin(self) -> Any:
        """The call that brings the request to the server."""

    def resume(self, after_sequence: int) -> Any:
        """The call that brings the rest of its events."""

    def saw(self, event: Event) -> None:
        """Called with every event, repeated ones too."""

    async def stop(self) -> None:
        """Called after each call."""


class GenerateCalls:
    """A prompt that goes up in chunks: Generate until the server has all of it, then Attach."""

    def __init__(self, stub: InferenceServiceStub, metadata: Metadata, opening: pb.Open, upload: Upload) -> None:
        self.request_id = opening.request_id
        self.greets = True
        self._stub, self._metadata, self._opening, self._upload = stub, metadata, opening, upload
        self._committed = False

    @property
    def failure(self) -> BaseException | None:
        return self._upload.failure

    def begin(self) -> Any:
        call = self._stub.Generate(metadata=self._metadata)
        self._upload.start(call, self._opening)
        return call

    def resume(self, after_sequence: int) -> Any:
        self.greets = not self._committed
        if self._committed:
            return attach(self._stub, self._metadata, self.request_id, after_sequence)
        call = self._stub.Generate(metadata=self._metadata)
        self._upload.resume(call, pb.Resume(request_id=self.request_id, after_sequence=after_sequence))
        return call

    def saw(self, event: Event) -> None:
        if self._committed:
            return
        # Nothing is decoded of a prompt that is not all there.
        self._committed = isinstance(event, Delta | Finished) or (isinstance(event, Accepted) and event.committed)
        if isinstance(event, Accepted):
            self._upload.go_on(None if event.committed else event.received_bytes)

    async def stop(self) -> None:
        await self._upload.stop()


class ChatCalls:
    """A conversation goes up in one message; what follows can be attached to."""

    failure: BaseException | None = None
    greets = False

    def __init__(self, stub: InferenceServiceStub, metadata: Metadata, request: pb.ChatRequest) -> None:
        self.request_id = request.request_id
        self._stub, self._metadata, self._request = stub, metadata, request

    def begin(self) -> Any:
        return self._stub.Chat(self._request, metadata=self._metadata)

    def resume(self, after_sequence: int) -> Any:
        return attach(self._stub, self._metadata, self.request_id, after_sequence)

    def saw(self, event: Event) -> None:
        pass

    async def stop(self) -> None:
        pass


def attach(stub: InferenceServiceStub, metadata: Metadata, request_id: str, after_sequence: int) -> Any:
    return stub.Attach(pb.AttachRequest(request_id=request_id, after_sequence=after_sequence), metadata=metadata)
