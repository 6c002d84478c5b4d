"""A local stand-in for the Hugging Face Hub: the calls that huggingface_hub makes to download a snapshot, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit


class HubServer:
    """Serves directories as models; a context manager.

    Attributes:
        url: What ``HF_ENDPOINT`` is to be.
        requests: Method, path and Range header of each request so far.
        cut: File names of which one answer breaks off half-way; each is taken out when it has happened.
        down: File names that aren't answered but with status 503.
        gated: Whether files and information need a token.
    """

    def __init__(self, models: dict[str, Path], revisions: tuple[str, ...] = ("main",)) -> None:
        self.models = models
        self.revisions = revisions
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: set[str] = set()
        self.down: set[str] = set()
        self.gated = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def sha(self, model: str) -> str:
        """The commit of a model."""
        return hashlib.sha1(model.encode()).hexdigest()

    def fetched(self) -> list[str]:
        """Names of the files that were asked for with GET, in order."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(head=True)

        def do_GET(self) -> None:
            self._answer(head=False)

        def _answer(self, head: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            parts = path.strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            owner = 2 if api else 0
            model = "/".join(parts[owner : owner + 2])
            rest = parts[owner + 2 :]
            if model not in hub.models:
                return self._error(401, "RepoNotFound")
            if hub.gated:
                return self._error(403, "GatedRepo")
            revision = rest[1] if len(rest) > 1 else "main"
            if revision not in (*hub.revisions, hub.sha(model)):
                return self._error(404, "RevisionNotFound")
            files = {file.relative_to(hub.models[model]).as_posix(): file for file in hub.models[model].rglob("*") if file.is_file()}
            if api and rest[:1] == ["tree"]:
                return self._json([{"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)} for name, file in files.items()])
            if api:
                return self._json({"id": model, "sha": hub.sha(model), "siblings": [{"rfilename": name} for name in files]})
            name = "/".join(rest[2:])
            if rest[0] != "resolve" or name not in files:
                return self._error(404, "EntryNotFound")
            self._file(model, name, files[name], head)

        def _file(self, model: str, name: str, file: Path, head: bool) -> None:
            if name in hub.down:
                return self._error(503, "")
            content, start = file.read_bytes(), 0
            asked = self.headers.get("Range")
            if asked is not None:
                start = int(asked.removeprefix("bytes=").partition("-")[0])
            self.send_response(200 if asked is None else 206)
            self.send_header("ETag", f'"{_etag(file)}"')
            self.send_header("X-Repo-Commit", hub.sha(model))
            self.send_header("Accept-Ranges", "bytes")
            if asked is not None:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if head:
                return
            if name in hub.cut:
                hub.cut.remove(name)
                self.wfile.write(content[start : start + (len(content) - start) // 2])
                self.close_connection = True
            else:
                self.wfile.write(content[start:])

        def _json(self, value: object) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _error(self, status: int, code: str) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", f"stand-in: {code}")
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
