"""The embedded engine's `/v1/responses`: input items to messages, answers and events in that API's shape."""

from __future__ import annotations

from typing import Any

import msgspec

from kvist.engine.api import NOTICE, BadRequest, Body

TEXT_TYPES = ("input_text", "output_text", "text")


def messages(body: Body) -> list[dict[str, Any]]:
    """The conversation as chat messages, so that an answer sent back is found in the cache.

    Raises BadRequest.
    """
    if body.previous_response_id:
        raise BadRequest("previous_response_id: this engine keeps no responses: send the whole conversation")
    found: list[dict[str, Any]] = []
    if body.instructions:
        found.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str) and body.input:
        return [*found, {"role": "user", "content": body.input}]
    if not isinstance(body.input, list) or not body.input:
        raise BadRequest("input: a text or a list of items is needed")
    for item in body.input:
        if not isinstance(item, dict):
            raise BadRequest("input: each item must be an object")
        role = item.get("role") or item.get("type")
        content = item.get("content")
        if item.get("role") is None:  # a tool's call or result: all of it is prompt
            content = msgspec.json.encode(item).decode()
        elif isinstance(content, list) and all(_is_text(part) for part in content):
            content = "".join(part["text"] for part in content)
        found.append({"role": role, "content": content})
    return found


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in TEXT_TYPES and isinstance(part.get("text"), str)


class Response:
    """One answer: `whole` at its end, or `events` token by token."""

    def __init__(self, number: int, created: int, model: str, limit: int | None) -> None:
        self.id = f"resp_{number}"
        self.item = f"msg_{number}"
        self.created = created
        self.model = model
        self.limit = limit
        self._events = 0
        self._text = ""

    def whole(self, text: str, usage: dict[str, Any]) -> dict[str, Any]:
        cut = self.limit is not None
        return {
            **self._frame("incomplete" if cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._message(text, "incomplete" if cut else "completed")],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }

    def _frame(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "model": self.model,
            "max_output_tokens": self.limit,
            "metadata": {"engine": NOTICE},
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "output": [],
        }

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [self._part(text)]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": []}

    def events(self, text: str, first: bool, usage: dict[str, Any] | None) -> bytes:
        """What one more token adds to the stream; `usage` with the last one."""
        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        out = []
        if first:
            for name in ("created", "in_progress"):
                out.append(self._event(name, response=self._frame("in_progress")))
            out.append(
                self._event("output_item.added", output_index=0, item=self._message(None, "in_progress"))
            )
            out.append(self._event("content_part.added", **place, part=self._part("")))
        self._text += text
        out.append(self._event("output_text.delta", **place, delta=text, logprobs=[]))
        if usage is not None:
            answer = self.whole(self._text, usage)
            out.append(self._event("output_text.done", **place, text=self._text, logprobs=[]))
            out.append(self._event("content_part.done", **place, part=self._part(self._text)))
            out.append(self._event("output_item.done", output_index=0, item=answer["output"][0]))
            out.append(self._event(answer["status"], response=answer))
        return b"".join(out)

    def _event(self, name: str, **fields: Any) -> bytes:
        kind = f"response.{name}"
        data = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(data))
