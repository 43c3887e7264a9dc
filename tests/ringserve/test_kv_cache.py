"""The pool's storage: each key where its slot is, and pages that cost nothing until they are written."""

import psutil
import torch
from ringserve_kernels import TILES, AttentionSpec

from ringserve.model.kv_cache import KVCache, key_bytes

SPECS = [AttentionSpec(4, 2, 8, 8, 1.0), AttentionSpec(4, 1, 8, 16, 1.0)]


def test_keys_and_values_land_in_their_slots() -> None:
    cache = KVCache(SPECS, [TILES, TILES], slots=5, block_size=4, dtype=torch.bfloat16, device=torch.device("cpu"))
    k_KTD, v_KTD = torch.randn(1, 3, 8).bfloat16(), torch.randn(1, 3, 16).bfloat16()
    where_T = torch.tensor([19, 2, 3])
    cache.write(1, k_KTD, v_KTD, where_T)
    layer = cache.layers[1]
    assert layer.k_KPD.shape == (1, 20, 8) and layer.v_KPD.shape == (1, 20, 16)
    assert torch.equal(layer.k_KPD[:, where_T], k_KTD) and torch.equal(layer.v_KPD[:, where_T], v_KTD)
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[where_T] = False
    assert not layer.k_KPD[:, untouched].any() and not cache.layers[0].k_KPD.any()


def test_pages_that_were_never_written_cost_no_memory() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    cache = KVCache(SPECS, [TILES, TILES], slots=1 << 16, block_size=64, dtype=torch.float32,
                    device=torch.device("cpu"))
    assert sum(layer.k_KPD.nbytes + layer.v_KPD.nbytes for layer in cache.layers) > 800 << 20
    assert process.memory_info().rss - before < 100 << 20


def test_bytes_of_a_token_in_each_layer() -> None:
    assert [key_bytes(spec, torch.bfloat16) for spec in SPECS] == [2 * 2 * 16, 2 * 24]
    assert [key_bytes(spec, torch.int8) for spec in SPECS] == [2 * (16 + 8), 24 + 8]
