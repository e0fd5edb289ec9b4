"""kvist's policies inside other people's systems. Each plugin is off until an environment variable names it.

`KVIST_EVICTION=rlt` switches an engine's eviction to a policy of `kvist.cache`; parameters follow behind
commas (`KVIST_EVICTION=slru,protect_after=3`). `KVIST_EVICTION_SEED` seeds its draws (default 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from kvist.cache import EVICTIONS, EvictionPolicy, make_eviction

EVICTION = "KVIST_EVICTION"
SEED = "KVIST_EVICTION_SEED"


class Unsupported(RuntimeError):
    """The installed engine, or the model it runs, is none that the plugin was checked against."""


def chosen_eviction(environ: Mapping[str, str]) -> EvictionPolicy | None:
    """The eviction policy that the environment asks for; None: the plugin stays off.

    Raises ValueError naming the variable for an unknown policy, a bad parameter or a bad seed.
    """
    wanted = environ.get(EVICTION, "").strip()
    if not wanted:
        return None
    name, *pairs = (part.strip() for part in wanted.split(","))
    online = [known for known in EVICTIONS if known != "belady"]  # it needs the future
    if name not in online:
        raise ValueError(f"{EVICTION}={wanted}: unknown policy {name!r}: choose one of {', '.join(online)}")
    seed = environ.get(SEED, "0")
    try:
        rng = Random(int(seed))
    except ValueError:
        raise ValueError(f"{SEED}={seed}: must be a whole number") from None
    try:
        return make_eviction(name, rng=rng, **dict(_parameter(pair) for pair in pairs))
    except ValueError as error:
        raise ValueError(f"{EVICTION}={wanted}: {error}") from None


def _parameter(pair: str) -> tuple[str, Any]:
    key, equals, text = pair.partition("=")
    if not equals:
        raise ValueError(f"{pair!r} is no parameter: write name=value")
    for number in (int, float):
        try:
            return key.strip(), number(text)
        except ValueError:
            continue
    raise ValueError(f"parameter {key!r} must be a number, not {text!r}")
