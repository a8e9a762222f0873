"""The local engine as a host: the lock, the gate, logs, deletion, and what it hands to the engine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podbuild import (
    HostUnavailable,
    ImagePullFailed,
    LocalHost,
    LocalSettings,
    PodRejected,
    parse_options,
    parse_repository,
    plan_build,
    submit,
)
from podbuild.build import GATE_SECONDS
from podbuild.diagnosis import is_finished, is_gated
from podbuild.hosts import NameExists, Pod
from podbuild.hosts.local import FIRST_ID, Engine, LogRecords, create_arguments, detect_engine
from podbuild.logs import LineSplitter, RawLine, parse_line
from podbuild.manifest import LABEL_BUILD, MANAGED_BY, Isolation, Manifest, pod_manifest
from podbuild.plan import Plan
from tests.engine import FROM, Repo, call

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parent.parent
COMMIT = "c" * 40
SECRET = {"registry.json": b'[{"password": "canary"}]'}
#: Ends at once on the signal, like our programs, and does not before.
WAIT = "trap 'exit 143' TERM; while :; do sleep 0.05; done"


def plan_of(settings: LocalSettings, repo: str = "https://git.invalid/acme/app", commit: str = COMMIT) -> Plan:
    """Return a plan; its name is as unique as the test's registry prefix."""
    return plan_build(parse_repository(repo), commit, None, parse_options({}), settings)


def pod_of(
    settings: LocalSettings, courier: str = "true", build: str = "true", *, commit: str = COMMIT, **changes: Any
) -> Manifest:
    """Return a build's pod whose containers run these shell lines in place of our programs."""
    manifest = pod_manifest(plan_of(settings, commit=commit), settings, isolation="rootless", secret_name="s")
    for container, script in zip(manifest["spec"]["containers"], (courier, build), strict=True):
        container["command"] = ["sh", "-c", script]
    manifest["spec"].update(changes)
    return manifest


@pytest.fixture
async def host(local_settings: LocalSettings) -> AsyncIterator[LocalHost]:
    """The engine of this machine as a host."""
    async with LocalHost(local_settings) as host:
        yield host


async def until(reached: Callable[[], bool]) -> None:
    """Wait for something that another task or a program does."""
    async with asyncio.timeout(60):
        while True:
            if reached():
                return
            await asyncio.sleep(0.005)


async def finished(host: LocalHost, name: str) -> Pod:
    """Return the pod once both of its containers have ended."""
    async with asyncio.timeout(60):
        while True:
            pod = await host.read(name)
            assert pod is not None
            if is_finished(pod):
                return pod
            await asyncio.sleep(0.1)


def containers(engine: Engine, name: str) -> list[str]:
    """Return the names of all containers of a pod, as the engine lists them."""
    listed = call(engine, "ps", "--all", "--format={{.Names}}", f"--filter=label=podbuild.io/pod={name}")
    return sorted(listed.split())


def files(settings: LocalSettings) -> list[str]:
    """Return the folders that pods have on this machine now."""
    state = Path(settings.state_folder)
    return sorted(str(path.relative_to(state)) for path in state.glob("*/*"))


def states(pod: Pod) -> list[str]:
    """Return the one word of each container's state, courier first."""
    return [next(iter(status["state"])) for status in pod["status"]["containerStatuses"]]


def stand_in(folder: Path, engine: Engine, script: str, name: str = "podman") -> str:
    """Write a program that stands before the engine's own, and return its path. ``$ENGINE`` is the real one."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    program.write_text(f'#!/bin/sh\nENGINE={engine.program}\n{script}\nexec "$ENGINE" "$@"\n')
    program.chmod(0o755)
    return str(program)


# --- a pod's life -------------------------------------------------------------------------------------------


async def test_a_pod_is_created_read_and_finishes(host: LocalHost, local_settings: LocalSettings) -> None:
    """Its status is spelled as Kubernetes spells it, from its start to its end."""
    manifest = pod_of(local_settings, "printf '{\"x\": 1}' > /dev/termination-log; sleep 1; exit 3", "exit 0")
    name = manifest["metadata"]["name"]

    assert await host.read(name) is None
    before = await host.now()
    created = await host.create(manifest, SECRET)
    ended = await finished(host, name)

    assert created["metadata"]["name"] == name
    assert created["metadata"]["uid"] == ended["metadata"]["uid"]
    assert created["metadata"]["annotations"] == manifest["metadata"]["annotations"]
    assert manifest["metadata"]["labels"].items() <= created["metadata"]["labels"].items()
    assert not is_gated(created)
    assert not is_finished(created)
    assert "running" in created["status"]["containerStatuses"][0]["state"]
    assert created["status"]["phase"] == "Running"
    assert ended["status"]["phase"] == "Failed"
    courier, build = (status["state"]["terminated"] for status in ended["status"]["containerStatuses"])
    assert (courier["exitCode"], courier["reason"], courier["message"]) == (3, "Error", '{"x": 1}')
    assert (build["exitCode"], build["reason"], build["message"]) == (0, "Completed", "")
    moments = [created["metadata"]["creationTimestamp"], courier["startedAt"], courier["finishedAt"]]
    assert sorted(moments) == moments
    assert datetime.fromisoformat(moments[0]) >= before
    assert datetime.fromisoformat(moments[2]) <= datetime.now(UTC)


async def test_both_ends_well_is_success(host: LocalHost, local_settings: LocalSettings) -> None:
    """The phase of a pod whose containers both ended with 0 is Succeeded."""
    manifest = pod_of(local_settings)

    await host.create(manifest, {})
    ended = await finished(host, manifest["metadata"]["name"])

    assert ended["status"]["phase"] == "Succeeded"
    assert states(ended) == ["terminated", "terminated"]


async def test_the_name_is_the_lock(host: LocalHost, local_settings: LocalSettings, engine: Engine) -> None:
    """A second create is refused while the first pod is there, running or finished, and leaves nothing."""
    manifest = pod_of(local_settings, "sleep 1", "true")
    name = manifest["metadata"]["name"]
    first = await host.create(manifest, SECRET)
    there = files(local_settings)

    with pytest.raises(NameExists):
        await host.create(manifest, SECRET)
    await finished(host, name)
    with pytest.raises(NameExists):
        await host.create(manifest, SECRET)

    pod = await host.read(name)
    assert pod is not None
    assert pod["metadata"]["uid"] == first["metadata"]["uid"]
    assert containers(engine, name) == [name, f"{name}.build"]
    assert files(local_settings) == there


async def test_of_ten_creators_one_wins_and_nine_leave_nothing(
    host: LocalHost, local_settings: LocalSettings, engine: Engine
) -> None:
    """Nine get `NameExists`; the engine has two containers, and the machine one folder and one secret."""
    manifest = pod_of(local_settings, WAIT, WAIT)
    name = manifest["metadata"]["name"]

    answers = await asyncio.gather(*(host.create(manifest, SECRET) for _ in range(10)), return_exceptions=True)

    won = [a for a in answers if isinstance(a, dict)]
    assert len(won) == 1
    assert sorted(type(a).__name__ for a in answers) == ["NameExists"] * 9 + ["dict"]
    pod = await host.read(name)
    assert pod is not None
    assert pod["metadata"]["uid"] == won[0]["metadata"]["uid"]
    assert states(pod) == ["running", "running"]
    nonce = pod["metadata"]["labels"]["podbuild.io/nonce"]
    assert containers(engine, name) == [name, f"{name}.build"]
    assert files(local_settings) == [f"pods/{nonce}", f"secrets/{nonce}"]


async def test_pods_are_found_by_their_labels(host: LocalHost, local_settings: LocalSettings) -> None:
    """All labels must fit; each pod comes once, in Kubernetes' spelling."""
    one = pod_of(local_settings)
    two = pod_of(local_settings, commit="d" * 40)
    for manifest in (one, two):
        await host.create(manifest, {})
    label = one["metadata"]["labels"][LABEL_BUILD]

    mine = await host.find({**MANAGED_BY, LABEL_BUILD: label})
    all_of_ours = await host.find({})
    none = await host.find({LABEL_BUILD: label, "podbuild.io/other": "x"})

    assert [pod["metadata"]["name"] for pod in mine] == [one["metadata"]["name"]]
    names = [pod["metadata"]["name"] for pod in all_of_ours]
    assert {one["metadata"]["name"], two["metadata"]["name"]} <= set(names)
    assert len(names) == len(set(names))
    assert none == []


# --- the gate -----------------------------------------------------------------------------------------------


async def abandon(settings: LocalSettings, engine: Engine, folder: Path, repo: Repo) -> None:
    """Let a caller die between creating its containers and starting them."""
    program = stand_in(folder, engine, 'if [ "$1" = start ]; then kill -9 $PPID; exit 1; fi')
    order = {
        "settings": dataclasses.asdict(replace(settings, engine=program)),
        "repo": repo.url,
        "commit": repo.commit,
        "image": None,
        "options": {},
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.call_build",
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        await process.communicate(json.dumps(order).encode())
    assert process.returncode == -9


async def test_a_pod_whose_creator_died_is_gated_and_then_replaced(
    host: LocalHost,
    local_settings: LocalSettings,
    engine: Engine,
    make_repo: Callable[..., Repo],
    tmp_path: Path,
) -> None:
    """Created but not started is gated (S21). The next caller waits its time out, then makes a pod of its own."""
    repo = make_repo({"Dockerfile": f"FROM {FROM}\n"})
    plan = plan_of(local_settings, repo.url, repo.commit)
    await abandon(local_settings, engine, tmp_path / "programs", repo)
    gated = await host.read(plan.name)
    assert gated is not None
    assert is_gated(gated)
    assert not is_finished(gated)
    assert gated["status"]["phase"] == "Pending"
    assert states(gated) == ["waiting", "waiting"]
    assert len(files(local_settings)) == 2

    build = await submit(host, plan)
    taken = datetime.now(UTC) - datetime.fromisoformat(gated["metadata"]["creationTimestamp"])

    assert build.outcome == "built"
    assert build.uid != gated["metadata"]["uid"]
    assert taken.total_seconds() > GATE_SECONDS
    pod = await host.read(plan.name)
    assert pod is not None
    assert not is_gated(pod)
    assert containers(engine, plan.name) == [plan.name, f"{plan.name}.build"]
    assert len(files(local_settings)) == 2


async def test_a_creator_whose_gated_pod_was_taken_away_starts_over(
    local_settings: LocalSettings, engine: Engine, tmp_path: Path
) -> None:
    """A pod that was deleted before its start is told as `NameExists`, and nothing of it is left."""
    took, go = tmp_path / "took", tmp_path / "go"
    script = f'if [ "$1" = start ]; then touch {took}; while [ ! -e {go} ]; do sleep 0.05; done; fi'
    slow = replace(local_settings, engine=stand_in(tmp_path / "programs", engine, script))
    manifest = pod_of(local_settings)
    name = manifest["metadata"]["name"]

    async with LocalHost(slow) as creator, LocalHost(local_settings) as other:
        creating = asyncio.create_task(creator.create(manifest, SECRET))
        await until(took.exists)
        gated = await other.read(name)
        assert gated is not None
        assert is_gated(gated)
        await other.delete(gated)
        go.touch()
        with pytest.raises(NameExists):
            await creating

    assert containers(engine, name) == []
    assert files(local_settings) == []


# --- deleting -----------------------------------------------------------------------------------------------


async def test_a_running_pod_is_deleted_gracefully_and_soon(
    host: LocalHost, local_settings: LocalSettings, engine: Engine, tmp_path: Path
) -> None:
    """Its programs get the signal; both containers, the folder and the secrets are gone. Again is fine."""
    repository = tmp_path / "repository"
    repository.mkdir(mode=0o777)
    repository.chmod(0o777)
    manifest = pod_of(local_settings, WAIT, WAIT)
    manifest["metadata"]["name"] = name = f"{manifest['metadata']['name'][:40]}-{secrets.token_hex(4)}"
    build = manifest["spec"]["containers"][1]
    build["command"][2] = WAIT.replace("exit", "echo stopped > /seen/it; exit")
    build["volumeMounts"].append({"name": "seen", "mountPath": "/seen"})
    manifest["spec"]["volumes"].append({"name": "seen", "hostPath": {"path": str(repository), "type": "Directory"}})
    pod = await host.create(manifest, SECRET)
    assert states(pod) == ["running", "running"]

    started = time.monotonic()
    await host.delete(pod)
    seconds = time.monotonic() - started
    await host.delete(pod)

    assert seconds < 30
    assert (repository / "it").read_text() == "stopped\n"
    assert await host.read(name) is None
    assert containers(engine, name) == []
    assert files(local_settings) == []


async def test_a_pod_that_ignores_the_signal_is_killed_after_its_grace(
    host: LocalHost, local_settings: LocalSettings, engine: Engine
) -> None:
    """A program that does not end by itself does not keep the name."""
    deaf = "trap '' TERM; while :; do sleep 0.05; done"
    manifest = pod_of(local_settings, deaf, deaf, terminationGracePeriodSeconds=1)
    name = manifest["metadata"]["name"]
    pod = await host.create(manifest, {})

    started = time.monotonic()
    await host.delete(pod)

    assert time.monotonic() - started < 30
    assert containers(engine, name) == []


async def test_another_pod_of_the_same_name_is_not_deleted(host: LocalHost, local_settings: LocalSettings) -> None:
    """A handle deletes the pod that it was made for, by its ids, and never the next one of that name."""
    manifest = pod_of(local_settings, WAIT, WAIT)
    name = manifest["metadata"]["name"]
    old = await host.create(pod_of(local_settings), SECRET)
    await finished(host, name)
    await host.delete(old)
    new = await host.create(manifest, SECRET)

    await host.delete(old)

    pod = await host.read(name)
    assert pod is not None
    assert pod["metadata"]["uid"] == new["metadata"]["uid"] != old["metadata"]["uid"]
    assert states(pod) == ["running", "running"]
    nonce = new["metadata"]["labels"]["podbuild.io/nonce"]
    assert files(local_settings) == [f"pods/{nonce}", f"secrets/{nonce}"]


async def test_four_who_delete_at_once_are_all_content(
    host: LocalHost, local_settings: LocalSettings, engine: Engine
) -> None:
    """Whoever comes second finds it gone, or going."""
    manifest = pod_of(local_settings, WAIT, WAIT)
    pod = await host.create(manifest, SECRET)

    await asyncio.gather(*(host.delete(pod) for _ in range(4)))

    assert containers(engine, manifest["metadata"]["name"]) == []
    assert files(local_settings) == []


async def test_release_takes_secrets_and_volumes_and_leaves_log_and_state(
    host: LocalHost, local_settings: LocalSettings
) -> None:
    """What a finished pod came to can be read, joined and shown; what it worked with is gone."""
    script = "mkdir -p /work/deep/er; echo x > /work/deep/er/file; chmod 0 /work/deep; echo said; echo end > "
    manifest = pod_of(local_settings, "true", f"{script} /dev/termination-log")
    name = manifest["metadata"]["name"]
    await host.create(manifest, SECRET)
    before = await finished(host, name)

    await host.release(before)
    await host.release(before)

    after = await host.read(name)
    assert after == before
    assert [line.text for line in await lines_of(host, before, "build")] == [b"said"]
    nonce = before["metadata"]["labels"]["podbuild.io/nonce"]
    assert files(local_settings) == [f"pods/{nonce}"]
    folder = Path(local_settings.state_folder) / "pods" / nonce
    assert sorted(path.name for path in folder.iterdir()) == ["ends", "pod.json"]


# --- creating, broken off -----------------------------------------------------------------------------------


async def test_cancelled_creates_leave_nothing(host: LocalHost, local_settings: LocalSettings, engine: Engine) -> None:
    """However far each had come: no container, no folder, no secret, and the name is free at once."""
    manifests = [pod_of(local_settings, WAIT, WAIT, commit=f"{n:040x}") for n in range(8)]

    async def create_for(seconds: float, manifest: Manifest) -> None:
        try:
            async with asyncio.timeout(seconds):
                pod = await host.create(manifest, SECRET)
        except TimeoutError:
            return
        await host.delete(pod)

    delays = (0.001, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0)
    await asyncio.gather(*(create_for(s, m) for s, m in zip(delays, manifests, strict=True)))

    assert [containers(engine, m["metadata"]["name"]) for m in manifests] == [[]] * 8
    assert files(local_settings) == []
    again = await asyncio.gather(*(host.create(m, {}) for m in manifests[:4]))
    await asyncio.gather(*(host.delete(pod) for pod in again))


async def test_a_create_that_is_cancelled_while_it_writes_the_secrets_leaves_none(
    host: LocalHost, local_settings: LocalSettings
) -> None:
    """The files are all there or none is, at any moment at which anything else can happen."""
    many = {f"{n}.json": b"canary" for n in range(3000)}

    creating = asyncio.create_task(host.create(pod_of(local_settings), many))
    await until(lambda: any(Path(local_settings.state_folder).glob("secrets/*/*")))
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating

    await asyncio.sleep(0.5)
    assert files(local_settings) == []


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_create_that_is_cancelled_inside_an_engines_command_leaves_nothing(
    local_settings: LocalSettings, engine: Engine, tmp_path: Path, when: str
) -> None:
    """Also where the engine has already done what it was told, and only its answer is missing."""

    async def cancel_inside(command: str, which: int) -> None:
        folder = tmp_path / f"{command}-{which}"
        pause = f"touch {folder}/reached; sleep 2"
        act = pause if when == "before" else f'"$ENGINE" "$@" > {folder}/out; {pause}; cat {folder}/out; exit 0'
        count = f'echo x >> {folder}/count; [ "$(wc -l < {folder}/count)" = {which} ]'
        program = stand_in(folder, engine, f'if [ "$1" = {command} ] && {{ {count}; }}; then {act}; fi')
        manifest = pod_of(local_settings, WAIT, WAIT, commit=f"{which}{command.encode().hex():0>39}")
        async with LocalHost(replace(local_settings, engine=program)) as host:
            creating = asyncio.create_task(host.create(manifest, SECRET))
            await until((folder / "reached").exists)
            creating.cancel()
            with pytest.raises(asyncio.CancelledError):
                await creating
        assert containers(engine, manifest["metadata"]["name"]) == []
        async with LocalHost(local_settings) as host:
            await host.delete(await host.create(manifest, SECRET))

    await asyncio.gather(cancel_inside("create", 1), cancel_inside("create", 2), cancel_inside("start", 1))

    assert files(local_settings) == []


async def test_a_missing_builder_image_names_the_command_that_makes_it(
    host: LocalHost, local_settings: LocalSettings, engine: Engine
) -> None:
    """Nothing is pulled from elsewhere for it, and nothing is left."""
    manifest = pod_of(replace(local_settings, builder_image="localhost/podbuild-missing:1"))

    with pytest.raises(ImagePullFailed) as raised:
        await host.create(manifest, SECRET)

    assert "localhost/podbuild-missing:1" in raised.value.problem
    assert "make builder-image" in raised.value.remedy
    assert containers(engine, manifest["metadata"]["name"]) == []
    assert files(local_settings) == []


async def test_a_missing_repository_folder_is_rejected(
    host: LocalHost, local_settings: LocalSettings, engine: Engine, tmp_path: Path
) -> None:
    """The error names the folder. Nothing is left, and the folder is not made."""
    missing = tmp_path / "no-such-folder"
    plan = plan_of(local_settings, f"file://{missing}")
    manifest = pod_manifest(plan, local_settings, isolation="rootless", secret_name="s")

    with pytest.raises(PodRejected, match="no-such-folder"):
        await host.create(manifest, SECRET)

    assert containers(engine, plan.name) == []
    assert files(local_settings) == []
    assert not missing.exists()


# --- logs ---------------------------------------------------------------------------------------------------


async def read_log(host: LocalHost, pod: Pod, container: str, since: str | None = None) -> bytes:
    """Return a container's log, followed to its end."""
    async with asyncio.timeout(60):
        return b"".join([chunk async for chunk in host.log(pod, container, since=since)])


async def lines_of(host: LocalHost, pod: Pod, container: str) -> list[RawLine]:
    """Return a container's log, line by line, an unfinished last one too."""
    splitter = LineSplitter(1 << 20)
    lines = splitter.feed(await read_log(host, pod, container))
    parsed = [parse_line(raw) for raw in [*lines, *filter(None, [splitter.tail()])]]
    assert None not in parsed
    return [line for line in parsed if line is not None]


async def test_a_log_is_followed_from_its_first_line_to_an_unfinished_last(
    host: LocalHost, local_settings: LocalSettings
) -> None:
    """Two readers, one from the start and one that comes late, read every line once, and a long one whole."""
    courier = "sleep 1; echo other >&2"
    build = (
        "for i in $(seq 300); do echo line $i; done; head -c 102400 /dev/zero | tr '\\0' x; echo; "
        "sleep 0.5; printf 'with\\rreturn\\n\\n'; printf unfin; sleep 0.5; printf ished"
    )
    manifest = pod_of(local_settings, courier, build)
    pod = await host.create(manifest, {})

    first = asyncio.create_task(lines_of(host, pod, "build"))
    await asyncio.sleep(0.7)
    second, other = await asyncio.gather(lines_of(host, pod, "build"), lines_of(host, pod, "courier"))
    lines = await first
    ended = await finished(host, manifest["metadata"]["name"])

    expected = [f"line {i}".encode() for i in range(1, 301)]
    assert [line.text for line in lines] == [*expected, b"x" * 102_400, b"with\rreturn", b"", b"unfinished"]
    assert second == lines == await lines_of(host, ended, "build")
    assert [line.text for line in other] == [b"other"]
    assert [line.time for line in lines] == sorted(line.time for line in lines)
    assert pod["metadata"]["creationTimestamp"][:19] <= lines[0].time[:19]


async def test_a_log_is_resumed_at_a_whole_second(host: LocalHost, local_settings: LocalSettings) -> None:
    """`since` is inclusive: exactly the lines of that second and later ones come."""
    manifest = pod_of(local_settings, "true", "for i in $(seq 30); do echo $i; sleep 0.1; done")
    pod = await host.create(manifest, {})
    whole = await lines_of(host, pod, "build")
    since = whole[15].time[:19] + "Z"

    rest = await read_log(host, pod, "build", since)

    later = [line for line in whole if line.time[:19] >= since[:19]]
    assert 0 < len(later) < len(whole)
    assert [parse_line(raw) for raw in rest.splitlines()] == later
    assert await read_log(host, pod, "build", "2999-01-01T00:00:00Z") == b""


async def test_a_log_of_a_pod_that_is_gone_is_empty(host: LocalHost, local_settings: LocalSettings) -> None:
    """The end of a stream says nothing, so a log that is no longer there is simply at its end."""
    manifest = pod_of(local_settings)
    pod = await host.create(manifest, {})
    await finished(host, manifest["metadata"]["name"])
    await host.delete(pod)

    assert await read_log(host, pod, "build") == b""
    assert await read_log(host, pod, "no such container") == b""


RECORDS = [
    (b"2026-11-23T01:00:00.100000000+00:00 stdout F one", b"2026-11-23T01:00:00.100000000Z one\n"),
    (b"2026-11-23T01:00:01.1+00:00 stderr P two ", b"2026-11-23T01:00:01.100000000Z two "),
    (b"2026-11-23T01:00:02.2+00:00 stderr P and ", b"and "),
    (b"2026-11-23T01:00:03.3+00:00 stderr F a half", b"a half\n"),
    (b"2026-11-23T02:00:03.4+01:00 stdout F another clock", b"2026-11-23T01:00:03.400000000Z another clock\n"),
    (b"2026-11-22T20:30:04.5-04:30 stdout F", b"2026-11-23T01:00:04.500000000Z \n"),
    (b"not a record", b""),
    (b"2026-11-23T01:00:05Z stdout F  with  blanks ", b"2026-11-23T01:00:05.000000000Z  with  blanks \n"),
    (b"2026-11-23T01:00:06Z stdout P unfinished", b"2026-11-23T01:00:06.000000000Z unfinished"),
]
LOG_FILE = b"".join(record + b"\n" for record, _ in RECORDS)


def served(chunks: Iterable[bytes], since: str | None = None) -> bytes:
    """Return what the records of a log file become, read in these pieces."""
    records = LogRecords(since)
    return b"".join([records.feed(chunk) for chunk in chunks])


@given(st.lists(st.integers(0, len(LOG_FILE))))
def test_records_become_lines_wherever_the_file_is_cut(cuts: Sequence[int]) -> None:
    """Each line has one time, in UTC; its pieces are joined; what is no record is left out."""
    edges = [0, *sorted(cuts), len(LOG_FILE)]
    chunks = [LOG_FILE[a:b] for a, b in pairwise(edges)]

    assert served(chunks) == b"".join(line for _, line in RECORDS)


@pytest.mark.parametrize(
    ("since", "first"),
    [
        (None, 0),
        ("2026-11-23T01:00:00Z", 0),
        pytest.param("2026-11-23T01:00:01Z", 1, id="the second of a line in pieces"),
        pytest.param("2026-11-23T01:00:02Z", 4, id="inside the pieces of a line: it belongs to its first"),
        pytest.param("2026-11-23T01:00:03Z", 4, id="a record with another UTC offset counts by its moment"),
        ("2026-11-23T01:00:04Z", 5),
        ("2026-11-23T01:00:05Z", 7),
        pytest.param("2026-11-23T01:00:06Z", 8, id="an unfinished line"),
        ("2026-11-23T01:00:07Z", 9),
    ],
)
@pytest.mark.parametrize("step", [1, 7, 4096])
def test_records_since_a_second(since: str | None, first: int, step: int) -> None:
    """`since` is inclusive, and never serves the rest of a line whose beginning is before it."""
    chunks = [LOG_FILE[n : n + step] for n in range(0, len(LOG_FILE), step)]

    assert served(chunks, since) == b"".join(line for _, line in RECORDS[first:])


# --- finding an engine --------------------------------------------------------------------------------------


def program(folder: Path, name: str, script: str) -> None:
    """Write a program that is found by its name."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("programs", "says"),
    [
        pytest.param({}, "podman is not installed, docker is not installed", id="nothing"),
        pytest.param({"docker": "echo refused >&2; exit 1"}, "docker is installed, but its engine does not answer",
                     id="a docker client without an engine"),
        pytest.param({"docker": "echo ' null'"}, "docker is installed, but its engine does not answer",
                     id="a docker client that says it quietly"),
        pytest.param({"podman": "exit 125"}, "podman is installed, but its engine does not answer",
                     id="a podman that fails"),
        pytest.param({"podman": "echo 3.4.4 false"}, "podman 3.4.4 is too old, 4.3 or newer is needed",
                     id="an old podman"),
        pytest.param({"podman": "echo 4.2.9 true"}, "podman 4.2.9 is too old", id="a podman just too old"),
        pytest.param({"podman": "echo weird true"}, "podman weird is too old", id="a podman without a number"),
    ],
)  # fmt: skip
async def test_without_an_engine_the_error_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, programs: dict[str, str], says: str
) -> None:
    """It names what was seen of each engine, and the command that installs one."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, script in programs.items():
        program(folder, name, script)
    monkeypatch.setenv("PATH", str(folder))

    with pytest.raises(HostUnavailable) as raised:
        async with LocalHost(LocalSettings(registry="r.invalid", state_folder=str(tmp_path / "state"))):
            pass

    assert says in raised.value.problem
    assert "apt-get install podman" in raised.value.remedy
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("programs", "kind", "remapped", "isolation"),
    [
        pytest.param({"podman": "echo 4.3.1 false"}, "podman", False, "rootless", id="podman of root"),
        pytest.param({"podman": "echo 5.4.2 true"}, "podman", True, "rootless", id="podman of a user"),
        pytest.param({"podman": "echo 10.0.0-rc1 true"}, "podman", True, "rootless", id="podman of the future"),
        pytest.param({"docker": """echo '27.3.1 ["name=seccomp,profile=builtin"]'"""}, "docker", False, "chroot",
                     id="docker"),
        pytest.param({"docker": """echo '27.3.1 ["name=seccomp","name=userns"]'"""}, "docker", True, "rootless",
                     id="docker with userns-remap"),
        pytest.param({"docker": """echo '27.3.1 ["name=seccomp","name=rootless"]'"""}, "docker", True, "rootless",
                     id="rootless docker"),
        pytest.param({"podman": "exit 1", "docker": "echo '27.3.1 []'"}, "docker", False, "chroot",
                     id="a podman that fails, a docker that answers"),
        pytest.param({"podman": "echo 4.3.1 false", "docker": "echo '27.3.1 []'"}, "podman", False, "rootless",
                     id="both"),
    ],
)  # fmt: skip
async def test_the_engine_that_answers_is_taken(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    programs: dict[str, str],
    kind: str,
    remapped: bool,
    isolation: Isolation,
) -> None:
    """podman before docker; steps get the strongest isolation that it can give."""
    for name, script in programs.items():
        program(tmp_path / "programs", name, script)
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))

    found = await detect_engine()

    assert (found.kind, found.remapped, found.isolation) == (kind, remapped, isolation)


# --- what the engine is told --------------------------------------------------------------------------------

ENGINES = {
    "podman of root": Engine("/usr/bin/podman", "podman", remapped=False),
    "podman of a user": Engine("/usr/bin/podman", "podman", remapped=True),
    "docker": Engine("/usr/bin/docker", "docker", remapped=False),
    "docker with userns-remap": Engine("/usr/bin/docker", "docker", remapped=True),
}
UNMASKED = ("--security-opt=unmask=ALL", "--security-opt=systempaths=unconfined")


def arguments_of(engine: Engine, settings: LocalSettings | None = None) -> dict[str, list[str]]:
    """Return the arguments of both containers of a pod that this engine runs."""
    settings = settings or LocalSettings(registry="r.invalid")
    manifest = pod_manifest(
        plan_of(settings, "file:///repository"), settings, isolation=engine.isolation, secret_name="s"
    )
    return {
        container["name"]: create_arguments(
            engine, settings, manifest, container, nonce="n", folder=Path("/state/pods/n"), secret=Path("/secrets/n")
        )
        for container in manifest["spec"]["containers"]
    }


@pytest.mark.parametrize(
    ("engine", "build_gets", "id_maps"),
    [
        ("podman of root", {"--security-opt=unmask=ALL"}, True),
        ("podman of a user", {"--security-opt=unmask=ALL"}, False),
        ("docker", set(), False),
        ("docker with userns-remap", {"--security-opt=systempaths=unconfined"}, False),
    ],
)
def test_proc_is_unmasked_only_where_container_root_is_not_host_root(
    engine: str, build_gets: set[str], id_maps: bool
) -> None:
    """Only in `build`, and only with an id map: ours, or the engine's own (S31)."""
    arguments = arguments_of(ENGINES[engine])

    assert set(UNMASKED) & set(arguments["build"]) == build_gets
    assert not set(UNMASKED) & set(arguments["courier"])
    for container in ("courier", "build"):
        maps = [a for a in arguments[container] if "map=" in a]
        assert maps == ([f"--uidmap=0:{FIRST_ID}:65536", f"--gidmap=0:{FIRST_ID}:65536"] if id_maps else [])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_secret_is_mounted_in_courier_alone(engine: str) -> None:
    """`build` gets no path that leads to it (S20); the repository's folder is read-only, and courier's alone too."""
    arguments = arguments_of(ENGINES[engine])

    assert [a for a in arguments["courier"] if "/secrets/n" in a] == ["--volume=/secrets/n:/podbuild/secret:ro"]
    assert "--volume=/repository:/podbuild/repository:ro" in arguments["courier"]
    volumes = sorted(a.removeprefix("--volume=").split(":")[0] for a in arguments["build"] if "volume" in a)
    own = [f"/state/pods/n/volumes/{name}" for name in ("pod", "run", "storage", "work")]
    assert volumes == ["/state/pods/n/ends/build", *own]


@pytest.mark.parametrize("engine", ENGINES)
def test_privileges_are_the_least(engine: str) -> None:
    """courier: none, and a read-only root. build: three capabilities. Never privileged, never an engine's socket."""
    arguments = arguments_of(ENGINES[engine])

    for given_to in arguments.values():
        assert "--cap-drop=ALL" in given_to
        assert any(a.startswith("--security-opt=seccomp=/") for a in given_to)
        text = " ".join(given_to)
        for never in ("--privileged", ".sock", "--device", "--pid=", "--ipc=", "--userns=", "seccomp=unconfined"):
            assert never not in text
    added = {name: [a for a in given_to if a.startswith("--cap-add")] for name, given_to in arguments.items()}
    assert added == {"courier": [], "build": ["--cap-add=SETUID", "--cap-add=SETGID", "--cap-add=SETFCAP"]}
    assert {"--read-only", "--security-opt=no-new-privileges"} <= set(arguments["courier"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("network", "given"), [("podbuild", "podbuild"), ("other", "other"), ("host", "host")])
def test_steps_are_on_the_machines_network_only_if_the_settings_say_so(engine: str, network: str, given: str) -> None:
    """courier reaches what this process reaches; `build` has a network of its own."""
    arguments = arguments_of(ENGINES[engine], LocalSettings(registry="r.invalid", network=network))

    networks = {name: [a for a in got if a.startswith("--net")] for name, got in arguments.items()}
    assert networks == {"courier": ["--network=host"], "build": [f"--network={given}"]}


@pytest.mark.parametrize("engine", ENGINES)
def test_limits_are_those_of_the_pod(engine: str) -> None:
    """Memory without swap on top, and no more cores than the machine has."""
    arguments = arguments_of(ENGINES[engine])

    assert {"--memory=1073741824", "--memory-swap=1073741824"} <= set(arguments["courier"])
    assert {"--memory=4294967296", "--memory-swap=4294967296"} <= set(arguments["build"])
    assert [a for a in arguments["courier"] if a.startswith("--cpus")] == ["--cpus=1"]


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root may")
def test_an_ordinary_users_secret_files_are_written_and_closed() -> None:
    """Without root's rights too the secret files hold what they were given, and nobody may write them (S20)."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        host = LocalHost(LocalSettings(state_folder=f"{folder}/state"))
        host._engine = Engine(program="podman", kind="podman", remapped=True)
        child = os.fork()
        if child == 0:
            try:
                os.setgid(65534)
                os.setuid(65534)
                empty = {"metadata": {"annotations": {}}, "spec": {"volumes": [], "containers": []}}
                host._lay_out("nonce", empty, {"git.json": b"content"})
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        written = Path(folder) / "state" / "secrets" / "nonce" / "git.json"

        assert written.read_bytes() == b"content"
        assert written.stat().st_mode & 0o777 == 0o400
