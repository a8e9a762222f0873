"""Fixtures for tests with real containers: the engine, a registry, settings, and git repositories."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from podbuild import HostUnavailable, LocalHost, LocalSettings
from podbuild.hosts.local import Engine, detect_engine, limits_here

BASE = "localhost/podbuild-base:trixie"
REGISTRY = "localhost/podbuild-registry:1"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
#: In `FROM` lines; builds get it from the test registry, which stands in as a mirror.
FROM = "docker.io/library/debian:trixie-slim"


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The container engine. Without one, tests are skipped visibly, or fail under PODBUILD_REQUIRE_ENGINE=1."""
    try:
        return asyncio.run(detect_engine())
    except HostUnavailable as error:
        if os.environ.get("PODBUILD_REQUIRE_ENGINE") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))


def call(engine: Engine, *arguments: str, check: bool = True) -> str:
    """Run the engine and return what it prints."""
    done = subprocess.run([engine.program, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()


def free_port() -> int:
    """Return a port of loopback that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class TestRegistry:
    """A real registry in a container: on loopback for this machine, on a network of its own for builds."""

    __test__ = False
    engine: Engine
    name: str
    network: str
    port: int
    #: How this machine, and `courier`, name it.
    host: str = field(init=False)
    #: How builds reach it.
    inner: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.host = f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        if call(self.engine, "ps", "--all", "--quiet", f"--filter=name=^{self.name}$"):
            call(self.engine, "start", self.name)
        else:
            options = ["--detach", f"--name={self.name}", f"--network={self.network}"]
            options += [f"--publish={self.host}:5000", *limits_here()]
            call(self.engine, "run", *options, REGISTRY)
        template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        self.inner = f"{call(self.engine, 'container', 'inspect', '--format', template, self.name)}:5000"
        end = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"http://{self.host}/v2/", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < end, "the test registry does not answer"
                time.sleep(0.1)

    def stop(self) -> None:
        """Stop it; it keeps what it holds."""
        call(self.engine, "stop", "--time=1", self.name)

    def insecure(self) -> list[str]:
        """Return the option that plain HTTP takes."""
        return ["--tls-verify=false"] if self.engine.kind == "podman" else []

    def push(self, image: str, name: str) -> None:
        """Push an image of the engine under a name of this registry."""
        call(self.engine, "tag", image, f"{self.host}/{name}")
        call(self.engine, "push", "--quiet", *self.insecure(), f"{self.host}/{name}")
        call(self.engine, "rmi", f"{self.host}/{name}")

    def run(self, reference: str, *command: str) -> str:
        """Pull an image by reference, run it, remove it, and return what it printed."""
        call(self.engine, "pull", "--quiet", *self.insecure(), reference)
        try:
            return call(self.engine, "run", "--rm", "--network=none", *limits_here(), reference, *command)
        finally:
            call(self.engine, "rmi", "--force", reference)


def containers_below(engine: Engine, folder: Path) -> list[str]:
    """Return the containers that have something of a folder mounted."""
    ids = call(engine, "ps", "--all", "--quiet").split()
    sources = "--format={{.Name}}{{range .Mounts}} {{.Source}}{{end}}"
    # A container of somebody else may go away meanwhile: what is said of the others counts.
    said = call(engine, "container", "inspect", sources, *ids, check=False) if ids else ""
    return [line.split()[0] for line in said.splitlines() if f" {folder}/" in line]


@pytest.fixture(scope="session")
def registry(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestRegistry]:
    """A registry for the whole test run, which holds a base image. At the end no container of any test is left."""
    unique = secrets.token_hex(4)
    network = f"podbuild-test-{unique}"
    call(engine, "network", "create", network)
    registry = TestRegistry(engine, f"podbuild-test-registry-{unique}", network, free_port())
    try:
        registry.start()
        registry.push(BASE, "library/debian:trixie-slim")
        yield registry
    finally:
        call(engine, "rm", "--force", "--volumes", registry.name, check=False)
        call(engine, "network", "rm", network, check=False)
        left = containers_below(engine, tmp_path_factory.getbasetemp())
        assert not left, f"containers of tests were left behind: {left}"


@pytest.fixture
async def local_settings(registry: TestRegistry, tmp_path: Path) -> AsyncIterator[LocalSettings]:
    """Settings for builds of one test. Afterwards its pods are gone, and nothing else of theirs is left."""
    own = Path("/usr/local/share/ca-certificates")
    settings = LocalSettings(
        registry=f"{registry.host}/t-{secrets.token_hex(4)}",
        plain_http_registries=(registry.host, registry.inner),
        mirrors=(("docker.io", registry.inner), (registry.host, registry.inner)),
        network=registry.network,
        ca_bundle=str(CA_BUNDLE) if any(own.glob("**/*.crt")) else "",
        state_folder=str(tmp_path / "state"),
    )
    yield settings
    async with LocalHost(settings) as host:
        for pod in await host.find({}):
            if (tmp_path / "state" / "pods" / pod["metadata"]["labels"]["podbuild.io/nonce"]).exists():
                await host.delete(pod)
    left = list((tmp_path / "state").glob("*/*"))
    assert not left, f"files of builds were left behind: {left}"


@dataclass(frozen=True)
class Repo:
    """A git repository on this machine."""

    path: Path
    commit: str

    @property
    def url(self) -> str:
        """Its address for a local engine."""
        return f"file://{self.path}"

    def git(self, *arguments: str) -> str:
        """Run git in it."""
        return git(self.path, *arguments)


def git(folder: Path, *arguments: str) -> str:
    """Run git with nobody's configuration and return what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    for who in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{who}_NAME": "test", f"GIT_{who}_EMAIL": "test@localhost"}
    done = subprocess.run(["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit_files(folder: Path, files: dict[str, str], message: str = "change") -> str:
    """Write files into a repository, commit them, and return the commit."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", message)
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def make_repo(tmp_path: Path) -> Callable[..., Repo]:
    """A function that makes a git repository, with one commit, of files."""

    def make(files: dict[str, str], name: str = "") -> Repo:
        folder = tmp_path / "repositories" / (name or f"repo-{secrets.token_hex(4)}")
        folder.mkdir(parents=True)
        git(folder, "init", "--quiet", "--initial-branch=main")
        return Repo(folder, commit_files(folder, files))

    return make
