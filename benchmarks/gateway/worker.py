"""A minimal OpenAI-like worker on several ports, one process: `python worker.py PORTS` prints them.

Every prompt gets the same answer at once, so that what is measured is the proxy. A stream comes in PIECES
separate writes. vllm-router asks its workers for /v1/chat/completions/render and /tokenize on each request.
`--capacity N` turns it into a worker of a known capacity for the overload run: SERVICE seconds a request, N
requests at once, the others wait.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque

import httptools
import uvloop

PIECES = 8
SERVICE = 0.05  # seconds, with --capacity


def plain(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    return head + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


ANSWER = plain(
    b'{"id":"x","object":"chat.completion","created":0,"model":"fake","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1000,'
    b'"completion_tokens":8,"total_tokens":1008}}'
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PIECE = chunk(
    b'data: {"id":"x","object":"chat.completion.chunk","created":0,"model":"fake","choices":[{"index":0,'
    b'"delta":{"content":"hi"},"finish_reason":null}]}\n\n'
)
END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
MODELS = plain(b'{"object":"list","data":[{"id":"fake","object":"model","created":0,"owned_by":"test"}]}')
TOKENS = plain(b'{"tokens":[1,2,3],"count":3,"prompt_token_ids":[1,2,3],"token_ids":[1,2,3]}')
KNOWN = {b"/health": plain(b"{}"), b"/v1/models": MODELS}


class Worker(asyncio.Protocol):
    capacity = 0
    busy = 0
    waiting: deque[Worker] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.parser = httptools.HttpRequestParser(self)
        self.url = b""
        self.body: list[bytes] = []
        self.left = False

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.left = True

    def on_message_begin(self) -> None:
        self.url = b""
        self.body = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        known = KNOWN.get(self.url)
        if known is not None:
            self.transport.write(known)
        elif self.url.endswith((b"/render", b"/tokenize")):
            self.transport.write(TOKENS)
        elif not Worker.capacity:
            self.answer()
        elif Worker.busy < Worker.capacity:
            self.serve()
        else:
            Worker.waiting.append(self)

    def serve(self) -> None:
        Worker.busy += 1
        asyncio.get_running_loop().call_later(SERVICE, self.served)

    def served(self) -> None:
        Worker.busy -= 1
        if not self.left:
            self.answer()
        while Worker.waiting and Worker.busy < Worker.capacity:
            following = Worker.waiting.popleft()
            if not following.left:
                following.serve()

    def answer(self) -> None:
        if any(b'"stream":true' in part for part in self.body):
            self.transport.write(HEAD + PIECE)
            asyncio.get_running_loop().call_soon(self.piece, PIECES - 1)
        else:
            self.transport.write(ANSWER)

    def piece(self, left: int) -> None:
        if self.transport.is_closing():
            return
        if left:
            self.transport.write(PIECE)
            asyncio.get_running_loop().call_soon(self.piece, left - 1)
        else:
            self.transport.write(END)


async def main(ports: int) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Worker, "127.0.0.1", 0, backlog=4096) for _ in range(ports)]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    if "--capacity" in sys.argv:
        Worker.capacity = int(sys.argv[sys.argv.index("--capacity") + 1])
    uvloop.run(main(int(sys.argv[1])))
