"""Pods on this machine: podman, or docker, runs the same manifest that a cluster would get.

The container `courier` carries the pod's name, and the engine gives a name only once: that is the
lock. A pod whose containers are created but not started is still gated. Each pod has a folder with
its manifest, volumes and termination messages; its secrets lie in a second one, in memory where the
machine has such a place.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import secrets
import shutil
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio

from podbuild.diagnosis import container_state
from podbuild.errors import HostUnavailable, ImagePullFailed, PodRejected
from podbuild.hosts import NameExists, Pod
from podbuild.logs import parse_line
from podbuild.manifest import GATE, MANAGED_BY, REPOSITORY_PATH, SECRET_VOLUME, Isolation, Manifest, quantity
from podbuild.settings import LocalSettings

LABEL_POD = "podbuild.io/pod"
LABEL_CONTAINER = "podbuild.io/container"
LABEL_NONCE = "podbuild.io/nonce"
SECCOMP_PROFILE = Path(__file__).with_name("seccomp.json")

#: Container ids 0 to 65535 become these ids of the machine. systemd's table of ids (UIDS-GIDS.md)
#: lists the range from 1879048192 on as unused, so no user's own range meets it.
FIRST_ID = 1_879_048_192
_IDS = 65536
_COMMAND_SECONDS = 60
_PULL_SECONDS = 900
_CLEANUP_SECONDS = 30
_STOP_SECONDS = 5
_REMOVE_TRIES = 10
_REMOVE_PAUSE_SECONDS = 0.3
_LOG_CHUNK_BYTES = 65536
_LOG_POLL_SECONDS = 0.1
_DOCKER_PIECE_BYTES = 16384
_CAP_SYS_RESOURCE = 24
#: Older ones were never tried; Debian 12 and Ubuntu 24.04 bring newer ones.
_OLDEST_PODMAN = (4, 3)
#: What `info` is asked: the version, and whether container root is kept apart from host root already.
_QUESTIONS = {
    "podman": "{{.Version.Version}} {{.Host.Security.Rootless}}",
    "docker": "{{.ServerVersion}} {{json .SecurityOptions}}",
}
#: What stands before the text of a line; all of a line that has no blank.
_UP_TO_BLANK = re.compile(rb"[^ \n]*[ \n]")
_CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_MISSING = re.compile(r"no such (container|object)|no container with (name|ID)|does not exist", re.IGNORECASE)
_REMOVING = re.compile(r"busy|already in progress")
_NAME_IN_USE = re.compile(r"name .* is (already )?in use", re.IGNORECASE)
_NO_IMAGE = re.compile(r"image not known|no such image|manifest unknown|unable to find image|pull access denied"
                       r"|initializing source|error pulling", re.IGNORECASE)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Engine:
    """A container engine that answered."""

    program: str
    #: ``podman`` or ``docker``.
    kind: str
    #: Container root is not root of the machine, without our doing (rootless engine, or userns-remap).
    remapped: bool

    @property
    def maps_ids(self) -> bool:
        """Whether we give each container an id map ourselves: root's podman can, docker cannot."""
        return self.kind == "podman" and not self.remapped

    @property
    def isolation(self) -> Isolation:
        """Rootless isolation needs an unmasked /proc, and that needs container root not to be host root."""
        return "rootless" if self.maps_ids or self.remapped else "chroot"


async def detect_engine(wanted: str = "auto") -> Engine:
    """Return podman, else docker, if it answers. A docker client without an engine is not docker.

    ``wanted`` may name one of them, or the path of such a program. Raises `HostUnavailable`.
    """
    candidates = ("podman", "docker") if wanted == "auto" else (wanted,)
    seen = []
    for candidate in candidates:
        program = shutil.which(candidate)
        if program is None:
            seen.append(f"{candidate} is not installed")
            continue
        kind = "docker" if "docker" in Path(program).name else "podman"
        answer = await _run([program, "info", "--format", _QUESTIONS[kind]], seconds=30)
        version, _, security = answer.out.strip().partition(" ")
        if answer.code != 0 or not security or security == "null":
            seen.append(f"{candidate} is installed, but its engine does not answer")
        elif kind == "podman" and _version(version) < _OLDEST_PODMAN:
            oldest = ".".join(map(str, _OLDEST_PODMAN))
            seen.append(f"{candidate} {version} is too old, {oldest} or newer is needed")
        else:
            remapped = security == "true" if kind == "podman" else "name=userns" in security or "rootless" in security
            return Engine(program=program, kind=kind, remapped=remapped)
    raise HostUnavailable(
        f"No container engine runs here: {', '.join(seen)}.",
        "Install one, for example with `apt-get install podman`.",
    )


def _version(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version; (0, 0) for what is none."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@dataclass(frozen=True, slots=True)
class _Answer:
    code: int
    out: str
    error: str


async def _run(command: Sequence[str], *, seconds: float = _COMMAND_SECONDS, folder: Path | None = None) -> _Answer:
    """Run a program to its end. It is stopped when the time is over, and when the caller is cancelled.

    An engine that is told to stop finishes the container that it is about to make; one that is killed leaves half.
    """
    pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdin=nothing, stdout=pipe, stderr=pipe, cwd=folder)
    try:
        async with asyncio.timeout(seconds):
            out, error = await process.communicate()
    except TimeoutError as late:
        raise HostUnavailable(
            f"`{Path(command[0]).name} {command[1]}` did not end within {seconds:g} s.",
            "Look at what the engine is busy with, then try again.",
        ) from late
    finally:
        if process.returncode is None:
            with anyio.CancelScope(shield=True):
                process.terminate()
                with anyio.move_on_after(_STOP_SECONDS):
                    await process.communicate()
                if process.returncode is None:
                    process.kill()
                    await process.wait()
    return _Answer(process.returncode or 0, out.decode(errors="replace"), error.decode(errors="replace"))


class LocalHost:
    """The container engine of this machine, as a host. Use it as an async context manager.

    Entering it finds the engine and raises `HostUnavailable` if there is none. Pods outlive it.
    """

    def __init__(self, settings: LocalSettings) -> None:
        self.settings = settings
        self._engine: Engine | None = None
        root = os.geteuid() == 0
        home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
        default = Path("/var/lib/podbuild") if root else home / "podbuild"
        self._state = Path(settings.state_folder) if settings.state_folder else default
        runtime = Path("/run") if root else Path(os.environ.get("XDG_RUNTIME_DIR") or self._state)
        self._secrets = runtime / "podbuild-secrets" if not settings.state_folder else self._state / "secrets"

    async def __aenter__(self) -> Self:
        self._engine = await detect_engine(self.settings.engine)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine = None

    @property
    def engine(self) -> Engine:
        """The engine that was found. Raises `HostUnavailable` outside the context manager."""
        if self._engine is None:
            raise HostUnavailable("This host is closed.", "Use it inside `async with`.")
        return self._engine

    @property
    def isolation(self) -> Isolation:
        return self.engine.isolation

    async def now(self) -> datetime:
        return datetime.now(UTC)

    # --- creating ---------------------------------------------------------------------------------------

    async def create(self, manifest: Manifest, files: Mapping[str, bytes]) -> Pod:
        """Create both containers and start them; return the pod as it then is.

        Raises `NameExists` when the name is taken (or the pod was removed while it was gated),
        `ImagePullFailed` without the builder image, `PodRejected` when the engine refuses the pod.
        A failure or a cancellation leaves nothing behind.
        """
        name = manifest["metadata"]["name"]
        await self._ensure_network()
        nonce = secrets.token_hex(8)
        created: list[str] = []
        try:
            # Not in a thread, which would go on writing secrets after a cancellation. It is a dozen small files.
            self._lay_out(nonce, manifest, files)
            for container in manifest["spec"]["containers"]:
                made = await self._create_container(nonce, manifest, container)
                created.append(made)
            # conmon leaves a file named `oom` where it was started when it meets one: it goes with the pod.
            started = await self._call("start", *created, folder=self._folder(nonce))
            if started.code != 0:
                if _MISSING.search(started.error):
                    raise NameExists(name)
                raise self._refused(started)
            pod = await self.read(name)
            if pod is None or pod["metadata"]["uid"] != created[0]:
                raise NameExists(name)
        except BaseException:
            with anyio.move_on_after(_CLEANUP_SECONDS, shield=True):
                # Not only what `created` holds: a cancelled engine may have made a container and not told its id.
                left = await self._call("ps", "--all", "--quiet", "--no-trunc", f"--filter=label={LABEL_NONCE}={nonce}")
                for each in dict.fromkeys([*reversed(created), *left.out.split()]):
                    await self._remove_container(each)
                await self._remove_folders(nonce)
            raise
        return pod

    async def _ensure_network(self) -> None:
        network = self.settings.network
        if network == "host" or (await self._call("network", "inspect", network)).code == 0:
            return
        made = await self._call("network", "create", network)
        if made.code != 0 and "already exists" not in made.error:
            raise HostUnavailable(
                f"The engine cannot make the network {network!r}: {_last_line(made.error)}",
                "Choose another `network` in the local-engine block.",
            )

    async def _create_container(self, nonce: str, manifest: Manifest, container: dict[str, Any]) -> str:
        name = manifest["metadata"]["name"]
        folder, secret = self._folder(nonce), self._secrets / nonce
        arguments = create_arguments(
            self.engine, self.settings, manifest, container, nonce=nonce, folder=folder, secret=secret
        )
        made = await self._call("create", *arguments, seconds=_PULL_SECONDS)
        if made.code == 0:
            return made.out.split()[-1]
        if _NAME_IN_USE.search(made.error):
            raise NameExists(name)
        image = container["image"]
        if _NO_IMAGE.search(made.error):
            raise ImagePullFailed(
                f"The builder image {image} is not on this machine, and cannot be pulled.",
                "Build it with `make builder-image`, or set `builder_image` in the local-engine block.",
            )
        raise self._refused(made)

    def _refused(self, answer: _Answer) -> PodRejected:
        return PodRejected(
            f"{self.engine.kind} refuses the pod: {_last_line(answer.error)}",
            f"Check that it can run containers: `{self.engine.kind} run --rm {self.settings.builder_image} true`.",
        )

    def _lay_out(self, nonce: str, manifest: Manifest, files: Mapping[str, bytes]) -> None:
        """Make the folders of one pod, owned by who is root inside its containers."""
        metadata, spec = manifest["metadata"], manifest["spec"]
        for parent in (self._state, self._secrets):
            parent.mkdir(parents=True, exist_ok=True, mode=0o711)
        (self._state / "pods").mkdir(exist_ok=True, mode=0o711)
        for volume in spec["volumes"]:
            if "hostPath" in volume and not Path(volume["hostPath"]["path"]).is_dir():
                raise PodRejected(
                    f"There is no folder {volume['hostPath']['path']} on this machine.",
                    f"Check the path; courier would see it as {REPOSITORY_PATH}.",
                )
        folder, secret = self._folder(nonce), self._secrets / nonce
        for made in (folder, folder / "volumes", folder / "ends"):
            made.mkdir(mode=0o711)
        (folder / "pod.json").write_text(json.dumps(manifest))
        owned = [secret]
        secret.mkdir(mode=0o700)
        for name, content in files.items():
            # Through the descriptor that made it: an ordinary user may not open a file of this mode for writing.
            with os.fdopen(os.open(secret / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as file:
                file.write(content)
            owned.append(secret / name)
        for container in spec["containers"]:
            end = folder / "ends" / container["name"]
            end.touch(mode=0o600)
            owned.append(end)
        for volume in spec["volumes"]:
            made = folder / "volumes" / volume["name"]
            if "emptyDir" in volume or "downwardAPI" in volume:
                made.mkdir(mode=0o755)
                owned.append(made)
            for item in volume.get("downwardAPI", {}).get("items", ()):
                annotation = item["fieldRef"]["fieldPath"].split("'")[1]
                (made / item["path"]).write_text(metadata["annotations"][annotation])
        if self.engine.maps_ids:
            for path in owned:
                os.chown(path, FIRST_ID, FIRST_ID)

    # --- reading ----------------------------------------------------------------------------------------

    async def read(self, name: str) -> Pod | None:
        """Return the pod in Kubernetes' spelling, from the engine's own account of its containers."""
        containers = await self._inspect([name, _container_name(name, "build")])
        first = next((c for c in containers if _labels(c).get(LABEL_CONTAINER) == "courier"), None)
        if first is None:
            return None
        nonce = _labels(first).get(LABEL_NONCE, "")
        same = [c for c in containers if _labels(c).get(LABEL_NONCE) == nonce]
        return await asyncio.to_thread(self._pod, name, nonce, same)

    async def find(self, labels: Mapping[str, str]) -> list[Pod]:
        """Return our pods that carry all of these labels."""
        wanted = {**MANAGED_BY, **labels, LABEL_CONTAINER: "courier"}
        filters = [f"--filter=label={key}={value}" for key, value in wanted.items()]
        listed = await self._call("ps", "--all", "--no-trunc", "--format={{.Names}}", *filters)
        if listed.code != 0:
            raise self._unavailable(listed)
        pods = [await self.read(name) for name in sorted(listed.out.split())]
        return [pod for pod in pods if pod is not None]

    async def _inspect(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return what the engine says of those of these containers that exist."""
        answer = await self._call("container", "inspect", *names)
        if answer.code != 0 and not _MISSING.search(answer.error):
            raise self._unavailable(answer)
        found = json.loads(answer.out or "[]")
        return [c for c in found if isinstance(c, dict)]

    def _unavailable(self, answer: _Answer) -> HostUnavailable:
        return HostUnavailable(
            f"{self.engine.kind} does not answer: {_last_line(answer.error)}",
            f"Check that it works: `{self.engine.kind} info`.",
        )

    def _pod(self, name: str, nonce: str, containers: list[dict[str, Any]]) -> Pod:
        folder = self._folder(nonce)
        try:
            pod: Pod = json.loads((folder / "pod.json").read_text())
        except (OSError, ValueError):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "annotations": {}}, "spec": {}}
        courier = next(c for c in containers if _labels(c)[LABEL_CONTAINER] == "courier")
        pod["metadata"]["uid"] = courier["Id"]
        pod["metadata"]["creationTimestamp"] = _moment(courier["Created"])
        pod["metadata"]["labels"] = _labels(courier)
        statuses = [_container_status(c, folder / "ends") for c in containers]
        gated = "running" not in statuses[0]["state"] and "terminated" not in statuses[0]["state"]
        pod["spec"]["schedulingGates"] = [{"name": GATE}] if gated else []
        pod["status"] = {"phase": _phase(statuses, gated), "containerStatuses": statuses}
        return pod

    # --- logs -------------------------------------------------------------------------------------------

    def log(self, pod: Pod, container: str, *, since: str | None = None) -> AsyncIterator[bytes]:
        """Yield a container's log in raw pieces, each line with its time.

        podman's log file is read directly: `podman logs` (4.3) puts timestamps into the middle of
        lines that were written in pieces.
        """
        status = next((s for s in pod["status"]["containerStatuses"] if s["name"] == container), None)
        if status is None:
            return _nothing()
        if self.engine.kind == "podman":
            return _follow_file(Path(status["logPath"]), status["processID"], since)
        return self._follow_command(status["containerID"], since)

    async def _follow_command(self, target: str, since: str | None) -> AsyncIterator[bytes]:
        options = ["--timestamps", "--follow", *([f"--since={since}"] if since else [])]
        process = await asyncio.create_subprocess_exec(
            self.engine.program,
            "logs",
            *options,
            target,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert process.stdout is not None  # noqa: S101 - asked for with PIPE
        pieces = DockerPieces()
        try:
            while chunk := await process.stdout.read(_LOG_CHUNK_BYTES):
                if lines := pieces.feed(chunk):
                    yield lines
        finally:
            with anyio.CancelScope(shield=True):
                if process.returncode is None:
                    process.kill()
                await process.wait()

    # --- ending -----------------------------------------------------------------------------------------

    async def delete(self, pod: Pod) -> None:
        """Delete exactly this pod, by the ids of its containers. `courier` goes last: its name is the lock."""
        ids = self._ids(pod)
        grace = pod["spec"].get("terminationGracePeriodSeconds", 3)
        for container in ("build", "courier"):
            if container not in ids:
                continue
            if "running" in container_state(pod, container):
                await self._call("stop", "-t", f"{grace}", ids[container])
            await self._remove_container(ids[container])
        await self._remove_folders(pod["metadata"]["labels"].get(LABEL_NONCE, ""))

    async def _remove_container(self, target: str) -> None:
        """Remove one container by its id, again while the engine is at it.

        podman says `busy` while its own clean-up unmounts, docker `already in progress` while another removes it.
        """
        for tries_left in reversed(range(_REMOVE_TRIES)):
            removed = await self._call("rm", "--force", "--volumes", target)
            if removed.code == 0 or _MISSING.search(removed.error):
                return
            if not tries_left or not _REMOVING.search(removed.error):
                raise self._unavailable(removed)
            await asyncio.sleep(_REMOVE_PAUSE_SECONDS)

    async def release(self, pod: Pod) -> None:
        nonce = pod["metadata"]["labels"].get(LABEL_NONCE, "")
        await self._remove(self._secrets / nonce, self._folder(nonce) / "volumes")

    async def _remove_folders(self, nonce: str) -> None:
        await self._remove(self._secrets / nonce, self._folder(nonce))

    async def _remove(self, *folders: Path) -> None:
        """Remove folders that may hold files of other ids. Never more than one pod's: each path ends in its nonce."""
        there = [f for f in folders if f.is_dir() and f not in (self._state, self._secrets)]
        for folder in there:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        for folder in (f for f in there if f.exists()):
            # An ordinary user may not remove what the containers' other ids wrote; a container may.
            where = f"--volume={folder.parent}:/podbuild:rw"
            command = ["--network=none", where, "--entrypoint=rm", self.settings.builder_image]
            await self._call("run", "--rm", *command, "-rf", f"/podbuild/{folder.name}")

    # --- small things -----------------------------------------------------------------------------------

    def _folder(self, nonce: str) -> Path:
        return self._state / "pods" / nonce if nonce else self._state / "pods" / "none"

    @staticmethod
    def _ids(pod: Pod) -> dict[str, str]:
        return {s["name"]: s["containerID"] for s in pod["status"]["containerStatuses"]}

    async def _call(self, *arguments: str, seconds: float = _COMMAND_SECONDS, folder: Path | None = None) -> _Answer:
        return await _run([self.engine.program, *arguments], seconds=seconds, folder=folder)


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


async def _follow_file(path: Path, process: int, since: str | None) -> AsyncIterator[bytes]:
    """Follow a log file in the Container Runtime Interface's format until the container's process is gone.

    What podman still had to write then is read by the stream that the caller opens after the container's end.

    A record is `TIME STREAM F text`; `P` instead of `F` marks a piece of a line that goes on.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        records = LogRecords(since)
        while True:
            # Asked before reading: what was written before the process ended is then read after it.
            gone = not _alive(process)
            while chunk := file.read(_LOG_CHUNK_BYTES):
                if lines := records.feed(chunk):
                    yield lines
                await asyncio.sleep(0)
            if gone:
                return
            await asyncio.sleep(_LOG_POLL_SECONDS)


class LogRecords:
    """The log file's records → lines as the Kubernetes log endpoint serves them: one time, then the text.

    A record is ``TIME STREAM F TEXT``; ``P`` in place of ``F`` marks a piece of a line that goes on.
    """

    def __init__(self, since: str | None = None) -> None:
        self._since = since or ""
        self._rest = b""
        self._inside = False
        self._skipping = False

    def feed(self, chunk: bytes) -> bytes:
        """Return the lines that this piece of the file brings; a line's pieces come as they are there."""
        *records, self._rest = (self._rest + chunk).split(b"\n")
        served = []
        for record in records:
            line = parse_line(record)
            if line is None:
                continue
            _, tag, text = [*line.text.split(b" ", 2), b"", b""][:3]
            if not self._inside:
                self._skipping = line.time[:19] < self._since[:19]
            if not self._skipping:
                stamp = b"" if self._inside else line.time.encode() + b" "
                served.append(stamp + text + (b"" if tag == b"P" else b"\n"))
            self._inside = tag == b"P"
        return b"".join(served)


class DockerPieces:
    """What `docker logs --timestamps` prints → one time per line.

    Docker cuts a long line into pieces of 16 KiB, and prints the line's time before each of them.
    """

    def __init__(self) -> None:
        self._rest = b""
        #: The time of the line that is being read, with the blank after it; empty between lines.
        self._stamp = b""
        #: How many bytes the piece of the line that is being read may still have.
        self._room = 0

    def feed(self, chunk: bytes) -> bytes:
        """Return what this chunk of the stream brings, without the times inside of lines."""
        data, here = self._rest + chunk, 0
        served = []
        while here < len(data):
            if not self._stamp:
                first = _UP_TO_BLANK.match(data, here)
                if first is None:
                    break
                here = first.end()
                served.append(first[0])
                if not first[0].endswith(b"\n"):
                    self._stamp, self._room = first[0], _DOCKER_PIECE_BYTES
            elif not self._room:
                repeated = data[here : here + len(self._stamp)]
                if repeated == self._stamp:
                    here += len(repeated)
                    self._room = _DOCKER_PIECE_BYTES
                elif self._stamp.startswith(repeated):
                    break
                else:  # not how Docker cuts lines: what comes is shown as it is
                    self._room = sys.maxsize
            else:
                end = data.find(b"\n", here, here + self._room)
                text = data[here : here + self._room if end < 0 else end + 1]
                here += len(text)
                self._room -= len(text)
                served.append(text)
                if text.endswith(b"\n"):
                    self._stamp = b""
        self._rest = data[here:]
        return b"".join(served)


def _alive(process: int) -> bool:
    if process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def create_arguments(
    engine: Engine,
    settings: LocalSettings,
    manifest: Manifest,
    container: dict[str, Any],
    *,
    nonce: str,
    folder: Path,
    secret: Path,
) -> list[str]:
    """Return what `create` needs to make one container of the manifest.

    ``folder`` is the pod's own, ``secret`` the one with its secret files. Of the machine it looks at
    the number of cores, at the limits it can hand on, and whether it has AppArmor.
    """
    spec, metadata = manifest["spec"], manifest["metadata"]
    which, security = container["name"], container["securityContext"]
    labels = {**metadata["labels"], LABEL_POD: metadata["name"], LABEL_CONTAINER: which, LABEL_NONCE: nonce}
    local_image = container["image"].startswith("localhost/")
    arguments = [
        f"--name={_container_name(metadata['name'], which)}",
        f"--pull={'never' if local_image else 'missing'}",
        f"--stop-timeout={spec['terminationGracePeriodSeconds']}",
        "--restart=no",
        "--cap-drop=ALL",
        f"--security-opt=seccomp={SECCOMP_PROFILE}",
        f"--user={security['runAsUser']}",
        *(f"--label={key}={value}" for key, value in labels.items()),
        *(f"--cap-add={capability}" for capability in security["capabilities"].get("add", ())),
        # courier runs nothing from the repository, and reaches what this process reaches; the
        # repository's steps get a network of their own, so that they do not reach this machine's services.
        f"--network={'host' if which == 'courier' else settings.network}",
    ]
    if not security["allowPrivilegeEscalation"]:
        arguments.append("--security-opt=no-new-privileges")
    if security.get("readOnlyRootFilesystem"):
        arguments.append("--read-only")
    if security.get("procMount") == "Unmasked":
        arguments.append(
            "--security-opt=unmask=ALL" if engine.kind == "podman" else "--security-opt=systempaths=unconfined"
        )
    if Path("/sys/kernel/security/apparmor").exists():
        # The engines' own AppArmor profiles forbid every mount, also inside a user namespace.
        arguments.append("--security-opt=apparmor=unconfined")
    if engine.kind == "podman":
        arguments += ["--log-driver=k8s-file", f"--timeout={spec['activeDeadlineSeconds']}"]
    else:
        arguments.append("--log-driver=json-file")
    if engine.maps_ids:
        arguments += [f"--{kind}map=0:{FIRST_ID}:{_IDS}" for kind in ("uid", "gid")]
    arguments += _limits(container["resources"]["limits"])
    arguments += _mounts(settings, manifest, container, folder, secret)
    command = container["command"]
    return [*arguments, f"--entrypoint={command[0]}", container["image"], *command[1:]]


def _mounts(
    settings: LocalSettings, manifest: Manifest, container: dict[str, Any], folder: Path, secret: Path
) -> list[str]:
    """Return the options for a container's volumes. The secret is mounted only where the manifest says so."""
    volumes = {volume["name"]: volume for volume in manifest["spec"]["volumes"]}
    arguments = [f"--volume={folder / 'ends' / container['name']}:{container['terminationMessagePath']}:rw"]
    for mount in container["volumeMounts"]:
        name, target = mount["name"], mount["mountPath"]
        volume = volumes[name]
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            arguments.append(f"--tmpfs={target}:rw,mode=1777")
            continue
        if "hostPath" in volume:
            source = Path(volume["hostPath"]["path"])
        elif name == SECRET_VOLUME:
            source = secret
        else:
            source = folder / "volumes" / name
        arguments.append(f"--volume={source}:{target}:{'ro' if mount.get('readOnly') else 'rw'}")
    if settings.ca_bundle:
        arguments.append(f"--volume={settings.ca_bundle}:{_CA_BUNDLE}:ro")
    return arguments


def _container_name(pod: str, container: str) -> str:
    return pod if container == "courier" else f"{pod}.{container}"


def _limits(limits: Mapping[str, str]) -> list[str]:
    """Return the engine's spelling of a container's limits. The engines have none for disk."""
    cores = min(quantity(limits["cpu"]), os.cpu_count() or 1)
    memory = int(quantity(limits["memory"]))
    return [f"--cpus={cores:g}", f"--memory={memory}", f"--memory-swap={memory}", *limits_here()]


def limits_here() -> list[str]:
    """Return what every container needs on a machine whose root may not raise limits; else nothing.

    Without CAP_SYS_RESOURCE the engine's own defaults lie above what this process may hand on.
    """
    if _may_raise_limits():
        return []
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # The engine itself runs with at most pid_max processes, so nothing it starts may have more.
    processes = min(resource.getrlimit(resource.RLIMIT_NPROC)[1], int(Path("/proc/sys/kernel/pid_max").read_text()))
    return [f"--ulimit=nofile={files}:{files}", f"--ulimit=nproc={processes}:{processes}"]


def _may_raise_limits() -> bool:
    """Return whether root may raise resource limits here. An ordinary user's engine never tries."""
    if os.geteuid() != 0:
        return True
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    return bool(effective >> _CAP_SYS_RESOURCE & 1)


def _labels(container: dict[str, Any]) -> dict[str, str]:
    labels = container.get("Config", {}).get("Labels") or {}
    return {str(k): str(v) for k, v in labels.items()}


def _container_status(container: dict[str, Any], ends: Path) -> dict[str, Any]:
    """Return a container's status as a kubelet would report it."""
    name, state = _labels(container)[LABEL_CONTAINER], container["State"]
    status = state["Status"]
    shown: dict[str, Any]
    if status in ("exited", "stopped", "dead", "removing"):
        try:
            message = (ends / name).read_text(errors="replace")
        except OSError:
            message = ""
        code = int(state.get("ExitCode", 0))
        reason = "OOMKilled" if state.get("OOMKilled") else "Completed" if code == 0 else "Error"
        shown = {
            "terminated": {
                "exitCode": code,
                "reason": reason,
                "message": message,
                "startedAt": _moment(state["StartedAt"]),
                "finishedAt": _moment(state["FinishedAt"]),
            }
        }
    elif status in ("running", "paused", "stopping", "restarting"):
        shown = {"running": {"startedAt": _moment(state["StartedAt"])}}
    else:
        shown = {"waiting": {"reason": "ContainerCreating"}}
    return {
        "name": name,
        "containerID": container["Id"],
        "state": shown,
        # Two facts of this host alone: where podman keeps the log, and the container's first process.
        "logPath": (container["HostConfig"].get("LogConfig") or {}).get("Path", ""),
        "processID": int(state.get("Pid") or 0),
    }


def _phase(statuses: list[dict[str, Any]], gated: bool) -> str:
    ends = [s["state"]["terminated"]["exitCode"] for s in statuses if "terminated" in s["state"]]
    if gated:
        return "Pending"
    if len(ends) < len(statuses):
        return "Running"
    return "Succeeded" if not any(ends) and len(ends) > 1 else "Failed"


def _moment(text: str) -> str:
    """Return an engine's time as Kubernetes writes times, in UTC with microseconds."""
    digits = re.sub(r"(\.\d{6})\d+", r"\1", text)
    try:
        moment = datetime.fromisoformat(digits).astimezone(UTC)
    except ValueError:
        return text
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ")[:500] if lines else "no reason given"
