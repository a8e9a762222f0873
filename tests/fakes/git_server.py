"""Real git repositories over HTTP: `git http-backend` behind a small web server, in threads of this process.

It fails on demand, and can be older than it is: `speaks` limits the protocol, down to plain files.
Clones and fetches by the `git` program work too, so it can serve the repositories that containers build.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from ssl import PROTOCOL_TLS_SERVER, SSLContext
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import unquote, urlsplit


@dataclass
class Fault:
    """What requests that match ``METHOD path`` get instead of the truth, ``times`` times."""

    match: str
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    #: Bytes, or pieces: those are sent until they end or the client leaves, without a length.
    body: bytes | Iterable[bytes] = b""
    times: float = float("inf")
    #: Say nothing until the client leaves.
    silent: bool = False


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    #: Bytes of the answer's body.
    answered: int = 0

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class GitServer:
    """Serves every repository below a folder: ``folder/app.git`` is at ``{url}/app.git``. A context manager.

    With a user name or password it wants Basic authentication.
    """

    def __init__(
        self,
        folder: Path,
        *,
        username: str | None = None,
        password: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        speaks: Literal["v2", "v1", "v0", "files"] = "v2",
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        self.folder = folder
        self.speaks = speaks
        self.login = ""
        if username is not None or password is not None:
            pair = f"{username or ''}:{password or ''}".encode()
            self.login = f"Basic {base64.b64encode(pair).decode()}"
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        #: Set when a client of a silent or endless answer has left.
        self.left = threading.Event()
        self._server = _Server((host, port), type("Handler", (_Handler,), {"git": self}))
        if certificate:
            context = SSLContext(PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port: int = self._server.server_address[1]
        self.host = f"{host}:{self.port}"
        self.url = f"{'https' if certificate else 'http'}://{self.host}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def calls(self) -> list[str]:
        """What was asked: ``METHOD path``, without queries."""
        return [str(request) for request in self.requests]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle is what several tests are about."""


class _Handler(BaseHTTPRequestHandler):
    git: GitServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name is the base class's)
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        body = self._read_body()
        asked = (self.command, parts.path, dict(self.headers.items()))
        for fault in self.git.faults:
            if fault.times > 0 and re.search(fault.match, f"{self.command} {parts.path}"):
                fault.times -= 1
                self.git.requests.append(Request(*asked))
                return self._fail(fault)
        if self.git.login and self.headers.get("Authorization") != self.git.login:
            status, headers, content = 401, {"WWW-Authenticate": 'Basic realm="git"'}, b""
        elif self.git.speaks == "files":
            status, headers, content = self._file(unquote(parts.path))
        else:
            status, headers, content = self._backend(unquote(parts.path), parts.query, body)
        self.git.requests.append(Request(*asked, answered=len(content)))
        return self._answer(status, headers, content)

    do_POST = do_GET  # noqa: N815 (the base class looks for this name)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _file(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """A web server that has never heard of git."""
        target = (self.git.folder / path.lstrip("/")).resolve()
        if not target.is_relative_to(self.git.folder.resolve()) or not target.is_file():
            return 404, {"Content-Type": "text/html"}, b"<html>Not found</html>"
        return 200, {"Content-Type": "text/plain"}, target.read_bytes()

    def _backend(self, path: str, query: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Run git's own server, as CGI (RFC 3875)."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.git.folder),
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROJECT_ROOT": str(self.git.folder),
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "REMOTE_ADDR": "127.0.0.1",
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
        }
        if self.git.speaks == "v2":
            environment["GIT_PROTOCOL"] = self.headers.get("Git-Protocol", "")
        if self.git.speaks == "v1":
            environment["GIT_PROTOCOL"] = "version=1"
        done = subprocess.run(["git", "http-backend"], env=environment, input=body, capture_output=True, check=False)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
        return int(headers.pop("Status", "200").split()[0]), headers, content

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _fail(self, fault: Fault) -> None:
        try:
            if fault.silent:
                self.connection.recv(1)
            elif isinstance(fault.body, bytes):
                self._answer(fault.status, fault.headers, fault.body)
            else:
                self.send_response(fault.status)
                for name, value in fault.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in fault.body:
                    self.wfile.write(piece)
        except OSError:
            self.git.left.set()
        else:
            if fault.silent:
                self.git.left.set()
