"""The exact index: what engines say in their KV events.

An engine names a block by a hash of its own, opaque here. Own keys are chained from the token ids (and from
the salt: LoRA, cache salt, extra keys), so a prompt can be looked up without knowing the engine's hash; a
removal carries only the engine's hash, so each worker keeps a map engine hash -> own key.

Only blocks in GPU memory count as cached; the caller leaves other media out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from kvist.model import TOKEN_BYTES, Query
from kvist.prefix.hashing import block_keys
from kvist.prefix.index import bits


class EventIndex:
    """See `kvist.prefix.base.PrefixKnowledge`. Workers may use different block sizes."""

    def __init__(self, *, unit: int = TOKEN_BYTES) -> None:
        self.unit = unit
        self.unknown_parents = 0  # stored events whose parent was never announced: dropped
        self._keys: dict[int, dict[Hashable, int]] = {}  # slot -> engine hash -> own key
        self._holders: dict[int, int] = {}  # own key -> mask of workers
        self._copies: dict[tuple[int, int], int] = {}  # (slot, key) held under more than one hash -> count
        self._block_size: dict[int, int] = {}

    def add_worker(self, slot: int, capacity: int) -> None:
        if slot in self._keys:
            self.cleared(slot)
        self._keys[slot] = {}

    def remove_worker(self, slot: int) -> None:
        self.cleared(slot)
        del self._keys[slot]
        self._block_size.pop(slot, None)

    def cached_tokens(self, slot: int) -> int:
        return len(self._keys[slot]) * self._block_size.get(slot, 0)

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

    def match(self, query: Query, slots: int) -> list[int]:
        cached = [0] * slots
        for size in set(self._block_size.values()):
            users = sum(1 << slot for slot, own in self._block_size.items() if own == size)
            self._match(query, users, size, cached)
        return cached

    def _match(self, query: Query, holders: int, block_size: int, cached: list[int]) -> None:
        depth = 0
        for key in block_keys(query.prompt, block_size * self.unit, query.salt):
            still = holders & self._holders.get(key, 0)
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
        """Engines will say themselves what they stored."""

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
