"""Clients of the shared server, which must be left with nothing."""

from collections.abc import Iterator

import grpc
import pytest

from ringserve.v1 import control_pb2_grpc, inference_pb2_grpc
from tests.api.conftest import RunningServer, eventually
from tests.api.rpc.calls import Stub, check_nothing_left, leftovers


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    eventually(lambda: leftovers(shared_server) == {})
    shared_server.engine.reset()
    yield shared_server
    shared_server.engine.step_s = shared_server.engine.first_step_s = 0
    check_nothing_left(shared_server)


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    assert server.server.rpc is not None
    with grpc.insecure_channel(server.server.rpc.target) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> Stub:
    return inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture
def control(server: RunningServer) -> Iterator[control_pb2_grpc.ControlServiceStub]:
    assert server.server.rpc is not None
    with grpc.insecure_channel(server.server.rpc.admin_target) as channel:
        yield control_pb2_grpc.ControlServiceStub(channel)
