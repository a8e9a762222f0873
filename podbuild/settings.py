"""What an operator decides, as plain data: credentials, and where and how pods run.

Nothing here does I/O. Prefect blocks turn themselves into these; programs without Prefect make
them directly. Secret fields never show in ``repr()``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal


def _plain(path: str) -> str:
    """Return a repository's path without what spellings differ in."""
    return path.strip("/").removesuffix(".git").rstrip("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class GitCredentials:
    """Who we are for one git server, or for one path on it.

    ``host`` is ``name`` or ``name:port``; ``path`` limits the credentials to repositories whose
    path starts with it (whole components: ``acme`` covers ``acme/app``, not ``acme-labs/app``).
    ``password`` is a password or a token. ``ssh_key`` and ``known_hosts`` are file contents.
    """

    host: str
    path: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    ssh_key: str = field(default="", repr=False)
    known_hosts: str = ""

    def covers(self, host: str, path: str) -> bool:
        """Return whether these credentials are meant for this host and repository path."""
        wanted = _plain(self.path)
        offered = _plain(path)
        return self.host.lower() == host.lower() and (
            not wanted or offered == wanted or offered.startswith(wanted + "/")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryCredentials:
    """Who we are for one registry. ``host`` is ``name`` or ``name:port``, as images name it."""

    host: str
    username: str = ""
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSettings:
    """What every kind of host needs to know.

    One host is one trust domain: who may use it may join its builds and read their logs.
    """

    #: Where images go whose name is not given: ``registry`` or ``registry/prefix``.
    registry: str = ""
    #: The image that both containers of a build run.
    builder_image: str = "localhost/podbuild-builder:1"
    registry_credentials: tuple[RegistryCredentials, ...] = ()
    git_credentials: tuple[GitCredentials, ...] = ()
    #: Registries (``host[:port]``) that speak plain HTTP. All others must speak TLS.
    plain_http_registries: tuple[str, ...] = ()
    #: Where base images are pulled from instead: registry → registry, as ``FROM`` names the first.
    mirrors: tuple[tuple[str, str], ...] = ()
    #: Glob patterns ``host/path`` of the repositories that may be built. Empty: all.
    allowed_repositories: tuple[str, ...] = ()

    @property
    def brings_certificates(self) -> bool:
        """Whether containers get a CA bundle of this host's, which steps then get too."""
        return False

    @property
    def sees_folders(self) -> bool:
        """Whether a repository may be a folder of the machine that asks (`file://`)."""
        return False

    def git_credentials_for(self, host: str, path: str) -> GitCredentials | None:
        """Return the credentials with the longest matching path, or None."""
        fitting = [c for c in self.git_credentials if c.covers(host, path)]
        return max(fitting, key=lambda c: len(c.path), default=None)

    def registry_credentials_for(self, host: str) -> RegistryCredentials | None:
        """Return the credentials for exactly this registry, or None."""
        return next((c for c in self.registry_credentials if c.host.lower() == host.lower()), None)

    def allows(self, host: str, path: str) -> bool:
        """Return whether a repository may be built here. ``*`` in a pattern matches ``/`` too."""
        name = f"{host}/{_plain(path)}".lower()
        return not self.allowed_repositories or any(
            fnmatchcase(name, _plain(pattern).lower()) for pattern in self.allowed_repositories
        )

    def secrets(self) -> tuple[str, ...]:
        """Return every secret value held here, for redaction. Multi-line keys come line by line."""
        values = [c.password for c in self.registry_credentials]
        for git in self.git_credentials:
            values += [git.password, *git.ssh_key.splitlines()]
        return tuple(dict.fromkeys(v for v in values if v.strip()))


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSettings(HostSettings):
    """A container engine on this machine: podman, or docker with an engine that answers."""

    #: ``auto``, ``podman`` or ``docker``, or the path of such a program.
    engine: str = "auto"
    #: The engine's network for the container that runs the repository's steps. It is created when
    #: it is missing. ``host`` lets those steps reach everything that listens on this machine.
    network: str = "podbuild"
    #: A CA bundle that containers and steps need to reach the outside, or "" for none.
    ca_bundle: str = ""
    #: Where builds keep their files. "" means /var/lib/podbuild, or the user's data folder.
    state_folder: str = ""

    @property
    def brings_certificates(self) -> bool:
        return bool(self.ca_bundle)

    @property
    def sees_folders(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings(HostSettings):
    """A namespace of a Kubernetes cluster."""

    #: The namespace that build pods run in.
    namespace: str = "podbuild"
    #: A kubeconfig file, or "" for the usual places: the pod's own service account, else KUBECONFIG.
    kubeconfig: str = ""
    #: The kubeconfig's context, or "" for its current one.
    context: str = ""
    #: What the nodes can give the repository's steps. ``rootless`` needs user namespaces and procMount.
    isolation: Literal["rootless", "chroot"] = "rootless"
    #: A seccomp profile below the kubelet's seccomp folder; "" leaves the container runtime's default.
    seccomp_profile: str = ""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    #: A ConfigMap with `ca-certificates.crt`, for clusters whose way out needs certificates of its own.
    ca_config_map: str = ""
    service_account: str = ""
    priority_class: str = ""
    runtime_class: str = ""
    dns_policy: str = ""
    node_selector: tuple[tuple[str, str], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def brings_certificates(self) -> bool:
        return bool(self.ca_config_map)
