"""What an answer says of its tokens, read from its last bytes without decoding the rest."""

from __future__ import annotations

import re
from typing import NamedTuple

TAIL = 1024  # bytes at the end of an answer in which `usage` is looked for

_USAGE = re.compile(
    rb'"(prompt_tokens|completion_tokens|cached_tokens|input_tokens|output_tokens)"\s*:\s*(\d+)'
)


class Usage(NamedTuple):
    """In tokens. prompt and output: 0 where unknown; cached: None where the engine does not say."""

    prompt: int
    output: int
    cached: int | None


def read_usage(tail: bytes, events: int) -> Usage:
    """`events`: those of a stream, 0 for none.

    Where a stream has no `usage`: engines send about one event a token, and two more.
    """
    found = _USAGE.findall(tail, max(tail.rfind(b'"usage"'), 0))
    usage = {name: int(value) for name, value in found}
    output = usage.get(b"completion_tokens", usage.get(b"output_tokens", 0))
    if not output and events:
        output = max(events - 2, 1)
    prompt = usage.get(b"prompt_tokens", usage.get(b"input_tokens", 0))
    return Usage(prompt, output, usage.get(b"cached_tokens"))
