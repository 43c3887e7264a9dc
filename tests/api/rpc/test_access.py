"""Who may call what, and over which connections."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from ringserve.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from ringserve.v1 import inference_pb2 as pb
from tests.api.conftest import RunningServer
from tests.api.rpc.calls import TIMEOUT_S, Call, Refusal, refusal, text_of, text_open, upload
from tests.api.test_keys import ACME, BOTH, OPS, keys_file
from tests.api.test_tls import Files, files

__all__ = ["files", "keys_file"]
Start = Callable[..., RunningServer]


def bearing(secret: str) -> tuple[str, str]:
    return "authorization", f"Bearer {secret}"


@pytest.fixture
def guarded(start_server: Start, keys_file: str) -> RunningServer:
    return start_server(grpc_port=0, grpc_admin_port=0, api_keys=keys_file)


def every_call(channel: grpc.Channel, metadata: list[tuple[str, str]]) -> Iterator[tuple[str, Refusal]]:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    streams = {"Attach": pb.AttachRequest(), "Chat": pb.ChatRequest()}
    for name, request in streams.items():
        yield name, refusal(getattr(stub, name)(request, metadata=metadata, timeout=TIMEOUT_S))
    short: dict[str, Any] = {"GenerateText": pb.GenerateTextRequest(), "Estimate": pb.EstimateRequest(),
                             "Tokenize": pb.TokenizeRequest(), "Cancel": pb.CancelRequest(),
                             "ListModels": pb.ListModelsRequest()}
    for name, request in short.items():
        yield name, refusal(lambda n=name, r=request: getattr(stub, n)(r, metadata=metadata, timeout=TIMEOUT_S))
    with Call(stub, text_open(), metadata=metadata) as call:
        yield "Generate", call.refusal()


@pytest.mark.parametrize("metadata, code, reason", [
    ([], "UNAUTHENTICATED", "invalid_api_key"), ([bearing("rs-unknown")], "UNAUTHENTICATED", "invalid_api_key"),
    ([("authorization", f"Basic {ACME}")], "UNAUTHENTICATED", "invalid_api_key"),
    ([bearing(ACME), bearing(BOTH)], "UNAUTHENTICATED", "invalid_api_key"),
    ([bearing(OPS)], "PERMISSION_DENIED", "model_not_allowed")])
def test_every_call_wants_a_key(guarded: RunningServer, metadata: list[tuple[str, str]], code: str,
                                reason: str) -> None:
    assert guarded.server.rpc is not None
    with grpc.insecure_channel(guarded.server.rpc.target) as channel:
        found = dict(every_call(channel, metadata))
    service = pb.DESCRIPTOR.services_by_name["InferenceService"]
    assert found.keys() == {method.name for method in service.methods}
    for name, one in found.items():
        assert (one.code.name, one.reason) == (code, reason), name


def test_a_key_says_whose_a_request_is(guarded: RunningServer) -> None:
    assert guarded.server.rpc is not None
    with grpc.insecure_channel(guarded.server.rpc.target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with Call(stub, text_open(), *upload(b"abc"), metadata=[bearing(ACME)]) as call:
            assert text_of(call.rest()) == "ab"
    assert guarded.engine.scheduled[-1].tenant == "acme"


def test_operators_want_a_key_of_their_own(guarded: RunningServer) -> None:
    assert guarded.server.rpc is not None
    with grpc.insecure_channel(guarded.server.rpc.admin_target) as channel:
        control = control_pb2_grpc.ControlServiceStub(channel)
        calls: dict[str, Any] = {
            "GetStatus": control_pb2.GetStatusRequest(), "ListRequests": control_pb2.ListRequestsRequest(),
            "CancelRequest": control_pb2.CancelRequestRequest(), "Drain": control_pb2.DrainRequest()}
        service = control_pb2.DESCRIPTOR.services_by_name["ControlService"]
        assert calls.keys() == {method.name for method in service.methods}
        for name, request in calls.items():
            method = getattr(control, name)
            for metadata, code in (([], "UNAUTHENTICATED"), ([bearing(ACME)], "PERMISSION_DENIED")):
                assert refusal(lambda m=method, r=request, who=metadata: m(
                    r, metadata=who, timeout=TIMEOUT_S)).code.name == code, name
        for secret in (OPS, BOTH):
            assert control.GetStatus(control_pb2.GetStatusRequest(), metadata=[bearing(secret)],
                                     timeout=TIMEOUT_S).model == "needle"


@contextmanager
def secure(server: RunningServer, files: Files, shown: tuple[str, str] | None = None) -> Iterator[grpc.Channel]:
    certificate, key = (Path(path).read_bytes() for path in shown) if shown is not None else (None, None)
    credentials = grpc.ssl_channel_credentials(Path(files.root).read_bytes(), key, certificate)
    assert server.server.rpc is not None
    with grpc.secure_channel(server.server.rpc.target, credentials) as channel:
        yield channel


def models(channel: grpc.Channel) -> list[str]:
    answer = inference_pb2_grpc.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=5)
    return [model.name for model in answer.models]


def test_calls_over_tls(start_server: Start, files: Files) -> None:
    server = start_server(grpc_port=0, **files.flags())
    with secure(server, files) as channel:
        assert models(channel) == ["needle"]
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with Call(stub, text_open(), *upload(b"x" * 3_000_000)) as call:
            assert text_of(call.rest()) == "xx"
    assert server.server.rpc is not None
    with grpc.insecure_channel(server.server.rpc.target) as channel:
        assert refusal(lambda: models(channel)).code is grpc.StatusCode.UNAVAILABLE


def test_clients_show_certificates(start_server: Start, files: Files) -> None:
    server = start_server(grpc_port=0, **files.flags(tls_client_ca=files.root))
    for shown in (None, files.stranger):
        with secure(server, files, shown) as channel:
            assert refusal(lambda c=channel: models(c)).code is grpc.StatusCode.UNAVAILABLE
    with secure(server, files, files.client) as channel:
        assert models(channel) == ["needle"]
