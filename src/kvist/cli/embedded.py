"""Embedded engines for `kvist serve --embedded N`: child processes that end with it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from kvist.demo.processes import Child
from kvist.gateway.settings import Settings, WorkerSpec


@contextmanager
def engines(settings: Settings) -> Iterator[list[WorkerSpec]]:
    """As many as the settings say, on free loopback ports; stopped at the end, whatever it is.

    With the tokenizer `embedded` they publish KV events too. Raises ValueError if one does not start.
    """
    options = [
        *("engine", "--port=0", f"--profile={settings.profile}", f"--eviction={settings.eviction}"),
        f"--speed={settings.speed}",
    ]
    if settings.kv_tokens:
        options.append(f"--kv-tokens={settings.kv_tokens}")
    publish = settings.tokenizer == ["embedded"]
    children: list[Child] = []
    try:
        addresses = []
        ports = iter(_free_ports(2 * settings.embedded if publish else 0))
        for i in range(settings.embedded):
            live, replay = (f"tcp://127.0.0.1:{next(ports)}" if publish else "" for _ in range(2))
            own = [f"--kv-events={live}", f"--kv-events-replay={replay}"] if publish else []
            children.append(Child(*options, f"--seed={settings.seed + i}", *own))
            addresses.append((live, replay))
        try:
            found = [
                WorkerSpec(url=child.url, kv_events=live, kv_events_replay=replay)
                for child, (live, replay) in zip(children, addresses, strict=True)
            ]
        except RuntimeError as error:
            raise ValueError(f"embedded engines: {error}") from None
        yield found
    finally:
        for child in children:
            child.process.terminate()
        for child in children:
            child.stop()


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports
