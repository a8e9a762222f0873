"""Whole builds with real containers: five kinds of repositories, many callers, and everything that can go wrong."""

import asyncio
import dataclasses
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import podbuild
from podbuild import (
    BuildError,
    BuildFailed,
    DeadlineExceeded,
    ImagePullFailed,
    InvalidRequest,
    Line,
    LocalHost,
    LocalSettings,
    OutOfMemory,
    PodLost,
    PushUnconfirmed,
    RefNotFound,
    RegistryUnavailable,
    Result,
    SourceUnavailable,
    find_built,
    parse_options,
    parse_repository,
    plan_build,
    submit,
)
from podbuild.hosts.local import Engine
from tests.engine import FROM, Repo, TestRegistry, call, commit_files, free_port, git

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parent.parent
HELLO = f'FROM {FROM}\nRUN echo hello > /hello\nCMD ["cat", "/hello"]\n'


async def build(
    settings: LocalSettings,
    repo: str,
    commit: str,
    image: str | None = None,
    log: list[str] | None = None,
    **options: Any,
) -> Result:
    """Look for the image, then build it, the way the flow does."""
    plan = plan_build(parse_repository(repo), commit, image, parse_options(options), settings)
    async with LocalHost(settings) as host:
        found = await find_built(plan, settings)
        if found is not None:
            return found
        handle = await submit(host, plan)
        async for event in handle.events():
            if isinstance(event, Line) and log is not None:
                log.append(event.text)
        return await handle.result()


async def pods(settings: LocalSettings) -> list[dict[str, Any]]:
    """Return this test's pods."""
    async with LocalHost(settings) as host:
        mine = {p.parent.name for p in Path(settings.state_folder).glob("pods/*/pod.json")}
        return [p for p in await host.find({}) if p["metadata"]["labels"]["podbuild.io/nonce"] in mine]


async def assert_nothing_runs(settings: LocalSettings) -> None:
    """Every container of the test has ended, and no secret lies around."""
    for pod in await pods(settings):
        for status in pod["status"]["containerStatuses"]:
            assert "terminated" in status["state"], status
    assert not list(Path(settings.state_folder).glob("secrets/*"))


# --- five repositories --------------------------------------------------------------------------------------


async def test_a_dockerfile_at_the_root(
    local_settings: LocalSettings, registry: TestRegistry, make_repo: Callable[..., Repo]
) -> None:
    """The image runs when it is pulled back by digest, and its labels say where it comes from."""
    repo = make_repo({"Dockerfile": HELLO})

    result = await build(local_settings, repo.url, repo.commit)

    assert registry.run(result.reference) == "hello"
    found = await podbuild.registry.find_labelled(podbuild.parse_image(result.image), local_settings)
    assert found is not None
    assert found[0].digest == result.digest
    assert found[1]["org.opencontainers.image.revision"] == repo.commit
    assert found[1]["org.opencontainers.image.source"] == repo.url


async def test_a_dockerfile_in_a_subdirectory_with_arguments_and_a_target(
    local_settings: LocalSettings, registry: TestRegistry, make_repo: Callable[..., Repo]
) -> None:
    """Context, build arguments and target stage are the ones asked for."""
    dockerfile = (
        f"FROM {FROM} AS early\nARG WORD=none\nCOPY note.txt /\nRUN echo $WORD >> /note.txt\n"
        'CMD ["cat", "/note.txt"]\nFROM early AS late\nRUN exit 9\n'
    )
    repo = make_repo({"services/app/Dockerfile": dockerfile, "services/app/note.txt": "note\n"})

    result = await build(
        local_settings,
        repo.url,
        repo.commit,
        subdirectory="services/app",
        build_args={"WORD": "from outside; $(echo no shell)"},
        target="early",
    )

    assert registry.run(result.reference).splitlines() == ["note", "from outside; $(echo no shell)"]
    assert result.image.rpartition(":")[2].startswith(f"{repo.commit[:12]}-")


async def test_a_repo2docker_repository_with_an_appendix(
    local_settings: LocalSettings, registry: TestRegistry, make_repo: Callable[..., Repo]
) -> None:
    """repo2docker builds its Dockerfile, and the appendix is built on top, which repo2docker itself leaves out."""
    repo = make_repo({"binder/Dockerfile": HELLO, "index.txt": "x"})
    log: list[str] = []

    result = await build(local_settings, repo.url, repo.commit, log=log, appendix="RUN echo appended >> /hello")

    assert registry.run(result.reference).splitlines() == ["hello", "appended"]
    assert any("Building with repo2docker" in line for line in log)


async def test_a_repository_with_a_submodule(
    local_settings: LocalSettings,
    registry: TestRegistry,
    make_repo: Callable[..., Repo],
    tmp_path: Path,
) -> None:
    """The submodule's files are there, at the commit that the repository names."""
    inner = make_repo({"part.txt": "from the submodule\n"}, name="inner")
    outer = make_repo({"Dockerfile": f'FROM {FROM}\nCOPY parts/part.txt /\nCMD ["cat", "/part.txt"]\n'}, name="outer")
    async with serve_plain_http(tmp_path / "repositories") as base:
        git(outer.path, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(inner.path), "parts")
        git(outer.path, "config", "--file", ".gitmodules", "submodule.parts.url", f"{base}/inner/.git")
        commit = commit_files(outer.path, {})
        commit_files(inner.path, {"part.txt": "a later state\n"})
        for folder in (inner.path, outer.path):
            git(folder, "update-server-info")

        result = await build(local_settings, f"{base}/outer/.git", commit)

    assert registry.run(result.reference) == "from the submodule"


async def test_an_annotated_tag(
    local_settings: LocalSettings, registry: TestRegistry, make_repo: Callable[..., Repo]
) -> None:
    """The tag's commit is built, not the tag object, although the branch has moved on (G7)."""
    repo = make_repo({"Dockerfile": HELLO})
    repo.git("tag", "--annotate", "v1", "-m", "release")
    commit_files(repo.path, {"Dockerfile": HELLO.replace("hello >", "later >")})

    resolved = await podbuild.resolve_commit(parse_repository(repo.url), "v1")
    result = await build(local_settings, repo.url, resolved.commit)

    assert resolved.commit == repo.commit
    assert registry.run(result.reference) == "hello"


def test_repo2dockers_own_environments_get_the_right_command(engine: Engine, make_repo: Callable[..., Repo]) -> None:
    """For a repository without a Dockerfile, our command makes repo2docker generate one with its environment.

    Package hosts are not asked: `--no-build --debug` shows the Dockerfile and stops.
    """
    repo = make_repo({"requirements.txt": "humanize==4.9.0\n", "binder-note.txt": "x"})
    program = (
        "import json, pathlib, subprocess, sys; sys.path.insert(0, '/opt/podbuild'); import build;"
        "pod = {'builder': 'auto', 'dockerfile': '', 'target': '', 'commit': 'c' * 40, 'build_args': {'A': 'b'},"
        " 'platform': 'linux/amd64', 'appendix': 'RUN echo appended', 'extra_args': ['--no-build', '--debug']};"
        "source = pathlib.Path('/source'); print(build.choose_builder(pod, source));"
        "sys.stdout.flush(); sys.exit(subprocess.call(build.repo2docker_command(pod, source), stderr=1,"
        " env={**__import__('os').environ, 'DOCKER_HOST': 'unix:///run/podman/podman.sock', 'HOME': '/tmp'}))"
    )
    options = [f"--volume={repo.path}:/source:ro", "--network=none", "--entrypoint=python3", "--tmpfs=/tmp"]

    said = call(
        engine,
        "run",
        "--rm",
        *options,
        *podbuild.hosts.local.limits_here(),
        LocalSettings().builder_image,
        "-c",
        program,
    )

    assert said.splitlines()[0] == "repo2docker"
    assert "FROM docker.io/library/buildpack-deps" in said
    assert "requirements.txt" in said
    assert "RUN echo appended" in said
    assert "conda" in said


# --- one build for many callers -----------------------------------------------------------------------------


async def call_in_a_process(
    settings: LocalSettings, repo: Repo, image: str | None = None, **options: Any
) -> dict[str, Any]:
    """Run one caller in a process of its own and return what it printed."""
    order = {
        "settings": dataclasses.asdict(settings),
        "repo": repo.url,
        "commit": repo.commit,
        "image": image,
        "options": options,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.call_build",
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(240):
        out, _ = await process.communicate(json.dumps(order).encode())
    answer: dict[str, Any] = json.loads(out)
    return answer


async def test_twenty_processes_share_one_build(local_settings: LocalSettings, make_repo: Callable[..., Repo]) -> None:
    """One of them built, nineteen joined; all have the same digest, and the same whole log."""
    repo = make_repo({"Dockerfile": HELLO.replace("echo", "sleep 5; echo")})

    answers = await asyncio.gather(*(call_in_a_process(local_settings, repo) for _ in range(20)))

    assert sorted(str(a.get("outcome", a.get("error"))) for a in answers) == ["built"] + ["joined"] * 19
    assert len({a["digest"] for a in answers}) == 1
    assert len({a["uid"] for a in answers}) == 1
    assert all(a["lines"] == answers[0]["lines"] for a in answers)
    assert any(line.startswith("courier: Fetching") for line in answers[0]["lines"])
    assert any(line.startswith("courier: Pushed") for line in answers[0]["lines"])


async def test_ten_callers_of_a_broken_build_get_one_error_and_the_next_builds_anew(
    local_settings: LocalSettings, make_repo: Callable[..., Repo]
) -> None:
    """A failure is neither multiplied nor cached (A5)."""
    repo = make_repo({"Dockerfile": f"FROM {FROM}\nRUN sleep 5; echo broken; exit 3\n"})

    answers = await asyncio.gather(*(call_in_a_process(local_settings, repo) for _ in range(10)))
    (first,) = await pods(local_settings)
    eleventh = await call_in_a_process(local_settings, repo)
    (second,) = await pods(local_settings)

    assert {a["error"] for a in answers} == {"BuildFailed"}
    assert len({a["text"] for a in answers}) == 1
    assert "exit code 3" in answers[0]["text"]
    assert "broken" in answers[0]["text"]
    assert eleventh["error"] == "BuildFailed"
    assert first["metadata"]["uid"] != second["metadata"]["uid"]


async def test_a_moving_tag_ends_on_what_was_asked_for_last(
    local_settings: LocalSettings, registry: TestRegistry, make_repo: Callable[..., Repo]
) -> None:
    """`app:latest` from A, then B, then A again while A's containers are kept: each answer is true."""
    repo = make_repo({"Dockerfile": HELLO})
    other = commit_files(repo.path, {"Dockerfile": HELLO.replace("hello >", "other >")})
    image = f"{local_settings.registry}/app:latest"

    answers = [await build(local_settings, repo.url, c, image) for c in (repo.commit, other, repo.commit)]
    again = await build(local_settings, repo.url, repo.commit, image)

    assert [a.outcome for a in answers] == ["built"] * 3
    assert [a.commit for a in answers] == [repo.commit, other, repo.commit]
    assert again.outcome == "found"
    assert again.digest == answers[2].digest
    assert registry.run(image) == "hello"
    assert registry.run(answers[1].reference) == "other"


async def test_the_same_tag_with_other_arguments_is_built_anew(
    local_settings: LocalSettings, registry: TestRegistry, make_repo: Callable[..., Repo]
) -> None:
    """A tag that holds other options is no answer, also after a failed build in between."""
    repo = make_repo({"Dockerfile": f'FROM {FROM}\nARG A=0\nRUN test $A != bad && echo $A > /a\nCMD ["cat", "/a"]\n'})
    image = f"{local_settings.registry}/app:1"

    one = await build(local_settings, repo.url, repo.commit, image, build_args={"A": "1"})
    with pytest.raises(BuildFailed):
        await build(local_settings, repo.url, repo.commit, image, build_args={"A": "bad"})
    two = await build(local_settings, repo.url, repo.commit, image, build_args={"A": "2"})

    assert (one.outcome, two.outcome) == ("built", "built")
    assert registry.run(image) == "2"


async def test_rebuild_builds_although_the_image_exists(
    local_settings: LocalSettings, make_repo: Callable[..., Repo]
) -> None:
    """`rebuild` replaces a finished build."""
    repo = make_repo({"Dockerfile": HELLO})

    first = await build(local_settings, repo.url, repo.commit)
    (before,) = await pods(local_settings)
    second = await build(local_settings, repo.url, repo.commit, rebuild=True)
    (after,) = await pods(local_settings)

    assert (first.outcome, second.outcome) == ("built", "built")
    assert before["metadata"]["uid"] != after["metadata"]["uid"]


# --- what can go wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dockerfile", "options", "error", "says"),
    [
        pytest.param("RUN echo why; exit 7", {}, BuildFailed, "exit code 7", id="a step fails"),
        pytest.param(
            "RUN echo x",
            {"subdirectory": "empty", "builder": "dockerfile"},
            InvalidRequest,
            "no Dockerfile",
            id="no file",
        ),
        pytest.param("RUN echo x", {"subdirectory": "missing"}, InvalidRequest, "missing", id="no subdirectory"),
        pytest.param(
            "RUN perl -e '$x .= \"x\" x 1000000 while 1'",
            {"memory_limit": "160Mi"},
            OutOfMemory,
            "memory_limit",
            id="P7 memory limit",
        ),
        pytest.param(
            "RUN perl -e '$x .= \"x\" x 1000000 while 1' || echo went on",
            {"memory_limit": "160Mi"},
            OutOfMemory,
            "memory_limit",
            id="P7 memory limit, and the step goes on",
        ),
        pytest.param(
            "RUN sleep 600", {"timeout_minutes": 0.15}, DeadlineExceeded, "timeout_minutes", id="P10 time limit"
        ),
        pytest.param("RUN echo x", {"target": "nobody"}, BuildFailed, "exit code", id="no such stage"),
    ],
)
async def test_a_build_that_cannot_work_is_a_typed_error(
    local_settings: LocalSettings,
    make_repo: Callable[..., Repo],
    dockerfile: str,
    options: dict[str, Any],
    error: type[BuildError],
    says: str,
) -> None:
    """The error names what happened and what to change, and nothing runs on."""
    repo = make_repo({"Dockerfile": f"FROM {FROM}\n{dockerfile}\n", "empty/.keep": ""})

    with pytest.raises(error, match=says) as raised:
        await build(local_settings, repo.url, repo.commit, **options)

    assert raised.value.remedy
    if isinstance(raised.value, BuildFailed):
        assert raised.value.last_lines
    await assert_nothing_runs(local_settings)


async def test_the_exit_code_and_the_last_lines_are_in_the_error(
    local_settings: LocalSettings, make_repo: Callable[..., Repo]
) -> None:
    """A reader of the error alone knows which step failed, and what it said."""
    repo = make_repo({"Dockerfile": f"FROM {FROM}\nRUN echo the reason; exit 7\n"})

    with pytest.raises(BuildFailed) as raised:
        await build(local_settings, repo.url, repo.commit)

    assert raised.value.exit_code == 7
    assert raised.value.phase == "build"
    assert "the reason" in raised.value.last_lines


async def test_a_commit_that_does_not_exist(local_settings: LocalSettings, make_repo: Callable[..., Repo]) -> None:
    """courier says that the server does not hand it out, and build ends with it."""
    repo = make_repo({"Dockerfile": HELLO})

    with pytest.raises(RefNotFound, match="commit"):
        await build(local_settings, repo.url, "0123456789" * 4)

    await assert_nothing_runs(local_settings)


async def test_a_repository_that_does_not_exist(local_settings: LocalSettings, tmp_path: Path) -> None:
    """A server that answers, but has no such repository, is a typed error from courier too."""
    (tmp_path / "repositories").mkdir()

    async with serve_plain_http(tmp_path / "repositories") as base:
        with pytest.raises(SourceUnavailable):
            await build(local_settings, f"{base}/nothing", "0123456789" * 4)

    await assert_nothing_runs(local_settings)


async def test_a_registry_that_is_down_before(local_settings: LocalSettings, make_repo: Callable[..., Repo]) -> None:
    """Nothing is started: whether the image exists is unknown, and unknown is an error."""
    repo = make_repo({"Dockerfile": HELLO})
    nobody = f"127.0.0.1:{free_port()}"
    settings = replace(local_settings, registry=f"{nobody}/x", plain_http_registries=(nobody,))

    with pytest.raises(RegistryUnavailable):
        await build(settings, repo.url, repo.commit)

    assert not await pods(settings)


async def test_a_registry_that_is_down_at_the_push(
    local_settings: LocalSettings, make_repo: Callable[..., Repo]
) -> None:
    """The build is done, the push tried again, and the error says which registry."""
    repo = make_repo({"Dockerfile": HELLO})
    nobody = f"127.0.0.1:{free_port()}"
    settings = replace(
        local_settings,
        registry=f"{nobody}/x",
        plain_http_registries=(nobody, *local_settings.plain_http_registries),
    )
    log: list[str] = []

    with pytest.raises(RegistryUnavailable, match=nobody):
        await build(settings, repo.url, repo.commit, log=log, if_unknown="build")

    assert any("trying again" in line for line in log)
    await assert_nothing_runs(settings)


async def test_an_image_that_is_gone_from_the_registry_is_not_confirmed(
    local_settings: LocalSettings, make_repo: Callable[..., Repo]
) -> None:
    """Two exit codes 0 and a digest prove nothing while the registry does not answer for it."""
    repo = make_repo({"Dockerfile": HELLO})
    plan = plan_build(parse_repository(repo.url), repo.commit, None, parse_options({}), local_settings)
    elsewhere = f"127.0.0.1:{free_port()}"

    async with LocalHost(local_settings) as host:
        handle = await submit(host, plan)
        async for _ in handle.events():
            pass
        moved = replace(plan, image=replace(plan.image, registry=elsewhere))
        handle.plan = moved
        with pytest.raises(PushUnconfirmed, match="cannot be asked"):
            await handle.result()


async def test_a_builder_image_that_is_missing(local_settings: LocalSettings, make_repo: Callable[..., Repo]) -> None:
    """The remedy is the command that makes it."""
    repo = make_repo({"Dockerfile": HELLO})
    settings = replace(local_settings, builder_image="localhost/podbuild-nothing:1")

    with pytest.raises(ImagePullFailed, match="make builder-image"):
        await build(settings, repo.url, repo.commit)

    assert not await pods(settings)


async def kill_at_a_random_moment(settings: LocalSettings, repo: Repo, victim: str, seed: int) -> float:
    """Kill one container of a build at a random moment; return how long the error took to come."""
    seconds = random.Random(seed).uniform(0.2, 4)  # noqa: S311 - a moment, not a secret
    plan = plan_build(
        parse_repository(repo.url), repo.commit, None, parse_options({"build_args": {"N": str(seed)}}), settings
    )
    loop = asyncio.get_running_loop()
    async with LocalHost(settings) as host:
        handle = await submit(host, plan)
        name = plan.name if victim == "courier" else f"{plan.name}.{victim}"
        pid = int(call(host.engine, "container", "inspect", "--format", "{{.State.Pid}}", name))
        follow = asyncio.create_task(handle.result())
        await asyncio.sleep(seconds)
        assert not follow.done(), "the build ended before it could be killed"
        os.kill(pid, signal.SIGKILL)
        killed = loop.time()
        with pytest.raises(PodLost, match=f"container {victim} was killed"):
            await follow
        took = loop.time() - killed
        pod = await host.read(plan.name)
        assert pod is not None
        await host.delete(pod)
    return took


SLOW = f"FROM {FROM}\nARG N\nRUN sleep 30\n"


@pytest.mark.parametrize("victim", ["courier", "build"])
async def test_a_killed_container_is_noticed_at_once(
    local_settings: LocalSettings, make_repo: Callable[..., Repo], victim: str
) -> None:
    """Whichever is killed, the other ends, the error names the one that was killed, and nothing runs on."""
    repo = make_repo({"Dockerfile": SLOW})

    took = [await kill_at_a_random_moment(local_settings, repo, victim, seed) for seed in range(3)]

    assert max(took) < 10, took
    assert not await pods(local_settings)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("victim", ["courier", "build"])
async def test_twenty_killed_containers_are_noticed_at_once(
    local_settings: LocalSettings,
    make_repo: Callable[..., Repo],
    victim: str,
    record_property: Callable[[str, object], None],
) -> None:
    """The same, twenty times at twenty moments; how long the error took is printed."""
    repo = make_repo({"Dockerfile": SLOW})

    took = sorted([await kill_at_a_random_moment(local_settings, repo, victim, seed) for seed in range(100, 120)])

    print(json.dumps({"victim": victim, "n": len(took), "median_s": round(took[10], 2), "max_s": round(took[-1], 2)}))
    record_property("seconds", took)
    assert took[-1] < 10, took


def serve_plain_http(folder: Path) -> "PlainServer":
    """Serve a folder's files on loopback."""
    return PlainServer(folder)


class PlainServer:
    """A web server for files, as an async context manager that gives its address."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> str:
        port = free_port()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "http.server",
            "--bind",
            "127.0.0.1",
            "--directory",
            str(self._folder),
            str(port),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(30):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.05)
                    continue
                writer.close()
                await writer.wait_closed()
                return f"http://127.0.0.1:{port}"

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
