"""Detokenizer: a growing answer as text, never splitting a character, ending at stop strings."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from ringserve.sampling_params import SamplingParams
from ringserve.tokenizer import Tokenizer

CONTEXT_TOKENS = 8
"""Last tokens of the prompt that the decoder sees: some write a token's text by what stands before it."""


class Detokenizer:
    """Feed tokens, take text. `stop` is the stop string that was found, if any."""

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer, self._params = tokenizer, params
        self._context = list(prompt_tail[-CONTEXT_TOKENS:])
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=params.skip_special_tokens)
        self._pending_ids: list[int] = []
        self._held = ""
        self._count = 0
        self.stop: str | None = None

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete, up to a stop string. Text that may begin one is held back."""
        text = ""
        for token in token_ids:
            if self.stop is not None:
                break
            self._count += 1
            self._pending_ids.append(token)
            piece = self._stream.step(self._tokenizer.backend, token)
            if piece is not None:
                self._pending_ids.clear()
                text += self._filter(piece)
        return text

    def finish(self) -> str:
        """What was held back: the start of a stop string that did not come, bytes that make no character."""
        if self.stop is not None:
            return ""
        rest = self._filter(self._tokenizer.decode(self._pending_ids, self._params.skip_special_tokens)
                            if self._pending_ids else "")
        self._pending_ids.clear()
        held, self._held = self._held, ""
        return rest + held if self.stop is None else rest

    def _filter(self, piece: str) -> str:
        if not self._params.stop:
            return piece
        text = self._held + piece
        if self._count >= self._params.min_tokens:
            found = [(at, stop) for stop in self._params.stop if (at := text.find(stop)) >= 0]
            if found:
                at, self.stop = min(found, key=lambda f: (f[0], -len(f[1])))
                self._held = ""
                return text[:at + len(self.stop)] if self._params.include_stop_str_in_output else text[:at]
        keep = max((n for stop in self._params.stop for n in range(1, min(len(stop), len(text) + 1))
                    if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]
