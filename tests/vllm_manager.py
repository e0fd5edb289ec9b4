"""vLLM's real KVCacheManager on a handful of blocks, and requests for it. Imports vLLM: skip first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvist.plugins import EVICTION, SEED
from kvist.plugins.vllm.install import install

BLOCK = 4  # tokens


@contextmanager
def plugin_on(policy: str | None, seed: int = 0) -> Iterator[None]:
    """Managers made inside get the policy (None: vLLM's own eviction)."""
    from vllm.v1.core import kv_cache_manager

    stock = kv_cache_manager.get_kv_cache_coordinator
    if policy is not None:
        install({EVICTION: policy, SEED: str(seed)})
    try:
        yield
    finally:
        kv_cache_manager.get_kv_cache_coordinator = stock


def make_manager(
    blocks: int, policy: str | None = None, seed: int = 0, *, events: bool = False, block_size: int = BLOCK
) -> Any:
    """A manager of `blocks` usable blocks."""
    import torch
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    init_none_hash(sha256)
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    config = KVCacheConfig(
        num_blocks=blocks + 1, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    with plugin_on(policy, seed):
        return KVCacheManager(
            config,
            max_model_len=100_000,
            scheduler_block_size=block_size,
            hash_block_size=block_size,
            enable_kv_cache_events=events,
        )


_numbers = itertools.count()


def make_request(tokens: list[int], block_size: int = BLOCK) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    return Request(
        request_id=str(next(_numbers)),
        prompt_token_ids=list(tokens),
        sampling_params=SamplingParams(max_tokens=100),
        pooling_params=None,
        block_hasher=get_request_block_hasher(block_size, sha256),
    )
