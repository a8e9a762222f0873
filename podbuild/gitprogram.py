"""The `git` program as a git server's client, for ssh and for folders: no shell, no prompt, no configuration."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import IO
from urllib.parse import unquote

import anyio

from podbuild.errors import AccessDenied
from podbuild.gitserver import ANSWER_LIMIT_BYTES, Inquiry, Unanswered, read_up_to
from podbuild.names import Repository, printable
from podbuild.refs import Refs, parse_listing

_COMPLAINT_LIMIT_BYTES = 64 * 1024


class GitProgram:
    """A repository behind ssh, or in a folder of this machine. ``home`` is an empty folder of our own."""

    def __init__(self, inquiry: Inquiry, home: Path) -> None:
        self._inquiry = inquiry
        self._home = home
        self._folder = _folder_of(inquiry.repository) if inquiry.repository.scheme == "file" else ""
        self._environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(home),
            "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ALLOW_PROTOCOL": inquiry.repository.scheme,
            # git looks for a repository, and for its configuration, in every folder above.
            "GIT_CEILING_DIRECTORIES": f"{home.parent.resolve()}:{Path(self._folder).resolve().parent}",
        }
        if inquiry.repository.scheme == "file":
            # Repositories of other users too: listing refs runs nothing that a repository configures.
            _write_private(home / ".gitconfig", "[safe]\n\tdirectory = *\n")
        else:
            self._environment["GIT_SSH_COMMAND"] = _ssh_command(inquiry, home)

    async def list_refs(self, prefixes: tuple[str, ...]) -> Refs:
        """Return at least the refs whose full names start with one of these; all, if there are none."""
        patterns = (f"{prefix}*" for prefix in prefixes)
        listing = await self._run("ls-remote", "--symref", "--", self._inquiry.repository.url, *patterns)
        return self._inquiry.parsed(parse_listing, listing)

    async def commits_like(self, abbreviation: str) -> set[str]:
        if not self._folder:
            return (await self.list_refs(())).commits_like(abbreviation)
        objects = await self._run("-C", self._folder, "rev-parse", f"--disambiguate={abbreviation}")
        found = set()
        for name in objects.decode("ascii").split():
            if await self._run("-C", self._folder, "cat-file", "-t", name) == b"commit\n":
                found.add(name)
        return found

    async def _run(self, *arguments: str) -> bytes:
        return await self._inquiry.ask(lambda: self._try(arguments))

    async def _try(self, arguments: tuple[str, ...]) -> bytes:
        """Return what git prints. However this ends, git and all that it started are gone."""
        try:
            process = self._start(arguments)
        except OSError as error:
            raise self._inquiry.unavailable(
                f"the program git cannot be started ({error.strerror})", "Install git where the flow runs."
            ) from error
        complaint = bytearray()
        with process:
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(_listen, process.stderr, complaint)
                    output = await read_up_to(_chunks(process.stdout), ANSWER_LIMIT_BYTES)
                    if len(output) > ANSWER_LIMIT_BYTES:
                        _kill_group(process)
                while process.poll() is None:  # noqa: ASYNC110 (its pipes have ended: a matter of milliseconds)
                    await anyio.sleep(0.005)
            except BaseException:
                _kill_group(process)
                raise
        if process.returncode == 0 or len(output) > ANSWER_LIMIT_BYTES:
            return output
        raise self._failure(complaint.decode(errors="replace"))

    def _start(self, arguments: tuple[str, ...]) -> subprocess.Popen[bytes]:
        # Not asyncio's subprocess: it awaits while it starts one, and whoever is cancelled there never
        # gets to know the process, whose ssh lives on.
        return subprocess.Popen(
            ["git", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self._home,
            env=self._environment,
            start_new_session=True,
        )

    def _failure(self, complaint: str) -> Exception:
        """Return what git's complaint means."""
        where = self._inquiry.repository.host
        said = printable(" ".join(complaint.split()), limit=400) or "git gave no reason"
        if re.search(r"Host key verification failed", complaint):
            return AccessDenied(
                f"The host key of {where} is not the one that is known for it.",
                f"Check `known_hosts` in the `git-credentials` block for {where} against the server's own key.",
            )
        if re.search(r"cannot run ssh", complaint):
            return self._inquiry.unavailable("the program ssh cannot be started", "Install ssh where the flow runs.")
        if re.search(r"Permission denied|[Aa]uthentication fail", complaint):
            return self._inquiry.denied("it does not accept the ssh key" if where else "permission denied")
        if re.search(r"[Nn]ot (be )?found|does not (exist|appear to be a git repository)", complaint):
            return self._inquiry.absent()
        if re.search(r"[Cc]onnection|timed out|resolve hostname|unreachable|No route", complaint):
            return Unanswered(said)
        return self._inquiry.unavailable(said)


def _folder_of(repository: Repository) -> str:
    """Return the folder of a ``file`` repository, whose ``.git`` at the end may be left out."""
    path = unquote(repository.path)
    return path if Path(path).is_dir() else f"{path}.git"


def _ssh_command(inquiry: Inquiry, home: Path) -> str:
    """Return the ssh command for git, and write the files that it names into its folder.

    It reads no configuration, no agent and no key of this machine: the pod, which fetches later, has
    none of them either, and a caller of a shared flow is not the machine's owner.
    """
    found = inquiry.credentials
    if found and not found.covers(inquiry.repository.host, inquiry.repository.path):
        found = None
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": str(max(1, int(inquiry.timeout_seconds / 3))),
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "IdentityFile": "none",
        "StrictHostKeyChecking": "accept-new",
        "UserKnownHostsFile": "/dev/null",
    }
    if found and found.ssh_key:
        _write_private(home / "ssh_key", found.ssh_key.strip() + "\n")
        options["IdentityFile"] = "ssh_key"
    if found and found.known_hosts:
        _write_private(home / "known_hosts", found.known_hosts.strip() + "\n")
        options |= {"UserKnownHostsFile": "known_hosts", "StrictHostKeyChecking": "yes"}
    return " ".join(["ssh", "-F", "/dev/null", *(f"-o {key}={value}" for key, value in options.items())])


def _write_private(path: Path, content: str) -> None:
    path.touch(0o600)
    path.write_text(content)


async def _chunks(pipe: IO[bytes] | None) -> AsyncIterator[bytes]:
    """Yield what comes out of a pipe until its end."""
    while pipe:
        await anyio.wait_readable(pipe)
        chunk = os.read(pipe.fileno(), 65536)
        if not chunk:
            break
        yield chunk


async def _listen(pipe: IO[bytes] | None, complaint: bytearray) -> None:
    """Read to the end, so that the writer never waits, and keep the beginning."""
    async for chunk in _chunks(pipe):
        complaint += chunk[: max(0, _COMPLAINT_LIMIT_BYTES - len(complaint))]


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End git, and the ssh or upload-pack that it started. Only we collect it, so its id is still its own."""
    with suppress(ProcessLookupError):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
