"""A deployment for the tests of the Ray Serve router: it sleeps, fails, streams and dies as it is told."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from kvist.plugins.ray_serve import router_config


def third_word(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """A prompt function of a deployment that knows nothing of OpenAI."""
    return str(kwargs["job"]["text"])


class Worker:
    def __init__(self) -> None:
        self.name = serve.get_replica_context().replica_id.unique_id

    async def __call__(self, body: dict[str, Any]) -> str:
        await asyncio.sleep(body.get("sleep", 0.01))
        if body.get("fail"):
            raise ValueError("as told")
        return self.name

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        if body.get("fail"):
            raise ValueError("as told")
        for _ in range(5):
            await asyncio.sleep(body.get("sleep", 0.05))
            yield self.name

    async def work(self, *, job: dict[str, Any]) -> str:
        return self.name

    def die(self, body: dict[str, Any]) -> None:
        os._exit(1)


class Fan:
    """Calls that share one request."""

    def __init__(self, worker: DeploymentHandle) -> None:
        self.worker = worker

    async def __call__(self, calls: int) -> list[str]:
        asked = [self.worker.remote({"prompt": f"{i} " * 50}) for i in range(calls)]
        return list(await asyncio.gather(*asked))


OPTIONS: dict[str, Any] = {
    "num_replicas": 3,
    "max_ongoing_requests": 8,
    "ray_actor_options": {"num_cpus": 0},
    "health_check_period_s": 1,
}
Plain = serve.deployment(Worker, name="Plain", request_router_config=router_config(), **OPTIONS)
Named = serve.deployment(
    Worker, name="Named", request_router_config=router_config(prompt="ray_app:third_word"), **OPTIONS
)
app = serve.deployment(Fan, ray_actor_options={"num_cpus": 0}).bind(Plain.bind())
named = Named.bind()
