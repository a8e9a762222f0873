"""How builds end before their time: a follower that leaves, a stop, a deletion."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from podbuild import (
    Build,
    BuildStopped,
    Line,
    LocalHost,
    LocalSettings,
    PodLost,
    parse_options,
    parse_repository,
    plan_build,
    submit,
)
from tests.engine import FROM, Repo, call

pytestmark = pytest.mark.engine
SLOW = f"FROM {FROM}\nRUN echo begun; sleep 60\n"


@pytest.fixture
async def host(local_settings: LocalSettings) -> AsyncIterator[LocalHost]:
    """The real engine, with files of this test's own."""
    async with LocalHost(local_settings) as host:
        yield host


def containers(host: LocalHost, name: str) -> list[str]:
    """Return the containers whose name begins so, also those that only podman's storage knows of: names are taken."""
    everything = ["--all", "--external"] if host.engine.kind == "podman" else ["--all"]
    return call(host.engine, "ps", *everything, "--format={{.Names}}", f"--filter=name=^{name}").split()


def files(host: LocalHost) -> list[Path]:
    """Return what this test's pods left on the disk."""
    return sorted(Path(host.settings.state_folder).glob("*/*"))


async def slow_build(host: LocalHost, make_repo: Callable[..., Repo]) -> Build:
    """Submit a build whose only step takes long."""
    repo = make_repo({"Dockerfile": SLOW})
    plan = plan_build(parse_repository(repo.url), repo.commit, None, parse_options({}), host.settings)
    return await submit(host, plan)


async def until_step_runs(build: Build) -> None:
    """Follow a build until its step has begun, then leave it."""
    events = build.events()
    async with asyncio.timeout(60):
        async for event in events:
            if isinstance(event, Line) and event.text == "begun":
                break
    await events.aclose()  # type: ignore[attr-defined]  # an async generator, which has it


async def test_a_follower_that_leaves_stops_nothing(host: LocalHost, make_repo: Callable[..., Repo]) -> None:
    """The build goes on, and whoever comes next joins it, with the log from the first line (F1)."""
    build = await slow_build(host, make_repo)
    await until_step_runs(build)
    following = asyncio.create_task(build.result())
    await asyncio.sleep(0.5)

    following.cancel()

    with pytest.raises(asyncio.CancelledError):
        await following
    joined = await submit(host, build.plan)
    assert (joined.outcome, joined.uid) == ("joined", build.uid)
    first = await anext(e async for e in joined.events() if isinstance(e, Line))
    assert first.text.startswith("Fetching ")


@pytest.mark.parametrize("which", ["courier", "build"])
async def test_a_container_that_is_told_to_stop_ends_the_build_at_once(
    host: LocalHost, make_repo: Callable[..., Repo], which: str
) -> None:
    """Both programs end on SIGTERM, in the middle of a step too, and say that they were told to."""
    build = await slow_build(host, make_repo)
    await until_step_runs(build)
    pod = await host.read(build.name)
    assert pod is not None
    target = next(s["containerID"] for s in pod["status"]["containerStatuses"] if s["name"] == which)

    call(host.engine, "kill", "--signal=TERM", target)

    with pytest.raises(BuildStopped):
        await asyncio.wait_for(build.result(), 10)
    ended = await host.read(build.name)
    assert ended is not None
    assert all("terminated" in s["state"] for s in ended["status"]["containerStatuses"])


async def test_a_build_that_is_deleted_is_lost(host: LocalHost, make_repo: Callable[..., Repo]) -> None:
    """Followers learn that somebody deleted the pod (P13), and nothing of it is left."""
    build = await slow_build(host, make_repo)
    await until_step_runs(build)
    following = asyncio.create_task(build.result())
    await asyncio.sleep(0.5)
    pod = await host.read(build.name)
    assert pod is not None

    await asyncio.wait_for(host.delete(pod), 20)

    with pytest.raises(PodLost, match="deleted"):
        await asyncio.wait_for(following, 20)
    assert (containers(host, build.name), files(host)) == ([], [])
