"""Errors as statuses: every code of the table, and never more than a client can take."""

import base64

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from ringserve_api.errors import TABLE, ApiError
from ringserve_api.rpc.status import status_of

from ringserve.errors import ContextLengthError


def details_of(status: grpc.Status) -> Status:
    ((name, value),) = status.trailing_metadata or ()
    assert name == "grpc-status-details-bin" and isinstance(value, bytes)
    return Status.FromString(value)


@pytest.mark.parametrize("code", TABLE)
def test_every_code(code: str) -> None:
    status = status_of(ApiError(code, "words", "field", retry_after_s=7))
    assert status.code is grpc.StatusCode[TABLE[code].grpc]
    assert status.details == TABLE[code].message or status.details == "words"
    info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for packed, detail in zip(details_of(status).details, (info, bad, retry)):
        assert packed.Unpack(detail)
    assert info.reason == code and info.domain == "ringserve"
    assert bad.field_violations[0].field == "field" and retry.retry_delay.seconds == 7


def test_numbers_of_a_prompt_that_is_too_long() -> None:
    info = ErrorInfo()
    details_of(status_of(ContextLengthError(9, 2, 10))).details[0].Unpack(info)
    assert info.metadata == {"n_prompt_tokens": "9", "max_output_tokens": "2", "n_ctx": "10"}


def test_an_unknown_error_tells_nothing() -> None:
    status = status_of(ZeroDivisionError("secret"))
    assert status.code is grpc.StatusCode.INTERNAL and "secret" not in str(details_of(status))


@pytest.mark.parametrize("letter", ["x", "é", "🙂", "\n"])
def test_the_headers_fit(letter: str) -> None:
    """Clients take 8 KiB of them."""
    status = status_of(ApiError("invalid_value", letter * 3000, "field"))
    ((_, value),) = status.trailing_metadata or ()
    escaped = 3 * len(status.details.encode())
    assert escaped + len(base64.b64encode(bytes(value))) < 7000  # type: ignore[arg-type]
