"""The local engine on a real Docker engine. `make test-docker` brings one; without it these tests are skipped."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import pytest

from podbuild import (
    Build,
    BuildFailed,
    HostUnavailable,
    ImagePullFailed,
    Line,
    LocalHost,
    LocalSettings,
    OutOfMemory,
    Plan,
    RegistryCredentials,
    find_built,
    parse_image,
    parse_options,
    parse_repository,
    plan_build,
    submit,
)
from podbuild.hosts.local import DockerPieces, Engine, detect_engine, limits_here
from podbuild.registry import find_labelled
from tests.engine import BASE, FROM, REGISTRY, Repo, TestRegistry, call, free_port

#: Set where an engine is meant to be: then a test that has none fails.
REQUIRED = "PODBUILD_REQUIRE_DOCKER"
STAMP = b"2026-11-23T00:46:09.357567510Z "


# --- the log's format, without an engine ----------------------------------------------------------------------


def printed(line: bytes) -> bytes:
    """Return a line as `docker logs --timestamps` prints it."""
    return b"".join(STAMP + line[start : start + 16384] for start in range(0, len(line), 16384))


@pytest.mark.parametrize("step", [1, 1000, 65536])
@pytest.mark.parametrize("length", [0, 1, 16383, 16384, 32767, 32768, 40_000])
def test_a_line_has_one_time_however_the_stream_is_cut(length: int, step: int) -> None:
    """Docker's pieces of 16 KiB are one line again, and an unfinished line at the end stays one."""
    long, last = b"x " * (length // 2) + b"y" * (length % 2) + b"\n", b"z" * length
    stream = printed(b"before\n") + printed(long) + printed(b"after\n") + printed(last)
    pieces = DockerPieces()

    served = b"".join(pieces.feed(stream[start : start + step]) for start in range(0, len(stream), step))

    assert served == STAMP + b"before\n" + STAMP + long + STAMP + b"after\n" + (STAMP + last if last else b"")


def test_what_docker_prints_without_a_time_is_shown_as_it_is() -> None:
    """Docker's own complaints come on the same stream."""
    assert (
        DockerPieces().feed(b"oops\nError from daemon\n" + STAMP + b"\n")
        == b"oops\nError from daemon\n" + STAMP + b"\n"
    )


# --- finding the engine -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docker() -> Engine:
    """A Docker engine that holds our images."""

    def give_up(reason: str) -> NoReturn:
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(reason)
        pytest.skip(f"{reason} `make test-docker` brings one.")

    try:
        engine = asyncio.run(detect_engine("docker"))
    except HostUnavailable as error:
        give_up(str(error))
    for image in (BASE, REGISTRY, LocalSettings().builder_image):
        if not call(engine, "images", "--quiet", image):
            give_up(f"The Docker engine here has no image {image}.")
    return engine


@pytest.fixture
def docker_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH with a docker client on it, and nothing else."""
    client = shutil.which("docker")
    if client is None:
        pytest.skip("There is no docker client here.")
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "docker").symlink_to(client)
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))


@pytest.mark.engine
async def test_docker_is_found_where_there_is_no_podman(docker: Engine, docker_alone: None) -> None:
    """Docker cannot map the ids of one container, so steps get chroot isolation."""
    found = await detect_engine()

    assert (found.kind, found.maps_ids) == ("docker", False)
    assert found.isolation == ("rootless" if found.remapped else "chroot")


@pytest.mark.engine
async def test_a_client_without_an_engine_is_not_docker(
    docker_alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error says what is missing, and names the command that installs an engine."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")

    with pytest.raises(HostUnavailable) as caught:
        await detect_engine()

    assert "podman is not installed" in caught.value.problem
    assert "docker is installed, but its engine does not answer" in caught.value.problem
    assert "apt-get install podman" in caught.value.remedy


# --- builds -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docker_registry(docker: Engine) -> Iterator[TestRegistry]:
    """A registry on the Docker engine, which holds a base image."""
    unique = secrets.token_hex(4)
    network = f"podbuild-test-{unique}"
    call(docker, "network", "create", network)
    registry = TestRegistry(docker, f"podbuild-test-registry-{unique}", network, free_port())
    try:
        registry.start()
        registry.push(BASE, "library/debian:trixie-slim")
        yield registry
    finally:
        call(docker, "rm", "--force", "--volumes", registry.name, check=False)
        call(docker, "network", "rm", network, check=False)


@pytest.fixture
async def settings(docker_registry: TestRegistry, tmp_path: Path) -> AsyncIterator[LocalSettings]:
    """Settings for builds of one test. Afterwards its pods are deleted, and no file of theirs is left."""
    registry, state = docker_registry, tmp_path / "state"
    yield LocalSettings(
        engine="docker",
        registry=f"{registry.host}/t-{secrets.token_hex(4)}",
        plain_http_registries=(registry.host, registry.inner),
        mirrors=(("docker.io", registry.inner),),
        network=registry.network,
        state_folder=str(state),
    )
    async with LocalHost(LocalSettings(engine="docker", state_folder=str(state))) as host:
        for manifest in state.glob("pods/*/pod.json"):
            pod = await host.read(json.loads(manifest.read_text())["metadata"]["name"])
            assert pod is not None
            await host.delete(pod)
    left = list(state.glob("*/*"))
    assert not left, f"files of builds were left behind: {left}"


@pytest.fixture
async def host(settings: LocalSettings) -> AsyncIterator[LocalHost]:
    """The Docker engine as a host."""
    async with LocalHost(settings) as host:
        yield host


def plan_of(repo: Repo, settings: LocalSettings, **options: Any) -> Plan:
    """Return the plan for a repository's commit."""
    return plan_build(parse_repository(repo.url), repo.commit, None, parse_options(options), settings)


async def follow(build: Build) -> list[Line]:
    """Return the lines of a build's log, to its end."""
    return [event async for event in build.events() if isinstance(event, Line)]


async def await_line(build: Build, text: str) -> None:
    """Wait for a line of the log that holds this text."""
    async for event in build.events():
        if isinstance(event, Line) and text in event.text and "RUN" not in event.text:
            return
    pytest.fail(f"the log has no line {text!r}")


@pytest.mark.engine
async def test_built_pushed_run_found(
    host: LocalHost, settings: LocalSettings, docker_registry: TestRegistry, make_repo: Callable[..., Repo]
) -> None:
    """The image is in the registry, with labels that say where it comes from; it runs; the next request finds it."""
    repo = make_repo({"Dockerfile": f'FROM {FROM}\nRUN echo hello > /hello\nCMD ["cat", "/hello"]\n'})
    plan = plan_of(repo, settings)

    build = await submit(host, plan)
    result = await build.result()

    assert result.outcome == "built"
    found = await find_labelled(parse_image(result.image), settings)
    assert found is not None
    assert found[0].digest == result.digest
    assert found[1]["org.opencontainers.image.revision"] == repo.commit
    assert found[1]["io.podbuild.request"] == plan.request
    assert docker_registry.run(result.reference) == "hello"
    again = await find_built(plan, settings)
    assert again is not None
    assert (again.outcome, again.digest) == ("found", result.digest)
    pod = await host.read(plan.name)
    assert pod is not None
    messages = [json.loads(s["state"]["terminated"]["message"]) for s in pod["status"]["containerStatuses"]]
    assert [m["isolation"] for m in messages] == [host.isolation] * 2


@pytest.mark.engine
async def test_the_log_is_complete_and_has_times(
    host: LocalHost, settings: LocalSettings, make_repo: Callable[..., Repo]
) -> None:
    """Thousands of lines come once each and in order; one of 40,000 bytes stays one line with one time."""
    steps = "RUN for i in $(seq 3000); do echo line $i.; done\nRUN head -c 40000 /dev/zero | tr '\\0' x; echo\n"
    repo = make_repo({"Dockerfile": f"FROM {FROM}\n{steps}"})
    before = datetime.now(UTC)

    build = await submit(host, plan_of(repo, settings))
    lines = await follow(build)
    await build.result()

    texts = [line.text for line in lines]
    assert [t for t in texts if t.startswith("line ")] == [f"line {i}." for i in range(1, 3001)]
    assert [len(t) for t in texts if t.startswith("xx")] == [40_000]
    assert all(before <= line.time <= datetime.now(UTC) for line in lines)
    of_courier = [line for line in lines if line.container == "courier"]
    assert of_courier == sorted(of_courier, key=lambda line: line.time)
    assert of_courier[0].text.startswith("Fetching")
    assert of_courier[-1].text.startswith("Pushed")


@pytest.mark.engine
async def test_a_long_line_and_an_unfinished_one_as_docker_keeps_them(host: LocalHost, docker: Engine) -> None:
    """What a container wrote is what comes out, with one time for each line, also for the last without an end."""
    script = "head -c 40000 /dev/zero | tr '\\0' x; echo; echo; echo end; printf unfin; sleep 0.3; printf ished"
    options = [f"--name=podbuild-test-{secrets.token_hex(4)}", "--network=none", "--log-driver=json-file"]
    name = call(docker, "run", "--detach", *options, *limits_here(), BASE, "sh", "-c", script)
    try:
        # A stream that follows may break off at the container's end; one that was opened after it shows everything.
        call(docker, "wait", name)
        pod = {"status": {"containerStatuses": [{"name": "build", "containerID": name}]}}
        log = b"".join([chunk async for chunk in host.log(pod, "build")])
        seconds = log[:19].decode()
        resumed = b"".join([chunk async for chunk in host.log(pod, "build", since=f"{seconds}Z")])
    finally:
        call(docker, "rm", "--force", "--volumes", name)

    stamps, texts = zip(*(line.split(b" ", 1) for line in log.split(b"\n")), strict=True)
    assert list(texts) == [b"x" * 40_000, b"", b"end", b"unfinished"]
    assert all(datetime.fromisoformat(stamp.decode()).tzinfo for stamp in stamps)
    assert resumed == log


@pytest.mark.engine
async def test_a_second_caller_joins_and_sees_the_whole_log(
    host: LocalHost, settings: LocalSettings, make_repo: Callable[..., Repo]
) -> None:
    """Docker gives a name once: of five who ask at the same time, one builds; all get one digest and one log."""
    repo = make_repo({"Dockerfile": f"FROM {FROM}\nRUN for i in 1 2 3; do echo tick $i; sleep 0.5; done\n"})
    plan = plan_of(repo, settings)

    builds = await asyncio.gather(*(submit(host, plan) for _ in range(5)))
    logs = await asyncio.gather(*(follow(build) for build in builds))
    results = await asyncio.gather(*(build.result() for build in builds))

    assert sorted(build.outcome for build in builds) == ["built", *["joined"] * 4]
    assert len({build.uid for build in builds}) == 1
    assert len({result.digest for result in results}) == 1
    assert [sorted(log, key=str) for log in logs] == [sorted(logs[0], key=str)] * 5
    assert [line.text for line in logs[0] if line.text.startswith("tick")] == ["tick 1", "tick 2", "tick 3"]


@pytest.mark.engine
async def test_a_failing_steps_exit_code(
    host: LocalHost, settings: LocalSettings, make_repo: Callable[..., Repo]
) -> None:
    """The error carries the step's exit code and the last lines of its log."""
    repo = make_repo({"Dockerfile": f"FROM {FROM}\nRUN echo last words; exit 7\n"})

    build = await submit(host, plan_of(repo, settings))
    with pytest.raises(BuildFailed) as caught:
        await build.result()

    assert (caught.value.exit_code, caught.value.phase) == (7, "build")
    assert "last words" in caught.value.last_lines


@pytest.mark.engine
async def test_the_memory_limit(host: LocalHost, settings: LocalSettings, make_repo: Callable[..., Repo]) -> None:
    """A step that needs more memory than the limit is an error that names the option to raise."""
    repo = make_repo({"Dockerfile": f"FROM {FROM}\nRUN perl -e '$x .= \"x\" x 1000000 while 1'\n"})

    build = await submit(host, plan_of(repo, settings, memory_limit="160Mi"))
    with pytest.raises(OutOfMemory, match="memory_limit"):
        await build.result()


@pytest.mark.engine
async def test_a_builder_image_that_is_missing(settings: LocalSettings, make_repo: Callable[..., Repo]) -> None:
    """Docker's words for a missing image are understood."""
    settings = replace(settings, builder_image="localhost/podbuild-nobody:1")
    repo = make_repo({"Dockerfile": f"FROM {FROM}\n"})

    async with LocalHost(settings) as host:
        with pytest.raises(ImagePullFailed, match="podbuild-nobody"):
            await submit(host, plan_of(repo, settings))


@pytest.mark.engine
async def test_a_running_pod_is_deleted_with_all_it_has(
    host: LocalHost, settings: LocalSettings, docker: Engine, make_repo: Callable[..., Repo]
) -> None:
    """Containers, volumes and secrets go, also where two delete it at once; deleting it again is fine."""
    repo = make_repo({"Dockerfile": f"FROM {FROM}\nRUN echo ready; sleep 600\n"})
    plan = plan_of(repo, settings)
    build = await submit(host, plan)
    await await_line(build, "ready")
    pod = await host.read(plan.name)
    assert pod is not None

    await asyncio.gather(host.delete(pod), host.delete(pod))
    await host.delete(pod)

    assert await host.read(plan.name) is None
    assert call(docker, "ps", "--all", "--quiet", f"--filter=label=podbuild.io/pod={plan.name}") == ""
    assert not list(Path(settings.state_folder).glob("*/*"))


# --- what a step cannot reach ---------------------------------------------------------------------------------

#: Leaves a chroot the classic way, enters the root of every process in sight, and looks for the word on its input.
ESCAPE = """\
use strict;
chomp(my $secret = <STDIN>);
sub look {
    my $grep = "grep -rlaF --devices=skip --exclude-dir=sys --exclude-dir=proc";
    system("$grep -e '$secret' $_[0] 2>/dev/null | sed 's/^/FOUND /'");
}
look("/");
mkdir "/inner";
if (chroot "/inner") {
    chdir ".." for 1 .. 100;
    chroot "." or die;
    look("/");
}
for my $process (glob("/proc/[0-9]*")) {
    for my $file ("$process/environ", "$process/cmdline") {
        open(my $in, "<", $file) or next;
        local $/;
        print "FOUND $file\\n" if index(<$in> // "", $secret) >= 0;
    }
    look("$process/root/") if stat("$process/root/") && (stat(_))[1] != (stat("/"))[1];
}
print "looked everywhere\\n";
"""


@pytest.mark.engine
async def test_a_hostile_step_finds_no_credential(
    settings: LocalSettings, docker: Engine, make_repo: Callable[..., Repo]
) -> None:
    """Whatever a step with chroot isolation gets at, no credential is there, while courier holds it."""
    halves = (secrets.token_hex(8), secrets.token_hex(8))
    login = RegistryCredentials(host=settings.registry.partition("/")[0], username="pusher", password="".join(halves))
    settings = replace(settings, registry_credentials=(login,))
    # The step puts the password together itself: so it knows what to look for, and one place where it must find it.
    steps = f"RUN printf %s%s {' '.join(halves)} > /planted\nRUN perl /escape.pl < /planted; sleep 1\n"
    repo = make_repo({"escape.pl": ESCAPE, "Dockerfile": f"FROM {FROM}\nCOPY escape.pl /\n{steps}"})
    plan = plan_of(repo, settings)

    async with LocalHost(settings) as host:
        build = await submit(host, plan)
        await await_line(build, "looked everywhere")
        held = call(docker, "exec", plan.name, "cat", "/podbuild/secret/registry.json")
        log = [line.text for line in await follow(build)]
        await build.result()

    assert login.password in held
    assert {text for text in log if "FOUND" in text} == {"FOUND /planted"}


@pytest.mark.engine
async def test_the_privileges_of_both_containers(
    host: LocalHost, settings: LocalSettings, docker: Engine, make_repo: Callable[..., Repo]
) -> None:
    """courier has no capability and a read-only root; build has three capabilities; both have our seccomp profile."""
    repo = make_repo({"Dockerfile": f"FROM {FROM}\nRUN echo ready; sleep 600\n"})
    plan = plan_of(repo, settings)
    build = await submit(host, plan)
    await await_line(build, "ready")
    names = (plan.name, f"{plan.name}.build")

    status = {name: call(docker, "exec", name, "cat", "/proc/1/status") for name in names}
    inspected = {name: json.loads(call(docker, "inspect", name))[0]["HostConfig"] for name in names}
    written = call(docker, "exec", plan.name, "sh", "-c", "touch /x /opt/podbuild/x 2>&1 || true")

    def field(name: str, key: str) -> str:
        return status[name].split(f"{key}:")[1].split()[0]

    assert [int(field(plan.name, key), 16) for key in ("CapEff", "CapPrm", "CapBnd")] == [0, 0, 0]
    assert int(field(names[1], "CapBnd"), 16) == 1 << 6 | 1 << 7 | 1 << 31  # setgid, setuid, setfcap
    assert field(plan.name, "NoNewPrivs") == "1"
    for name in names:
        assert field(name, "Seccomp") == "2"  # a filter
        assert any("SCMP_ACT_ERRNO" in option for option in inspected[name]["SecurityOpt"] if "seccomp" in option)
        assert not inspected[name]["Privileged"]
    assert inspected[plan.name]["ReadonlyRootfs"]
    assert written.count("Read-only file system") == 2
