"""A real cluster as a host: the lock, the gate, the Secret, the answers to what cannot work, and whole builds."""

import asyncio
import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from podbuild import (
    AccessDenied,
    BuildFailed,
    ClusterSettings,
    HostUnavailable,
    ImagePullFailed,
    InvalidRequest,
    Line,
    Pending,
    Plan,
    PodRejected,
    find_built,
    parse_options,
    parse_repository,
    plan_build,
    submit,
)
from podbuild.diagnosis import is_gated
from podbuild.hosts import NameExists
from podbuild.hosts.kubernetes import KubernetesHost, cluster_manifest
from podbuild.manifest import GATE, LABEL_BUILD, pod_manifest, secret_files
from podbuild.settings import RegistryCredentials
from tests.engine import FROM, Repo

on_cluster = pytest.mark.cluster
CANARY = f"canary-{secrets.token_hex(8)}"
HELLO = f'FROM {FROM}\nRUN echo hello > /hello\nCMD ["cat", "/hello"]\n'


def plan_for(settings: ClusterSettings, url: str, commit: str, **options: Any) -> Plan:
    """Return the plan of a build on the test cluster."""
    return plan_build(parse_repository(url), commit, None, parse_options(options), settings)


def manifest_for(settings: ClusterSettings, plan: Plan) -> dict[str, Any]:
    """Return the manifest that `submit` would create."""
    nonce = secrets.token_hex(8)
    return pod_manifest(plan, settings, isolation=settings.isolation, secret_name=f"{plan.name}-{nonce}")


def nowhere(settings: ClusterSettings) -> Plan:
    """Return a plan whose pod stays pending: no node has its label."""
    commit = secrets.token_hex(20)
    return plan_for(settings, "https://git.invalid/team/app", commit, node_selector={"podbuild.io/no": "node"})


# --- pure ---------------------------------------------------------------------------------------------------


def test_a_cluster_adds_what_its_settings_say_and_changes_nothing_else() -> None:
    """Profile, pull policy, placement and labels are added; identity and containers' commands stay."""
    settings = ClusterSettings(
        registry="r.example/x",
        seccomp_profile="podbuild.json",
        image_pull_secrets=("pull",),
        ca_config_map="ca",
        priority_class="low",
        node_selector=(("disk", "fast"),),
        labels=(("team", "data"),),
    )
    plan = plan_for(settings, "https://git.example/a/b", "a" * 40, node_selector={"disk": "slow"})
    plain = manifest_for(settings, plan)

    made = cluster_manifest(plain, settings)

    spec = made["spec"]
    build = spec["containers"][1]
    assert build["securityContext"]["seccompProfile"] == {"type": "Localhost", "localhostProfile": "podbuild.json"}
    assert spec["imagePullSecrets"] == [{"name": "pull"}]
    assert spec["priorityClassName"] == "low"
    assert spec["nodeSelector"] == {"disk": "slow"}
    assert made["metadata"]["labels"]["team"] == "data"
    assert made["metadata"]["annotations"] == plain["metadata"]["annotations"]
    assert [c["command"] for c in spec["containers"]] == [c["command"] for c in plain["spec"]["containers"]]
    assert all(c["volumeMounts"][-1]["name"] == "ca" for c in spec["containers"])
    assert "seccompProfile" not in plain["spec"]["containers"][1]["securityContext"]


async def test_no_configuration_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Without a cluster nothing is tried."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)

    with pytest.raises(HostUnavailable, match="kubeconfig"):
        async with KubernetesHost(ClusterSettings(kubeconfig=str(tmp_path / "none"))):
            pass


# --- on a real cluster --------------------------------------------------------------------------------------


@on_cluster
async def test_the_name_is_the_lock(cluster: ClusterSettings) -> None:
    """Of ten creators one wins, and the others are told that the name exists."""
    plan = nowhere(cluster)
    async with KubernetesHost(cluster) as host:
        tries = await asyncio.gather(
            *(host.create(manifest_for(cluster, plan), {}) for _ in range(10)), return_exceptions=True
        )
        pods = [t for t in tries if isinstance(t, dict)]
        await host.delete(pods[0])

    assert len(pods) == 1
    assert sum(isinstance(t, NameExists) for t in tries) == 9


@on_cluster
async def test_a_pod_gets_its_secret_before_its_gate_is_lifted(cluster: ClusterSettings) -> None:
    """The Secret exists, is owned by the pod, goes with it, and no value of it stands in the pod (S20, S21)."""
    registry = cluster.registry.split("/")[0]
    login = RegistryCredentials(host=registry, username="canary", password=CANARY)
    settings = replace(cluster, registry_credentials=(login,))
    plan = nowhere(settings)
    async with KubernetesHost(settings) as host:
        pod = await host.create(manifest_for(settings, plan), secret_files(settings, plan))
        found = await host.find({LABEL_BUILD: pod["metadata"]["labels"][LABEL_BUILD]})
        await host.delete(pod)
        async with asyncio.timeout(30):
            while await host.read(plan.name) is not None:  # noqa: ASYNC110 - the server is polled
                await asyncio.sleep(0.2)

    assert not is_gated(pod)
    assert [p["metadata"]["uid"] for p in found] == [pod["metadata"]["uid"]]
    assert CANARY not in str(pod)


@on_cluster
async def test_delete_never_takes_another_pod_of_the_name(cluster: ClusterSettings) -> None:
    """A handle is bound to a UID: a pod that was made anew survives (A14)."""
    plan = nowhere(cluster)
    async with KubernetesHost(cluster) as host:
        first = await host.create(manifest_for(cluster, plan), {})
        await host.delete(first)
        second = await host.create(manifest_for(cluster, plan), {})
        await host.delete(first)
        there = await host.read(plan.name)
        await host.delete(second)

    assert there is not None
    assert there["metadata"]["uid"] == second["metadata"]["uid"]


@on_cluster
async def test_a_gated_pod_of_a_dead_creator_is_replaced(cluster: ClusterSettings) -> None:
    """A caller who finds a pod that nobody prepares waits 15 s, and makes it anew with its own credentials."""
    plan = nowhere(cluster)
    async with KubernetesHost(cluster) as host:
        abandoned = await host._create_gated(cluster_manifest(manifest_for(cluster, plan), cluster))
        assert [g["name"] for g in abandoned["spec"]["schedulingGates"]] == [GATE]
        build = await submit(host, plan)
        pod = await host.read(plan.name)
        assert pod is not None
        await host.delete(pod)

    assert build.outcome == "built"
    assert build.uid != abandoned["metadata"]["uid"]


@on_cluster
async def test_why_a_pod_waits_is_said_in_the_schedulers_words(cluster: ClusterSettings) -> None:
    """An unschedulable pod is an event with the scheduler's own sentence, once (P1)."""
    plan = nowhere(cluster)
    said: list[str] = []
    async with KubernetesHost(cluster) as host:
        build = await submit(host, plan)
        async with asyncio.timeout(60):
            async for event in build.events():
                assert isinstance(event, Pending)
                said.append(event.reason)
                if "Unschedulable" in event.reason:
                    break
        pod = await host.read(plan.name)
        assert pod is not None
        await host.delete(pod)

    assert "didn't match Pod's node affinity/selector" in said[-1]
    assert len(said) == len(set(said))


@on_cluster
async def test_a_builder_image_that_no_node_has_fails_at_once(
    cluster: ClusterSettings, make_repo: Callable[..., Repo], serve_repo: Callable[[Repo], str]
) -> None:
    """`ErrImageNeverPull` is final: the error comes early, and the pod is gone (P3)."""
    settings = replace(cluster, builder_image="localhost/podbuild-nothing:1")
    repo = make_repo({"Dockerfile": HELLO})
    async with KubernetesHost(settings) as host:
        build = await submit(host, plan_for(settings, serve_repo(repo), repo.commit))
        with pytest.raises(ImagePullFailed, match="ErrImageNeverPull"):
            async with asyncio.timeout(60):
                await build.result()


@on_cluster
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        pytest.param({"namespace": "podbuild-nowhere"}, PodRejected, "no namespace", id="no such namespace"),
        pytest.param({"priority_class": "nobody"}, PodRejected, "nobody", id="no such priority class"),
        pytest.param({"labels": (("bad", "x y"),)}, PodRejected, "422", id="an invalid label"),
    ],
)
async def test_what_the_cluster_refuses_is_a_typed_error(
    cluster: ClusterSettings, change: dict[str, Any], error: type[Exception], says: str
) -> None:
    """The API server's own words are in the error, and the setting to change."""
    settings = replace(cluster, **change)
    async with KubernetesHost(settings) as host:
        with pytest.raises(error, match=says):
            await submit(host, nowhere(settings))


@on_cluster
async def test_a_repository_becomes_an_image_in_one_unprivileged_pod(
    cluster: ClusterSettings, make_repo: Callable[..., Repo], serve_repo: Callable[[Repo], str]
) -> None:
    """Ten callers, one pod, equal digests and equal logs; then the image is found, and nothing is started."""
    repo = make_repo({"Dockerfile": HELLO})
    plan = plan_for(cluster, serve_repo(repo), repo.commit)

    async def caller() -> tuple[str, str, list[str]]:
        async with KubernetesHost(cluster) as host:
            build = await submit(host, plan)
            lines = [f"{e.container}: {e.text}" async for e in build.events() if isinstance(e, Line)]
            return build.outcome, (await build.result()).digest, sorted(lines)

    answers = await asyncio.gather(*(caller() for _ in range(10)))
    found = await find_built(plan, cluster)

    assert sorted(a[0] for a in answers) == ["built"] + ["joined"] * 9
    assert len({a[1] for a in answers}) == 1
    assert all(a[2] == answers[0][2] for a in answers)
    assert any("rootless isolation" in line for line in answers[0][2])
    assert found is not None
    assert found.digest == answers[0][1]


@on_cluster
async def test_a_failing_step_in_a_pod_has_its_exit_code(
    cluster: ClusterSettings, make_repo: Callable[..., Repo], serve_repo: Callable[[Repo], str]
) -> None:
    """The same error as on the local engine, with the last lines."""
    repo = make_repo({"Dockerfile": f"FROM {FROM}\nRUN echo the reason; exit 7\n"})
    async with KubernetesHost(cluster) as host:
        build = await submit(host, plan_for(cluster, serve_repo(repo), repo.commit))
        with pytest.raises(BuildFailed) as raised:
            await build.result()

    assert raised.value.exit_code == 7
    assert "the reason" in raised.value.last_lines


@on_cluster
async def test_a_folder_of_this_machine_is_no_repository_for_a_cluster(cluster: ClusterSettings) -> None:
    """`file://` is refused before anything is created."""
    with pytest.raises(InvalidRequest, match="local engine"):
        plan_for(cluster, "file:///srv/repository", "a" * 40)


@on_cluster
async def test_the_rights_that_deploy_ships_are_enough(
    cluster: ClusterSettings,
    kubectl: Callable[..., str],
    make_repo: Callable[..., Repo],
    serve_repo: Callable[[Repo], str],
    tmp_path: Path,
) -> None:
    """A build works with nothing but a token of the worker's service account (S28)."""
    admin = json.loads(kubectl("config", "view", "--raw", "--minify", "--flatten", "--output=json"))
    token = kubectl("create", "token", "podbuild-worker", "--namespace", cluster.namespace)
    admin["users"] = [{"name": admin["contexts"][0]["context"]["user"], "user": {"token": token}}]
    kubeconfig = tmp_path / "worker.json"
    kubeconfig.write_text(json.dumps(admin))
    settings = replace(cluster, kubeconfig=str(kubeconfig))
    repo = make_repo({"Dockerfile": HELLO})

    async with KubernetesHost(settings) as host:
        build = await submit(host, plan_for(settings, serve_repo(repo), repo.commit))
        result = await build.result()
        pod = await host.read(build.name)
        assert pod is not None
        await host.delete(pod)

    assert result.outcome == "built"


@on_cluster
async def test_a_missing_right_is_named(cluster: ClusterSettings, kubectl: Callable[..., str], tmp_path: Path) -> None:
    """An account without any right gets the verb and the resource that it lacks (W8)."""
    admin = json.loads(kubectl("config", "view", "--raw", "--minify", "--flatten", "--output=json"))
    token = kubectl("create", "token", "default", "--namespace", cluster.namespace)
    admin["users"] = [{"name": admin["contexts"][0]["context"]["user"], "user": {"token": token}}]
    kubeconfig = tmp_path / "nobody.json"
    kubeconfig.write_text(json.dumps(admin))
    settings = replace(cluster, kubeconfig=str(kubeconfig))

    async with KubernetesHost(settings) as host:
        with pytest.raises(AccessDenied, match="get pods"):
            await submit(host, nowhere(settings))
