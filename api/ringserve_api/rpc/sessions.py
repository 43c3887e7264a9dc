"""Sessions: the requests that clients can come back to, each under its tenant's own name for it."""

import asyncio
import re
import secrets
from collections.abc import Iterator

from ringserve.errors import InvalidValueError, OverloadedError
from ringserve_api.errors import ApiError
from ringserve_api.prepare import Prepared
from ringserve_api.rpc.messages import new_id
from ringserve_api.rpc.session import Session
from ringserve_api.rpc.upload import Upload
from ringserve_api.state import ServerState

NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
MOST = 4096
"""Sessions at a time, those included whose answers wait for their clients."""


class Sessions:
    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._by_name: dict[tuple[str, str], Session] = {}

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_name.values()))

    def begin(self, name: str, prepared: Prepared, upload: Upload | None, keep_s: float,
              deadline_s: float | None, announced_tokens: int = 0) -> Session:
        """Raises InvalidValueError for a name that is none, ApiError for one that is in use or while the server
        drains, OverloadedError when there are too many."""
        if name and not NAME.fullmatch(name):
            raise InvalidValueError("request_id must have 1 to 128 characters out of A-Z, a-z, 0-9, '.', '_' and '-'",
                                    "request_id")
        name = name or secrets.token_hex(16)
        key = (prepared.scheduling.tenant, name)
        if key in self._by_name:
            raise ApiError("idempotency_conflict", f"there is a request {name!r} already", "request_id")
        if len(self._by_name) >= MOST:
            raise OverloadedError(f"{MOST} requests are open or wait for their clients, which is the limit")
        session = Session(self._state, name, new_id(), prepared, upload, keep_s, deadline_s,
                          announced_tokens)
        self._by_name[key] = session
        session.on_forgotten = lambda: self._forget(key, session)
        return session

    def _forget(self, key: tuple[str, str], session: Session) -> None:
        if self._by_name.get(key) is session:
            del self._by_name[key]

    def find(self, tenant: str, name: str) -> Session:
        """Raises ApiError: what belongs to somebody else is not found either."""
        session = self._by_name.get((tenant, name))
        if session is None:
            raise ApiError("not_found", f"there is no request {name[:128]!r}: it ended longer ago than it was kept, or "
                           "never came", "request_id")
        return session

    async def close(self) -> None:
        await asyncio.gather(*(session.close() for session in self))
