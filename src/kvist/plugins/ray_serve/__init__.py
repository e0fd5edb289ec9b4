"""kvist's routing policies as a Ray Serve request router (extra `ray`).

    from ray import serve
    from kvist.plugins.ray_serve import router_config

    @serve.deployment(request_router_config=router_config(policy="lbgr"))
    class Model: ...

or, in a Serve config file, `request_router_class: kvist.plugins.ray_serve.router.KvistRequestRouter`. Ray is
imported when one of the two names is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvist.plugins.ray_serve.config import router_config
    from kvist.plugins.ray_serve.router import KvistRequestRouter

__all__ = ["KvistRequestRouter", "router_config"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name == "router_config":
            from kvist.plugins.ray_serve.config import router_config

            return router_config
        from kvist.plugins.ray_serve.router import KvistRequestRouter

        return KvistRequestRouter
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "ray":
            raise
        raise ImportError("kvist's Ray Serve router needs Ray: pip install 'kvist[ray]'") from None
