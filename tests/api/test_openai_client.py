"""The real openai client against a real server."""

import asyncio

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.api.conftest import RunningServer, eventually

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


def test_completion(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.completions.create(model="needle", prompt="añb", max_tokens=7, temperature=0)
    assert answer.choices[0].text == "añbañ"
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion" and answer.model == "needle" and answer.id.startswith("cmpl-")
    assert answer.system_fingerprint == "ringserve-0.1.0-r2"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 7, 11)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert server.engine.submitted[0][0] == answer.id
    assert server.engine.cancelled == []


def test_completion_options(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="needle", prompt="abc", max_tokens=9, stop="cab", echo=True,
                                       extra_body={"return_token_ids": True})
    assert answer.choices[0].text == "abcabcab"
    assert answer.choices[0].finish_reason == "stop"
    extra = answer.choices[0].model_extra
    assert extra == {"stop_reason": "cab", "token_ids": [97, 98, 99, 97, 98],
                     "prompt_token_ids": [97, 98, 99]}


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="needle", prompt="ab", max_tokens=3, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset) == (["a", "b", "a"], [0, 1, 2])
    assert logprobs.token_logprobs == [-0.25] * 3
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"a": -0.25, "\x01": -9999.0, "\x02": -9999.0}
    stream = client.completions.create(model="needle", prompt="ab", max_tokens=3, logprobs=0, stream=True)
    seen = [chunk.choices[0].logprobs for chunk in stream]
    assert [(item.tokens, item.text_offset, item.top_logprobs) for item in seen if item] == [
        (["a"], [0], [{"a": -0.25}]), (["b"], [1], [{"b": -0.25}]), (["a"], [2], [{"a": -0.25}])]


def test_streamed_completion(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="needle", prompt="añ", max_tokens=4, stream=True,
                                       stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "aña"
    assert chunks[0].choices[0].text == ""
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    numbers = [chunk.model_extra["sequence_number"] for chunk in chunks if chunk.model_extra]
    assert numbers == list(range(len(chunks)))
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="needle", messages=HI, max_completion_tokens=8,
                                            logprobs=True,
                                            top_logprobs=2)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "<user>hi"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert (logprobs.content[0].token, logprobs.content[0].bytes) == ("<", [60])
    top = [(item.token, item.logprob) for item in logprobs.content[0].top_logprobs]
    assert top == [("<", -0.25), ("\x01", -9999.0)]


def test_the_service_tier_is_told_when_it_was_asked_for(client: openai.OpenAI, server: RunningServer) -> None:
    assert client.chat.completions.create(model="needle", messages=HI, max_tokens=1).service_tier is None
    for asked, told in (("auto", "default"), ("default", "default"), ("flex", "flex"), ("priority", "priority")):
        answer = client.chat.completions.create(model="needle", messages=HI, max_tokens=1,
                                                service_tier=asked)  # type: ignore[call-overload]
        assert answer.service_tier == told
    chunks = list(client.chat.completions.create(model="needle", messages=HI, max_tokens=2, service_tier="flex",
                                                 stream=True, stream_options={"include_usage": True}))
    assert {chunk.service_tier for chunk in chunks} == {"flex"} and len(chunks) > 3
    completion = client.completions.create(model="needle", prompt="x", max_tokens=1,
                                           extra_body={"service_tier": "priority", "cache_salt": "s"})
    assert completion.model_extra is not None and completion.model_extra["service_tier"] == "priority"
    assert [wishes.priority for wishes in server.engine.scheduled] == [0, 0, 0, 3, -2, 3, -2]
    assert server.engine.scheduled[-1].cache_salt == "s"


def test_streamed_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="needle", messages=HI, max_tokens=8, stream=True,
                                            logprobs=True,
                                            extra_body={"return_token_ids": True})
    chunks = list(stream)
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert chunks[0].model_extra is not None and len(chunks[0].model_extra["prompt_token_ids"]) == 20
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "<user>hi"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_the_stream_helper_and_progress(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="needle", messages=HI, stop="<us",
                                        extra_body={"return_progress": True}) as stream:
        extras = [event.chunk.model_extra or {} for event in stream if event.type == "chunk"]
        assert stream.get_final_completion().choices[0].message.content == "<us"
    progress = [extra["prompt_progress"] for extra in extras if "prompt_progress" in extra]
    assert [item["processed"] for item in progress] == [0, 20]
    assert progress[1] == {"total": 20, "cache": 0, "processed": 20, "time_ms": 3, "percent": 100.0,
                           "eta_ms": None, "queue_position": 0}


def test_progress_is_opt_in(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="needle", messages=HI, max_tokens=1, stream=True)
    assert all(chunk.choices for chunk in stream)


def test_keep_alive_comments_do_not_disturb_the_client(client: openai.OpenAI, server: RunningServer) -> None:
    server.engine.first_step_s = 0.5
    stream = client.chat.completions.create(model="needle", messages=HI, max_tokens=3, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "<us"


def test_async_client_runs_many_at_once(server: RunningServer) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            async def one(index: int) -> None:
                text = f"{index:03}"
                stream = await client.completions.create(model="needle", prompt=text, max_tokens=30,
                                                         stream=True)
                assert "".join([chunk.choices[0].text async for chunk in stream]) == text * 10
            await asyncio.gather(*(one(index) for index in range(40)))
    asyncio.run(run())


def test_closing_a_stream_cancels_once(client: openai.OpenAI, server: RunningServer) -> None:
    server.engine.step_s = 0.01
    stream = client.chat.completions.create(model="needle", messages=HI, stream=True)
    request_id = next(iter(stream)).id
    stream.close()
    eventually(lambda: server.engine.cancelled)
    eventually(server.server.state.idle.is_set)
    assert server.engine.cancelled == [request_id]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["needle"]
    assert client.models.retrieve("needle").owned_by == "ringserve"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("someone/else")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_errors_reach_the_client_typed(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=HI)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="needle", messages=HI, max_tokens=8 << 20, stream=True)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["n_prompt_tokens"] == 20 and caught.value.body["n_ctx"] == 8 << 20
    assert caught.value.body["max_output_tokens"] == 8 << 20
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_an_error_in_a_stream_is_raised(client: openai.OpenAI, server: RunningServer) -> None:
    server.engine.broken = True
    stream = client.chat.completions.create(model="needle", messages=HI, stream=True)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "internal_error" and "secret" not in str(caught.value)
