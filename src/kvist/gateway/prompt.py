"""A request body as a query: which model, which prompt, which isolation.

Without a tokenizer the prompt is the JSON text of what the template renders: tool definitions, then messages.
Whatever the client sends again byte for byte matches again: the text of an earlier turn is a prefix of the
next one's once the closing bracket is left out. Nothing is decoded but the fields that are needed.
"""

from __future__ import annotations

import msgspec

from kvist.model import Query

BYTES_PER_TOKEN = 4  # of English text, for lengths in token terms


class Body(msgspec.Struct):
    """The fields that matter for routing; all others are ignored here and passed on."""

    model: str | None = None
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    text: msgspec.Raw = msgspec.Raw()
    input_ids: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    documents: msgspec.Raw = msgspec.Raw()
    chat_template: msgspec.Raw = msgspec.Raw()
    chat_template_kwargs: msgspec.Raw = msgspec.Raw()
    mm_processor_kwargs: msgspec.Raw = msgspec.Raw()
    lora_path: msgspec.Raw = msgspec.Raw()
    stream: bool | None = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    cache_salt: str | None = None
    user: str | None = None
    priority: int | None = 0


class BadBody(ValueError):
    """The body is not what the path takes; the message says what is wrong."""


_decoder = msgspec.json.Decoder(Body)


def parse(body: bytes) -> Body:
    """Raises BadBody naming the field."""
    try:
        return _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise BadBody(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadBody(f"the body is not valid JSON: {error}") from None


def to_query(number: int, kind: str, body: Body, tenant: str) -> Query:
    """The query that a body of this kind makes. Raises BadBody if its prompt is missing."""
    if kind == "chat":
        prompt = bytes(body.tools) + _open(_required(body.messages, "messages"))
    elif kind == "completion":
        prompt = _open(_required(body.prompt, "prompt"))
    elif kind == "responses":
        prompt = bytes(body.tools) + bytes(body.instructions) + _open(_required(body.input, "input"))
    elif kind == "embeddings":
        prompt = _open(_required(body.input, "input"))
    elif kind == "generate":
        prompt = _open(_required(body.text if bytes(body.text) else body.input_ids, "text"))
    else:
        prompt = _open(bytes(body.messages) or bytes(body.prompt))
    output = body.max_completion_tokens or body.max_tokens or body.max_output_tokens or 1
    return Query(
        number,
        prompt,
        output_tokens=output,
        unit=1,
        salt=_salt(kind, body, tenant),
        model=body.model or "",
        tenant=tenant,
        priority=body.priority or 0,
    )


def engine_salt(lora: str, cache_salt: str) -> bytes:
    """What keeps equal token ids apart in an engine's cache: the LoRA adapter's name, and the cache salt."""
    if not lora and not cache_salt:
        return b""
    return f"{lora}\0{cache_salt}".encode("utf-8", "surrogatepass")


def _required(value: msgspec.Raw, name: str) -> bytes:
    raw = bytes(value)
    if not raw or raw == b"null":
        raise BadBody(f"the field `{name}` is missing")
    return raw


def _open(raw: bytes) -> bytes:
    """JSON text without what closes it, so that a longer list or string has it as a prefix."""
    return raw[:-1].rstrip() if raw.endswith((b"]", b'"', b"}")) else raw


def _salt(kind: str, body: Body, tenant: str) -> bytes:
    """What keeps prefixes apart: kind of template, model, cache salt with its tenant, template settings."""
    parts = [kind.encode(), (body.model or "").encode("utf-8", "surrogatepass")]
    if body.cache_salt:
        parts += [tenant.encode(), body.cache_salt.encode("utf-8", "surrogatepass")]
    parts += (
        bytes(body.documents),
        bytes(body.chat_template),
        bytes(body.chat_template_kwargs),
        bytes(body.mm_processor_kwargs),
        bytes(body.lora_path),
    )
    return b"\0".join(parts)
