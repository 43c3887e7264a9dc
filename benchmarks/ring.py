"""What the exchange of messages costs: compute, packing and exposed wait of every step, as the ranks report it.

    python benchmarks/ring.py --tokens 32768 131072 --ring 2 --rounds 3

Each rank has one thread. Exposed is what the overlap does not hide: seconds a rank waited for a peer, which includes
waiting for one that had more to compute. Every answer is checked.
"""

import argparse
import statistics
from array import array
from pathlib import Path
from typing import Any

from report import report
from ringserve_api.demo import DEPTHS, Haystack

from ringserve.config import EngineConfig, ModelConfig, RingConfig, SchedulerConfig
from ringserve.devices import place_ranks
from ringserve.engine import LLMEngine
from ringserve.executor import LocalExecutor
from ringserve.model.checkpoint import read_checkpoint
from ringserve.needle import needle_directory
from ringserve.plan import RankTimes
from ringserve.sampling_params import SamplingParams
from ringserve.tokenizer import Tokenizer
from ringserve.updates import AddRequest

OUTPUT_TOKENS = 33


def run(engine: LLMEngine, ids: list[int]) -> tuple[list[list[RankTimes]], list[int]]:
    """[steps][ranks] of one request, and its output."""
    steps: list[list[RankTimes]] = []
    output: list[int] = []
    engine.add(AddRequest(request_id="ring", token_ids=array("I", ids).tobytes(), end_token_ids=(),
                          params=SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)))
    while engine.has_work:
        done = engine.executor.execute(plan := engine.scheduler.schedule())
        engine.scheduler.update(plan, done)
        steps.append([rank.times for rank in done.ranks])
        output += [token for sampled in done.sampled for token in sampled.token_ids]
    return steps, output


def shares(steps: list[list[RankTimes]]) -> tuple[float, float]:
    """Packing and exposed wait as shares of the ranks' time, in percent."""
    total = sum(rank.total for step in steps for rank in step)
    return tuple(100 * sum(getattr(rank, name) for step in steps for rank in step) / total  # type: ignore[return-value]
                 for name in ("packing", "wait"))


def exchange(step: list[RankTimes]) -> float:
    """Seconds that a decode step's messages cost the rank whose row it is: it waits least, the others for its row."""
    own = min(step, key=lambda rank: rank.wait)
    return own.packing + own.wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768, 131_072])
    parser.add_argument("--ring", type=int, default=2)
    parser.add_argument("--modes", nargs="+", default=["auto", "pass-kv", "pass-q"])
    parser.add_argument("--transport", default="auto", choices=["auto", "shm", "gloo"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    model = str(needle_directory())
    checkpoint = read_checkpoint(ModelConfig(model=model))
    tokenizer = Tokenizer(model)
    haystacks = {tokens: Haystack(tokenizer, tokens, DEPTHS) for tokens in args.tokens}
    rows: list[dict[str, Any]] = []
    for mode in args.modes:
        config = EngineConfig(
            model=ModelConfig(model=model), scheduler=SchedulerConfig(ring_width=args.ring),
            ring=RingConfig(ring_size=args.ring, ring_mode=mode, transport=args.transport, threads_per_rank=1,
                            device="cpu"))
        executor = LocalExecutor(args.ring, place_ranks(config.ring), config.ring.step_timeout_s)
        try:
            executor.load(config, model, checkpoint.dtype)
            engine = LLMEngine(config, executor, checkpoint.max_model_len, checkpoint.vocab_size,
                               checkpoint.element_bytes, None)
            layers = sum(len(group.layers) for group in executor.groups)
            for tokens, haystack in haystacks.items():
                prefills, decodes = [], []
                for number in range(args.rounds):
                    engine.scheduler.cache.clear()
                    question = number % len(DEPTHS)
                    steps, output = run(engine, tokenizer.encode(haystack.text + haystack.questions[question]))
                    if not tokenizer.decode(output).startswith(haystack.expected(question, 32)):
                        raise SystemExit(f"wrong answer: {tokenizer.decode(output)!r}")
                    prefill, decode = steps[:-(OUTPUT_TOKENS - 1)], steps[-(OUTPUT_TOKENS - 1):]
                    prefills.append((sum(max(rank.total for rank in step) for step in prefill), *shares(prefill)))
                    decodes.append(statistics.median(exchange(step) for step in decode) * 1e6 / layers)
                seconds, packing, exposed = (statistics.median(column) for column in zip(*prefills))
                rows.append({"mode": mode, "tokens": tokens, "prefill s": round(seconds, 2),
                             "packing %": round(packing, 2), "exposed %": round(exposed, 2),
                             "decode, exchange us a layer": round(statistics.median(decodes), 1)})
        finally:
            executor.close()
    report(f"ring of {args.ring}, medians of {args.rounds} rounds", list(rows[0]), rows, args.json)


if __name__ == "__main__":
    main()
