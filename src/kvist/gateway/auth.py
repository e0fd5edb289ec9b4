"""API keys: hashed at rest, compared in constant time."""

from __future__ import annotations

from hashlib import sha256
from hmac import compare_digest

PREFIX = "sha256:"


def hashed(key: str) -> str:
    """What to write into a config instead of the key itself."""
    return PREFIX + sha256(key.encode()).hexdigest()


class Keys:
    """A set of accepted keys. Every check looks at every key. Raises ValueError for a malformed hash."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = []
        for key in keys:
            text = key if key.startswith(PREFIX) else hashed(key)
            try:
                digest = bytes.fromhex(text.removeprefix(PREFIX))
            except ValueError:
                digest = b""
            if len(digest) != 32:
                raise ValueError(f"API key {key[:12]}…: sha256: must be followed by 64 hexadecimal digits")
            self._digests.append(digest)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, header: bytes | None) -> str | None:
        """The name of the caller for `Authorization: Bearer KEY`, or None. Open ("") without keys."""
        if not self._digests:
            return ""
        given = sha256((header or b"").removeprefix(b"Bearer ").strip()).digest()
        found = False
        for digest in self._digests:
            found |= compare_digest(given, digest)
        return given.hex()[:12] if found and header else None
