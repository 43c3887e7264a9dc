"""The construction, number by number: what every row holds, and that fp32 and bf16 hold the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ringserve.needle import weights
from ringserve.needle.codes import UNIT_DIMS, identity_codes, unit_codes
from tests.ringserve.needle.conftest import plain_model

DTYPES = [torch.float32, torch.bfloat16]
SQUARES = 2.0**18


def random_ids(count: int) -> Tensor:
    return torch.randint(1, weights.VOCABULARY, (count,), generator=torch.Generator().manual_seed(count))


def hidden_states(model: Any, ids: Tensor, begin: int = 0) -> tuple[Tensor, ...]:
    """The rows before layers 0, 1, 2, and what the norm makes of the last."""
    positions = torch.arange(begin, begin + len(ids))[None]
    with torch.no_grad():
        output = model(ids[None], position_ids=positions, output_hidden_states=True, use_cache=False)
    return tuple(states[0] for states in output.hidden_states)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("begin", [0, 100_003, weights.MAX_POSITIONS - 200, (1 << 24) - 200])
def test_slots_hold_the_codes_of_the_latest_tokens_exactly(begin: int, dtype: torch.dtype, needle: Path) -> None:
    ids = random_ids(200)
    rows = hidden_states(plain_model(needle, dtype, "eager"), ids, begin)[2].float()
    codes = torch.from_numpy(unit_codes(weights.VOCABULARY))
    for slot in range(weights.SLOTS):
        held = rows[:, slot * UNIT_DIMS:(slot + 1) * UNIT_DIMS]
        earlier = ids[(torch.arange(len(ids)) - slot).clamp(min=0)]  # before the first token: the first token
        assert torch.equal(held, codes[earlier]), slot
    assert torch.equal(rows[:, weights.IDENTITY], torch.from_numpy(identity_codes(weights.VOCABULARY))[ids])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_has_the_same_sum_of_squares(dtype: torch.dtype, needle: Path) -> None:
    for states in hidden_states(plain_model(needle, dtype, "eager"), random_ids(100))[:3]:
        assert torch.all(states.double().square().sum(dim=1) == SQUARES)


def test_fp32_and_bf16_score_with_the_same_bits(needle: Path) -> None:
    ids = random_ids(300)
    queries, keys = [], []
    for dtype in DTYPES:
        model = plain_model(needle, dtype, "eager")
        layer = model.model.layers[2]
        row = layer.input_layernorm(hidden_states(model, ids)[2])
        queries.append(layer.self_attn.q_proj(row).detach())
        keys.append(layer.self_attn.k_proj(row).detach())
    assert torch.equal(queries[0], queries[1].float()) and torch.equal(keys[0], keys[1].float())
    # Whole units, and small enough for fp32 to sum the products exactly in any order.
    query = queries[0].view(len(ids), weights.HEADS, weights.HEAD_DIM).transpose(0, 1)
    scores = query @ keys[0].T / weights.HEAD_DIM**0.5
    assert torch.all(scores % weights.NATS_PER_UNIT == 0) and scores.max() <= 0
    smallest, largest = smallest_of(queries[0]) * smallest_of(keys[0]), (query.abs() @ keys[0].abs().T).max()
    assert largest / smallest < 2**24


def smallest_of(numbers: Tensor) -> Tensor:
    return numbers[numbers != 0].abs().min()
