"""Chained block keys: 64-bit names of prefixes that are equal in every process.

The key of a block is xxh3 of its bytes seeded by the key of the block before it, so a key names the whole
prefix up to and including its block. Not cryptographic: a forged collision costs a misrouted request.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest


def root_key(salt: bytes = b"") -> int:
    """What stands in front of a prompt's first block."""
    return xxh3_64_intdigest(salt)


def block_keys(prompt: bytes, stride: int, salt: bytes = b"", parent: int | None = None) -> list[int]:
    """Keys of the whole blocks (`stride` bytes each) of a prompt; `parent` continues an earlier chain."""
    seed = root_key(salt) if parent is None else parent
    keys = []
    for start in range(0, len(prompt) - stride + 1, stride):
        seed = xxh3_64_intdigest(prompt[start : start + stride], seed)
        keys.append(seed)
    return keys
