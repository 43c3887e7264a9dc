"""What ranks must agree on before a cache is made."""

from ringserve.executor import agreement
from ringserve.rank_messages import RankLoaded


def loaded(rank: int, kernels: list[str], orders: list[str]) -> RankLoaded:
    return RankLoaded(rank=rank, groups=[], kv_bytes_per_token=1, linear_flops_per_token=1.0, linear="",
                      message_bytes=1, kernels=kernels, orders=orders, attention=[f"chose {k}" for k in kernels])


def test_keys_that_lie_alike_may_be_computed_on_differently() -> None:
    ranks = [loaded(0, ["fa3 and triton", "triton"], ["tokens", "tokens"]),
             loaded(1, ["cudnn and triton", "triton"], ["tokens", "tokens"])]
    assert agreement(ranks) == ([True, True], ["cudnn and triton, fa3 and triton", "triton"],
                                ["chose fa3 and triton", "chose triton"])


def test_one_rank_whose_keys_lie_otherwise_brings_all_to_torch() -> None:
    ranks = [loaded(0, ["native avx2", "native avx2"], ["blocks", "blocks"]),
             loaded(1, ["native avx2", "torch"], ["blocks", "tokens"])]
    agreed, kernels, words = agreement(ranks)
    assert (agreed, kernels) == ([True, False], ["native avx2", "torch"])
    assert words == ["chose native avx2",
                     "chose native avx2; torch on all ranks, because their keys would lie differently"]
