"""The official OpenAI client through the gateway, in front of embedded engines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from gateway_processes import at_rest, engine, metric, running, wait_for

TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running([engine(), engine("--eviction=l-lru")]) as gateway:
        wait_for(lambda: openai_client(gateway.url).models.list().data)
        yield gateway.url


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def test_chat_and_its_cache_truth(url: str) -> None:
    client = openai_client(url)
    messages = [{"role": "user", "content": "once upon a time " * 100}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)  # type: ignore[arg-type]
    assert first.system_fingerprint == "kvist-model", "it says that it models an engine"
    answer = first.choices[0].message
    assert answer.content and first.usage and first.usage.completion_tokens == 8
    messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": "and then?"}]
    second = client.chat.completions.create(model="tiny", messages=messages)  # type: ignore[arg-type]
    assert second.usage and second.usage.prompt_tokens_details
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached and cached >= first.usage.prompt_tokens // 16 * 16, "the same worker, its prompt cached"
    assert metric(url, "kvist_cached_true_total") >= cached


def test_streams(url: str) -> None:
    stream = openai_client(url).chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "stream"}],
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = list(stream)
    texts = [piece.choices[0].delta.content for piece in pieces if piece.choices]
    assert len(texts) == 6 and all(texts)
    assert pieces[-1].usage and pieces[-1].usage.completion_tokens == 6


def test_completions_tools_embeddings_models(url: str) -> None:
    client = openai_client(url)
    assert client.completions.create(model="tiny", prompt="hello", max_tokens=3).choices[0].text
    with_tools = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        tools=[TOOL],  # type: ignore[list-item]
    )
    without = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    assert with_tools.usage and without.usage
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens, "tools are part of the prompt"
    vectors = client.embeddings.create(model="tiny", input=["a", "b", "a"], encoding_format="float").data
    assert vectors[0].embedding == vectors[2].embedding != vectors[1].embedding
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_tool_that_must_be_called_is_called(url: str) -> None:
    client = openai_client(url)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}
    for choice in ("required", {"type": "function", "function": {"name": "look"}}):
        answer = client.chat.completions.create(**asked, tool_choice=choice).choices[0]  # type: ignore[call-overload]
        call = answer.message.tool_calls[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        assert (call.function.name, call.function.arguments) == ("look", "{}")
    stream = client.chat.completions.create(**asked, tool_choice="required", max_tokens=3, stream=True)  # type: ignore[call-overload]
    deltas = [chunk.choices[0] for chunk in stream]
    calls = [delta.delta.tool_calls[0] for delta in deltas]
    assert calls[0].function.name == "look" and calls[0].id
    assert "".join(call.function.arguments for call in calls) == "{}"
    assert deltas[-1].finish_reason == "tool_calls"
    follow = [
        *asked["messages"],
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "a result"},
    ]
    assert client.chat.completions.create(**{**asked, "messages": follow}).choices[0].message.content  # type: ignore[call-overload]
    for wrong in ("required", {"type": "function", "function": {"name": "absent"}}):
        with pytest.raises(openai.BadRequestError, match="tool_choice"):
            client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "x"}],
                tool_choice=wrong,  # type: ignore[arg-type]
            )


def test_responses(url: str) -> None:
    client = openai_client(url)
    first = client.responses.create(
        model="tiny", instructions="be brief", input="once upon a time " * 100, max_output_tokens=8
    )
    assert first.output_text and first.status == "incomplete" and first.usage
    assert first.usage.output_tokens == 8 and first.usage.input_tokens > 400
    talk = [
        {"role": "user", "content": "once upon a time " * 100},
        *(item.model_dump() for item in first.output),
        {"role": "user", "content": [{"type": "input_text", "text": "and then?"}]},
    ]
    second = client.responses.create(model="tiny", instructions="be brief", input=talk)  # type: ignore[arg-type]
    assert second.status == "completed" and second.usage
    cached = second.usage.input_tokens_details.cached_tokens
    assert cached >= first.usage.input_tokens // 16 * 16, "the answer that was sent back is found too"
    events = list(client.responses.create(model="tiny", input="stream", max_output_tokens=5, stream=True))
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.incomplete"
    assert kinds.count("response.output_text.delta") == 5
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].response.output_text == text and text  # type: ignore[union-attr]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert metric(url, "kvist_cached_true_total") >= cached, "the gateway reads this API's usage too"
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tiny", input="x", previous_response_id="resp_1")


def test_every_answer_says_that_an_engine_is_modelled(url: str) -> None:
    client = openai_client(url)
    for raw in (
        client.chat.completions.with_raw_response.create(
            model="tiny", messages=[{"role": "user", "content": "x"}]
        ),
        client.completions.with_raw_response.create(model="tiny", prompt="x"),
        client.responses.with_raw_response.create(model="tiny", input="x"),
        client.embeddings.with_raw_response.create(model="tiny", input="x"),
    ):
        assert "a model of an engine" in raw.headers["server"]


def test_the_asynchronous_client_and_many_at_once(url: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:

            async def one(i: int) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": f"{i}"}], max_tokens=4, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(i) for i in range(40)))

    answers = asyncio.run(ask())
    assert len(answers) == 40 and all(len(answer) == 16 for answer in answers), "four tokens of four bytes"
    wait_for(lambda: at_rest(url))


def test_errors_have_the_clients_types(url: str) -> None:
    client = openai_client(url)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="absent", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="tiny", messages=[])
    with pytest.raises(openai.BadRequestError, match="exceed the KV cache"):
        client.completions.create(model="tiny", prompt="x", max_tokens=1_000_000)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="tiny", prompt="x", max_tokens=-1)


def test_a_client_that_leaves_frees_the_engine(url: str) -> None:
    client = openai_client(url)
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "long"}], max_tokens=100_000, stream=True
    )
    next(iter(stream))
    stream.close()
    wait_for(lambda: at_rest(url))
    assert metric(url, "kvist_requests_total", outcome="cancelled") == 1
