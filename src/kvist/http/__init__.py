"""HTTP/1.1 for a proxy: a server and a pooled client as bare asyncio protocols around httptools.

Why not a framework: a proxy's cost is all overhead, and a bare protocol measured twice the requests/s of an
ASGI server with a lean client on the same core (docs/gateway.md).
"""
