"""Chat templates, rendered as Hugging Face transformers and vLLM render them.

A template is jinja2 that its model's author wrote: it runs in the immutable sandbox. Messages are brought
into the shape vLLM hands it (vllm/renderers/chat_utils.py): content as a list of parts where the template
loops over content, else as one text; arguments of tool calls as objects.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from xxhash import xxh3_128_hexdigest

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class CannotRender(ValueError):
    """The template does not take these messages."""


class ChatTemplate:
    """`special`: the tokenizer's named tokens (bos_token, …). Raises ValueError for a broken template."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """`{% generation %}` marks what the model wrote; it does not change the text."""

            tags = {"generation"}

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return nodes.Scope(body).set_lineno(line)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
        self.source = source
        self.special = special
        try:
            self._template = environment.from_string(source)
            self.lists = _loops_over_content(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error}") from None
        self._developer = "developer" in source

    def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The prompt as text. Raises CannotRender.

        `variables` as for transformers' apply_chat_template: tools, documents, add_generation_prompt,
        continue_final_message, and whatever else the template reads.
        """
        resume = variables.get("continue_final_message")
        tools = variables.get("tools")
        try:
            chat = [self._message(message) for message in messages]
            if not self._developer and any(message["role"] == "developer" for message in chat):
                chat = _one_system(chat)
            if resume:
                _mark(chat)
            shaped = {"messages": chat, "tools": [_tool(tool) for tool in tools] if tools else None}
            text: str = self._template.render(**{**self.special, **variables, **shaped})
        except Exception as error:  # whatever a template may raise
            raise CannotRender(f"{type(error).__name__}: {error}") from None
        return _cut(text) if resume else text

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        role, content = message["role"], message.get("content")
        parts = [content] if isinstance(content, str) else content or []
        made = [found for part in parts if (found := _part(part)) is not None]
        shaped: dict[str, Any] = {"role": role}
        if self.lists and not (role == "tool" and all(part["type"] == "text" for part in made)):
            shaped["content"] = made
        else:
            shaped["content"] = "\n".join(part["text"] for part in made)
        if role == "assistant" and message.get("tool_calls"):
            shaped["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        if role == "assistant":
            reasoning = message.get("reasoning", message.get("reasoning_content"))
            if reasoning is not None:
                shaped["reasoning"] = shaped["reasoning_content"] = reasoning
        if role == "tool" and "tool_call_id" in message:
            shaped["tool_call_id"] = message["tool_call_id"]
        if isinstance(message.get("name"), str):
            shaped["name"] = message["name"]
        return shaped


def _part(part: Any) -> dict[str, Any] | None:
    """A part of a message's content. What is no text becomes text that names its content's digest.

    An engine puts as many placeholder tokens there as the image needs, which only it knows: up to there the
    ids line up with its own, and behind it equal images still match each other.
    """
    if isinstance(part, str):
        return {"type": "text", "text": part}
    field = _TEXT_PARTS.get(part.get("type", "text"))
    if field is not None:
        text = part.get(field)
        return None if text is None else {"type": "text", "text": text}
    digest = xxh3_128_hexdigest(json.dumps(part, sort_keys=True, ensure_ascii=True).encode())
    return {"type": "text", "text": f"<{part['type']} {digest}>"}


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = {}
    function["arguments"] = arguments if isinstance(arguments, dict) else {}
    return {**call, "function": function}


def _tool(tool: Any) -> Any:
    """A tool in the order of fields, and with the defaults, that vLLM gives it."""
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        return tool
    function = tool["function"]
    known = {"name": function.get("name"), "description": None, "parameters": None}
    shaped = {"type": "function", "function": {**known, **function}}
    return {**shaped, **{key: value for key, value in tool.items() if key not in shaped}}


def _one_system(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Developers' messages as the system's, and all of these as one at the start unless it is so already."""
    for message in chat:
        if message["role"] == "developer":
            message["role"] = "system"
    if all(message["role"] != "system" for message in chat[1:]):
        return chat
    system = [message["content"] for message in chat if message["role"] == "system"]
    texts = [
        content if isinstance(content, str) else "\n".join(part["text"] for part in content)
        for content in system
    ]
    merged = {"role": "system", "content": "\n\n".join(filter(None, texts))}
    return [merged, *(message for message in chat if message["role"] != "system")]


def _mark(chat: list[dict[str, Any]]) -> None:
    """Put a tag behind the final message's text, to cut the rendered prompt there."""
    content = chat[-1]["content"]
    if isinstance(content, str):
        chat[-1]["content"] = content + _TAG
        return
    texts = [part for part in content if "text" in part]
    if not texts:
        raise CannotRender("continue_final_message: the final message has no text")
    texts[-1]["text"] += _TAG


def _cut(text: str) -> str:
    at = text.rfind(_TAG.strip())
    if at < 0:
        raise CannotRender("continue_final_message: the template changes the final message")
    kept = text[:at]
    return kept if text.startswith(_TAG, at) else kept.rstrip()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _loops_over_content(tree: Any) -> bool:
    """Whether the template goes through the parts of a message's content, rather than printing it."""
    from jinja2 import nodes

    def names_content(node: Any) -> bool:
        while isinstance(node, nodes.Filter | nodes.Test):
            node = node.node
        if isinstance(node, nodes.Getattr):
            return bool(node.attr == "content")
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Name) and node.name in named

    named = {"content"}
    for assigned in tree.find_all(nodes.Assign):
        if isinstance(assigned.target, nodes.Name) and names_content(assigned.node):
            named.add(assigned.target.name)
    return any(names_content(loop.iter) for loop in tree.find_all(nodes.For))
