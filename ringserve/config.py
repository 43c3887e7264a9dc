"""Configuration: a few frozen values. The command line is generated from these fields and their texts."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

import msgspec

from ringserve.errors import ConfigError

Dtype = Literal["auto", "bfloat16", "float16", "float32", "float64"]
RingMode = Literal["auto", "pass-kv", "pass-q"]
PolicyName = Literal["fcfs", "edf", "slack", "slack-floor", "srpt"]
TransportName = Literal["auto", "shm", "gloo", "nccl", "symm"]
AttentionName = Literal["auto", "native", "torch", "triton", "cudnn", "fa2", "fa3", "fa4", "flash", "efficient"]
KVCacheDtype = Literal["auto", "int8", "fp8"]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def check_types(config: Any) -> None:
    """A dataclass checks no types: `block_size=2.5` must not get as far as a rank. Raises ConfigError."""
    for item in fields(config):
        value = getattr(config, item.name)
        try:
            msgspec.convert(value, item.type, strict=True)
        except msgspec.ValidationError:
            raise ConfigError(f"{item.name} must be {_wanted(item.type)}, got {value!r}") from None


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    parts = get_args(kind) or (kind,)
    return " or ".join("None" if part is type(None) else _TYPE_NAMES.get(part, str(part)) for part in parts)


_TYPE_NAMES: dict[Any, str] = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    model: str
    """A directory with a Hugging Face checkpoint (safetensors), or `needle` for the embedded model."""

    dtype: Dtype = "auto"
    """Number format of weights, activations and KV cache; `auto` takes the checkpoint's."""

    max_model_len: int | None = None
    """Longest context in tokens, prompt and output together. Unset: what the checkpoint was made for."""

    rope_scaling: str | None = None
    """Rotary scaling as JSON, in transformers' words, to extend the context on request, for example
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}."""

    attention: AttentionName = "auto"
    """Which attention kernel computes. `auto`: whichever a short race at start finds fastest. `torch`: torch's
    operations, anywhere. On CPUs `native`: ours in C++, compiled for this machine at first use. On GPUs `triton`:
    ours in Triton; or these, with Triton for what they cannot do: `cudnn`, flash-attn's `fa2`, `fa3` and `fa4`,
    torch's `flash` and `efficient`."""

    def __post_init__(self) -> None:
        check_types(self)
        _require(bool(self.model), "the model must be a directory or `needle`, got an empty name")
        _require(self.max_model_len is None or self.max_model_len > 0,
                 f"max_model_len must be positive, got {self.max_model_len}")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    block_size: int = 64
    """Tokens in a block of the KV cache."""

    prefix_cache: bool = True
    """Keep the blocks of ended requests for later ones that begin with the same tokens."""

    kv_cache_dtype: KVCacheDtype = "auto"
    """Number format of cached keys and values: `auto` is the model's; int8 and fp8 (e4m3) take half the memory and
    half the bytes on the ring of bfloat16, and cost exactness (`ringserve selftest` says how much)."""

    kv_cache_gib: float | None = None
    """GiB of KV cache over all ranks. Unset: 60% of the memory that is free after loading."""

    def __post_init__(self) -> None:
        check_types(self)
        _require(1 <= self.block_size <= 4096, f"block_size must be in 1 to 4096 tokens, got {self.block_size}")
        _require(self.kv_cache_gib is None or self.kv_cache_gib > 0,
                 f"kv_cache_gib must be positive, got {self.kv_cache_gib}")


@dataclass(frozen=True, kw_only=True)
class RingConfig:
    ring_size: int = 1
    """Ranks in the ring; each holds a share of every long prompt's KV cache."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the ranks compute; `auto` takes CUDA devices when there are enough of them."""

    threads_per_rank: int | None = None
    """CPU threads of each rank. Unset: the cores divided by the ranks, at least one."""

    transport: TransportName = "auto"
    """How ranks exchange tensors: `shm` (shared memory on one host), `nccl` (GPUs), `symm` (GPUs of one
    host that reach each other's memory: their copy engines), `gloo` (sockets)."""

    ring_mode: RingMode = "auto"
    """What travels in prefill: keys and values, queries, or whichever the cost model predicts is faster."""

    ring_segment: int = 8192
    """Most tokens of KV in one message of the ring."""

    ring_timeout_s: float = 120.0
    """Seconds a rank waits for a peer's message before the step is given up."""

    step_timeout_s: float = 1800.0
    """Seconds in which every rank must have reported a step."""

    def __post_init__(self) -> None:
        check_types(self)
        _require(1 <= self.ring_size <= 64, f"ring_size must be in 1 to 64, got {self.ring_size}")
        _require(self.threads_per_rank is None or self.threads_per_rank > 0,
                 f"threads_per_rank must be positive, got {self.threads_per_rank}")
        _require(self.ring_segment >= 1, f"ring_segment must be at least 1 token, got {self.ring_segment}")
        for name in ("ring_timeout_s", "step_timeout_s"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    max_step_ms: float | None = None
    """Milliseconds that a step should last at most: what a new request waits before it is seen, and the longest gap
    between two tokens. Unset: what a full chunk takes at the start of a prompt, but 100 to 500; 500 while a request is
    alone."""

    policy: PolicyName = "srpt"
    """Which prefills get the time of a step first. See docs/scheduling.md for the comparison."""

    ride_along: bool = True
    """Give short prefills up to half of each step, whatever the policy says."""

    ring_width: int | None = None
    """Ranks that each request uses. Unset: as many as make it faster by enough, by the cost model."""

    max_queue_s: float | None = None
    """Predicted seconds of prefill work, running and queued, beyond which requests are refused; for short requests,
    seconds of short ones. Unset: no limit."""

    tenant_weights: tuple[str, ...] = ()
    """Shares of tenants that differ from 1, written name=2."""

    max_chunk_tokens: int = 2048
    """Most new tokens in one step, over all requests and ranks."""

    max_running_requests: int = 256
    """Most requests that hold KV blocks at the same time; more wait in the queue. Never more than
    max_chunk_tokens, so that each can decode in every step."""

    max_waiting_requests: int = 4096
    """Most requests in the queue; more are refused."""

    output_reserve: int = 2048
    """Output tokens for which blocks are set aside when a request starts; more are taken as it grows."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_chunk_tokens", "max_running_requests", "max_waiting_requests", "output_reserve"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_step_ms", "ring_width", "max_queue_s"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be positive, got {value}")

    @property
    def most_running(self) -> int:
        return min(self.max_running_requests, self.max_chunk_tokens)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    ring: RingConfig = field(default_factory=RingConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
