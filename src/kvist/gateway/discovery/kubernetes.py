"""What the Kubernetes API says of objects: listed, then watched from there.

Needs `kvist[kubernetes]`. A watch that breaks starts over; what is known stays while the API server does not
answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec

WATCH_SECONDS = 300  # then the server ends a watch and it starts over
RETRY_SECONDS = (0.5, 10.0)  # first and longest wait after a failure


def ready(pod: Mapping[str, Any]) -> bool:
    """Running, ready and not about to go."""
    status = pod.get("status") or {}
    conditions = {c.get("type"): c.get("status") for c in status.get("conditions") or []}
    going = (pod.get("metadata") or {}).get("deletionTimestamp")
    return not going and status.get("phase") == "Running" and conditions.get("Ready") == "True"


async def connect(file: str = "") -> Any:
    """An API client: with the credentials of the pod it runs in, else of a kubeconfig. Raises ValueError."""
    try:
        from kubernetes_asyncio import client as api
        from kubernetes_asyncio import config
    except ModuleNotFoundError:
        raise ValueError("Kubernetes needs kubernetes-asyncio: pip install 'kvist[kubernetes]'") from None
    try:
        config.load_incluster_config()  # type: ignore[no-untyped-call]
    except config.ConfigException:
        try:
            await config.load_kube_config(config_file=file or None)
        except (config.ConfigException, OSError) as error:
            raise ValueError(
                f"no Kubernetes credentials, neither in this pod nor in a file: {error}"
            ) from None
    return api.ApiClient()


async def follow(
    listing: Callable[..., Any],
    where: tuple[str, ...],
    select: dict[str, str],
    changed: Callable[[Mapping[str, Mapping[str, Any]]], None],
    log: Callable[..., None],
) -> None:
    """List, then watch; `changed` gets all objects by name after each change."""
    wait = RETRY_SECONDS[0]
    while True:
        try:
            seen, version = await _list(listing, where, select)
            changed(seen)
            wait = RETRY_SECONDS[0]
            async for kind, item in _watch(listing, where, select, version):
                name = item["metadata"]["name"]
                if kind == "DELETED":
                    seen.pop(name, None)
                else:
                    seen[name] = item
                changed(seen)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the API server is away, answers nonsense or 410 Gone: list again
            log("watch broke", what=where[-1], error=f"{type(error).__name__}: {str(error)[:200]}")
            await asyncio.sleep(wait)
            wait = min(2 * wait, RETRY_SECONDS[1])


async def _list(
    listing: Callable[..., Any], where: tuple[str, ...], select: dict[str, str]
) -> tuple[dict[str, Mapping[str, Any]], str]:
    response = await listing(*where, **select, _preload_content=False)
    async with response:
        if response.status == 404:  # the kind is not installed, or nobody has made it yet
            raise LookupError("not found")
        response.raise_for_status()
        data = msgspec.json.decode(await response.read())
    items = {item["metadata"]["name"]: item for item in data.get("items") or []}
    return items, str((data.get("metadata") or {}).get("resourceVersion", ""))


async def _watch(
    listing: Callable[..., Any], where: tuple[str, ...], select: dict[str, str], version: str
) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
    """Changes after `version`, until the server ends the watch. Raises LookupError if it is too old."""
    response = await listing(
        *where,
        **select,
        watch=True,
        resource_version=version,
        timeout_seconds=WATCH_SECONDS,
        allow_watch_bookmarks=True,
        _preload_content=False,
        _request_timeout=WATCH_SECONDS + 30,
    )
    async with response:
        response.raise_for_status()
        rest = b""
        async for data in response.content.iter_any():  # one object may be longer than a reader's line limit
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                event = msgspec.json.decode(line)
                if event["type"] == "ERROR":
                    raise LookupError(str(event["object"].get("message", "the watch is too old")))
                if event["type"] != "BOOKMARK":
                    yield event["type"], event["object"]
