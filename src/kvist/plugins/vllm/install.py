"""Checks of the installed vLLM, and the one seam through which the policy goes in.

`KVCacheManager` gets its coordinator from the name `get_kv_cache_coordinator` in its module. The wrapper put
there lets vLLM build everything, then gives the two objects that decide on blocks a subclass. So no
constructor of vLLM's is repeated, and pools that vLLM makes elsewhere (CPU offloading) are not touched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from kvist.cache import EvictionPolicy
from kvist.plugins import EVICTION, Unsupported, chosen_eviction

VERSIONS = ("0.30", "0.31", "0.32")  # minor versions whose real classes the tests ran against

# What we override or call, with the leading parameters we rely on.
SEAMS: dict[str, dict[str, tuple[str, ...]]] = {
    "block_pool.BlockPool": {
        "touch": ("blocks",),
        "get_new_blocks": ("num_blocks",),
        "cache_full_blocks": ("request", "blocks", "num_cached_blocks", "num_full_blocks"),
        "free_blocks": ("ordered_blocks",),
        "evict_blocks": ("block_ids",),
        "reset_prefix_cache": (),
        "_maybe_evict_cached_block": ("block",),
        "_emit_block_removed_events": ("block_hashes",),
    },
    "single_type_kv_cache_manager.FullAttentionManager": {
        "add_local_computed_blocks": ("request_id", "new_computed_blocks"),
        "allocate_new_blocks": ("request_id",),
    },
    "kv_cache_utils.FreeKVCacheBlockQueue": {"remove": ("block",), "prepend_n": ("blocks",)},
}


def install(environ: Mapping[str, str]) -> None:
    """Let every KVCacheManager made from now on evict by the policy of `environ`.

    Raises Unsupported for a vLLM that the plugin does not know; idempotent, as vLLM may load plugins again.
    """
    import vllm
    from vllm.logger import init_logger
    from vllm.v1.core import kv_cache_manager

    check_version(vllm.__version__)
    check_seams()
    logger = init_logger("vllm.kvist")
    build = kv_cache_manager.get_kv_cache_coordinator
    if hasattr(build, "kvist"):
        return

    @functools.wraps(build)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        coordinator = build(*args, **kwargs)
        policy = chosen_eviction(environ)
        if policy is not None:
            adopt(coordinator, policy, logger.info, logger.warning)
        return coordinator

    wrapped.kvist = True  # type: ignore[attr-defined]
    kv_cache_manager.get_kv_cache_coordinator = wrapped


def check_version(version: str) -> None:
    """Raises Unsupported, naming the version and those that are known to work."""
    if ".".join(version.split(".")[:2]) not in VERSIONS:
        raise Unsupported(
            f"kvist supports vLLM {', '.join(f'{v}.x' for v in VERSIONS)}, and vLLM {version} is installed: "
            f"install one of these, or unset {EVICTION} to run with vLLM's own eviction"
        )


def check_seams() -> None:
    """Raises Unsupported if a class that we build on is not the one we know (a fork, a nightly build)."""
    import importlib

    for path, methods in SEAMS.items():
        module, name = path.split(".")
        kind = getattr(importlib.import_module(f"vllm.v1.core.{module}"), name, None)
        for method, parameters in methods.items():
            found = getattr(kind, method, None)
            known = () if found is None else tuple(inspect.signature(found).parameters)[1:]
            if found is None or known[: len(parameters)] != parameters:
                raise Unsupported(
                    f"kvist cannot evict in this vLLM: {path}.{method}({', '.join(parameters)}) is not as "
                    f"in vLLM {', '.join(f'{v}.x' for v in VERSIONS)}: unset {EVICTION}"
                )


def adopt(
    coordinator: Any, policy: EvictionPolicy, info: Callable[[str], None], warn: Callable[[str], None]
) -> None:
    """Give a coordinator's pool and manager our classes. Raises Unsupported for a model it cannot serve."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinatorNoPrefixCache
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    from kvist.plugins.vllm.pool import PolicyBlockPool, PolicyManager

    if isinstance(coordinator, KVCacheCoordinatorNoPrefixCache):
        warn(f"kvist: {EVICTION}={policy.name} has no effect: prefix caching is off")
        return
    managers, pool = coordinator.single_type_managers, coordinator.block_pool
    if len(managers) != 1 or type(managers[0]) is not FullAttentionManager or type(pool) is not BlockPool:
        groups = ", ".join(
            f"{type(manager).__name__} over {type(manager.kv_cache_spec).__name__}" for manager in managers
        )
        raise Unsupported(
            f"kvist evicts blocks of models with one KV cache group of full attention, and this one has "
            f"{len(managers)} group(s): {groups}. Start vLLM with --disable-hybrid-kv-cache-manager where "
            f"the model allows it, or unset {EVICTION}"
        )
    pool.__class__ = PolicyBlockPool
    pool.adopt(policy, info)
    managers[0].__class__ = PolicyManager
    info(f"kvist: {policy.name} evicts the prefix cache, {pool.num_gpu_blocks - 1} blocks")
