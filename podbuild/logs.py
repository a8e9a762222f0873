"""A container's log, from raw bytes to readable chunks, each line exactly once. Pure: no clock, no I/O.

A log arrives over streams that break anywhere, and a new stream can start at a whole second only.
The idea of resuming there is stern's (https://github.com/stern/stern, ``tail.go``). stern counts the
lines of the last second and forgets the count when a second stream breaks during the replay; here
the streams overlap by some seconds, and the *multiset* of what was delivered in them decides.
One container's follower goes through it like this::

    bookmark.restart()
    splitter = LineSplitter()
    for chunk in stream_from(bookmark.since):
        for raw in splitter.feed(chunk):
            if (line := parse_line(raw)) and bookmark.accept(line):
                deliver(redactor.redact(clean(line.text)))

When the container has ended, one last complete stream is read, and `LineSplitter.tail` with it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

#: A longer line is cut. Kubernetes and the engines set no limit of their own.
LINE_LIMIT_BYTES = 64 * 1024
#: How far a new stream reaches back. Lines from stdout and stderr may be out of order by less than this.
OVERLAP_SECONDS = 2

#: What Prefect takes well: rows are slow, and Prefect Cloud cuts a row at 25,000 characters.
CHUNK_LINES = 100
CHUNK_CHARACTERS = 16 * 1024
CHUNK_SECONDS = 1.0

_STAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):(\d\d)) ")
_SECOND_LENGTH = len("2026-11-22T23:30:00")


class LineSplitter:
    r"""Raw bytes, as they come, to complete raw lines. One for each stream.

    Only ``\n`` ends a line. Memory stays under the limit however long a line is: the rest of it is
    counted, and the line ends with a note that says how many bytes were cut.
    """

    def __init__(self, limit_bytes: int = LINE_LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._kept = bytearray()
        self._cut = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the lines that this chunk completes, without their newline."""
        *ended, rest = chunk.split(b"\n")
        lines = []
        for piece in ended:
            self._keep(piece)
            lines.append(self.tail())
        self._keep(rest)
        return lines

    def tail(self) -> bytes:
        """Return what came after the last newline, and forget it.

        It is a line only when the container has ended; else the next stream brings it complete.
        """
        line = bytes(self._kept)
        if self._cut:
            line += f" [{self._cut} more bytes of this line were cut]".encode()
        self._kept.clear()
        self._cut = 0
        return line

    def _keep(self, piece: bytes) -> None:
        room = self._limit - len(self._kept)
        self._kept += piece[:room]
        self._cut += max(0, len(piece) - room)


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line with its timestamp taken off."""

    #: RFC 3339 in UTC with nine digits, always 30 characters, so that text order is time order.
    time: str
    text: bytes

    @property
    def moment(self) -> datetime:
        """The time as a UTC datetime; nanoseconds are cut to microseconds."""
        return datetime.fromisoformat(self.time[: _SECOND_LENGTH + 7]).replace(tzinfo=UTC)


def parse_line(raw: bytes) -> RawLine | None:
    """Return the line that Kubernetes, podman or docker printed as ``<timestamp> <text>``, or None.

    Kubernetes prints UTC with nine digits; the engines print any offset and trim zeros. A line
    without a timestamp is the rest of a long line whose beginning lies before the stream's: drop it.
    """
    if not (found := _STAMP.match(raw)):
        return None
    second, fraction, sign, hours, minutes = found.groups()
    try:
        moment = datetime.fromisoformat(second.decode())
        if sign:
            offset = timedelta(hours=int(hours), minutes=int(minutes))
            moment += offset if sign == b"-" else -offset
    except (ValueError, OverflowError):
        return None
    digits = (fraction or b"").decode().ljust(9, "0")
    return RawLine(time=f"{moment.isoformat()}.{digits}Z", text=raw[found.end() :])


class Bookmark:
    """How far one container's log was delivered: exactly once, over any number of streams.

    It keeps the multiset of (time, hash of text) of what was delivered since `since`, so equal
    lines, equal times and lines slightly out of order stay right, and memory is bounded by what is
    written in that window. A new stream serves those lines again before any new one.

    A node clock that is set back by more than the overlap is beyond it: no stream can be resumed by
    time then, and lines may be lost until the clock has caught up.
    """

    def __init__(self, overlap_seconds: int = OVERLAP_SECONDS) -> None:
        self._overlap = timedelta(seconds=overlap_seconds)
        self._newest = ""
        self._since = ""
        #: Second → what was delivered of it.
        self._delivered: dict[str, Counter[bytes]] = {}
        #: What the current stream has yet to serve again.
        self._owed: Counter[bytes] = Counter()
        self._unserved = 0

    @property
    def since(self) -> str | None:
        """The whole second to resume from, for ``sinceTime``; None before the first line."""
        return f"{self._since}Z" if self._since else None

    @property
    def unserved(self) -> int:
        """How many delivered lines, from `since` on, the current stream has not served again.

        0 when the first new line comes and when a complete stream ends. If not, the node has
        rotated the log in between: lines between the last one delivered and that may be missing.
        """
        return self._unserved

    def restart(self) -> None:
        """Begin a new stream, which starts at `since`."""
        self._owed = Counter()
        for lines in self._delivered.values():
            self._owed.update(lines)
        self._unserved = self._owed.total()

    def accept(self, line: RawLine) -> bool:
        """Return whether the line is new. True exactly once for each line of the log."""
        key = hashlib.blake2b(line.time.encode() + line.text, digest_size=16).digest()
        if key in self._owed:
            self._unserved -= 1
            self._owed[key] -= 1
            if not self._owed[key]:
                del self._owed[key]
            return False
        second = line.time[:_SECOND_LENGTH]
        if second > self._newest:
            self._advance(second)
        if second not in self._delivered:
            self._delivered[second] = Counter()
        self._delivered[second][key] += 1
        return True

    def _advance(self, second: str) -> None:
        self._newest = second
        newest = datetime.fromisoformat(second)
        # An engine that lost the time prints the year 1, and there is nothing before it.
        self._since = (max(newest, datetime.min + self._overlap) - self._overlap).isoformat()
        self._delivered = {s: lines for s, lines in self._delivered.items() if s >= self._since}


# ECMA-48: control sequences, control strings, all other escape sequences, and the controls themselves.
# A control string without its end keeps its text: hiding the rest of a line is what an attacker wants.
_ESCAPE = re.compile(
    r"(\x1b\[[0-9;:]*m)"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x00-\x1f\x7f-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
    r"|[\x00-\x08\x0a-\x0c\x0e-\x1f\x7f-\x9f]"
)
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_NOT_UTF8 = {0xDC00 + byte: f"\\x{byte:02x}" for byte in range(0x80, 0x100)}


def clean(text: bytes) -> str:
    r"""Return a line as safe, readable text: colours stay, all other control characters go.

    Bytes that are not UTF-8 show as ``\xff``. Of a progress bar that overwrites itself with ``\r``,
    the last state that shows something stays. Cleaning twice changes nothing.
    """
    # Escaped only at the end: a backslash of ours must not complete an escape sequence of theirs.
    decoded = text.decode("utf-8", "surrogateescape")
    if decoded.isprintable():  # nearly every line, and many times faster
        return decoded
    kept = _ESCAPE.sub(r"\1", decoded)
    if "\r" in kept:
        kept = next((s for s in reversed(kept.split("\r")) if _COLOUR.sub("", s).strip()), "")
    return kept.translate(_NOT_UTF8)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive lines of one container, joined by newlines."""

    container: str
    #: The first line's.
    time: datetime
    text: str
    lines: int


class Chunker:
    """Lines to chunks of about 100 lines, 16 KB or 1 s, whichever comes first, in the order they came.

    A chunk holds one container's lines only, and a line over 16 KB goes alone. ``now`` is any clock
    that counts seconds and never goes back.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._size = 0
        self._container = ""
        self._time = datetime.min
        self._began = 0.0

    def add(self, container: str, time: datetime, text: str, now: float) -> list[Chunk]:
        """Take one line; return the chunks that must go now."""
        chunks = self.flush(now)
        if container != self._container or self._size + len(text) > CHUNK_CHARACTERS:
            chunks += self.flush()
        if not self._lines:
            self._container, self._time, self._began = container, time, now
        self._lines.append(text)
        self._size += len(text) + 1
        if len(self._lines) >= CHUNK_LINES or self._size >= CHUNK_CHARACTERS:
            chunks += self.flush()
        return chunks

    def flush(self, now: float | None = None) -> list[Chunk]:
        """Return what is pending: all of it, or only if it is due at ``now``."""
        if not self._lines or (now is not None and now - self._began < CHUNK_SECONDS):
            return []
        chunk = Chunk(self._container, self._time, "\n".join(self._lines), len(self._lines))
        self._lines, self._size = [], 0
        return [chunk]

    def due(self, now: float) -> float | None:
        """Return how many seconds are left until the pending lines must go; None if there are none."""
        return max(0.0, self._began + CHUNK_SECONDS - now) if self._lines else None
