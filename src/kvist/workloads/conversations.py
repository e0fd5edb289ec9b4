"""Multi-turn chat: ShareGPT and UltraChat, from the datasets' files or generated with their structure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from kvist.model import Query
from kvist.workloads.base import Filler, Workload, fit, poisson, text_tokens
from kvist.workloads.files import records

USERS = {"human", "user"}
TURNS = (2, 4, 6, 8)

Turn = tuple[bytes, bytes]  # packed user message and answer


class Conversations(Workload):
    """Clients that each hold one conversation; every turn resends the history (paper section 4).

    Each arrival picks an unfinished conversation at random. Turns a client cycle over 2, 4, 6, 8; every
    user message is cut or repeated to `message` tokens.
    """

    params = {
        "clients": "conversations (128)",
        "message": "tokens of a user message (1024)",
        "output": "output tokens (4)",
    }

    def __init__(
        self,
        *,
        file: str | None = None,
        clients: int = 128,
        message: int = 1024,
        output: int = 4,
        rate: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rate=12.0 if rate is None else rate, seed=seed)
        if clients < 1 or message < 1 or output < 1:
            raise ValueError(f"{self.name}: clients, message and output must be at least 1")
        self.file = None if file is None else Path(file)
        self.clients, self.message, self.output = clients, message, output

    @property
    def total(self) -> int:
        return sum(TURNS[client % len(TURNS)] for client in range(self.clients))

    def describe(self) -> str:
        origin = "generated, no file was given" if self.file is None else f"from {self.file.name}"
        return (
            f"{self.name}, {origin}: {self.clients} conversations of {TURNS[0]} to {TURNS[-1]} turns, "
            f"{self.message} new tokens a turn"
        )

    def __iter__(self) -> Iterator[Query]:
        rng = Random(f"{self.seed}/{self.name}")
        script = self._generated() if self.file is None else self._loaded(self.file)
        history = [b""] * self.clients
        done = [0] * self.clients
        unfinished = list(range(self.clients))
        assert self.rate is not None
        for number, arrival in enumerate(poisson(self.rate, rng)):
            if not unfinished:
                return
            at = rng.randrange(len(unfinished))
            client = unfinished[at]
            user, answer = script[client][done[client]]
            prompt = history[client] + user
            yield Query(number, prompt, self.output, arrival, answer=answer, session=f"client{client}")
            history[client] = prompt + answer
            done[client] += 1
            if done[client] == len(script[client]):
                unfinished[at] = unfinished[-1]
                unfinished.pop()

    def _generated(self) -> list[list[Turn]]:
        filler = Filler(self.seed)
        number = iter(range(1, 1 << 30))
        return [
            [
                (filler.piece(next(number), self.message), filler.piece(next(number), self.output))
                for _ in range(TURNS[client % len(TURNS)])
            ]
            for client in range(self.clients)
        ]

    def _loaded(self, path: Path) -> list[list[Turn]]:
        """The first conversations of the file that are long enough for a client's turns."""
        script: list[list[Turn]] = []
        for number, row in records(path):
            turns = list(self.turns(row, f"{path}:{number}"))
            wanted = TURNS[len(script) % len(TURNS)]
            if len(turns) >= wanted:
                script.append(
                    [
                        (fit(text_tokens(user), self.message), fit(text_tokens(answer), self.output))
                        for user, answer in turns[:wanted]
                    ]
                )
            if len(script) == self.clients:
                return script
        raise ValueError(
            f"{path}: only {len(script)} conversations are long enough for {self.clients} clients: "
            f"lower clients (workload {self.name}:{path}:clients={max(len(script), 1)})"
        )

    def turns(self, row: dict[str, Any], where: str) -> Iterator[tuple[str, str]]:
        """(user message, answer) pairs of one record, in any of the datasets' shapes."""
        if isinstance(row.get("data"), list):  # UltraChat 1.4M: alternating strings
            messages = [("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(row["data"])]
        elif isinstance(row.get("conversations"), list):  # ShareGPT
            messages = [(_text(m, "from", where), _text(m, "value", where)) for m in row["conversations"]]
        elif isinstance(row.get("messages"), list):  # UltraChat 200k and other chat files
            messages = [(_text(m, "role", where), _text(m, "content", where)) for m in row["messages"]]
        else:
            raise ValueError(f"{where}: field 'conversations', 'messages' or 'data' (a list) is missing")
        user = None
        for role, text in messages:
            if not isinstance(text, str):
                raise ValueError(f"{where}: a message must be text, not {type(text).__name__}")
            if role in USERS:
                user = text
            elif user is not None:
                yield user, text
                user = None


def _text(message: Any, name: str, where: str) -> str:
    if not isinstance(message, dict) or not isinstance(message.get(name) or "", str):
        raise ValueError(f"{where}: each message needs a text field {name!r}")
    return message.get(name) or ""


class ShareGPT(Conversations):
    name = "sharegpt"
    description = "Multi-turn chat after ShareGPT; FILE: ShareGPT's JSON or messages as JSON lines."
    source = "paper section 4; ShareGPT_V3_unfiltered_cleaned_split.json"


class UltraChat(Conversations):
    name = "ultrachat"
    description = "Multi-turn chat after UltraChat; FILE: UltraChat's JSON lines."
    source = "paper section 4; thunlp/UltraChat (data), HuggingFaceH4/ultrachat_200k (messages)"
