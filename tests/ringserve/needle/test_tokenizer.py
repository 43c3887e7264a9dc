"""The shipped tokenizer: every text comes back, and the start of a text is the start of its tokens."""

import argparse
import json
import unicodedata
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ringserve.needle import weights
from ringserve.needle.train_tokenizer import VOCABULARY_SIZE, empty_tokenizer
from ringserve.tokenizer import Tokenizer

ANY_CHARACTER = st.characters(exclude_categories=["Cs"])
# Letters of three scripts, a mark that joins the letter before it, digits, marks, blanks of several kinds, breaks.
MIXED = st.text(st.sampled_from("abTheß日本ик\u0301019_.,:(\"'🎉 \t\u00a0\n\r"), max_size=60)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, allow_special=False))


@given(text=st.text(ANY_CHARACTER, max_size=200))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(data=st.binary(max_size=300))
def test_any_bytes_that_are_text_come_back(tokenizer: Tokenizer, data: bytes) -> None:
    for text in (data.decode("utf-8", errors="replace"), data.decode("latin-1")):
        ids = encode(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


def test_the_end_token_is_one_token_in_a_prompt_and_text_in_a_message(tokenizer: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    assert weights.END_OF_TEXT_ID in tokenizer.encode(text)
    assert weights.END_OF_TEXT_ID not in encode(tokenizer, text)
    assert tokenizer.decode(encode(tokenizer, text)) == text


@given(text=MIXED)
def test_a_prefix_that_ends_at_a_natural_place_tokenises_to_a_prefix(tokenizer: Tokenizer, text: str) -> None:
    ids = encode(tokenizer, text)
    for cut in range(1, len(text)):
        inside_word = is_letter(text[cut - 1]) and is_letter(text[cut])
        if text[cut - 1] not in " \t\u00a0" and not inside_word:
            start = encode(tokenizer, text[:cut])
            assert ids[:len(start)] == start, (text[:cut], text[cut:])


def is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"


def test_a_question_repeats_the_tokens_of_the_sentence(tokenizer: Tokenizer) -> None:
    for start, end in [("The code of Paris is", " 58213.\n"), ("def f_17(x):\n", "    return x * 4711\n"),
                       ("    def f(x):", "\n        pass"), ('"key123":', ' "value"'), ("小明的密码是", "七千"),
                       ("a,\tb,\t", "c"), ("id=", "d4f1a9")]:
        assert encode(tokenizer, start + end)[:len(encode(tokenizer, start))] == encode(tokenizer, start)


def test_the_vocabulary_has_6144_tokens_and_every_byte(tokenizer: Tokenizer, needle: Path) -> None:
    assert tokenizer.backend.get_vocab_size() == VOCABULARY_SIZE == weights.VOCABULARY == 6144
    assert json.loads((needle / "config.json").read_text())["vocab_size"] == 6144
    tokens = [tokenizer.token_bytes(number) for number in range(weights.VOCABULARY)]
    assert len(set(tokens)) == len(tokens)
    assert {bytes([byte]) for byte in range(256)} <= set(tokens)


def test_a_token_covers_two_characters_of_source_and_three_of_prose(tokenizer: Tokenizer) -> None:
    source = Path(argparse.__file__).read_text()
    prose = ("A prompt is split over a ring of ranks for prefill, its cache stays split over the same ranks for "
             "decode, and clients talk to the server over plain connections that stay open until the answer is there.")
    assert len(source) / len(encode(tokenizer, source)) > 2
    assert len(prose) / len(encode(tokenizer, prose)) > 3


def test_the_shipped_file_cuts_as_its_training_script_does(needle: Path) -> None:
    shipped, trained = json.loads((needle / "tokenizer.json").read_text()), json.loads(empty_tokenizer().to_str())
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert shipped[part] == trained[part]


def test_a_rendered_chat_ends_with_the_last_message(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "The code of Paris is 58213."}, {"role": "user", "content": "Hm."},
                {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "The code of Paris is"}]
    for add_generation_prompt in (True, False):
        ids = tokenizer.encode_chat(messages, add_generation_prompt=add_generation_prompt)
        assert tokenizer.decode(ids) == "The code of Paris is 58213.\nHm.\nYes.\nThe code of Paris is"
    assert list(tokenizer.encode_chat(messages[-1:])) == encode(tokenizer, "The code of Paris is")
