"""Discovery in Kubernetes: an InferencePool names pods by labels, InferenceObjectives have the priorities.

Needs `kvist[kubernetes]`. Each kind is listed and then watched from there; a watch that breaks starts over,
and endpoints that are known stay while the API server does not answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import msgspec

from kvist.picker.core import Picker
from kvist.picker.endpoints import EndpointFleet
from kvist.picker.protocol import endpoint
from kvist.picker.server import Services
from kvist.picker.settings import PickerSettings

OBJECTIVE_GROUP, OBJECTIVE_VERSION = "inference.networking.x-k8s.io", "v1alpha2"
POOL_VERSION = "v1"
WATCH_SECONDS = 300  # then the server ends a watch and it starts over
RETRY_SECONDS = (0.5, 10.0)  # first and longest wait after a failure


def ready(pod: Mapping[str, Any]) -> bool:
    """Running, ready and not about to go."""
    status = pod.get("status") or {}
    conditions = {c.get("type"): c.get("status") for c in status.get("conditions") or []}
    going = (pod.get("metadata") or {}).get("deletionTimestamp")
    return not going and status.get("phase") == "Running" and conditions.get("Ready") == "True"


def endpoints_of(pods: Iterable[Mapping[str, Any]], ports: Iterable[int]) -> dict[str, bool]:
    """`ip:port` of every pod that has an address, and whether it is ready; ended pods are left out."""
    found = {}
    ports = list(ports)
    for pod in pods:
        status = pod.get("status") or {}
        ip = status.get("podIP")
        if not ip or status.get("phase") in ("Succeeded", "Failed"):
            continue
        host = f"[{ip}]" if ":" in ip else ip
        for port in ports:
            found[endpoint(f"{host}:{port}")] = ready(pod)
    return found


class Pool:
    """What is known of the pool; tells the fleet whenever it changes."""

    def __init__(self, settings: PickerSettings, picker: Picker, fleet: EndpointFleet) -> None:
        self.settings = settings
        self.picker = picker
        self.fleet = fleet
        self.labels: dict[str, str] = {}
        self.ports: list[int] = []
        self.pods: dict[str, Mapping[str, Any]] = {}
        self.selected = asyncio.Event()  # set whenever the labels change

    def pool(self, seen: Mapping[str, Mapping[str, Any]]) -> None:
        spec = (seen.get(self.settings.pool_name) or {}).get("spec") or {}
        labels = dict((spec.get("selector") or {}).get("matchLabels") or {})
        self.ports = [int(port["number"]) for port in spec.get("targetPorts") or []]
        if labels != self.labels:
            self.labels, self.pods = labels, {}
            self.selected.set()
        self._tell()

    def select(self, seen: Mapping[str, Mapping[str, Any]]) -> None:
        self.pods = dict(seen)
        self._tell()

    def objectives(self, seen: Mapping[str, Mapping[str, Any]]) -> None:
        """Those of this pool; flags and files win."""
        found = {
            name: int(spec.get("priority") or 0)
            for name, item in seen.items()
            if ((spec := item.get("spec") or {}).get("poolRef") or {}).get("name") == self.settings.pool_name
        }
        self.picker.objectives = {**found, **self.settings.objectives}

    def _tell(self) -> None:
        self.fleet.replace(endpoints_of(self.pods.values(), self.ports), time.monotonic())


async def watch_pool(
    settings: PickerSettings,
    picker: Picker,
    fleet: EndpointFleet,
    services: Services,
    log: Callable[..., None],
    client: Any = None,
) -> None:
    """Follow the pool for ever. `client`: a kubernetes_asyncio ApiClient; without one the pod's own
    credentials, else the kubeconfig. Raises ValueError if there are neither."""
    try:
        from kubernetes_asyncio import client as api
    except ModuleNotFoundError:
        raise ValueError("--pool-name needs kubernetes-asyncio: pip install 'kvist[kubernetes]'") from None
    client = client or await _connect()
    pool = Pool(settings, picker, fleet)
    custom, core = api.CustomObjectsApi(client), api.CoreV1Api(client)
    space = settings.pool_namespace

    async def pools() -> None:
        await _follow(
            custom.list_namespaced_custom_object,
            (settings.pool_group, POOL_VERSION, space, "inferencepools"),
            {"field_selector": f"metadata.name={settings.pool_name}"},
            pool.pool,
            log,
        )

    async def objectives() -> None:
        await _follow(
            custom.list_namespaced_custom_object,
            (OBJECTIVE_GROUP, OBJECTIVE_VERSION, space, "inferenceobjectives"),
            {},
            pool.objectives,
            log,
        )

    async def pods() -> None:
        while True:
            pool.selected.clear()
            task = None
            if pool.labels:
                selector = ",".join(f"{key}={value}" for key, value in pool.labels.items())

                def seen(items: Mapping[str, Mapping[str, Any]]) -> None:
                    pool.select(items)
                    services.set_ready(True)

                task = asyncio.ensure_future(
                    _follow(core.list_namespaced_pod, (space,), {"label_selector": selector}, seen, log)
                )
            await pool.selected.wait()
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    try:
        await asyncio.gather(pools(), objectives(), pods())
    finally:
        await client.close()


async def _connect() -> Any:
    from kubernetes_asyncio import client as api
    from kubernetes_asyncio import config

    try:
        config.load_incluster_config()  # type: ignore[no-untyped-call]
    except config.ConfigException:
        try:
            await config.load_kube_config()
        except (config.ConfigException, OSError) as error:
            raise ValueError(
                f"no Kubernetes credentials, neither in this pod nor in a file: {error}"
            ) from None
    return api.ApiClient()


async def _follow(
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
