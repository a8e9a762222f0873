"""What `deploy/` ships: it parses, it grants no more than the host needs, and it says what the code does."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Iterator, Set
from copy import deepcopy
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped] # comes with Prefect

from podbuild import AccessDenied, ClusterSettings, parse_options, parse_repository, plan_build
from podbuild.hosts.kubernetes import KubernetesHost
from podbuild.hosts.local import SECCOMP_PROFILE
from podbuild.manifest import MANAGED_BY, pod_manifest

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
#: Everything `KubernetesHost` asks for. A verb more is a right that nobody needs.
RIGHTS = {
    ("pods", "create"),
    ("pods", "get"),
    ("pods", "list"),
    ("pods", "patch"),
    ("pods", "delete"),
    ("pods/log", "get"),
    ("secrets", "create"),
}


def shipped() -> dict[str, dict[str, Any]]:
    """Return every object of the base by its kind; there is one of each."""
    listed = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())["resources"]
    objects = [made for name in listed for made in yaml.safe_load_all((DEPLOY / name).read_text())]
    by_kind = {made["kind"]: made for made in objects}
    assert len(by_kind) == len(objects)
    return by_kind


def test_every_file_is_part_of_the_base() -> None:
    """A file that nobody lists would be applied by nobody."""
    listed = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())["resources"]

    assert sorted(listed) == sorted(f.name for f in DEPLOY.glob("*.yaml") if f.name != "kustomization.yaml")
    assert set(shipped()) == {
        "Namespace",
        "ServiceAccount",
        "Role",
        "RoleBinding",
        "ResourceQuota",
        "LimitRange",
        "NetworkPolicy",
    }


def test_the_role_has_the_fewest_verbs() -> None:
    """Nothing but what the host asks for, in the core group alone, and the worker's account has exactly that Role."""
    objects = shipped()
    rules, binding = objects["Role"]["rules"], objects["RoleBinding"]
    granted = [(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]]

    assert sorted(granted) == sorted(RIGHTS)
    assert all(rule["apiGroups"] == [""] for rule in rules)
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == ("Role", objects["Role"]["metadata"]["name"])
    account = objects["ServiceAccount"]["metadata"]["name"]
    assert [(s["kind"], s["name"]) for s in binding["subjects"]] == [("ServiceAccount", account)]


def test_the_namespace_enforces_baseline() -> None:
    """Pods weaker than ours are not let in."""
    labels = shipped()["Namespace"]["metadata"]["labels"]

    assert labels["pod-security.kubernetes.io/enforce"] == "baseline"
    assert labels["pod-security.kubernetes.io/enforce-version"] == "latest"


def test_the_seccomp_profile_is_the_local_engines() -> None:
    """One profile, wherever builds run."""
    assert (DEPLOY / "podbuild.json").read_bytes() == SECCOMP_PROFILE.read_bytes()


@pytest.mark.parametrize("address", ["169.254.169.254", "fd00:ec2::254", "168.63.129.16", "100.100.100.200"])
def test_no_rule_lets_builds_reach_a_metadata_service(address: str) -> None:
    """Every address that a cloud keeps its metadata service at is an exception, in all rules."""
    policy = shipped()["NetworkPolicy"]["spec"]
    blocks = [peer["ipBlock"] for rule in policy["egress"] for peer in rule["to"] if "ipBlock" in peer]
    metadata = ip_address(address)

    def within(cidr: str) -> bool:
        network = ip_network(cidr)
        return network.version == metadata.version and metadata in network

    assert blocks
    assert not [b for b in blocks if within(b["cidr"]) and not any(within(e) for e in b["except"])]


def test_nothing_reaches_builds() -> None:
    """The policy selects exactly what the manifest labels as a build, and lets nothing in."""
    policy = shipped()["NetworkPolicy"]["spec"]

    assert policy["podSelector"]["matchLabels"] == MANAGED_BY
    assert policy["ingress"] == []
    assert policy["policyTypes"] == ["Ingress", "Egress"]


# --- on a real cluster --------------------------------------------------------------------------------------


def rights_of(kubectl: Callable[..., str], kubeconfig: str, namespace: str) -> set[tuple[str, str]]:
    """Return what the API server lets a token do in a namespace with objects of the core group."""
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview"}
    asked = json.dumps({**review, "spec": {"namespace": namespace}})
    path = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
    answer = json.loads(kubectl(f"--kubeconfig={kubeconfig}", "create", f"--raw={path}", "--filename=-", text=asked))
    core = [rule for rule in answer["status"]["resourceRules"] if rule["apiGroups"] == [""]]
    return {(resource, verb) for rule in core for resource in rule["resources"] for verb in rule["verbs"]}


async def use_every_right(settings: ClusterSettings) -> bytes:
    """Do once what a build does with the API server, with a pod that only prints; return what it printed."""
    repository = parse_repository("https://git.invalid/team/app")
    plan = plan_build(repository, secrets.token_hex(20), None, parse_options({}), settings)
    secret_name = f"{plan.name}-{secrets.token_hex(8)}"
    manifest = pod_manifest(plan, settings, isolation=settings.isolation, secret_name=secret_name)
    for container in manifest["spec"]["containers"]:
        container["command"] = ["echo", "hello"]
    async with KubernetesHost(settings) as host:
        pod = await host.create(manifest, {})
        while pod["status"].get("phase") != "Succeeded":
            await asyncio.sleep(0.2)
            found = await host.read(plan.name)
            assert found is not None and found["status"].get("phase") != "Failed"
            pod = found
        printed = b"".join([chunk async for chunk in host.log(pod, "build")])
        assert len(await host.find(pod["metadata"]["labels"])) == 1
        await host.delete(pod)
    return printed


@pytest.mark.cluster
async def test_the_role_is_enough_and_no_more(worker_settings: ClusterSettings, kubectl: Callable[..., str]) -> None:
    """A token of the worker's account does all that a build needs; the API server lists those rights and no other."""
    printed = await use_every_right(worker_settings)

    assert printed.endswith(b" hello\n")
    assert rights_of(kubectl, worker_settings.kubeconfig, "podbuild") == RIGHTS
    assert rights_of(kubectl, worker_settings.kubeconfig, "default") == set()


@pytest.mark.cluster
@pytest.mark.parametrize(
    "command",
    [
        "get secrets",
        "get secret/any",
        "exec any -- true",
        "create --raw=/api/v1/namespaces/podbuild/pods/any/portforward --filename=/dev/null",
        "attach any",
        "debug any --image=any",
        "get configmaps",
        "get nodes",
        "get pods --all-namespaces",
        "create token podbuild-worker",
    ],
)
def test_the_workers_token_is_refused(
    worker_settings: ClusterSettings, kubectl: Callable[..., str], command: str
) -> None:
    """Nobody with it runs a program in a build's pod, or reads what it holds."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "any", "namespace": "podbuild"},
        "spec": {"schedulingGates": [{"name": "podbuild.io/test"}], "containers": [{"name": "a", "image": "any"}]},
    }
    kubectl("apply", "--filename=-", text=json.dumps(pod))
    try:
        said = kubectl(f"--kubeconfig={worker_settings.kubeconfig}", *command.split(), check=False)
    finally:
        kubectl("delete", "pod", "any", "--namespace=podbuild", "--wait=false")

    assert "is forbidden: User" in said


@pytest.fixture
def with_rights(
    cluster: ClusterSettings, kubectl: Callable[..., str], kubeconfig_of: Callable[[str, str], str]
) -> Iterator[Callable[[Set[tuple[str, str]]], ClusterSettings]]:
    """A function that gives settings for a namespace like ours, where the worker has only some of the rights."""
    namespace = f"podbuild-t-{secrets.token_hex(4)}"

    def make(rights: Set[tuple[str, str]]) -> ClusterSettings:
        objects = deepcopy(shipped())
        objects["Namespace"]["metadata"]["name"] = namespace
        objects["Role"]["rules"] = [{"apiGroups": [""], "resources": [r], "verbs": [v]} for r, v in sorted(rights)]
        objects["RoleBinding"]["subjects"][0]["namespace"] = namespace
        kubectl("create", "--filename=-", text=json.dumps(objects["Namespace"]))
        for kind in ("ServiceAccount", "Role", "RoleBinding"):
            kubectl("create", f"--namespace={namespace}", "--filename=-", text=json.dumps(objects[kind]))
        kubectl("wait", f"--namespace={namespace}", "--for=create", "serviceaccount/default", "--timeout=30s")
        account = objects["ServiceAccount"]["metadata"]["name"]
        settings = replace(cluster, namespace=namespace, kubeconfig=kubeconfig_of(namespace, account), ca_config_map="")
        # The API server hears of a new Role a moment later.
        while rights_of(kubectl, settings.kubeconfig, namespace) != rights:
            pass
        return settings

    yield make
    kubectl("delete", "namespace", namespace, "--wait=false")


@pytest.mark.cluster
@pytest.mark.parametrize(("resource", "verb"), sorted(RIGHTS - {("pods/log", "get")}))
async def test_without_one_of_its_rights_the_host_says_which(
    with_rights: Callable[[Set[tuple[str, str]]], ClusterSettings], resource: str, verb: str
) -> None:
    """No right is there for nothing, and the error names what is missing."""
    settings = with_rights(RIGHTS - {(resource, verb)})

    with pytest.raises(AccessDenied, match=f"does not let us {verb} {resource}"):
        await use_every_right(settings)


@pytest.mark.cluster
async def test_without_the_right_to_logs_there_are_none(
    with_rights: Callable[[Set[tuple[str, str]]], ClusterSettings],
) -> None:
    """The one right that a build goes on without."""
    settings = with_rights(RIGHTS - {("pods/log", "get")})

    assert await use_every_right(settings) == b""
