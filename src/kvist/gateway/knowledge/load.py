"""What a worker says of itself in its /metrics: vLLM's and SGLang's names.

Capacity sizes the index. Requests that run or wait there and were not routed here are other routers' (or
clients' of the worker itself): policies that count requests add them to their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(
    rb"^(?:vllm|sglang):("
    rb"num_requests_running|num_requests_waiting|kv_cache_usage_perc|gpu_cache_usage_perc|cache_config_info|"
    rb"num_running_reqs|num_queue_reqs|token_usage|max_total_num_tokens"
    rb")(\{[^\n]*\})?[ \t]+([^ \t\r\n]+)",
    re.MULTILINE,
)
_LABEL = re.compile(rb'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Report:
    """Requests, share of the KV cache in use (0 to 1), capacity in tokens; None where it was not said."""

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    capacity: int | None = None

    @property
    def requests(self) -> int | None:
        """Running and waiting."""
        return None if self.running is None else self.running + (self.waiting or 0)


def read(text: bytes) -> Report:
    """A worker's exposition. Engines behind one URL (data parallel) are added up, their usage averaged."""
    found: dict[bytes, list[float]] = {}
    capacity: list[int] = []
    for name, labels, value in _LINE.findall(text):
        if name == b"cache_config_info":
            own = dict(_LABEL.findall(labels))
            blocks, size = own.get(b"num_gpu_blocks", b""), own.get(b"block_size", b"")
            if blocks.isdigit() and size.isdigit():
                capacity.append(int(blocks) * int(size))
            continue
        try:
            number = float(value)
        except ValueError:
            continue
        if 0 <= number < 1e15:
            found.setdefault(name, []).append(number)

    def total(*names: bytes) -> int | None:
        values = [value for name in names for value in found.get(name, ())]
        return int(sum(values)) if values else None

    usage = next(
        (v for n in (b"kv_cache_usage_perc", b"gpu_cache_usage_perc", b"token_usage") if (v := found.get(n))),
        None,
    )
    return Report(
        running=total(b"num_requests_running", b"num_running_reqs"),
        waiting=total(b"num_requests_waiting", b"num_queue_reqs"),
        kv_usage=sum(usage) / len(usage) if usage else None,
        capacity=sum(capacity) or total(b"max_total_num_tokens") or None,
    )
