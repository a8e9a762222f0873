"""A build seen from the machine and from inside: what its processes may do, and where the passwords are."""

import base64
import contextlib
import ipaddress
import json
import os
import re
import secrets
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from podbuild import (
    Build,
    GitCredentials,
    Line,
    LocalHost,
    LocalSettings,
    RegistryCredentials,
    parse_options,
    parse_repository,
    plan_build,
    submit,
)
from podbuild.hosts.local import FIRST_ID, Engine
from podbuild.manifest import Isolation, pod_manifest, secret_files
from podbuild.settings import HostSettings
from tests.engine import FROM, Repo, TestRegistry, call
from tests.fakes.git_server import GitServer

pytestmark = pytest.mark.engine

ISOLATIONS: tuple[Isolation, ...] = ("rootless", "chroot")
#: Files of /proc through which root of the machine gets at the machine. They are opened, and never written.
DANGEROUS = "/proc/sys/kernel/core_pattern /proc/sys/kernel/modprobe /proc/sysrq-trigger /proc/sys/vm/drop_caches"
PROBE = f'for f in {DANGEROUS}; do (: >> $f) 2>/dev/null && echo "OPENED $f"; done; cat /proc/self/uid_map'
SLEEP = f"FROM {FROM}\nRUN {PROBE}; echo step''-runs; sleep 600\n"
#: Setgid, setuid, setfcap.
THREE_CAPABILITIES = 1 << 6 | 1 << 7 | 1 << 31
#: What the passwords look like, as they are and in the base64 of a login. Neither pattern matches itself.
PATTERN = "canary-[0-9a-f]{16}|cm9ib3Q6Y2FuYX[J]5"
#: Prints the name of every file in reach that holds such a password.
SEARCH = f"""
grep -rlaE --devices=skip --exclude-dir=sys --exclude-dir=proc '{PATTERN}' / 2>/dev/null
grep -laE '{PATTERN}' /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null
echo searched
"""


def inside(engine: Engine, container: str, script: str) -> list[str]:
    """Run a script as container root in one of a build's containers, and return the lines that it prints."""
    command = [engine.program, "exec", "--interactive", container, "sh", "-s"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout.splitlines()


def processes(engine: Engine, container: str) -> list[Path]:
    """Return the folders in the machine's /proc of all processes of a container; its first one is first.

    Processes that lose their parent become children of the first, so none hides from this.
    """
    first = int(call(engine, "container", "inspect", "--format={{.State.Pid}}", container))
    parents: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    found = [first]
    for known in found:
        found += [process for process, parent in parents.items() if parent == known]
    return [Path(f"/proc/{process}") for process in found]


def gateway(process: Path) -> str:
    """Return the address of the machine on the network that a process is on."""
    for line in (process / "net" / "route").read_text().splitlines()[1:]:
        _, destination, via, *_ = line.split()
        if destination == "00000000":
            return str(ipaddress.ip_address(bytes.fromhex(via)[::-1]))
    raise AssertionError("this process has no way out")


def field(process: Path, key: str) -> str:
    """Return one value of a process's status."""
    return (process / "status").read_text().split(f"{key}:")[1].split()[0]


def namespace(process: Path, kind: str) -> str:
    """Return the identity of a namespace that a process is in."""
    return os.readlink(process / "ns" / kind)  # noqa: PTH115 - it is a text and no path


def logs(engine: Engine, container: str) -> str:
    """Return what the engine shows of a container's log, of both streams."""
    command = [engine.program, "logs", container]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


def known(settings: HostSettings) -> re.Pattern[str]:
    """Return what finds the passwords of these settings: as they are, and in the base64 of a login."""
    logins = [base64.b64encode(f"robot:{password}".encode()).decode() for password in settings.secrets()]
    return re.compile("|".join([*settings.secrets(), *logins]))


@pytest.fixture
def git_server(make_repo: Callable[..., Repo], tmp_path: Path) -> Iterator[tuple[GitServer, Repo]]:
    """A git server that wants a password, and a repository on it whose step sleeps."""
    repo = make_repo({"Dockerfile": SLEEP, "copy/Dockerfile": f"FROM {FROM}\nCOPY . /all\n"}, name="app")
    with GitServer(tmp_path / "repositories", username="robot", password=f"canary-{secrets.token_hex(8)}") as server:
        yield server, repo


@pytest.fixture
def private(local_settings: LocalSettings, git_server: tuple[GitServer, Repo]) -> LocalSettings:
    """Settings that hold the git server's password, and one for the test registry."""
    server, _ = git_server
    git_password = base64.b64decode(server.login.removeprefix("Basic ")).decode().partition(":")[2]
    login = RegistryCredentials(
        host=local_settings.registry.partition("/")[0], username="robot", password=f"canary-{secrets.token_hex(8)}"
    )
    return replace(
        local_settings,
        git_credentials=(GitCredentials(host=server.host, username="robot", password=git_password),),
        registry_credentials=(login,),
    )


@pytest.fixture(params=ISOLATIONS)
async def running(
    request: pytest.FixtureRequest, private: LocalSettings, git_server: tuple[GitServer, Repo]
) -> AsyncIterator[tuple[Build, list[str], Isolation]]:
    """A build whose step sleeps: its handle, its log so far, and its isolation."""
    isolation: Isolation = request.param
    server, repo = git_server
    plan = plan_build(parse_repository(f"{server.url}/app"), repo.commit, None, parse_options({}), private)
    manifest = pod_manifest(plan, private, isolation=isolation, secret_name="s")
    async with LocalHost(private) as host:
        pod = await host.create(manifest, secret_files(private, plan))
        build = Build(host, plan, pod, "built")
        log: list[str] = []
        try:
            async for event in build.events():
                if isinstance(event, Line):
                    log.append(event.text)
                if log[-1:] == ["step-runs"]:
                    break
            assert log[-1] == "step-runs", log
            yield build, log, isolation
        finally:
            await host.delete(pod)


async def test_no_process_of_a_build_is_root_of_the_machine(
    running: tuple[Build, list[str], Isolation], engine: Engine
) -> None:
    """Every process, the repository's steps too, has ids of our range, a seccomp filter and namespaces of its own.

    /proc is unmasked in `build` with rootless isolation alone, where the second field of uid_map is not 0, and what
    would lead out of the container there cannot be opened, neither by container root nor by a step (S31).
    """
    build, log, isolation = running
    names = (build.name, f"{build.name}.build")
    courier, builder = (processes(engine, name) for name in names)

    assert len(courier) >= 1
    assert any((p / "cmdline").read_bytes() == b"sleep\x00600\x00" for p in builder), "the step is among them"
    for process in [*courier, *builder]:
        for ids in ("uid_map", "gid_map"):
            for line in (process / ids).read_text().splitlines():
                _, outside, count = map(int, line.split())
                assert outside >= FIRST_ID > 65535, f"{process} {ids} {line}"
                assert outside + count <= FIRST_ID + 65536, f"{process} {ids} {line}"
        assert field(process, "Seccomp") == "2"
        for kind in ("user", "mnt", "pid", "ipc", "uts"):
            assert namespace(process, kind) != namespace(Path("/proc/self"), kind), kind
    assert {namespace(p, "net") for p in courier} == {namespace(Path("/proc/self"), "net")}
    assert namespace(Path("/proc/self"), "net") not in {namespace(p, "net") for p in builder}
    assert {int(field(p, key), 16) for p in courier for key in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {0}
    assert {field(p, "NoNewPrivs") for p in courier} == {"1"}
    assert int(field(builder[0], "CapBnd"), 16) == THREE_CAPABILITIES

    said = {name: inside(engine, name, f"{PROBE}; grep -c ' /proc/' /proc/self/mountinfo") for name in names}
    for name, unmasked in zip(names, (False, isolation == "rootless"), strict=True):
        *opened, ids, masks = said[name]
        assert opened == [], name
        assert ids.split() == ["0", str(FIRST_ID), "65536"], name
        assert (masks == "0") == unmasked, name
    assert not [line for line in log if line.startswith("OPENED")]


async def test_while_a_build_runs_the_passwords_are_in_couriers_files_alone(
    running: tuple[Build, list[str], Isolation], engine: Engine, git_server: tuple[GitServer, Repo]
) -> None:
    """Not in arguments, environments, the engine's account of the containers, or its logs (S20, S24).

    A search by container root finds them in `courier`, so it would find them in `build`, where it finds nothing,
    whatever isolation the steps have. In the same way `courier` reaches the machine's loopback, and `build` does not.
    """
    build, _, _ = running
    names = (build.name, f"{build.name}.build")
    passwords = known(build.host.settings)

    for process in [p for name in names for p in processes(engine, name)]:
        for file in ("cmdline", "environ"):
            assert not passwords.search((process / file).read_text(errors="replace")), process
    for name in names:
        account = call(engine, "container", "inspect", name)
        assert json.loads(account)[0]["State"]["Status"] == "running"
        assert not passwords.search(account), name
        log = logs(engine, name)
        assert log, name
        assert not passwords.search(log), name
    files = ["/podbuild/secret/git.json", "/podbuild/secret/registry.json"]
    assert sorted(inside(engine, names[0], SEARCH)) == [*files, "searched"]
    assert inside(engine, names[1], SEARCH) == ["searched"]

    server, _ = git_server
    connect = f"timeout 3 bash -c 'exec 3<>/dev/tcp/'$address'/{server.port}' 2>/dev/null && echo $address"
    reach = f"for address in 127.0.0.1 {gateway(processes(engine, names[1])[0])}; do {connect}; done"
    assert inside(engine, names[0], reach) == ["127.0.0.1"]
    assert inside(engine, names[1], reach) == []


async def test_an_image_of_a_private_repository_holds_no_password(
    private: LocalSettings, git_server: tuple[GitServer, Repo], engine: Engine, registry: TestRegistry, tmp_path: Path
) -> None:
    """No layer, no label and no history has one, although the image holds all that was fetched, `.git` too (S27)."""
    server, repo = git_server
    folder = {"subdirectory": "", "dockerfile": "copy/Dockerfile"}
    plan = plan_build(parse_repository(f"{server.url}/app"), repo.commit, None, parse_options(folder), private)

    async with LocalHost(private) as host:
        result = await (await submit(host, plan)).result()
    call(engine, "pull", "--quiet", *registry.insecure(), result.reference)
    try:
        call(engine, "save", "--quiet", f"--output={tmp_path / 'image.tar'}", result.reference)
    finally:
        call(engine, "rmi", "--force", result.reference)

    image = (tmp_path / "image.tar").read_bytes().decode("latin-1")
    assert f"{server.url}/app" in image
    assert "all/.git/HEAD" in image
    assert not known(private).search(image)
