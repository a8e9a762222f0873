"""Run a command beside a real Docker engine of its own. Nothing is installed, and nothing stays but a cache.

Usage: python -m scripts.docker_engine COMMAND [ARGUMENT ...]
The engine comes from Debian's packages, unpacked into ${PODBUILD_CACHE:-~/.cache/podbuild}. It has
network, mounts and processes of its own: this machine's interfaces and firewall stay as they are,
and the kernel ends all of it with this program, whatever ends that. The command runs beside the
engine, in a network without a way out, and finds docker on PATH, with our images, and no podman.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from podbuild.hosts.local import limits_here
from scripts.images import BASE, TAGS
from scripts.machine import Problem, engine, main, run, step

CACHE = Path(os.environ.get("PODBUILD_CACHE") or Path.home() / ".cache" / "podbuild") / "docker-engine"
_PREFIX = "podbuild-docker-"
PACKAGES = ("docker.io", "containerd")
#: Its tests fail instead of being skipped: here they have an engine.
REQUIRED = "PODBUILD_REQUIRE_DOCKER"
_PROGRAMS = ("apt-get", "dpkg", "unshare", "nsenter", "setpriv", "ip", "runc", "iptables")
#: Where Docker writes although it is told to keep its files elsewhere; each gets an empty folder of the engine's own.
_MASKED = ("/etc/docker", "/opt/containerd", "/run/containerd", "/run/docker")
_START_SECONDS = 60
_BUSY_SECONDS = 10
_NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
#: What this program starts does not outlive it.
_TIED = ("setpriv", "--pdeathsig", "KILL")


def work() -> None:
    """Run the command line's command, and end as it ends."""
    command = sys.argv[1:]
    if not command:
        raise Problem("Usage: python -m scripts.docker_engine COMMAND [ARGUMENT ...]")
    if lack := lacking():
        print(f"No Docker engine can be started here: {lack}. The command runs without one.", file=sys.stderr)
        sys.exit(subprocess.run(command, check=False).returncode)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with running_engine(unpacked()) as (inside, environment):
        code = subprocess.run([*inside, *command], env=environment, check=False).returncode
    sys.exit(code)


def lacking() -> str:
    """Return why this machine cannot start an engine, or ""."""
    if os.geteuid() != 0:
        return "that takes root"
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(missing)} is missing" if missing else ""


def unpacked() -> Path:
    """Return the folder with Debian's packages of Docker in it; they are fetched the first time."""
    programs = CACHE / "programs"
    if programs.is_dir():
        return programs
    CACHE.mkdir(parents=True, exist_ok=True)
    with step("Fetching Docker's packages"), tempfile.TemporaryDirectory(dir=CACHE) as folder:
        fetched = Path(folder) / "packages"
        fetched.mkdir()
        fetch = ["apt-get", "--option=APT::Sandbox::User=root", "download", "--quiet", *PACKAGES]
        if subprocess.run(fetch, cwd=fetched, capture_output=True, check=False).returncode != 0:
            run("apt-get", "update", "-q")
            done = subprocess.run(fetch, cwd=fetched, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise Problem(f"apt-get cannot fetch {' and '.join(PACKAGES)}: {done.stderr.strip()[-500:]}")
        for package in sorted(fetched.glob("*.deb")):
            run("dpkg", "-x", str(package), str(Path(folder) / "programs"))
        (Path(folder) / "programs").rename(programs)
    return programs


@contextmanager
def running_engine(programs: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Start the engine with our images. Yield what a command is started with, and its environment."""
    for earlier in CACHE.glob(f"{_PREFIX}*"):
        if not is_locked(earlier / "lock"):
            remove(earlier)
    files = CACHE / f"{_PREFIX}{secrets.token_hex(4)}"
    files.mkdir()
    made = [Path(p) for p in _MASKED if not Path(p).is_dir()]
    for folder in made:
        folder.mkdir(parents=True)
    try:
        with (files / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = f"{programs}/usr/sbin:{programs}/usr/bin:{links_without('podman', files / 'links')}"
            environment = {**os.environ, "PATH": path, "DOCKER_HOST": f"unix://{files}/docker.sock", REQUIRED: "1"}
            # The engine holds the other end of the pipe: it closes when the last of its processes is gone.
            ended, held = os.pipe()
            process = start(files, environment, held)
            os.close(held)
            try:
                await_answer(process, files, environment)
                load_images(environment)
                yield entering(process.pid), environment
            finally:
                process.kill()
                process.wait()
                os.read(ended, 1)
                os.close(ended)
    finally:
        remove(files)
        for folder in made:
            folder.rmdir()


def is_locked(path: Path) -> bool:
    """Return whether the program that made an engine's folder still runs, or is about to."""
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def remove(files: Path) -> None:
    """Remove what an engine left whose processes are gone: its control groups and its files."""
    for group in (*Path("/sys/fs/cgroup").glob(files.name), *Path("/sys/fs/cgroup").glob(f"*/{files.name}")):
        for each in (*sorted(group.rglob("*/"), reverse=True), group):
            remove_group(each)
    shutil.rmtree(files)


def remove_group(group: Path) -> None:
    """Remove a control group; the kernel says `busy` for a moment after the end of its last process."""
    end = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            group.rmdir()
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise
        time.sleep(0.05)


def links_without(program: str, folder: Path) -> Path:
    """Fill a folder with links to every program on PATH but one."""
    folder.mkdir()
    for place in (Path(p) for p in os.environ["PATH"].split(":") if p):
        for found in place.iterdir() if place.is_dir() else ():
            link = folder / found.name
            if found.name != program and not link.is_symlink():
                link.symlink_to(found)
    return folder


def start(files: Path, environment: dict[str, str], held: int) -> subprocess.Popen[bytes]:
    """Start dockerd in namespaces of its own."""
    masks = " && ".join(f"mount -t tmpfs tmpfs {folder}" for folder in _MASKED)
    options = [f"--data-root={files}/data", f"--exec-root={files}/exec", f"--pidfile={files}/pid"]
    options += [f"--host={environment['DOCKER_HOST']}", f"--cgroup-parent=/{files.name}"]
    options += ["--exec-opt=native.cgroupdriver=cgroupfs"]
    options += [f"--default-{option.removeprefix('--')}" for option in limits_here() if "nofile" in option]
    script = f'{masks} && ip link set lo up && exec dockerd "$@"'
    command = [*_TIED, "unshare", *_NAMESPACES, "sh", "-c", script, "sh"]
    with (files / "log").open("wb") as log:
        return subprocess.Popen(
            [*command, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(held,),
            # Ctrl-C is for the command; the engine ends with this program.
            start_new_session=True,
        )


def entering(process: int) -> list[str]:
    """Return what runs a command in the engine's namespaces: there, the engine's process ids mean what it says."""
    spaces = (("net", "net"), ("mount", "mnt"), ("pid", "pid_for_children"))
    enter = [f"--{option}=/proc/{process}/ns/{name}" for option, name in spaces]
    return [*_TIED, "nsenter", *enter, "env", f"--chdir={Path.cwd()}"]


def await_answer(process: subprocess.Popen[bytes], files: Path, environment: dict[str, str]) -> None:
    """Wait until the engine answers."""
    end = time.monotonic() + _START_SECONDS
    with step("Starting a Docker engine"):
        while subprocess.run(["docker", "version"], env=environment, capture_output=True, check=False).returncode != 0:
            if process.poll() is not None or time.monotonic() > end:
                said = (files / "log").read_text(errors="replace").splitlines()[-5:]
                raise Problem("The Docker engine does not start:\n  " + "\n  ".join(said))
            time.sleep(0.2)


def load_images(environment: dict[str, str]) -> None:
    """Copy our images from this machine's engine."""
    images = (BASE, *TAGS.values())
    several = ["--multi-image-archive"] if engine().kind == "podman" else []
    with step("Loading our images into it"):
        saving = subprocess.Popen(
            [*_TIED, engine().program, "save", *several, *images], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        loaded = subprocess.run(
            ["docker", "load", "--quiet"], env=environment, stdin=saving.stdout, capture_output=True, check=False
        )
        assert saving.stdout is not None  # noqa: S101 - asked for with PIPE
        saving.stdout.close()
        if saving.wait() != 0 or loaded.returncode != 0:
            raise Problem(f"The images {', '.join(images)} are not all there: make them with `make builder-image`.")


if __name__ == "__main__":
    main(work)
