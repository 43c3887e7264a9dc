"""Quantized keys and values: what is written, and attention over it."""

import numpy as np
import pytest
import torch
from ringserve_kernels import reference_attention
from ringserve_kernels.quantize import LARGEST
from ringserve_kernels.triton import Quantized, quantize_write
from torch import Tensor

from tests.kernels.bounds import assert_close, relative_rms
from tests.kernels.shards import Batch, make_spec
from tests.kernels.triton.paged import DEVICE, PagedShards, on_host

FORMATS = [torch.int8, torch.float8_e4m3fn]


def empty_cache(heads: int, tokens: int, dim: int, codes: torch.dtype, scale: torch.dtype = torch.float32) -> Quantized:
    """NaN wherever nothing is written: in the scales, and in fp8 in the codes (byte 127) too."""
    return Quantized(torch.full((heads, tokens, dim), 127, dtype=torch.uint8, device=DEVICE).view(codes),
                     torch.full((heads, tokens), torch.nan, dtype=scale, device=DEVICE))


def codes_of(x_TKD: Tensor, scale_KT: Tensor, codes: torch.dtype) -> Tensor:
    """By plain torch, [K, T, D]."""
    scaled = x_TKD.transpose(0, 1).float() / scale_KT.float()[:, :, None]
    largest = LARGEST[codes]
    scaled = scaled.nan_to_num(0.0).clamp(-largest, largest)
    return (scaled.round() if codes == torch.int8 else scaled).to(codes)


@pytest.mark.parametrize("codes", FORMATS)
@pytest.mark.parametrize("scale", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_scales_are_torchs(codes: torch.dtype, scale: torch.dtype, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Magnitudes over many binades, so that fp8 codes are subnormal too.
    x = torch.randn(40, 2, 80, generator=generator) * torch.exp2(torch.randint(-9, 3, (40, 2, 80), generator=generator))
    x[7, 1] = 0.0
    x = x.to(dtype).to(DEVICE)
    slots = torch.from_numpy(np.random.default_rng(0).permutation(100)[:40]).to(DEVICE)
    cache = empty_cache(2, 100, 80, codes, scale)
    quantize_write(x, slots, cache)
    written = cache.scale_KP[:, slots]
    expected = (x.float().abs().amax(-1) / LARGEST[codes]).T
    torch.testing.assert_close(written, expected.to(scale), rtol=1e-6 if scale is torch.float32 else 1e-3, atol=0)
    assert torch.equal(cache.codes_KPD[:, slots].float(), codes_of(x, written, codes).float())
    others = torch.ones(100, dtype=torch.bool)
    others[slots.cpu()] = False
    assert cache.scale_KP[:, others.to(DEVICE)].isnan().all()


@pytest.mark.parametrize("codes", FORMATS)
def test_a_nan_is_not_hidden(codes: torch.dtype) -> None:
    x = torch.ones(1, 2, 16, device=DEVICE)
    x[0, 0, 3] = torch.nan
    cache = empty_cache(2, 1, 16, codes)
    quantize_write(x, torch.zeros(1, dtype=torch.int32, device=DEVICE), cache)
    assert cache.dequantized()[0].isnan().all() and torch.all(cache.dequantized()[1] == 1.0)


def test_every_fp8_code_is_read_exactly() -> None:
    """One key per code: with a query of 0 every key weighs the same, and each head dim holds one code's value."""
    spec = make_spec(kv_heads=1, group=1, dim=256)
    shards = PagedShards(Batch(lengths=((0, 1),), block=16), spec)
    byte = torch.arange(256, dtype=torch.uint8)
    byte[[127, 255]] = 0  # NaN
    tokens = shards.stores[0].k_KPD.shape[1]
    cache = Quantized(byte.view(torch.float8_e4m3fn).expand(1, tokens, 256).contiguous().to(DEVICE),
                      torch.ones(1, tokens, device=DEVICE))
    o, _ = shards.attend_quantized(cache, cache)
    assert torch.equal(o[0, 0].cpu(), byte.view(torch.float8_e4m3fn).float())


def quantized_store(shards: PagedShards, codes: torch.dtype, scale: torch.dtype) -> tuple[Quantized, Quantized]:
    """The keys and values of the only shard, written by the kernel where they lie in the plain storage."""
    caches = []
    for store in (shards.stores[0].k_KPD, shards.stores[0].v_KPD):
        slots = torch.from_numpy(np.concatenate([s.blocks[0].keys()[1] for s in shards.sequences]))
        caches.append(empty_cache(*store.shape, codes=codes, scale=scale))
        quantize_write(store[:, slots].transpose(0, 1).to(DEVICE), slots.to(DEVICE), caches[-1])
    return caches[0], caches[1]


@pytest.mark.parametrize(("codes", "error"), [(torch.int8, 0.02), (torch.float8_e4m3fn, 0.06)])
@pytest.mark.parametrize(("scale", "dtype", "window", "softcap"), [
    (torch.float32, torch.float32, None, None), (torch.float16, torch.float16, 60, 20.0),
    (torch.float32, torch.bfloat16, None, None)])
def test_attention_over_codes(codes: torch.dtype, error: float, scale: torch.dtype, dtype: torch.dtype,
                              window: int | None, softcap: float | None) -> None:
    """Exact for the keys that the codes stand for; near the keys that were written."""
    spec = make_spec(kv_heads=2, group=4, dim=80, value_dim=64, window=window, softcap=softcap)
    shards = PagedShards(Batch(lengths=((600, 1), (70, 9), (20, 140)), block=64, dtype=dtype), spec)
    k, v = quantized_store(shards, codes, scale)
    actual = on_host(shards.attend_quantized(k, v))
    parts = []
    for s in shards.sequences:
        index, offset = s.blocks[0].keys()
        rows = slice(s.span.start, s.span.start + len(s.span.index))
        parts.append(reference_attention(
            shards.q_THD[rows], *(c.dequantized().cpu()[:, offset].transpose(0, 1) for c in (k, v)),
            torch.from_numpy(s.span.index), torch.from_numpy(index), spec))
    o, lse = zip(*parts)
    assert_close(actual, (torch.cat(o), torch.cat(lse)), dtype)
    assert relative_rms(actual[0], shards.expected()[0]) <= error
