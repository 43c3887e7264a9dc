"""Errors as gRPC statuses: the code of the one table, and google.rpc details that clients can read."""

from collections.abc import Iterable

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from ringserve_api.errors import wire_error

DOMAIN = "ringserve"
"""Of the reasons in ErrorInfo, which are the codes of the HTTP API."""
MAX_TEXT = 1024
"""Bytes of a message. It goes out three times, escaped, among headers, of which clients take 8 KiB."""


def status_of(error: BaseException) -> grpc.Status:
    """What a client gets for an exception. What is unknown becomes INTERNAL without its text."""
    wire = wire_error(error)
    message = wire.message.encode()[:MAX_TEXT].decode(errors="ignore")
    details: list[Message] = [ErrorInfo(reason=wire.code, domain=DOMAIN,
                                        metadata={name: str(value) for name, value in wire.details.items()})]
    if wire.param is not None:
        details.append(BadRequest(field_violations=[BadRequest.FieldViolation(
            field=wire.param, description=message)]))
    if "retry-after" in wire.headers:
        details.append(RetryInfo(retry_delay=Duration(seconds=int(wire.headers["retry-after"]))))
    code = grpc.StatusCode[wire.row.grpc]
    status: grpc.Status = rpc_status.to_status(
        Status(code=code.value[0], message=message, details=_packed(details)))
    return status


def _packed(details: Iterable[Message]) -> list[Any]:
    packed = []
    for detail in details:
        packed.append(Any())
        packed[-1].Pack(detail)
    return packed
