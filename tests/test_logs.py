"""Log bookkeeping: what is delivered is the log, however often and wherever its streams break.

Ids like L10 are rows of the fault table that the design was made from.
"""

from __future__ import annotations

import functools
import itertools
import re
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podbuild.logs import (
    CHUNK_CHARACTERS,
    CHUNK_LINES,
    CHUNK_SECONDS,
    LINE_LIMIT_BYTES,
    Bookmark,
    Chunk,
    Chunker,
    LineSplitter,
    RawLine,
    clean,
    parse_line,
)

START = datetime(2026, 11, 22, 23, 30, tzinfo=UTC)


@dataclass(frozen=True)
class Entry:
    """One line as the node stores it: pieces, each with its own time. Only long lines have more than one."""

    pieces: tuple[tuple[int, bytes], ...]

    @property
    def line(self) -> RawLine:
        """The line as a follower should deliver it."""
        return RawLine(stamp(self.pieces[0][0]), b"".join(text for _, text in self.pieces))


def entry(milliseconds: int, *pieces: bytes) -> Entry:
    """Return a line whose pieces were written a second and a half apart."""
    return Entry(tuple((milliseconds + 1500 * i, piece) for i, piece in enumerate(pieces)))


@functools.cache
def stamp(milliseconds: int) -> str:
    """Return a time as Kubernetes prints it."""
    return f"{START + timedelta(milliseconds=milliseconds):%Y-%m-%dT%H:%M:%S.%f}000Z"


def serve(log: Sequence[Entry], since: str | None, terminated: bool = True) -> bytes:
    """Return what the log endpoint sends: a model of a kubelet's, as measured.

    ``since`` is a whole second and inclusive, and every piece is compared by its own time: a stream
    that begins inside a long line begins with the rest of it, without a timestamp.
    """
    lines = []
    for item in log:
        served = [piece for piece in item.pieces if since is None or stamp(piece[0])[:19] + "Z" >= since]
        if served:
            text = b"".join(text for _, text in served)
            whole = len(served) == len(item.pieces)
            lines.append(stamp(served[0][0]).encode() + b" " + text if whole else text)
    return b"\n".join(lines) + (b"\n" if lines and terminated else b"")


class Follower:
    """The smallest follower there can be: it reads streams and keeps what the bookmark calls new."""

    def __init__(self) -> None:
        self.bookmark = Bookmark()
        self.delivered: list[RawLine] = []
        self.gaps = 0

    def read(self, stream: bytes, chunk_bytes: int = 1 << 20, last: bool = False) -> None:
        """Read one stream to where it breaks; or to the end of the log, if it is the last."""
        self.bookmark.restart()
        splitter = LineSplitter()
        for start in range(0, len(stream), chunk_bytes):
            self._take(splitter.feed(stream[start : start + chunk_bytes]))
        if last:
            self._take([splitter.tail()])

    def _take(self, raw_lines: list[bytes]) -> None:
        for raw in raw_lines:
            if (line := parse_line(raw)) and self.bookmark.accept(line):
                self.delivered.append(line)
                self.gaps += self.bookmark.unserved > 0


# ---------------------------------------------------------------- LineSplitter


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=6))
def test_l4_lines_are_the_same_wherever_chunks_end(data: bytes, cuts: list[int]) -> None:
    r"""Any bytes, cut anywhere, give the lines between ``\n`` and the rest, byte for byte."""
    splitter = LineSplitter()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]

    lines = [line for start, end in itertools.pairwise(edges) for line in splitter.feed(data[start:end])]

    assert [*lines, splitter.tail()] == data.split(b"\n")
    assert splitter.tail() == b"", "tail() forgets"


@pytest.mark.parametrize("separator", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_l4_only_a_newline_ends_a_line(separator: str) -> None:
    """What `str.splitlines` takes for a line's end is content."""
    raw = f"one{separator}still one".encode()

    assert LineSplitter().feed(raw + b"\n") == [raw]


@pytest.mark.parametrize("character", ["é", "€", "🚀"])
def test_l5_a_character_may_be_cut_at_any_byte(character: str) -> None:
    """UTF-8 split across chunks comes out whole."""
    raw = f"a{character}b\n".encode()
    for cut in range(len(raw)):
        splitter = LineSplitter()
        lines = splitter.feed(raw[:cut]) + splitter.feed(raw[cut:])
        assert [clean(line) for line in lines] == [f"a{character}b"]


@pytest.mark.parametrize("extra", [0, 1, 500])
@pytest.mark.parametrize("chunk_bytes", [1000, 1 << 20], ids=["in many chunks", "in one chunk"])
def test_l6_a_line_over_the_limit_ends_with_how_much_was_cut(extra: int, chunk_bytes: int) -> None:
    """The limit itself passes; one byte more is cut and counted; the next line is untouched."""
    stream = b"x" * (LINE_LIMIT_BYTES + extra) + b"\nnext\n"
    splitter = LineSplitter()

    lines = [
        line
        for start in range(0, len(stream), chunk_bytes)
        for line in splitter.feed(stream[start : start + chunk_bytes])
    ]

    note = f" [{extra} more bytes of this line were cut]".encode() if extra else b""
    assert lines == [b"x" * LINE_LIMIT_BYTES + note, b"next"]


def test_l6_a_line_of_200_mb_takes_no_memory() -> None:
    """Memory does not grow with the line."""
    splitter, block = LineSplitter(), b"x" * 65536
    tracemalloc.start()
    try:
        for _ in range(3200):
            assert splitter.feed(block) == []
        (line,) = splitter.feed(b"\n")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert line.endswith(f" [{3199 * 65536} more bytes of this line were cut]".encode())
    assert peak < 1024 * 1024


# ------------------------------------------------------------------ parse_line


@pytest.mark.parametrize(
    ("raw", "time", "text"),
    [
        pytest.param(b"2026-11-22T23:30:00.123456789Z a b", "2026-11-22T23:30:00.123456789Z", b"a b", id="kubernetes"),
        pytest.param(b"2026-11-22T23:30:00.000000000Z ", "2026-11-22T23:30:00.000000000Z", b"", id="empty line"),
        pytest.param(b"2026-11-22T23:30:00.5Z  a ", "2026-11-22T23:30:00.500000000Z", b" a ", id="zeros trimmed"),
        pytest.param(b"2026-11-22T23:30:00Z a", "2026-11-22T23:30:00.000000000Z", b"a", id="no fraction"),
        pytest.param(b"2026-11-22T23:30:00.1+00:00 a", "2026-11-22T23:30:00.100000000Z", b"a", id="podman in UTC"),
        pytest.param(b"2026-11-23T01:00:00.1+01:30 a", "2026-11-22T23:30:00.100000000Z", b"a", id="east of UTC"),
        pytest.param(b"2026-12-31T20:00:00-05:00 a", "2027-01-01T01:00:00.000000000Z", b"a", id="west, new year"),
        pytest.param(b"0001-01-01T00:00:00Z a", "0001-01-01T00:00:00.000000000Z", b"a", id="an engine's zero time"),
        pytest.param(
            b"2026-11-22T23:30:00Z 2026-11-22T23:30:00Z a",
            "2026-11-22T23:30:00.000000000Z",
            b"2026-11-22T23:30:00Z a",
            id="text that has a timestamp",
        ),
        pytest.param(
            b"2026-11-22T23:30:00Z \xff\x00\r\x1b", "2026-11-22T23:30:00.000000000Z", b"\xff\x00\r\x1b", id="any bytes"
        ),
    ],
)
def test_a_timestamp_has_one_spelling(raw: bytes, time: str, text: bytes) -> None:
    """Kubernetes, podman and docker print times differently; here all are UTC with nine digits."""
    line = parse_line(raw)

    assert line == RawLine(time, text)
    assert len(time) == 30


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"xxxxxxxx the rest of a long line", id="L7: rest of a long line"),
        pytest.param(b"unable to retrieve container logs for containerd://1", id="evicted"),
        pytest.param(b"2026-11-22T23:30:00.123", id="cut inside the timestamp"),
        pytest.param(b"2026-11-22T23:30:00.123456789Z", id="cut after the timestamp"),
        pytest.param(b"2026-11-22T23:30:00.1234567890Z a", id="ten digits"),
        pytest.param(b"2026-13-22T23:30:00Z a", id="no such month"),
        pytest.param(b"2026-11-22T24:30:00Z a", id="no such hour"),
        pytest.param(b"0001-01-01T00:00:00+01:00 a", id="before the year 1"),
        pytest.param(b"2026-11-22 23:30:00Z a", id="not RFC 3339"),
        pytest.param("٢٠٢٦-11-22T23:30:00Z a".encode(), id="digits of another script"),
        pytest.param(b" 2026-11-22T23:30:00Z a", id="blank first"),
    ],
)
def test_no_timestamp_no_line(raw: bytes) -> None:
    """What does not begin with a timestamp is no line of its own."""
    assert parse_line(raw) is None


def test_a_lines_moment_is_utc_with_microseconds() -> None:
    """Nanoseconds are cut, not rounded: a line never moves past the next."""
    line = RawLine("2026-11-22T23:30:00.123456999Z", b"")

    assert line.moment == datetime(2026, 11, 22, 23, 30, 0, 123456, tzinfo=UTC)
    assert line.moment.utcoffset() == timedelta(0)


# -------------------------------------------------------------------- Bookmark

#: Equal lines at one time, equal text at other times, a step back in time, and a second that leaves the window.
SMALL_LOG = [entry(0, b"a"), entry(0, b"a"), entry(900, b"b"), entry(100, b"a"), entry(3200, b"a"), entry(3200, b"b")]


def test_l10_every_way_to_cut_a_log_twice_at_any_byte_delivers_the_log() -> None:
    """By exhaustion, over the bytes of both streams: nothing lost, nothing twice, order kept."""
    expected = [item.line for item in SMALL_LOG]
    stream = serve(SMALL_LOG, None)
    for first in range(len(stream) + 1):
        once = Follower()
        once.read(stream[:first])
        for second in range(len(serve(SMALL_LOG, once.bookmark.since)) + 1):
            _follow(SMALL_LOG, [first, second], expected)


def test_l10_every_way_to_cut_a_log_three_times_delivers_the_log() -> None:
    """By exhaustion, at every kind of place: before, inside and after a timestamp, and around the newline."""
    expected = [item.line for item in SMALL_LOG]
    length = len(serve(SMALL_LOG[:1], None))
    places = [length * i + at for i in range(len(SMALL_LOG)) for at in (0, 15, length - 1)]
    for cuts in itertools.product([*places, length * len(SMALL_LOG)], repeat=3):
        _follow(SMALL_LOG, cuts, expected)


def _follow(log: Sequence[Entry], cuts: Sequence[int], expected: list[RawLine]) -> None:
    follower = Follower()
    for cut in cuts:
        follower.read(serve(log, follower.bookmark.since, terminated=False)[:cut])
        assert follower.delivered == expected[: len(follower.delivered)], cuts
    follower.read(serve(log, follower.bookmark.since, terminated=False), last=True)
    assert follower.delivered == expected, cuts
    assert not follower.gaps, cuts


@st.composite
def logs(draw: st.DrawFn) -> list[Entry]:
    """Return a log with equal times, equal lines, lines up to 1 s out of order, and long lines."""
    log, clock = [], 1000
    for _ in range(draw(st.integers(0, 25))):
        clock += draw(st.sampled_from([0, 0, 1, 400, 999, 1000, 2500]))
        if draw(st.integers(0, 9)) == 0:
            # A long line's pieces are the only records of their time: nothing comes between them.
            item = entry(clock, *draw(st.lists(st.sampled_from([b"long", b"x"]), min_size=2, max_size=4)))
            clock = item.pieces[-1][0]
        else:
            late = draw(st.sampled_from([0, 0, 0, 1, 500, 999]))
            item = entry(clock - late, draw(st.sampled_from([b"", b"a", b"b", b"\xff\r\x00", b"2026-11-22"])))
        log.append(item)
    return log


@settings(max_examples=300)
@given(
    log=logs(),
    cuts=st.lists(st.integers(0, 2000), max_size=8),
    chunk_bytes=st.integers(1, 200),
    terminated=st.booleans(),
)
def test_l7_l10_l12_any_log_cut_anywhere_any_number_of_times_is_delivered_exactly(
    log: list[Entry], cuts: list[int], chunk_bytes: int, terminated: bool
) -> None:
    """Delivered is always a beginning of the log, at the end all of it, and there is no false alarm of a gap."""
    expected = [item.line for item in log]
    follower = Follower()
    for cut in cuts:
        stream = serve(log, follower.bookmark.since, terminated)
        follower.read(stream[: cut % (len(stream) + 1)], chunk_bytes)
        assert follower.delivered == expected[: len(follower.delivered)]

    follower.read(serve(log, follower.bookmark.since, terminated), chunk_bytes, last=True)

    assert follower.delivered == expected
    assert follower.gaps == follower.bookmark.unserved == 0


def test_l10_a_drop_during_the_replay_forgets_nothing() -> None:
    """The flaw of counting lines per second: two streams that break inside one second repeat nothing."""
    log = [entry(i, b"%d" % i) for i in range(5)]
    follower = Follower()
    line_bytes = len(serve(log[:1], None))

    for lines in (4, 2, 1, 0, 5):
        follower.read(serve(log, follower.bookmark.since)[: lines * line_bytes])

    assert follower.delivered == [item.line for item in log]


def test_l10_another_text_at_the_same_time_is_another_line() -> None:
    """When rotation has taken the first of two lines with one time, the second is still delivered."""
    log = [entry(0, b"first"), entry(0, b"second")]
    follower = Follower()
    follower.read(serve(log[:1], None))

    follower.read(serve(log[1:], follower.bookmark.since))

    assert follower.delivered == [item.line for item in log]


def test_l12_an_open_tail_is_no_line_until_the_container_has_ended() -> None:
    """A line cut by a drop comes once and whole; the last line without a newline comes at the very end."""
    log = [entry(0, b"one"), entry(1, b"two")]
    follower = Follower()

    follower.read(serve(log, None, terminated=False))
    assert [line.text for line in follower.delivered] == [b"one"]

    follower.read(serve(log, follower.bookmark.since, terminated=False), last=True)
    assert [line.text for line in follower.delivered] == [b"one", b"two"]


def test_l7_a_stream_that_begins_inside_a_long_line_does_not_repeat_its_end() -> None:
    """Resuming between a long line's pieces brings a rest without timestamp, and that is dropped."""
    log = [entry(0, b"x" * 9, b"y" * 9, b"z" * 9), entry(3001, b"next"), entry(3002, b"last")]
    follower = Follower()
    follower.read(serve(log[:2], None))
    resumed = serve(log, follower.bookmark.since)
    assert resumed.startswith(b"yyy"), "the model begins inside the long line"

    follower.read(resumed)

    assert follower.delivered == [item.line for item in log]


@pytest.mark.parametrize(
    ("times", "since"),
    [
        pytest.param([], None, id="nothing yet"),
        pytest.param([5000], "2026-11-22T23:30:03Z", id="the overlap before the line"),
        pytest.param([5999], "2026-11-22T23:30:03Z", id="down to the whole second"),
        pytest.param([5000, 4100], "2026-11-22T23:30:03Z", id="never back"),
        pytest.param([1000], "2026-11-22T23:29:59Z", id="over the hour's edge"),
    ],
)
def test_l11_streams_resume_by_the_logs_own_time(times: list[int], since: str | None) -> None:
    """The node's clock is on both ends, so ours does not matter; and servers cut to the whole second anyway."""
    bookmark = Bookmark()
    for at in times:
        bookmark.accept(RawLine(stamp(at), b""))

    assert bookmark.since == since


def test_a_log_without_a_clock_is_still_followed() -> None:
    """An engine's zero time has nothing before it to resume from."""
    bookmark = Bookmark()

    assert bookmark.accept(RawLine("0001-01-01T00:00:00.000000000Z", b""))
    assert bookmark.since == "0001-01-01T00:00:00Z"


@given(count=st.integers(2, 12), read=st.integers(1, 12), rotated=st.integers(1, 12))
def test_l8_rotation_that_takes_unread_lines_never_goes_unnoticed(count: int, read: int, rotated: int) -> None:
    """If lines between two streams are gone, so is part of the overlap, and `unserved` says so."""
    log = [entry(700 * i, b"%d" % i) for i in range(count)]
    follower = Follower()
    follower.read(serve(log[:read], None))
    rest = log[rotated:]

    follower.read(serve(rest, follower.bookmark.since), last=True)

    if read < rotated and read < count:
        assert follower.bookmark.unserved
        assert bool(follower.gaps) == bool(rest), "told with the first line after the gap"
    assert follower.delivered == [item.line for item in log[:read] + log[max(read, rotated) :]]


def test_l10_memory_is_bounded_by_the_overlap() -> None:
    """A log of hours needs no more memory than its last seconds."""
    bookmark = Bookmark()
    lines = [RawLine(stamp(100 * i), b"line") for i in range(20_000)]
    tracemalloc.start()
    try:
        for line in lines:
            assert bookmark.accept(line)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 64 * 1024


# ----------------------------------------------------------------------- clean


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        pytest.param(b"plain\ttext", "plain\ttext", id="tabs stay"),
        pytest.param("Ünï 🚀".encode(), "Ünï 🚀", id="UTF-8 stays"),
        pytest.param(b"\x1b[1;31mred\x1b[0m", "\x1b[1;31mred\x1b[0m", id="colours stay"),
        pytest.param(b"\x1b[38;2;1;2;3mx\x1b[4:3mx\x1b[m", "\x1b[38;2;1;2;3mx\x1b[4:3mx\x1b[m", id="all colours stay"),
        pytest.param(b"a\xff\xfeb", r"a\xff\xfeb", id="L5: not UTF-8"),
        pytest.param("🚀".encode()[:3], r"\xf0\x9f\x9a", id="L5: half a character"),
        pytest.param(b"\xed\xa0\x80", r"\xed\xa0\x80", id="L5: half a surrogate pair"),
        pytest.param(b"\x1b\xff", r"\xff", id="L5: not UTF-8 after an escape"),
        pytest.param(b"\xc2\x00\x9b2J", r"\xc2\x9b2J", id="L18: what is left does not join to a character"),
        pytest.param(b"a\x00b\x07\x08\x7f", "ab", id="L18: NUL, bell, backspace, delete"),
        pytest.param(b"\x1b[2K\x1b[1Agone", "gone", id="L18: cursor movement"),
        pytest.param(b"\x1b[?25l\x1b[>4;2mx", "x", id="L18: private sequences, though they end like a colour"),
        pytest.param(b"\x1b]0;title\x07text", "text", id="L18: window title"),
        pytest.param(b"\x1b]8;;http://x.org\x1b\\link\x1b]8;;\x1b\\", "link", id="L18: hyperlink"),
        pytest.param(b"\x1b]0;no end", "0;no end", id="L18: a string without an end hides nothing"),
        pytest.param(b"\x1bPq#0\x1b\\text", "text", id="L18: device control string"),
        pytest.param(b"\x1b(Btext\x1b7\x1bc", "text", id="L18: character set, save, reset"),
        pytest.param("\x9b2Jtext\x9d0;t\x9cx".encode(), "textx", id="L18: one-character forms of the same"),
        pytest.param("a\x85b".encode(), "ab", id="L18: C1"),
        pytest.param(b"\x1b\x1b[2K[31mx", "[31mx", id="L18: what is left does not join to a sequence"),
        pytest.param(b"\x1b", "", id="L18: escape alone"),
        pytest.param(b"10%\r50%\r100%", "100%", id="L18: progress, last state"),
        pytest.param(b"10%\r100%\r\x1b[K\x1b[0m\r", "100%", id="L18: progress, last state that shows something"),
        pytest.param(b"text\r", "text", id="L18: the end of a Windows line"),
        pytest.param(b"\r\r", "", id="L18: nothing but returns"),
        pytest.param(b"  ", "  ", id="blanks stay"),
        pytest.param(b"2026-11-22T23:30:00Z \nfake record", "2026-11-22T23:30:00Z fake record", id="L18: fake record"),
    ],
)
def test_a_line_is_shown_as_readable_text(raw: bytes, shown: str) -> None:
    """Colours and tabs stay; what moves the cursor, hides text or rings bells goes."""
    assert clean(raw) == shown


FRAGMENTS = [
    b"\x1b",
    b"[",
    b"]",
    b"31m",
    b"2K",
    b"\r",
    b"\n",
    b"\x00",
    b"\x9b",
    b"\xc2\x9b",
    b"\xc2\x9c",
    b"\x07",
    b"P",
]


@settings(max_examples=300)
@given(raw=st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=3)), max_size=12).map(b"".join))
def test_l18_cleaning_leaves_only_colours_and_cleaning_twice_changes_nothing(raw: bytes) -> None:
    """For any bytes: no control character outside a colour, the same again when repeated, no longer if UTF-8."""
    shown = clean(raw)

    assert re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", re.sub(r"\x1b\[[0-9;:]*m", "", shown)) is None
    assert clean(shown.encode()) == shown
    if "\\x" not in shown:
        assert len(shown.encode()) <= len(raw)


@pytest.mark.parametrize("hostile", [b"\x1b]", b"\x1b[", b"\x1b[0", b"\x1bP\x1b", b"\r", b"\xc2\x9d", b"\x1b "])
def test_l18_a_hostile_line_does_not_stall_the_follower(hostile: bytes) -> None:
    """Cleaning is linear: the longest line of nothing but beginnings takes no longer than any other."""
    began = datetime.now(UTC)
    clean(hostile * (LINE_LIMIT_BYTES // len(hostile)))

    assert datetime.now(UTC) - began < timedelta(seconds=2)


# --------------------------------------------------------------------- Chunker


def chunks_of(lines: Sequence[tuple[str, str, float]]) -> list[Chunk]:
    """Return all chunks of (container, text, now)."""
    chunker = Chunker()
    chunks = []
    for container, text, now in lines:
        chunks += chunker.add(container, START + timedelta(seconds=now), text, now)
    return chunks + chunker.flush()


@pytest.mark.parametrize(
    ("lines", "counts"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([("b", "x", 0.0)] * 250, [100, 100, 50], id="100 lines"),
        pytest.param([("b", "x", 0.0), ("b", "x", 0.9), ("b", "x", 1.0)], [2, 1], id="1 s from the first line"),
        pytest.param([("b", "x", 0.0), ("c", "x", 0.0), ("b", "x", 0.0)], [1, 1, 1], id="one container each"),
        pytest.param([("b", "x" * 8000, 0.0)] * 5, [2, 2, 1], id="16 KB"),
        pytest.param([("b", "x", 0.0), ("b", "x" * 20000, 0.0), ("b", "x", 0.0)], [1, 1, 1], id="a large line alone"),
        pytest.param([("b", "", 0.0)] * 3, [3], id="empty lines are lines"),
    ],
)
def test_a_chunk_ends_at_the_first_limit(lines: list[tuple[str, str, float]], counts: list[int]) -> None:
    """100 lines, 16 KB, 1 s, another container: whichever comes first."""
    assert [chunk.lines for chunk in chunks_of(lines)] == counts


@given(
    lines=st.lists(
        st.tuples(
            st.sampled_from(["build", "courier"]),
            st.sampled_from(["", "x", "y" * 500, "z" * CHUNK_CHARACTERS, "z" * 20_000]),
            st.sampled_from([0.0, 0.0, 0.0, 0.01, 1.5]),
        ),
        max_size=300,
    )
)
def test_chunks_hold_every_line_in_order_within_the_limits(lines: list[tuple[str, str, float]]) -> None:
    """Joined again, the chunks are the lines; no chunk mixes containers; a chunk has its first line's time."""
    clock, timed = 0.0, []
    for container, text, wait in lines:
        clock += wait
        timed.append((container, text, clock))

    chunks = chunks_of(timed)

    assert [(c.container, text) for c in chunks for text in c.text.split("\n")] == [(c, t) for c, t, _ in timed]
    first = 0
    for chunk in chunks:
        assert 1 <= chunk.lines <= CHUNK_LINES
        assert chunk.lines == 1 or len(chunk.text) <= CHUNK_CHARACTERS
        assert chunk.time == START + timedelta(seconds=timed[first][2])
        first += chunk.lines


def test_the_chunker_says_when_it_must_be_flushed() -> None:
    """`due` counts down from the first line, and `flush` at that moment brings the lines, not before."""
    chunker = Chunker()
    assert chunker.due(0.0) is None
    assert chunker.add("build", START, "one", 10.0) == []
    assert chunker.add("build", START, "two", 10.4) == []

    assert chunker.due(10.4) == pytest.approx(CHUNK_SECONDS - 0.4)
    assert chunker.flush(10.9) == []
    assert chunker.due(99.0) == 0.0
    assert chunker.flush(11.0) == [Chunk("build", START, "one\ntwo", 2)]
    assert chunker.flush() == []
    assert chunker.due(11.0) is None
