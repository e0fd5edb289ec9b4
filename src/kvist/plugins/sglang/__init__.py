"""SGLang's radix cache under kvist's eviction policies, through SGLang's plugin entry point.

SGLang calls `register` in each of its processes (group `sglang.srt.plugins`, restricted by SGLANG_PLUGINS).
Off unless KVIST_EVICTION names a policy or the server runs with `--radix-cache-backend kvist`.
"""

from __future__ import annotations

import os


def register() -> None:
    """Offer the backend `kvist`, and make it the default where KVIST_EVICTION names a policy.

    A bad setting or an SGLang that is not supported ends the process with one line: SGLang only logs what a
    plugin raises and would run on without the policy that was asked for.
    """
    from kvist.plugins import EVICTION, Unsupported
    from kvist.plugins.sglang.backend import install

    try:
        install(os.environ)
    except (Unsupported, ValueError) as error:
        if os.environ.get(EVICTION, "").strip():
            raise SystemExit(f"kvist: {error}") from None
        raise
