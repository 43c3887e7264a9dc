"""Self-test: does this ring, with this model on these devices, compute what transformers computes?

Every run is teacher-forced (greedy tokens alone hide almost every error) on texts that cross block, chunk and rank
edges and are longer than every window. The oracle is transformers' own eager attention with its own masks; the
bound is that oracle's own floor:

    fp32     relative RMS to eager fp32 <= max(1e-5, twice eager fp32's distance to fp64)
    16 bits  distance to eager fp32 no worse than eager 16 bit's own, within a tenth
    greedy   the oracle's token wherever its margin exceeds ten times the bound

With keys and values in int8 or fp8 the oracle's are quantized in the same way; what the format itself costs is the
oracle's distance to plain eager attention, and is said. Numbers near the border of two codes fall to either side, so
two roundings of a quantized run differ more: a run may be off by as much as the format costs, and greedy tokens are
only counted.
"""

import random
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ringserve.async_engine import resolve_model
from ringserve.config import EngineConfig, KVCacheDtype, RingMode
from ringserve.devices import place_ranks
from ringserve.engine import LLMEngine
from ringserve.errors import ConfigError
from ringserve.executor import LocalExecutor
from ringserve.model.checkpoint import Checkpoint, read_checkpoint
from ringserve.model.quiet import quiet_transformers
from ringserve.model.rope import fix_frequencies
from ringserve.teacher import Logits, Teacher

DECODE_STEPS = 64
EDGE_POSITIONS = 96
CHUNKS = 3
LONGEST_WINDOW = 8192
"""Longer windows are not crossed: the eager oracle needs memory for the square of the text."""

Text = list[int]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run against the oracle."""

    name: str
    error: float
    """Relative RMS of the logits."""
    bound: float
    tokens: int
    """Positions at which the oracle's greedy token is certain."""
    equal: int
    """Of those, how many agree."""
    quantized: bool = False

    @property
    def passed(self) -> bool:
        return self.error <= self.bound and (self.equal == self.tokens or self.quantized)


@dataclass(frozen=True, kw_only=True)
class Oracle:
    logits: list[NDArray[np.float64]]
    """Per text, [positions, vocabulary], from eager attention: the reference of the bounds."""
    bound: float
    floor: float
    """The model's own distance from the next better precision, with transformers alone."""
    format_loss: float = 0.0
    """How far quantized keys and values change the logits, with transformers alone."""

    def compare(self, name: str, runs: list[Logits]) -> Outcome:
        """`runs`: what the engine gave, per text."""
        ours = np.concatenate([np.stack([run[p] for p in sorted(run)]) for run in runs]).astype(np.float64)
        theirs = np.concatenate(self.logits)
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        best = np.partition(theirs, -2, axis=-1)[:, -2:]
        certain = best[:, 1] - best[:, 0] > 10 * self.bound * _rms(theirs)
        equal = ours.argmax(-1)[certain] == theirs.argmax(-1)[certain]
        return Outcome(name=name, error=relative_rms(ours, theirs), bound=self.bound, tokens=int(certain.sum()),
                       equal=int(equal.sum()), quantized=self.format_loss > 0)


def relative_rms(value: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """rms(value - reference) / rms(reference); infinite when a value is not finite."""
    error = _rms(value - reference) / max(_rms(reference), 1e-300)
    return error if np.isfinite(error) else float("inf")


def _rms(x: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def run_selftest(config: EngineConfig, say: Callable[[str], None] = lambda _: None) -> Iterator[Outcome]:
    """Yield an outcome per run: one rank alone, then the ring as configured and in each mode.

    Raises StartupError when the model or the configuration cannot work."""
    directory = resolve_model(config.model.model)
    model = replace(config.model, model=directory)
    checkpoint = read_checkpoint(model)
    block, ring = config.cache.block_size, config.ring.ring_size
    # Small chunks, so that the texts may be short and still cross many edges.
    chunk = min(config.scheduler.max_chunk_tokens, max(2 * block * ring, 128))
    texts, prompts = make_texts(checkpoint, block, chunk)
    say(f"texts of {', '.join(str(len(text)) for text in texts)} tokens, chunks of {chunk}, blocks of {block}")
    for window in sorted(set(_windows(checkpoint.config.to_dict()))):
        if window > LONGEST_WINDOW:
            say(f"the window of {window} tokens is not crossed: the oracle would need memory for its square")
    positions = probe_positions(texts[0], prompts[0], block, chunk)
    stored = config.cache.kv_cache_dtype
    oracle = make_oracle(lambda: read_checkpoint(model), place_ranks(config.ring).devices[0], texts, positions, stored)
    say(f"transformers, eager: its own floor is {oracle.floor:.1e}")
    if stored != "auto":
        say(f"keys and values in {stored} change the logits by {oracle.format_loss:.1e} of their RMS")
    modes: dict[int, list[RingMode]] = {1: ["auto"], ring: [config.ring.ring_mode, "pass-kv", "pass-q"]}
    for size in sorted(modes):
        chosen = replace(config, model=model, ring=replace(config.ring, ring_size=size),
                         # No time limit: chunks end where the texts want them to, on every machine.
                         scheduler=replace(config.scheduler, max_chunk_tokens=chunk, max_step_ms=1e6))
        with closing(LocalExecutor(size, place_ranks(chosen.ring), config.ring.step_timeout_s)) as executor:
            executor.load(chosen, directory, checkpoint.dtype)
            for mode in dict.fromkeys(modes[size]):
                engine = LLMEngine(replace(chosen, ring=replace(chosen.ring, ring_mode=mode)), executor,
                                   checkpoint.max_model_len, checkpoint.vocab_size, checkpoint.element_bytes)
                runs = Teacher(engine).run(texts, prompts, positions)
                name = "one rank alone" if size == 1 else f"ring of {size}, {mode}"
                yield oracle.compare(name, runs)


def make_texts(checkpoint: Checkpoint, block: int, chunk: int) -> tuple[list[Text], list[int]]:
    """Texts and how much of each is its prompt: one over every edge, one shorter than a block, one just over one.

    Each repeats itself, so that distant keys matter."""
    rng = random.Random(0)
    windows = [int(w) for w in _windows(checkpoint.config.to_dict()) if w <= LONGEST_WINDOW]
    longest = max([CHUNKS * chunk, *(window + chunk for window in windows)]) + block // 2 + 1
    if longest + DECODE_STEPS > checkpoint.max_model_len:
        raise ConfigError(f"the self-test needs a context of {longest + DECODE_STEPS} tokens, this model's is "
                          f"{checkpoint.max_model_len}: use a smaller block_size")

    def text(length: int) -> Text:
        part = [rng.randrange(checkpoint.vocab_size) for _ in range(max(3, length // 3))]
        return (part * 4)[:length]

    prompts = [longest, 3, block + 1]
    return [text(longest + DECODE_STEPS), text(3 + DECODE_STEPS), text(block + 1 + DECODE_STEPS)], prompts


def _windows(config: object) -> Iterator[int]:
    """Every sliding window that a configuration names."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "sliding_window" and isinstance(value, int):
                yield value
            yield from _windows(value)


def probe_positions(text: Text, prompt: int, block: int, chunk: int) -> set[int]:
    """All decode steps of the longest text, everything short, and rows around block and chunk edges."""
    rng = random.Random(1)
    edges = [p + d for p in range(0, prompt, block) for d in (-1, 0, 1) if 0 <= p + d < prompt]
    chunk_edges = {p for p in edges if (p + 1) % chunk <= 2}
    return (set(range(prompt - 1, len(text))) | set(range(2 * block)) | chunk_edges
            | set(rng.sample(edges, min(EDGE_POSITIONS, len(edges)))))


def make_oracle(read: Callable[[], Checkpoint], device: str, texts: list[Text],
                positions: Collection[int] | None = None, stored: KVCacheDtype = "auto") -> Oracle:
    """Logits of transformers' eager attention at these positions (all by default), over keys and values as they are
    stored, and the bound that its own rounding sets."""
    dtype = getattr(torch, read().dtype)

    def eager(precision: torch.dtype, kept: KVCacheDtype = stored) -> list[NDArray[np.float64]]:
        return eager_logits(read(), precision, device, texts, positions, kept)

    def distance(value: list[NDArray[np.float64]], reference: list[NDArray[np.float64]]) -> float:
        return relative_rms(np.concatenate(value), np.concatenate(reference))

    reference = eager(torch.promote_types(dtype, torch.float32))
    loss = 0.0 if stored == "auto" else distance(reference, eager(torch.promote_types(dtype, torch.float32), "auto"))
    if dtype == torch.float64:
        return Oracle(logits=reference, floor=1e-12, bound=1e-10, format_loss=loss)
    least = max(1e-5, loss)
    if dtype == torch.float32:
        floor = distance(reference, eager(torch.float64))
        return Oracle(logits=reference, floor=floor, bound=max(least, 2 * floor), format_loss=loss)
    floor = distance(eager(dtype), reference)
    return Oracle(logits=reference, floor=floor, bound=max(least, 1.1 * floor), format_loss=loss)


def eager_logits(checkpoint: Checkpoint, dtype: torch.dtype, device: str, texts: list[Text],
                 positions: Collection[int] | None = None,
                 stored: KVCacheDtype = "auto") -> list[NDArray[np.float64]]:
    """[positions, vocabulary] of each text, by transformers alone. The model is gone when this returns."""
    from transformers import AutoModelForCausalLM

    from ringserve.model.quantized_eager import eager_name

    # transformers' grouped expert kernel knows no fp64.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, config=checkpoint.config, dtype=dtype, attn_implementation=eager_name(stored),
            use_safetensors=True, local_files_only=True, trust_remote_code=False, **experts).eval().to(device)
    fix_frequencies(model, checkpoint.max_model_len)
    logits = []
    for text in texts:
        wanted = [p for p in range(len(text)) if positions is None or p in positions]
        with torch.no_grad():
            output = model(input_ids=torch.tensor([text], device=device), use_cache=False,
                           logits_to_keep=torch.tensor(wanted, device=device))
        logits.append(output.logits[0].double().cpu().numpy())
    return logits
