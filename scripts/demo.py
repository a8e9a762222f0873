"""The demo: a registry, a Prefect server, a worker, and one image built through the deployment.

Usage: python -m scripts.demo up|down
REPO and REF build another repository. REGISTRY_PORT and SERVER_PORT choose other ports.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from podbuild.hosts.local import limits_here
from scripts.images import BASE, TAGS, make, make_base
from scripts.machine import Problem, ca_bundle, call_engine, engine, main, run, step

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".demo"
REGISTRY = "podbuild-registry"
NETWORK = "podbuild"
POOL = "podbuild"
LABEL = "io.podbuild.demo"
DEPLOYMENT = "build-image/local"
HOST = "127.0.0.1"
REGISTRY_PORT = int(os.environ.get("REGISTRY_PORT") or 5000)
SERVER_PORT = int(os.environ.get("SERVER_PORT") or 4200)
API = f"http://{HOST}:{SERVER_PORT}/api"
_SERVER_SECONDS = 120
_BUILD_SECONDS = 3600
_PLAIN = "Flow run encountered an exception: "


def up() -> None:
    """Set everything up, build through the deployment, run the image, and say where to look."""
    began = time.monotonic()
    STATE.mkdir(exist_ok=True)
    with step("Looking for a container engine"):
        found = engine()
    print(f"  {found.kind}, {found.isolation} isolation")
    base = make_base()
    for name in TAGS:
        make(name, base)
    registry = start_registry()
    start_server()
    configure(registry)
    start_worker()
    repo = os.environ.get("REPO") or f"file://{make_repository(ROOT / 'examples' / 'hello')}"
    ref = os.environ.get("REF") or "HEAD"
    run_id, state, result = asyncio.run(build(repo, ref))
    page = f"http://{HOST}:{SERVER_PORT}/runs/flow-run/{run_id}"
    if result is None:
        print(f"\n{state}\n\nrun      {page}", file=sys.stderr)
        sys.exit(1)
    if not os.environ.get("REPO"):
        show(result["reference"])
    print(
        f"\nimage    {result['reference']}\ntag      {result['image']}\ncommit   {result['commit']}\n"
        f"outcome  {result['outcome']}\nrun      {page}\n\n"
        f"{time.monotonic() - began:.0f} s. `make demo-down` stops and removes what this started."
    )


# --- the registry -----------------------------------------------------------------------------------------


def start_registry() -> tuple[str, str]:
    """Return the demo registry's name for this machine (on loopback) and its address for builds (on their network)."""
    state = call_engine("container", "inspect", "--format", "{{.State.Status}}", REGISTRY, check=False).stdout.strip()
    if state != "running":
        call_engine("rm", "--force", "--volumes", REGISTRY, check=False)
        check_port(REGISTRY_PORT, "REGISTRY_PORT")
        with step(f"Starting a registry on {HOST}:{REGISTRY_PORT}"):
            if call_engine("network", "inspect", NETWORK, check=False).returncode != 0:
                call_engine("network", "create", f"--label={LABEL}=network", NETWORK)
            options = ["--detach", f"--name={REGISTRY}", f"--label={LABEL}=registry", f"--network={NETWORK}"]
            options += [f"--publish={HOST}:{REGISTRY_PORT}:5000", *limits_here()]
            call_engine("run", *options, TAGS["registry"])
    published = call_engine("port", REGISTRY, "5000").stdout.split()[0]
    address = call_engine(
        "container", "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", REGISTRY
    ).stdout.strip()
    wait_for(f"http://{published}/v2/", "The registry", 30)
    with step("Putting the base image into it"):
        image = f"{published}/library/debian:trixie-slim"
        call_engine("tag", os.environ.get("BASE") or BASE, image)
        call_engine("push", "--quiet", *insecure(), image)
        call_engine("rmi", image)
    return published, f"{address}:5000"


def insecure() -> list[str]:
    """Return the option that lets podman speak plain HTTP; docker does so on loopback by itself."""
    return ["--tls-verify=false"] if engine().kind == "podman" else []


def check_port(port: int, setting: str) -> None:
    """Raise `Problem` if something listens on a port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(2)
        if probe.connect_ex((HOST, port)) == 0:
            raise Problem(
                f"Port {port} is taken by another program. Stop that, or choose another: make demo {setting}={port + 1}"
            )


def wait_for(url: str, what: str, seconds: float) -> None:
    """Wait until a URL answers. Raises `Problem` when it does not in time."""
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - our own, on loopback
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > end:
                raise Problem(f"{what} does not answer at {url}: {error}. See the logs in {STATE}.") from error
        time.sleep(0.3)


# --- Prefect ----------------------------------------------------------------------------------------------


def prefect_environment() -> dict[str, str]:
    """Return the environment of everything Prefect: its own folder, so that nobody's profile is touched."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")},
        "PREFECT_HOME": str(STATE / "prefect"),
        "PREFECT_API_URL": API,
        "PREFECT_SERVER_UI_API_URL": API,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
    }


def prefect(*arguments: str) -> list[str]:
    """Return the command line of Prefect's program in this environment."""
    return [str(Path(sys.executable).parent / "prefect"), *arguments]


def start_server() -> None:
    """Start a Prefect server on loopback, unless ours runs."""
    if not running("server"):
        check_port(SERVER_PORT, "SERVER_PORT")
        with step(f"Starting a Prefect server on {HOST}:{SERVER_PORT}"):
            start("server", prefect("server", "start", "--host", HOST, "--port", str(SERVER_PORT)))
            wait_for(f"{API}/health", "The Prefect server", _SERVER_SECONDS)


def configure(registry: tuple[str, str]) -> None:
    """Make the work pool, the block and the deployment, or bring them up to date."""
    with step("Setting up the work pool, the host block and the deployment"):
        os.environ.update(prefect_environment())
        if run(*prefect("work-pool", "inspect", POOL), check=False).returncode != 0:
            run(*prefect("work-pool", "create", POOL, "--type", "process"))
        asyncio.run(save_block(*registry))
        deployed = run(*prefect("--no-prompt", "deploy", "--all"))
        if "does not exist" in deployed.stdout:
            raise Problem(f"The work pool {POOL} is missing, although it was just made. See the logs in {STATE}.")


async def save_block(published: str, inner: str) -> None:
    """Store where builds run: this machine's engine, with the demo registry as target and as mirror."""
    from blocks import GitCredentials, LocalEngine, RegistryCredentials

    for kind in (GitCredentials, RegistryCredentials):
        await kind.register_type_and_schema()
    block = LocalEngine(
        registry=f"{published}/demo",
        plain_http_registries=[published, inner],
        mirrors={"docker.io": inner, published: inner},
        network=NETWORK,
        ca_bundle=ca_bundle(),
        state_folder=str(STATE / "builds"),
    )
    await block.save("default", overwrite=True)


def start_worker() -> None:
    """Start a worker for the pool, unless ours runs."""
    if not running("worker"):
        with step("Starting a worker"):
            start("worker", prefect("worker", "start", "--pool", POOL, "--type", "process", "--name", "podbuild-demo"))


async def build(repo: str, ref: str) -> tuple[str, str, dict[str, Any] | None]:
    """Run the deployment and show its log. Return the run's id, its last word, and the answer if there is one."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import LogSort
    from prefect.deployments import run_deployment
    from prefect.exceptions import ParameterTypeError, PrefectHTTPStatusError

    print(f"· Building {repo} at {ref}", flush=True)
    parameters = {"repo": repo, "ref": ref}
    try:
        started = await run_deployment(DEPLOYMENT, parameters=parameters, timeout=0, as_subflow=False)  # type: ignore[misc]
    except (ParameterTypeError, PrefectHTTPStatusError) as error:
        raise Problem(f"InvalidRequest: Prefect refuses these parameters: {str(error)[:500]}") from None
    seen, end = set(), time.monotonic() + _BUILD_SECONDS
    async with get_client() as client:
        while True:
            now = await client.read_flow_run(started.id)
            over = now.state is not None and now.state.is_final()
            mine, offset = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[started.id])), 0
            while page := await client.read_logs(mine, limit=200, offset=offset, sort=LogSort.TIMESTAMP_ASC):
                offset += len(page)
                for entry in page:
                    if entry.id not in seen:
                        seen.add(entry.id)
                        print("".join(f"    {line}\n" for line in entry.message.splitlines()), end="", flush=True)
            if over:
                break
            if time.monotonic() > end:
                raise Problem(f"The run did not end within {_BUILD_SECONDS} s.")
            await asyncio.sleep(1)
        if now.state is None or not now.state.is_completed():
            said = (now.state.message if now.state else "") or "The run failed without a message."
            return str(started.id), said.removeprefix(_PLAIN), None
        left = await client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[started.id]))
        )
    answer = next(json.loads(str(a.data))[0] for a in left if a.key == "image-result")
    return str(started.id), "", answer


# --- the example ------------------------------------------------------------------------------------------


def make_repository(folder: Path) -> Path:
    """Turn an example into a git repository. Its commit is the same every time, so a second build is found."""
    repository = STATE / folder.name
    shutil.rmtree(repository, ignore_errors=True)
    shutil.copytree(folder, repository)
    when = "2026-01-01T00:00:00Z"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CONFIG_SYSTEM": "/dev/null",
        **{f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
           for what, value in (("NAME", "podbuild"), ("EMAIL", "podbuild@localhost"), ("DATE", when))},
    }  # fmt: skip
    for command in (
        ["init", "--quiet", "--initial-branch=main"],
        ["add", "--all"],
        ["commit", "--quiet", "-m", "hello"],
    ):
        subprocess.run(["git", *command], cwd=repository, env=environment, check=True)
    return repository


def show(reference: str) -> None:
    """Run the image and show what it prints."""
    with step("Pulling the image by its digest and running it"):
        call_engine("pull", "--quiet", *insecure(), reference)
        said = call_engine("run", "--rm", *limits_here(), "--network=none", reference).stdout
    print("".join(f"    {line}\n" for line in said.splitlines()), end="")


# --- processes --------------------------------------------------------------------------------------------


def start(name: str, command: list[str]) -> None:
    """Start a program that goes on after this one, and remember it."""
    with (STATE / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=prefect_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (STATE / f"{name}.json").write_text(json.dumps({"pid": process.pid, "born": birth(process.pid)}))


def birth(pid: int) -> str:
    """Return when a process was started, in the kernel's ticks; "" if there is none. A number alone may be reused."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def running(name: str) -> int:
    """Return the process id of a program that we started and that still runs, or 0."""
    try:
        remembered = json.loads((STATE / f"{name}.json").read_text())
    except (OSError, ValueError):
        return 0
    return remembered["pid"] if remembered["born"] and birth(remembered["pid"]) == remembered["born"] else 0


def stop(name: str) -> bool:
    """End a program that we started, with its children. Return whether it ran."""
    pid = running(name)
    if not pid:
        return False
    for word, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        os.killpg(pid, word)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not running(name):
                return True
            time.sleep(0.1)
    return True


def down() -> None:
    """Stop and remove what `up` started, and nothing else. The images stay."""
    for name in ("worker", "server"):
        if stop(name):
            print(f"· Stopped the {name}")
    if STATE.is_dir():
        asyncio.run(remove_builds())
    for kind, command in (("registry", ["ps", "--all"]), ("network", ["network", "ls"])):
        ours = call_engine(*command, "--quiet", f"--filter=label={LABEL}={kind}", check=False).stdout.split()
        for each in ours:
            removal = ["rm", "--force", "--volumes"] if kind == "registry" else ["network", "rm"]
            if call_engine(*removal, each, check=False).returncode == 0:
                print(f"· Removed the {kind}")
    shutil.rmtree(STATE, ignore_errors=True)


async def remove_builds() -> None:
    """Delete the pods of the demo's builds: those whose files lie in its folder."""
    from podbuild import LocalHost, LocalSettings

    builds = STATE / "builds"
    async with LocalHost(LocalSettings(state_folder=str(builds))) as host:
        for manifest in builds.glob("pods/*/pod.json"):
            pod = await host.read(json.loads(manifest.read_text())["metadata"]["name"])
            if pod is not None:
                await host.delete(pod)


if __name__ == "__main__":
    main({"up": up, "down": down}.get(sys.argv[1] if len(sys.argv) > 1 else "up", up))
