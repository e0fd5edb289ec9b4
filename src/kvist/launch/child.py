"""One process: started in a session of its own, its lines passed on, stopped with all that it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping

from kvist.launch import tether
from kvist.launch.plan import Command

KEPT = 20  # last lines, for the message when it dies


class Child:
    """Use `start`. `said` gets the name and each line of output, stdout and stderr as they come."""

    def __init__(
        self,
        command: Command,
        process: asyncio.subprocess.Process,
        output: asyncio.StreamReader,
        said: Callable[[str, str], None],
    ) -> None:
        self.command = command
        self.process = process
        self.lines: deque[str] = deque(maxlen=KEPT)
        self._output = output
        self._said = said
        self._reading = asyncio.get_running_loop().create_task(self._read())

    @classmethod
    async def start(
        cls, command: Command, environ: Mapping[str, str], said: Callable[[str, str], None]
    ) -> Child:
        # A pipe of our own: asyncio's would hold back the end until all that inherited it is gone.
        inner, outer = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                tether.__file__,
                str(os.getpid()),
                *command.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=outer,
                stderr=outer,
                env={**environ, **command.environ},
                start_new_session=True,  # Ctrl-C reaches kvist alone; the group holds all it starts
            )
        finally:
            os.close(outer)
        output = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), os.fdopen(inner, "rb")
        )
        return cls(command, process, output, said)

    async def _read(self) -> None:
        while True:
            try:
                line = await self._output.readline()
            except ValueError:  # longer than the stream's limit: it goes on in pieces
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            self.lines.append(text)
            self._said(self.command.name, text)

    async def ended(self) -> int:
        """Wait for the end, kill what the process left behind, and return its exit code (-N: signal N)."""
        code = await self.process.wait()
        self.signal(signal.SIGKILL)
        # Output is read to its end, but not for ever: what escaped the group may hold the pipe.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._reading), 2.0)
        self._reading.cancel()
        return code

    def signal(self, number: int) -> None:
        """Signal the process and all others of its group, whether it still runs or not."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    async def stop(self, grace: float) -> None:
        """SIGTERM to the process, which stops its own workers; SIGKILL to the whole group after `grace` s."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), grace)
        except TimeoutError:
            self.signal(signal.SIGKILL)
        await self.ended()
