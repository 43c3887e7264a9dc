"""Tokenizer: text to ids and back, by the checkpoint's own tokenizer. Imports no torch of its own.

Ids travel as array('I'). Special tokens are recognised where the template put them, never inside a message.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from ringserve.errors import CheckpointError, InvalidValueError
from ringserve.text_segments import TextSegments

_PLACEHOLDERS = range(0xF0000, 0xFFFFE)
"""Private-use characters that stand for special strings found inside messages."""


class Tokenizer:
    def __init__(self, source: str) -> None:
        """`source` is a checkpoint directory. Raises CheckpointError when it has no usable tokenizer."""
        from transformers import AutoTokenizer

        self.source = source
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
            self._backend: Any = self._tokenizer.backend_tokenizer
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise CheckpointError(f"the tokenizer in {source} cannot be loaded: {reason[0] if reason else error!r}"
                                  ) from error

    @classmethod
    def from_source(cls, source: str) -> "Tokenizer":
        return cls(source)

    def encode(self, text: str, allow_special: bool = True, *, tenant: str = "") -> "array[int]":
        """Ids of a text. With `allow_special` it is a whole prompt: special tokens in it are recognised and
        what the model wants around a prompt is added; without, it is plain text. `tenant`: who may save time by it
        later, see TextSegments."""
        return self._encode(text, tenant, add=allow_special, as_text=not allow_special)

    def encode_part(self, text: str, *, final: bool, tenant: str = "") -> "tuple[array[int], int]":
        """Ids of as much of a text as nothing that follows can change, and how many characters that is. Special tokens
        are recognised; what stands around a prompt is `around`. The parts of a text give the ids of the whole."""
        cut = len(text) if final else self._segments.cut(text)
        return self._segments.encode(text[:cut], tenant), cut

    def encode_at_once(self, text: str) -> "array[int]":
        """What `encode` gives for a prompt, in one piece: to hold the sum of its parts against."""
        return array("I", self._backend.encode(text).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def encode_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True,
                    continue_final_message: bool = False,
                    chat_template_kwargs: dict[str, Any] | None = None, tenant: str = "") -> "array[int]":
        """Ids of a conversation: rendered by the checkpoint's template, tokenized whole.

        Equals transformers' `apply_chat_template` unless a message contains a special token's text, which stays
        text here. Raises InvalidValueError without a template, or when the template refuses the messages."""
        if not self._tokenizer.chat_template:
            raise InvalidValueError("this model has no chat template: use /v1/completions", "messages")
        hidden: dict[str, str] = {}
        contents = [m["content"] for m in messages if isinstance(m.get("content"), str)]
        unused = (chr(c) for c in _PLACEHOLDERS if not any(chr(c) in content for content in contents))
        shielded = [{**m, "content": self._shield(m["content"], hidden, unused)}
                    if isinstance(m.get("content"), str) else m for m in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                shielded, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, **(chat_template_kwargs or {}))
        except Exception as error:
            raise InvalidValueError(f"the model's chat template refuses the messages: {str(error)[:200]}",
                                    "messages") from error
        if not hidden:
            return self._encode(text, tenant, add=False, as_text=False)
        ids = array("I")
        for number, part in enumerate(self._special_pattern.split(text)):
            if number % 2:
                ids.append(self._special_ids[part] if part in self._special_ids else self._special_ids[part.strip()])
            elif number:
                ids.extend(self._inner_backend.encode(_unshield(part, hidden), add_special_tokens=False).ids)
            else:
                ids.extend(self._encode(_unshield(part, hidden), tenant, add=False, as_text=True))
        return ids

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, which need not be whole characters."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        if self._is_byte_level and token not in self._special_ids and all(c in _BYTE_OF for c in token):
            return bytes(_BYTE_OF[c] for c in token)
        return self.token_text(token_id).encode()

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer` underneath."""
        return self._backend

    def _encode(self, text: str, tenant: str, *, add: bool, as_text: bool) -> "array[int]":
        around = self.around if add else (array("I"), array("I"))
        try:
            self._backend.encode_special_tokens = as_text
            return around[0] + self._segments.encode(text, tenant) + around[1]
        finally:
            self._backend.encode_special_tokens = False

    @cached_property
    def _segments(self) -> TextSegments:
        return TextSegments(self._backend)

    @cached_property
    def around(self) -> "tuple[array[int], array[int]]":
        """What the model wants before and after a prompt."""
        plain, whole = (self._backend.encode("a", add_special_tokens=add).ids for add in (False, True))
        before = next(i for i in range(len(whole)) if whole[i:i + len(plain)] == plain)
        return array("I", whole[:before]), array("I", whole[before + len(plain):])

    @cached_property
    def _special_tokens(self) -> list[tuple[int, Any]]:
        return [(number, token) for number, token in self._backend.get_added_tokens_decoder().items() if token.special]

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        return {token.content: number for number, token in self._special_tokens}

    @cached_property
    def _special_pattern(self) -> "re.Pattern[str]":
        """A special token's text, with the blanks around it that it swallows."""
        longest_first = sorted((token for _, token in self._special_tokens), key=lambda t: len(t.content), reverse=True)
        return re.compile("(" + "|".join(
            r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip for token in longest_first) + ")")

    @cached_property
    def _inner_backend(self) -> Any:
        """For plain text that follows a special token: without the space that some tokenizers put before the
        first word of a whole text, and blind to special tokens."""
        inner = type(self._backend).from_str(self._backend.to_str().replace(
            '"prepend_scheme":"first"', '"prepend_scheme":"never"'))
        inner.encode_special_tokens = True
        return inner

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in repr(self._backend.decoder)

    def _shield(self, content: str, hidden: dict[str, str], unused: Iterator[str]) -> str:
        """Replace special tokens' texts by characters that no message contains."""
        def replace(match: "re.Match[str]") -> str:
            placeholder = next((p for p, text in hidden.items() if text == match[0]), None) or next(unused)
            hidden[placeholder] = match[0]
            return placeholder

        return self._special_pattern.sub(replace, content) if self._special_ids else content


def _unshield(text: str, hidden: dict[str, str]) -> str:
    for placeholder, original in hidden.items():
        text = text.replace(placeholder, original)
    return text


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (Radford et al. 2019)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(shifted)}


_BYTE_OF = _byte_alphabet()
