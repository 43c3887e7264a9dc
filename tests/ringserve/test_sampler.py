"""The sampler: never outside what was asked for, distributed as asked, and a pure function of its inputs."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringserve.model.sampler import SampleInput, choose, sample
from ringserve.plan import NewRequest, SampledTokens
from ringserve.sampling_params import SamplingParams

V = 12
ENDS = (2, 5)
QUICK = settings(max_examples=60, deadline=None)


def row(prompt: list[int] | None = None, output: list[int] | None = None, *, seed: int = 0, handle: int = 1,
        **params: Any) -> SampleInput:
    prompt, output = [1, 3] if prompt is None else prompt, output or []
    new = NewRequest(handle, SamplingParams(max_tokens=100, **params), seed, ENDS, len(prompt))
    return SampleInput(new, torch.tensor(prompt + output, dtype=torch.int64))


def logits_of(seed: int) -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 2


def one(logits_V: Tensor, given_row: SampleInput) -> int:
    [sampled] = sample(logits_V[None], [given_row])
    [token] = sampled.token_ids
    return token


def draws(logits_V: Tensor, count: int, **params: Any) -> Tensor:
    """How often each token comes, over that many seeds."""
    tokens = [one(logits_V, row(seed=seed, **params)) for seed in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits_V))


def chi_square(counts_V: Tensor, probabilities_V: Tensor) -> float:
    expected = probabilities_V * counts_V.sum()
    likely = expected >= 5
    return float(((counts_V - expected)[likely] ** 2 / expected[likely]).sum() / (int(likely.sum()) - 1))


CHI_SQUARE_BOUND = 3.0
"""Per degree of freedom; with about 10 of them, chance exceeds it once in a thousand: seeds are fixed."""


@QUICK
@given(st.integers(0, 999))
def test_greedy_takes_the_best(seed: int) -> None:
    logits = logits_of(seed)
    assert one(logits, row(temperature=0)) == int(logits.argmax())
    assert one(logits, row(temperature=0, repetition_penalty=1.0000001)) == int(logits.argmax())


@QUICK
@given(st.integers(0, 999), st.integers(0, 10**6), st.sampled_from([1e-300, 1e-40, 1e-6, 1e-3]))
def test_a_tiny_temperature_is_greedy_and_not_nan(logits_seed: int, seed: int, temperature: float) -> None:
    logits = logits_of(logits_seed)
    best, second = logits.topk(2).values.tolist()
    assume(best - second > 50 * temperature)  # else the second is a fair draw now and then
    assert one(logits, row(seed=seed, temperature=temperature)) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = logits_of(3)
    expected = torch.softmax(logits.double() / temperature, -1)
    assert chi_square(draws(logits, 3000, temperature=temperature), expected) < CHI_SQUARE_BOUND


@pytest.mark.parametrize(("params", "kept"), [
    ({"top_k": 4}, 4), ({"top_p": 0.8}, None), ({"min_p": 0.1}, None), ({"top_k": 6, "top_p": 0.7}, None)])
def test_what_is_cut_off_never_comes_and_the_rest_keeps_its_proportions(
        params: dict[str, Any], kept: int | None) -> None:
    logits = logits_of(8)
    support = allowed(logits, **params)
    assert kept is None or len(support) == kept
    probabilities = torch.zeros(V, dtype=torch.float64)
    probabilities[sorted(support)] = torch.softmax(logits[sorted(support)].double(), -1)
    counts = draws(logits, 3000, **params)
    assert set(counts.nonzero().flatten().tolist()) <= support
    assert chi_square(counts, probabilities) < CHI_SQUARE_BOUND


def allowed(logits_V: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
            temperature: float = 1.0) -> set[int]:
    """The tokens that may come, written as the definitions: min-p, then top-k, then top-p of what is left."""
    scaled = (logits_V.double() / temperature).tolist()
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    kept = [t for t in order if math.exp(scaled[t] - scaled[order[0]]) >= min_p]
    kept = kept[:top_k] if top_k > 0 else kept
    weights = [math.exp(scaled[t] - scaled[order[0]]) for t in kept]
    nucleus, mass = [], 0.0
    for token, weight in zip(kept, weights):
        if mass / sum(weights) >= top_p:
            break
        nucleus.append(token)
        mass += weight
    return set(nucleus)


@QUICK
@given(st.integers(0, 999), st.integers(0, 10**6), st.integers(-1, V + 3), st.floats(0.01, 1.0), st.floats(0, 1),
       st.sampled_from([0.3, 1.0, 3.0]))
def test_no_token_outside_the_support(
        logits_seed: int, seed: int, top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    logits = logits_of(logits_seed)
    params = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
    assert one(logits, row(seed=seed, **params)) in allowed(logits, **params)  # type: ignore[arg-type]


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    """Ten tokens of about a tenth each: every one that may come does, and no other."""
    logits = torch.linspace(0.05, 0.0, 10)
    for percent in range(5, 96, 2):
        drawn = draws(logits, 200, top_p=percent / 100).nonzero().flatten().tolist()
        assert set(drawn) == allowed(logits, top_p=percent / 100) and len(drawn) == percent // 10 + 1


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_narrowest_support_is_the_best_token(params: dict[str, Any]) -> None:
    logits = logits_of(5)
    assert {one(logits, row(seed=seed, **params)) for seed in range(50)} == {int(logits.argmax())}


@QUICK
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 10**6), st.floats(0.1, 2)), min_size=2, max_size=6),
       st.randoms(use_true_random=False))
def test_a_row_draws_the_same_whatever_stands_beside_it(cases: list[tuple[int, int, float]], random: Any) -> None:
    rows = [row(seed=seed, temperature=t, handle=i) for i, (_, seed, t) in enumerate(cases)]
    logits = torch.stack([logits_of(number) for number, _, _ in cases])
    alone = [one(logits[i], rows[i]) for i in range(len(cases))]
    order = list(range(len(cases)))
    random.shuffle(order)
    together = sample(logits[order], [rows[i] for i in order])
    assert [s.handle for s in together] == order
    assert [s.token_ids for s in together] == [[alone[i]] for i in order]


def test_a_seed_repeats_itself_and_each_position_and_seed_differs() -> None:
    logits = torch.zeros(200)
    first = [one(logits, row(output=[4] * n, seed=7)) for n in range(40)]
    assert first == [one(logits, row(output=[4] * n, seed=7)) for n in range(40)]
    assert len(set(first)) > 25
    assert len({one(logits, row(seed=seed)) for seed in range(-20, 20)}) > 25


def reference_penalties(logits_V: Tensor, given_row: SampleInput) -> list[float]:
    p, prompt = given_row.request.params, given_row.request.prompt_tokens
    seen = given_row.token_ids.tolist()
    values = []
    for token, value in enumerate(logits_V.tolist()):
        if token in seen:
            value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        count = seen[prompt:].count(token)
        value -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
        values.append(value + p.logit_bias.get(token, 0.0))
    return values


tokens = st.lists(st.integers(0, V - 1), max_size=8)


@QUICK
@given(st.integers(0, 999), tokens.filter(len), tokens, st.floats(-2, 2), st.floats(-2, 2), st.floats(0.2, 5),
       st.dictionaries(st.integers(0, V - 1), st.floats(-10, 10), max_size=3))
def test_penalties_and_biases_are_the_formulas(
        seed: int, prompt: list[int], output: list[int], presence: float, frequency: float, repetition: float,
        bias: dict[int, float]) -> None:
    """Repetition over prompt and output, presence and frequency over the output alone."""
    logits = logits_of(seed)
    given_row = row(prompt, output, temperature=0, presence_penalty=presence, frequency_penalty=frequency,
                    repetition_penalty=repetition, logit_bias=bias)
    expected = reference_penalties(logits, given_row)
    token = one(logits, given_row)
    assert expected[token] == pytest.approx(max(expected), abs=1e-4)


def test_a_strong_bias_decides() -> None:
    logits = logits_of(1)
    assert {one(logits, row(seed=s, logit_bias={9: 100.0})) for s in range(20)} == {9}
    best = int(logits.argmax())
    assert best not in {one(logits, row(seed=s, logit_bias={best: -100.0})) for s in range(50)}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_forbid_every_end_until_there_are_enough(temperature: float) -> None:
    logits = torch.full((V,), -20.0)
    logits[[2, 5, 9]] = 10.0  # both ends and a stop token
    params: dict[str, Any] = {"temperature": temperature, "min_tokens": 2, "stop_token_ids": (9,)}
    for output in ([], [4]):
        assert one(logits, row(output=output, **params)) not in {2, 5, 9}
    assert one(logits, row(output=[4, 4], **params)) in {2, 5, 9}
    assert one(logits, row(ignore_eos=True, **params)) in {2, 5}


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs_are_the_models_own(count: int) -> None:
    """Before temperature, penalties and bias."""
    logits = logits_of(4)
    [sampled] = sample(logits[None], [row(logprobs=count, temperature=0.3, logit_bias={7: 100.0})])
    expected = torch.log_softmax(logits, -1)
    [logprob] = sampled.logprobs
    assert logprob.token_id == sampled.token_ids[0] == 7
    assert logprob.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    best = expected.topk(min(count, V))
    assert [token for token, _ in logprob.top] == best.indices.tolist()
    assert [value for _, value in logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_no_logprobs_unless_asked() -> None:
    assert sample(logits_of(1)[None], [row()])[0].logprobs == []


def broken(kind: str) -> Tensor:
    logits = logits_of(2)
    if kind == "all -inf":
        return torch.full_like(logits, -torch.inf)
    logits[6] = {"nan": torch.nan, "+inf": torch.inf}[kind]
    return logits


@pytest.mark.parametrize("kind", ["nan", "+inf", "all -inf"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_give_an_error_and_never_a_token(kind: str, temperature: float) -> None:
    results = sample(torch.stack([broken(kind), logits_of(3)]),
                     [row(handle=1, temperature=temperature, logprobs=2), row(handle=2, temperature=temperature)])
    assert results[0].token_ids == [] and results[0].logprobs == []
    assert results[0].error is not None and "not finite" in results[0].error
    assert results[1].error is None and len(results[1].token_ids) == 1


def test_some_minus_infinities_are_masked_tokens() -> None:
    logits = logits_of(2)
    logits[[0, 4, 7]] = -torch.inf
    assert not {one(logits, row(seed=s)) for s in range(100)} & {0, 4, 7}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_when_every_token_is_forbidden_there_is_an_error_and_no_token(temperature: float) -> None:
    logits = torch.full((V,), -torch.inf)
    logits[[2, 5]] = 1.0
    [sampled] = sample(logits[None], [row(min_tokens=1, temperature=temperature)])
    assert sampled.token_ids == [] and sampled.error is not None


def test_bf16_logits_are_sampled_in_fp32() -> None:
    logits = logits_of(6).bfloat16()
    assert one(logits, row(seed=3)) == one(logits.float(), row(seed=3))


def test_sampling_leaves_the_logits_as_they_were() -> None:
    logits = logits_of(6)
    before = logits.clone()
    choose(logits, row(output=[1, 2], repetition_penalty=2.0, presence_penalty=1.0, logit_bias={3: 5.0}, top_k=2,
                       top_p=0.5, min_p=0.1, min_tokens=9))
    assert torch.equal(logits, before)


def test_results_name_their_requests() -> None:
    assert sample(torch.zeros(0, V), []) == []
    [sampled] = sample(logits_of(0)[None], [row(handle=42)])
    assert isinstance(sampled, SampledTokens) and sampled.handle == 42
