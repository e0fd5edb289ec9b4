"""What the plugin costs inside SGLang's real classes, against SGLang's own eviction in the same run.

    make test-sglang    # makes the environment
    .venv-sglang/bin/python benchmarks/sglang_radix_cache.py [--calls 60]

Every cache of a row holds the same prompts over SGLang's own allocator, page size 1, tensors on the CPU. The
caches' calls alternate; what a call freed is filled with new prompts before the next. Two sizes of call: 3000
tokens (a prefill's worth) and 64 (one decode step of 64 requests). SGLang frees whole leaves, so `freed` may
be far more than was asked for; then its calls are rarer. `unified` is SGLang's default cache.
"""

from __future__ import annotations

import argparse
import sys
from array import array
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from sglang_radix import (
    EvictParams,
    InsertParams,
    KvistRadixCache,
    MatchPrefixParams,
    RadixKey,
    params,
)

from kvist.cache import make_eviction

SGLANG = ("lru", "slru")
KVIST = ("l-lru", "slru", "rlt", "hedge")
BASE = "sglang lru"


def caches(slots: int) -> dict[str, Any]:
    from sglang.srt.mem_cache.radix_cache import RadixCache
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
    from sglang.srt.runtime_context import get_context

    made: dict[str, Any] = {f"sglang {name}": RadixCache(params(slots, 1, eviction=name)) for name in SGLANG}
    unified = params(slots, 1)
    unified.tree_components = (ComponentType.FULL,)
    with get_context().override_server_args(model_path="none"):
        made["unified lru"] = UnifiedRadixCache(unified)
    for name in KVIST:
        made[f"kvist {name}"] = KvistRadixCache(params(slots, 1), make_eviction(name, rng=Random(1)))
    return made


class Prompts:
    """Fresh prompts of one length: no two share a first token."""

    def __init__(self, length: int) -> None:
        self.length, self.next = length, 0

    def draw(self) -> array[int]:
        self.next += 1
        return array("q", range(self.next * 1_000_000, self.next * 1_000_000 + self.length))


def serve(cache: Any, tokens: array[int]) -> float:
    """Match and insert as one request would; seconds."""
    slots = cache.token_to_kv_pool_allocator.alloc(len(tokens))
    start = perf_counter()
    cache.match_prefix(MatchPrefixParams(key=RadixKey(tokens)))
    cache.insert(InsertParams(key=RadixKey(tokens), value=slots))
    return perf_counter() - start


def measure(tokens: int, nodes: int, free: int, calls: int) -> dict[str, tuple[float, int, float | None]]:
    """By cache: median ms a call, median tokens freed, median us a request (match and insert)."""
    length = tokens // nodes
    made = caches(tokens)
    prompts = {name: Prompts(length) for name in made}
    cost: dict[str, list[float]] = {name: [] for name in made}
    freed: dict[str, list[int]] = {name: [] for name in made}
    request: dict[str, list[float]] = {name: [] for name in made}
    for name, cache in made.items():
        for _ in range(nodes):
            serve(cache, prompts[name].draw())
    for call in range(calls + 5):
        for name, cache in made.items():
            start = perf_counter()
            count = cache.evict(EvictParams(num_tokens=free)).num_tokens_evicted
            took = perf_counter() - start
            assert count >= free
            if call >= 5:  # the first calls warm up
                cost[name].append(took)
                freed[name].append(count)
            while cache.token_to_kv_pool_allocator.available_size() >= length:
                seconds = serve(cache, prompts[name].draw())
                request[name].append(seconds)
    return {
        name: (
            median(cost[name]) * 1e3,
            int(median(freed[name])),
            median(request[name]) * 1e6 if request[name] else None,
        )
        for name in made
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'tokens':>9} {'nodes':>6} {'asked':>6} {'cache':14} {'ms/call':>9} {'freed':>7} ", end="")
    print(f"{'us/token':>9} {'/ ' + BASE:>13} {'us/request':>11}")
    for tokens in (200_000, 1_000_000):
        for nodes in (100, 10_000):
            for free in (3000, 64):
                rows = measure(tokens, nodes, free, args.calls)
                for name, (ms, freed, request) in rows.items():
                    print(
                        f"{tokens:>9} {nodes:>6} {free:>6} {name:14} {ms:9.3f} {freed:>7} "
                        f"{ms * 1e3 / freed:9.3f} {ms / rows[BASE][0]:13.3f} "
                        + (f"{request:11.0f}" if request is not None else f"{'-':>11}"),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
