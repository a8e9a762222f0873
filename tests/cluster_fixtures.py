"""Fixtures for tests in a real cluster: settings, kubectl, and git repositories that its pods reach.

`make cluster` starts one and notes what it has. With KUBECONFIG in the environment that cluster is used
instead, and these variables say what it has:

PODBUILD_TEST_REGISTRY         `host:port` of a plain-HTTP registry that pods and this machine reach. Images of
                               docker.io are pulled from it too; it holds library/debian:trixie-slim.
PODBUILD_TEST_GIT              `http://host:port`, where a git server answers pods and this machine ...
PODBUILD_TEST_REPOSITORIES     ... and the folder of this machine that it serves.
PODBUILD_TEST_BUILDER_IMAGE    The builder image, as the cluster's nodes name it.
PODBUILD_TEST_PULL_POLICY      Its pull policy (IfNotPresent).
PODBUILD_TEST_SECCOMP_PROFILE  The profile's name on the nodes, or nothing if it is not installed.
PODBUILD_TEST_CA_CONFIG_MAP    A ConfigMap with a CA bundle, if builds need one.
PODBUILD_TEST_DNS_POLICY       The pods' DNS policy, if the cluster's usual one does not do.
PODBUILD_TEST_KUBECTL          The program, if it is not on PATH.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, NoReturn, cast

import pytest

from podbuild import ClusterSettings
from tests.engine import Repo, git

#: Set where a cluster is meant to be: then a test that has none fails.
REQUIRED = "PODBUILD_REQUIRE_CLUSTER"
#: What `make cluster` notes. It holds the variables above, and KUBECONFIG.
NOTES = Path(os.environ.get("PODBUILD_CLUSTER_RUN", "/run/podbuild-cluster")) / "environment"


@pytest.fixture(scope="session")
def cluster_has() -> Mapping[str, str]:
    """What there is to test with: the variables above. Without a cluster, tests are skipped visibly, or fail."""
    noted = dict(line.split("=", 1) for line in NOTES.read_text().splitlines()) if NOTES.exists() else {}
    own = noted if os.environ.get("KUBECONFIG", noted.get("KUBECONFIG")) == noted.get("KUBECONFIG") else {}
    has = {**own, **{k: v for k, v in os.environ.items() if k == "KUBECONFIG" or k.startswith("PODBUILD_TEST_")}}
    if not has.get("KUBECONFIG"):
        _give_up("There is no cluster here: run `make cluster`, or set KUBECONFIG.")
    needed = ("REGISTRY", "GIT", "REPOSITORIES", "BUILDER_IMAGE")
    if missing := [f"PODBUILD_TEST_{name}" for name in needed if not has.get(f"PODBUILD_TEST_{name}")]:
        _give_up(f"KUBECONFIG is set, but not {', '.join(missing)}: see {Path(__file__).name}.")
    has["PODBUILD_TEST_KUBECTL"] = has.get("PODBUILD_TEST_KUBECTL") or shutil.which("kubectl") or ""
    if not has["PODBUILD_TEST_KUBECTL"]:
        _give_up("There is no kubectl here.")
    done = _run_kubectl(has, "get", "--raw", "/readyz")
    if done.returncode != 0:
        _give_up(f"The cluster of {has['KUBECONFIG']} does not answer: {done.stderr.strip()}")
    return has


def _give_up(reason: str) -> NoReturn:
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def _run_kubectl(has: Mapping[str, str], *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [has["PODBUILD_TEST_KUBECTL"], f"--kubeconfig={has['KUBECONFIG']}", "--request-timeout=30s", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="session")
def cluster(cluster_has: Mapping[str, str]) -> ClusterSettings:
    """Settings for builds in the cluster. Every test run has a place of its own in the registry."""
    has = {name.removeprefix("PODBUILD_TEST_"): value for name, value in cluster_has.items()}
    policy = has.get("PULL_POLICY") or "IfNotPresent"
    return ClusterSettings(
        registry=f"{has['REGISTRY']}/t-{secrets.token_hex(4)}",
        plain_http_registries=(has["REGISTRY"],),
        mirrors=(("docker.io", has["REGISTRY"]),),
        builder_image=has["BUILDER_IMAGE"],
        kubeconfig=has["KUBECONFIG"],
        namespace="podbuild",
        image_pull_policy=cast(Literal["Always", "IfNotPresent", "Never"], policy),
        seccomp_profile=has.get("SECCOMP_PROFILE", ""),
        ca_config_map=has.get("CA_CONFIG_MAP", ""),
        dns_policy=has.get("DNS_POLICY", ""),
    )


@pytest.fixture(scope="session")
def kubectl(cluster_has: Mapping[str, str]) -> Callable[..., str]:
    """A function that runs kubectl as the cluster's administrator and returns what it prints.

    ``text`` is its input. With ``check=False`` a failure is no error, and what it complains of is returned too.
    """

    def call(*arguments: str, text: str = "", check: bool = True) -> str:
        done = _run_kubectl(cluster_has, *arguments, text=text)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip() if check else f"{done.stdout}{done.stderr}".strip()

    return call


@pytest.fixture(scope="session")
def serve_repo(cluster_has: Mapping[str, str]) -> Iterator[Callable[[Repo], str]]:
    """A function that puts a repository where pods reach it, as it is now, and returns its URL there."""
    folder = Path(cluster_has["PODBUILD_TEST_REPOSITORIES"])
    run = folder / f"t-{secrets.token_hex(4)}"
    run.mkdir()

    def serve(repo: Repo) -> str:
        served = run / f"{repo.path.name}.git"
        if served.exists():
            shutil.rmtree(served)
        git(run, "clone", "--quiet", "--bare", str(repo.path), str(served))
        return f"{cluster_has['PODBUILD_TEST_GIT']}/{served.relative_to(folder)}"

    yield serve
    shutil.rmtree(run)


@pytest.fixture(scope="session")
def kubeconfig_of(kubectl: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """A function that makes a kubeconfig with a token of a ServiceAccount: (namespace, account) to its path."""

    def make(namespace: str, account: str) -> str:
        view = json.loads(kubectl("config", "view", "--raw", "--flatten", "--minify", "--output=json"))
        token = kubectl("create", "token", account, f"--namespace={namespace}", "--duration=1h")
        view["users"] = [{"name": account, "user": {"token": token}}]
        view["contexts"][0]["context"].update(user=account, namespace=namespace)
        path = tmp_path_factory.mktemp("kubeconfig") / "config"
        path.write_text(json.dumps(view))
        path.chmod(0o600)
        return str(path)

    return make


@pytest.fixture(scope="session")
def worker_settings(cluster: ClusterSettings, kubeconfig_of: Callable[[str, str], str]) -> ClusterSettings:
    """The same settings with the rights that deploy/ gives a worker, and no more."""
    return replace(cluster, kubeconfig=kubeconfig_of("podbuild", "podbuild-worker"))
