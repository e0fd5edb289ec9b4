"""The router's settings, checked where the deployment is written rather than inside Ray's router."""

from __future__ import annotations

import importlib
from typing import Any

from ray.serve.config import RequestRouterConfig

from kvist.plugins.ray_serve.prompt import Prompt
from kvist.routing import make_policy

PATH = "kvist.plugins.ray_serve.router.KvistRequestRouter"


def load_prompt(path: str) -> Prompt:
    """A prompt function by its import path, `package.module:name`. Raises ValueError."""
    module, colon, name = path.partition(":")
    if not colon:
        raise ValueError(f"prompt: {path!r} must read package.module:function")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"prompt: {path!r}: {error}") from None
    if not callable(found):
        raise ValueError(f"prompt: {path!r} is not a function of (args, kwargs)")
    return found  # type: ignore[no-any-return]


def router_config(
    *,
    policy: str = "lbgr",
    policy_params: dict[str, Any] | None = None,
    prompt: str = "",
    kv_tokens: int = 0,
    seed: int = 0,
    **config: Any,
) -> RequestRouterConfig:
    """What `request_router_config` of a deployment takes.

    policy, policy_params: see `kvist policies`. prompt: import path of a function of a call's (args, kwargs)
    that returns its prompt; without one the first OpenAI request among the arguments is taken.
    kv_tokens: KV cache of a replica in tokens, 0 if unknown. config: further fields of Ray's
    RequestRouterConfig, as `initial_backoff_s`. Raises ValueError naming the argument.
    """
    make_policy(policy, **(policy_params or {}))
    if prompt:
        load_prompt(prompt)
    if kv_tokens < 0:
        raise ValueError(f"kv_tokens must not be negative, not {kv_tokens}")
    given = {
        "policy": policy,
        "policy_params": policy_params or {},
        "prompt": prompt,
        "kv_tokens": kv_tokens,
        "seed": seed,
    }
    return RequestRouterConfig(request_router_class=PATH, request_router_kwargs=given, **config)
