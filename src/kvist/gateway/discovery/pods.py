"""Workers that are Kubernetes pods, found by their labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvist.gateway.discovery import kubernetes
from kvist.gateway.discovery.membership import Membership
from kvist.gateway.settings import Settings, WorkerSpec


def workers_of(
    pods: Mapping[str, Mapping[str, Any]], settings: Settings
) -> tuple[list[WorkerSpec], set[str]]:
    """A worker for each pod that has an address and has not ended; and the URLs of those not ready."""
    specs, resting = [], set()
    for pod in pods.values():
        status = pod.get("status") or {}
        ip = status.get("podIP")
        if not ip or status.get("phase") in ("Succeeded", "Failed"):
            continue
        spec = settings.spec(f"http://{f'[{ip}]' if ':' in ip else ip}:{settings.service_discovery_port}")
        specs.append(spec)
        if not kubernetes.ready(pod):
            resting.add(spec.url)
    return specs, resting


async def follow(settings: Settings, membership: Membership, log: Callable[..., None], client: Any) -> None:
    """Keep the fleet in step with the pods, for ever; then close the API client."""
    from kubernetes_asyncio import client as api

    try:
        await kubernetes.follow(
            api.CoreV1Api(client).list_namespaced_pod,
            (settings.service_discovery_namespace,),
            {"label_selector": ",".join(settings.selector)},
            lambda pods: membership.update("kubernetes", *workers_of(pods, settings)),
            log,
        )
    finally:
        await client.close()
