"""What `deploy/` ships: it parses, it grants no more than the host needs, and it says what the code does."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped] # comes with Prefect

from podbuild.hosts.local import SECCOMP_PROFILE
from podbuild.manifest import MANAGED_BY

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
