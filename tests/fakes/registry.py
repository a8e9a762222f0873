"""A registry on loopback, in threads of this process: it takes pushes, serves pulls, and fails on demand.

It speaks as much of the distribution protocol as podbuild and a monolithic push need. What it does
is held to a real registry by the contract tests in `tests/test_registry.py`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import httpx

TOKEN = "token-of-the-fake"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
_PARTNERS = {
    OCI_MANIFEST: ("application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar+gzip"),
    DOCKER_MANIFEST: (
        "application/vnd.docker.container.image.v1+json",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
    ),
}


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@dataclass
class Fault:
    """What requests matching ``METHOD path`` get instead of the truth, ``times`` times."""

    match: str
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    #: Bytes, or pieces: those are sent until they end or the client leaves, without a length.
    body: bytes | Iterable[bytes] = b""
    times: float = float("inf")
    #: Say nothing until the registry is closed.
    silent: bool = False
    #: Bytes to put on the wire instead of an HTTP answer.
    raw: bytes = b""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class FakeRegistry:
    """A context manager. ``auth`` is ``""`` (open to all), ``"basic"`` or ``"bearer"``.

    Its own token server is at ``/token``; ``challenge`` replaces the WWW-Authenticate header.
    ``anonymous`` lets that server give tokens to callers without credentials.
    """

    def __init__(
        self,
        *,
        auth: str = "",
        username: str = "user",
        password: str = "",
        anonymous: bool = False,
        challenge: str = "",
        address: str = "127.0.0.1",
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        self.auth = auth
        self.login = f"Basic {base64.b64encode(f'{username}:{password}'.encode()).decode()}"
        self.anonymous = anonymous
        self.token_key = "token"
        #: The Docker-Content-Digest header, which the specification leaves optional.
        self.tells_digest = True
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.closing = threading.Event()
        server_class = type("Server", (_Server,), {"address_family": socket.AF_INET6}) if ":" in address else _Server
        self._server = server_class((address, 0), type("Handler", (_Handler,), {"registry": self}))
        self.port: int = self._server.server_address[1]
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        name = f"[{address}]" if ":" in address else address
        self.host = f"{name}:{self.port}"
        self.url = f"{'https' if certificate else 'http'}://{self.host}"
        self.challenge = challenge or f'Bearer realm="{self.url}/token",service="fake",scope="repository:x:pull,push"'
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
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle is what several tests are about."""


class _Handler(BaseHTTPRequestHandler):
    registry: FakeRegistry
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name is the base class's)
        pass

    def do_GET(self) -> None:
        registry, parts = self.registry, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = Request(self.command, parts.path, parse_qs(parts.query), dict(self.headers.items()))
        registry.requests.append(asked)
        for fault in registry.faults:
            if fault.times > 0 and re.search(fault.match, str(asked)):
                fault.times -= 1
                return self._fail(fault)
        login = self.headers.get("Authorization", "")
        if parts.path == "/token":
            if login == registry.login or (not login and registry.anonymous):
                return self._answer(200, json.dumps({registry.token_key: TOKEN}).encode())
            return self._error(401, "UNAUTHORIZED")
        if registry.auth and login != (registry.login if registry.auth == "basic" else f"Bearer {TOKEN}"):
            challenge = 'Basic realm="fake"' if registry.auth == "basic" else registry.challenge
            return self._error(401, "UNAUTHORIZED", {"WWW-Authenticate": challenge})
        if parts.path == "/v2/":
            return self._answer(200, b"{}")
        if match := re.fullmatch(r"/v2/(.+)/(manifests|blobs|blobs/uploads)/([^/]*)", parts.path):
            name, kind, reference = match.groups()
            if kind == "manifests":
                return self._manifest(name, reference, body)
            return self._blob(name, reference if kind == "blobs" else "", asked.query, body)
        return self._error(404, "NOT_A_ROUTE")

    do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815 (the base class looks for these names)

    def _manifest(self, name: str, reference: str, body: bytes) -> None:
        held = self.registry.manifests
        if self.command == "PUT":
            held[name, reference] = held[name, digest_of(body)] = (self.headers["Content-Type"], body)
            return self._answer(201, b"", {"Docker-Content-Digest": digest_of(body)})
        if (name, reference) not in held:
            return self._error(404, "MANIFEST_UNKNOWN" if any(n == name for n, _ in held) else "NAME_UNKNOWN")
        media_type, content = held[name, reference]
        if media_type not in self.headers.get("Accept", ""):
            return self._error(404, "MANIFEST_UNKNOWN")
        headers = {"Content-Type": media_type}
        if self.registry.tells_digest:
            headers["Docker-Content-Digest"] = digest_of(content)
        return self._answer(200, content, headers)

    def _blob(self, name: str, reference: str, query: dict[str, list[str]], body: bytes) -> None:
        if self.command == "POST":
            return self._answer(202, b"", {"Location": f"/v2/{name}/blobs/uploads/1?state=x"})
        if self.command == "PUT":
            self.registry.blobs[query["digest"][0]] = body
            return self._answer(201)
        if reference not in self.registry.blobs:
            return self._error(404, "BLOB_UNKNOWN")
        return self._answer(200, self.registry.blobs[reference], {"Content-Type": "application/octet-stream"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"errors": [{"code": code, "message": "as asked"}]}).encode()
        self._answer(status, body, {"Content-Type": "application/json"} | (headers or {}))

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, fault: Fault) -> None:
        if fault.silent:
            self.registry.closing.wait()
            self.close_connection = True
        elif fault.raw:
            self.wfile.write(fault.raw)
            self.close_connection = True
        elif isinstance(fault.body, bytes):
            self._answer(fault.status, fault.body, fault.headers)
        else:
            self.send_response(fault.status)
            for key, value in (fault.headers | {"Connection": "close"}).items():
                self.send_header(key, value)
            self.end_headers()
            for piece in fault.body:
                self.wfile.write(piece)
                if self.registry.closing.wait(0):
                    break


class Pusher:
    """Pushes tiny images into any registry, as a build would."""

    def __init__(self, url: str, repository: str, login: tuple[str, str] | None = None) -> None:
        self._client = httpx.Client(base_url=url, auth=login, trust_env=False, verify=False)  # noqa: S501 (loopback)
        self._repository = repository

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def blob(self, content: bytes) -> str:
        started = self._client.post(f"/v2/{self._repository}/blobs/uploads/").raise_for_status()
        digest = digest_of(content)
        where = self._client.base_url.join(started.headers["Location"]).copy_merge_params({"digest": digest})
        self._client.put(where, content=content).raise_for_status()
        return digest

    def manifest(self, reference: str, media_type: str, document: dict[str, Any]) -> str:
        content = json.dumps({"schemaVersion": 2, "mediaType": media_type} | document).encode()
        where = f"/v2/{self._repository}/manifests/{reference or digest_of(content)}"
        self._client.put(where, content=content, headers={"Content-Type": media_type}).raise_for_status()
        return digest_of(content)

    def image(self, tag: str, labels: dict[str, str], media_type: str = OCI_MANIFEST, platform: str = "amd64") -> str:
        """Push an image and return its digest. Without a tag it is pushed by digest."""
        config = json.dumps({"architecture": platform, "os": "linux", "config": {"Labels": labels}}).encode()
        layer = b"a layer that nobody unpacks"
        config_type, layer_type = _PARTNERS[media_type]
        document = {
            "config": {"mediaType": config_type, "digest": self.blob(config), "size": len(config)},
            "layers": [{"mediaType": layer_type, "digest": self.blob(layer), "size": len(layer)}],
        }
        return self.manifest(tag, media_type, document)

    def index(self, tag: str, entries: list[tuple[str, dict[str, Any]]], media_type: str = OCI_INDEX) -> str:
        """Push an index of digests, each with what its entry says besides, and return its digest."""
        inner = OCI_MANIFEST if media_type == OCI_INDEX else DOCKER_MANIFEST
        listed = [{"mediaType": inner, "digest": digest, "size": 100, **more} for digest, more in entries]
        return self.manifest(tag, media_type, {"manifests": listed})
