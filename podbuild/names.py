"""Names: repositories, refs, images, pods. Pure: text in, checked text out, no I/O.

Everything a caller may write passes through here before anything is created, because a hostile
ref or URL is the oldest attack on programs that run git (CVE-2021-39159, CVE-2026-5366).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from podbuild.errors import InvalidRequest

NAME_LIMIT = 63
#: Hex digits of the build's hash in a pod name: 80 bits.
NAME_HASH_DIGITS = 20
NAME_PREFIX = "build-"

_SCHEMES = ("https", "http", "ssh", "file")
_DEFAULT_PORTS = {"https": 443, "http": 80, "ssh": 22}
_LABEL = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\.?")
_IPV6 = re.compile(r"\[[0-9a-f:.]{2,45}\]")
_SCP = re.compile(r"(?P<user>[A-Za-z0-9_.][A-Za-z0-9_.-]*)@(?P<host>[A-Za-z0-9.-]+):(?P<path>[^/].*)")
_REPO_PATH = re.compile(r"[A-Za-z0-9._~/%+@,=-]+")
_REPO_LIMIT = 1024

_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:.]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_IMAGE_LIMIT = 255


def is_commit(text: str) -> bool:
    """Return whether the text is a full commit id (SHA-1 or SHA-256, lower case)."""
    return _COMMIT.fullmatch(text) is not None


def is_digest(text: str) -> bool:
    """Return whether the text is an image digest, ``sha256:`` and 64 hex digits."""
    return _DIGEST.fullmatch(text) is not None


def printable(text: str, limit: int = 200) -> str:
    """Return the text for an error message: control characters escaped, passwords in URLs hidden."""
    # Up to the last "@" of the word: a password may hold "@" and "/" itself.
    hidden = re.sub(r"(?<=://)\S*@", "***@", text)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in hidden)
    return shown if len(shown) <= limit else f"{shown[:limit]}…"


def _address(text: str) -> str:
    """Return an address for an error message, as `printable` does, but sure to hold no password.

    The address may be malformed in any way, so all that may be a login or a token is hidden.
    """
    login, at, rest = text.rpartition("@")
    scheme, slashes, _ = login.partition("://")
    if slashes:
        rest = f"{scheme}://***@{rest}"
    elif at:
        rest = f"***@{rest}" if ":" in login else text
    address, mark, _ = rest.partition("?")
    return printable(f"{address}?***" if mark else address)


@dataclass(frozen=True, slots=True)
class Repository:
    """A git repository's address. ``url`` is what git is given; ``key`` is equal for spellings of one repository."""

    url: str
    scheme: str
    #: ``name`` or ``name:port``, lower case, without a default port; "" for ``file``.
    host: str
    #: Without a leading slash; for ``file`` the absolute path.
    path: str
    key: str

    def __str__(self) -> str:
        return self.url

    @property
    def short_name(self) -> str:
        """The last two components of the path, without ``.git``."""
        parts = [p for p in self.path.removesuffix(".git").split("/") if p]
        return "/".join(parts[-1:] if self.scheme == "file" else parts[-2:])


def parse_repository(text: str) -> Repository:
    """Return the repository a caller named: ``https://``, ``http://``, ``ssh://``, ``file://`` or ``git@host:path``.

    Raises `InvalidRequest` for anything else, for control characters, and for a URL that carries a
    user name or password (``ssh`` may name its user).
    """
    shown = _address(text)
    if not text or len(text) > _REPO_LIMIT:
        raise InvalidRequest(
            f"The repository's address has {len(text)} characters.",
            f"Give a URL of 1 to {_REPO_LIMIT} characters.",
        )
    if not text.isascii() or not text.isprintable() or " " in text:
        raise InvalidRequest(
            f"The repository's address '{shown}' holds characters that no git URL has.",
            "Remove newlines, blanks and other control characters; percent-encode the rest.",
        )
    if text.startswith("-"):
        raise InvalidRequest(f"The repository's address '{shown}' starts with '-'.", "Give a URL.")
    if "://" not in text and (match := _SCP.fullmatch(text)):
        text = f"ssh://{match['user']}@{match['host']}/{match['path']}"
    try:
        parts = urlsplit(text)
    except ValueError:  # brackets that hold no IPv6 address
        raise InvalidRequest(f"'{shown}' does not name a host.", "Check the URL.") from None
    scheme = parts.scheme.lower()
    if scheme not in _SCHEMES or "://" not in text:
        raise InvalidRequest(
            f"'{shown}' is not a git URL that podbuild fetches.",
            "Use https://, http://, ssh://, git@host:path, or file:// on a local engine.",
        )
    if parts.password is not None or (parts.username is not None and scheme != "ssh"):
        raise InvalidRequest(
            f"The repository's address '{shown}' carries a user name or a password.",
            "Remove it, and store it in a git-credentials block that the host block names.",
        )
    if parts.query or parts.fragment or "?" in text or "#" in text:
        raise InvalidRequest(
            f"The repository's address '{shown}' has a query or a fragment.",
            "Give the plain URL; a branch, tag or commit goes into `ref`.",
        )
    path = parts.path.strip("/") if scheme != "file" else parts.path.rstrip("/")
    # An "@" may end a login whose password holds a "/": https://user:8443/rest-of-password@host/path.
    if not path or not _REPO_PATH.fullmatch(path) or ("@" in path and scheme != "file"):
        raise InvalidRequest(
            f"The path of '{shown}' is empty or has characters that podbuild refuses.",
            "Percent-encode everything but letters, digits and ._~/+,=-.",
        )
    plain = unquote(path)
    if not plain.isprintable() or any(p == ".." or p.startswith("-") for p in plain.split("/")):
        raise InvalidRequest(
            f"The path of '{shown}' has a part that is '..', starts with '-', or hides control characters.",
            "Give the repository's real path.",
        )
    if scheme == "file":
        if parts.netloc or not path.startswith("/"):
            raise InvalidRequest(f"'{shown}' is not a local path.", "Use file:///absolute/path.")
        return Repository(url=f"file://{path}", scheme=scheme, host="", path=path, key=f"file://{path}")
    host = _host(parts.netloc.rpartition("@")[2], scheme, shown)
    user = f"{parts.username}@" if parts.username else ""
    if user and not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*@", user):
        raise InvalidRequest(f"The user name in '{shown}' is malformed.", "Use letters, digits and _.-.")
    return Repository(
        url=f"{scheme}://{user}{host}/{path}",
        scheme=scheme,
        host=host,
        path=path,
        key=f"{scheme}://{host}/{path.removesuffix('.git').rstrip('/')}",
    )


def _host(text: str, scheme: str, shown: str) -> str:
    """Return ``name`` or ``name:port`` in its one spelling."""
    name, colon, port = text.lower().rpartition(":")
    if not colon or name.startswith("[") != name.endswith("]"):
        name, port = text.lower(), ""
    if not (_HOST.fullmatch(name) or _IPV6.fullmatch(name)) or (colon and text.endswith(":")):
        raise InvalidRequest(f"'{shown}' does not name a host.", "Check the URL.")
    if not port:
        return name
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise InvalidRequest(f"The port in '{shown}' is not a number from 1 to 65535.", "Check the URL.")
    return name if int(port) == _DEFAULT_PORTS[scheme] else f"{name}:{int(port)}"


def check_ref(ref: str) -> str:
    """Return the ref if git could ever hold it. Raises `InvalidRequest` else.

    The rules are those of git-check-ref-format(1), and one more: no leading ``-``.
    """
    shown = printable(ref)
    bad = (
        not ref
        or len(ref) > 255
        or ref.startswith(("-", "/", "."))
        or ref.endswith(("/", ".", ".lock"))
        or ref == "@"
        or any(part in ref for part in ("..", "//", "@{", "/.", ".lock/"))
        or any(c in " ~^:?*[\\$`'\"<>|;&" or ord(c) < 33 or ord(c) == 127 for c in ref)
        or not ref.isprintable()
    )
    if bad:
        raise InvalidRequest(
            f"'{shown}' is not a name that a branch, tag or commit can have.",
            "Give a branch, a tag or a commit id, as `git ls-remote` prints it.",
        )
    return ref


def check_path(path: str, what: str) -> str:
    """Return a path inside the repository in its one spelling ("" for the top). Raises `InvalidRequest`."""
    if path in ("", ".", "./"):
        return ""
    parts = [p for p in path.split("/") if p not in ("", ".")]
    if (
        path.startswith(("/", "-"))
        or len(path) > 500
        or not path.isprintable()
        or "\\" in path
        or any(p == ".." or p == ".git" or p.startswith("-") for p in parts)
    ):
        raise InvalidRequest(
            f"`{what}` is {printable(path)!r}, which is not a path inside the repository.",
            "Give a relative path without '..', '.git', and parts that start with '-'.",
        )
    return "/".join(parts)


@dataclass(frozen=True, slots=True)
class ImageName:
    """Where an image lives: ``registry/repository``, and a tag."""

    registry: str
    repository: str
    tag: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}" if self.tag else self.name

    @property
    def name(self) -> str:
        """``registry/repository``, without the tag."""
        return f"{self.registry}/{self.repository}"

    def at(self, digest: str) -> str:
        """Return the reference that can never move: ``registry/repository@sha256:…``."""
        return f"{self.name}@{digest}"


def parse_image(text: str) -> ImageName:
    """Return the image a caller named, ``registry/name[:tag]``.

    The registry must be written out (it holds a dot or a port, or is ``localhost``). Raises
    `InvalidRequest` for a malformed name, and for a digest, which nobody can choose.
    """
    shown = printable(text) if "@sha256:" in text else _address(text)
    if "@" in text:
        raise InvalidRequest(f"The image '{shown}' names a digest.", "Name a tag: a digest comes out of a build.")
    registry, slash, rest = text.partition("/")
    if not slash or not (any(c in registry for c in ".:") or registry == "localhost"):
        raise InvalidRequest(
            f"The image '{shown}' does not say which registry it belongs to.",
            "Write registry/name[:tag], for example registry.example.org/team/app:1.",
        )
    repository, colon, tag = rest.partition(":")
    if not registry.isascii() or not _REGISTRY.fullmatch(registry.lower()) or not _REPOSITORY.fullmatch(repository):
        raise InvalidRequest(
            f"The image '{shown}' is malformed.",
            "A name has lower-case letters, digits and single separators: registry/team/app:tag.",
        )
    if len(registry) + 1 + len(repository) > _IMAGE_LIMIT:
        raise InvalidRequest(
            f"The image's name has {len(registry) + 1 + len(repository)} characters.",
            f"Use at most {_IMAGE_LIMIT} for registry/name.",
        )
    if colon and not _TAG.fullmatch(tag):
        raise InvalidRequest(
            f"The tag of '{shown}' is malformed.",
            "A tag has 1 to 128 letters, digits and _.-, and starts with a letter, digit or _.",
        )
    return ImageName(registry=registry.lower(), repository=repository, tag=tag)


def derive_image(registry: str, repository: Repository) -> ImageName:
    """Return the image name podbuild chooses itself: the host's registry, then the repository's last two parts.

    Raises `InvalidRequest` when the host has no registry.
    """
    if not registry:
        raise InvalidRequest(
            "No image name was given, and the host has no registry to derive one from.",
            "Pass `image`, or set `registry` in the host block.",
        )
    parts = [slug(part, separators="._-") for part in repository.short_name.split("/")]
    if not any(parts):
        raise InvalidRequest(f"The path of {repository} gives no image name.", "Pass `image`.")
    return parse_image("/".join([registry.rstrip("/"), *(p for p in parts if p)]))


def slug(text: str, separators: str = "-", limit: int = 100) -> str:
    """Return the text in lower-case letters, digits and single separators; "" if nothing is left."""
    kept = re.sub(rf"[^a-z0-9{re.escape(separators)}]+", "-", text.lower())
    single = re.sub(rf"([{re.escape(separators)}-])[{re.escape(separators)}-]+", r"\1", kept)
    return single[:limit].strip(separators + "-")


def pod_name(repository: Repository, build_hash: str) -> str:
    """Return the one pod name of a build: a DNS label of at most 63 characters.

    The slug is for people; the 80 bits of the hash make the name the lock.
    """
    room = NAME_LIMIT - len(NAME_PREFIX) - NAME_HASH_DIGITS - 1
    readable = slug(repository.short_name, limit=room)
    return f"{NAME_PREFIX}{readable}-{build_hash[:NAME_HASH_DIGITS]}".replace("--", "-")
