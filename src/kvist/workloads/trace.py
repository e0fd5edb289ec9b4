"""Replay of request traces, as streams: hash blocks (Mooncake), token ids, chat messages, lengths (Azure)."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np

from kvist.model import Query, pack
from kvist.workloads.base import UNIQUE, Filler, Workload, poisson, text_tokens
from kvist.workloads.files import count, decode, field, lines

HASH_BLOCK = 512  # tokens behind one id of a Mooncake trace
_SPREAD = 2_654_435_761  # odd: times this is a bijection of 32-bit numbers
_WITHIN = (np.arange(HASH_BLOCK, dtype=np.uint32) * np.uint32(40_503)).reshape(1, -1)


class Trace(Workload):
    name = "trace"
    description = "Replay of a trace FILE: Mooncake hash blocks, token ids, chat messages, or Azure lengths."
    source = "kvcache-ai/Mooncake FAST25 traces; LLMServingSim; Azure public dataset"
    params = {
        "speed": "factor on the trace's own clock (1.0); with --rates the mean rate is set instead",
        "loop": "times to replay it, one after the other (1)",
        "skip": "requests left out at the beginning (0)",
        "limit": "so many requests only",
        "clients": "conversations under way at once, for chat messages (64)",
    }

    def __init__(
        self,
        *,
        file: str | None = None,
        speed: float = 1.0,
        loop: int = 1,
        skip: int = 0,
        limit: int | None = None,
        clients: int = 64,
        rate: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rate=rate, seed=seed)
        if file is None:
            raise ValueError("trace: a file is needed, as in trace:FILE.jsonl")
        if not speed > 0 or loop < 1 or clients < 1 or (limit is not None and limit < 1):
            raise ValueError("trace: speed must be above 0, and loop, limit and clients at least 1")
        if skip < 0:
            raise ValueError(f"trace: skip must be at least 0, not {skip}")
        self.path = Path(file)
        self.speed, self.loop, self.clients = speed, loop, clients
        self.skip, self.limit = skip, limit
        self._read = _reader(self.path)

    def describe(self) -> str:
        pace = f"x {self.speed:g} speed" if self.rate is None else f"scaled to {self.rate:g} requests/s"
        return f"trace {self.path.name}, from file, {pace}" + (
            f", {self.loop} times" if self.loop > 1 else ""
        )

    def __iter__(self) -> Iterator[Query]:
        speed = self.speed if self.rate is None else self.rate / self._native_rate()
        start, number = 0.0, 0
        for _ in range(self.loop):
            last = gap = 0.0
            for query in self._part():
                gap = query.arrival - last if number else 0.0
                last = query.arrival
                query.id = number
                query.arrival = start + query.arrival / speed
                number += 1
                yield query
            start += (last + max(gap, 1e-3)) / speed

    def _part(self) -> Iterator[Query]:
        """The requests that `skip` and `limit` leave, from time 0 on if any are skipped."""
        end = None if self.limit is None else self.skip + self.limit
        began: float | None = None if self.skip else 0.0
        for query in islice(self._read(self), self.skip, end):
            began = query.arrival if began is None else began
            query.arrival -= began
            yield query

    def _native_rate(self) -> float:
        requests, last = 0, 0.0
        for query in self._part():
            requests, last = requests + 1, query.arrival
        return requests / last if last > 0 else 1.0


def _reader(path: Path) -> Any:
    """Which format it is, from the first line."""
    for number, line in lines(path):
        if line.upper().startswith(b"TIMESTAMP,"):
            return _lengths
        row = decode(line, f"{path}:{number}")
        for name, reader in (("hash_ids", _blocks), ("input_tok_ids", _token_ids), ("messages", _messages)):
            if isinstance(row, dict) and name in row:
                return reader
        raise ValueError(
            f"{path}:{number}: unknown trace format: a record needs 'hash_ids', 'input_tok_ids' or 'messages'"
        )
    raise ValueError(f"{path}: the file is empty")


class _Blocks(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def expand(hash_ids: list[int], length: int) -> bytes:
    """Packed tokens behind block ids: different ids differ from their first token on, equal ids are equal."""
    ids = np.array(hash_ids, dtype=np.uint64)
    first = (ids * np.uint64(_SPREAD)).astype(np.uint32).reshape(-1, 1)
    return pack((first + _WITHIN).reshape(-1)[:length])


def _blocks(trace: Trace) -> Iterator[Query]:
    decoder = msgspec.json.Decoder(_Blocks)
    last = 0.0
    for number, line in lines(trace.path):
        where = f"{trace.path}:{number}"
        try:
            row = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ValueError(f"{where}: {error}") from None
        needed = -(-row.input_length // HASH_BLOCK)
        if row.input_length < 1 or row.output_length < 0:
            raise ValueError(f"{where}: input_length must be at least 1 and output_length at least 0")
        if len(row.hash_ids) < needed:
            raise ValueError(
                f"{where}: field 'hash_ids' has {len(row.hash_ids)} blocks of {HASH_BLOCK} tokens, "
                f"input_length {row.input_length} needs {needed}"
            )
        if row.hash_ids and not 0 <= min(row.hash_ids) <= max(row.hash_ids) < 1 << 32:
            raise ValueError(f"{where}: field 'hash_ids' must hold numbers from 0 to 2**32 - 1")
        seconds = row.timestamp / 1000
        if seconds < last:
            raise ValueError(f"{where}: field 'timestamp' goes back in time: sort the trace by it")
        last = seconds
        yield Query(number, expand(row.hash_ids, row.input_length), max(row.output_length, 1), seconds)


def _token_ids(trace: Trace) -> Iterator[Query]:
    for number, line in lines(trace.path):
        where = f"{trace.path}:{number}"
        row = decode(line, where)
        ids = field(row, "input_tok_ids", list, where)
        answer = row.get("output_tok_ids") or []
        try:
            prompt, reply = pack(ids), pack(answer)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{where}: token ids must be numbers from 0 to 2**32 - 1") from None
        arrival = count(row, "arrival_time_ns", where) / 1e9
        yield Query(number, prompt, max(count(row, "output_toks", where), 1), arrival, answer=reply)


def _lengths(trace: Trace) -> Iterator[Query]:
    """No prefixes are known: every prompt is unique."""
    filler = Filler(trace.seed)
    start: datetime | None = None
    for number, line in lines(trace.path):
        if number == 1:
            continue
        where = f"{trace.path}:{number}"
        parts = line.decode("utf-8", "replace").strip().split(",")
        try:
            at = datetime.fromisoformat(parts[0][:26])
            prompt, output = int(parts[1]), int(parts[2])
        except (ValueError, IndexError):
            raise ValueError(f"{where}: expected TIMESTAMP,ContextTokens,GeneratedTokens") from None
        start = start or at
        arrival = (at - start).total_seconds()
        yield Query(number, filler.piece(UNIQUE + number, max(prompt, 1)), max(output, 1), arrival)


def _messages(trace: Trace) -> Iterator[Query]:
    """Each assistant message is a request for all messages before it; its text is the answer.

    Conversations come in the file's order, `clients` of them under way at once; each arrival (2 a second)
    continues one of these at random.
    """
    rng = Random(f"{trace.seed}/messages")
    rows = iter(lines(trace.path))
    active: list[Iterator[tuple[bytes, bytes, str]]] = []

    def refill() -> None:
        while len(active) < trace.clients and (row := next(rows, None)) is not None:
            active.append(_turns(row[1], f"{trace.path}:{row[0]}", row[0]))

    arrivals = poisson(2.0, rng)
    refill()
    number = 0
    while active:
        at = rng.randrange(len(active))
        turn = next(active[at], None)
        if turn is None:
            active.pop(at)
            refill()
            continue
        prompt, answer, session = turn
        yield Query(number, prompt, max(len(answer) // 4, 1), next(arrivals), answer=answer, session=session)
        number += 1


def _turns(line: bytes, where: str, number: int) -> Iterator[tuple[bytes, bytes, str]]:
    row = decode(line, where)
    history = b""
    for message in field(row, "messages", list, where):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: each message needs a text field 'role'")
        role = message["role"]
        rest = {key: value for key, value in message.items() if key != "role"}
        text = text_tokens(
            rest["content"]
            if set(rest) == {"content"} and isinstance(rest["content"], str)
            else msgspec.json.encode(rest).decode()
        )
        head = text_tokens(f"<|{role}|>")
        if role == "assistant" and history:
            yield history + head, text, str(row.get("session", number))
        history += head + text
