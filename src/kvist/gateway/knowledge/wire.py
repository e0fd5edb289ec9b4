"""KV events off the wire, as vLLM and SGLang publish them.

A batch is msgpack of [timestamp, events, rank] or a map of these. An event is a map with a `type`, or (older)
a positional array with the tag first. Fields that are not known, or behind the known ones, are ignored.
Sources: vllm/distributed/kv_events.py (0.10 to 0.32), sglang/srt/disaggregation/kv_events.py (0.5).
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import msgspec
from xxhash import xxh3_128_digest

from kvist.gateway.prompt import engine_salt
from kvist.model import TOKEN_BYTES

_POSITIONS = {
    "BlockStored": (
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
        "group_idx",
        "kv_cache_spec_kind",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": ("medium",),
}
_WHOLE_PREFIX = (None, "full_attention", "mla_attention")  # kinds of cache that keep a prefix to its start


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """`tokens`: packed ids of len(hashes) blocks behind `parent`; `group`: of a hybrid model's caches."""

    hashes: Sequence[Hashable]
    parent: Hashable | None
    tokens: bytes
    block_size: int
    salt: bytes = b""
    group: int = 0


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    hashes: Sequence[Hashable]
    group: int = 0


@dataclass(frozen=True, slots=True)
class AllCleared:
    pass


Event = BlocksStored | BlocksRemoved | AllCleared


class BadEvents(ValueError):
    """The payload is no batch of KV events; what it said is lost."""


def decode(payload: bytes) -> tuple[float, list[Event]]:
    """Timestamp (seconds since 1970) and the events that concern GPU memory. Raises BadEvents."""
    try:
        batch = msgspec.msgpack.decode(payload)
        if isinstance(batch, dict):
            moment, events = batch["ts"], batch["events"]
        else:
            moment, events = batch[0], batch[1]
        found = [made for event in events if (made := _event(event)) is not None]
        return float(moment), found
    except (msgspec.DecodeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise BadEvents(f"{type(error).__name__}: {error}") from None


def _event(event: Any) -> Event | None:
    """None for an event of another kind, another medium, or a cache that forgets the middle of a prefix."""
    if isinstance(event, dict):
        kind, fields = event["type"], event
    else:
        kind = event[0]
        fields = dict(zip(_POSITIONS.get(kind, ()), event[1:], strict=False))
    if kind not in _POSITIONS or fields.get("medium") not in (None, "GPU"):
        return None
    if kind == "AllBlocksCleared":
        return AllCleared()
    hashes, group = fields["block_hashes"], fields.get("group_idx") or 0
    if not isinstance(hashes, list) or not all(isinstance(name, int | bytes | str) for name in hashes):
        raise BadEvents("block_hashes: a list of numbers or byte strings is needed")
    if not isinstance(group, int):
        raise BadEvents(f"group_idx must be a number, not {group!r}")
    if kind == "BlockRemoved":
        return BlocksRemoved(hashes, group)
    if fields.get("kv_cache_spec_kind") not in _WHOLE_PREFIX:
        return None
    return _stored(hashes, fields, group)


def _stored(hashes: list[Hashable], fields: dict[str, Any], group: int) -> BlocksStored:
    block_size, parent = fields["block_size"], fields["parent_block_hash"]
    if not isinstance(block_size, int) or block_size < 1:
        raise BadEvents(f"block_size must be at least 1, not {block_size!r}")
    if not isinstance(parent, int | bytes | str | None):
        raise BadEvents(f"parent_block_hash must be a number or a byte string, not {parent!r}")
    ids = fields["token_ids"]
    if ids and not isinstance(ids[0], int):  # SGLang with EAGLE: pairs of a token and its successor
        ids = [pair[0] for pair in ids]
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    tokens = packed.tobytes()
    if len(ids) < len(hashes) * block_size:
        raise BadEvents(f"{len(ids)} token ids for {len(hashes)} blocks of {block_size}")
    lora = fields.get("lora_name") or ""
    if not lora and fields.get("lora_id"):
        lora = f"#{fields['lora_id']}"  # a number that no request names: kept apart, never matched
    salt = fields.get("cache_salt") or ""
    extra = fields.get("extra_keys")
    if extra:
        tokens, found = _mix(tokens, block_size * TOKEN_BYTES, extra, lora, first=parent is None)
        salt = salt or found
    return BlocksStored(hashes, parent, tokens, block_size, engine_salt(lora, salt), group)


def _mix(tokens: bytes, stride: int, extra: list[Any], lora: str, *, first: bool) -> tuple[bytes, str]:
    """Tokens with what else made the blocks' hashes, and the cache salt of a prompt's first block.

    A block's extra keys are, in order: the LoRA name, images and other media (strings, or pairs with their
    offset), the cache salt (in the first block), digests of prompt embeddings. A block with media is given a
    content that no prompt of tokens has: its ids are placeholders, equal for all images.
    """
    salt = ""
    blocks = [tokens[start : start + stride] for start in range(0, len(tokens), stride)]
    for i, keys in zip(range(len(blocks)), extra or repeat(None), strict=False):
        rest = [key for key in keys or () if key != lora]
        if first and i == 0 and rest and isinstance(rest[-1], str):
            salt = rest.pop()
        if rest:
            digest = xxh3_128_digest(blocks[i] + msgspec.msgpack.encode(rest))
            blocks[i] = (digest * (stride // len(digest) + 1))[:stride]
    return b"".join(blocks), salt
