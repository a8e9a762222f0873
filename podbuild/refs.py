"""What a git server says about its refs, in each of its four dialects, and which ref a name means.

Pure: bytes in, refs out. Every parser raises `ValueError` at the first thing that git would not say,
because a login page or a proxy's apology must never pass for an empty repository.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from podbuild.names import is_commit, printable

BRANCHES = "refs/heads/"
TAGS = "refs/tags/"
FLUSH = b"0000"
DELIMITER = b"0001"
#: git's own commands shorten to at least 7 digits. Fewer, and English words are commits: "face", "added".
ABBREVIATION = re.compile(r"[0-9a-fA-F]{7,63}")

_LENGTH = re.compile(rb"[0-9a-fA-F]{4}")
_MOST_NEAR_NAMES = 5


@dataclass(slots=True)
class Refs:
    """The refs that a server shows. Names that no caller could ask for (unprintable ones) are left out."""

    #: Full name (``HEAD``, ``refs/heads/main``) → commit. An annotated tag has the commit that it tags.
    commits: dict[str, str] = field(default_factory=dict)
    #: The branch that HEAD stands for, as a full name; "" if HEAD is detached or the server does not say.
    head: str = ""

    def add(self, name: str, commit: str) -> None:
        """Add a ref; ``name^{}`` replaces what ``name`` was. Raises `ValueError` for what is no ref."""
        if not is_commit(commit) or not name:
            raise ValueError("something that is not a list of refs")
        if name.isprintable():
            self.commits[name.removesuffix("^{}")] = commit

    def point_head(self, target: str) -> None:
        if target.startswith("refs/") and target.isprintable():
            self.head = target

    def find(self, name: str) -> list[str]:
        """Return the full names that a name has here, at most two: exact matches only.

        ``HEAD`` and what starts with ``refs/`` are full names and mean nothing else. Any other name may
        be a branch, or a tag.
        """
        full = [name] if name == "HEAD" or name.startswith("refs/") else [BRANCHES + name, TAGS + name]
        return [n for n in full if n in self.commits]

    def commits_like(self, abbreviation: str) -> set[str]:
        """Return the commits of all refs that begin with these hex digits."""
        return {c for c in self.commits.values() if c.startswith(abbreviation.lower())}

    def near(self, name: str) -> list[str]:
        """Return up to five branches and tags whose names are close to this one, the closest first.

        For a full name they are full names. Close to HEAD is every branch.
        """
        named = [n for n in self.commits if n.startswith((BRANCHES, TAGS))]
        if name == "HEAD":
            return sorted(n.removeprefix(BRANCHES) for n in named if n.startswith(BRANCHES))[:_MOST_NEAR_NAMES]
        if not name.startswith("refs/"):
            named = [n.removeprefix(BRANCHES).removeprefix(TAGS) for n in named]
        # Somebody who forgot a folder ("login" for "feature/login") means that, whatever difflib counts.
        inside = [n for n in named if n.endswith(f"/{name}")]
        return list(dict.fromkeys(inside + difflib.get_close_matches(name, named, _MOST_NEAR_NAMES)))[:_MOST_NEAR_NAMES]


def prefixes_for(name: str) -> tuple[str, ...]:
    """Return what to ask a server for, so that its answer can hold what the name means, and HEAD."""
    if name == "HEAD":
        return ("HEAD",)
    return ("HEAD", name) if name.startswith("refs/") else ("HEAD", BRANCHES + name, TAGS + name)


# --- pkt-lines: git's framing -----------------------------------------------------------------------------


def encode_packet(line: str) -> bytes:
    """Return one pkt-line."""
    content = f"{line}\n".encode()
    return b"%04x" % (len(content) + 4) + content


def decode_packets(data: bytes) -> list[str]:
    """Return the pkt-lines without their newline; control packets (flush and the like) are "".

    Names that are not UTF-8 come out with surrogates, which are not printable. Raises `ValueError`
    where the framing is broken or cut short, and for the packet in which a server reports an error.
    """
    packets: list[str] = []
    position = 0
    while position < len(data):
        length = data[position : position + 4]
        size = int(length, 16) if _LENGTH.fullmatch(length) else 3
        if size < 4:
            if length not in (FLUSH, DELIMITER, b"0002"):
                raise ValueError("something that is not git's protocol")
            size, content = 4, b""
        else:
            content = data[position + 4 : position + size]
            if len(content) != size - 4:
                raise ValueError("an answer that is cut short")
        text = content.removesuffix(b"\n").decode(errors="surrogateescape")
        if text.startswith("ERR "):
            raise ValueError(f"the error '{printable(text[4:])}'")
        packets.append(text)
        position += size
    if not packets or data[position - 4 : position] != FLUSH:
        raise ValueError("an answer that is cut short")
    return packets


# --- the four dialects ------------------------------------------------------------------------------------


def parse_greeting(data: bytes) -> Refs | list[str]:
    """Return what a smart server says first: all its refs (protocol 0 and 1), or its capabilities (2)."""
    lines = decode_packets(data)
    if lines[0].startswith("# service="):
        if lines[0] != "# service=git-upload-pack" or lines[1:2] != [""]:
            raise ValueError("a service that was not asked for")
        # A flush follows even where there is no ref at all; without one, something is missing.
        if not (lines := lines[2:]):
            raise ValueError("an answer that is cut short")
    elif not lines[0]:
        raise ValueError("an empty answer")
    lines = [line for line in lines if line]
    if lines[:1] == ["version 2"]:
        if not any(line.partition("=")[0] == "ls-refs" for line in lines):
            raise ValueError("protocol version 2 without ls-refs")
        return lines[1:]
    return _parse_advertisement(lines[1:] if lines[:1] == ["version 1"] else lines)


def _parse_advertisement(lines: list[str]) -> Refs:
    refs = Refs()
    for number, line in enumerate(lines):
        line, nul, capabilities = line.partition("\0")
        if nul and number == 0:
            for capability in capabilities.split():
                if capability.startswith("symref=HEAD:"):
                    refs.point_head(capability.removeprefix("symref=HEAD:"))
        first, _, name = line.partition(" ")
        # An empty repository has nothing to hang its capabilities on but this.
        if first != "shallow" and name != "capabilities^{}":
            refs.add(name, first)
    return refs


def ls_refs_request(prefixes: Iterable[str], capabilities: list[str]) -> bytes:
    """Return the body of a protocol 2 request for the refs with these prefixes; for all, if there are none."""
    formats = [c for c in capabilities if c.startswith("object-format=")]
    features = next(c for c in capabilities if c.partition("=")[0] == "ls-refs").partition("=")[2].split()
    # `unborn`: a HEAD whose branch has no commit yet is shown as well.
    arguments = ["peel", "symrefs", *(f for f in features if f == "unborn"), *(f"ref-prefix {p}" for p in prefixes)]
    head = b"".join(encode_packet(line) for line in ("command=ls-refs", *formats[:1]))
    return head + DELIMITER + b"".join(map(encode_packet, arguments)) + FLUSH


def parse_ls_refs(data: bytes) -> Refs:
    """Return the answer to `ls_refs_request`."""
    refs = Refs()
    for line in filter(None, decode_packets(data)):
        commit, _, rest = line.partition(" ")
        name, *attributes = rest.split(" ")
        for attribute in attributes:
            key, _, value = attribute.partition(":")
            if key == "peeled":
                commit = value
            elif key == "symref-target" and name == "HEAD":
                refs.point_head(value)
        if commit != "unborn":
            refs.add(name, commit)
    return refs


def parse_listing(data: bytes) -> Refs:
    """Return the refs of a listing: the file ``info/refs``, or what ``git ls-remote --symref`` prints."""
    refs = Refs()
    for line in data.decode(errors="surrogateescape").split("\n")[:-1]:
        value, tab, name = line.partition("\t")
        if not tab:
            raise ValueError("something that is not a list of refs")
        if value.startswith("ref: "):
            if name == "HEAD":
                refs.point_head(value.removeprefix("ref: "))
        else:
            refs.add(name, value)
    if data and not data.endswith(b"\n"):
        raise ValueError("an answer that is cut short")
    return refs


def add_head_file(refs: Refs, data: bytes) -> None:
    """Add what the file ``HEAD`` says: the branch that it stands for, or a commit."""
    text = data.decode(errors="surrogateescape").removesuffix("\n")
    if not text.startswith("ref: "):
        return refs.add("HEAD", text)
    refs.point_head(text.removeprefix("ref: "))
    if refs.head in refs.commits:
        refs.commits["HEAD"] = refs.commits[refs.head]
    return None
