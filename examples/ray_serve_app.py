"""An OpenAI-style application on Ray Serve whose replicas are chosen by LBGR.

    pip install 'kvist[ray]'
    serve run examples.ray_serve_app:app                    # from the repository's root
    curl 127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "hello"}]}'

Two deployments, as in Ray Serve LLM: an ingress that reads HTTP, and a model whose replicas keep prefixes in
their KV caches. The router belongs to the model: at the handle call the request is there in full, while
behind the HTTP proxy only its head is.

The model here is kvist's model of an engine (no GPU: caching and timing are modelled, the text is filler).
For real models give the same configuration to Ray Serve LLM:

    LLMConfig(..., deployment_config={"request_router_config": router_config(policy="lbgr")})
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from random import Random
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from kvist.cache import PrefixCache, make_eviction
from kvist.engine import api
from kvist.engine.core import Engine
from kvist.engine.driver import Driver
from kvist.engine.latency import load_profile
from kvist.plugins.ray_serve import router_config

PATH = "/v1/chat/completions"
FILLER = "kv. "


@serve.deployment(
    num_replicas=3,
    max_ongoing_requests=64,
    ray_actor_options={"num_cpus": 0.1},
    request_router_config=router_config(policy="lbgr"),
)
class Model:
    """One engine a replica."""

    def __init__(self, kv_tokens: int = 50_000, speed: float = 1.0) -> None:
        self.replica = serve.get_replica_context().replica_id.unique_id
        cache = PrefixCache(kv_tokens, make_eviction("rlt", rng=Random(0)), block_size=16)
        engine = Engine(cache, load_profile("llama-3.1-8b-l40"), stream=True)
        self.driver = Driver(engine, speed)
        self.numbers = itertools.count()

    async def chat(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The answer token by token: text, which replica gave it, and at the end the usage."""
        query = api.to_query(next(self.numbers), PATH, api.parse(json.dumps(body).encode()))
        ready: asyncio.Queue[bool] = asyncio.Queue()
        request = self.driver.submit(query, lambda _, last: ready.put_nowait(last))
        try:
            for _ in range(query.output_tokens):
                last = await ready.get()
                choice = {
                    "index": 0,
                    "delta": {"content": FILLER},
                    "finish_reason": "length" if last else None,
                }
                piece = {"object": "chat.completion.chunk", "choices": [choice], "replica": self.replica}
                if last:
                    piece["usage"] = api.usage(query, request.cached, query.output_tokens)
                yield piece
        except (asyncio.CancelledError, GeneratorExit):
            self.driver.abort(request)
            raise


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=1000)
class Ingress:
    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model.options(stream=True)

    async def __call__(self, request: Request) -> JSONResponse | StreamingResponse:
        body = await request.json()
        pieces = self.model.chat.remote(body)
        if body.get("stream"):
            return StreamingResponse(self._events(pieces), media_type="text/event-stream")
        texts, piece = [], {}
        async for piece in pieces:
            texts.append(piece["choices"][0]["delta"]["content"])
        message = {"role": "assistant", "content": "".join(texts)}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        return JSONResponse({**piece, "object": "chat.completion", "choices": [choice]})

    async def _events(self, pieces: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
        async for piece in pieces:
            yield f"data: {json.dumps(piece)}\n\n"
        yield "data: [DONE]\n\n"


app = Ingress.bind(Model.bind())
