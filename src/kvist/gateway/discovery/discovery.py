"""All sources of workers that the settings name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from kvist.gateway.discovery import names
from kvist.gateway.discovery.membership import Membership
from kvist.gateway.settings import Settings, WorkerSpec


class Discovery:
    """Must be made inside a running event loop."""

    def __init__(self, membership: Membership, log: Callable[..., None]) -> None:
        self.membership = membership
        self.log = log
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._specs: dict[str, WorkerSpec] = {}  # names that are followed

    def apply(self, settings: Settings, *, strict: bool = False) -> None:
        """The workers of these settings, and no longer what earlier ones named besides.

        Raises ValueError for a worker that cannot be added, if `strict`.
        """
        specs = [spec for spec in settings.specs() if not spec.url.startswith(names.PREFIX)]
        self.membership.update("settings", specs, strict=strict)

    def follow_names(self, settings: Settings) -> None:
        """The names of these settings that resolve to many, and no longer others."""
        wanted = {spec.url: spec for spec in settings.specs() if spec.url.startswith(names.PREFIX)}
        for url in [url for url, spec in self._specs.items() if wanted.get(url) != spec]:
            self._tasks.pop(url).cancel()
            del self._specs[url]
            if url not in wanted:
                self.membership.update(url, [])
        for url, spec in wanted.items():
            if url not in self._specs:
                self._specs[url] = spec
                work = names.follow(spec, self.membership, settings.discovery_interval, self.log)
                self._start(url, work)

    async def follow_pods(self, settings: Settings) -> None:
        """Follow the pods that the settings select. Raises ValueError without credentials or the extra."""
        from kvist.gateway.discovery.kubernetes import connect
        from kvist.gateway.discovery.pods import follow

        client = await connect(settings.kubeconfig)
        self._start("kubernetes", follow(settings, self.membership, self.log, client))

    def _start(self, source: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks[source] = task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda task: self._ended(source, task))

    def _ended(self, source: str, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.log("discovery ended", source=source, error=f"{type(error).__name__}: {error}")

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
