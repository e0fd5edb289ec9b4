"""As much of a Kubernetes API server as lists and watches need, on loopback."""

from __future__ import annotations

import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

POOLS = "/apis/inference.networking.k8s.io/v1/namespaces/default/inferencepools"
OBJECTIVES = "/apis/inference.networking.x-k8s.io/v1alpha2/namespaces/default/inferenceobjectives"
PODS = "/api/v1/namespaces/default/pods"


class FakeKube:
    """`put` and `delete` objects of a path; watchers hear of it. `url` is the server's."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, dict[str, Any]]] = {POOLS: {}, OBJECTIVES: {}, PODS: {}}
        self.version = 1
        self.down = False
        self.lists = 0
        self.lock = threading.RLock()
        self.watches: list[tuple[str, dict[str, str], queue.Queue[dict[str, Any] | None]]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake.answer(self)

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def put(self, path: str, name: str, **parts: Any) -> None:
        with self.lock:
            self.version += 1
            kind = "MODIFIED" if name in self.objects[path] else "ADDED"
            labels = parts.pop("labels", {})
            item = {
                "metadata": {"name": name, "labels": labels, "resourceVersion": str(self.version)},
                **parts,
            }
            self.objects[path][name] = item
            self._tell(path, kind, item)

    def pod(self, name: str, ip: str, ready: bool = True, phase: str = "Running", **labels: str) -> None:
        status = {
            "podIP": ip,
            "phase": phase,
            "conditions": [{"type": "Ready", "status": str(ready)}],
        }
        self.put(PODS, name, status=status, labels=labels or {"app": "llm"}, padding="x" * 100_000)

    def delete(self, path: str, name: str) -> None:
        with self.lock:
            self.version += 1
            self._tell(path, "DELETED", self.objects[path].pop(name))

    def expire(self) -> None:
        """Tell all watchers that they are too old."""
        with self.lock:
            for _, _, line in self.watches:
                line.put({"type": "ERROR", "object": {"code": 410, "message": "too old resource version"}})
                line.put(None)

    def end_watches(self) -> None:
        with self.lock:
            for _, _, line in self.watches:
                line.put(None)

    def stop(self) -> None:
        self.end_watches()
        self.server.shutdown()
        self.server.server_close()

    def _tell(self, path: str, kind: str, item: dict[str, Any]) -> None:
        for watched, select, line in self.watches:
            if watched == path and matches(item, select):
                line.put({"type": kind, "object": item})

    def answer(self, client: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(client.path)
        asked = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if self.down or parts.path not in self.objects:
            client.send_response(500 if self.down else 404)
            client.send_header("content-length", "0")
            client.end_headers()
            return
        select = {key: asked[key] for key in ("labelSelector", "fieldSelector") if key in asked}
        if asked.get("watch") in ("1", "True", "true"):
            self._watch(client, parts.path, select, int(asked["resourceVersion"]))
            return
        with self.lock:
            self.lists += 1
            items = [item for item in self.objects[parts.path].values() if matches(item, select)]
            body = json.dumps({"metadata": {"resourceVersion": str(self.version)}, "items": items}).encode()
        client.send_response(200)
        client.send_header("content-type", "application/json")
        client.send_header("content-length", str(len(body)))
        client.end_headers()
        client.wfile.write(body)

    def _watch(self, client: BaseHTTPRequestHandler, path: str, select: dict[str, str], version: int) -> None:
        line: queue.Queue[dict[str, Any] | None] = queue.Queue()
        with self.lock:
            for item in self.objects[path].values():
                if int(item["metadata"]["resourceVersion"]) > version and matches(item, select):
                    line.put({"type": "MODIFIED", "object": item})
            line.put({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(self.version)}}})
            self.watches.append((path, select, line))
        client.send_response(200)
        client.send_header("transfer-encoding", "chunked")
        client.end_headers()
        try:
            while (event := line.get()) is not None:
                data = json.dumps(event).encode() + b"\n"
                for part in (data[:1000], data[1000:]):  # an event may come in several segments
                    if part:
                        client.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                        client.wfile.flush()
            client.wfile.write(b"0\r\n\r\n")
        except OSError:
            pass
        finally:
            with self.lock:
                self.watches = [watch for watch in self.watches if watch[2] is not line]


def matches(item: dict[str, Any], select: dict[str, str]) -> bool:
    labels = item["metadata"]["labels"]
    for part in select.get("labelSelector", "").split(","):
        key, _, value = part.partition("=")
        if key and labels.get(key) != value:
            return False
    wanted = select.get("fieldSelector", "").removeprefix("metadata.name=")
    return not wanted or item["metadata"]["name"] == wanted
