"""The official OpenAI client through the gateway, in front of embedded engines."""

from __future__ import annotations

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
