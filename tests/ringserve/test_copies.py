"""Hand-made plans on real ranks: copied blocks, shared blocks, and requests on a part of the ring. Bit for bit."""

import itertools
import random
from array import array
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from ringserve.executor import Executor
from ringserve.plan import (
    BlockCopy,
    BlocksDealt,
    Mode,
    ModelOutput,
    NewRequest,
    ScheduledRows,
    SchedulerOutput,
    TokensKnown,
    pack_ids,
)
from ringserve.sampling_params import SamplingParams
from tests.families import VOCABULARY
from tests.ringserve.conftest import FamilyDirectory
from tests.ringserve.rings import BLOCK, Rings
from tests.ringserve.thread_ranks import thread_engine

SLOTS = 96
PREFIX, PROMPT, LENGTH = 8 * BLOCK, 12 * BLOCK + 9, 13 * BLOCK + 3
"""Tokens of a text: a prefix of complete blocks, the rest of its prompt, and some to be decoded one by one."""
FAMILIES = ["gemma3", "gpt-oss"]
"""Two layer groups, so that a block has another slot in each; the same with sinks."""

Logits = dict[int, bytes]
"""fp32 bytes by position."""
Place = tuple[int, int]
"""(rank, number of the slot in the first group) of a block."""


def make_text(number: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(VOCABULARY) for _ in range(LENGTH)]


def slots_of(number: int, groups: int) -> list[int]:
    """A block's slot in every group: another one in each."""
    return [(number + 5 * group) % SLOTS for group in range(groups)]


def places(rank: int, first: int) -> list[Place]:
    """Room for a text on one rank, from slot `first` on, not all adjacent."""
    return [(rank, first + i + i // 3) for i in range(-(-LENGTH // BLOCK))]


class Ranks:
    """Ranks with an empty cache that run hand-made plans; keeps the logits they report."""

    def __init__(self, executor: Executor, mode: Mode = "pass-kv") -> None:
        self._executor, self._mode, self._step = executor, mode, 0
        self._groups = len(executor.groups)
        self.logits: dict[int, Logits] = {}
        executor.allocate(SLOTS)

    @property
    def block_bytes(self) -> int:
        """Of one block's keys and values, in all layers."""
        return 4 * BLOCK * sum(g.num_kv_heads * (g.key_dim + g.value_dim) * len(g.layers)
                               for g in self._executor.groups)

    def run(self, *, new: Sequence[NewRequest] = (), tokens: Sequence[TokensKnown] = (),
            blocks: Sequence[BlocksDealt] = (), copies: Sequence[BlockCopy] = (),
            rows: Sequence[ScheduledRows] = (), released: Sequence[int] = ()) -> ModelOutput:
        self._step += 1
        output = self._executor.execute(SchedulerOutput(
            epoch=self._executor.epoch, step=self._step, new=list(new), tokens=list(tokens), blocks=list(blocks),
            copies=list(copies), rows=list(rows), released=list(released)))
        for row in (row for rank in output.ranks for row in rank.logits):
            self.logits.setdefault(row.handle, {})[row.position] = row.logits
        return output

    def begin(self, handle: int, text: Sequence[int], where: Sequence[Place], there: int = 0) -> None:
        """Announce a request whose blocks lie there, the first `there` tokens computed already."""
        slots = [slots_of(number, self._groups) for _, number in where]
        self.run(new=[NewRequest(handle, SamplingParams(), 0, (), len(text))],
                 tokens=[TokensKnown(handle, 0, pack_ids(array("I", text)))],
                 blocks=[BlocksDealt(handle, 0, [rank for rank, _ in where], [list(s) for s in zip(*slots)],
                                     [min(BLOCK, max(0, there - i * BLOCK)) for i in range(len(where))])])

    def rows(self, handle: int, start: int, stop: int) -> ScheduledRows:
        return ScheduledRows(handle, [(start, stop)], [self._mode] * self._groups, sample=False,
                             logits_at=list(range(start, stop)))

    def compute(self, handle: int, start: int = 0, stop: int = LENGTH, prefix: int = PREFIX) -> list[ModelOutput]:
        """The prefix, the rest of the prompt, then token by token: the same rows in a step for every request."""
        edges = [0, prefix, *range(PROMPT, LENGTH + 1)]
        return [self.run(rows=[self.rows(handle, a, b)]) for a, b in itertools.pairwise(edges)
                if start <= a and b <= stop]

    def copy(self, source: Place, destination: Place) -> BlockCopy:
        return BlockCopy(source[0], destination[0], slots_of(source[1], self._groups),
                         slots_of(destination[1], self._groups))


RanksOf = Callable[..., Ranks]


@pytest.fixture(params=["processes", "threads"])
def ranks_of(request: pytest.FixtureRequest, rings: Rings, family_directory: FamilyDirectory) -> RanksOf:
    def open_ranks(family: str, size: int, mode: Mode = "pass-kv") -> Ranks:
        path = family_directory(family)
        engine = rings.engine(path, size) if request.param == "processes" else thread_engine(path, size, mode)
        return Ranks(engine.executor, mode)

    return open_ranks


def alone(ranks: Ranks, *numbers: int) -> list[Logits]:
    """What each text gives on rank 0 without any copy."""
    for number in numbers:
        ranks.begin(number, make_text(number), places(0, 0))
        ranks.compute(number)
        ranks.run(released=[number])
    return [ranks.logits[number] for number in numbers]


def assert_equal(found: Logits, expected: Logits, start: int = 0, stop: int = LENGTH) -> None:
    assert sorted(found) == list(range(start, stop))
    for position in range(start, stop):
        assert found[position] == expected[position], f"position {position}"
        assert np.isfinite(np.frombuffer(expected[position], dtype=np.float32)).all()


def sent(output: ModelOutput) -> list[list[int]]:
    """[from][to] payload bytes; a rank that had no part in the step sent nothing."""
    size = len(output.ranks[0].bytes_sent)
    by_rank = {report.rank: report.bytes_sent for report in output.ranks}
    return [by_rank.get(rank, [0] * size) for rank in range(size)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [2, 3])
def test_a_copied_prefix_is_as_good_as_the_computed_one(family: str, size: int, ranks_of: RanksOf) -> None:
    expected, other = alone(ranks_of(family, 1), 0, 9)
    ranks = ranks_of(family, size)
    text, original, copied = make_text(0), places(0, 3), places(1, 20)
    ranks.begin(1, text, original)
    ranks.compute(1, stop=PREFIX)
    blocks = PREFIX // BLOCK
    output = ranks.run(copies=[ranks.copy(*pair) for pair in zip(original[:blocks], copied)])
    assert not any(rank.logits for rank in output.ranks)
    assert sent(output)[0] == [0, blocks * ranks.block_bytes] + [0] * (size - 2)
    assert not any(map(any, sent(output)[1:]))
    ranks.begin(2, text, copied, there=PREFIX)
    assert not any(map(any, sent(ranks.compute(2, PREFIX, PROMPT)[0])))
    assert_equal(ranks.logits[2], expected, PREFIX, PROMPT)
    # Another request takes the originals' slots: the copy does not notice.
    ranks.run(released=[1])
    ranks.begin(9, make_text(9), original)
    ranks.compute(9)
    ranks.compute(2, PROMPT)
    assert_equal(ranks.logits[2], expected, PREFIX)
    assert_equal(ranks.logits[9], other)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_copies_to_every_other_at_once(family: str, size: int, ranks_of: RanksOf) -> None:
    """In no order, unequally many between each two ranks, in the very step that needs them."""
    ranks = ranks_of(family, size)
    copies, wanted = [], np.zeros((size, size), dtype=np.int64)
    requests: list[tuple[int, int, int]] = []
    for source in range(size):
        blocks = 2 + 2 * source
        ranks.begin(source, make_text(source), places(source, 0))
        ranks.compute(source, prefix=blocks * BLOCK)
        for shift in range(1, size):
            handle, destination = 10 * shift + source, (source + shift) % size
            copied = places(destination, 20 * shift)
            ranks.begin(handle, make_text(source), copied, there=blocks * BLOCK)
            copies += [ranks.copy(*pair) for pair in zip(places(source, 0)[:blocks], copied)]
            wanted[source, destination] = blocks * ranks.block_bytes
            requests.append((handle, source, blocks * BLOCK))
    random.Random(size).shuffle(copies)
    for handle, source, prefix in requests:
        output = ranks.run(copies=copies, rows=[ranks.rows(handle, prefix, PROMPT)])
        assert np.array_equal(sent(output), wanted)
        copies, wanted = [], 0 * wanted
        ranks.compute(handle, PROMPT)
        assert_equal(ranks.logits[handle], ranks.logits[source], prefix)


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_share_a_prefix_and_let_it_go_one_by_one(family: str, ranks_of: RanksOf) -> None:
    """Two handles name the same slots; the second goes on when the first is gone."""
    [expected] = alone(ranks_of(family, 1), 0)
    ranks = ranks_of(family, 2)
    text, first = make_text(0), places(1, 3)
    blocks = PREFIX // BLOCK
    ranks.begin(1, text, first)
    ranks.compute(1)
    ranks.begin(2, text, first[:blocks] + places(1, 40)[blocks:], there=PREFIX)
    ranks.compute(2, PREFIX, PROMPT)
    ranks.run(released=[1])
    ranks.compute(2, PROMPT)
    assert_equal(ranks.logits[1], expected)
    assert_equal(ranks.logits[2], expected, PREFIX)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["pass-kv", "pass-q"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_request_on_one_rank_causes_no_message(family: str, mode: Mode, size: int, ranks_of: RanksOf) -> None:
    [expected] = alone(ranks_of(family, 1), 0)
    ranks = ranks_of(family, size, mode)
    ranks.begin(1, make_text(0), places(size - 1, 3))
    assert not any(any(row) for output in ranks.compute(1) for row in sent(output))
    assert_equal(ranks.logits[1], expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["pass-kv", "pass-q"])
def test_a_request_on_two_of_three_ranks_leaves_the_third_alone(family: str, mode: Mode, ranks_of: RanksOf) -> None:
    def compute(ranks: Ranks, pair: tuple[int, int]) -> list[list[list[int]]]:
        where = [(pair[i % 2], number) for i, (_, number) in enumerate(places(0, 3))]
        ranks.begin(1, make_text(0), where)
        return [sent(output) for output in ranks.compute(1)]

    two = ranks_of(family, 2, mode)
    in_two = np.array(compute(two, (0, 1)))
    three = ranks_of(family, 3, mode)
    in_three = np.array(compute(three, (1, 2)))
    assert not in_three[:, 0].any() and not in_three[:, :, 0].any()
    assert np.array_equal(in_three[:, 1:, 1:], in_two) and in_two.any()
    assert_equal(three.logits[1], two.logits[1])
