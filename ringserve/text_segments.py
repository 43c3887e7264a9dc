"""TextSegments: a long text tokenized piece by piece, each piece once.

Where a line begins with a letter, most tokenizers begin a new token whatever stands before and behind; whether this one
does is found out by trying. Then a text may be cut there: its ids are those of its pieces, one after the other. Pieces
are remembered, so the second question about a book costs the tokens of the question.
"""

import itertools
import re
from array import array
from collections import OrderedDict
from functools import cached_property
from typing import Any

SEGMENT = 1 << 14
"""Characters that a piece has at least."""
MOST_REMEMBERED = 1 << 25
"""Characters, of all remembered pieces together: 8 million tokens or so."""

_KINDS = ("a", "Z", "é", "中", "7", "²", " ", "   ", "\t", "\n", "\r\n", "'", "'s", "!", "_", "/", "\u00a0", "\u200d",
          "\u0301", "🙂", "▁", "<")
"""One of each kind of character that patterns of tokenizers tell apart."""
_WORDS = ("a", "I ", "It's", "é\n", "x\u0301", "中文", "Aa", "b7")


class TextSegments:
    def __init__(self, backend: Any, segment: int = SEGMENT, most_remembered: int = MOST_REMEMBERED) -> None:
        """`backend`: a `tokenizers.Tokenizer`."""
        self._backend, self._segment, self._most_remembered = backend, segment, most_remembered
        self._known: OrderedDict[tuple[bool, str], array[int]] = OrderedDict()
        self._remembered = 0

    def encode(self, text: str) -> "array[int]":
        """Ids of a text, as the backend gives them for the whole without special tokens around it."""
        ids = array("I")
        for piece in self._pieces(text):
            ids.extend(self._ids(piece))
        return ids

    def _pieces(self, text: str) -> list[str]:
        if len(text) < 2 * self._segment or not self.can_cut:
            return [text]
        pieces, start = [], 0
        while (cut := _next_cut(text, start + self._segment)) is not None:
            pieces.append(text[start:cut])
            start = cut
        return [*pieces, text[start:]]

    def cut(self, text: str) -> int:
        """How many characters of a text that goes on have ids of their own, whatever follows."""
        end = len(text) if self.can_cut else 0
        while (end := text.rfind("\n", 0, end)) >= 0:
            if _begins_word(text, end + 1):
                return end + 1
        return 0

    def _ids(self, piece: str) -> "array[int]":
        key = (self._backend.encode_special_tokens, piece)
        if (ids := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return ids
        ids = array("I", self._backend.encode(piece, add_special_tokens=False).ids)
        if len(piece) >= self._segment:
            self._known[key] = ids
            self._remembered += len(piece)
            while self._remembered > self._most_remembered:
                (_, oldest), _ = self._known.popitem(last=False)
                self._remembered -= len(oldest)
        return ids

    @cached_property
    def can_cut(self) -> bool:
        """Whether a new token, independent of the one before, begins wherever a line begins with a letter."""
        return not any(map(self._crosses, self._backend.get_vocab())) and not any(
            _next_cut(token.content, 0) or (token.lstrip and token.content[:1].isalpha())
            for token in self._backend.get_added_tokens_decoder().values()) and self._probes_agree()

    @staticmethod
    def _crosses(token: str) -> bool:
        """Whether a token may hold the end of a line and the letter after it. Byte-level vocabularies write a newline
        as Ċ, and the bytes of blanks as Ġ, ĉ, č."""
        return bool(re.search(r"\n[^\W\d_]|Ċ[^ĊĠĉč\x21-\x40\x5b-\x60\x7b-\x7e]", token))

    def _probes_agree(self) -> bool:
        before = [a + b + "\n" for a, b in itertools.product(("", *_KINDS), _KINDS)]
        left, right = self._batch(before), self._batch(list(_WORDS))
        whole = iter(self._batch([a + b for a, b in itertools.product(before, _WORDS)]))
        return all(next(whole) == a + b for a, b in itertools.product(left, right))

    def _batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]


def _begins_word(text: str, at: int) -> bool:
    return text[at:at + 1].isalpha()


def _next_cut(text: str, start: int) -> int | None:
    """Where the next line that begins with a letter begins."""
    at = start
    while (at := text.find("\n", at) + 1) > 0:
        if _begins_word(text, at):
            return at
    return None
