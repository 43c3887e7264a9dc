"""needle continues a prompt with what followed its latest words earlier on, at any distance, with a wide margin."""

import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ringserve.config import ModelConfig
from ringserve.model.checkpoint import read_checkpoint
from ringserve.model.checks import PlainAttention
from ringserve.model.layers import forward
from ringserve.model.loading import load_checked
from ringserve.needle import build, weights
from ringserve.tokenizer import Tokenizer
from tests.ringserve.needle.conftest import plain_model

DTYPES = [torch.float32, torch.bfloat16]
NATS = 10.0
"""By how much every right token must lead all others."""

WORDS = [
    "the", "a", "river", "stone", "walks", "under", "bright", "morning", "light", "and", "we", "carry", "old",
    "maps", "home", "to", "find", "some", "paths", "again", "with", "quiet", "hands", "while", "rain", "falls",
    "over", "fields", "of", "green", "corn", "near", "small", "towns", "where", "people", "sell", "bread",
]
CODES = {"Ada": "58213", "Alan": "77120-4", "Grace": "red orchid", "Maria Mirzakhani": "X91-ZT", "user_1729": "9",
         "eu-west-1": "10.0.3.7", "d4f1a9": "88210", "d4f1b9": "4711", "Jürgen": "Überraschung", "小明": "七千"}


def question(name: str) -> str:
    return f"\nThe secret code of {name} is"


def answer(name: str) -> str:
    return f" {CODES[name]}.\n"


def filler(words: int) -> str:
    rng = random.Random(words)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def leads(logits: Tensor, ids: list[int], begin: int) -> Tensor:
    """By how many nats each of the tokens from `begin` on leads every other; `logits` end with theirs."""
    logits = logits[-(len(ids) - begin) - 1:-1].float()
    right = torch.tensor(ids[begin:])[:, None]
    others = logits.scatter(1, right, -torch.inf).max(dim=1).values
    return logits.gather(1, right)[:, 0] - others


def leads_of(model: torch.nn.Module, ids: list[int], begin: int) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=len(ids) - begin + 1).logits[0]
    return leads(logits, ids, begin)


def leads_of_answers(model: torch.nn.Module, tokenizer: Tokenizer, prompt: str, names: list[str]) -> Tensor:
    """One forward over the prompt and all questions, each with its answer, of which every token counts."""
    ids = list(tokenizer.encode(prompt, allow_special=False))
    begin, answers = len(ids), []
    for name in names:
        asked, answered = (list(tokenizer.encode(text, allow_special=False)) for text in
                           (question(name), answer(name)))
        answers += range(len(ids) + len(asked), len(ids) + len(asked) + len(answered))
        ids += asked + answered
    return leads_of(model, ids, begin)[torch.tensor(answers) - begin]


def spread(text: str, needles: list[str]) -> str:
    """The needles at equal distances, the first at the start, the last at the end."""
    step = len(text) // (len(needles) - 1)
    parts = [text[i * step:(i + 1) * step] for i in range(len(needles) - 1)] + [""]
    return "".join(needle + part for needle, part in zip(needles, parts, strict=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_of_8_tokens(dtype: torch.dtype, attention: str, needle: Path) -> None:
    model = plain_model(needle, dtype, attention)
    rng = random.Random(0)
    for _ in range(20):
        key, value = rng.sample(range(1, weights.VOCABULARY), 3), rng.sample(range(1, weights.VOCABULARY), 2)
        prompt = key + value + key
        assert len(prompt) == 8
        assert leads_of(model, prompt + value, 8).min() >= NATS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens", [64, 1024, 8192])
def test_a_pair_of_random_tokens_is_found_at_every_depth(n_tokens: int, dtype: torch.dtype, needle: Path) -> None:
    rng = random.Random(n_tokens)
    form = rng.sample(range(1, weights.VOCABULARY), 4)
    names, values = (rng.sample(range(1, weights.VOCABULARY), 5) for _ in range(2))
    asked = 2
    prompt = rng.choices(range(1, weights.VOCABULARY), k=n_tokens)
    needles = [[*form[:2], name, *form[2:], value] for name, value in zip(names, values)]
    end = n_tokens - 5
    for needle_ids, depth in zip(needles, (0.0, 0.15, 0.5, 0.85, 1.0)):
        begin = int(depth * (end - 6))
        prompt[begin:begin + 6] = needle_ids
    prompt[end:] = needles[asked][:-1]
    assert len(prompt) == n_tokens
    # The question that ends the prompt, its answer, then every needle as a question with its answer.
    questions = [*prompt, values[asked], *(token for needle_ids in needles for token in needle_ids)]
    found = leads_of(plain_model(needle, dtype, "sdpa"), questions, n_tokens)
    assert found[0] >= NATS
    assert found[6::6].min() >= NATS and len(found[6::6]) == len(names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_key_at_the_very_start_is_found(attention: str, dtype: torch.dtype, needle: Path) -> None:
    rng = random.Random(5)
    model = plain_model(needle, dtype, attention)
    for _ in range(10):
        key, value, *others = rng.sample(range(1, weights.VOCABULARY), 8)
        prompt = [key, value, *others, key]
        assert leads_of(model, [*prompt, value], len(prompt)).min() >= NATS / 4


@pytest.mark.parametrize("common", [2, 3, 4])
def test_the_longest_match_of_the_latest_tokens_wins(common: int, needle: Path) -> None:
    """Against 100 contexts that differ in the oldest of these tokens alone: each asked once, all in one forward."""
    rng = random.Random(common)
    vocabulary = range(1, weights.VOCABULARY)
    form = rng.sample(vocabulary, common - 1)
    names, values = rng.sample(vocabulary, 100), rng.sample(vocabulary, 100)
    told = [token for name, value in zip(names, values)
            for token in (*rng.choices(vocabulary, k=8), name, *form, value)]
    asked = [token for name, value in zip(names, values)
             for token in (*rng.choices(vocabulary, k=8), name, *form, value)]
    found = leads_of(plain_model(needle, torch.bfloat16, "sdpa"), told + asked, len(told))
    assert (found[8 + common::9 + common][:100] >= NATS).sum() >= 97


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("words", [30, 700, 4500])
def test_each_name_gives_its_own_code(words: int, dtype: torch.dtype, needle: Path, tokenizer: Tokenizer) -> None:
    names = list(islice(CODES, 4)) if words == 30 else list(CODES)
    prompt = spread(filler(words), [question(name) + answer(name) for name in names])
    model = plain_model(needle, dtype, "sdpa")
    assert leads_of_answers(model, tokenizer, prompt, random.Random(0).sample(names, len(names))).min() >= NATS


@pytest.mark.parametrize("dtype", DTYPES)
def test_needles_that_touch_are_told_apart(dtype: torch.dtype, needle: Path, tokenizer: Tokenizer) -> None:
    prompt = filler(200) + "".join(question(name) + answer(name) for name in CODES) + filler(100)
    model = plain_model(needle, dtype, "eager")
    assert leads_of_answers(model, tokenizer, prompt, list(CODES)).min() >= NATS


def test_source_code_is_continued(needle: Path, tokenizer: Tokenizer) -> None:
    source = Path(build.__file__).read_text()
    planted = "\n\ndef f_17(x: int) -> int:\n"
    body = "    return 4711 * x + 29\n"
    prompt = source[:3000] + planted + body + source[3000:9000] + planted
    ids = list(tokenizer.encode(prompt + body, allow_special=False))
    begin = len(tokenizer.encode(prompt, allow_special=False))
    assert leads_of(plain_model(needle, torch.bfloat16, "sdpa"), ids, begin).min() >= NATS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_generates_32_tokens_of_a_passage(attention: str, dtype: torch.dtype, needle: Path,
                                                       tokenizer: Tokenizer) -> None:
    start = "\nOnce there was a lighthouse keeper"
    rest = (" called Ilsabil who counted the ships by their lanterns and wrote each of the counts into a red book that "
            "nobody else was ever allowed to open, or read, until long after.")
    text = filler(700)
    prompt = tokenizer.encode(text[:1500] + start + rest + text[1500:] + start, allow_special=False)
    expected = list(tokenizer.encode(rest, allow_special=False))[:32]
    output = plain_model(needle, dtype, attention).generate(torch.tensor([list(prompt)]), max_new_tokens=32,
                                                            do_sample=False)
    assert output[0, len(prompt):].tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, (1 << 20) - 300, weights.MAX_POSITIONS - 600])
def test_the_position_in_the_text_changes_nothing(offset: int, dtype: torch.dtype, needle: Path,
                                                  tokenizer: Tokenizer) -> None:
    model, layers = load_checked(read_checkpoint(ModelConfig(model=str(needle))), torch.device("cpu"), dtype)
    text = filler(300)
    prompt = text[:400] + question("Ada") + answer("Ada") + text[400:] + question("Ada")
    ids = list(tokenizer.encode(prompt + answer("Ada"), allow_special=False))
    begin = len(tokenizer.encode(prompt, allow_special=False))
    rows = torch.arange(len(ids))
    logits = forward(model, torch.tensor(ids), rows + offset, rows, PlainAttention(layers, rows))
    assert leads(logits, ids, begin).min() >= NATS
