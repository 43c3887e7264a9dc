"""Whose request it is: a header that a trusted proxy sets, if the server was told its name."""

import json
from collections.abc import Callable, Iterator

import httpx
import pytest
from ringserve_api.config import ServerConfig

from ringserve.scheduling_params import SchedulingParams
from tests.api.conftest import RunningServer
from tests.api.test_http import check_error

BODIES: dict[str, dict[str, object]] = {
    "/v1/completions": {"model": "needle", "prompt": "abc", "max_tokens": 2, "priority": 1, "cache_salt": "s"},
    "/v1/chat/completions": {"model": "needle", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2,
                             "priority": 1, "cache_salt": "s"},
    "/v1/estimate": {"model": "needle", "prompt": "abc", "priority": 1, "cache_salt": "s"}}
LONGEST = "".join(map(chr, range(0x21, 0x7f))) + "x" * 162


def ask(url: str, path: str, *tenants: bytes, pad: int = 0) -> httpx.Response:
    body = json.dumps({**BODIES[path], "user": "x" * pad})
    return httpx.post(url + path, content=body, timeout=20, headers=[
        (b"content-type", b"application/json"), *((b"X-Tenant", tenant) for tenant in tenants)])


@pytest.fixture
def proxied(start_server: Callable[..., RunningServer]) -> Iterator[RunningServer]:
    yield start_server(tenant_header="x-tenant")


def test_the_tenant_reaches_the_engine_with_the_requests_wishes(proxied: RunningServer) -> None:
    assert len(LONGEST) == 256
    for path in BODIES:
        for headers, tenant in (((), ""), ((b"",), ""), ((b"acme",), "acme"), ((LONGEST.encode(),), LONGEST)):
            assert ask(proxied.url, path, *headers).status_code == 200
            assert proxied.engine.scheduled[-1] == SchedulingParams(tenant=tenant, priority=1, cache_salt="s")
        assert ask(proxied.url, path, b"acme", pad=100_000).status_code == 200  # through the prompt worker
        assert proxied.engine.scheduled[-1].tenant == "acme"


@pytest.mark.parametrize("tenants", [
    (b"x" * 257,), (b"two words",), ("ñ".encode(),), (b"\xff",), (b"a\tb",), (b"acme", b"acme"), (b"acme", b"me"),
    (b"", b"acme")], ids=lambda tenants: str(tenants)[:24])
def test_a_tenant_that_cannot_be_told_is_refused(proxied: RunningServer, tenants: tuple[bytes, ...]) -> None:
    for path in BODIES:
        response = ask(proxied.url, path, *tenants)
        error = check_error(response, 400, "invalid_value")
        assert error["param"] == "x-tenant" and "256 visible ASCII" in str(error["message"])
    assert proxied.engine.asked == []


def test_without_the_setting_the_header_is_nobodys(server: RunningServer) -> None:
    for path in BODIES:
        assert ask(server.url, path, b"two words", b"acme").status_code == 200
        assert server.engine.scheduled[-1].tenant == ""


def test_names_of_headers() -> None:
    for name in ("x-tenant", "X_Tenant", "a", "!#$%&'*+-.^_`|~09azAZ"):
        assert ServerConfig(tenant_header=name).tenant_header == name
