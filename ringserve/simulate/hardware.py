"""Hardware: what steps really cost in a simulation, and where the numbers come from."""

from dataclasses import dataclass

from ringserve.cost_model import Machine
from ringserve.plan import LayerGroup


@dataclass(frozen=True, kw_only=True)
class Hardware:
    name: str
    ring_size: int
    slots_per_rank: int
    """Of 64 tokens."""
    groups: tuple[LayerGroup, ...]
    linear_flops_per_token: float
    linear_flops: float
    """FLOP/s of the linear layers on one rank."""
    machine: Machine


def _llama_8b_on_8_h200() -> Hardware:
    """Llama 3.1 8B in bf16: 32 layers, 32 query and 8 KV heads of 128, 8.03e9 parameters (its config.json).

    One H200 (NVIDIA's data sheet): 989 TFLOP/s dense bf16, 141 GB, 4.8 TB/s; NVLink 900 GB/s both ways. Taken: 60% of
    the FLOP/s for attention and 65% for linear layers (published kernels reach 600 to 685 TFLOP/s on Hopper), 85% of
    the memory bandwidth, 370 GB/s to another rank. A step costs its launches and the reading of 16 GB of weights,
    5 ms; an exchange 10 us. KV of a token: 128 KiB; 80 GB of each rank's memory hold it.
    """
    group = LayerGroup(num_kv_heads=8, key_dim=128, value_dim=128, window=None, layers=tuple(range(32)), num_heads=32,
                       key_bytes=8 * 256 * 2)
    return Hardware(
        name="Llama 3.1 8B on 8 H200", ring_size=8, slots_per_rank=80_000_000_000 // (64 * 131_072), groups=(group,),
        linear_flops_per_token=2 * 7.5e9, linear_flops=640e12,
        machine=Machine(flops=600e12, link_bytes_per_s=370e9, element_bytes=2, overlaps=True, key_bytes_per_s=4.1e12,
                        step_s=5e-3, request_s=2e-5, exchange_s=1e-5))


def _needle_on_two_cores() -> Hardware:
    """needle in bf16 on a ring of two one-thread ranks: what `ringserve serve` learned on two cores without AMX."""
    def group(layers: tuple[int, ...], window: int | None) -> LayerGroup:
        return LayerGroup(num_kv_heads=1, key_dim=64, value_dim=64, window=window, layers=layers, num_heads=2,
                          key_bytes=128 * 2)

    return Hardware(
        name="needle on two cores", ring_size=2, slots_per_rank=145_000, groups=(group((0, 1), 16), group((2,), None)),
        linear_flops_per_token=2 * 3e6, linear_flops=2.4e11,
        machine=Machine(flops=8e10, link_bytes_per_s=7.9e9, element_bytes=2, overlaps=False, key_bytes_per_s=7.9e9,
                        step_s=3.8e-3, request_s=4.6e-4, exchange_s=5.5e-5))


HARDWARE = {"8b-8xh200": _llama_8b_on_8_h200, "needle-2-cores": _needle_on_two_cores}
