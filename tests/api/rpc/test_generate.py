"""Generate: prompts in, answers out."""

import codecs
import json

import httpx
import pytest

from ringserve.v1 import inference_pb2 as pb
from tests.api.conftest import RunningServer, eventually
from tests.api.fakes import FakeInfo
from tests.api.rpc.calls import (
    Call,
    Stub,
    chunk,
    commit,
    ids_of,
    ids_open,
    kinds_of,
    little,
    prompts,
    text_of,
    text_open,
    upload,
)

TEXT = "Größe: 5 m²\n日本語の文\nthe end 🙂\n"


def test_a_text_and_its_answer(server: RunningServer, stub: Stub) -> None:
    with Call(stub, text_open(sampling=pb.Sampling(max_tokens=6)), *upload(TEXT.encode())) as call:
        events = call.rest()
    assert text_of(events) == "Größ" and ids_of(events) == list(TEXT.encode()[:6])
    finished = events[-1].finished
    assert finished.reason == pb.FINISH_REASON_LENGTH and finished.WhichOneof("stop") is None
    assert finished.usage == pb.Usage(prompt_tokens=len(TEXT.encode()), completion_tokens=6, cached_tokens=3)
    assert server.engine.cancelled == [] and prompts(server) == [list(TEXT.encode())]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_a_text_may_be_cut_anywhere(server: RunningServer, stub: Stub, size: int) -> None:
    with Call(stub, text_open(), *upload(TEXT.encode(), size)) as call:
        call.rest()
    assert prompts(server) == [list(TEXT.encode())]


def test_the_ids_are_those_that_http_gives(server: RunningServer, stub: Stub, http: httpx.Client) -> None:
    text = "".join(f"line {number}: é {'x' * (number % 50)}\n" for number in range(8000))
    http.post("/v1/completions", json={"model": "needle", "prompt": text, "max_tokens": 2}).raise_for_status()
    with Call(stub, text_open(), *upload(text.encode(), 70_001)) as call:
        call.rest()
    ours, theirs = prompts(server)
    assert ours == theirs == list(text.encode())


def test_ids_are_little_endian(server: RunningServer, stub: Stub) -> None:
    ids = [1, 2, 3, 254, 255, 257]
    with Call(stub, ids_open(sampling=pb.Sampling(max_tokens=3)), *upload(little(ids), 8)) as call:
        assert ids_of(call.rest()) == [1, 2, 3]
    assert prompts(server) == [ids]


def test_a_million_ids(server: RunningServer, stub: Stub) -> None:
    ids = list(range(256)) * 4096
    assert len(ids) == 1_048_576
    with Call(stub, ids_open(), *upload(little(ids))) as call:
        assert call.rest()[-1].finished.usage.prompt_tokens == len(ids)
    assert prompts(server) == [ids]


def test_events_come_in_order_and_are_numbered(server: RunningServer, stub: Stub) -> None:
    with Call(stub, text_open(), *upload(b"ab")) as call:
        events = call.rest()
    numbered = [event for event in events if event.WhichOneof("kind") not in ("queued", "prefill_progress")]
    assert kinds_of(numbered) == ["accepted", "estimated", "delta", "delta", "finished"]
    assert [event.sequence for event in numbered] == [1, 2, 3, 4, 5]
    before = 0
    for event in events:
        assert event.sequence == before + (event in numbered)
        before = event.sequence
    accepted = events[0].accepted
    assert not accepted.committed and accepted.received_bytes == 0 and len(accepted.request_id) == 32
    estimated = numbered[1].estimated
    assert (estimated.prompt_tokens, estimated.first_token_ms, estimated.ring_width) == (2, 7, 2)
    assert estimated.queue_position == 4 and estimated.kv_bytes == 400 and not estimated.HasField("queue_ms")


def test_progress_is_told(server: RunningServer, stub: Stub) -> None:
    server.engine.first_step_s = 0.2
    with Call(stub, text_open(), *upload(b"abcd")) as call:
        progress = call.until("prefill_progress")
        assert progress.sequence == 2 and progress.prefill_progress.total_tokens == 4
        call.rest()


@pytest.mark.parametrize("size", [{"prompt_tokens": 300}, {"prompt_bytes": 1200}])
def test_the_estimate_comes_before_the_prompt_that_is_announced(
        server: RunningServer, stub: Stub, size: dict[str, int]) -> None:
    with Call(stub, ids_open(**size)) as call:
        estimated = call.until("estimated").estimated
        assert estimated.prompt_tokens == 300 and server.engine.submitted == []
        assert server.engine.scheduled[0].cache_salt != ""
        call.send(*upload(little([7] * 300)))
        assert call.rest()[-1].finished.usage.prompt_tokens == 300


def test_prefill_begins_before_the_prompt_is_whole(server: RunningServer, stub: Stub) -> None:
    text = b"one line\n" * 1000
    ids = little(list(text))
    with Call(stub, ids_open(), chunk(ids[:8000])) as call:
        eventually(lambda: server.engine.submitted)
        name, prompt, params = server.engine.submitted[0]
        assert prompt == list(text)[:2000] and params.max_tokens == 1
        assert call.until("prefill_progress").prefill_progress.total_tokens == 2000
        call.send(chunk(ids[8000:], 8000), commit(ids))
        call.rest()
    assert prompts(server) == [list(text)]
    assert name not in server.engine.live


def test_prefill_of_a_text_begins_before_it_is_whole(server: RunningServer, stub: Stub) -> None:
    text = b"one line\n" * 20_000
    with Call(stub, text_open(), chunk(text[:100_000])) as call:
        eventually(lambda: server.engine.submitted)
        assert server.engine.submitted[0][1] == list(text[:99_999])
        call.send(chunk(text[100_000:], 100_000), commit(text))
        call.rest()
    assert prompts(server) == [list(text)]


def test_nothing_is_prefilled_early_without_a_prefix_cache(server: RunningServer, stub: Stub,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "info", FakeInfo(prefix_cache=False))
    ids = little([65] * 5000)
    with Call(stub, ids_open(), *upload(ids, 4000)) as call:
        call.rest()
    assert len(server.engine.submitted) == 1


def test_a_prefill_that_is_refused_early_is_no_misfortune(server: RunningServer, stub: Stub) -> None:
    ids = little([65] * 5000)
    server.engine.broken = True
    with Call(stub, ids_open(), chunk(ids)) as call:
        eventually(lambda: server.engine.submitted and not server.engine.live)
        server.engine.broken = False
        call.send(commit(ids))
        assert kinds_of(call.rest())[-1] == "finished"


def test_sampling_arrives_as_over_http(server: RunningServer, stub: Stub, http: httpx.Client) -> None:
    fields = {"max_tokens": 3, "min_tokens": 1, "temperature": 0.25, "top_p": 0.5, "top_k": 9, "min_p": 0.125,
              "seed": -5, "presence_penalty": 1.5, "frequency_penalty": -1.5, "repetition_penalty": 1.25,
              "stop": ["q", "zz"], "stop_token_ids": [200, 201], "ignore_eos": True, "skip_special_tokens": False,
              "logprobs": 2}
    body = {"model": "needle", "prompt": "abc", "logit_bias": {"7": 1.5}, "include_stop_str_in_output": True,
            "priority": -3, "cache_salt": "salt", **fields}
    http.post("/v1/completions", json=body).raise_for_status()
    sampling = pb.Sampling(**fields, logit_bias={7: 1.5}, include_stop_string=True)
    with Call(stub, text_open(sampling=sampling, scheduling=pb.Scheduling(priority=-3, cache_salt="salt")),
              *upload(b"abc")) as call:
        events = call.rest()
    (_, _, theirs), (_, _, ours) = server.engine.submitted
    assert ours == theirs and server.engine.scheduled[0] == server.engine.scheduled[1]
    logprobs = [entry for event in events for entry in event.delta.logprobs]
    assert [entry.token for entry in logprobs] == [b"a", b"b", b"c"]
    assert [top.token_id for top in logprobs[0].top] == [97, 1] and logprobs[0].logprob == -0.25


def test_defaults_arrive_as_over_http(server: RunningServer, stub: Stub, http: httpx.Client) -> None:
    http.post("/v1/completions", json={"model": "needle", "prompt": "abc", "max_tokens": 2}).raise_for_status()
    with Call(stub, text_open(), *upload(b"abc")) as call:
        call.rest()
    (_, _, theirs), (_, _, ours) = server.engine.submitted
    assert ours == theirs and ours.temperature == 0.5 and ours.top_k == 7


def test_without_a_limit_an_answer_ends_with_the_context(server: RunningServer, stub: Stub) -> None:
    server.engine.step_s = 60
    with Call(stub, text_open(sampling=pb.Sampling()), *upload(b"abc")):
        eventually(lambda: server.engine.submitted)
    assert server.engine.submitted[0][2].max_tokens is None


def test_what_ended_the_text_is_told(server: RunningServer, stub: Stub) -> None:
    with Call(stub, text_open(sampling=pb.Sampling(max_tokens=9, stop=["c"])), *upload(b"abc")) as call:
        finished = call.rest()[-1].finished
    assert finished.reason == pb.FINISH_REASON_STOP and finished.stop_string == "c"


def test_the_name_that_a_client_chooses(server: RunningServer, stub: Stub) -> None:
    with Call(stub, text_open(request_id="my.own-name_1"), *upload(b"abc")) as call:
        assert call.accepted.request_id == "my.own-name_1"
        call.rest()
    assert "my.own-name_1" not in json.dumps([name for name, _, _ in server.engine.submitted])


def test_a_text_with_a_byte_order_mark_keeps_it(server: RunningServer, stub: Stub) -> None:
    with Call(stub, text_open(), *upload(codecs.BOM_UTF8 + b"abc", 2)) as call:
        call.rest()
    assert prompts(server) == [list(codecs.BOM_UTF8 + b"abc")]
