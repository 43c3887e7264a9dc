from collections.abc import Iterator

import pytest

from tests.ringserve.client.fake_service import FakeService, serving
from tests.ringserve.client.tcp_proxy import TcpProxy


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def port(service: FakeService) -> Iterator[int]:
    with serving(service) as port:
        yield port


@pytest.fixture
def target(port: int) -> str:
    return f"127.0.0.1:{port}"


@pytest.fixture
def proxy(port: int) -> Iterator[TcpProxy]:
    with TcpProxy(port) as proxy:
        yield proxy
