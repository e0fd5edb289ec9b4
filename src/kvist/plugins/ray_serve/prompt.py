"""What a Ray Serve call asks for: the arguments of a handle call as a query.

Ray Serve LLM calls its model deployment with the OpenAI request object as the first argument; any other
deployment names a function `prompt(args, kwargs)` that returns text, bytes, an OpenAI body or None.
An HTTP proxy's call carries no body (the replica reads it later), so it has no prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from kvist.gateway.prompt import Body, to_query
from kvist.model import Query

Prompt = Callable[[Sequence[Any], Mapping[str, Any]], Any]
FIELDS = Body.__struct_fields__
_ASKS = ("messages", "prompt", "input")  # one of these makes an object an OpenAI request


def openai_request(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first argument that looks like an OpenAI request, a mapping or an object; None without one."""
    for value in (*args, *kwargs.values()):
        if any(_field(value, name) is not None for name in _ASKS):
            return value
    return None


def query_of(number: int, asked: Any, model: str = "") -> Query | None:
    """A query of what a prompt function returned; None if there is no prompt to see.

    model: overrides the request's own, as a multiplexed model id does. Raises TypeError for other values.
    """
    if asked is None:
        return None
    if isinstance(asked, (str, bytes)):
        text = asked.encode("utf-8", "surrogatepass") if isinstance(asked, str) else bytes(asked)
        return Query(number, text, unit=1, salt=b"text\0" + model.encode(), model=model)
    body = _body(asked)
    if model:
        body.model = model
    kind = "chat" if bytes(body.messages) else "completion" if bytes(body.prompt) else "embeddings"
    if not bytes(body.messages) and not bytes(body.prompt) and not bytes(body.input):
        raise TypeError(
            f"a prompt function must return text, bytes, an OpenAI body or None, not {type(asked).__name__}"
        )
    return to_query(number, kind, body, "")


def _body(asked: Any) -> Body:
    given = {name: value for name in FIELDS if (value := _field(asked, name)) is not None}
    return msgspec.json.decode(msgspec.json.encode(given, enc_hook=_plain), type=Body, strict=False)


def _field(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(name)
    if isinstance(value, (str, bytes, int, float, list, tuple)) or callable(getattr(value, name, None)):
        return None
    return getattr(value, name, None)


def _plain(value: Any) -> Any:
    """Pydantic models, iterators and other objects inside a request, as JSON takes them."""
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        return dump(exclude_none=True)
    if hasattr(value, "__iter__"):
        return list(value)
    return repr(value)
