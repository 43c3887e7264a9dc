"""What a client can meet. One tree, below RingserveError.

ClientError                   the server refused or failed, or a value cannot be sent; `code` says which
└── ConnectionLostError       no connection could be had again within `keep_s`
"""

from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status

from ringserve.errors import RingserveError


class ClientError(RingserveError):
    """`code` is the server's stable word (`context_length_exceeded`), the same as over HTTP; where the server gave
    none, the name of `status` in lower case."""

    def __init__(self, message: str, *, code: str, status: grpc.StatusCode, param: str | None = None,
                 retry_after_s: float | None = None, metadata: dict[str, str] | None = None,
                 from_server: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.param = param
        """The field to blame."""
        self.retry_after_s = retry_after_s
        """When to come again, where the server said so."""
        self.metadata = metadata or {}
        """What else the server knows: the numbers of the message."""
        self.from_server = from_server
        """The server's own word; otherwise it comes from the connection, or from this client."""


class ConnectionLostError(ClientError):
    def __init__(self, message: str) -> None:
        super().__init__(message, code="connection_lost", status=grpc.StatusCode.UNAVAILABLE)


def invalid(message: str, param: str) -> ClientError:
    """A value that cannot be sent, in the words that the server would use."""
    return ClientError(message, code="invalid_value", status=grpc.StatusCode.INVALID_ARGUMENT, param=param)


def closed() -> ClientError:
    return ClientError("the client was closed", code="client_closed", status=grpc.StatusCode.CANCELLED)


def error_of(failed: grpc.aio.AioRpcError) -> ClientError:
    """The ended call's status, with the details that the server put beside it."""
    status, message = failed.code(), failed.details() or ""
    details = _details_of(failed)
    info = _detail(details, ErrorInfo)
    request = _detail(details, BadRequest)
    retry = _detail(details, RetryInfo)
    return ClientError(
        message or status.name, status=status,
        code=info.reason if info is not None else status.name.lower(),
        param=request.field_violations[0].field if request is not None and request.field_violations else None,
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if retry is not None else None,
        metadata=dict(info.metadata) if info is not None else None,
        from_server=info is not None or retry is not None)


def _details_of(failed: grpc.aio.AioRpcError) -> list[Any]:
    try:
        status = rpc_status.from_call(failed)
    except (ValueError, DecodeError):
        # A proxy that changed the status and left the details: they speak of another one.
        return []
    return list(status.details) if status is not None else []


def _detail(details: list[Any], kind: type[Message]) -> Any:
    for detail in details:
        found = kind()
        if detail.Unpack(found):
            return found
    return None
