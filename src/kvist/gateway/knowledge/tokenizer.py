"""Prompts as token ids, as the engine will make them.

A tokenizer from Hugging Face files cuts a text at its special tokens before anything else, so what stands
between two of them (in most chat templates: one message) is tokenised by itself. Such segments are kept: of a
prompt whose earlier part was seen before, only what is new costs time.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import msgspec

from kvist.gateway.knowledge.template import ChatTemplate
from kvist.model import pack

CACHE_BYTES = 64 << 20  # of text and ids; about 10 million tokens


class Pending(Protocol):
    """A prompt whose ids are not all known yet."""

    @property
    def work(self) -> int:
        """Characters still to be tokenised."""

    def finish(self) -> bytes:
        """Packed token ids. May run in another thread."""

    def keep(self) -> None:
        """Remember what `finish` made; in the event loop's thread."""


class Tokenizer(Protocol):
    @property
    def chats(self) -> bool:
        """Whether it has a chat template."""

    def prompt(self, kind: str, body: bytes) -> Pending:
        """What a request body (see kvist.gateway.prompt) makes of it. Raises ValueError if it cannot tell."""


class Fields(msgspec.Struct):
    """What makes a prompt, of the bodies of all paths."""

    messages: list[dict[str, Any]] | None = None
    prompt: str | list[Any] | None = None
    input: str | list[Any] | None = None
    text: str | list[str] | None = None
    input_ids: list[Any] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    add_special_tokens: bool | None = None


_decoder = msgspec.json.Decoder(Fields)


class Known:
    """A prompt that was given as token ids, or made of them without a tokenizer."""

    work = 0

    def __init__(self, ids: bytes) -> None:
        self.ids = ids

    def finish(self) -> bytes:
        return self.ids

    def keep(self) -> None:
        pass


class HuggingFace:
    """From a folder with tokenizer.json and tokenizer_config.json, or a tokenizer.json alone.

    Raises ValueError naming the file that is missing or broken, ModuleNotFoundError without the extra.
    """

    def __init__(self, path: Path) -> None:
        try:
            import jinja2  # noqa: F401  # chat templates need it: say so at start-up
            import tokenizers
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}: pip install 'kvist[tokenizer]'") from None
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"tokenizer {file}: no such file: give a folder that holds a tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"tokenizer {file}: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        folder = file.parent
        config = _read_json(folder / "tokenizer_config.json")
        special = {**_special(_read_json(folder / "special_tokens_map.json")), **_special(config)}
        self._templates = {
            name: ChatTemplate(source, special) for name, source in _templates(folder, config).items()
        }
        self._cache: OrderedDict[tuple[str, bool], bytes] = OrderedDict()
        self._cached_bytes = 0
        self._cut = self._separators()

    @property
    def chats(self) -> bool:
        return bool(self._templates)

    def prompt(self, kind: str, body: bytes) -> Pending:
        try:
            fields = _decoder.decode(body)
        except msgspec.DecodeError as error:
            raise ValueError(str(error)) from None
        if kind == "responses":
            fields = _responses(fields)
        if fields.messages is not None and kind not in ("completion", "embeddings", "generate"):
            return self._pending(self._render(fields), bool(fields.add_special_tokens))
        given = next(
            (v for v in (fields.prompt, fields.input, fields.text, fields.input_ids) if v is not None), None
        )
        if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str | list):
            given = given[0]
        if isinstance(given, str):
            return self._pending(given, fields.add_special_tokens is not False)
        if isinstance(given, list) and given and all(isinstance(token, int) for token in given):
            try:
                return Known(pack(given))  # type: ignore[arg-type]  # mypy keeps str from above
            except (OverflowError, ValueError):
                raise ValueError("token ids must lie between 0 and 2**32 - 1") from None
        raise ValueError("not one prompt")

    def _render(self, fields: Fields) -> str:
        if fields.chat_template is not None or fields.messages is None:
            raise ValueError("a template of the client's own")
        name = "tool_use" if fields.tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise ValueError("the tokenizer has no chat template")
        more: dict[str, Any] = dict(fields.chat_template_kwargs or {})
        if fields.reasoning_effort is not None:
            more.setdefault("reasoning_effort", fields.reasoning_effort)
            more.setdefault("enable_thinking", fields.reasoning_effort != "none")
        settings = {
            "tools": fields.tools,
            "documents": fields.documents,
            "add_generation_prompt": fields.add_generation_prompt is not False,
            "continue_final_message": bool(fields.continue_final_message),
        }
        return template.render(fields.messages, {**settings, **more})

    def _pending(self, text: str, special: bool) -> Pending:
        if self._cut is None:
            segments = [text]
        else:
            segments = [part for part in self._cut.split(text) if part]
        if special or not segments:  # a post-processor frames the whole text
            segments = [text]
        found = [self._look_up((segment, special)) for segment in segments]
        return _Segments(self, segments, found, special)

    def _look_up(self, key: tuple[str, bool]) -> bytes | None:
        ids = self._cache.get(key)
        if ids is not None:
            self._cache.move_to_end(key)
        return ids

    def encode(self, text: str, special: bool) -> bytes:
        """Packed ids of a text, uncached. May run in another thread."""
        (made,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)  # leaves the GIL
        return pack(made.ids)

    def keep(self, text: str, special: bool, ids: bytes) -> None:
        if (text, special) in self._cache:
            return
        self._cache[text, special] = ids
        self._cached_bytes += len(text) + len(ids)
        while self._cached_bytes > CACHE_BYTES:
            (old, _), gone = self._cache.popitem(last=False)
            self._cached_bytes -= len(old) + len(gone)

    def _separators(self) -> re.Pattern[str] | None:
        """What splits a text into parts that are tokenised each by itself; None if nothing surely does."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        plain = [
            token.content
            for token in added
            if token.special
            and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
            and token.content
        ]
        if not plain:
            return None
        plain.sort(key=len, reverse=True)
        probe = "a b", plain[0], " c\n", plain[-1], "d"
        whole = self.encode("".join(probe), False)
        if b"".join(self.encode(part, False) for part in probe) != whole:
            return None  # a normalizer or pre-tokenizer that looks at what stands before
        return re.compile("(" + "|".join(map(re.escape, plain)) + ")")


class _Segments:
    def __init__(
        self, tokenizer: HuggingFace, texts: list[str], found: list[bytes | None], special: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._found = found
        self._special = special
        self._new: dict[str, bytes] = {}
        self.work = sum(len(text) for text, ids in zip(texts, found, strict=True) if ids is None)

    def finish(self) -> bytes:
        ids = []
        for text, known in zip(self._texts, self._found, strict=True):
            if known is None:
                known = self._new.get(text)
            if known is None:
                known = self._new[text] = self._tokenizer.encode(text, self._special)
            ids.append(known)
        return b"".join(ids)

    def keep(self) -> None:
        for text, ids in self._new.items():
            self._tokenizer.keep(text, self._special, ids)


class Embedded:
    """As `kvist engine` makes tokens: four bytes of UTF-8 are one token."""

    _PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions", "generate": "/generate"}
    chats = True

    def prompt(self, kind: str, body: bytes) -> Pending:
        from kvist.engine import api

        if kind not in self._PATHS:
            raise ValueError("the embedded engine keeps no prefixes of this kind")
        return Known(api.to_query(0, self._PATHS[kind], api.parse(body)).prompt)


def load(name: str) -> HuggingFace | Embedded:
    """`embedded`, or the path of Hugging Face tokenizer files."""
    return Embedded() if name == "embedded" else HuggingFace(Path(name).expanduser())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {path}: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"tokenizer {path}: an object is needed")
    return data


def _special(config: dict[str, Any]) -> dict[str, str]:
    """The named tokens (bos_token, …) that templates may print."""
    found = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name, from wherever Hugging Face keeps them; the file wins over the config."""
    given: Any = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(given, list):
        found = {entry["name"]: entry["template"] for entry in given}
    else:
        found = {"default": given} if given else {}
    for path in [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]:
        if path.is_file():
            found["default" if path.parent == folder else path.stem] = path.read_text(encoding="utf-8")
    return found


def _responses(fields: Fields) -> Fields:
    """The Responses API as chat messages. Raises ValueError for what is not in the body itself."""
    if fields.previous_response_id or fields.tools:
        raise ValueError("the prompt depends on what the worker remembers or translates")
    messages: list[dict[str, Any]] = []
    if fields.instructions:
        messages.append({"role": "system", "content": fields.instructions})
    items = [{"role": "user", "content": fields.input}] if isinstance(fields.input, str) else fields.input
    for item in items or []:
        if not isinstance(item, dict) or item.get("type", "message") != "message":
            raise ValueError("an item that is no message")
        messages.append(item)
    return msgspec.structs.replace(fields, messages=messages)
