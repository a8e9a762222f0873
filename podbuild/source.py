"""Which commit a caller means: one question to the git server, and nothing is fetched.

`https` and `http` are asked by httpx in git's own protocol, so no program runs and no token is ever
in an argument or in a URL. `ssh` and `file` are asked by the `git` program, in an environment that
holds nothing of this machine's.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from podbuild.errors import AmbiguousRef, BuildError, RefNotFound
from podbuild.gitprogram import GitProgram
from podbuild.gitserver import FULL_COMMIT, HttpServer, Inquiry
from podbuild.names import Repository, check_ref, is_commit, printable
from podbuild.refs import ABBREVIATION, BRANCHES, TAGS, Refs, prefixes_for
from podbuild.settings import GitCredentials


@dataclass(frozen=True, slots=True)
class Resolved:
    """A commit, and where it came from."""

    #: The full id, 40 or 64 hex digits in lower case.
    commit: str
    #: The full name of the ref, as ``refs/heads/main``; for ``HEAD`` the branch that it stands for, or
    #: ``HEAD`` itself where it stands for none. "" if the caller gave a commit.
    ref: str


async def resolve_commit(
    repository: Repository,
    ref: str = "HEAD",
    credentials: GitCredentials | None = None,
    *,
    timeout_seconds: float = 30,
) -> Resolved:
    """Return the commit that a branch, a tag, ``HEAD``, a full ref name or a commit id means right now.

    - 40 or 64 hex digits are a commit, even where a branch is called so. No server is asked.
    - ``HEAD``, and what starts with ``refs/``, is a full name and matches itself only.
    - Any other name is a branch or a tag, matched whole: ``main`` is never ``feature/main``. If there
      are both, that is `AmbiguousRef`, even where they are at the same commit today.
    - 7 or more hex digits that no branch and no tag has as its name abbreviate a commit: one that some
      ref of the server is at, or (``file`` only) any commit in the repository.

    An annotated tag gives the commit that it tags. Credentials are used for their own host and path
    only; without a user name, a password is sent with the name ``git``. Neither the user's own ssh keys
    nor any git or ssh configuration of this machine is used.

    Raises `InvalidRequest` for what no ref can be called, `RefNotFound`, `AmbiguousRef`, `AccessDenied`
    when the server refuses the credentials, and `SourceUnavailable` when it has no such repository for
    us, gives no usable answer in 3 tries, or none within ``timeout_seconds`` in all.
    """
    check_ref(ref)
    if is_commit(ref.lower()):
        return Resolved(ref.lower(), "")
    shown = printable(ref)
    inquiry = Inquiry(repository, credentials, timeout_seconds)
    async with _open(inquiry) as server:
        refs = await server.list_refs(prefixes_for(ref))
        names = refs.find(ref)
        if len(names) > 1:
            raise AmbiguousRef(
                f"'{shown}' is both a branch and a tag of {repository}: {' and '.join(names)}.",
                f"Pass the full name, as ref='{names[0]}' or ref='{names[1]}'.",
            )
        if names:
            return Resolved(refs.commits[names[0]], refs.head or "HEAD" if ref == "HEAD" else names[0])
        if ABBREVIATION.fullmatch(ref):
            commits = sorted(await server.commits_like(ref))
            if len(commits) == 1:
                return Resolved(commits[0], "")
            if commits:
                raise AmbiguousRef(
                    f"'{shown}' is the beginning of {len(commits)} commits of {repository}: {', '.join(commits[:5])}.",
                    FULL_COMMIT,
                )
        raise await _not_found(server, inquiry, ref, refs)


async def _not_found(server: HttpServer | GitProgram, inquiry: Inquiry, ref: str, refs: Refs) -> RefNotFound:
    """Return the error that says what there is instead."""
    repository, shown = inquiry.repository, printable(ref)
    branch = inquiry.quoted(refs.head.removeprefix(BRANCHES))
    near: list[str] = []
    try:
        listing = await server.list_refs((BRANCHES, TAGS))
    except BuildError:
        # That the ref is missing is known. What is near to it is a courtesy.
        pass
    else:
        if not ref.startswith("refs/") and not any(name.startswith((BRANCHES, TAGS)) for name in listing.commits):
            return RefNotFound(f"{repository} is empty: it has no branch and no tag.", "Push a commit first.")
        near = [inquiry.quoted(name) for name in listing.near(ref)]
    remedies = [f"Near to it: {', '.join(near)}."] if near else []
    if ref == "HEAD":
        problem = f"{repository} has no commit at HEAD"
        problem += f": its default branch '{branch}' does not exist." if branch else "."
        remedies = [f"Pass one of its branches as `ref`: {', '.join(near)}."] if near else []
    elif ref.startswith("refs/"):
        problem = f"{repository} has no ref '{shown}'."
    elif ABBREVIATION.fullmatch(ref):
        problem = f"{repository} has no branch or tag '{shown}', and shows no commit that begins so."
        remedies.append(FULL_COMMIT)
    else:
        problem = f"{repository} has no branch or tag '{shown}'."
    if branch and "HEAD" in refs.commits:
        remedies.append(f"Its default branch is '{branch}'; pass ref='{branch}'.")
    return RefNotFound(problem, " ".join(remedies) or "`git ls-remote` shows what it has.")


@asynccontextmanager
async def _open(inquiry: Inquiry) -> AsyncIterator[HttpServer | GitProgram]:
    if inquiry.repository.scheme in ("https", "http"):
        # `identity`: a compressed bomb need not be disarmed where nothing is decompressed.
        # `git/`: some hosts show their web pages to every program that is not called so.
        headers = {"User-Agent": "git/podbuild", "Accept-Encoding": "identity"}
        async with httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(inquiry.timeout_seconds / 3)) as client:
            yield HttpServer(inquiry, client)
    else:
        with tempfile.TemporaryDirectory(prefix="podbuild-") as folder:
            yield GitProgram(inquiry, Path(folder))
