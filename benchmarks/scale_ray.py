"""Ray Serve's own routers beside kvist's, in front of modelled engines on a real local cluster.

    .venv-scale/bin/python benchmarks/scale_ray.py [--routers pow2 prefix lbgr] [--requests 512] [--speed 1]

Four replicas of `examples/ray_serve_app.py`'s model (embedded engines: an L40 with an 8B model, 80 000 tokens
of KV cache, RLT), the paper's shared-prefix workload (64 groups, prompts of 512 to 8 192 tokens, half of each
shared) at 7 requests a modelled second, sent through a deployment handle, the same arrivals for each router.
Times in modelled seconds of the client's clock: `speed` of them pass a second. `pow2` is Serve's default,
`prefix` Ray's PrefixCacheAffinityRouter. `calls/s`: unloaded calls of a deployment that answers at once, 16
at a time, which is what a router's own work leaves.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path
from random import Random
from statistics import mean, median, quantiles
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from kvist.plugins.ray_serve import router_config

ROOT = Path(__file__).parent.parent
WORDS = [f"w{i:03d}" for i in range(1000)]  # four bytes: one token of the modelled engine
LENGTHS = (512, 1024, 2048, 4096, 8192)
GROUPS = 64


def config(name: str) -> RequestRouterConfig:
    if name == "pow2":
        return RequestRouterConfig()
    if name == "prefix":
        path = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router"
        return RequestRouterConfig(request_router_class=f"{path}.PrefixCacheAffinityRouter")
    return router_config(policy=name)


class Body(dict[str, Any]):
    """An OpenAI body that Ray's own router finds too: it looks for attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def prompts(requests: int) -> list[Body]:
    rng = Random(1)
    shared = ["".join(rng.choices(WORDS, k=LENGTHS[group % len(LENGTHS)] // 2)) for group in range(GROUPS)]
    order = [number % GROUPS for number in range(requests)]
    rng.shuffle(order)
    bodies = []
    for group in order:
        text = shared[group] + "".join(rng.choices(WORDS, k=LENGTHS[group % len(LENGTHS)] // 2))
        bodies.append(Body(messages=[{"role": "user", "content": text}], max_tokens=4))
    return bodies


async def drive(handle: Any, bodies: list[Body], rate: float, speed: float) -> list[tuple[float, int, int]]:
    """(modelled seconds to first token, cached, prompt tokens) of each request."""
    rng = Random(2)
    found = []

    async def one(body: Body) -> None:
        start, first, usage = time.perf_counter(), 0.0, {}
        async for piece in handle.chat.remote(body):
            first = first or time.perf_counter() - start
            usage = piece.get("usage", usage)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        found.append((first * speed, cached, usage["prompt_tokens"]))

    tasks = []
    at = time.perf_counter()
    for body in bodies:
        at += rng.expovariate(rate) / speed
        await asyncio.sleep(max(at - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(one(body)))
    await asyncio.gather(*tasks)
    return found


@serve.deployment(num_replicas=2, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
class Echo:
    async def __call__(self, body: dict[str, Any]) -> int:
        return 1


async def calls(handle: Any, seconds: float) -> float:
    """Calls a second, 16 at a time, with prompts of 2 KB."""
    done, end = 0, time.perf_counter() + seconds

    async def client(number: int) -> None:
        nonlocal done
        while time.perf_counter() < end:
            await handle.remote(Body(prompt=f"{number} {done} " + "x" * 2000))
            done += 1

    await asyncio.gather(*(client(number) for number in range(16)))
    return done / seconds


def measure(name: str, requests: int, rate: float, speed: float) -> str:
    import ray_serve_app

    model = ray_serve_app.Model.options(
        num_replicas=4, request_router_config=config(name), ray_actor_options={"num_cpus": 0}
    ).bind(kv_tokens=80_000, speed=speed)
    app = f"model-{name}"  # a handle keeps the router that its application first had
    serve.run(model, name=app, route_prefix=None)
    handle = serve.get_deployment_handle("Model", app).options(stream=True)
    found = asyncio.run(drive(handle, prompts(requests), rate, speed))
    serve.delete(app)
    app = f"echo-{name}"
    serve.run(Echo.options(request_router_config=config(name)).bind(), name=app, route_prefix=None)
    rates = [asyncio.run(calls(serve.get_deployment_handle("Echo", app), 3.0)) for _ in range(3)]
    serve.delete(app)
    found = found[requests // 8 :]
    ttft = [first for first, _, _ in found]
    hits = sum(cached for _, cached, _ in found) / sum(length for _, _, length in found)
    return (
        f"{name:<8}{hits:>7.1%}{mean(ttft):>9.2f}{median(ttft):>7.2f}{quantiles(ttft, n=100)[98]:>7.2f}"
        f"{median(rates):>9.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--routers", nargs="+", default=["pow2", "prefix", "lbgr"])
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--rate", type=float, default=7.0)
    parser.add_argument("--speed", type=float, default=1.0)
    args = parser.parse_args()
    paths = [str(ROOT / "examples"), str(Path(__file__).parent)]
    sys.path[:0] = paths
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
    )
    serve.start(http_options={"location": "NoServer"})
    print(f"{'router':<8}{'hits':>7}{'TTFT s':>9}{'p50':>7}{'p99':>7}{'calls/s':>9}", flush=True)
    for name in args.routers:
        print(measure(name, args.requests, args.rate, args.speed), flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
