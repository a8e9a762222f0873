"""A git repository in, a container image out: one pod, as many callers as you like.

    async with LocalHost(settings) as host:
        repository = parse_repository("https://git.example.org/team/app")
        resolved = await resolve_commit(repository, "main")
        plan = plan_build(repository, resolved.commit, None, BuildOptions(), settings)
        build = await submit(host, plan)          # creates the pod, or joins the one that is there
        async for event in build.events():        # Pending · Running · Line · Gap · Finished
            print(event)
        result = await build.result()             # both exit codes, the digest, and the registry agrees

This package imports neither Prefect nor a Kubernetes client.
"""

from podbuild.build import Build, Result, find_built, submit
from podbuild.errors import (
    AccessDenied,
    AmbiguousRef,
    BuildError,
    BuildFailed,
    BuildStopped,
    DeadlineExceeded,
    Evicted,
    HostUnavailable,
    ImagePullFailed,
    InvalidRequest,
    NameTaken,
    OutOfDisk,
    OutOfMemory,
    PodLost,
    PodRejected,
    PushUnconfirmed,
    QuotaExceeded,
    RefNotFound,
    RegistryUnavailable,
    SourceUnavailable,
    Unschedulable,
)
from podbuild.events import Event, Finished, Gap, Line, Pending, Running
from podbuild.hosts import Host
from podbuild.hosts.local import LocalHost
from podbuild.names import ImageName, Repository, parse_image, parse_repository
from podbuild.plan import BuildOptions, Plan, parse_options, plan_build
from podbuild.registry import find_image
from podbuild.settings import ClusterSettings, GitCredentials, HostSettings, LocalSettings, RegistryCredentials
from podbuild.source import Resolved, resolve_commit

__all__ = [
    "AccessDenied",
    "AmbiguousRef",
    "Build",
    "BuildError",
    "BuildFailed",
    "BuildOptions",
    "BuildStopped",
    "ClusterSettings",
    "DeadlineExceeded",
    "Event",
    "Evicted",
    "Finished",
    "Gap",
    "GitCredentials",
    "Host",
    "HostSettings",
    "HostUnavailable",
    "ImageName",
    "ImagePullFailed",
    "InvalidRequest",
    "Line",
    "LocalHost",
    "LocalSettings",
    "NameTaken",
    "OutOfDisk",
    "OutOfMemory",
    "Pending",
    "Plan",
    "PodLost",
    "PodRejected",
    "PushUnconfirmed",
    "QuotaExceeded",
    "RefNotFound",
    "RegistryCredentials",
    "RegistryUnavailable",
    "Repository",
    "Resolved",
    "Result",
    "Running",
    "SourceUnavailable",
    "Unschedulable",
    "find_built",
    "find_image",
    "parse_image",
    "parse_options",
    "parse_repository",
    "plan_build",
    "resolve_commit",
    "submit",
]
