"""The offline API on real processes: what a script's author sees, and what is left behind."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringserve import LLM, SamplingParams
from ringserve.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    InvalidValueError,
    RequestError,
)
from ringserve.llm import engine_config
from tests.families import load_eager
from tests.processes import descendants, kill, listeners, wait_until_gone
from tests.ringserve.conftest import FamilyDirectory

GREEDY_SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(family_directory: FamilyDirectory) -> Iterator[LLM]:
    with LLM(str(family_directory("qwen3")), ring_size=2, threads_per_rank=1, block_size=16, max_chunk_tokens=64,
             max_running_requests=8, kv_cache_gib=0.003) as opened:
        yield opened


def test_text_and_ids_are_completed_in_order(llm: LLM, family_directory: FamilyDirectory) -> None:
    import torch

    results = llm.generate(["the same text, more than a block of it", {"prompt_token_ids": [7, 8, 9]}], GREEDY)
    model = load_eager(family_directory("qwen3"))
    for result in results:
        expected = model.generate(torch.tensor([result.prompt_token_ids]), max_new_tokens=12, do_sample=False,
                                  eos_token_id=None, pad_token_id=0)
        assert result.outputs[0].token_ids == expected[0, len(result.prompt_token_ids):].tolist()
        assert result.outputs[0].finish_reason == "length"
        assert result.usage.completion_tokens == 12


def test_many_requests_share_steps_and_blocks(llm: LLM) -> None:
    prompts = [{"prompt_token_ids": list(range(1 + i, 60 + 9 * i))} for i in range(20)]
    together = llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in prompts[::7]]  # type: ignore[arg-type]
    assert [r.outputs[0].token_ids for r in together[::7]] == [r.outputs[0].token_ids for r in alone]


def test_a_pool_too_small_for_all_still_finishes_all(llm: LLM) -> None:
    capacity = llm.info.kv_capacity_tokens
    length = capacity // 3
    prompts = [{"prompt_token_ids": [i + 1] * length} for i in range(6)]
    params = SamplingParams(max_tokens=length // 2, temperature=0, ignore_eos=True)
    results = llm.generate(prompts, params)  # type: ignore[arg-type]
    assert all(len(r.outputs[0].token_ids) == length // 2 for r in results)
    assert results[3].outputs[0].token_ids == llm.generate(prompts[3], params)[0].outputs[0].token_ids  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_text(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=5, ignore_eos=True)
    first, other = (llm.generate("seeded", p)[0].outputs[0].token_ids
                    for p in (params, SamplingParams(max_tokens=20, temperature=1.0, seed=6, ignore_eos=True)))
    assert llm.generate(["noise", "seeded"], params)[1].outputs[0].token_ids == first
    assert first != other


def test_progress_counts_up_to_the_prompt(llm: LLM) -> None:
    seen = []
    llm.generate({"prompt_token_ids": [3] * 300}, GREEDY,
                 on_progress=lambda _, event: seen.append(event.progress) if event.progress else None)
    processed = [p.processed for p in seen]
    assert processed == sorted(processed) and processed[-1] == 300 and len(processed) >= 2
    assert all(p.total == 300 and 0 <= p.percent <= 100 for p in seen)


def test_stop_strings_end_the_text(llm: LLM) -> None:
    whole = llm.generate("abc", SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))[0].outputs[0]
    stop = whole.text[5:7]
    result = llm.generate("abc", SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, stop=(stop,)))[0]
    assert result.outputs[0].text == whole.text[:whole.text.index(stop)]
    assert result.outputs[0].finish_reason == "stop" and result.outputs[0].stop_reason == stop


@pytest.mark.parametrize("prompt, param", [
    ({"prompt_token_ids": []}, "prompt"), ({"prompt_token_ids": [512]}, "prompt"),
    ({"prompt_token_ids": [-1]}, "prompt"),
    ({"prompt_token_ids": ["1"]}, "prompt"), ({"prompt_token_ids": [1.5]}, "prompt"), (17, "prompt")])
def test_a_bad_prompt_is_refused_before_any_work(prompt: object, param: str, llm: LLM) -> None:
    with pytest.raises(InvalidValueError) as caught:
        llm.generate([prompt], GREEDY)  # type: ignore[list-item]
    assert caught.value.param == param


def test_a_prompt_that_does_not_fit_names_both_numbers(llm: LLM) -> None:
    limit = llm.info.max_model_len
    with pytest.raises(ContextLengthError) as caught:
        llm.generate({"prompt_token_ids": [1] * limit}, GREEDY)
    assert (caught.value.n_prompt_tokens, caught.value.n_ctx) == (limit, limit)


def test_parameters_outside_the_vocabulary_are_refused(llm: LLM) -> None:
    for params in (SamplingParams(logit_bias={512: 1.0}), SamplingParams(stop_token_ids=(9999,))):
        with pytest.raises(RequestError, match="vocabulary"):
            llm.generate("x", params)


def test_nothing_listens_but_on_loopback(llm: LLM) -> None:
    assert all(address == "127.0.0.1" for address, _ in listeners([os.getpid(), *llm.info.pids]))


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        LLM(str(tmp_path / "nothing"))


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ConfigError, match="ring_sise"):
        LLM("needle", ring_sise=2)


def test_rope_scaling_may_be_a_dict() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    written = engine_config(model="m", rope_scaling=scaling).model.rope_scaling
    assert written is not None and json.loads(written) == scaling


@pytest.mark.parametrize("victim", ["rank", "engine"])
def test_a_killed_process_is_an_error_and_takes_the_others_along(victim: str,
                                                                family_directory: FamilyDirectory) -> None:
    with LLM(str(family_directory("llama")), ring_size=3, threads_per_rank=1, kv_cache_gib=0.01) as llm:
        engine, *ranks = llm.info.pids

        def murder(_: int, event: object) -> None:
            if victim == "rank":
                kill(ranks[1])
            else:
                kill(engine)

        with pytest.raises(EngineDeadError, match="rank 1" if victim == "rank" else "engine process"):
            llm.generate({"prompt_token_ids": [1] * 1500}, GREEDY, on_progress=murder)
        wait_until_gone(llm.info.pids)
        with pytest.raises(EngineDeadError):
            llm.generate("more", GREEDY)


def test_closing_leaves_no_process(family_directory: FamilyDirectory) -> None:
    with LLM(str(family_directory("llama")), ring_size=2, kv_cache_gib=0.01) as llm:
        pids = llm.info.pids
        assert len(descendants(os.getpid()).get("rank_process", [])) >= 2
    wait_until_gone(pids)


SCRIPT = """
import sys
from ringserve import LLM, SamplingParams
llm = LLM(sys.argv[1], ring_size=2, kv_cache_gib=0.01)
print(*llm.info.pids, flush=True)
llm.generate({"prompt_token_ids": [1] * 1800}, SamplingParams(max_tokens=200, ignore_eos=True))
"""


def test_a_script_killed_in_the_middle_leaves_no_process(family_directory: FamilyDirectory) -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(family_directory("llama"))], stdout=subprocess.PIPE,
                          text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as script:
        assert script.stdout is not None
        pids = [int(word) for word in script.stdout.readline().split()]
        assert len(pids) == 3
        script.kill()
    wait_until_gone(pids)


LEFT_OPEN = """
import sys
from ringserve import LLM
llm = LLM(sys.argv[1], ring_size=2, kv_cache_gib=0.01)
print(*llm.info.pids, flush=True)
raise SystemExit(7)
"""


def test_a_script_that_forgets_to_close_ends_quietly_and_leaves_no_process(
        family_directory: FamilyDirectory) -> None:
    ended = subprocess.run([sys.executable, "-c", LEFT_OPEN, str(family_directory("llama"))], capture_output=True,
                           text=True, timeout=120, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert (ended.returncode, ended.stderr) == (7, "")
    wait_until_gone([int(word) for word in ended.stdout.split()])


def test_a_forgotten_object_is_closed(family_directory: FamilyDirectory) -> None:
    llm = LLM(str(family_directory("llama")), kv_cache_gib=0.01)
    pids = llm.info.pids
    del llm
    gc.collect()
    wait_until_gone(pids)


@pytest.mark.parametrize("gib", [0.0002, 0.0005])
def test_a_cache_smaller_than_a_chunk_starts_and_serves(gib: float, family_directory: FamilyDirectory) -> None:
    """What is run at start to learn the costs must fit whatever room there is, also on one rank of three."""
    with LLM(str(family_directory("llama")), ring_size=3, threads_per_rank=1, block_size=16, kv_cache_gib=gib) as llm:
        assert llm.info.kv_capacity_tokens < 2048
        [result] = llm.generate({"prompt_token_ids": [1] * (llm.info.max_model_len - 4)}, GREEDY_SHORT)
        assert len(result.outputs[0].token_ids) == 4
