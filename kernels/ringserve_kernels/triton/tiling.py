"""How large a tile of keys is, and on how many threads: chosen so that bf16 and fp16 compile without spilled registers
for sm_80, sm_90 and sm_100, within the shared memory of each (tests/kernels/triton compiles them). Not yet chosen by
time."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiling:
    tile_keys: int
    num_warps: int
    num_stages: int
    """Tiles of K and V in flight."""


def fp32_precision(capability: tuple[int, int]) -> str:
    """How fp32 numbers are multiplied. Three tf32 products; but for sm_100 Triton 3.7.1, which torch 2.13 brings, makes
    empty kernels of them in wide tiles, which write nothing: there, plain fp32."""
    return "ieee" if capability >= (10, 0) else "tf32x3"


def attention_tiling(tile_rows: int, padded_dim: int, element_size: int, quantized: bool,
                     capability: tuple[int, int]) -> Tiling:
    """For `tile_rows` packed rows of queries of `element_size` bytes, the larger of the padded head dims, and a
    device of this compute capability."""
    if element_size == 4:
        # For checks, not for speed: products of three tf32 products spill registers in all but the smallest tiles.
        return Tiling(16, 4 if tile_rows <= 16 else 8, 2 if padded_dim <= 128 else 1)
    if padded_dim > 128:
        return Tiling(32, 4 if tile_rows <= 16 else 8, 3 if tile_rows <= 16 else 2)
    if tile_rows <= 16:
        return Tiling(64, 8 if quantized else 4, 3)
    # Before sm_90 codes become numbers in the registers that matrix instructions read, fp8 by bits.
    return Tiling(32 if quantized and capability < (9, 0) else 64, 8, 3)
