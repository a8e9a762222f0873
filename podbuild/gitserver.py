"""A git server as one call sees it: the question with its deadline, and the answers of a web server."""

from __future__ import annotations

import base64
import random
import time
from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import anyio
import httpx

from podbuild.addresses import origin, usable_url
from podbuild.errors import AccessDenied, InvalidRequest, SourceUnavailable
from podbuild.names import Repository, printable
from podbuild.redaction import Redactor
from podbuild.refs import Refs, add_head_file, ls_refs_request, parse_greeting, parse_listing, parse_ls_refs
from podbuild.registry import retry_after
from podbuild.settings import GitCredentials

ANSWER_LIMIT_BYTES = 8 * 1024 * 1024
#: What every error can end with whose cause is the list of refs itself.
FULL_COMMIT = "Pass the full commit id, of 40 or 64 hex digits, as `ref`."

_REDIRECTS = 3
_TRIES = 3
_QUESTION = "/info/refs?service=git-upload-pack"
#: Any name goes with a token at the known hosts; the build pod uses this one too.
_DEFAULT_USERNAME = "git"
_CHECK = "Check the address, and that the git server works and is reachable from where the flow runs."
_T = TypeVar("_T")


class Unanswered(Exception):
    """This try brought nothing; another may. ``wait`` is how many seconds the server wants first."""

    def __init__(self, happened: str, wait: float = 0) -> None:
        super().__init__(happened)
        self.wait = wait


class Inquiry:
    """One call of ours: whom it asks as whom, until when, and how its failures read."""

    def __init__(self, repository: Repository, credentials: GitCredentials | None, timeout_seconds: float) -> None:
        self.repository = repository
        self.credentials = credentials
        self.timeout_seconds = timeout_seconds
        self.ends = anyio.current_time() + timeout_seconds

    async def ask(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Return what the attempt returns. Try again, three times at most and never beyond the deadline."""
        trouble: Unanswered | None = None
        tries = 0
        try:
            with anyio.fail_after(max(0.0, self.ends - anyio.current_time())):
                while True:
                    tries += 1
                    try:
                        return await attempt()
                    except Unanswered as error:
                        trouble = error
                    # Half of the wait is chance, so that fifty flows refused together do not come back together.
                    backoff = self.timeout_seconds / 60 * 2 ** (tries - 1) * random.uniform(0.5, 1)  # noqa: S311
                    wait = max(trouble.wait, backoff)
                    if tries == _TRIES or anyio.current_time() + wait >= self.ends:
                        break
                    await anyio.sleep(wait)
        except TimeoutError:
            before = f" (before that: {trouble})" if trouble else ""
            raise self.unavailable(f"it gave no answer within {self.timeout_seconds:g} s{before}") from trouble
        raise self.unavailable(f"{trouble} ({tries} {'try' if tries == 1 else 'tries'})") from trouble.__cause__

    def parsed(self, parse: Callable[[bytes], _T], answer: bytes) -> _T:
        if len(answer) > ANSWER_LIMIT_BYTES:
            limit = ANSWER_LIMIT_BYTES // 1024**2
            raise self.unavailable(f"it has more of them than fit into {limit} MiB", FULL_COMMIT)
        try:
            return parse(answer)
        except ValueError as error:
            # Not chained: it quotes the server, and only `unavailable` takes our secrets out.
            raise self.unavailable(f"it sent {error}") from None

    def unavailable(self, happened: str, remedy: str = _CHECK) -> SourceUnavailable:
        return SourceUnavailable(f"{self.repository} does not tell its refs: {self.quoted(happened)}.", remedy)

    def quoted(self, text: str) -> str:
        """Return what a server said, for an error text: it can say what it was sent."""
        secrets = (self.credentials.password, self.credentials.ssh_key) if self.credentials else ()
        return Redactor(secrets).redact(printable(text, limit=400))

    def absent(self) -> SourceUnavailable:
        return SourceUnavailable(
            f"There is no repository at {self.repository}, or it is private.", self.credential_hint
        )

    def denied(self, refusal: str) -> AccessDenied:
        return AccessDenied(f"The git server refused access to {self.repository}: {refusal}.", self.credential_hint)

    @property
    def credential_hint(self) -> str:
        where = self.repository.host
        if not where:
            return "Check the path, and that the user that runs the flow may read it."
        if self.credentials:
            return (
                f"Check the address, and the `git-credentials` block for {where}: "
                "it needs read access to this repository."
            )
        return f"Check the address; for a private one, name a `git-credentials` block for {where} in the host block."


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: httpx.Headers
    body: bytes


class HttpServer:
    """A repository on a web server: smart with protocol 2, 1 or 0, or just files."""

    def __init__(self, inquiry: Inquiry, client: httpx.AsyncClient) -> None:
        self._inquiry = inquiry
        self._client = client
        #: Where the repository is, after redirects.
        self._base = inquiry.repository.url
        if usable_url(self._base) is None:
            raise InvalidRequest(f"{inquiry.repository} does not name a host.", "Check the URL.")
        self._greeting: Refs | list[str] | None = None

    async def list_refs(self, prefixes: tuple[str, ...]) -> Refs:
        """Return at least the refs whose full names start with one of these; all, if there are none."""
        if self._greeting is None:
            self._greeting = await self._greet()
        if isinstance(self._greeting, Refs):
            return self._greeting
        body = ls_refs_request(prefixes, self._greeting)
        answer = await self._exchange("POST", "/git-upload-pack", body)
        if answer.status != 200:
            raise self._inquiry.unavailable(f"it answered with status {answer.status}")
        return self._inquiry.parsed(parse_ls_refs, answer.body)

    async def commits_like(self, abbreviation: str) -> set[str]:
        return (await self.list_refs(())).commits_like(abbreviation)

    async def _greet(self) -> Refs | list[str]:
        for _ in range(_REDIRECTS + 1):
            answer = await self._exchange("GET", _QUESTION)
            if "Location" not in answer.headers or not 300 <= answer.status < 400:
                break
            self._base = self._redirected(answer.headers["Location"])
        else:
            raise self._inquiry.unavailable(f"it redirects more than {_REDIRECTS} times")
        if answer.status != 200:
            raise self._inquiry.unavailable(f"it answered with status {answer.status}")
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind == "application/x-git-upload-pack-advertisement":
            return self._inquiry.parsed(parse_greeting, answer.body)
        if kind == "text/html":
            raise self._inquiry.unavailable("it answers with a web page, not as a git server")
        refs = self._inquiry.parsed(parse_listing, answer.body)
        head = await self._exchange("GET", "/HEAD")
        if head.status == 200:
            self._inquiry.parsed(lambda body: add_head_file(refs, body), head.body)
        return refs

    async def _exchange(self, method: str, path: str, content: bytes | None = None) -> _Answer:
        """Return the answer to a request below the repository. Raises for those that end the inquiry."""
        headers = {"Git-Protocol": "version=2"}
        login = self._login()
        if login:
            headers["Authorization"] = login
        if content is not None:
            headers["Content-Type"] = "application/x-git-upload-pack-request"
            headers["Accept"] = "application/x-git-upload-pack-result"
        answer = await self._inquiry.ask(lambda: self._send(method, f"{self._base}{path}", headers, content))
        if answer.status == 403 or (answer.status == 401 and login):
            raise self._inquiry.denied(f"status {answer.status}")
        if path != "/HEAD" and answer.status in (401, 404, 410):
            raise self._absent()
        return answer

    async def _send(self, method: str, url: str, headers: dict[str, str], content: bytes | None) -> _Answer:
        try:
            async with self._client.stream(method, url, headers=headers, content=content) as response:
                status = response.status_code
                if status == 429 or (status >= 500 and status != 501):
                    wait = retry_after(response.headers, time.time())
                    wish = f" and the wish to wait {wait:.0f} s" if wait else ""
                    raise Unanswered(f"it answered with status {status}{wish}", wait)
                if status != 200:
                    return _Answer(status, response.headers, b"")
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise self._inquiry.unavailable("it compresses its answer, although it was asked not to")
                return _Answer(status, response.headers, await read_up_to(response.aiter_raw(), ANSWER_LIMIT_BYTES))
        except httpx.TimeoutException as error:
            raise Unanswered("no answer came in time") from error
        except httpx.ConnectError as error:
            happened = printable(str(error))
            if "CERTIFICATE_VERIFY_FAILED" in happened:
                raise self._inquiry.unavailable(
                    f"its TLS certificate cannot be trusted ({happened})",
                    "Name a CA bundle that holds the server's CA in the environment variable SSL_CERT_FILE.",
                ) from error
            raise Unanswered(f"no connection was made ({happened})") from error
        except httpx.TransportError as error:
            # Not chained: the library quotes what it cannot parse, and a server can echo a password there.
            raise Unanswered(f"it gave no proper HTTP answer ({type(error).__name__})") from None

    def _login(self) -> str:
        """Return the Authorization header for where the repository is now; "" where it must not go."""
        found, here, asked = self._inquiry.credentials, httpx.URL(self._base), httpx.URL(self._inquiry.repository.url)
        if found is None or not found.password or origin(here) != origin(asked):
            return ""
        # A path in a block is written without ".git", and servers redirect to the spelling that has it.
        if not any(found.covers(self._inquiry.repository.host, p) for p in (here.path, here.path.removesuffix(".git"))):
            return ""
        pair = f"{found.username or _DEFAULT_USERNAME}:{found.password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"

    def _redirected(self, location: str) -> str:
        """Return where the repository is according to a redirect."""
        here = httpx.URL(f"{self._base}{_QUESTION}")
        target = usable_url(location, here)
        if target is None or (here.scheme == "https" and target.scheme == "http"):
            raise self._inquiry.unavailable("it redirects to where podbuild does not follow, for safety's sake")
        base, found, _ = str(target).partition("?")[0].rpartition("/info/refs")
        if not found:
            # Some hosts lead whoever is not logged in to the page where one logs in.
            raise self._inquiry.absent()
        return base

    def _absent(self) -> SourceUnavailable:
        if self._base == self._inquiry.repository.url or not self._inquiry.credentials or self._login():
            return self._inquiry.absent()
        place = self._inquiry.quoted(self._base)
        return SourceUnavailable(
            f"{self._inquiry.repository} leads to {place}, where there is no repository, or a private one.",
            f"Credentials are not taken along there: pass repo='{place}', with a `git-credentials` block for its host.",
        )


async def read_up_to(chunks: AsyncIterable[bytes], limit_bytes: int) -> bytes:
    """Return all of it, or a little more than the limit."""
    content = bytearray()
    async for chunk in chunks:
        content += chunk
        if len(content) > limit_bytes:
            break
    return bytes(content)
