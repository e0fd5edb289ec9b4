"""SGLang's RadixCache with a policy of kvist's in place of its eviction heap.

SGLang keeps its tree, locks, leaf set, sizes and KV events; this subclass tells the policy of every change
and carries out what it evicts, to the page. A leaf that loses pages at its end keeps its node: key and value
are cut and exactly those KV slots go back to the allocator, all slots of one call at once.

Every rank of a tensor-parallel group makes the same calls and must evict the same slots, so the policy's time
is a count of calls and its draws come from one seed; no clock, no hash order.
"""

from __future__ import annotations

import copy
import time
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictResult, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode
from sglang.srt.mem_cache.utils import split_node_hash_value

from kvist.cache import EvictionPolicy
from kvist.plugins.sglang.host import EngineNode, Leaves, PolicyHost

_SHORT = 256  # KV slots of a leaf
_FEW = 32  # cuts
_TOKEN = 8  # bytes: SGLang's keys are arrays of 64-bit token ids


class CutNode(TreeNode):
    """A node with its twin in the policy's tree. Where it lost tokens at its end, key and value follow late:
    they are cut to `end` when they are next read, or when most of a long one is gone.

    An eviction touches many leaves for a token or two each, and most are cut again before anybody reads them.
    """

    twin: Any
    whole_key: Any
    whole_value: Any
    end: int  # tokens of `whole_key` and `whole_value` that are left
    stale: bool

    @property
    def key(self) -> Any:
        if self.stale:
            self.cut()
        return self.whole_key

    @key.setter
    def key(self, key: Any) -> None:
        self.whole_key = key

    @property
    def value(self) -> Any:
        if self.stale:
            self.cut()
        return self.whole_value

    @value.setter
    def value(self, value: Any) -> None:
        self.whole_value = value

    def cut(self) -> None:
        self.stale, at = False, self.end
        key, value = self.whole_key, self.whole_value
        if 2 * at <= len(key.token_ids):  # give the memory back too: amortised over what was evicted
            self.key, self.value = key[:at], None if value is None else value[:at].clone()
            return
        self.key = RadixKey(
            key.token_ids,
            extra_key=key.extra_key,
            is_bigram=key.is_bigram,
            limit=at + key.is_bigram,
            cache_salt=key.cache_salt,
        )
        self.value = None if value is None else value[:at]


class Cuts:
    """The KV slots that one eviction gives back.

    Most cuts of a random policy take a token or two from a short leaf. A slice of each costs more than to
    gather from the whole leaves at once, which copies at most `_SHORT` slots for each of them.
    """

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.short: list[tuple[torch.Tensor, int, int, int]] = []  # (value, start, end, length)

    def add(self, value: torch.Tensor, start: int, end: int, length: int) -> None:
        if start == 0 and end == length:
            self.pieces.append(value)
        elif length > _SHORT:
            self.pieces.append(value[start:end])
        else:
            self.short.append((value, start, end, length))

    def slots(self) -> torch.Tensor:
        """All of them in one tensor; no cut, no slots: raises RuntimeError."""
        if len(self.short) <= _FEW:
            return torch.cat(self.pieces + [value[start:end] for value, start, end, _ in self.short])
        values, starts, ends, lengths = zip(*self.short, strict=True)
        counts = np.subtract(ends, starts)
        first = np.cumsum(lengths) - lengths + starts - (np.cumsum(counts) - counts)
        index = torch.from_numpy(np.repeat(first, counts) + np.arange(counts.sum()))
        whole = torch.cat(values)
        return torch.cat([*self.pieces, whole[index.to(whole.device)]])


class KvistRadixCache(RadixCache):
    """`policy` decides what `evict` frees. `capacity`: KV slots, by default the allocator's."""

    def __init__(self, params: Any, policy: EvictionPolicy, capacity: int | None = None) -> None:
        self.policy = policy
        slots = params.token_to_kv_pool_allocator.size if capacity is None else capacity
        self.host = PolicyHost(
            slots,
            policy,
            block_size=params.page_size,
            unit=_TOKEN * (1 + params.is_eagle),
            shrink=self._shrink,
            drop=self._drop,
            cut=self._divide,
        )
        self._now = 0
        self._again = False  # the call inside repeats a request that was counted
        self._freed = Cuts()
        super().__init__(params)
        self._events = self.kv_events.enabled

    def reset(self) -> None:
        self.evictable_leaves = Leaves(self.policy)
        self.host.tree.clear()
        self.policy.reset()
        super().reset()
        self.root_node.twin = self.host.tree.root

    def match_prefix(self, params: Any) -> Any:
        result = super().match_prefix(params)
        if not self.disable:
            self._seen(result.last_device_node, params.req)
        return result

    def touch_prefix(self, key: Any) -> None:
        """A waiting request's prefix: recent, but no hit before it is served."""
        self._repeat(self.match_prefix, MatchPrefixParams(key=key))

    def checkpoint(self, req: Any, **kwargs: Any) -> None:
        """The prefix that SGLang matches in here was put there by the request itself."""
        self._repeat(super().checkpoint, req, **kwargs)

    def insert(self, params: Any) -> Any:
        result = super().insert(params)
        if not self.disable:
            self._now += 1
            self._inserted(result.last_device_node)
        return result

    def _inserted(self, last: Any) -> None:
        """The path down to `last` was used; `last` may be new. SGLang has done all of its own by now."""
        new = type(last) is not CutNode and last is not self.root_node
        for node in self._path(last.parent if new else last):
            self.policy.touch(node.twin, self._now)
        if not new:
            return
        key = last.key
        self._adopt(last)
        twin = self.host.tree.grow(last.parent.twin, _packed(key), _salt(key), last)
        self.policy.insert(twin, self._now)
        if last in self.evictable_leaves:
            self.policy.candidate(twin)

    def evict(self, params: Any) -> Any:
        """Free `num_tokens` tokens, rounded up to pages; fewer where all else is locked."""
        if self.disable:
            return EvictResult()
        start = time.perf_counter()
        try:
            freed = self.policy.evict(max(-(-params.num_tokens // self.page_size), 0)) * self.page_size
        finally:
            if self._freed.pieces or self._freed.short:
                slots, self._freed = self._freed.slots(), Cuts()
                # Whole pages of several rows: page-exact like one row's segment.
                self.token_to_kv_pool_allocator.free_segment(slots, start_pos=0)
        self.host.evicted_blocks += freed // self.page_size
        self.update_eviction_metrics(freed, start)
        return EvictResult(num_tokens_evicted=freed)

    def _seen(self, last: Any, req: Any) -> None:
        """Hits, once a request: SGLang matches a waiting request again each time it might be admitted."""
        policy = self.policy
        self._now += 1
        counted = getattr(req, "kvist_matched", None)  # tokens of the request already counted as hits
        if counted is None and not self._again:
            policy.begin(None, self._now)
        path = self._path(last)
        ends = list(accumulate(len(node.key) for node in path))  # first: a policy may cut what it is shown
        for node, end in zip(path, ends, strict=True):
            if self._again or end <= (counted or 0):
                policy.touch(node.twin, self._now)
            else:
                policy.hit(node.twin, self._now)
        if req is not None:
            req.kvist_matched = max(*ends, counted or 0) if ends else counted or 0

    def _repeat(self, call: Any, *args: Any, **kwargs: Any) -> None:
        self._again = True
        try:
            call(*args, **kwargs)
        finally:
            self._again = False

    def _path(self, node: Any) -> list[Any]:
        """The nodes from below the root down to `node`."""
        path = []
        while node is not self.root_node:
            path.append(node)
            node = node.parent
        path.reverse()
        return path

    def _split_node(self, key: Any, child: Any, split_len: int) -> Any:
        upper = super()._split_node(key, child, split_len)
        child.end -= split_len
        self._adopt(upper)
        self.host.tree.part(child.twin, split_len // self.page_size, upper)
        return upper

    def _adopt(self, node: Any) -> None:
        fields = vars(node)
        fields["whole_key"], fields["whole_value"] = fields.pop("key"), fields.pop("value")
        node.end, node.stale, node.__class__ = len(node.whole_key), False, CutNode

    def _divide(self, node: EngineNode, blocks: int) -> EngineNode:
        """Split a node because the policy wants to tell its two parts apart."""
        engine = node.engine
        upper: EngineNode = self._split_node(engine.key, engine, blocks * self.page_size).twin
        return upper

    def _shrink(self, node: EngineNode, keep: int) -> None:
        """Give back the slots of a leaf behind its first `keep` pages, and say so in KV events."""
        engine = node.engine
        at, end, value = keep * self.page_size, engine.end, engine.whole_value
        if at == end or value is None:
            return
        held = len(value)
        self._freed.add(value, at, end, held)
        if self._events:
            self._announce(engine, at)
        if at:
            engine.end, engine.stale = at, True
            self.evictable_size_ -= end - at
            if held > _SHORT and 2 * at <= held:
                engine.cut()
        else:
            engine.value = None  # `evicted`, in SGLang's terms; `_drop` unlinks it

    def _announce(self, engine: Any, at: int) -> None:
        """Record that the pages behind `at` tokens are removed, and drop their hashes."""
        key = engine.key
        tail = copy.copy(engine)
        tail.key = key[at:]
        engine.hash_value, tail.hash_value = split_node_hash_value(engine.hash_value, at, self.page_size)
        engine.event_hash_value, tail.event_hash_value = split_node_hash_value(
            engine.event_hash_value, at, self.page_size
        )
        self.kv_events.record_remove(tail)

    def _drop(self, node: EngineNode) -> None:
        """Unlink a leaf that has no page left; its parent may become a leaf."""
        engine, parent = node.engine, node.parent
        assert parent is not None
        self.evictable_leaves.remove(engine)
        del parent.children[node.first]
        node.parent = None
        self.policy.remove(node)
        self._shrink(node, 0)
        self._delete_leaf(engine)
        engine.parent = None


def _packed(key: Any) -> bytes:
    """The tokens of a key as bytes, pair by pair where the key counts pairs (EAGLE)."""
    tokens = np.frombuffer(key.raw_token_ids(), np.int64)
    return (np.column_stack([tokens[:-1], tokens[1:]]) if key.is_bigram else tokens).tobytes()


def _salt(key: Any) -> bytes:
    """What keeps the prefixes of adapters and tenants apart."""
    if key.extra_key is None and key.cache_salt is None:
        return b""
    return repr((key.extra_key, key.cache_salt)).encode()
