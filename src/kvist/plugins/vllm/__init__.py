"""vLLM's block pool under kvist's eviction policies, through vLLM's plugin entry point.

vLLM calls `register` in each of its processes (group `vllm.general_plugins`, restricted by VLLM_PLUGINS).
Nothing is imported or changed unless KVIST_EVICTION names a policy.
"""

from __future__ import annotations

import os


def register() -> None:
    """Put the policy that KVIST_EVICTION names into vLLM. Raises Unsupported, ValueError: vLLM then stops."""
    from kvist.plugins import chosen_eviction

    if chosen_eviction(os.environ) is not None:
        from kvist.plugins.vllm.install import install

        install(os.environ)
