"""A hub on the loopback: what huggingface_hub asks of the real one when a model is uploaded, and a record of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from training_hub.monitoring.base_model import front_matter


@dataclass
class Arrived:
    """What arrived. files: content by name. made: asked of a new repository. refuses: parts of paths that get a 403."""

    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    refuses: tuple[str, ...] = ()
    commits: int = 0


@contextmanager
def hub_server() -> Iterator[tuple[str, Arrived]]:
    """The address of the server, and what arrives at it."""
    arrived = Arrived()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: Any) -> None:
            pass

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else b""
            arrived.requests.append(f"{self.command} {self.path}")
            if "Authorization" in self.headers:
                arrived.tokens.add(self.headers["Authorization"].removeprefix("Bearer "))
            if any(part in self.path for part in arrived.refuses):
                self.reply(403, {"error": "You do not have the rights for this."})
                return
            here = f"http://{self.headers['Host']}"
            status, content = answer(arrived, self.command, self.path.partition("?")[0], body, here)
            self.reply(status, content)

        def reply(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", arrived
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(arrived: Arrived, method: str, path: str, body: bytes, here: str) -> tuple[int, Any]:
    """Status and content of the answer to one request."""
    if path == "/api/whoami-v2":
        return 200, {"type": "user", "name": "me", "auth": {"type": "access_token"}}
    if path == "/api/validate-yaml":
        wrong = [] if front_matter(json.loads(body)["content"]) else [{"message": "no metadata"}]
        return 400 if wrong else 200, {"errors": wrong, "warnings": []}
    if path == "/api/repos/create":
        arrived.made.append(json.loads(body))
        return 200, {"url": f"{here}/me/tuned"}
    if "/preupload/" in path:
        asked = json.loads(body)["files"]
        modes = [
            {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
            for one in asked
        ]
        return 200, {"files": [{**one, "shouldIgnore": False, "oid": None} for one in modes]}
    if path.endswith("/info/lfs/objects/batch"):
        wanted = json.loads(body)["objects"]
        upload = [{**one, "actions": {"upload": {"href": f"{here}/objects/{one['oid']}"}}} for one in wanted]
        return 200, {"transfer": "basic", "objects": upload}
    if path.startswith("/objects/"):
        arrived.objects[path.removeprefix("/objects/")] = body
        return 200, {}
    if "/commit/" in path and method == "POST":
        arrived.commits += 1
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                arrived.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                arrived.files[value["path"]] = arrived.objects[value["oid"]]
        return 200, {"commitUrl": f"{here}/me/tuned/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
    if path.startswith("/api/models/"):
        return 200, {"id": "me/tuned", "sha": "0" * 40, "private": True, "siblings": [], "tags": []}
    return 404, {"error": f"nothing at {path}"}
