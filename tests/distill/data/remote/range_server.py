"""A web server of byte ranges with a script of faults, which answers S3's and the hub's requests for the same folder too.

python -m tests.distill.data.remote.range_server FOLDER ADDRESS PORT
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections import deque
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

COMMIT = "c0ffee" + 34 * "0"
"""The commit of every data set of this hub."""


class Handler(BaseHTTPRequestHandler):
    """One request: its fault, if the script has one for it, else what is asked for."""

    protocol_version = "HTTP/1.1"
    server: RangeServer

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        server, path = self.server, unquote(urlsplit(self.path).path)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        with server.lock:
            fault = server.always or (server.uploads.popleft() if server.uploads else "")
            server.log.append((self.command, path, "", fault))
        if fault:
            return self.answer(int(fault), b"no")
        file = server.folder / path.strip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return self.answer(200, b"", ETag=server.etag(file))

    def do_GET(self) -> None:
        server, path = self.server, unquote(urlsplit(self.path).path)
        asked = self.headers.get("Range", "")
        with server.lock:
            if {"X-Amz-Signature", "sig"} & parse_qs(urlsplit(self.path).query).keys():  # a signed URL asks how long it lasts
                server.log.append(("SIGNED", path, asked, fault := server.last))
            else:
                fault = server.always or (server.script.popleft() if server.script and self.command == "GET" else "")
                server.log.append((self.command, path, asked, fault))
                server.last = fault if fault[:3] in ("429", "503") else server.last
        if fault[:1] in "45" and fault:
            code, _, seconds = fault.partition(":")
            gated = {"X-Error-Code": "GatedRepo"} if fault == "403" and "/resolve/" in path else {}
            return self.answer(int(code), b"no", **({"Retry-After": seconds} if seconds else {}), **gated)
        if path.startswith("/api/datasets/"):
            return self.hub(path)
        if (query := parse_qs(urlsplit(self.path).query)) and "list-type" in query:
            return self.listing(path.strip("/"), query.get("prefix", [""])[0])
        file = server.folder / path.strip("/").split(f"/resolve/{COMMIT}/")[-1].split("/resolve/main/")[-1]
        if not file.is_file():
            return self.answer(404, b"nothing")
        return self.content(file, asked, fault)

    def content(self, file: Path, asked: str, fault: str) -> None:
        data, etag = file.read_bytes(), self.server.etag(file)
        headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        headers["Last-Modified"] = formatdate(file.stat().st_mtime, usegmt=True)
        if not self.server.deaf and self.headers.get("If-Match") not in (None, etag):
            return self.answer(412, b"")
        if not asked or fault == "no ranges":
            return self.answer(200, data, fault, **headers)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        end = min(int(last or len(data)) + 1, len(data)) - (10 if fault == "short" else 0)
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
        return self.answer(206, data[int(first) : end], fault, **headers)

    def answer(self, code: int, data: bytes, fault: str = "", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "slow":
            self.server.slow.wait(30)
        time.sleep(self.server.delay)
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data)

    def listing(self, bucket: str, prefix: str) -> None:
        root = self.server.folder / bucket
        files = [(path.relative_to(root).as_posix(), path) for path in sorted(root.rglob("*")) if path.is_file()]
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(self.server.etag(path))}</ETag><Size>{path.stat().st_size}</Size></Contents>"
            for name, path in files
            if name.startswith(prefix)
        )
        xml = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        self.answer(200, xml.encode(), **{"Content-Type": "application/xml"})

    def hub(self, path: str) -> None:
        if "/tree/" not in path:
            return self.answer(200, json.dumps({"id": "org/name", "sha": COMMIT}).encode())
        below = path.split(f"/tree/{COMMIT}", 1)[1].strip("/")
        files = [p for p in sorted((self.server.folder / below).rglob("*")) if p.is_file()]
        tree = [
            {
                "type": "file",
                "path": p.relative_to(self.server.folder).as_posix(),
                "size": p.stat().st_size,
                "oid": self.server.etag(p),
            }
            for p in files
        ]
        return self.answer(200, json.dumps(tree).encode())


class RangeServer(ThreadingHTTPServer):
    """The server of a folder; `with` serves it in a thread."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, address: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((address, port), Handler)
        self.folder = folder
        self.url = f"http://{address}:{self.server_port}"
        self.script: deque[str] = deque()
        """Faults of the next GET requests, one each: 503, 429:SECONDS, cut, short, slow, no ranges; empty for none."""
        self.uploads: deque[str] = deque()
        """Faults of the next PUT requests: 503, 403; empty for none."""
        self.always = ""
        """The fault of every request."""
        self.deaf = False
        """Whether If-Match is ignored."""
        self.last = ""
        """The last of 429 and 503, which a signed URL is answered with: a store that is busy is busy for all requests."""
        self.tags: dict[str, str] = {}
        """File name -> an ETag in the place of the right one."""
        self.delay = 0.0
        """Seconds that each answer takes."""
        self.slow = threading.Event()
        """Ends the wait of slow answers."""
        self.log: list[tuple[str, str, str, str]] = []
        """Method, path, range and fault of each request."""
        self.lock = threading.Lock()

    def etag(self, file: Path) -> str:
        return self.tags.get(file.name, f'"{hashlib.sha256(file.read_bytes()).hexdigest()[:20]}"')

    def gets(self, name: str = "") -> int:
        """GET requests of paths that end so."""
        return sum(method == "GET" and path.endswith(name) for method, path, _, _ in self.log)

    def __enter__(self) -> RangeServer:
        threading.Thread(target=partial(self.serve_forever, poll_interval=0.05), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.slow.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *arguments: object) -> None:
        """Nothing on stderr: clients are killed on purpose."""


if __name__ == "__main__":
    RangeServer(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])).serve_forever()
