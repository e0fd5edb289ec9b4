"""The embedded engine's OpenAI API: bodies to queries, tokens to answers.

Tokens without a tokenizer: four bytes of UTF-8 are one token, each message padded to whole tokens. The
engine models timing and caching, not language: its answers are filler that says so, the same whenever
asked, so a conversation that is sent again with its answers finds them in the cache.
"""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import numpy as np

from kvist.model import Query
from kvist.workloads.base import text_tokens

NOTICE = "kvist-model"  # in every answer's system_fingerprint
FILLER = "kvist models an engine, so this text is filler. "
PIECES = tuple(FILLER[i : i + 4] for i in range(0, len(FILLER), 4))  # a token each
DEFAULT_TOKENS = 16
MOST_TOKENS = 1 << 20
EMBEDDING = 64  # dimensions


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class Body(msgspec.Struct):
    """What the engine reads of a request; everything else is accepted and ignored."""

    model: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[Any] | None = None
    input: str | list[Any] | None = None
    text: str | None = None
    tools: list[Any] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tool_choice: str | dict[str, Any] | None = None
    sampling_params: dict[str, Any] | None = None
    n: int | None = 1
    cache_salt: str | None = None


class BadRequest(ValueError):
    """The message names the field and what it must be."""


def parse(data: bytes) -> Body:
    """Raises BadRequest."""
    try:
        body = msgspec.json.decode(data, type=Body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(str(error)) from None
    if body.n not in (None, 1):
        raise BadRequest(f"n: this engine gives one answer, not {body.n}")
    return body


def render(messages: list[dict[str, Any]], tools: list[Any] | None) -> bytes:
    """Packed tokens of a chat: tools, then each message behind its role, then the answer's own head."""
    parts = [text_tokens(msgspec.json.encode(tools).decode())] if tools else []
    for message in messages:
        role = message.get("role")
        if not isinstance(role, str):
            raise BadRequest("messages: each message needs a `role`")
        content = message.get("content")
        text = content or ""
        if not isinstance(text, str):
            text = msgspec.json.encode(text).decode()
        if message.get("tool_calls"):
            text += msgspec.json.encode(message["tool_calls"]).decode()
        parts += [_head(role), text_tokens(text)]
    return b"".join([*parts, _head("assistant")])


def _head(role: str) -> bytes:
    return text_tokens(f"<|{role}|>")


def to_query(number: int, path: str, body: Body, messages: list[dict[str, Any]] | None = None) -> Query:
    """`messages`: the prompt where the body has another form. Raises BadRequest if the prompt is missing or a
    limit makes no sense.
    """
    if path.endswith("chat/completions"):
        if not body.messages:
            raise BadRequest("messages: a list of at least one message is needed")
        prompt = render(body.messages, body.tools)
    elif messages is not None:
        prompt = render(messages, body.tools)
    else:
        prompt = _plain(body.text if path == "/generate" else body.prompt)
    given = (body.max_completion_tokens, body.max_tokens, body.max_output_tokens)
    limit = next((each for each in given if each is not None), None)
    if limit is None and body.sampling_params:
        limit = body.sampling_params.get("max_new_tokens")
    limit = DEFAULT_TOKENS if limit is None else limit
    if not isinstance(limit, int) or not 1 <= limit <= MOST_TOKENS:
        raise BadRequest(f"max_tokens: must lie between 1 and {MOST_TOKENS}, not {limit}")
    salt = (body.cache_salt or "").encode("utf-8", "surrogatepass")
    answer = b"".join(piece.encode() for piece in pieces(limit))
    return Query(number, prompt, limit, salt=salt, answer=answer)


def forced_tool(body: Body) -> str | None:
    """The name of the function that must be called, if one must. Raises BadRequest."""
    choice = body.tool_choice
    if choice in (None, "auto", "none"):
        return None
    functions = [tool.get("function") for tool in body.tools or [] if isinstance(tool, dict)]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    if choice == "required" and names and isinstance(names[0], str):
        return names[0]
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in names:
        raise BadRequest("tool_choice: must be auto, none, required or the name of a function in `tools`")
    return name


def _plain(prompt: Any) -> bytes:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return text_tokens(prompt)
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        if not 0 <= min(prompt) <= max(prompt) < 1 << 32:
            raise BadRequest("prompt: token ids must lie between 0 and 2**32 - 1")
        return np.array(prompt, dtype="<u4").tobytes()
    raise BadRequest("prompt: a text or a list of token ids is needed, one prompt a request")


def pieces(count: int) -> list[str]:
    """The answer's tokens as text, four bytes each."""
    return [PIECES[i % len(PIECES)] for i in range(count)]


def usage(query: Query, cached: int, generated: int) -> dict[str, Any]:
    return {
        "prompt_tokens": query.length,
        "completion_tokens": generated,
        "total_tokens": query.length + generated,
        "prompt_tokens_details": {"cached_tokens": max(cached, 0)},
    }


def whole(
    path: str, number: int, created: int, model: str, query: Query, text: str, cached: int, tool: str | None
) -> dict[str, Any]:
    """A complete answer; with `tool`, a call of that function instead of text."""
    used = usage(query, cached, query.output_tokens)
    if path == "/generate":
        return {
            "text": text,
            "meta_info": {
                "id": str(number),
                "prompt_tokens": query.length,
                "completion_tokens": query.output_tokens,
                "cached_tokens": max(cached, 0),
                "finish_reason": {"type": "length", "length": query.output_tokens},
            },
        }
    chat = path.endswith("chat/completions")
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "logprobs": None}
    if chat and tool is not None:
        call = {"id": f"call_{number}", "type": "function", "function": {"name": tool, "arguments": "{}"}}
        choice["message"] = {"role": "assistant", "content": None, "tool_calls": [call]}
        choice["finish_reason"] = "tool_calls"
    elif chat:
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    return {**_frame(chat, number, created, model, streamed=False), "choices": [choice], "usage": used}


def piece(
    path: str, number: int, created: int, model: str, text: str, first: bool, last: bool, tool: str | None
) -> dict[str, Any]:
    """One token of a stream."""
    chat = path.endswith("chat/completions")
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if last else None, "logprobs": None}
    if chat and tool is not None:
        call: dict[str, Any] = {"index": 0, "function": {"arguments": "{}" if last else ""}}
        if first:
            call |= {"id": f"call_{number}", "type": "function"}
            call["function"]["name"] = tool
        choice["delta"] = {"role": "assistant", "tool_calls": [call]} if first else {"tool_calls": [call]}
        choice["finish_reason"] = "tool_calls" if last else None
    elif chat:
        choice["delta"] = {"role": "assistant", "content": text} if first else {"content": text}
    else:
        choice["text"] = text
    return {**_frame(chat, number, created, model, streamed=True), "choices": [choice]}


def _frame(chat: bool, number: int, created: int, model: str, *, streamed: bool) -> dict[str, Any]:
    kind = "text_completion" if not chat else "chat.completion.chunk" if streamed else "chat.completion"
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{number}",
        "object": kind,
        "created": created,
        "model": model,
        "system_fingerprint": NOTICE,
    }


def embeddings(model: str, body: Body) -> dict[str, Any]:
    """Unit vectors that are a function of the text alone: right in shape, empty of meaning."""
    given = body.input
    if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int)):
        given = [given]
    if not isinstance(given, list) or not given:
        raise BadRequest("input: a text, a list of texts or token ids is needed")
    data, tokens = [], 0
    for i, item in enumerate(given):
        packed = _plain(item)
        tokens += len(packed) // 4
        vector = np.random.default_rng(zlib.crc32(packed)).standard_normal(EMBEDDING)
        vector /= np.linalg.norm(vector)
        data.append({"object": "embedding", "index": i, "embedding": vector.tolist()})
    return {
        "object": "list",
        "model": model,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
