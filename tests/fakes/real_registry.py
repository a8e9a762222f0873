"""A real registry (Debian's `docker-registry`) on loopback, as a process of the test run."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

USERNAME = "builder"
PASSWORD = "correct horse"
#: `USERNAME` and `PASSWORD` for `start_registry(htpasswd=…)`. It takes bcrypt only.
HTPASSWD = f"{USERNAME}:$2y$04$abcdefghijklmnopqrstuujydOTSfIH/d5oUHpsygqV5X9xJLQc6e\n"


class RealRegistry:
    """A running registry: ``host`` as images name it, ``url`` for HTTP. Stop it, or use it in ``with``."""

    def __init__(self, host: str, process: subprocess.Popen[bytes]) -> None:
        self.host = host
        self.url = f"http://{host}"
        self._process = process

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_registry(folder: Path, *, port: int = 0, htpasswd: str = "") -> RealRegistry:
    """Start a registry that keeps its data in the folder; port 0 means a free one.

    Plain HTTP, 127.0.0.1 only. With ``htpasswd`` (a file's content) it wants Basic authentication.
    Skips the test where the program is missing.
    """
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed (Debian package docker-registry)")
    if not port:
        with socket.create_server(("127.0.0.1", 0)) as chosen:
            port = chosen.getsockname()[1]
    config: dict[str, Any] = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}, "delete": {"enabled": True}},
        "http": {"addr": f"127.0.0.1:{port}", "secret": "shared by nobody"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    if htpasswd:
        (folder / "htpasswd").write_text(htpasswd)
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
    # Every JSON text is a YAML text. The empty environment: REGISTRY_* variables would override the file.
    (folder / "config.yml").write_text(json.dumps(config))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "serve", str(folder / "config.yml")], stdout=log, stderr=subprocess.STDOUT, env={}
        )
    registry = RealRegistry(f"127.0.0.1:{port}", process)
    deadline = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{registry.url}/v2/", trust_env=False).status_code in (200, 401):
                return registry
        except httpx.TransportError:
            time.sleep(0.05)
    registry.stop()
    raise RuntimeError(f"docker-registry did not start: {(folder / 'log').read_text()[-2000:]}")
