"""What crosses between the scheduler and the ranks survives the crossing, id for id."""

import sys
from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringserve.plan import ScheduledRows, SchedulerOutput, pack_ids, unpack_ids
from tests.ringserve.fake_ranks import Driven

ids = st.lists(st.integers(0, 2**32 - 1)).map(lambda values: array("I", values))


@given(ids)
def test_ids_survive_packing(token_ids: "array[int]") -> None:
    assert unpack_ids(pack_ids(token_ids)) == token_ids


def test_packed_ids_are_little_endian_whatever_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pack_ids(array("I", [1, 0x01020304])) == b"\x01\0\0\0\x04\x03\x02\x01"
    swapped = "big" if sys.byteorder == "little" else "little"
    native = array("I", [1, 0x01020304])
    monkeypatch.setattr(sys, "byteorder", swapped)
    assert unpack_ids(pack_ids(native)) == native
    assert native == array("I", [1, 0x01020304]), "the caller's array was swapped in place"


@pytest.mark.parametrize("typecode", ["i", "H", "L"])
def test_only_u32_arrays_are_packed(typecode: str) -> None:
    with pytest.raises(AssertionError):
        pack_ids(array(typecode, [1]))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_real_plans_survive_the_crossing(lengths: list[int]) -> None:
    driven = Driven(chunk=16)
    for number, length in enumerate(lengths):
        driven.add(f"r{number}", range(length))
    decoder = msgspec.msgpack.Decoder(SchedulerOutput)
    for plan in driven.finish():
        again = decoder.decode(msgspec.msgpack.encode(plan))
        assert msgspec.to_builtins(again) == msgspec.to_builtins(plan)
        assert again.num_tokens == plan.num_tokens


def test_a_plan_counts_its_tokens() -> None:
    rows = [ScheduledRows(1, [(0, 4), (8, 9)], ["pass-q"], False), ScheduledRows(2, [(3, 4)], ["pass-kv"], True)]
    assert SchedulerOutput(epoch=0, step=1, rows=rows).num_tokens == 6
    assert SchedulerOutput(epoch=0, step=2).num_tokens == 0
