"""Turns queries of text into queries of token ids, before they are routed.

What a tokenizer cannot tell (another model's prompt, a template of the client's own, several prompts in one
body) stays text, padded to whole tokens: it is routed by the own index and never matches an engine's events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from kvist.gateway.knowledge.tokenizer import Pending, Tokenizer, load
from kvist.gateway.prompt import Body, engine_salt
from kvist.model import TOKEN_BYTES, Query

INLINE = 2048  # characters that are tokenised at once (about half a millisecond); more go to a thread
_THREADS = 2


class Tokens:
    """`given`: PATH, or MODEL=PATH for several models. `adapters`: LoRA adapters and the models they adapt.

    Must be made inside a running event loop.

    Raises ValueError naming the tokenizer that cannot be read, ModuleNotFoundError without the extra.
    """

    def __init__(self, given: list[str], adapters: Callable[[], Mapping[str, str]]) -> None:
        self._by_model: dict[str, Tokenizer] = {}
        self._default: Tokenizer | None = None
        loaded: dict[str, Tokenizer] = {}
        for entry in given:
            model, _, path = entry.rpartition("=")
            if path not in loaded:
                loaded[path] = load(path)
            if model:
                self._by_model[model] = loaded[path]
            else:
                self._default = loaded[path]
        self.without_template = [path for path, made in loaded.items() if not made.chats]
        self._adapters = adapters
        self._threads = ThreadPoolExecutor(_THREADS, "tokenizer")
        self._loop = asyncio.get_running_loop()
        self.as_text = 0  # prompts that stayed text
        self.in_threads = 0

    def prepare(self, query: Query, kind: str, body: Body, raw: bytes, done: Callable[[bool], None]) -> None:
        """Give the query its ids and call `done(True)`, or `done(False)` if it stays text.

        At once, or later if a thread has to work for long.
        """
        base, lora = self._adapted(body)
        tokenizer, pending = self._by_model.get(base, self._default), None
        if tokenizer is not None and kind != "any":  # of those nobody knows whether an engine caches them
            try:
                pending = tokenizer.prompt(kind, raw)
            except (ValueError, msgspec.DecodeError):
                pending = None
        salt = engine_salt(lora, body.cache_salt or "")
        if pending is None:
            self._stays_text(query)
            done(False)
        elif pending.work <= INLINE:
            self._ready(query, pending, pending.finish(), salt)
            done(True)
        else:
            self.in_threads += 1

            def back(work: Future[bytes]) -> None:
                if work.cancelled():
                    return
                tokenised = work.exception() is None
                if tokenised:
                    self._ready(query, pending, work.result(), salt)
                else:
                    self._stays_text(query)
                done(tokenised)

            work = self._threads.submit(pending.finish)
            work.add_done_callback(lambda work: self._loop.call_soon_threadsafe(back, work))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _stays_text(self, query: Query) -> None:
        self.as_text += 1
        _become(query, query.prompt + bytes(-len(query.prompt) % TOKEN_BYTES), query.salt)

    def _ready(self, query: Query, pending: Pending, ids: bytes, salt: bytes) -> None:
        pending.keep()
        _become(query, ids, salt)

    def _adapted(self, body: Body) -> tuple[str, str]:
        """The model a request asks for, and its LoRA adapter or "".

        vLLM takes the adapter's name as the model; SGLang a field `lora_path`, or a model BASE:ADAPTER.
        """
        model, adapters = body.model or "", self._adapters()
        if model in adapters:
            return adapters[model], model
        if bytes(body.lora_path):
            try:
                return model, str(msgspec.json.decode(body.lora_path) or "")
            except msgspec.DecodeError:
                return model, ""
        base, colon, adapter = model.partition(":")
        if colon and model not in self._by_model and (adapter in adapters or base in self._by_model):
            return base, adapter
        return model, ""


def _become(query: Query, prompt: bytes, salt: bytes) -> None:
    query.prompt, query.salt, query.unit = prompt, salt, TOKEN_BYTES
    query.length = len(prompt) // TOKEN_BYTES
