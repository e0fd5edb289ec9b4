"""Which SGLang, which features, and the two seams through which the policy goes in.

`register_radix_cache_backend` offers the cache under a name (`--radix-cache-backend kvist`). Where
KVIST_EVICTION alone asks for a policy, a plugin hook puts the same factory in place of SGLang's choice of
cache, `default_radix_cache_factory`. Both are SGLang's public ways for plugins; no file of its is changed.

The factory makes a `RadixCache`: the class with a Python tree that SGLang's backends of other people extend.
SGLang's own default, `UnifiedRadixCache`, keeps the tree in Rust and evicts there, out of a policy's reach.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from random import Random
from typing import Any

from kvist.cache import RECOMMENDED, EvictionPolicy, make_eviction
from kvist.plugins import EVICTION, SEED, Unsupported, chosen_eviction

BACKEND = "kvist"
VERSIONS = ("0.5.23",)  # releases whose real classes the tests ran against
UNTESTED = "KVIST_SGLANG_UNTESTED"

_CHAIN = "sglang.srt.mem_cache.registry.default_radix_cache_factory"

logger = logging.getLogger("sglang.kvist")


def install(environ: Mapping[str, str]) -> None:
    """Register the backend; hook SGLang's default where `environ` names a policy.

    Raises Unsupported (SGLang of another version or shape) and ValueError (a bad variable).
    """
    wanted = chosen_eviction(environ) is not None
    if wanted:
        check_version(version("sglang"), environ)
    try:
        from sglang.srt.mem_cache.registry import register_radix_cache_backend
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    except ImportError as error:
        raise Unsupported(
            f"SGLang {version('sglang')} has no radix-cache backends for plugins: {error}"
        ) from None
    register_radix_cache_backend(BACKEND, lambda context: build(context, environ))
    if wanted:
        HookRegistry.register(_CHAIN, default_factory, HookType.AROUND)


def default_factory(original: Callable[[Any], Any], context: Any) -> Any:
    """SGLang's choice of cache, replaced; a server without prefix caching keeps SGLang's own."""
    return original(context) if context.disable_radix_cache else build(context, os.environ)


def build(context: Any, environ: Mapping[str, str]) -> Any:
    """The cache for SGLang's `TreeCacheBuildContext`. Raises Unsupported naming what to switch off."""
    check_version(version("sglang"), environ)
    check_features(context)
    from kvist.plugins.sglang.cache import KvistRadixCache

    policy = policy_of(environ)
    cache = KvistRadixCache(context.params, policy)
    logger.warning(
        "kvist: eviction policy %s in SGLang's RadixCache, page size %d", policy.name, cache.page_size
    )
    return cache


def policy_of(environ: Mapping[str, str]) -> EvictionPolicy:
    """The policy of KVIST_EVICTION; RLT where only the backend was named."""
    chosen = chosen_eviction(environ)
    if chosen is not None:
        return chosen
    return make_eviction(RECOMMENDED, rng=Random(int(environ.get(SEED, "0"))))


def check_version(installed: str, environ: Mapping[str, str]) -> None:
    """Raise Unsupported unless the tests ran against this release, or the operator takes the risk."""
    if installed not in VERSIONS and not environ.get(UNTESTED):
        raise Unsupported(
            f"SGLang {installed} is not supported: kvist was tested against {', '.join(VERSIONS)}. "
            f"Install one of these, unset {EVICTION} and --radix-cache-backend, "
            f"or set {UNTESTED}=1 to try it all the same"
        )


def check_features(context: Any) -> None:
    """Raise Unsupported for features whose state the RadixCache does not hold."""
    from sglang.srt.mem_cache.allocator.page_interleave import page_interleave_shard_size
    from sglang.srt.runtime_context import get_memory

    memory = get_memory()
    refused = {
        "--disable-radix-cache": context.disable_radix_cache,
        "a model with sliding-window attention": context.is_hybrid_swa,
        "a model with Mamba or linear-attention state": context.is_hybrid_ssm,
        "--enable-hierarchical-cache": context.enable_hierarchical_cache,
        "--enable-lmcache": memory.enable_lmcache,
        "--enable-flexkv": memory.enable_flexkv,
        "--enable-unified-cache-external-linker": memory.enable_unified_cache_external_linker,
        "--enable-session-radix-cache": memory.enable_session_radix_cache,
        "KV pages sharded over ranks": page_interleave_shard_size(context.params.token_to_kv_pool_allocator)
        > 1,
        f"--radix-eviction-policy {memory.radix_eviction_policy}": memory.radix_eviction_policy == "tlru",
    }
    found = [feature for feature, on in refused.items() if on]
    if found:
        raise Unsupported(
            f"kvist's eviction does not work with {', '.join(found)}: "
            f"switch that off, or run without {EVICTION} and --radix-cache-backend {BACKEND}"
        )
    if memory.radix_eviction_policy != "lru":
        logger.warning("kvist: --radix-eviction-policy %s is not used", memory.radix_eviction_policy)
