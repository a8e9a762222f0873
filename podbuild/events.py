"""What a follower of a build sees, in order: `Pending`, `Running`, `Line` and `Gap`, at last one `Finished`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from podbuild.errors import BuildError


@dataclass(frozen=True, slots=True)
class Pending:
    """The pod waits. ``reason`` says for what, in a sentence; another reason is another event."""

    reason: str


@dataclass(frozen=True, slots=True)
class Running:
    """The pod's containers have started."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a container's log, readable and redacted, delivered exactly once."""

    #: When the container wrote it by the node's clock: UTC, microseconds.
    time: datetime
    container: str
    text: str


@dataclass(frozen=True, slots=True)
class Gap:
    """Lines of a container's log are lost: the node rotated or removed them before they were read."""

    container: str
    #: The last line before the gap, or None where the log's beginning is missing.
    since: datetime | None
    #: The first line after the gap, or None where the log's end is missing.
    until: datetime | None
    #: The gap as a sentence for people, with its size where that is known.
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The build is over; nothing follows. ``error`` says why it failed, or is None."""

    error: BuildError | None = None


Event = Pending | Running | Line | Gap | Finished
