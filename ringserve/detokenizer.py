"""Detokenizer: a growing answer as text, never splitting a character, ending at stop strings."""

from collections.abc import Sequence

from ringserve.sampling_params import SamplingParams
from ringserve.tokenizer import Tokenizer

CONTEXT_TOKENS = 8
"""Last tokens of the prompt that the decoder sees: some write a token's text by what stands before it."""
REPLACEMENT = "�"
"""What a decoder shows for bytes that make no character, or none yet."""
MOST_PENDING = 64
"""Tokens without a whole character at their end; more of them are not the start of one."""
UNFINISHED_TOKENS = 3
"""A character has at most 4 bytes: what these last tokens leave open, the ones before do not."""


class Detokenizer:
    """Feed tokens, take text. `stop` is the stop string that was found, if any; `count` the tokens until then.

        window:  [ context ][ pending tokens ]      decoded together at each token
        text:     given      new, held back while it ends inside a character
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer, self._params = tokenizer, params
        self._window = self._whole_start(list(prompt_tail[-CONTEXT_TOKENS:]))
        self._context = len(self._window)
        self._given = self._decode(self._window)
        self._held = ""
        self.count = 0
        self.stop: str | None = None

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete, up to a stop string. Text that may begin one is held back."""
        text = ""
        for token in token_ids:
            if self.stop is not None:
                break
            self.count += 1
            text += self._filter(self._take(token))
        return text

    def finish(self) -> str:
        """What was held back: the start of a stop string that did not come, bytes that make no character."""
        if self.stop is not None:
            return ""
        rest = self._filter(self._new(self._decode(self._window)))
        self._window, self._given = [], ""
        held, self._held = self._held, ""
        return rest + held if self.stop is None else rest

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._params.skip_special_tokens)

    def _take(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        if text == self._given and self._is_skipped(token):
            self._window.pop()
            return ""
        whole = text.rstrip(REPLACEMENT)
        new = self._new(whole)
        if whole == text and new:
            self._slide(len(self._window))
        elif new:
            self._given = whole
        elif len(self._window) - self._context > MOST_PENDING:
            new = self._sure(text)
        return new

    def _sure(self, text: str) -> str:
        """The part of a long pending text that no later token can change."""
        last = len(self._window) - UNFINISHED_TOKENS
        stop = min(range(last, last - UNFINISHED_TOKENS - 1, -1),
                   key=lambda end: self._decode(self._window[:end]).count(REPLACEMENT))
        sure = self._decode(self._window[:stop])
        new = self._new(sure) if text.startswith(sure) else ""
        if new:
            self._slide(stop)
        return new

    def _whole_start(self, token_ids: list[int]) -> list[int]:
        """Without the rest of a character that began before them: some decoders break all that follows it."""
        def broken_start(ids: list[int]) -> int:
            text = self._decode(ids)
            return len(text) - len(text.lstrip(REPLACEMENT))

        return min((token_ids[skip:] for skip in range(UNFINISHED_TOKENS + 1)), key=broken_start)

    def _is_skipped(self, token: int) -> bool:
        return self._decode([token]) == "" != self._tokenizer.token_text(token)

    def _new(self, text: str) -> str:
        """What the window's text has beyond what was given."""
        if self._given.startswith(text):
            return ""
        # They part where the context ended inside a character that is whole now.
        same = next((i for i, (a, b) in enumerate(zip(self._given, text)) if a != b), len(self._given))
        return text[same:]

    def _slide(self, stop: int) -> None:
        """The text of the tokens before `stop` was given: those since the last time are the next context."""
        self._window, self._context = self._window[self._context:], stop - self._context
        self._given = self._decode(self._window[:self._context])

    def _filter(self, piece: str) -> str:
        if not self._params.stop:
            return piece
        text = self._held + piece
        if self.count >= self._params.min_tokens:
            found = [(at + len(stop), at, stop) for stop in self._params.stop if (at := text.find(stop)) >= 0]
            if found:
                # The one that is complete first, however the text was cut into tokens.
                end, at, self.stop = min(found)
                self._held = ""
                return text[:end if self._params.include_stop_str_in_output else at]
        keep = max((n for stop in self._params.stop for n in range(1, min(len(stop) - 1, len(text)) + 1)
                    if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]
