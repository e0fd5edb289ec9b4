"""Connections to workers: who may use one, and when it is closed."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvist.http.client import Fetch, Pool, UpstreamConnection, fetch
from kvist.http.garbage import TOO_MANY, WORTH_IT, Garbage
from kvist.http.server import Connection, Connections, Limits, Request

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


def answered_by(answer: bytes, requests: int = 1) -> list[tuple[int, bytes]]:
    """What a worker's raw answer becomes, over one kept connection as long as it is kept."""

    async def check() -> list[tuple[int, bytes]]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.readline():
                await reader.readline()
                writer.write(answer)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        found = []
        for _ in range(requests):
            waiting = Fetch(max_body=1 << 30)
            (pool.take() or await pool.connect(5)).send(waiting, b"GET / HTTP/1.1\r\n\r\n")
            found.append(await asyncio.wait_for(waiting.done, 10))
        assert pool.open <= 1
        pool.close()
        server.close()
        return found

    return asyncio.run(check())


def test_a_large_body_behind_the_head_is_no_large_head() -> None:
    body = b"x" * 300_000
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 300000\r\n\r\n" + body
    assert answered_by(answer, 3) == [(200, body)] * 3
    with pytest.raises(ConnectionError, match="head is too large"):
        answered_by(b"HTTP/1.1 200 OK\r\nx: " + body + b"\r\ncontent-length: 0\r\n\r\n")


def test_interim_and_empty_answers_on_a_kept_connection() -> None:
    assert answered_by(b"HTTP/1.1 100 Continue\r\n\r\n" + KEPT, 3) == [(200, b"ok")] * 3
    assert answered_by(b"HTTP/1.1 204 No Content\r\n\r\n", 3) == [(204, b"")] * 3


def test_closed_connections_are_freed_without_a_collection() -> None:
    """Full collections wait for idle moments, so nothing may need them."""
    alive: list[weakref.ref[object]] = []

    def echo(request: Request, client: Connection) -> None:
        client.respond(200, request.body, kind=b"text/plain")
        alive.append(weakref.ref(client))

    async def check() -> None:
        loop = asyncio.get_running_loop()
        connections = Connections(echo)
        server = await loop.create_server(lambda: Connection(connections), "127.0.0.1", 0)
        pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        for _ in range(20):
            assert await fetch(pool, "/x", seconds=5) == (200, b"")
            waiting = Fetch()
            upstream = await pool.connect(5)
            upstream.send(waiting, b"GET / HTTP/1.1\r\n\r\n")
            await waiting.done
            alive.append(weakref.ref(upstream))
            pool.take()
            upstream.close()
            del upstream
        await asyncio.sleep(0.1)
        server.close()

    gc.collect()
    gc.disable()
    try:
        asyncio.run(check())
        assert len(alive) == 60 and not [ref for ref in alive if ref() is not None]
    finally:
        gc.enable()


def test_collections_wait_for_an_idle_moment() -> None:
    frozen, thresholds = gc.get_freeze_count(), gc.get_threshold()
    try:
        garbage = Garbage(0.0)
        assert not gc.isenabled() and gc.get_freeze_count() > frozen
        assert not garbage.sweep(100.0, idle=True), "nothing was made"
        kept = [[i] for i in range(WORTH_IT)]
        assert not garbage.sweep(59.0, idle=True) and not garbage.sweep(100.0, idle=False)
        assert garbage.sweep(101.0, idle=True) and not garbage.sweep(200.0, idle=True)
        kept += [[i] for i in range(TOO_MANY)]
        assert garbage.sweep(201.0, idle=False), "too much to wait"
        del kept
    finally:
        gc.unfreeze()
        gc.enable()
        gc.set_threshold(*thresholds)


def test_an_answer_that_is_never_read_to_its_end_is_cut() -> None:
    """It is complete on this side, no request is open: closing alone would wait for the reader for ever."""

    def large(request: Request, client: Connection) -> None:
        client.respond(200, b"x" * (64 << 20), kind=b"text/plain")

    async def check() -> None:
        limits = Limits(idle_seconds=0.2, body_seconds=0.4)
        connections = Connections(large, limits)
        server = await asyncio.get_running_loop().create_server(
            lambda: Connection(connections), "127.0.0.1", 0
        )
        with socket.create_connection(server.sockets[0].getsockname()) as client:
            client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            end = time.monotonic() + 10
            while not connections.open:
                await asyncio.sleep(0.01)
            while connections.open and time.monotonic() < end:
                connections.sweep(time.monotonic())
                await asyncio.sleep(0.05)
            assert not connections.open
        server.close()

    asyncio.run(check())
