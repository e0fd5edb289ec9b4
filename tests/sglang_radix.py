"""SGLang's real RadixCache and allocators on a CPU, driven as its scheduler drives them.

Imports SGLang: skip first where it is absent. No model and no kernel is loaded.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from random import Random
from types import SimpleNamespace
from typing import Any

import torch

from kvist.cache import make_eviction


def _without_torchvision_kernels() -> None:
    """torchvision's wheels are built for a CUDA torch; SGLang's imports need only its Python side."""
    ops = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        ops.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _without_torchvision_kernels.keep = ops  # type: ignore[attr-defined]


try:
    import torchvision  # noqa: F401
except RuntimeError:
    _without_torchvision_kernels()

from sglang.srt.mem_cache import utils as sglang_utils  # noqa: E402
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import (  # noqa: E402
    EvictParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams  # noqa: E402
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402

from kvist.plugins.sglang.cache import KvistRadixCache  # noqa: E402

Prefix = tuple[int, ...]


def _hash_pages(key: Any, prior: bytes | None, page_size: int | None = None) -> list[str]:
    """SGLang's chained page hash in Python, where its C++ extension cannot be built."""
    hashes, tokens = [], list(key)
    for start in range(0, len(tokens), page_size or len(tokens)):
        page = tokens[start : start + (page_size or len(tokens))]
        prior = hashlib.sha256((prior or b"") + array("I", page).tobytes()).digest()
        hashes.append(prior.hex())
    return hashes


try:
    sglang_utils.get_hash_str([1], None, page_size=1)
except RuntimeError:
    sglang_utils.get_native_hash = _hash_pages


def params(
    slots: int, page: int, *, events: bool = False, eagle: bool = False, rows: int = 0, eviction: str = "lru"
) -> Any:
    """SGLang's parameters of a cache over a fresh allocator of `slots` KV slots."""
    if page == 1:
        allocator = TokenToKVPoolAllocator(slots, torch.float16, "cpu", None, False)
    else:
        allocator = PagedTokenToKVPoolAllocator(slots, page, torch.float16, "cpu", None, False)
        allocator.debug_mode = True  # it then checks every free for pages freed twice
    return CacheInitParams(
        disable=False,
        req_to_token_pool=ReqToTokenPool(rows, 4096, "cpu", False) if rows else None,
        token_to_kv_pool_allocator=allocator,
        page_size=page,
        is_eagle=eagle,
        eviction_policy=eviction,
        enable_kv_cache_events=events,
        dynamo_kv_event_format=True,  # namespaces go into the hashes
    )


def make_cache(slots: int, page: int, policy: str, *, seed: int = 0, **options: Any) -> Any:
    """The plugin's cache; `options` as in `params`."""
    return KvistRadixCache(params(slots, page, **options), make_eviction(policy, rng=Random(seed)))


def key_of(tokens: Prefix, extra: str | None = None) -> Any:
    return RadixKey(array("q", tokens), extra)


class Running:
    """A request that holds KV slots: the matched prefix, locked, and its own behind it."""

    def __init__(self, tokens: Prefix, extra: str | None, node: Any, hit: int, own: torch.Tensor) -> None:
        self.tokens, self.extra, self.node, self.hit, self.own = tokens, extra, node, hit, own


class Engine:
    """Requests against one cache. `content[slot]` is the prefix whose KV was computed into the slot."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.allocator = cache.token_to_kv_pool_allocator
        self.page = cache.page_size
        self.content: dict[int, tuple[str | None, Prefix]] = {}
        self.running: list[Running] = []
        self.stored: Counter[Prefix] = Counter()
        self._prefix_of: dict[int, Prefix] = {}

    def start(self, tokens: Prefix, extra: str | None = None) -> tuple[int, Running | None]:
        """Match, lock, evict, allocate: hit tokens, and the request or None if it cannot be admitted."""
        cache = self.cache
        match = cache.match_prefix(MatchPrefixParams(key=key_of(tokens, extra)))
        node, hit = match.last_device_node, match.device_prefix_len
        held = cache.path_device_indices(node).tolist()
        assert [self.content[slot] for slot in held] == [(extra, tokens[: i + 1]) for i in range(hit)]
        lock = cache.lock(node)
        need = -(-(len(tokens) - hit) // self.page) * self.page
        lacking = need - self.allocator.available_size()
        if lacking > cache.evictable_size():
            cache.unlock(lock)
            return hit, None
        if lacking > 0:
            assert cache.evict(EvictParams(num_tokens=lacking)).num_tokens_evicted == lacking
        own = self.allocator.alloc(need)
        assert own is not None and len(own) == need
        for i, slot in enumerate(own.tolist()[: len(tokens) - hit]):
            self.content[slot] = (extra, tokens[: hit + i + 1])
        run = Running(tokens, extra, node, hit, own)
        run.lock = lock  # type: ignore[attr-defined]
        self.running.append(run)
        return hit, run

    def finish(self, run: Running) -> int:
        """Insert what was computed, free duplicates and the tail, unlock; tokens new to the tree."""
        cache = self.cache
        whole = len(run.tokens) // self.page * self.page
        prefix = cache.path_device_indices(run.node)[: run.hit]
        row = torch.cat([prefix, run.own])
        result = cache.insert(
            InsertParams(key=key_of(run.tokens[:whole], run.extra), value=row[:whole].clone())
        )
        self.allocator.free_segment(row[run.hit : result.prefix_len], start_pos=run.hit)
        self.allocator.free_segment(row[whole:], start_pos=whole)
        cache.unlock(run.lock)  # type: ignore[attr-defined]
        self.running.remove(run)
        return whole - result.prefix_len

    def nodes(self) -> list[tuple[Any, str | None, Prefix]]:
        """Every node with its namespace and its whole prefix."""
        found, stack = [], [(self.cache.root_node, ())]
        while stack:
            node, above = stack.pop()
            for child in node.children.values():
                prefix = above + tuple(child.key.raw_token_ids())[: len(child.key)]
                found.append((child, child.key.extra_key, prefix))
                stack.append((child, prefix))
        return found

    def blocks(self) -> Counter[Prefix]:
        """Prefixes of all cached pages, over all namespaces."""
        pages: Counter[Prefix] = Counter()
        for node, _, prefix in self.nodes():
            for end in range(len(prefix) - len(node.key) + self.page, len(prefix) + 1, self.page):
                pages[prefix[:end]] += 1
        return pages

    def replay(self) -> None:
        """Take the KV events since the last call into `stored`."""
        for event in self.cache.take_events():
            kind = type(event).__name__
            if kind == "AllBlocksCleared":
                self.stored.clear()
                self._prefix_of.clear()
            elif kind == "BlockRemoved":
                for name in event.block_hashes:
                    self.stored -= Counter([self._prefix_of.pop(name)])
            else:
                above = () if event.parent_block_hash is None else self._prefix_of[event.parent_block_hash]
                for i, name in enumerate(event.block_hashes):
                    above += tuple(event.token_ids[i * self.page : (i + 1) * self.page])
                    assert name not in self._prefix_of, "stored twice"
                    self._prefix_of[name] = above
                    self.stored[above] += 1

    def check(self) -> None:
        """The tree, its sizes, its leaf set, and where every KV slot is."""
        cache, page = self.cache, self.page
        evictable = protected = 0
        leaves, cached = set(), []
        for node, extra, prefix in self.nodes():
            size = len(node.key)
            assert size and size % page == 0 and len(node.value) == size
            assert node.parent.children[node.key.child_key(page)] is node
            assert node.lock_ref >= sum(child.lock_ref for child in node.children.values())
            if node.lock_ref:
                protected += size
            else:
                evictable += size
                if not node.children:
                    leaves.add(node)
            slots = node.value.tolist()
            start = len(prefix) - size
            assert [self.content[s] for s in slots] == [(extra, prefix[: start + i + 1]) for i in range(size)]
            cached += slots
        assert (cache.evictable_size(), cache.protected_size()) == (evictable, protected)
        assert set(cache.evictable_leaves) == leaves
        assert cache.host.tree.total == len(cached) // page
        self._check_twins()
        owned = [slot for run in self.running for slot in run.own.tolist()]
        pages = self.allocator.get_all_free_pages().tolist()
        free = [p * page + i for p in pages for i in range(page)] if page > 1 else pages
        first = 1 if page == 1 else page
        assert sorted(cached + owned + free) == list(range(first, first + self.allocator.size))
        if cache.kv_events.enabled:
            self.replay()
            assert self.stored == self.blocks()

    def _check_twins(self) -> None:
        """The policy's tree has the shape of SGLang's."""
        for node, _, _ in self.nodes():
            twin = node.twin
            assert twin.engine is node and twin.size == len(node.key) // self.page
            assert twin.parent is node.parent.twin and twin.parent.children[twin.first] is twin
            assert len(twin.children) == len(node.children)
        assert len(self.cache.host.tree.root.children) == len(self.cache.root_node.children)


def request(tokens: Prefix, extra: str | None = None) -> Any:
    """What RadixCache.checkpoint reads of SGLang's Req."""
    return SimpleNamespace(
        origin_input_ids=array("q", tokens),
        full_untruncated_fill_ids=array("q", tokens),
        extra_key=extra,
        cache_salt=None,
        priority=None,
        prefix_len=0,
        last_node=None,
        lock=None,
        kv=SimpleNamespace(req_pool_idx=None, cache_protected_len=0, cache_inserted_len=0, swa_evict_floor=0),
    )
