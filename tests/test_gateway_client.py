"""Connections to workers: who may use one, and when it is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvist.http.client import Fetch, Pool, UpstreamConnection, fetch

KEPT = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"  # says nothing of closing, whatever was asked


@asynccontextmanager
async def worker() -> AsyncIterator[Pool]:
    """A pool to a worker that answers everything and keeps its connections open."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (await reader.readline()).strip():
            while (await reader.readline()).strip():
                pass
            writer.write(KEPT)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield pool
    finally:
        pool.close()
        server.close()


def test_a_health_check_never_shares_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that took it would be cut off silently when the check ends, and hang."""
    taken: list[UpstreamConnection | None] = []
    done = Fetch.response_done

    async def check() -> None:
        async with worker() as pool:

            def take_at_once(self: Fetch, reusable: bool) -> None:
                done(self, reusable)
                taken.append(pool.take())  # as a request in the same turn of the loop would

            monkeypatch.setattr(Fetch, "response_done", take_at_once)
            assert await fetch(pool, "/health", seconds=5) == (200, b"ok")
            assert pool.open == 0

    asyncio.run(check())
    assert taken == [None]


def test_a_retired_pool_closes_idle_connections_and_those_in_use_after_their_answer() -> None:
    async def check() -> None:
        async with worker() as pool:
            waiting = [Fetch(), Fetch()]
            used = [await pool.connect(5) for _ in waiting]
            used[0].send(waiting[0], b"GET / HTTP/1.1\r\n\r\n")
            await waiting[0].done
            assert pool.open == 2
            used[1].send(waiting[1], b"GET / HTTP/1.1\r\n\r\n")
            pool.retire()
            assert pool.open == 1, "the idle one is closed, the other still waits for its answer"
            assert await waiting[1].done == (200, b"ok")
            assert pool.open == 0 and pool.take() is None

    asyncio.run(check())
