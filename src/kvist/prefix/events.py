"""The exact index: what engines say in their KV events.

An engine names a block by a hash of its own, opaque here. Own keys are chained from the token ids (and from
the salt: LoRA, cache salt, extra keys), so a prompt can be looked up without knowing the engine's hash; a
removal carries only the engine's hash, so each worker keeps a map engine hash -> own key.

Only blocks in GPU memory count as cached; the caller leaves other media out.

Between a decision and the engine's word for it lie a queue and a prefill. Until then the index may expect the
prompt's blocks where it was sent, so that a burst of equal prompts meets on one worker instead of being
spread over all that do not hold it yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

from kvist.model import TOKEN_BYTES, Query
from kvist.prefix.hashing import block_keys
from kvist.prefix.index import bits


class EventIndex:
    """See `kvist.prefix.base.PrefixKnowledge`. Workers may use different block sizes.

    expect: prompts a worker whose blocks count as held from `routed` on, until the engine stores or removes
    them or as many newer prompts were routed there; 0: only the engines' word counts.
    """

    def __init__(self, *, unit: int = TOKEN_BYTES, expect: int = 0) -> None:
        self.unit = unit
        self.expect = expect
        self.unknown_parents = 0  # stored events whose parent was never announced: dropped
        self._keys: dict[int, dict[Hashable, int]] = {}  # slot -> engine hash -> own key
        self._holders: dict[int, int] = {}  # own key -> mask of workers
        self._copies: dict[tuple[int, int], int] = {}  # (slot, key) held under more than one hash -> count
        self._block_size: dict[int, int] = {}
        self._expected: dict[int, int] = {}  # own key -> mask of workers that will hold it
        self._routed: dict[int, deque[list[int]]] = {}  # slot -> expected keys of each prompt, oldest first

    def add_worker(self, slot: int, capacity: int) -> None:
        if slot in self._keys:
            self.cleared(slot)
        self._keys[slot] = {}
        self._routed[slot] = deque()

    def set_capacity(self, slot: int, capacity: int) -> None:
        """Engines say themselves what they evict."""

    def remove_worker(self, slot: int) -> None:
        self.cleared(slot)
        del self._keys[slot], self._routed[slot]
        self._block_size.pop(slot, None)

    def cached_tokens(self, slot: int) -> int:
        return len(self._keys[slot]) * self._block_size.get(slot, 0)

    def block_size(self, slot: int) -> int:
        """Tokens a block of the worker's; 0 before it stored any."""
        return self._block_size.get(slot, 0)

    def names(self, slot: int) -> list[Hashable]:
        """The engine's hashes of the blocks that the worker holds."""
        return list(self._keys[slot])

    def stored(
        self,
        slot: int,
        hashes: Sequence[Hashable],
        parent: Hashable | None,
        tokens: bytes,
        block_size: int,
        salt: bytes = b"",
    ) -> None:
        """Blocks now cached by the worker: packed token ids of len(hashes) blocks behind `parent`."""
        known = self._keys[slot]
        if parent is not None and parent not in known:
            self.unknown_parents += 1
            return
        self._block_size[slot] = block_size
        above = None if parent is None else known[parent]
        bit = 1 << slot
        keys = block_keys(tokens, block_size * self.unit, salt, above)
        for name, key in zip(hashes, keys, strict=False):
            if name in known:
                continue
            known[name] = key
            mask = self._holders.get(key, 0)
            if self._expected:
                self._met(slot, key)
            if mask & bit:
                self._copies[slot, key] = self._copies.get((slot, key), 1) + 1
            else:
                self._holders[key] = mask | bit

    def removed(self, slot: int, hashes: Sequence[Hashable]) -> None:
        known = self._keys[slot]
        for name in hashes:
            key = known.pop(name, None)
            if key is not None:
                self._drop(slot, key)

    def cleared(self, slot: int) -> None:
        """The worker holds nothing (it said so, it restarted, or events were lost)."""
        for key in self._keys[slot].values():
            self._drop(slot, key)
        self._keys[slot].clear()
        while self._routed[slot]:
            self._stop_expecting(slot)

    def match(self, query: Query, slots: int) -> list[int]:
        cached = [0] * slots
        for size in set(self._block_size.values()):
            users = sum(1 << slot for slot, own in self._block_size.items() if own == size)
            self._match(query, users, size, cached)
        return cached

    def _match(self, query: Query, holders: int, block_size: int, cached: list[int]) -> None:
        depth = 0
        expected = self._expected
        for key in block_keys(query.prompt, block_size * self.unit, query.salt):
            held = self._holders.get(key, 0)
            if expected:
                held |= expected.get(key, 0)
            still = holders & held
            if still != holders:
                for slot in bits(holders ^ still):
                    cached[slot] = depth
                holders = still
                if not holders:
                    return
            depth += block_size
        for slot in bits(holders):
            cached[slot] = depth

    def routed(self, query: Query, slot: int) -> None:
        """Engines will say themselves what they stored; until then it may be expected."""
        if not self.expect or slot not in self._block_size:
            return
        bit = 1 << slot
        keys = block_keys(query.prompt, self._block_size[slot] * self.unit, query.salt)
        new = [key for key in keys if not (self._holders.get(key, 0) | self._expected.get(key, 0)) & bit]
        if not new:
            return
        for key in new:
            self._expected[key] = self._expected.get(key, 0) | bit
        self._routed[slot].append(new)
        if len(self._routed[slot]) > self.expect:
            self._stop_expecting(slot)

    def _stop_expecting(self, slot: int) -> None:
        for key in self._routed[slot].popleft():
            self._met(slot, key)

    def _met(self, slot: int, key: int) -> None:
        """What was expected has come, or will not."""
        mask = self._expected.get(key, 0)
        if mask & (1 << slot):
            if mask == 1 << slot:
                del self._expected[key]
            else:
                self._expected[key] = mask & ~(1 << slot)

    def answered(self, query: Query, slot: int, expected: int, cached: int | None) -> None:
        """Engines have said themselves what they hold."""

    def _drop(self, slot: int, key: int) -> None:
        copies = self._copies.get((slot, key), 1)
        if copies > 2:
            self._copies[slot, key] = copies - 1
        elif copies == 2:
            del self._copies[slot, key]
        else:
            mask = self._holders[key] & ~(1 << slot)
            if mask:
                self._holders[key] = mask
            else:
                del self._holders[key]
