"""A slow, obvious prefix cache: the set of cached block prefixes, and nothing else."""

from __future__ import annotations

from collections import Counter


class PrefixSet:
    """Cached prefixes as tuples of blocks. A leaf is a prefix that no other cached prefix extends."""

    def __init__(self) -> None:
        self.prefixes: set[tuple[int, ...]] = set()
        self.locks: Counter[tuple[int, ...]] = Counter()

    def match(self, blocks: tuple[int, ...]) -> int:
        hit = 0
        while hit < len(blocks) and blocks[: hit + 1] in self.prefixes:
            hit += 1
        return hit

    def insert(self, blocks: tuple[int, ...]) -> int:
        before = len(self.prefixes)
        self.prefixes.update(blocks[:i] for i in range(1, len(blocks) + 1))
        return len(self.prefixes) - before

    def lock(self, blocks: tuple[int, ...]) -> None:
        for i in range(1, len(blocks) + 1):
            self.locks[blocks[:i]] += 1

    def unlock(self, blocks: tuple[int, ...]) -> None:
        for i in range(1, len(blocks) + 1):
            self.locks[blocks[:i]] -= 1

    def locked(self) -> int:
        return sum(1 for prefix in self.prefixes if self.locks[prefix] > 0)

    def leaves(self) -> set[tuple[int, ...]]:
        inner = {prefix[:-1] for prefix in self.prefixes}
        return {p for p in self.prefixes if p not in inner and self.locks[p] <= 0}

    def evict(self, block: tuple[int, ...]) -> None:
        assert block in self.leaves(), "only an unlocked leaf block may go"
        self.prefixes.remove(block)
