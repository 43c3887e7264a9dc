"""Streaming text: the pieces are the whole, no character is ever broken, and stop strings stop."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringserve.detokenizer import MOST_PENDING, REPLACEMENT, Detokenizer
from ringserve.sampling_params import SamplingParams
from ringserve.tokenizer import Tokenizer
from tests.ringserve.small_tokenizers import SPECIAL, WRITERS

QUICK = settings(max_examples=80, deadline=None)
KINDS = list(WRITERS)

texts = st.lists(st.one_of(st.text(max_size=5), st.sampled_from(
    ["hello", " world", "  ", "\n", "日本語", "😀", "👨‍👩‍👧", "é", REPLACEMENT, "▁", "é́"])), max_size=8).map("".join)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {kind: Tokenizer(str(write(tmp_path_factory.mktemp("tokenizer")))) for kind, write in WRITERS.items()}


def stream(tokenizer: Tokenizer, prompt: list[int], output: list[int], cuts: list[int] | None = None,
           **params: object) -> tuple[list[str], Detokenizer]:
    """The pieces of text, fed one token at a time or in the pieces between `cuts`; the last is what was held."""
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams(max_tokens=None, **params))  # type: ignore[arg-type]
    edges = range(len(output) + 1) if cuts is None else sorted({0, len(output), *(c % (len(output) + 1) for c in cuts)})
    pieces = [detokenizer.add(output[start:stop]) for start, stop in pairwise(edges)]
    return [*pieces, detokenizer.finish()], detokenizer


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(text=texts, cuts=st.lists(st.integers(0, 200), max_size=6))
def test_the_pieces_are_the_whole_whatever_the_cuts(
        kind: str, text: str, cuts: list[int], tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    output = list(tokenizer.encode(text, allow_special=False))
    whole = tokenizer.decode(output)
    assert "".join(stream(tokenizer, [], output)[0]) == whole
    assert "".join(stream(tokenizer, [], output, cuts)[0]) == whole


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(before=texts, after=texts)
def test_an_answer_is_what_it_adds_to_its_prompt(
        kind: str, before: str, after: str, tokenizers: dict[str, Tokenizer]) -> None:
    """Also after a prompt that ends with U+FFFD, and without a word of the prompt."""
    tokenizer = tokenizers[kind]
    ids = list(tokenizer.encode(before + after, allow_special=False))
    for cut in range(len(ids) + 1):
        start = tokenizer.decode(ids[:cut], False)
        if tokenizer.encode(start, False).tolist() != ids[:cut]:
            continue  # the cut goes through a character
        assert start + "".join(stream(tokenizer, ids[:cut], ids[cut:])[0]) == tokenizer.decode(ids, False)


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(text=texts.filter(lambda text: REPLACEMENT not in text))
def test_no_piece_ever_breaks_a_character(kind: str, text: str, tokenizers: dict[str, Tokenizer]) -> None:
    output = list(tokenizers[kind].encode(text, allow_special=False))
    assert not any(REPLACEMENT in piece for piece in stream(tokenizers[kind], [], output)[0])


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(data=st.data())
def test_any_tokens_give_some_text(kind: str, data: st.DataObject, tokenizers: dict[str, Tokenizer]) -> None:
    """A model may write bytes that make no character: no error, and for byte-level tokens still the whole."""
    tokenizer = tokenizers[kind]
    ids = st.lists(st.integers(0, tokenizer.backend.get_vocab_size() - 1), max_size=12)
    prompt, output = data.draw(ids), data.draw(ids)
    text = "".join(stream(tokenizer, prompt, output, skip_special_tokens=data.draw(st.booleans()))[0])
    if kind == "byte-level":
        alone = "".join(stream(tokenizer, [], output, skip_special_tokens=False)[0])
        assert alone == tokenizer.decode(output, False)
    assert len(text) <= len(tokenizer.decode(prompt[-8:] + output, False)) + len(output)


def test_a_character_over_the_edge_of_the_prompt_belongs_to_the_answer(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
    ids = list(tokenizer.encode("ab😀cd", allow_special=False))
    inside = next(i for i in range(len(ids)) if tokenizer.decode(ids[:i]).endswith(REPLACEMENT))
    assert "".join(stream(tokenizer, ids[:inside], ids[inside:])[0]) == "😀cd"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [REPLACEMENT * 300, "ab" + REPLACEMENT * 200 + "😀", "😀" * 100])
def test_long_runs_of_odd_characters_stream_and_stay_whole(
        kind: str, text: str, tokenizers: dict[str, Tokenizer]) -> None:
    """A model that repeats U+FFFD for ever must neither hold back everything nor take ever longer."""
    tokenizer = tokenizers[kind]
    output = list(tokenizer.encode(text, allow_special=False))
    assert "".join(stream(tokenizer, [], output)[0]) == text
    detokenizer = Detokenizer(tokenizer, [], SamplingParams(max_tokens=None))
    for token in output:
        detokenizer.add([token])
        assert len(detokenizer._window) <= 2 * MOST_PENDING + 8
    assert len(detokenizer.finish()) <= MOST_PENDING


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_skipped_unless_wanted(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    special = [tokenizer.backend.token_to_id(token) for token in SPECIAL]
    words = list(tokenizer.encode("hello world", allow_special=False))
    output = [*words[:2], *special * 50, *words[2:]]
    assert "".join(stream(tokenizer, [], output)[0]) == tokenizer.decode(output) == "hello world"
    detokenizer = Detokenizer(tokenizer, words, SamplingParams())
    detokenizer.add(special * 50)
    assert len(detokenizer._window) <= len(words), "what is skipped is not kept"
    shown = "".join(stream(tokenizer, [], output, skip_special_tokens=False)[0])
    assert shown == tokenizer.decode(output, False) and shown.count("<|end|>") == 50


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(text=texts, stops=st.lists(st.text("helo wrd日é", min_size=1, max_size=4), min_size=1, max_size=3),
       include=st.booleans(), cuts=st.lists(st.integers(0, 200), max_size=4))
def test_stop_strings_stop_at_the_first_that_is_complete(
        kind: str, text: str, stops: list[str], include: bool, cuts: list[int],
        tokenizers: dict[str, Tokenizer]) -> None:
    """Across tokens, and the same however the text is cut."""
    tokenizer = tokenizers[kind]
    output = list(tokenizer.encode(text, allow_special=False))
    whole = tokenizer.decode(output)
    for edges in (None, cuts):
        pieces, detokenizer = stream(tokenizer, [], output, edges, stop=tuple(stops),
                                     include_stop_str_in_output=include)
        found = [(whole.find(stop) + len(stop), whole.find(stop), stop) for stop in stops if stop in whole]
        if not found:
            assert detokenizer.stop is None and "".join(pieces) == whole
            continue
        end, start, stop = min(found)
        assert detokenizer.stop == stop
        assert "".join(pieces) == whole[:end if include else start]


def test_a_stop_string_inside_a_longer_one_is_complete_first_also_within_a_token(
        tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
    word = max((token for token in tokenizer.backend.get_vocab() if token.isalpha() and token.isascii()), key=len)
    assert len(word) >= 4
    letters = [tokenizer.backend.token_to_id(letter) for letter in word]
    for output in ([tokenizer.backend.token_to_id(word)], letters):
        pieces, detokenizer = stream(tokenizer, [], output, stop=(word, word[1:3]))
        assert ("".join(pieces), detokenizer.stop) == (word[0], word[1:3])


def fed(tokenizer: Tokenizer, text: str, **params: object) -> tuple[list[str], Detokenizer]:
    return stream(tokenizer, [], [tokenizer.backend.token_to_id(c.replace(" ", "Ġ")) for c in text], **params)


def test_text_that_may_begin_a_stop_string_is_held_back_and_released(tokenizers: dict[str, Tokenizer]) -> None:
    pieces, detokenizer = fed(tokenizers["byte-level"], "a enough end", stop=("end.",))
    assert pieces[:5] == ["a", " ", "", "", "eno"]
    assert "".join(pieces) == "a enough end" and pieces[-1] == "end"
    assert detokenizer.stop is None


def test_nothing_comes_after_a_stop_string(tokenizers: dict[str, Tokenizer]) -> None:
    pieces, detokenizer = fed(tokenizers["byte-level"], "one two three", stop=("two",))
    assert "".join(pieces) == "one " and detokenizer.stop == "two"
    assert detokenizer.add(tokenizers["byte-level"].encode("more")) == "" and detokenizer.finish() == ""


def test_a_stop_string_may_come_with_the_text(tokenizers: dict[str, Tokenizer]) -> None:
    pieces, _ = fed(tokenizers["byte-level"], "one two three", stop=("two",), include_stop_str_in_output=True)
    assert "".join(pieces) == "one two"


@pytest.mark.parametrize(("least", "expected"), [(0, "a"), (3, "a"), (4, "axxbb"), (7, "axxbb"), (8, "axxbbxxc")])
def test_stop_strings_before_min_tokens_are_text(
        least: int, expected: str, tokenizers: dict[str, Tokenizer]) -> None:
    """One that is complete before there are that many tokens does not count, not even later."""
    pieces, _ = fed(tokenizers["byte-level"], "axxbbxxc", stop=("xx",), min_tokens=least)
    assert "".join(pieces) == expected


def test_a_stop_string_found_in_what_was_pending_at_the_end(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
    output = list(tokenizer.encode("ab😀", allow_special=False))[:-1]
    pieces, detokenizer = stream(tokenizer, [], output, stop=(REPLACEMENT,))
    assert "".join(pieces) == "ab" and detokenizer.stop == REPLACEMENT
