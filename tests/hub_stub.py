"""A local server that speaks enough of the hub's API for the real huggingface_hub client.

Weights are served as the hub serves large files: by redirection to another host, without the token.
Both hosts are this server, once as 127.0.0.1 and once as localhost.
"""

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Seen:
    """One request, and the number of bytes of a file that were sent for it."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    sent: int = 0


@dataclass
class Repository:
    """Files by commit, commits by revision, and what stands between them and a client.

    token:   the only one that may read; others are told that there is no such repository
    granted: the tokens that may read files; None where the repository is not gated
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    granted: set[str] | None = None

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        """Let a revision stand for these files; returns the commit."""
        text = repr(sorted(files.items())).encode()
        commit = hashlib.sha1(text).hexdigest()
        self.commits[commit] = files
        self.revisions[revision] = commit
        return commit


class HubStub:
    """The server; used as a context, it runs in a thread.

    repositories: by ORG/NAME
    refusals:     {start of a path: (status, headers)} of what is refused at once
    known_tokens: others are invalid, as to the hub
    cuts:         {file: (bytes, times)}: where in the whole file a connection breaks
    resets:       whether it breaks by a reset, and not by its end
    stalls:       whether it stays open instead, silent until the server stops
    claimed_size: of every large file in the listing, instead of its own
    ignores_range: whether a part is answered with the whole
    signature:    what follows an address on the second host
    on_file:      called with a file's name before that file is served
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.refusals: dict[str, tuple[int, dict[str, str]]] = {}
        self.known_tokens = {"hf_good"}
        self.cuts: dict[str, tuple[int, float]] = {}
        self.resets = False
        self.stalls = False
        self.claimed_size: int | None = None
        self.ignores_range = False
        self.signature = ""
        self.on_file = lambda name: None
        self.seen: list[Seen] = []
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.stub = self
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> "HubStub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.released.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def files_sent(self) -> list[str]:
        """Names of the files whose content was asked for, in order; repeated where asked again."""
        paths = [seen.path for seen in self.seen if seen.method == "GET"]
        return [match[3] for path in paths if (match := _RESOLVE.fullmatch(path))]

    def blob_requests(self) -> list[Seen]:
        """What was asked of the second host."""
        return [seen for seen in self.seen if seen.path.startswith("/blobs/")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self._seen = Seen(
            self.command, path, self.headers.get("Range"), self.headers.get("Authorization")
        )
        stub = self.server.stub
        stub.seen.append(self._seen)
        for start, (status, headers) in stub.refusals.items():
            if path.startswith(start):
                return self._refuse(status, headers)
        if path.startswith("/blobs/"):
            return self._send_blob(path.split("/", 3)[3])
        match = _INFO.fullmatch(path) or _RESOLVE.fullmatch(path)
        repository = stub.repositories.get(match[1]) if match else None
        token = (self._seen.authorization or "").removeprefix("Bearer ")
        if token and token not in stub.known_tokens:
            message = "Invalid credentials in Authorization header"
            return self._refuse(401, {"X-Error-Message": message})
        if repository is None or repository.token not in (None, token):
            # The hub tells strangers nothing, and those that it knows that there is nothing.
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            if not token and path.startswith("/api/"):
                headers = {"X-Error-Message": "Invalid username or password."}
            return self._refuse(404 if token else 401, headers)
        revision = match[2] or "main"
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            message = f"Invalid rev id: {revision}"
            headers = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": message}
            return self._refuse(404, headers)
        files = repository.commits[commit]
        if path.startswith("/api/"):
            return self._send_info(match[1], commit, files, "blobs" in parse_qs(url.query))
        if repository.granted is not None and token not in repository.granted:
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}
            return self._refuse(403 if token else 401, headers)
        return self._send_file(match[1], commit, files, match[3])

    def _send_info(self, name: str, commit: str, files: dict[str, bytes], has_blobs: bool) -> None:
        siblings = []
        for file, content in files.items():
            siblings.append({"rfilename": file})
            if has_blobs:
                siblings[-1] |= {"size": len(content), "blobId": _git_id(content)}
            if has_blobs and _is_large(file):
                size = self.server.stub.claimed_size or len(content)
                sha256 = hashlib.sha256(content).hexdigest()
                siblings[-1] |= {"size": size}
                siblings[-1]["lfs"] = {"size": size, "sha256": sha256, "pointerSize": 134}
        info = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def _send_file(self, name: str, commit: str, files: dict[str, bytes], file: str) -> None:
        headers = {"X-Repo-Commit": commit}
        self.server.stub.on_file(file)
        if file not in files:
            code = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._refuse(404, headers | code)
        content = files[file]
        if not _is_large(file):
            return self._send(200, headers | {"ETag": f'"{_git_id(content)}"'}, content)
        headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        headers["X-Linked-Size"] = str(len(content))
        host = f"http://localhost:{self.server.stub.port}"
        headers["Location"] = f"{host}/blobs/{commit}/{file}{self.server.stub.signature}"
        return self._send(302, headers, b"")

    def _send_blob(self, file: str) -> None:
        commit = self._seen.path.split("/")[2]
        content = next(
            r.commits[commit][file]
            for r in self.server.stub.repositories.values()
            if commit in r.commits
        )
        wanted = re.fullmatch(r"bytes=(\d+)-", self._seen.range or "")
        if wanted is None or self.server.stub.ignores_range:
            return self._send(200, {}, content, file=file)
        start = int(wanted[1])
        if start >= len(content):
            return self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        return self._send(206, headers, content[start:], file=file, start=start)

    def _refuse(self, status: int, headers: dict[str, str]) -> None:
        text = json.dumps({"error": headers.get("X-Error-Message", "")}).encode()
        self._send(status, headers, text)

    def _send(
        self,
        status: int,
        headers: dict[str, str],
        content: bytes,
        *,
        file: str | None = None,
        start: int = 0,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        stop, times = self.server.stub.cuts.get(file, (0, 0))
        if times <= 0:
            self._seen.sent = len(content) if file else 0
            # A client may have had enough of it.
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)
            return
        self.server.stub.cuts[file] = (stop, times - 1)
        self._seen.sent = max(stop - start, 0)
        self.wfile.write(content[: self._seen.sent])
        self._cut()

    def _cut(self) -> None:
        self.wfile.flush()
        if self.server.stub.stalls:
            self.server.stub.released.wait()
        elif self.server.stub.resets:
            # A reset takes away what the client has not read yet.
            time.sleep(0.1)
            # Lingering for no time at all turns the end of the connection into a reset.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            for file in (self.rfile, self.wfile, self.connection):
                file.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


def _is_large(file: str) -> bool:
    return file.endswith(".safetensors")


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
