"""How the two containers of a build meet, notice each other's end, and report.

Each program locks a file of its own on the shared volume, then renames ``NAME.started`` into
place. The other waits for that file, then blocks on the lock: the kernel drops a lock when its
holder dies, whatever killed it, so a death is noticed at once. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

WORK = Path("/work")
POD = Path("/podbuild/pod")
TERMINATION_LOG = Path("/dev/termination-log")
TERMINATION_LIMIT = 4096
#: How long one container waits for the other to start: the kubelet starts both within seconds.
MEETING_SECONDS = 120
_POLL_SECONDS = 0.02


class Failure(Exception):
    """Why this container ends: the name of an error that podbuild knows, what happened, what to change."""

    def __init__(self, error: str, problem: str, remedy: str, *, exit_code: int = 1, **details: Any) -> None:
        super().__init__(problem)
        self.exit_code = exit_code
        self.report = {"error": error, "problem": problem, "remedy": remedy, "exit_code": exit_code, **details}


class PartnerLost(Failure):
    """The other container ended first. Its own end says why, so this report is marked as a consequence."""

    def __init__(self, problem: str) -> None:
        super().__init__("PodLost", problem, "Run the build again.", consequence=True)


def system_failure(container: str, error: OSError) -> Failure:
    """Return what an operating system error means for the build."""
    if is_full(error):
        return Failure("OutOfDisk", "There is no disk space left.", "Free some, or raise `options.storage_limit`.")
    return Failure("PodLost", f"{container} met an unexpected error: {error.strerror}.", "Run the build again.")


def is_full(error: OSError) -> bool:
    """Return whether an error says that there is no room on a disk."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def read_pod(folder: Path = POD) -> dict[str, Any]:
    """Return what is to be built: the pod's identity and settings, public both, as the host laid them down."""
    identity: dict[str, Any] = json.loads((folder / "identity").read_text())
    settings: dict[str, Any] = json.loads((folder / "settings").read_text())
    return {**identity["request"], **settings, "image": identity["image"]}


def say(text: str) -> None:
    """Write one line to the container's log, in one write: the log keeps it as one piece."""
    os.write(1, f"{text}\n".encode(errors="backslashreplace"))


def take_lock(name: str, work: Path = WORK) -> int:
    """Lock this container's own file until the end of the process, announce it, and return the descriptor."""
    lock = os.open(work / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    announce(f"{name}.started", work=work)
    return lock


def announce(name: str, content: str = "", *, work: Path = WORK) -> None:
    """Put a file into the shared volume in one step: nobody ever sees half of it."""
    unfinished = work / f".{name}.{os.getpid()}"
    unfinished.write_text(content)
    unfinished.rename(work / name)


def await_start(name: str, work: Path = WORK, *, seconds: float = MEETING_SECONDS) -> int:
    """Wait for the other container and return a descriptor of its lock. Raises `PartnerLost` after 120 s."""
    end = time.monotonic() + seconds
    while not (work / f"{name}.started").exists():
        if time.monotonic() > end:
            raise PartnerLost(f"The container {name} did not start within {seconds:g} s.")
        time.sleep(_POLL_SECONDS)
    return os.open(work / f"{name}.lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)


def await_death(lock: int) -> None:
    """Block until the holder of the lock is dead."""
    fcntl.flock(lock, fcntl.LOCK_SH)


def keep_deadline(seconds: float, started: float, report_to: Path = TERMINATION_LOG) -> None:
    """Let a signal end this container when its time is over, and another when it is told to stop."""

    def late(_signal: int, _frame: FrameType | None) -> NoReturn:
        finish(
            Failure(
                "DeadlineExceeded",
                f"The build took longer than {seconds / 60:g} min.",
                "Raise `options.timeout_minutes`, or make the build shorter.",
                exit_code=124,
            ),
            report_to,
        )

    def stopped(_signal: int, _frame: FrameType | None) -> NoReturn:
        finish(Failure("BuildStopped", "The build was told to stop.", "Run it again.", exit_code=143), report_to)

    signal.signal(signal.SIGTERM, stopped)
    signal.signal(signal.SIGINT, stopped)
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds - (time.time() - started)))


def finish(outcome: Failure | dict[str, Any], report_to: Path = TERMINATION_LOG) -> NoReturn:
    """Report in the termination message and end the container at once, with everything it still runs."""
    report = outcome.report if isinstance(outcome, Failure) else outcome
    # On a full disk neither may be possible; the end, and its exit code, always is.
    with contextlib.suppress(OSError):
        write_report(report, report_to)
    with contextlib.suppress(OSError):
        if isinstance(outcome, Failure) and not outcome.report.get("consequence"):
            say(f"{report['error']}: {report['problem']} {report['remedy']}")
    os._exit(outcome.exit_code if isinstance(outcome, Failure) else 0)


def write_report(report: dict[str, Any], path: Path = TERMINATION_LOG) -> None:
    """Write the termination message: JSON of at most 4,096 bytes, the texts cut where they must be."""
    for limit in (1500, 500, 100):
        cut = {k: v[:limit] if isinstance(v, str) else v for k, v in report.items()}
        encoded = json.dumps(cut).encode()
        if len(encoded) <= TERMINATION_LIMIT:
            break
    path.write_bytes(encoded)
