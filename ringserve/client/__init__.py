"""A client of the gRPC API: long prompts up, answers down, over connections that may break.

    from pathlib import Path
    from ringserve.client import Client, Delta, Progress

    with Client("localhost:50051", api_key="secret") as client:
        for event in client.generate(Path("book.txt"), max_tokens=200, temperature=0):
            match event:
                case Progress():
                    print(f"{event.percent:.0f} %")
                case Delta():
                    print(event.text, end="")

        answer = client.generate_text("One, two,", max_tokens=8)
        print(answer.text, answer.usage)

AsyncClient has the same methods for asyncio. There, leave `generate` early through `contextlib.aclosing`, so that the
request is cancelled at once and not when the generator is collected.
"""

from ringserve.client.async_client import AsyncClient
from ringserve.client.client import Client
from ringserve.client.errors import ClientError, ConnectionLostError
from ringserve.client.events import (
    Accepted,
    Answer,
    Delta,
    Estimated,
    Event,
    Finished,
    Model,
    Progress,
    Queued,
    TokenLogprob,
    TopLogprob,
    Usage,
)

__all__ = [
    "Accepted", "Answer", "AsyncClient", "Client", "ClientError", "ConnectionLostError", "Delta", "Estimated", "Event",
    "Finished", "Model", "Progress", "Queued", "TokenLogprob", "TopLogprob", "Usage",
]
