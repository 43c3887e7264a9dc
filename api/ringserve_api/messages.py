"""Chat messages as templates want them: plain dicts with text content.

Read by hand, not by a schema: a bad list of a million parts gives one error that names the place.
"""

from typing import Any

from ringserve.errors import InvalidValueError
from ringserve_api.errors import ApiError

ROLES = ("system", "developer", "user", "assistant", "tool")
_OPTIONAL_TEXT = ("name", "tool_call_id", "reasoning_content")
_READ = {"role", "content", *_OPTIONAL_TEXT}
_UNSUPPORTED = ("tool_calls", "function_call", "audio")
_NULLABLE = {"refusal", "annotations"}
"""What clients copy from an answer into the next request; null or empty says nothing."""


def read_messages(messages: list[Any], ignored: set[str]) -> list[dict[str, Any]]:
    """Check `messages` and join text parts; names of fields that are passed over are added to `ignored`."""
    return [_read_message(message, f"messages[{index}]", ignored) for index, message in enumerate(messages)]


def _read_message(message: Any, where: str, ignored: set[str]) -> dict[str, Any]:
    if type(message) is not dict:
        raise InvalidValueError(f"{where} must be an object", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidValueError(f"{where}.role must be one of {', '.join(ROLES)}", f"{where}.role")
    for name in _UNSUPPORTED:
        if message.get(name) not in (None, []):
            raise ApiError("unsupported_parameter", f"{where}.{name} is not supported yet", f"{where}.{name}")
    result = {"role": role, "content": _read_content(message.get("content"), f"{where}.content")}
    for name in _OPTIONAL_TEXT:
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise InvalidValueError(f"{where}.{name} must be a string", f"{where}.{name}")
        result[name] = value
    for name in message.keys() - _READ:
        if name not in _UNSUPPORTED and not (name in _NULLABLE and message[name] in (None, [])):
            ignored.add(f"messages.{name}")
    return result


def _read_content(content: Any, where: str) -> str:
    """A string, or the texts of text parts joined by line ends (as vLLM and llama.cpp join them)."""
    if isinstance(content, str):
        return content
    if type(content) is not list or not content:
        raise InvalidValueError(f"{where} must be a string or a list of text parts", where)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if type(part) is dict else None
        if kind != "text":
            if isinstance(kind, str) and len(kind) <= 32:
                raise ApiError("unsupported_parameter",
                               f"{where}[{index}] is of type {kind!r}; this model reads text only",
                               f"{where}[{index}].type")
            raise InvalidValueError(f"{where}[{index}] must be an object with a type", f"{where}[{index}]")
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidValueError(f"{where}[{index}].text must be a string", f"{where}[{index}].text")
        texts.append(text)
    return "\n".join(texts)
