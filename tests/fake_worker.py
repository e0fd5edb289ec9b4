"""A minimal OpenAI-like worker for tests and benchmarks: `python fake_worker.py PORT [mode]`.

Modes: ok; hang (accepts, never answers); garbage (answers no HTTP); cut (closes amid a chunked answer);
error (500); busy (503 with Retry-After); slow (streams a piece every 50 ms, without end); flood (streams as
fast as it is read); steady (streams 4 pieces in 8 ms); close (closes without a word).
A `POST /mode` with a mode switches at run time.
"""

from __future__ import annotations

import asyncio
import sys

import httptools

BODY = (
    b'{"id":"x","object":"chat.completion","model":"fake","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":100,"completion_tokens":1,'
    b'"total_tokens":101,"prompt_tokens_details":{"cached_tokens":50}}}'
)
PIECE = (
    b'data: {"id":"x","object":"chat.completion.chunk","model":"fake","choices":[{"index":0,"delta":'
    b'{"content":"hi"},"finish_reason":null}]}\n\n'
)
END = b"data: [DONE]\n\n"
MODELS = b'{"object":"list","data":[{"id":"fake","object":"model","created":0,"owned_by":"test"}]}'
RENDER = b'{"tokens":[1,2,3],"count":3,"prompt_token_ids":[1,2,3],"token_ids":[1,2,3]}'


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def plain(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        status,
        len(body),
        body,
    )


OK = plain(BODY)
STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    + chunk(PIECE) * 4
    + chunk(END)
    + b"0\r\n\r\n"
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Worker(asyncio.Protocol):
    mode = "ok"
    served = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.parser = httptools.HttpRequestParser(self)
        self.url = b""
        self.body = b""
        self.closed = False
        self.readable = asyncio.Event()
        self.readable.set()

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.readable.set()

    def on_message_begin(self) -> None:
        self.url = self.body = b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        if self.url == b"/health":
            self.transport.write(plain(b"{}"))
        elif self.url == b"/v1/models":
            self.transport.write(plain(MODELS))
        elif self.url == b"/mode":
            Worker.mode = self.body.decode()
            self.transport.write(plain(b"{}"))
        elif self.url.endswith((b"/render", b"/tokenize")):
            self.transport.write(plain(RENDER))
        else:
            Worker.served += 1
            self.answer()

    def answer(self) -> None:
        mode = Worker.mode
        if mode == "ok":
            self.transport.write(
                STREAM if b'"stream": true' in self.body or b'"stream":true' in self.body else OK
            )
        elif mode == "garbage":
            self.transport.write(b"\x00\x01 this is not HTTP \xff\r\n\r\n" * 3)
        elif mode == "cut":
            self.transport.write(HEAD + chunk(PIECE) + b"ffff\r\nhalf a chunk")
            self.transport.close()
        elif mode == "error":
            self.transport.write(plain(b'{"error":{"message":"broken"}}', b"500 Internal Server Error"))
        elif mode == "busy":
            busy = plain(b'{"error":{"message":"full"}}', b"503 Service Unavailable")
            self.transport.write(busy.replace(b"\r\n", b"\r\nretry-after: 1\r\n", 1))
        elif mode == "close":
            self.transport.close()
        elif mode == "steady":
            self.transport.write(HEAD + chunk(PIECE))
            self.later(3)
        elif mode == "slow":
            asyncio.get_running_loop().create_task(self.stream())
        elif mode == "flood":
            asyncio.get_running_loop().create_task(self.flood())

    def later(self, left: int) -> None:
        if self.closed:
            return
        loop = asyncio.get_running_loop()
        if left:
            loop.call_later(0.002, self.later, left - 1)
        self.transport.write(chunk(PIECE) if left else chunk(END) + b"0\r\n\r\n")

    def pause_writing(self) -> None:
        self.readable.clear()

    def resume_writing(self) -> None:
        self.readable.set()

    async def flood(self) -> None:
        self.transport.write(HEAD)
        while not self.closed:
            await self.readable.wait()
            self.transport.write(chunk(b"x" * 65536))
            await asyncio.sleep(0)

    async def stream(self) -> None:
        self.transport.write(HEAD)
        while not self.closed:
            self.transport.write(chunk(PIECE))
            await asyncio.sleep(0.05)


async def main(port: int, mode: str) -> None:
    Worker.mode = mode
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Worker, "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    try:
        import uvloop

        uvloop.install()
    except ModuleNotFoundError:
        pass
    asyncio.run(main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "ok"))
