"""The exact index: what engines say in their KV events.

An engine names a block by a hash of its own, opaque here. Own keys are chained from the token ids (and from
the salt: LoRA, cache salt, extra keys), so a prompt can be looked up without knowing the engine's hash; a
removal carries only the engine's hash, so each worker keeps a map engine hash -> own key.

Only blocks in GPU memory count as cached; the caller leaves other media out. What the engine has not told of
yet may count beforehand (`kvist.prefix.expected`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from kvist.model import TOKEN_BYTES, Query
from kvist.prefix.expected import Expected, Sent
from kvist.prefix.hashing import block_keys, root_key
from kvist.prefix.index import bits

GRACE = 2.0  # an engine's word takes milliseconds, and longer where its host or this one is busy


class EventIndex:
    """See `kvist.prefix.base.PrefixKnowledge`. Workers may use different block sizes.

    expect: prompts a worker that may count beforehand; 0: only the engines' word counts. grace: seconds after
    an answer in which the engine's word for it must come.
    """

    def __init__(self, *, unit: int = TOKEN_BYTES, expect: int = 0, grace: float = GRACE) -> None:
        self.unit = unit
        self.expected = Expected(expect, grace)
        self.unknown_parents = 0  # stored events whose parent was never announced: dropped
        self._keys: dict[int, dict[Hashable, int]] = {}  # slot -> engine hash -> own key
        self._holders: dict[int, int] = {}  # own key -> mask of workers
        self._copies: dict[tuple[int, int], int] = {}  # (slot, key) held under more than one hash -> count
        self._block_size: dict[int, int] = {}
        self._walked: tuple[Query, int, list[int]] | None = None  # query, stride, keys: for `routed`

    def add_worker(self, slot: int, capacity: int) -> None:
        if slot in self._keys:
            self.cleared(slot)
        self._keys[slot] = {}
        self.expected.add_worker(slot)

    def set_capacity(self, slot: int, capacity: int) -> None:
        """Engines say themselves what they evict."""

    def remove_worker(self, slot: int) -> None:
        self.cleared(slot)
        del self._keys[slot]
        self.expected.remove_worker(slot)
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
        if slot not in self._block_size:
            self._block_size[slot] = block_size
            for sent in self.expected.waiting(slot):
                self._expect(sent)
        self._block_size[slot] = block_size
        above = root_key(salt) if parent is None else known[parent]
        bit = 1 << slot
        keys = block_keys(tokens, block_size * self.unit, salt, above)
        self.expected.stored(slot, above, keys, tokens, block_size * self.unit)
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
        self.expected.clear(slot)

    def match(self, query: Query, slots: int, now: float = 0.0) -> list[int]:
        self.expected.expire(now)
        cached = [0] * slots
        for size in set(self._block_size.values()):
            users = sum(1 << slot for slot, own in self._block_size.items() if own == size)
            self._match(query, users, size, cached)
        return cached

    def _match(self, query: Query, holders: int, block_size: int, cached: list[int]) -> None:
        masks, tips = self.expected.masks, self.expected.tips
        keys = block_keys(query.prompt, block_size * self.unit, query.salt)
        self._walked = (query, block_size, keys)
        depth = 0
        for key in keys:
            held = self._holders.get(key, 0)
            if masks:
                held |= masks.get(key, 0)
            still = holders & held
            if still != holders:
                for slot in bits(holders ^ still):
                    cached[slot] = depth
                if tips:
                    before = keys[depth // block_size - 1] if depth else root_key(query.salt)
                    if before in tips:
                        self._go_on(tips[before], holders ^ still, depth, query, cached)
                holders = still
                if not holders:
                    return
            depth += block_size
        for slot in bits(holders):
            cached[slot] = depth

    def _go_on(self, answers: list[Sent], slots: int, depth: int, query: Query, cached: list[int]) -> None:
        """Those of `slots` that answered what comes before in the prompt hold that answer too."""
        for sent in answers:
            slot = sent.slot
            if slots >> slot & 1 and query.prompt.startswith(sent.rest, depth * self.unit):
                size = self._block_size[slot]
                cached[slot] = max(cached[slot], min(sent.end, query.length) // size * size)

    def routed(self, query: Query, slot: int, now: float = 0.0) -> None:
        """Engines will say themselves what they stored; until then it may be expected."""
        if self.expected.most:
            sent = self.expected.send(query, slot)
            if slot in self._block_size:
                self._expect(sent)

    def _expect(self, sent: Sent) -> None:
        query, slot = sent.query, sent.slot
        size, bit = self._block_size[slot], 1 << slot
        if self._walked is not None and self._walked[:2] == (query, size):
            keys = self._walked[2]
        else:
            keys = block_keys(query.prompt, size * self.unit, query.salt)
        new = [key for key in keys if not self._holders.get(key, 0) & bit]
        self.expected.begin(sent, size * self.unit, keys, new)

    def answered(
        self, query: Query, slot: int, expected: int, cached: int | None, output: int = 0, now: float = 0.0
    ) -> None:
        """Engines have said themselves what they hold, or will at once."""
        self.expected.answered(query, slot, output, now)

    def dropped(self, query: Query, slot: int, now: float = 0.0) -> None:
        self.expected.dropped(query, slot)

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
