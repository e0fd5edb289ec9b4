"""Keep processes running: start, wait for health, restart with exponential back-off, stop all together."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvist.http.client import Pool, fetch
from kvist.launch.child import Child
from kvist.launch.plan import Command, Plan

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BAD_USAGE = 2  # exit code of a program that does not understand its options


class Failed(RuntimeError):
    """An engine, or the gateway, cannot be started at all."""


@dataclass(frozen=True)
class Times:
    """Seconds. backoff doubles from `first` to `longest`, and starts again after `steady` healthy seconds."""

    startup: float = 1200.0  # to health
    grace: float = 30.0  # from SIGTERM to SIGKILL
    first: float = 1.0
    longest: float = 60.0
    steady: float = 60.0
    poll: float = 0.5
    attempts: int = 3  # starts that may fail in a row before any engine was healthy


class Watched:
    """One process over all its lives."""

    def __init__(
        self, command: Command, times: Times, environ: Mapping[str, str], say: Callable[[str, str], None]
    ) -> None:
        self.command = command
        self.times = times
        self.environ = environ
        self.say = say
        self.healthy = asyncio.Event()
        self.was_healthy = False  # ever
        self.failures = 0  # in a row
        self.child: Child | None = None

    @property
    def hopeless(self) -> bool:
        return not self.was_healthy and self.failures >= self.times.attempts

    async def run(self) -> None:
        """Start it again and again until cancelled; the last child is then left in `child`."""
        times = self.times
        while True:
            self.child = child = await self._start()
            self.say(self.command.name, f"started, process {child.process.pid}")
            code = await self._watch(child)
            self.healthy.clear()
            self.failures += 1
            if code == BAD_USAGE and not self.was_healthy:
                self.failures = max(self.failures, times.attempts)
            wait = min(times.first * 2 ** (self.failures - 1), times.longest)
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            )
            again = "" if self.hopeless else f": starting it again in {wait:g} s"
            self.say(self.command.name, how + again)
            await asyncio.sleep(wait)

    async def _start(self) -> Child:
        starting = asyncio.ensure_future(Child.start(self.command, self.environ, self.say))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            self.child = await starting  # it would be lost otherwise
            raise

    async def _watch(self, child: Child) -> int:
        """Follow a life from start to end; its exit code."""
        times, loop = self.times, asyncio.get_running_loop()
        health, end = loop.create_task(self._health(child)), loop.create_task(child.ended())
        try:
            await asyncio.wait({health, end}, return_when=asyncio.FIRST_COMPLETED)
            if not end.done() and health.result():
                since = loop.time()
                self.was_healthy = True
                self.healthy.set()
                self.say(self.command.name, f"healthy at {self.command.url}")
                await asyncio.wait({end})
                if loop.time() - since >= times.steady:
                    self.failures = 0
            elif not end.done():
                self.say(self.command.name, f"not healthy after {times.startup:g} s: stopping it")
                await child.stop(times.grace)
            return await end
        finally:
            health.cancel()
            end.cancel()

    async def _health(self, child: Child) -> bool:
        """Whether it answers /health in time."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.times.startup
        pool = Pool(self.command.url)
        while loop.time() < until:
            try:
                status, _ = await fetch(pool, "/health", seconds=5.0)
                if status == 200:
                    return True
            except (OSError, TimeoutError):
                pass
            await asyncio.sleep(self.times.poll)
        return False


async def supervise(
    plan: Plan,
    environ: Mapping[str, str],
    say: Callable[[str, str], None],
    times: Times,
    *,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Run the plan until SIGINT or SIGTERM; a second one kills at once.

    The gateway starts when every engine is healthy, or some are and another has failed. Raises Failed if no
    engine was ever healthy and one of them has failed `times.attempts` times.
    """
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def told() -> None:
        if stop.is_set():
            hurry.set()
        else:
            stop.set()
            say("launch", "stopping; a second signal kills")

    for number in SIGNALS:
        loop.add_signal_handler(number, told)
    engines = [Watched(command, times, environ, say) for command in plan.engines]
    gateway = Watched(plan.gateway, times, environ, say)
    tasks = [loop.create_task(engine.run()) for engine in engines]
    stopping = loop.create_task(stop.wait())
    front: list[asyncio.Task[None]] = []
    try:
        failed = await _until(stopping, tasks, lambda: _startable(engines))
        if stop.is_set():
            return
        if failed is not None:
            raise Failed(failed)
        front.append(loop.create_task(gateway.run()))
        tasks += front
        failed = await _until(stopping, tasks, lambda: _serving(gateway))
        if failed is not None:
            raise Failed(failed)
        if not stop.is_set():
            ready()
            await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        stopping.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await _stop_all(gateway, engines, times, hurry, say)
        for number in SIGNALS:
            loop.remove_signal_handler(number)


async def _until(
    stopping: asyncio.Task[bool], tasks: list[asyncio.Task[None]], verdict: Callable[[], str | None]
) -> str | None:
    """Wait for a verdict: empty text is good news, other text a failure; None if it is time to stop."""
    while not stopping.done():
        for task in tasks:
            if task.done():
                task.result()
        found = verdict()
        if found is not None:
            return found or None
        await asyncio.wait({stopping}, timeout=0.05)
    return None


def _startable(engines: list[Watched]) -> str | None:
    healthy = [engine.healthy.is_set() for engine in engines]
    if all(healthy) or (any(healthy) and any(engine.failures for engine in engines)):
        return ""
    return None if any(engine.was_healthy for engine in engines) else _hopeless(engines)


def _serving(gateway: Watched) -> str | None:
    return "" if gateway.healthy.is_set() else _hopeless([gateway])


def _hopeless(group: list[Watched]) -> str | None:
    for one in group:
        if one.hopeless and one.child is not None:
            last = " / ".join(list(one.child.lines)[-3:]) or "nothing"
            return f"{one.command.name} does not start; it last said: {last}"
    return None


async def _stop_all(
    gateway: Watched,
    engines: list[Watched],
    times: Times,
    hurry: asyncio.Event,
    say: Callable[[str, str], None],
) -> None:
    """The gateway first, so that it drains into living engines; then the engines, all at once."""
    loop = asyncio.get_running_loop()

    async def orderly() -> None:
        for group in ([gateway], engines):
            running = [one.child for one in group if one.child is not None]
            await asyncio.gather(*(child.stop(times.grace) for child in running))

    work, rush = loop.create_task(orderly()), loop.create_task(hurry.wait())
    await asyncio.wait({work, rush}, return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
        say("launch", "killing what still runs")
        for one in (gateway, *engines):
            if one.child is not None:
                one.child.signal(signal.SIGKILL)
    await work
    rush.cancel()
