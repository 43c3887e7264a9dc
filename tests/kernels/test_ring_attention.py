"""The ring loop against the fp64 oracle: every ring size, mode and shape of batch, and the bytes it sends."""

import pytest
import torch
from ringserve_kernels import AttentionSpec

from tests.kernels.backends import ON_CPUS, Backend
from tests.kernels.bounds import relative_rms
from tests.kernels.layout import place

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, key_dim=32, value_dim=32, scale=32**-0.5)
BATCHES = {
    "nothing cached": [(0, 150)],
    "cached": [(200, 70)],
    "one token": [(333, 1)],
    "ragged": [(0, 40), (100, 1), (17, 90), (64, 64), (0, 3)],
    "long past": [(1600, 33)],
}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["pass-kv", "pass-q", "mixed"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("window", [None, 24])
def test_equals_the_oracle(size: int, mode: str, batch: str, window: int | None) -> None:
    spec = AttentionSpec(4, 2, 32, 32, 32**-0.5, window=window)
    pass_q = [mode == "pass-q" or (mode == "mixed" and i % 2 == 0) for i in range(len(BATCHES[batch]))]
    placed = place(BATCHES[batch], size, spec, pass_q=pass_q, scatter=batch == "ragged")
    results, _ = placed.run(spec, segment=128)
    for result, expected in zip(results, placed.expected):
        if len(expected):
            assert relative_rms(result, expected) <= 1e-5


@pytest.mark.parametrize("backend", ON_CPUS)
@pytest.mark.parametrize("stored", [None, torch.int8])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("window", [None, 24])
def test_keys_travel_as_they_lie(backend: Backend, stored: torch.dtype | None, batch: str, window: int | None) -> None:
    """Blocks of the native kernel, quantized ones with their scales: whole blocks, also the last, which is not full."""
    spec = AttentionSpec(4, 2, 32, 32, 32**-0.5, window=window)
    placed = place(BATCHES[batch], 3, spec, pass_q=[False] * len(BATCHES[batch]), scatter=batch == "ragged",
                   backend=backend, stored=stored)
    results, _ = placed.run(spec, segment=128)
    for result, expected in zip(results, placed.expected):
        if len(expected):
            assert relative_rms(result, expected) <= 1e-5


@pytest.mark.parametrize("pass_q", [False, True])
def test_a_rank_without_keys_or_rows(pass_q: bool) -> None:
    placed = place([(160, 40)], 3, SPEC, pass_q=[pass_q], holders=[[0, 2] * 7])
    assert len(placed.expected[1]) == 0
    results, _ = placed.run(SPEC, segment=64)
    assert relative_rms(results[2], placed.expected[2]) <= 1e-5


@pytest.mark.parametrize("pass_q", [False, True])
def test_sinks_count_once(pass_q: bool) -> None:
    sink = torch.tensor([0.5, 2.0, -1.0, 3.0])
    placed = place([(100, 60)], 3, SPEC, pass_q=[pass_q], sink=sink)
    results, _ = placed.run(SPEC, segment=64, sink=sink)
    assert relative_rms(torch.cat(results), torch.cat(placed.expected)) <= 1e-5


@pytest.mark.parametrize("size", [2, 4])
def test_bf16_error_does_not_grow_with_the_ring(size: int) -> None:
    errors = []
    for ranks in (1, size):
        placed = place([(1024, 256)], ranks, SPEC, pass_q=[False], dtype=torch.bfloat16)
        results, _ = placed.run(SPEC, segment=256)
        errors.append(relative_rms(torch.cat(results), torch.cat(placed.expected)))
    assert errors[1] <= 2.5e-3
    assert errors[1] <= 1.3 * errors[0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_pass_kv_sends_what_the_formula_says(size: int) -> None:
    cached, new, block = 384, 64, 16
    placed = place([(cached, new)], size, SPEC, pass_q=[False], block=block)
    _, rings = placed.run(SPEC, segment=64)
    key_bytes = SPEC.num_kv_heads * (SPEC.key_dim + SPEC.value_dim) * 4
    for rank, ring in enumerate(rings):
        keys = placed.sequences[0].keys[rank]
        for to in range(size):
            rows = placed.sequences[0].spans[to].index
            # A block is sent unless it begins after the last row there: no visible key in the pair.
            seen = sum(int(n) for first, n in zip(keys.first, keys.length)
                       if to != rank and len(rows) and first <= rows[-1])
            assert ring.bytes_sent[to] == seen * key_bytes
    held = [p.tokens for p in placed.sequences[0].keys]
    unseen = (size - 1) * sum(held) * key_bytes - sum(sum(r.bytes_sent) for r in rings)
    assert 0 <= unseen <= size * (size - 1) * block * key_bytes


@pytest.mark.parametrize("size", [2, 3, 4])
def test_pass_q_sends_what_the_formula_says(size: int) -> None:
    placed = place([(320, 64)], size, SPEC, pass_q=[True])
    _, rings = placed.run(SPEC, segment=64)
    row_bytes = SPEC.num_heads * SPEC.key_dim * 4 + SPEC.num_heads * (SPEC.value_dim * 4 + 4)
    assert sum(sum(ring.bytes_sent) for ring in rings) == 64 * (size - 1) * row_bytes


def test_window_layers_send_only_what_the_window_reaches() -> None:
    spec = AttentionSpec(4, 2, 32, 32, 32**-0.5, window=20)
    placed = place([(3200, 32)], 2, spec, pass_q=[False])
    _, rings = placed.run(spec, segment=64)
    key_bytes = 2 * 64 * 4
    assert sum(sum(ring.bytes_sent) for ring in rings) <= (32 + 20 + 2 * 16) * key_bytes


@pytest.mark.parametrize("pass_q", [False, True])
def test_remote_keys_change_local_output(pass_q: bool) -> None:
    placed = place([(256, 32)], 2, SPEC, pass_q=[pass_q])
    before, _ = placed.run(SPEC, segment=64)
    placed.stores[1].v_KPD.add_(1.0)
    after, _ = placed.run(SPEC, segment=64)
    assert relative_rms(after[0], before[0]) > 0.1
