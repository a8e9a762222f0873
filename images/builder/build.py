"""The container that runs the repository's steps: it has no credential, and leaves an OCI layout.

It waits for `courier` to fetch the source, builds with podman or repo2docker inside its own user
namespace, and writes the image to the shared volume. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from meeting import (
    TERMINATION_LOG,
    WORK,
    Failure,
    PartnerLost,
    announce,
    await_death,
    await_start,
    finish,
    keep_deadline,
    read_pod,
    say,
    system_failure,
    take_lock,
)

SOURCE = WORK / "source"
LAYOUT = WORK / "image"
CONFIG = Path("/tmp/podbuild")  # noqa: S108 - the container's own tmpfs
STORAGE = Path("/var/lib/containers")
CGROUP = Path("/sys/fs/cgroup")
IMAGE = "localhost/podbuild/image:1"
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_POLL_SECONDS = 0.02


def main() -> None:
    """Wait for the source, build it, leave the image, report."""
    started = time.time()
    pod = read_pod()
    keep_deadline(pod["deadline_seconds"], started)
    take_lock("build")
    try:
        check_isolation(pod["isolation"], Path("/proc/self/uid_map").read_text())
        await_source(await_start("courier"))
        begun = time.time()
        builder = build(pod, SOURCE)
        hand_over()
    except Failure as failure:
        leave(failure)
    except OSError as error:
        leave(system_failure("build", error))
    result = {"builder": builder, "isolation": pod["isolation"], "seconds": round(time.time() - begun, 2)}
    announce("result.json", json.dumps(result))
    finish(result)


def leave(failure: Failure, work: Path = WORK, report_to: Path = TERMINATION_LOG) -> NoReturn:
    """End with a failure, and leave it to `courier` too, where the disk has room for that."""
    with contextlib.suppress(OSError):
        announce("result.json", json.dumps(failure.report), work=work)
    finish(failure, report_to)


def check_isolation(isolation: str, uid_map: str) -> None:
    """Refuse to build where /proc is unmasked (rootless isolation) and container root is host root."""
    if isolation != "chroot" and uid_map.split()[1] == "0":
        raise Failure(
            "PodRejected",
            "Container root is root of the machine, and /proc is not masked: a step could leave the container.",
            "Give the pod a user namespace, or use chroot isolation.",
        )


def await_source(courier: int) -> None:
    """Wait until the source is there. From now on, the end of `courier` ends this container too."""

    def follow() -> None:
        await_death(courier)
        finish(PartnerLost("The container courier ended before the build was over."))

    threading.Thread(target=follow, name="courier's death", daemon=True).start()
    while not (WORK / "source.ready").exists():
        time.sleep(_POLL_SECONDS)


def build(pod: dict[str, Any], source: Path) -> str:
    """Build the image and return which builder did it."""
    context = inside(source, pod["subdirectory"], "subdirectory")
    builder = choose_builder(pod, context)
    environment = configure(pod)
    say(f"Building with {builder}, {pod['isolation']} isolation")
    if builder == "repo2docker":
        run(repo2docker_command(pod, context), environment, builder)
    else:
        run(podman_command(pod, context, dockerfile_of(pod, context)), environment, builder)
    if pod["appendix"] and not takes_appendix(builder, context):
        appendix = CONFIG / "appendix" / "Dockerfile"
        appendix.parent.mkdir()
        appendix.write_text(f"FROM {IMAGE}\n{pod['appendix']}\n")
        say("Building the appendix")
        command = ["podman", "build", *podman_options(pod), "--pull=never", "--file", str(appendix)]
        run([*command, "--", str(appendix.parent)], environment, builder)
    return builder


def inside(source: Path, path: str, option: str) -> Path:
    """Return a path of the checkout. Raises if it is missing, or if a link leads out of the checkout."""
    try:
        found = (source / path).resolve(strict=True)
    except (OSError, RuntimeError):  # missing, too long, or links in a circle
        found = Path("/")
    if not found.is_relative_to(source.resolve()):
        raise Failure(
            "InvalidRequest",
            f"The repository has no {path!r} at this commit.",
            f"Correct `options.{option}`.",
            phase="build",
        )
    return found


def choose_builder(pod: dict[str, Any], context: Path) -> str:
    """Return `dockerfile` or `repo2docker`: what was asked for, or what the folder looks like."""
    asked: str = pod["builder"]
    if asked != "auto":
        return asked
    if pod["dockerfile"] or pod["target"]:
        return "dockerfile"
    if any((context / name).is_dir() for name in ("binder", ".binder")):
        return "repo2docker"
    has_dockerfile = any((context / name).exists() for name in ("Dockerfile", "Containerfile"))
    return "dockerfile" if has_dockerfile else "repo2docker"


def dockerfile_of(pod: dict[str, Any], context: Path) -> Path:
    """Return the Dockerfile to build."""
    if pod["dockerfile"]:
        return inside(context, pod["dockerfile"], "dockerfile")
    for name in ("Dockerfile", "Containerfile"):
        if (context / name).exists():
            return inside(context, name, "dockerfile")
    where = f"the folder {pod['subdirectory']!r}" if pod["subdirectory"] else "the top folder"
    raise Failure(
        "InvalidRequest",
        f"There is no Dockerfile in {where} of the repository.",
        "Set `options.subdirectory` or `options.dockerfile`, or choose the builder repo2docker.",
        phase="build",
    )


def takes_appendix(builder: str, context: Path) -> bool:
    """Return whether the builder adds the appendix itself. repo2docker does not where it builds a Dockerfile."""
    if builder != "repo2docker":
        return False
    folders = [context / name for name in ("binder", ".binder") if (context / name).is_dir()] or [context]
    return not (folders[0] / "Dockerfile").exists()


def podman_options(pod: dict[str, Any]) -> list[str]:
    """Return what every `podman build` gets. Steps share the container's network: it is isolated already."""
    options = ["--tag", IMAGE, "--format=oci", "--layers", "--network=host"]
    return [*options, f"--platform={pod['platform']}"] if pod["platform"] else options


def podman_command(pod: dict[str, Any], context: Path, dockerfile: Path) -> list[str]:
    """Return the command that builds a Dockerfile."""
    command = ["podman", "build", *podman_options(pod), "--file", str(dockerfile)]
    command += [f"--build-arg={name}={value}" for name, value in sorted(pod["build_args"].items())]
    command += [f"--target={pod['target']}"] if pod["target"] else []
    return [*command, *pod["extra_args"], "--", str(context)]


def repo2docker_command(pod: dict[str, Any], context: Path) -> list[str]:
    """Return the command that builds a folder the way repo2docker does.

    It is given a path, not a URL: so it asks no third party what kind of repository this is.
    """
    command = ["jupyter-repo2docker", "--no-run", "--user-id=1000", "--user-name=jovyan", f"--image-name={IMAGE}"]
    command += ["--DockerEngine.extra_buildx_build_args=--network=host"]
    command += [f"--label=org.opencontainers.image.revision={pod['commit']}"]
    command += [f"--build-arg={name}={value}" for name, value in sorted(pod["build_args"].items())]
    command += [f"--Repo2Docker.platform={pod['platform']}"] if pod["platform"] else []
    command += [f"--appendix={pod['appendix']}"] if pod["appendix"] and takes_appendix("repo2docker", context) else []
    return [*command, *pod["extra_args"], "--", str(context)]


def configure(pod: dict[str, Any]) -> dict[str, str]:
    """Write podman's configuration for this container and return the environment to run it in."""
    CONFIG.mkdir(parents=True, exist_ok=True)
    temporary = STORAGE / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    containers = CONFIG / "containers.conf"
    containers.write_text(containers_conf(ca_bundle=pod["ca_bundle"]))
    storage = CONFIG / "storage.conf"
    storage.write_text(
        "[storage]\n"
        'driver = "overlay"\n'
        'runroot = "/run/containers/storage"\n'
        f'graphroot = "{STORAGE}/storage"\n'
        f'rootless_storage_path = "{STORAGE}/storage"\n'
    )
    registries = CONFIG / "registries.conf"
    registries.write_text(registries_conf(pod["plain_http"], dict(pod["mirrors"])))
    return {
        **os.environ,
        "HOME": "/tmp",  # noqa: S108 - the container's own tmpfs
        "TMPDIR": str(temporary),
        "BUILDAH_ISOLATION": pod["isolation"],
        "CONTAINERS_CONF": str(containers),
        "CONTAINERS_STORAGE_CONF": str(storage),
        "CONTAINERS_REGISTRIES_CONF": str(registries),
        # The word "podman" in it makes repo2docker call podman; nothing listens there.
        "DOCKER_HOST": "unix:///run/podman/podman.sock",
        "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
    }


def containers_conf(*, ca_bundle: bool) -> str:
    """Return containers.conf: steps get the limits that this container has, because it may not raise any."""
    limits = ((name, resource.getrlimit(number)[1]) for name, number in
              (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)))  # fmt: skip
    ulimits = [f"{name}={limit}:{limit}" for name, limit in limits if limit != resource.RLIM_INFINITY]
    volumes = [f"{CA_BUNDLE}:{CA_BUNDLE}:ro"] if ca_bundle else []
    return (
        "[containers]\n"
        f"default_ulimits = {json.dumps(ulimits)}\n"
        f"volumes = {json.dumps(volumes)}\n"
        "[engine]\n"
        'runtime = "runc"\n'
        'cgroup_manager = "cgroupfs"\n'
        'events_logger = "file"\n'
    )


def registries_conf(plain_http: list[str], mirrors: dict[str, str]) -> str:
    """Return registries.conf: which registries speak plain HTTP, and where base images are pulled from first."""
    lines = ['unqualified-search-registries = ["docker.io"]', 'short-name-mode = "permissive"']
    for registry in sorted({*plain_http, *mirrors}):
        lines += ["[[registry]]", f"location = {json.dumps(registry)}"]
        lines += [f"insecure = {json.dumps(registry in plain_http)}"]
        if mirror := mirrors.get(registry):
            lines += ["[[registry.mirror]]", f"location = {json.dumps(mirror)}"]
            lines += [f"insecure = {json.dumps(mirror.split('/', 1)[0] in plain_http)}"]
    return "\n".join(lines) + "\n"


def run(command: list[str], environment: dict[str, str], builder: str, storage: Path = STORAGE) -> None:
    """Run a builder, its output into this container's log. Raises `Failure` with its exit code."""
    killed = out_of_memory_kills()
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, check=False)
    # Also where the step went on without the process that was killed: nobody knows what the image lacks.
    if out_of_memory_kills() > killed:
        raise Failure(
            "OutOfMemory",
            "A step of the build was killed because the build reached its memory limit.",
            "Raise `options.memory_limit`, or make the step need less.",
            exit_code=137,
            phase="build",
        )
    if done.returncode == 0:
        return
    code = done.returncode if done.returncode > 0 else 128 - done.returncode
    stats = os.statvfs(storage)
    if stats.f_bavail * stats.f_frsize < 16 * 1024 * 1024:
        raise Failure(
            "OutOfDisk",
            "The disk is full.",
            "Free some on the host, or raise `options.storage_limit`.",
            exit_code=code,
            phase="build",
        )
    what = "A step of the Dockerfile failed" if builder == "dockerfile" else "repo2docker failed"
    raise Failure(
        "BuildFailed",
        f"{what} with exit code {code}.",
        "The log shows the step; correct it in the repository.",
        exit_code=code,
        phase="build",
    )


def out_of_memory_kills(cgroup: Path = CGROUP) -> int:
    """Return how many processes of this container the kernel has killed for memory (cgroup v2, else v1)."""
    for name in ("memory.events", "memory/memory.oom_control"):
        try:
            values = dict(line.split() for line in (cgroup / name).read_text().splitlines())
        except OSError:
            continue
        return int(values.get("oom_kill", 0))
    return 0


def hand_over() -> None:
    """Write the built image to the shared volume, as an OCI layout, and check that there is one."""
    environment = configure(read_pod())
    exists = subprocess.run(["podman", "image", "exists", IMAGE], env=environment, check=False)
    if exists.returncode != 0:
        raise Failure(
            "BuildFailed",
            "The builder ended without an error, but left no image.",
            "Remove the extra argument that keeps it from building.",
            phase="build",
        )
    say("Handing the image over")
    run(["podman", "push", "--quiet", IMAGE, f"oci:{LAYOUT}:image"], environment, "podman push")


if __name__ == "__main__":
    main()
