"""A hub of data sets on the loopback: what `datasets` and huggingface_hub ask of the real one, and a record of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

COMMIT = "a" * 40


@contextmanager
def dataset_hub(name: str, files: Mapping[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub with one data set, and the paths of the files that were read from it."""
    read: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            if path.startswith(f"/datasets/{name}/resolve/"):
                self.file(path.split("/", 6)[-1])
            elif path.startswith(f"/api/datasets/{name}/tree/"):
                folder = path.split("/tree/")[1].partition("/")[2]
                inside = [one for one in files if one.startswith(f"{folder}/")]
                self.reply(200, json.dumps([entry(one) for one in inside]).encode())
            elif path.startswith(f"/api/datasets/{name}"):
                listed = [{"rfilename": one} for one in files]
                self.reply(200, json.dumps({"id": name, "sha": COMMIT, "siblings": listed, "tags": []}).encode())
            else:
                self.reply(404, b"{}")

        do_HEAD = do_GET

        def file(self, path: str) -> None:
            if path not in files:
                self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                return
            if self.command == "GET":
                read.append(path)
            data, status, headers = files[path], 200, {"ETag": f'"{len(files[path])}"', "Accept-Ranges": "bytes"}
            if "Range" in self.headers:
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                end = min(int(last or len(data) - 1), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
                data, status = data[int(first) : end + 1], 206
            self.reply(status, data, headers)

        def reply(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    def entry(path: str) -> dict[str, Any]:
        return {"type": "file", "oid": "0" * 40, "size": len(files[path]), "path": path}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", read
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
