"""TextSegments: a long text tokenized piece by piece, each piece once.

Where a line begins with a letter, and where a space stands between two letters, most tokenizers begin a new token
whatever stands before and behind; whether this one does is found out by trying. Then a text may be cut there: its ids
are those of its pieces, one after the other. Pieces are remembered, so the second question about a book costs the
tokens of the question.
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

_CUT = re.compile(r"(?<=\n)(?=[^\W\d_])|(?<=[A-Za-z])(?= [A-Za-z])")
_CROSSES = re.compile(r"\n[^\W\d_]|[A-Za-z][ Ġ▁][A-Za-z]|Ċ[^ĊĠĉč\x21-\x40\x5b-\x60\x7b-\x7e]")
"""A token that would hold both sides of a cut. Byte-level vocabularies write a newline as Ċ and blanks as Ġ, ĉ, č."""
LOOK_BACK = 4096
"""Characters in which the last cut of a text is looked for first."""
_KINDS = ("a", "Z", "é", "中", "7", "²", " ", "   ", "\t", "\n", "\r\n", "'", "'s", "!", "_", "/", "\u00a0", "\u200d",
          "\u0301", "🙂", "▁", "<")
"""One of each kind of character that patterns of tokenizers tell apart."""
_WORDS = ("a", "I ", "It's", "é\n", "x\u0301", "中文", "Aa", "b7", "²", "½x", "Ⅷ")
"""That may follow a newline; those that begin with a letter of ASCII, a space between letters."""
_PAIRS = tuple(itertools.product(("", *_KINDS), _KINDS))


class TextSegments:
    def __init__(self, backend: Any, segment: int = SEGMENT, most_remembered: int = MOST_REMEMBERED) -> None:
        """`backend`: a `tokenizers.Tokenizer`."""
        self._backend, self._segment, self._most_remembered = backend, segment, most_remembered
        self._known: OrderedDict[tuple[str, bool, str], array[int]] = OrderedDict()
        self._remembered = 0

    def encode(self, text: str, tenant: str = "") -> "array[int]":
        """Ids of a text, as the backend gives them for the whole without special tokens around it. What was remembered
        for one tenant is not found for another: the time that is saved would tell who has which text."""
        ids = array("I")
        for piece in self._pieces(text):
            ids.extend(self._ids(piece, tenant))
        return ids

    def _pieces(self, text: str) -> list[str]:
        if len(text) < 2 * self._segment or not self.can_cut:
            return [text]
        pieces, start = [], 0
        while (cut := _CUT.search(text, start + self._segment)) is not None:
            pieces.append(text[start:cut.start()])
            start = cut.start()
        return [*pieces, text[start:]]

    def cut(self, text: str) -> int:
        """How many characters of a text that goes on have ids of their own, whatever follows."""
        back = LOOK_BACK
        while self.can_cut:
            found = [cut.start() for cut in _CUT.finditer(text, max(0, len(text) - back))]
            if found or back >= len(text):
                return found[-1] if found else 0
            back *= 8
        return 0

    def _ids(self, piece: str, tenant: str) -> "array[int]":
        key = (tenant, self._backend.encode_special_tokens, piece)
        if (ids := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return ids
        ids = array("I", self._backend.encode(piece, add_special_tokens=False).ids)
        if len(piece) >= self._segment:
            self._known[key] = ids
            self._remembered += len(piece)
            while self._remembered > self._most_remembered:
                (*_, oldest), _ = self._known.popitem(last=False)
                self._remembered -= len(oldest)
        return ids

    @cached_property
    def can_cut(self) -> bool:
        """Whether a new token, independent of the one before, begins at every cut."""
        return (not any(map(_CROSSES.search, self._backend.get_vocab()))
                and not any(map(_swallows, self._backend.get_added_tokens_decoder().values()))
                and self._agrees([a + b + "\n" for a, b in _PAIRS], list(_WORDS))
                and self._agrees([a + b + "x" for a, b in _PAIRS], [f" {w}" for w in _WORDS if w[0].isascii()]))

    def _agrees(self, before: list[str], after: list[str]) -> bool:
        """Whether each of these before each of those has the ids of the two."""
        left, right = self._batch(before), self._batch(after)
        whole = iter(self._batch([a + b for a, b in itertools.product(before, after)]))
        return all(next(whole) == a + b for a, b in itertools.product(left, right))

    def _batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]


def _swallows(token: Any) -> bool:
    """Whether an added token reaches over a cut: by its text, or by the blanks beside it that it takes along."""
    text = token.content
    return bool(_CUT.search(text) or (token.lstrip and text[:1].isalpha()) or (token.rstrip and text[-1:].isalpha()))
