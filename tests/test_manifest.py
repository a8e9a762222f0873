"""The pod's description: one whole golden, what each option and setting changes in it, and who sees a secret."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from podbuild.manifest import Isolation, Manifest, identity_of, pod_manifest, quantity, secret_files
from podbuild.names import parse_repository
from podbuild.plan import BuildOptions, Plan, canonical, parse_options, plan_build
from podbuild.settings import GitCredentials, HostSettings, LocalSettings, RegistryCredentials

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "https://git.example.org/team/app"
IMAGE = "registry.example.org/team/app:1"
SETTINGS = LocalSettings(registry="registry.example.org", builder_image="builder:1")
IDENTITY, HOW = "metadata.annotations.podbuild.io/identity", "metadata.annotations.podbuild.io/settings"


def plan_of(
    settings: HostSettings = SETTINGS, repo: str = REPOSITORY, commit: str = COMMIT, image: str = IMAGE, **options: Any
) -> Plan:
    """Return a plan that differs from the plain one only in what is given."""
    return plan_build(parse_repository(repo), commit, image, parse_options(options), settings)


def manifest_of(
    settings: HostSettings = SETTINGS,
    *,
    isolation: Isolation = "rootless",
    secret_name: str = "s-1",  # noqa: S107 - a name
    **plan: Any,
) -> Manifest:
    """Return the pod of such a plan."""
    return pod_manifest(plan_of(settings, **plan), settings, isolation=isolation, secret_name=secret_name)


# --- the whole --------------------------------------------------------------------------------------------


def test_the_whole_pod_of_a_plain_plan() -> None:
    """Every field of it is meant: whoever adds, drops or changes one says so here."""
    pod_mount = {"name": "pod", "mountPath": "/podbuild/pod", "readOnly": True}
    request = {
        "repository": REPOSITORY,
        "commit": COMMIT,
        "subdirectory": "",
        "builder": "auto",
        "dockerfile": "",
        "target": "",
        "build_args": {},
        "appendix": "",
        "extra_args": [],
        "platform": "",
    }
    request_hash = "6b735c78f929a61137f026d0377eb330eeba7bd5da9b9c0940e31678002b641e"
    settings = {
        "source": REPOSITORY,
        "url": REPOSITORY,
        "request": request_hash,
        "isolation": "rootless",
        "deadline_seconds": 3600.0,
        "size_limit": 20 * 2**30,
        "plain_http": [],
        "mirrors": [],
        "ca_bundle": False,
    }

    assert manifest_of() == {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "build-team-app-b3d8ec7242153c61f860",
            "labels": {
                "app.kubernetes.io/managed-by": "podbuild",
                "app.kubernetes.io/name": "podbuild-build",
                "podbuild.io/build": "b3d8ec7242153c61f8602a50bc985829eb9652efa2172bc516703e1df571",
                "podbuild.io/request": request_hash[:60],
            },
            "annotations": {
                "podbuild.io/identity": canonical({"request": request, "builder_image": "builder:1", "image": IMAGE}),
                "podbuild.io/settings": canonical(settings),
            },
        },
        "spec": {
            "restartPolicy": "Never",
            "hostUsers": False,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 3,
            "activeDeadlineSeconds": 3630,
            "schedulingGates": [{"name": "podbuild.io/secret"}],
            "nodeSelector": {},
            "tolerations": [],
            "containers": [
                {
                    "name": "courier",
                    "image": "builder:1",
                    "command": ["python3", "/opt/podbuild/courier.py"],
                    "terminationMessagePath": "/dev/termination-log",
                    "securityContext": {
                        "runAsUser": 0,
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "resources": {
                        "requests": {"cpu": "100m", "memory": "64Mi", "ephemeral-storage": "1Gi"},
                        "limits": {"cpu": "1", "memory": "1Gi", "ephemeral-storage": "20Gi"},
                    },
                    "volumeMounts": [
                        pod_mount,
                        {"name": "work", "mountPath": "/work"},
                        {"name": "secret", "mountPath": "/podbuild/secret", "readOnly": True},
                        {"name": "take", "mountPath": "/take"},
                        {"name": "courier-tmp", "mountPath": "/tmp"},
                    ],
                },
                {
                    "name": "build",
                    "image": "builder:1",
                    "command": ["python3", "/opt/podbuild/build.py"],
                    "terminationMessagePath": "/dev/termination-log",
                    "securityContext": {
                        "runAsUser": 0,
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"], "add": ["SETUID", "SETGID", "SETFCAP"]},
                        "procMount": "Unmasked",
                    },
                    "resources": {
                        "requests": {"cpu": "100m", "memory": "512Mi", "ephemeral-storage": "1Gi"},
                        "limits": {"cpu": "2", "memory": "4Gi", "ephemeral-storage": "20Gi"},
                    },
                    "volumeMounts": [
                        pod_mount,
                        {"name": "work", "mountPath": "/work"},
                        {"name": "storage", "mountPath": "/var/lib/containers"},
                        {"name": "run", "mountPath": "/run/containers"},
                        {"name": "build-tmp", "mountPath": "/tmp"},
                    ],
                },
            ],
            "volumes": [
                {
                    "name": "pod",
                    "downwardAPI": {
                        "items": [
                            {
                                "path": "identity",
                                "fieldRef": {"fieldPath": "metadata.annotations['podbuild.io/identity']"},
                            },
                            {
                                "path": "settings",
                                "fieldRef": {"fieldPath": "metadata.annotations['podbuild.io/settings']"},
                            },
                        ]
                    },
                },
                {"name": "secret", "secret": {"secretName": "s-1", "defaultMode": 0o400}},
                {"name": "work", "emptyDir": {}},
                {"name": "take", "emptyDir": {}},
                {"name": "storage", "emptyDir": {}},
                {"name": "run", "emptyDir": {}},
                {"name": "courier-tmp", "emptyDir": {"medium": "Memory"}},
                {"name": "build-tmp", "emptyDir": {"medium": "Memory"}},
            ],
        },
    }


# --- what changes it --------------------------------------------------------------------------------------

#: What another build differs in besides the option itself.
NAMES = {
    "metadata.name",
    "metadata.labels.podbuild.io/build",
    "metadata.labels.podbuild.io/request",
    f"{HOW}.request",
}
BUILD, COURIER = "spec.containers.build", "spec.containers.courier"

#: Option → another value, and every place in the pod that it changes.
OPTIONS: dict[str, tuple[Any, set[str]]] = {
    "subdirectory": ("app", NAMES | {f"{IDENTITY}.request.subdirectory"}),
    "builder": ("dockerfile", NAMES | {f"{IDENTITY}.request.builder"}),
    "dockerfile": ("Dockerfile.prod", NAMES | {f"{IDENTITY}.request.dockerfile"}),
    "build_args": ({"A": "1"}, NAMES | {f"{IDENTITY}.request.build_args.A"}),
    "target": ("final", NAMES | {f"{IDENTITY}.request.target"}),
    "appendix": ("RUN true", NAMES | {f"{IDENTITY}.request.appendix"}),
    "extra_args": (["--squash"], NAMES | {f"{IDENTITY}.request.extra_args.0"}),
    "platform": ("linux/arm64", NAMES | {f"{IDENTITY}.request.platform"}),
    "cpu": ("500m", {f"{BUILD}.resources.limits.cpu"}),
    "memory_request": ("1Gi", {f"{BUILD}.resources.requests.memory"}),
    "memory_limit": ("8Gi", {f"{BUILD}.resources.limits.memory"}),
    "storage_limit": (
        "1Ti",
        {f"{c}.resources.limits.ephemeral-storage" for c in (BUILD, COURIER)} | {f"{HOW}.size_limit"},
    ),
    "timeout_minutes": (0.5, {"spec.activeDeadlineSeconds", f"{HOW}.deadline_seconds"}),
    "node_selector": ({"disk": "fast"}, {"spec.nodeSelector.disk"}),
    "tolerations": ([{"key": "builds"}], {"spec.tolerations.0.key"}),
    "log_tail_lines": (10, set()),
    "if_unknown": ("build", set()),
    "rebuild": (True, set()),
}

#: Setting → another value, and every place in the pod that it changes, where the image is named.
HOST: dict[str, tuple[Any, set[str]]] = {
    "registry": ("other.example.org", set()),
    "builder_image": (
        "builder:2",
        {"metadata.name", "metadata.labels.podbuild.io/build", f"{IDENTITY}.builder_image"}
        | {f"{c}.image" for c in (BUILD, COURIER)},
    ),
    "registry_credentials": ((RegistryCredentials(host="registry.example.org", username="u", password="p"),), set()),
    "git_credentials": ((GitCredentials(host="git.example.org", username="u", password="p"),), set()),
    "plain_http_registries": (("h:5000",), {f"{HOW}.plain_http.0"}),
    "mirrors": ((("docker.io", "h:5000"),), {f"{HOW}.mirrors.0.0", f"{HOW}.mirrors.0.1"}),
    "allowed_repositories": (("*",), set()),
    "engine": ("podman", set()),
    "network": ("host", set()),
    "ca_bundle": ("/etc/ssl/bundle.pem", {f"{HOW}.ca_bundle"}),
    "state_folder": ("/srv/podbuild", set()),
}


def places(value: Any, path: str = "") -> dict[str, Any]:
    """Return every leaf of a manifest by its path; lists of named things by name, annotations by their content."""
    if path in (IDENTITY, HOW) and isinstance(value, str):
        value = json.loads(value)
    if isinstance(value, list):
        value = {str(v["name"]) if isinstance(v, dict) and "name" in v else str(n): v for n, v in enumerate(value)}
    if not isinstance(value, dict):
        return {path: value}
    inner = [places(v, f"{path}.{k}" if path else k) for k, v in value.items()]
    return {k: v for part in inner for k, v in part.items()}


def changes(one: Manifest, other: Manifest) -> set[str]:
    """Return the places in which two manifests differ."""
    return {path for path, _ in places(one).items() ^ places(other).items()}


def test_every_option_and_setting_is_in_the_tables() -> None:
    """Whoever adds one says what it changes in the pod."""
    assert OPTIONS.keys() == BuildOptions.model_fields.keys()
    assert HOST.keys() == {f.name for f in fields(LocalSettings)}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_changes_exactly_this(option: str) -> None:
    """Nothing else in the pod depends on it."""
    value, where = OPTIONS[option]

    assert changes(manifest_of(), manifest_of(**{option: value})) == where


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_is_written_out_is_the_same_as_its_default(option: str) -> None:
    """Whoever joins is not told of other limits only because a form sends every field."""
    default = BuildOptions.model_fields[option].get_default(call_default_factory=True)

    assert manifest_of(**{option: default}) == manifest_of()
    assert json.dumps(manifest_of(**{option: default})) == json.dumps(manifest_of())


@pytest.mark.parametrize("setting", HOST)
def test_a_setting_of_the_host_changes_exactly_this(setting: str) -> None:
    """Nothing else in the pod depends on it."""
    value, where = HOST[setting]

    assert changes(manifest_of(), manifest_of(replace(SETTINGS, **{setting: value}))) == where


def test_what_is_built_and_where_it_goes_changes_exactly_this() -> None:
    """Another commit is another request; another image is the same request with another name."""
    plain = manifest_of()

    assert changes(plain, manifest_of(commit="f" * 40)) == NAMES | {f"{IDENTITY}.request.commit"}
    assert changes(plain, manifest_of(image="h.example.org/app:1")) == {
        "metadata.name",
        "metadata.labels.podbuild.io/build",
        f"{IDENTITY}.image",
    }


def test_how_the_host_runs_it_changes_exactly_this() -> None:
    """/proc is unmasked for rootless isolation alone, and in `build` alone; a Secret's name is in one place."""
    plain = manifest_of()

    assert changes(plain, manifest_of(isolation="chroot")) == {
        f"{BUILD}.securityContext.procMount",
        f"{HOW}.isolation",
    }
    assert changes(plain, manifest_of(secret_name="s-2")) == {"spec.volumes.secret.secret.secretName"}


def test_a_local_folder_is_mounted_into_courier_alone() -> None:
    """Read-only, at a place of its own; the steps see only the checkout."""
    manifest = manifest_of(repo="file:///srv/git/app")
    courier = manifest["spec"]["containers"][0]

    assert changes(manifest_of(), manifest) == NAMES | {
        f"{IDENTITY}.request.repository",
        f"{HOW}.source",
        f"{HOW}.url",
        f"{COURIER}.volumeMounts.repository.name",
        f"{COURIER}.volumeMounts.repository.mountPath",
        f"{COURIER}.volumeMounts.repository.readOnly",
        "spec.volumes.repository.name",
        "spec.volumes.repository.hostPath.path",
        "spec.volumes.repository.hostPath.type",
    }
    assert manifest["spec"]["volumes"][-1]["hostPath"] == {"path": "/srv/git/app", "type": "Directory"}
    assert courier["volumeMounts"][-1]["readOnly"] is True
    assert places(manifest)[f"{HOW}.url"] == "file:///podbuild/repository"


# --- secrets ----------------------------------------------------------------------------------------------

SECRETIVE = replace(
    SETTINGS,
    git_credentials=(
        GitCredentials(host="GIT.example.org", path="/team/", username="robot", password="canary-git"),
        GitCredentials(
            host="git.example.org", path="lib", ssh_key="canary-key", known_hosts="git.example.org ssh-rsa A"
        ),
        GitCredentials(host="git.example.org:8443", password="canary-port"),
        GitCredentials(host="other.example.org", password="canary-other"),
    ),
    registry_credentials=(
        RegistryCredentials(host="other.example.org", username="o", password="canary-other"),
        RegistryCredentials(host="Registry.example.org", username="robot", password="canary-registry"),
    ),
)


def test_a_secret_holds_the_logins_of_one_git_server_and_one_registry() -> None:
    """All that a build needs, submodules beside the repository included, and no other server's."""
    files = {name: json.loads(content) for name, content in secret_files(SECRETIVE, plan_of(SECRETIVE)).items()}

    assert files == {
        "git.json": [
            {
                "host": "GIT.example.org",
                "path": "team",
                "username": "robot",
                "password": "canary-git",
                "ssh_key": "",
                "known_hosts": "",
            },
            {
                "host": "git.example.org",
                "path": "lib",
                "username": "",
                "password": "",
                "ssh_key": "canary-key",
                "known_hosts": "git.example.org ssh-rsa A",
            },
        ],
        "registry.json": [{"host": "Registry.example.org", "username": "robot", "password": "canary-registry"}],
    }


@pytest.mark.parametrize(
    ("repo", "image", "files"),
    [
        pytest.param("https://elsewhere.example.org/a", "h.example.org/a:1", set(), id="no login for either"),
        pytest.param("file:///srv/git/a", IMAGE, {"registry.json"}, id="a folder needs no git login"),
        pytest.param(REPOSITORY, "registry.example.org:5000/a:1", {"git.json"}, id="another port, another registry"),
        pytest.param("https://git.example.org:8443/a", IMAGE, {"git.json", "registry.json"}, id="a server with a port"),
    ],
)
def test_a_secret_holds_no_file_that_is_not_needed(repo: str, image: str, files: set[str]) -> None:
    """A login goes only where its own server is used; the same name with another port is another server."""
    content = secret_files(SECRETIVE, plan_of(SECRETIVE, repo=repo, image=image))

    assert content.keys() == files
    assert b"canary-other" not in b"".join(content.values())
    assert (b"canary-port" in content.get("git.json", b"")) is (":8443" in repo)


def test_no_secret_is_in_the_pod() -> None:
    """Whoever may read pods reads no login: they are in the Secret alone."""
    assert SECRETIVE.secrets()
    assert "canary" not in json.dumps(manifest_of(SECRETIVE))


@pytest.mark.parametrize("repo", [REPOSITORY, "file:///srv/git/app"])
@pytest.mark.parametrize("isolation", ["rootless", "chroot"])
def test_the_container_that_runs_the_steps_shares_two_folders_with_courier(repo: str, isolation: Isolation) -> None:
    """Not the secret, not what is taken over, not courier's own files; and it may not write the request."""
    manifest = manifest_of(repo=repo, isolation=isolation)
    courier, build = ({m["name"]: m for m in c["volumeMounts"]} for c in manifest["spec"]["containers"])

    assert courier.keys() & build.keys() == {"pod", "work"}
    assert build["pod"]["readOnly"] is True
    assert not {"secret", "take", "courier-tmp", "repository"} & build.keys()
    assert {v["name"] for v in manifest["spec"]["volumes"]} == courier.keys() | build.keys()
    assert not any("env" in c or "envFrom" in c for c in manifest["spec"]["containers"])


# --- small ones -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2", 2),
        ("0.5", 0.5),
        ("500m", 0.5),
        ("64Mi", 64 * 2**20),
        ("2Gi", 2147483648),
        ("1Ki", 1024),
        ("1Ti", 2**40),
        ("1k", 1000),
        ("1.5M", 1_500_000),
        ("3G", 3_000_000_000),
        ("1T", 10**12),
    ],
)
def test_a_quantity_is_a_number(text: str, number: float) -> None:
    """Every unit that options accept, binary ones and decimal ones."""
    assert quantity(text) == number


@pytest.mark.parametrize(
    ("metadata", "identity"),
    [
        pytest.param({}, "", id="no annotations"),
        pytest.param({"annotations": None}, "", id="null"),
        pytest.param({"annotations": {"x": "y"}}, "", id="others only"),
        pytest.param({"annotations": {"podbuild.io/identity": 5}}, "", id="a number"),
        pytest.param({"annotations": {"podbuild.io/identity": "{}"}}, "{}", id="ours"),
    ],
)
def test_a_foreign_pod_has_no_identity(metadata: dict[str, Any], identity: str) -> None:
    """A pod that only has the name is told apart, and nothing breaks on it."""
    assert identity_of({"metadata": metadata}) == identity


def test_the_pod_carries_the_identity_that_callers_compare() -> None:
    """What the hashes were made of, in the one spelling of it."""
    plan = plan_of(build_args={"B": "ü", "A": "1"})

    assert identity_of(pod_manifest(plan, SETTINGS, isolation="rootless", secret_name="s")) == canonical(plan.identity)


@pytest.mark.parametrize("minutes", [0.001, 0.01, 1 / 3, 60, 1440])
def test_the_hosts_deadline_leaves_the_programs_time_to_report(minutes: float) -> None:
    """The programs end first, and the pod's own deadline is a whole number of seconds, as Kubernetes wants it."""
    found = places(manifest_of(timeout_minutes=minutes))

    assert type(found["spec.activeDeadlineSeconds"]) is int
    assert 29 < found["spec.activeDeadlineSeconds"] - found[f"{HOW}.deadline_seconds"] <= 30
    assert found[f"{HOW}.deadline_seconds"] > 0


def test_a_request_is_never_above_its_limit() -> None:
    """Small limits lower the requests: Kubernetes refuses a pod that asks for more than it may use."""
    build = manifest_of(memory_limit="100Mi", storage_limit="500Mi", cpu="50m")["spec"]["containers"][1]

    assert build["resources"]["requests"] == {"cpu": "50m", "memory": "100Mi", "ephemeral-storage": "500Mi"}
