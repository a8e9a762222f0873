"""The flow `build-image` on a real Prefect server, with real builds: what callers get, and where they find it."""

import asyncio
import json
import secrets
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import Artifact, Log, State
from prefect.settings import get_current_settings
from prefect.testing.utilities import prefect_test_harness
from prefect.utilities.callables import parameter_schema
from pydantic import SecretStr

from blocks import GitCredentials, LocalEngine, RegistryCredentials
from flows.build_image import build_image
from podbuild import BuildFailed, BuildOptions, InvalidRequest, LocalHost, LocalSettings, RefNotFound
from podbuild.manifest import MANAGED_BY
from tests.engine import Repo

pytestmark = [
    pytest.mark.engine,
    pytest.mark.prefect,
    # Prefect's own code, and what it brings, warns of its own affairs.
    pytest.mark.filterwarnings("ignore"),
]

CANARY = f"canary-{secrets.token_hex(8)}"
DOCKERFILE = "FROM docker.io/library/debian:trixie-slim\nRUN echo one; echo two; echo three\n"


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One Prefect server for the whole test run, with a database of its own."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
async def client(prefect_server: None) -> AsyncIterator[PrefectClient]:
    """A client of that server."""
    async with get_client() as client:
        yield client


@pytest.fixture
async def host(prefect_server: None, local_settings: LocalSettings) -> str:
    """A host block for this test, which pushes to the test registry with credentials that must never show."""
    name = f"test-{secrets.token_hex(4)}"
    login = RegistryCredentials(
        registry=local_settings.registry.split("/")[0], username="canary", password=SecretStr(CANARY)
    )
    await login.save(name)
    await GitCredentials(server="git.invalid", username="canary", password=SecretStr(CANARY)).save(name)
    block = LocalEngine(
        registry=local_settings.registry,
        registry_credentials=[name],
        git_credentials=[name],
        plain_http_registries=list(local_settings.plain_http_registries),
        mirrors=dict(local_settings.mirrors),
        network=local_settings.network,
        ca_bundle=local_settings.ca_bundle,
        state_folder=local_settings.state_folder,
    )
    await block.save(name)
    return f"local-engine/{name}"


async def run(**parameters: Any) -> State[dict[str, Any]]:
    """Run the flow to its end and return its final state, whatever it is."""
    state: State[dict[str, Any]] = await build_image(**parameters, return_state=True)
    return state


def run_id(state: State[Any]) -> UUID:
    """Return the id of the run that ended in this state."""
    assert state.state_details.flow_run_id is not None
    return state.state_details.flow_run_id


async def log_of(client: PrefectClient, state: State[Any], until: str) -> list[Log]:
    """Return a run's log, oldest first, once it holds a text: records travel for a moment after the run."""
    mine = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id(state)]))
    async with asyncio.timeout(60):
        while True:
            found = sorted(await client.read_logs(mine, limit=200), key=lambda log: log.timestamp)
            if any(until in log.message for log in found):
                return found
            await asyncio.sleep(0.2)


async def artifacts_of(client: PrefectClient, state: State[Any]) -> dict[str, Artifact]:
    """Return a run's artifacts by key."""
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id(state)]))
    return {str(a.key): a for a in await client.read_artifacts(artifact_filter=wanted)}


def build_lines(log: list[Log]) -> list[str]:
    """Return the lines that the pod's containers wrote, as the run's log has them."""
    return [line for entry in log if entry.name.startswith("podbuild.") for line in entry.message.splitlines()]


async def test_a_repository_becomes_an_image_and_then_is_found(
    client: PrefectClient, host: str, make_repo: Callable[..., Repo]
) -> None:
    """The first run builds; its answer is returned and stands as artifacts. The second finds it and starts nothing."""
    repo = make_repo({"Dockerfile": DOCKERFILE})

    first = await run(repo=repo.url, host=host)
    answer = await first.aresult()
    second = await (await run(repo=repo.url, host=host)).aresult()

    assert first.name == "Completed"
    assert answer["outcome"] == "built"
    assert answer["commit"] == repo.commit
    assert answer["reference"] == f"{answer['image'].rpartition(':')[0]}@{answer['digest']}"
    assert set(answer["seconds"]) == {"fetch", "build", "push"}
    assert second == {**answer, "outcome": "found", "seconds": {}}
    left = await artifacts_of(client, first)
    assert answer["reference"] in str(left["image"].data)
    (row,) = json.loads(str(left["image-result"].data))
    assert {k: row[k] for k in ("image", "digest", "commit", "outcome")} == {
        k: answer[k] for k in ("image", "digest", "commit", "outcome")
    }


async def test_the_log_has_every_line_with_the_pods_time(
    client: PrefectClient, host: str, make_repo: Callable[..., Repo]
) -> None:
    """The run's log holds the build's log from its first line to its last, in order, under the container's name."""
    repo = make_repo({"Dockerfile": DOCKERFILE})

    state = await run(repo=repo.url, host=host)
    log = await log_of(client, state, "is in the registry")

    lines = build_lines(log)
    assert lines[0].startswith("Fetching ")
    assert [line for line in lines if line in ("one", "two", "three")] == ["one", "two", "three"]
    assert any(line.startswith("Pushed ") for line in lines)
    assert {e.name for e in log if e.name.startswith("podbuild.")} >= {"podbuild.courier", "podbuild.build"}


async def test_two_runs_at_once_share_one_build(
    client: PrefectClient, host: str, make_repo: Callable[..., Repo]
) -> None:
    """Both end with the same digest, one of them built, and both have the whole log."""
    repo = make_repo({"Dockerfile": DOCKERFILE.replace("echo one", "sleep 2; echo one")})

    states = await asyncio.gather(run(repo=repo.url, host=host), run(repo=repo.url, host=host))
    answers = [await state.aresult() for state in states]
    logs = [build_lines(await log_of(client, state, "is in the registry")) for state in states]

    assert sorted(a["outcome"] for a in answers) == ["built", "joined"]
    assert answers[0]["digest"] == answers[1]["digest"]
    assert sorted(logs[0]) == sorted(logs[1])
    assert logs[0][0].startswith("Fetching ")


async def test_a_failed_step_says_which_and_why(
    client: PrefectClient, host: str, make_repo: Callable[..., Repo]
) -> None:
    """The run fails with the step's exit code, its last lines and a remedy; none of it is a secret."""
    repo = make_repo({"Dockerfile": "FROM docker.io/library/debian:trixie-slim\nRUN echo the reason; exit 7\n"})

    state = await run(repo=repo.url, host=host)

    assert state.name == "Failed"
    assert "BuildFailed: A step of the Dockerfile failed with exit code 7." in (state.message or "")
    assert "the reason" in (state.message or "")
    with pytest.raises(BuildFailed) as raised:
        await state.aresult()
    assert raised.value.exit_code == 7
    log = await log_of(client, state, "BuildFailed")
    assert "the reason" in build_lines(log)


@pytest.mark.parametrize(
    ("parameters", "error", "says"),
    [
        pytest.param({"host": "local-engine/nobody"}, InvalidRequest, "does not exist", id="unknown block"),
        pytest.param({"ref": "--upload-pack=touch /tmp/x"}, InvalidRequest, "not a name", id="S1 ref with a dash"),
        pytest.param({"ref": "no-such-branch"}, RefNotFound, "no-such-branch", id="G2 no such ref"),
        pytest.param({"repo": "https://h.invalid/x\ny"}, InvalidRequest, "characters", id="S3 newline"),
        pytest.param({"repo": "-x"}, InvalidRequest, "starts with '-'", id="S1 repository with a dash"),
        pytest.param(
            {"image": "r.invalid/" + "x" * 300}, InvalidRequest, "characters", id="S9 a name of 300 characters"
        ),
        pytest.param({"options": BuildOptions(subdirectory="../up")}, InvalidRequest, "subdirectory", id="S11 path up"),
    ],
)
async def test_bad_input_is_a_typed_error_and_starts_nothing(
    client: PrefectClient,
    host: str,
    local_settings: LocalSettings,
    make_repo: Callable[..., Repo],
    parameters: dict[str, Any],
    error: type[Exception],
    says: str,
) -> None:
    """What cannot be built is refused with a remedy before any container exists."""
    repo = make_repo({"Dockerfile": DOCKERFILE})

    state = await run(**{"repo": repo.url, "host": host, **parameters})

    with pytest.raises(error, match=says):
        await state.aresult()
    assert not list(Path(local_settings.state_folder).glob("pods/*"))


async def test_no_secret_is_anywhere_that_prefect_keeps(
    client: PrefectClient, host: str, make_repo: Callable[..., Repo]
) -> None:
    """After builds that worked and that failed, the canary is in no log, state, or database page."""
    good = make_repo({"Dockerfile": DOCKERFILE})
    bad = make_repo({"Dockerfile": "FROM docker.io/library/debian:trixie-slim\nRUN env; exit 3\n"})

    states = [await run(repo=r.url, host=host) for r in (good, bad)]
    logs = [await log_of(client, states[0], "is in the registry"), await log_of(client, states[1], "BuildFailed")]

    assert not any(CANARY in entry.message for log in logs for entry in log)
    assert not any(CANARY in str(state.message) for state in states)
    address = get_current_settings().server.database.connection_url
    assert address is not None
    database = Path(address.get_secret_value().split("///")[-1])
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    kept = b"".join(f.read_bytes() for f in database.parent.glob(database.name + "*"))
    assert b"build-image" in kept
    assert CANARY.encode() not in kept


async def test_a_password_in_the_address_never_reaches_an_error(prefect_server: None) -> None:
    """The API refuses such a parameter before it stores a run; the flow itself hides what it refuses (S4)."""
    schema = parameter_schema(build_image)

    assert schema.properties["repo"]["pattern"] == r"^(?!https?://[^/]*@)(?!ssh://[^/@]*:[^/@]*@)"
    state = await run(repo="https://user:another-canary@git.invalid/x", host="local-engine/nobody")
    assert "another-canary" not in str(state.message)


def test_every_form_field_has_a_title_and_a_description() -> None:
    """What reaches the form of the Prefect UI: titles and descriptions everywhere, limits where there are some."""
    schema = parameter_schema(build_image)
    options = schema.definitions["BuildOptions"]["properties"]

    assert all(field.get("title") and field.get("description") for field in schema.properties.values())
    assert all(field.get("title") and field.get("description") for field in options.values())
    assert options["timeout_minutes"]["exclusiveMinimum"] == 0
    assert options["builder"]["enum"] == ["auto", "repo2docker", "dockerfile"]


async def test_a_finished_build_keeps_its_log_and_nothing_else(
    host: str, local_settings: LocalSettings, make_repo: Callable[..., Repo]
) -> None:
    """After the answer the pod is still there to be read, but its secrets and volumes are gone."""
    repo = make_repo({"Dockerfile": DOCKERFILE})

    answer = await (await run(repo=repo.url, host=host)).aresult()

    async with LocalHost(replace(local_settings)) as engine:
        pods = await engine.find(MANAGED_BY)
    assert answer["build"] in {pod["metadata"]["name"] for pod in pods}
    state = Path(local_settings.state_folder)
    assert not list(state.glob("pods/*/volumes/*"))
    assert not list(state.glob("secrets/*"))
