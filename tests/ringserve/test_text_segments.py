"""Tokenizing in pieces gives the ids of the whole, or does not happen."""

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from ringserve.async_engine import resolve_model
from ringserve.text_segments import TextSegments
from ringserve.tokenizer import Tokenizer
from tests.ringserve.small_tokenizers import CORPUS, write_byte_level, write_sentencepiece

PATTERNS = {
    # How open models split text before merging, as their tokenizer.json files have it.
    "gpt2": None,
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
             r"|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
             r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
             r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
             r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
             r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CODE = ["def f(x):\n    return x\n\nclass A:\n\tpass\n", "# a comment\nimport os\r\nprint('it''s', 12345)\n",
        "über\nstraße\n日本語\n中文\n"]
LINES = st.lists(st.one_of(
    st.sampled_from(["a", "It's", "it's ", " x", "\t", "", " ", "12", "{", "!!", "中文", "é", "<|end|>", "…", "\r",
                     "x\u0301", "a b", "  if x", "the end ", " of it", "²"]),
    st.text(max_size=12)), max_size=40).map("\n".join)


def backend(pattern: str | None, **kinds: Any) -> Any:
    made = Backend(models.BPE())
    if pattern is None:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        made.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([*CORPUS, *CODE], trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"],
        show_progress=False))
    return made


@pytest.fixture(scope="module")
def backends() -> dict[str, Any]:
    return {name: backend(pattern) for name, pattern in PATTERNS.items()}


@pytest.fixture(scope="module", params=PATTERNS)
def short_segments(request: pytest.FixtureRequest, backends: dict[str, Any]) -> TextSegments:
    segments = TextSegments(backends[request.param], segment=3, most_remembered=1000)
    assert segments.can_cut
    return segments


@given(text=LINES, as_text=st.booleans())
def test_pieces_give_the_ids_of_the_whole(text: str, as_text: bool, short_segments: TextSegments) -> None:
    segments, tokenizer = short_segments, short_segments._backend
    try:
        tokenizer.encode_special_tokens = as_text
        wanted = tokenizer.encode(text, add_special_tokens=False).ids
        assert list(segments.encode(text)) == wanted
        assert list(segments.encode(text)) == wanted  # what is remembered is as good
    finally:
        tokenizer.encode_special_tokens = False


def test_the_embedded_model_and_its_like_can_be_cut_and_sentencepiece_cannot(tmp_path: Path) -> None:
    assert TextSegments(Tokenizer(resolve_model("needle")).backend).can_cut
    assert TextSegments(Tokenizer(str(write_byte_level(tmp_path / "byte"))).backend).can_cut
    pieces = TextSegments(Tokenizer(str(write_sentencepiece(tmp_path / "pieces"))).backend, segment=2)
    assert not pieces.can_cut, "each piece would begin with a space"
    assert pieces._pieces("a\nb c\nd e") == ["a\nb c\nd e"]


def _with(tokenizer: Any, **changes: Any) -> Any:
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize("why", ["a token over the end of a line", "a pattern that joins lines", "strips", "swallows",
                                 "an added token over the end of a line", "prepends", "an added token over a space",
                                 "a token over a space", "swallows what follows"])
def test_what_is_not_independent_is_not_cut(why: str, backends: dict[str, Any]) -> None:
    tokenizer = Backend.from_str(backends["gpt2"].to_str())
    if why == "a token over the end of a line":
        state = json.loads(tokenizer.to_str())
        state["model"]["vocab"]["Ċa"] = len(state["model"]["vocab"])
        tokenizer = Backend.from_str(json.dumps(state))
    elif why == "a pattern that joins lines":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"\s?\p{L}+|\s+|[^\s\p{L}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        state = json.loads(tokenizer.to_str())
        state["model"]["vocab"]["ĊZ"] = len(state["model"]["vocab"])
        state["model"]["merges"].append(["Ċ", "Z"])
        tokenizer = Backend.from_str(json.dumps(state))
    elif why == "strips":
        tokenizer.normalizer = normalizers.Strip()
    elif why == "prepends":
        tokenizer.normalizer = normalizers.Prepend("a")
    elif why == "a token over a space":
        state = json.loads(tokenizer.to_str())
        state["model"]["vocab"]["aĠb"] = len(state["model"]["vocab"])
        tokenizer = Backend.from_str(json.dumps(state))
    elif why == "an added token over a space":
        tokenizer.add_tokens([AddedToken("New York", normalized=False)])
    elif why == "swallows what follows":
        tokenizer.add_tokens([AddedToken("assistant", rstrip=True)])
    elif why == "swallows":
        tokenizer.add_tokens([AddedToken("assistant", lstrip=True)])
    else:
        tokenizer.add_tokens([AddedToken("end\nof", normalized=False)])
    assert not TextSegments(tokenizer).can_cut


def test_what_was_seen_is_not_tokenized_again(backends: dict[str, Any]) -> None:
    class Counting:
        encode_special_tokens = False
        characters = 0

        def encode(self, text: str, add_special_tokens: bool) -> Any:
            self.characters += len(text)
            return backends["gpt2"].encode(text, add_special_tokens=add_special_tokens)

    counting = Counting()
    segments = TextSegments(counting, segment=100, most_remembered=20_000)
    segments.__dict__["can_cut"] = True
    book = "".join(f"line {i} of a book\nand more of it\n" for i in range(400))
    wanted = [array("I", backends["gpt2"].encode(book + question, add_special_tokens=False).ids)
              for question in ("who?", "where?")]
    assert segments.encode(book + "who?") == wanted[0]
    first = counting.characters
    assert segments.encode(book + "where?") == wanted[1]
    assert first == len(book) + 4 and counting.characters - first < 250, "only the last piece is new"
    before = counting.characters
    assert segments.encode(book, tenant="another") and counting.characters == before + len(book), "not for others"
    for number in range(10):
        segments.encode("".join(f"another {number} {i}\n" for i in range(1000)))
        assert segments._remembered == sum(len(piece) for *_, piece in segments._known) <= 20_000
    segments.encode(book)
    assert counting.characters > 2 * len(book), "what was forgotten is done again"


def test_a_prompt_keeps_what_stands_around_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer(str(write_byte_level(tmp_path)))
    text = "".join(f"line {i}\nof text\n" for i in range(4000))
    assert len(text) > 1 << 15
    assert list(tokenizer.encode(text)) == tokenizer.backend.encode(text).ids
    assert list(tokenizer.encode(text, allow_special=False)) == tokenizer.backend.encode(
        text, add_special_tokens=False).ids


@given(text=LINES, cuts=st.lists(st.integers(0, 200), max_size=4))
def test_parts_that_come_one_after_the_other_give_the_ids_of_the_whole(
        text: str, cuts: list[int], short_segments: TextSegments) -> None:
    ids, rest, start = array("I"), "", 0
    for stop in sorted({min(c, len(text)) for c in cuts}):
        rest, start = rest + text[start:stop], stop
        cut = short_segments.cut(rest)
        ids += short_segments.encode(rest[:cut])
        rest = rest[cut:]
    ids += short_segments.encode(rest + text[start:])
    assert list(ids) == short_segments._backend.encode(text, add_special_tokens=False).ids
