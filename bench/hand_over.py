"""What the hand-over through courier costs: against a direct push from the container that builds.

Both are timed in the same pod, on the same image, one after the other; every second run the other
way round. The hand-over is all that happens to the image after it was built: into an OCI layout,
taken over byte by byte by courier, pushed. The direct push is one `podman push`, which needs the
registry's login where the repository's steps run. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio

from podbuild import Line, LocalHost, LocalSettings, parse_options, parse_repository, plan_build, submit
from podbuild.hosts import Pod
from podbuild.hosts.local import Engine, detect_engine, limits_here
from podbuild.manifest import Manifest

ROOT = Path(__file__).resolve().parent.parent
BASE = "localhost/podbuild-base:trixie"
REGISTRY = "localhost/podbuild-registry:1"
FROM = "library/debian:trixie-slim"
#: The share of the image that no compression makes smaller.
_RANDOM_SHARE = 0.427

#: Runs in the container `build` in place of its program: the same, with a direct push beside the hand-over.
PROGRAM = """\
import sys
sys.path.insert(0, "/opt/podbuild")
import build
target, order = sys.argv[1:]
hand_over = build.hand_over

def push_directly():
    build.say("bench: direct push begins")
    command = ["podman", "push", "--quiet", "--tls-verify=false", build.IMAGE, target]
    build.run(command, build.configure(build.read_pod()), "podman push")
    build.say("bench: direct push ends")

def both():
    for step in (push_directly, hand_over) if order == "direct first" else (hand_over, push_directly):
        step()
        if step is hand_over:
            build.say("bench: handed over")
    build.say("bench: end")

build.hand_over = both
build.main()
"""


class BenchHost(LocalHost):
    """The local engine, with the bench's program in the container `build`."""

    def __init__(self, settings: LocalSettings, *arguments: str) -> None:
        super().__init__(settings)
        self._bench = ["python3", "-c", PROGRAM, *arguments]

    async def create(self, manifest: Manifest, files: Mapping[str, bytes]) -> Pod:
        for container in manifest["spec"]["containers"]:
            if container["name"] == "build":
                container["command"] = self._bench
        return await super().create(manifest, files)


@dataclass(frozen=True, slots=True)
class Run:
    """The seconds of one run."""

    direct: float
    #: Into the OCI layout, by `build`.
    layout: float
    #: From the end of `build` to the push: courier takes the image over.
    take_over: float
    #: courier's push.
    push: float
    #: Layers as they were pushed.
    compressed_bytes: int

    @property
    def hand_over(self) -> float:
        """The whole way through courier."""
        return self.layout + self.take_over + self.push

    @property
    def ratio(self) -> float:
        """How many times as long as a direct push."""
        return self.hand_over / self.direct


def say(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


def call(engine: Engine, *arguments: str) -> str:
    """Run the engine and return what it prints."""
    done = subprocess.run([engine.program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{engine.kind} {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


# --- what a run needs -----------------------------------------------------------------------------------------


@contextmanager
def network(engine: Engine, name: str) -> Iterator[str]:
    """A network of the bench's own."""
    call(engine, "network", "create", name)
    try:
        yield name
    finally:
        call(engine, "network", "rm", name)


@contextmanager
def registry(engine: Engine, name: str, network: str) -> Iterator[tuple[str, str]]:
    """A registry; yields its names for this machine and for builds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        outer = f"127.0.0.1:{probe.getsockname()[1]}"
    try:
        options = ["--detach", f"--name={name}", f"--network={network}", f"--publish={outer}:5000", *limits_here()]
        call(engine, "run", *options, REGISTRY)
        template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        inner = f"{call(engine, 'container', 'inspect', '--format', template, name)}:5000"
        await_registry(outer)
        yield outer, inner
    finally:
        subprocess.run([engine.program, "rm", "--force", "--volumes", name], capture_output=True, check=False)


def await_registry(address: str) -> None:
    """Wait until a registry answers."""
    end = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(f"http://{address}/v2/", timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def seed(engine: Engine, address: str) -> None:
    """Put the base image into a registry."""
    image = f"{address}/{FROM}"
    call(engine, "tag", BASE, image)
    try:
        call(engine, "push", "--quiet", *(["--tls-verify=false"] if engine.kind == "podman" else []), image)
    finally:
        call(engine, "rmi", image)


def make_repository(folder: Path, megabytes: int) -> str:
    """Make a repository whose image has this much data on top of its base; return its commit."""
    random = round(megabytes * 1_000_000 * _RANDOM_SHARE)
    text = megabytes * 1_000_000 - random
    folder.mkdir()
    (folder / "Dockerfile").write_text(
        f"FROM docker.io/{FROM}\n"
        f"RUN head -c {random} /dev/urandom > /random && yes 'podbuild measures' | head -c {text} > /text\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    for who in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{who}_NAME": "bench", f"GIT_{who}_EMAIL": "bench@localhost"}
    commands = (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "bench"])
    for command in commands:
        subprocess.run(["git", *command], cwd=folder, env=environment, check=True)
    return revision(folder)


def revision(folder: Path) -> str:
    """Return the commit that is checked out in a folder."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


# --- a run --------------------------------------------------------------------------------------------------


async def measure(settings: LocalSettings, repository: Path, commit: str, target: str, number: int) -> Run:
    """Build once, and return the seconds of both ways from the log's own times."""
    order = "direct first" if number % 2 else "hand-over first"
    outer = settings.registry.partition("/")[0]
    plan = plan_build(
        parse_repository(f"file://{repository}"), commit, f"{outer}/bench/through:{number}", parse_options({}), settings
    )
    times: dict[str, datetime] = {}
    async with BenchHost(settings, f"{target}/bench/direct:{number}", order) as host:
        try:
            build = await submit(host, plan)
            async for event in build.events():
                if isinstance(event, Line):
                    times[" ".join(event.text.split()[:4])] = event.time
                    times[event.text.split(" ", 1)[0]] = event.time
            await build.result()
        finally:
            with anyio.CancelScope(shield=True):
                if (pod := await host.read(plan.name)) is not None:
                    await host.delete(pod)

    def between(first: str, last: str) -> float:
        return (times[last] - times[first]).total_seconds()

    run = Run(
        direct=between("bench: direct push begins", "bench: direct push ends"),
        layout=between("Handing the image over", "bench: handed over"),
        take_over=between("bench: end", "Pushing"),
        push=between("Pushing", "Pushed"),
        compressed_bytes=compressed_bytes(outer, "bench/through", str(number)),
    )
    if compressed_bytes(outer, "bench/direct", str(number)) != run.compressed_bytes:
        raise RuntimeError("The two images differ.")
    say(
        f"run {number}, {order}: direct {run.direct:.1f} s, through courier {run.hand_over:.1f} s (layout"
        f" {run.layout:.1f}, take-over {run.take_over:.1f}, push {run.push:.1f}), ratio {run.ratio:.2f}"
    )
    return run


def compressed_bytes(address: str, name: str, tag: str) -> int:
    """Return the size of an image's layers in a registry."""
    request = urllib.request.Request(
        f"http://{address}/v2/{name}/manifests/{tag}", headers={"Accept": "application/vnd.oci.image.manifest.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        manifest = json.load(answer)
    return sum(int(layer["size"]) for layer in manifest["layers"])


def summary(runs: list[Run], engine: Engine, megabytes: int, loads: list[float]) -> dict[str, Any]:
    """Return the figures as plain data."""

    def figures(values: list[float]) -> dict[str, float]:
        return {
            "median": round(statistics.median(values), 2),
            "min": round(min(values), 2),
            "max": round(max(values), 2),
        }

    version = "{{.Version.Version}}" if engine.kind == "podman" else "{{.ServerVersion}}"
    return {
        "bench": "hand_over",
        "command": f"python bench/hand_over.py --runs={len(runs)} --megabytes={megabytes}",
        "commit": revision(ROOT),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "engine": f"{engine.kind} {call(engine, 'info', '--format', version)}, {engine.isolation} isolation",
        "cores": os.cpu_count(),
        "load": {"before": round(loads[0], 2), "after": round(loads[-1], 2)},
        "runs": len(runs),
        "megabytes": megabytes,
        "compressed_megabytes": round(runs[0].compressed_bytes / 1e6),
        "ratio": figures([run.ratio for run in runs]),
        "direct_seconds": figures([run.direct for run in runs]),
        "hand_over_seconds": figures([run.hand_over for run in runs]),
        "layout_seconds": figures([run.layout for run in runs]),
        "take_over_seconds": figures([run.take_over for run in runs]),
        "push_seconds": figures([run.push for run in runs]),
    }


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="how many pods (default 3)")
    parser.add_argument("--megabytes", type=int, default=1000, help="data on top of the base image (default 1000)")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    engine = asyncio.run(detect_engine())
    name = f"podbuild-bench-{secrets.token_hex(4)}"
    loads = [os.getloadavg()[0]]
    # Two registries, so that neither way finds the base image's layers where it pushes to.
    with (
        tempfile.TemporaryDirectory(prefix=f"{name}-") as folder,
        network(engine, name) as own,
        registry(engine, f"{name}-mirror", own) as (mirror, mirror_inner),
        registry(engine, f"{name}-target", own) as (target, target_inner),
    ):
        seed(engine, mirror)
        commit = make_repository(Path(folder) / "repository", asked.megabytes)
        settings = LocalSettings(
            registry=f"{target}/bench",
            plain_http_registries=(target, target_inner, mirror_inner),
            mirrors=(("docker.io", mirror_inner),),
            network=own,
            state_folder=f"{folder}/state",
        )
        runs = []
        for number in range(1, asked.runs + 1):
            say(f"run {number} of {asked.runs}: building {asked.megabytes} MB")
            runs.append(asyncio.run(measure(settings, Path(folder) / "repository", commit, target_inner, number)))
            loads.append(os.getloadavg()[0])
        print(json.dumps(summary(runs, engine, asked.megabytes, loads)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
