"""What kvist's plugin costs inside vLLM's real KVCacheManager, against vLLM's own eviction.

    .venv-vllm/bin/python benchmarks/vllm_block_pool.py [--blocks 30000] [--policies rlt l-lru]

Every manager gets the same requests: multi-turn conversations, more than the cache holds, `--running` of
them at once. The managers take turns at each request; figures are medians of CPU time over requests:

    admit   look the prompt up, allocate its blocks (evicting as needed) and put them into the prefix cache
    decode  one token for each running request: what a step costs in the block pool
    free    give the blocks of a finished request back

A last column is the share of prompt tokens that hit.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import defaultdict, deque
from pathlib import Path
from random import Random
from statistics import median
from time import thread_time
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from vllm_manager import make_manager, make_request

BLOCK = 16


class Side:
    """One manager and its requests under way."""

    def __init__(self, blocks: int, policy: str | None) -> None:
        self.manager = make_manager(blocks, policy, block_size=BLOCK)
        self.running: deque[Any] = deque()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.prompt = self.hit = 0

    def admit(self, tokens: list[int]) -> None:
        request = make_request(tokens, BLOCK)
        start = thread_time()
        computed, hit, _ = self.manager.get_computed_blocks(request)
        got = self.manager.allocate_slots(request, len(tokens) - hit, hit, computed)
        self.seconds["admit"].append(thread_time() - start)
        assert got is not None, "more requests run than the cache can hold: raise --blocks"
        request.num_computed_tokens = len(tokens)
        self.running.append(request)
        self.prompt += len(tokens)
        self.hit += hit

    def decode(self) -> None:
        for request in self.running:
            request.append_output_token_ids(7)
        start = thread_time()
        for request in self.running:
            assert self.manager.allocate_slots(request, 1) is not None
        self.seconds["decode"].append(thread_time() - start)
        for request in self.running:
            request.num_computed_tokens += 1

    def free(self) -> None:
        request = self.running.popleft()
        start = thread_time()
        self.manager.free(request)
        self.seconds["free"].append(thread_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=30_000)
    parser.add_argument("--requests", type=int, default=600, help="measured, after as many before")
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--policies", nargs="+", default=["rlt", "l-lru"])
    given = parser.parse_args()

    rng = Random(0)
    clients = 2 * given.blocks * BLOCK // 4000  # conversations of 4000 tokens on average: twice the cache
    talks: list[list[int]] = [[] for _ in range(clients)]
    sides = {name: Side(given.blocks, name) for name in given.policies}
    sides = {"vLLM": Side(given.blocks, None), **sides}
    gc.disable()
    for number in range(2 * given.requests):
        if number == given.requests:
            for side in sides.values():
                side.seconds.clear()
                side.prompt = side.hit = 0
        client = rng.randrange(clients)
        if len(talks[client]) > 8000:
            talks[client] = []
        talks[client] += [rng.randrange(30_000) for _ in range(rng.randrange(200, 1800))]
        order = list(sides.values())
        for side in order[number % len(order) :] + order[: number % len(order)]:
            if len(side.running) == given.running:
                side.free()
            side.admit(talks[client])
            side.decode()
        gc.collect(0)

    print(f"{given.blocks} blocks of {BLOCK} tokens, {given.running} running; microseconds of CPU, medians")
    columns = "".join(f"{what:>10} {'ratio':>6}" for what in ("admit", "decode", "free"))
    print(f"{'eviction':12}{columns}   hits")
    stock = {what: median(values) for what, values in sides["vLLM"].seconds.items()}
    for name, side in sides.items():
        row = f"{name:12}"
        for what in ("admit", "decode", "free"):
            value = median(side.seconds[what])
            row += f"{value * 1e6:10.0f} {value / stock[what]:6.2f}"
        print(row + f"  {side.hit / side.prompt:6.1%}")


if __name__ == "__main__":
    main()
