"""What can go wrong with a build, as one tree.

    BuildError
    ├── InvalidRequest      the request itself cannot be built
    ├── RefNotFound         the repository has no such branch, tag or commit
    ├── AmbiguousRef        the name means more than one thing
    ├── SourceUnavailable   the git server does not answer as one
    ├── AccessDenied        git, registry or host refused the credentials
    ├── RegistryUnavailable the registry does not answer as one
    ├── HostUnavailable     nothing here can run pods
    ├── QuotaExceeded       the host has no room for another build
    ├── PodRejected         the host refuses this pod
    ├── NameTaken           the pod's name belongs to another build
    ├── Unschedulable       no node takes the pod
    ├── ImagePullFailed     the builder image is not there
    ├── BuildFailed         the repository's own steps failed
    ├── OutOfMemory         the memory limit was reached
    ├── OutOfDisk           the storage limit was reached, or the disk is full
    ├── Evicted             the node needed the room
    ├── DeadlineExceeded    a time limit passed
    ├── PodLost             the pod ended or went away without a verdict
    ├── PushUnconfirmed     the image cannot be proven to be in the registry
    └── BuildStopped        somebody asked for the build to stop

Every error holds ``problem`` (what happened) and ``remedy`` (what to change), both positional, so
that it survives pickling. None inherits from a client library, and none ever holds a secret.
"""

from __future__ import annotations


class BuildError(Exception):
    """A build could not finish. ``str()`` gives the problem, then the remedy."""

    def __init__(self, problem: str, remedy: str, *details: object) -> None:
        super().__init__(problem, remedy, *details)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem} {self.remedy}".strip()


class InvalidRequest(BuildError):
    """The request cannot be built: a parameter is malformed, or the repository lacks what it names."""


class RefNotFound(BuildError):
    """The repository has no such branch, tag or commit."""


class AmbiguousRef(BuildError):
    """The name given stands for more than one branch, tag or commit."""


class SourceUnavailable(BuildError):
    """The git server cannot be reached, or does not answer as a git server. A later try may work."""


class AccessDenied(BuildError):
    """Git, the registry or the host refused the credentials; the text says which."""


class RegistryUnavailable(BuildError):
    """The registry cannot be reached, or does not answer as a registry. A later try may work."""


class HostUnavailable(BuildError):
    """Nothing here can run pods: no engine, or no answer from the cluster."""


class QuotaExceeded(BuildError):
    """The host has no room for another build, and waiting for room took too long."""


class PodRejected(BuildError):
    """The host refuses this pod: it is invalid, or a policy forbids it."""


class NameTaken(BuildError):
    """A pod of this name exists, but it builds something else."""


class Unschedulable(BuildError):
    """No node takes the pod within the time allowed."""


class ImagePullFailed(BuildError):
    """The builder image is not there, or cannot be pulled."""


class BuildFailed(BuildError):
    """The repository's own steps failed.

    ``exit_code`` is the failing step's, ``phase`` is ``"fetch"``, ``"build"`` or ``"push"``, and
    ``last_lines`` are the last lines of that phase's log, oldest first (at most 20).
    """

    def __init__(
        self,
        problem: str,
        remedy: str,
        exit_code: int = 1,
        phase: str = "build",
        last_lines: tuple[str, ...] = (),
    ) -> None:
        super().__init__(problem, remedy, exit_code, phase, last_lines)
        self.exit_code = exit_code
        self.phase = phase
        self.last_lines = last_lines

    def __str__(self) -> str:
        text = super().__str__()
        if not self.last_lines:
            return text
        return "\n".join((text, "The last lines were:", *(f"  {line}" for line in self.last_lines)))


class OutOfMemory(BuildError):
    """The build needed more memory than ``options.memory_limit`` allows."""


class OutOfDisk(BuildError):
    """The build needed more disk than it may use, or than there is."""


class Evicted(BuildError):
    """The node needed the room that the build took. A later try may work."""


class DeadlineExceeded(BuildError):
    """A time limit passed; the text says which and which setting holds it."""


class PodLost(BuildError):
    """The pod ended without a verdict, or somebody deleted it. A later try may work."""


class PushUnconfirmed(BuildError):
    """The build ended, but a part of the proof that the image is in the registry is missing."""


class BuildStopped(BuildError):
    """Somebody asked for this build to stop."""


def by_name(name: str) -> type[BuildError] | None:
    """Return the error class of this name, or None. Programs inside the pod report errors by name."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, BuildError) else None
