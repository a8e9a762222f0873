"""The pod of a build, as Kubernetes spells it: plan and settings in, plain dicts out. Pure.

The pod is described once, here. A cluster gets it as it is; the local engine runs the same dict
with podman or docker. Two containers: `courier` holds the credentials and never runs anything from
the repository; `build` runs the repository's steps and holds no credential.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from podbuild.plan import Plan, canonical
from podbuild.settings import HostSettings

Manifest = dict[str, Any]
Isolation = Literal["rootless", "chroot"]

MANAGED_BY = {"app.kubernetes.io/managed-by": "podbuild", "app.kubernetes.io/name": "podbuild-build"}
LABEL_BUILD = "podbuild.io/build"
LABEL_REQUEST = "podbuild.io/request"
#: The identity: equal for every caller of one build, compared before anybody joins.
IDENTITY = "podbuild.io/identity"
#: How the build is done: may differ between callers; the first one's is used.
SETTINGS = "podbuild.io/settings"
#: The scheduling gate that holds a pod back until its Secret is there.
GATE = "podbuild.io/secret"
#: The Secret's volume, in `courier` only.
SECRET_VOLUME = "secret"  # noqa: S105 - a volume's name
#: The label every image of ours carries: what it was asked for, so that a tag can be trusted.
REQUEST_LABEL = "io.podbuild.request"

#: Where `courier` sees a repository that is a folder of this machine.
REPOSITORY_PATH = "/podbuild/repository"
GRACE_SECONDS = 3
#: Label values have at most 63 characters; 60 hex digits are 240 bits.
_LABEL_DIGITS = 60
#: Added to the build's own deadline before the host ends the pod, so that the programs can say why.
_DEADLINE_MARGIN_SECONDS = 30
_UNITS = {"": 1, "m": 0.001, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip


def quantity(text: str) -> float:
    """Return the number behind a Kubernetes quantity: ``500m`` is 0.5, ``2Gi`` is 2147483648."""
    number = text.rstrip("mkKMGTi")
    return float(number) * _UNITS[text[len(number) :]]


def pod_manifest(plan: Plan, settings: HostSettings, *, isolation: Isolation, secret_name: str) -> Manifest:
    """Return the pod that carries out a plan.

    ``secret_name`` names the Secret that `secret_files` goes into; it holds a nonce, so that no pod
    ever sees another's. ``isolation`` is what the host can give the repository's steps:
    ``rootless`` (their own mounts and processes) or ``chroot``.
    """
    options = plan.options
    deadline = round(float(options.timeout_minutes) * 60, 3)
    unmasked = {"procMount": "Unmasked"} if isolation == "rootless" else {}
    pod = {"name": "pod", "mountPath": "/podbuild/pod", "readOnly": True}
    work = {"name": "work", "mountPath": "/work"}
    volumes: list[dict[str, Any]] = [
        {
            "name": "pod",
            "downwardAPI": {"items": [_annotation("identity", IDENTITY), _annotation("settings", SETTINGS)]},
        },
        {"name": SECRET_VOLUME, "secret": {"secretName": secret_name, "defaultMode": 0o400}},
        *({"name": name, "emptyDir": {}} for name in ("work", "take", "storage", "run")),
        *({"name": name, "emptyDir": {"medium": "Memory"}} for name in ("courier-tmp", "build-tmp")),
    ]
    courier_mounts: list[dict[str, Any]] = [
        pod,
        work,
        {"name": SECRET_VOLUME, "mountPath": "/podbuild/secret", "readOnly": True},
        {"name": "take", "mountPath": "/take"},
        {"name": "courier-tmp", "mountPath": "/tmp"},  # noqa: S108 - inside the container
    ]
    if plan.repository.scheme == "file":
        volumes.append({"name": "repository", "hostPath": {"path": plan.repository.path, "type": "Directory"}})
        courier_mounts.append({"name": "repository", "mountPath": REPOSITORY_PATH, "readOnly": True})
    courier = {
        "name": "courier",
        "image": plan.builder_image,
        "command": ["python3", "/opt/podbuild/courier.py"],
        "terminationMessagePath": "/dev/termination-log",
        "securityContext": {
            "runAsUser": 0,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": _resources("1", "64Mi", "1Gi", options.storage_limit),
        "volumeMounts": courier_mounts,
    }
    build = {
        "name": "build",
        "image": plan.builder_image,
        "command": ["python3", "/opt/podbuild/build.py"],
        "terminationMessagePath": "/dev/termination-log",
        "securityContext": {
            "runAsUser": 0,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"], "add": ["SETUID", "SETGID", "SETFCAP"]},
            **unmasked,
        },
        "resources": _resources(options.cpu, options.memory_request, options.memory_limit, options.storage_limit),
        "volumeMounts": [
            pod,
            work,
            {"name": "storage", "mountPath": "/var/lib/containers"},
            {"name": "run", "mountPath": "/run/containers"},
            {"name": "build-tmp", "mountPath": "/tmp"},  # noqa: S108 - inside the container
        ],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": plan.name,
            "labels": {
                **MANAGED_BY,
                LABEL_BUILD: plan.build[:_LABEL_DIGITS],
                LABEL_REQUEST: plan.request[:_LABEL_DIGITS],
            },
            "annotations": {
                IDENTITY: canonical(plan.identity),
                SETTINGS: canonical(_settings(plan, settings, isolation, deadline)),
            },
        },
        "spec": {
            "restartPolicy": "Never",
            "hostUsers": False,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "activeDeadlineSeconds": int(deadline) + _DEADLINE_MARGIN_SECONDS,
            "schedulingGates": [{"name": GATE}],
            "nodeSelector": dict(options.node_selector),
            "tolerations": [dict(t) for t in options.tolerations],
            "containers": [courier, build],
            "volumes": volumes,
        },
    }


def secret_files(settings: HostSettings, plan: Plan) -> dict[str, bytes]:
    """Return the files that only `courier` sees: the logins this build needs, and no others.

    Git credentials go in for the repository's own server (submodules may live beside it), the
    registry's login for the target's registry.
    """
    files = {}
    git = [c for c in settings.git_credentials if c.host.lower() == plan.repository.host.lower()]
    if git:
        files["git.json"] = json.dumps(
            [
                {
                    "host": c.host,
                    "path": c.path.strip("/"),
                    "username": c.username,
                    "password": c.password,
                    "ssh_key": c.ssh_key,
                    "known_hosts": c.known_hosts,
                }
                for c in git
            ]
        ).encode()
    if login := settings.registry_credentials_for(plan.image.registry):
        entry = {"host": login.host, "username": login.username, "password": login.password}
        files["registry.json"] = json.dumps([entry]).encode()
    return files


def identity_of(manifest: Mapping[str, Any]) -> str:
    """Return the identity a pod carries, or "" for a pod that is not one of ours."""
    annotations = manifest["metadata"].get("annotations") or {}
    identity = annotations.get(IDENTITY, "")
    return identity if isinstance(identity, str) else ""


def _settings(plan: Plan, settings: HostSettings, isolation: Isolation, deadline: float) -> dict[str, Any]:
    is_file = plan.repository.scheme == "file"
    return {
        "source": plan.repository.url,
        "url": f"file://{REPOSITORY_PATH}" if is_file else plan.repository.url,
        "request": plan.request,
        "isolation": isolation,
        "deadline_seconds": deadline,
        "size_limit": int(quantity(plan.options.storage_limit)),
        "plain_http": list(settings.plain_http_registries),
        "mirrors": [list(m) for m in settings.mirrors],
        "ca_bundle": settings.brings_certificates,
    }


def _annotation(path: str, annotation: str) -> dict[str, Any]:
    return {"path": path, "fieldRef": {"fieldPath": f"metadata.annotations['{annotation}']"}}


def _resources(cpu: str, memory_request: str, memory_limit: str, storage_limit: str) -> dict[str, Any]:
    """Return requests and limits. A request is never above its limit, which Kubernetes would refuse."""
    return {
        # Without a request of its own, Kubernetes would set a limit aside on the node as a whole.
        "requests": {
            "cpu": min("100m", cpu, key=quantity),
            "memory": min(memory_request, memory_limit, key=quantity),
            "ephemeral-storage": min("1Gi", storage_limit, key=quantity),
        },
        "limits": {"cpu": cpu, "memory": memory_limit, "ephemeral-storage": storage_limit},
    }
