"""Texts to ids and back, chats as the checkpoint's template has them, and special tokens that stay text."""

from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ringserve.errors import CheckpointError, InvalidValueError
from ringserve.tokenizer import Tokenizer
from tests.ringserve.small_tokenizers import SPECIAL, WRITERS

QUICK = settings(max_examples=80, deadline=None)
KINDS = list(WRITERS)

contents = st.text(max_size=40)
special_contents = st.lists(st.one_of(st.sampled_from([*SPECIAL, "\U000F0000", " ", "\n"]), st.text(max_size=6)),
                            max_size=6).map("".join)


def conversations(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, str]]]:
    return st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": content}),
                    min_size=1, max_size=3)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write(tmp_path_factory.mktemp("tokenizer")) for kind, write in WRITERS.items()}


@pytest.fixture(scope="module")
def ours(directories: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer(str(directory)) for kind, directory in directories.items()}


@pytest.fixture(scope="module")
def theirs(directories: dict[str, Path]) -> dict[str, Any]:
    return {kind: AutoTokenizer.from_pretrained(directory) for kind, directory in directories.items()}


def ids_of(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(messages=conversations(contents), prompt=st.booleans())
def test_chats_equal_transformers(
        kind: str, messages: list[dict[str, str]], prompt: bool, ours: dict[str, Tokenizer],
        theirs: dict[str, Any]) -> None:
    encoded = ours[kind].encode_chat(messages, add_generation_prompt=prompt)
    assert isinstance(encoded, array) and encoded.typecode == "I"
    assert list(encoded) == ids_of(theirs[kind], messages, add_generation_prompt=prompt)


@pytest.mark.parametrize("kind", KINDS)
def test_a_final_message_can_be_continued(kind: str, ours: dict[str, Tokenizer], theirs: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the quick"}]
    encoded = ours[kind].encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert list(encoded) == ids_of(theirs[kind], messages, continue_final_message=True)
    hidden = [*messages[:1], {"role": "assistant", "content": "the <|end|>"}]
    continued = ours[kind].encode_chat(hidden, add_generation_prompt=False, continue_final_message=True)
    assert ours[kind].decode(continued, False).endswith("<|assistant|>the <|end|>")


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(messages=conversations(special_contents))
def test_special_texts_inside_a_message_stay_text(
        kind: str, messages: list[dict[str, str]], ours: dict[str, Tokenizer]) -> None:
    """Special tokens stand only where the template put them, and the text is the template's to the letter."""
    tokenizer = ours[kind]
    encoded = tokenizer.encode_chat(messages)
    special = [tokenizer.token_text(i) for i in encoded if tokenizer.token_text(i) in SPECIAL]
    roles = [f"<|{message['role']}|>" for message in messages]
    assert special == [token for role in roles for token in (role, "<|end|>")] + ["<|assistant|>"]
    rendered = "".join(f"{role}{m['content']}<|end|>" for role, m in zip(roles, messages)) + "<|assistant|>"
    assert tokenizer.decode(encoded, skip_special_tokens=False) == rendered


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_beside_a_special_text_is_tokenized_as_always(
        kind: str, ours: dict[str, Tokenizer], theirs: dict[str, Any]) -> None:
    """No extra space in front, no other pieces, in the messages without special texts."""
    plain = {"role": "user", "content": "hello world"}
    hidden = {"role": "user", "content": "a <|end|> b"}
    expected = ids_of(theirs[kind], [plain])
    assert list(ours[kind].encode_chat([plain, hidden], add_generation_prompt=False))[:len(expected)] == expected


def test_a_placeholder_in_another_message_is_not_taken_for_a_special_text(ours: dict[str, Tokenizer]) -> None:
    messages = [{"role": "user", "content": "<s>"}, {"role": "user", "content": "\U000F0000<s>"}]
    text = ours["byte-level"].decode(ours["byte-level"].encode_chat(messages), skip_special_tokens=False)
    assert text == "<|user|><s><|end|><|user|>\U000F0000<s><|end|><|assistant|>"


def test_special_tokens_swallow_the_blanks_that_they_do_in_transformers(
        tmp_path: Path, directories: dict[str, Path]) -> None:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    backend = Backend.from_file(str(directories["byte-level"] / "tokenizer.json"))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=[
        AddedToken("<|turn|>", lstrip=True, rstrip=True, special=True)])
    fast.chat_template = "{% for m in messages %}a  <|turn|>  {{ m.content }}{% endfor %}"
    fast.save_pretrained(tmp_path)
    encoded = Tokenizer(str(tmp_path)).encode_chat([{"role": "user", "content": "b<s>"}])
    assert Tokenizer(str(tmp_path)).decode(encoded, skip_special_tokens=False) == "a<|turn|>b<s>"


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(text=contents)
def test_plain_text_survives(kind: str, text: str, ours: dict[str, Tokenizer]) -> None:
    encoded = ours[kind].encode(text, allow_special=False)
    decoded = ours[kind].decode(encoded, skip_special_tokens=False)
    if kind == "sentencepiece":  # it writes a space before a first word, and strips one
        assert decoded in (text, text[1:])
    else:
        assert decoded == text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_of_a_whole_prompt_are_recognised_only_when_allowed(
        kind: str, ours: dict[str, Tokenizer]) -> None:
    end = ours[kind].backend.token_to_id("<|end|>")
    assert end in ours[kind].encode("hello<|end|>")
    assert end not in ours[kind].encode("hello<|end|>", allow_special=False)
    assert end in ours[kind].encode("hello<|end|>"), "the setting of one call must not stay"


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(text=contents)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(
        kind: str, text: str, ours: dict[str, Tokenizer]) -> None:
    tokenizer = ours[kind]
    encoded = tokenizer.encode(text, allow_special=False)
    data = b"".join(tokenizer.token_bytes(token) for token in encoded)
    if kind == "byte-level":
        assert data == text.encode()
    else:
        assert data.replace(b" ", b"") == text.encode().replace(b" ", b"")


def test_token_bytes_of_special_and_unknown_tokens(ours: dict[str, Tokenizer]) -> None:
    tokenizer = ours["byte-level"]
    assert tokenizer.token_bytes(tokenizer.backend.token_to_id("<|end|>")) == b"<|end|>"
    assert tokenizer.token_bytes(10**6) == b""
    sentencepiece = ours["sentencepiece"]
    assert sentencepiece.token_bytes(sentencepiece.backend.token_to_id("<0xE2>")) == b"\xe2"


def test_a_template_that_refuses_says_why(ours: dict[str, Tokenizer]) -> None:
    with pytest.raises(InvalidValueError, match="no tools here") as refused:
        ours["byte-level"].encode_chat([{"role": "tool", "content": "x"}])
    assert refused.value.param == "messages"


def test_without_a_template_there_is_no_chat(tmp_path: Path, directories: dict[str, Path]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directories["byte-level"] / name).read_bytes())
    with pytest.raises(InvalidValueError, match="no chat template"):
        Tokenizer(str(tmp_path)).encode_chat([{"role": "user", "content": "x"}])


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Tokenizer(str(tmp_path))
