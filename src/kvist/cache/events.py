"""What a cache tells the outside: which blocks it stored and removed, by chained block hash.

A block's hash covers the whole prefix up to and including it (the hash of its parent seeds its own), as in
vLLM and SGLang, so equal hashes mean equal prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks now cached, in order. `parent` is the hash of the block before them, None at the root."""

    hashes: tuple[int, ...]
    parent: int | None
    tokens: bytes  # packed, len(hashes) * block_size tokens
    block_size: int
    salt: bytes = b""


@dataclass(frozen=True, slots=True)
class Removed:
    hashes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cleared:
    pass


CacheEvent = Stored | Removed | Cleared
