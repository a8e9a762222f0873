"""What a registry holds: an image's digest, and the labels it was given.

There are three answers, and they are kept apart: the image is there, the registry says that it is
not (None), or nobody knows (`RegistryUnavailable`). Taking the third for the second would build
again at every hiccup, and taking a refusal for it would build again at every mistyped password.

A password goes to the registry's own host, and to a token server of its own domain. Nothing that
a server sends (a realm, a redirect) can take it elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import random
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import anyio
import httpx

from podbuild.addresses import origin, usable_url
from podbuild.errors import AccessDenied, InvalidRequest, RegistryUnavailable
from podbuild.names import ImageName, is_digest, printable
from podbuild.settings import HostSettings, RegistryCredentials

_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
_CONFIGS = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
_ACCEPT = ", ".join((*_MANIFESTS, *_INDEXES))
#: An index may hold indexes. Nobody nests deeper than this, and a loop must end.
_INDEX_DEPTH = 3

_DOCUMENT_LIMIT_BYTES = 4 * 1024 * 1024
_TOKEN_LIMIT_BYTES = 64 * 1024
_REDIRECTS = 5
_TRIES = 4

_CHECK = (
    "Check that the registry works and is reachable from where the flow runs; "
    "`options.if_unknown='build'` builds without knowing."
)
_SPEAKS_PLAIN_HTTP = "If this registry speaks plain HTTP, add it to `plain_http_registries` of the host block."
_UNTRUSTED = "Name a CA bundle that holds the registry's CA in the environment variable SSL_CERT_FILE."

_TOKEN = re.compile(r"[\x21-\x7e]+")
_CHALLENGE_PART = re.compile(r"""[\s,]*([\w!#$%&'*+.^`|~-]+)(?:\s*=\s*("(?:[^"\\]|\\.)*"|[^\s,"]*))?""", re.ASCII)
#: Second-level names under which a country's registry sells the third: two labels are not a domain there.
_SOLD_BELOW = frozenset({"ac", "co", "com", "edu", "gov", "ne", "net", "or", "org"})


@dataclass(frozen=True, slots=True)
class Image:
    """What the registry holds under a tag or a digest: an image, or an index of images."""

    digest: str
    media_type: str


@dataclass(frozen=True, slots=True)
class _Question:
    """One call of ours: what it is about, for error texts, and the moment at which it ends."""

    what: str
    repository: str
    deadline: float


@dataclass(frozen=True, slots=True)
class _Grant:
    """What opened a repository, and the token server that had to do without our credentials, if one had."""

    header: str = field(repr=False)
    withheld_from: str = ""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: httpx.Headers
    body: bytes = field(repr=False)

    @property
    def document(self) -> dict[str, Any]:
        """The body as a JSON object; empty where it is anything else."""
        try:
            parsed = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return parsed if isinstance(parsed, dict) else {}


class Registry:
    """One registry, for reading. An async context manager that holds one HTTP client.

    ``host`` is ``name`` or ``name:port``, as images name it. Every call takes at most
    ``timeout_seconds``, retries included. Calls raise `AccessDenied` when the registry wants other
    credentials than it was given, and `RegistryUnavailable` when it gives no usable answer.
    Raises `InvalidRequest` for a host that cannot be one.
    """

    def __init__(
        self,
        host: str,
        credentials: RegistryCredentials | None = None,
        *,
        plain_http: bool = False,
        timeout_seconds: float = 30,
    ) -> None:
        if credentials and credentials.host.lower() != host.lower():
            raise ValueError(f"These are credentials for {credentials.host}, not for {host}.")
        base = usable_url(f"{_api(host.lower(), plain_http=plain_http)}/")
        if base is None or base.path != "/v2/":
            raise InvalidRequest(f"{printable(host)!r} is not the name of a registry.", "Write name or name:port.")
        self._host = host.lower()
        self._base = base
        self._plain_http = plain_http
        self._timeout = timeout_seconds
        self._basic = ""
        if credentials and (credentials.username or credentials.password):
            pair = f"{credentials.username}:{credentials.password}".encode()
            self._basic = f"Basic {base64.b64encode(pair).decode()}"
        #: What opened a repository last time, so that only its first request is refused.
        self._granted: dict[str, _Grant] = {}
        # `identity`: a compressed bomb need not be disarmed where nothing is decompressed.
        self._client = httpx.AsyncClient(
            headers={"User-Agent": "podbuild", "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(timeout_seconds / 3),
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def find(self, repository: str, reference: str) -> Image | None:
        """Return what is there under a tag or digest, or None if the registry says that nothing is.

        A digest is either the registry's word for a tag, or the hash of bytes that were read here.
        """
        if not reference:
            raise ValueError("An image is found by a tag or a digest.")
        separator = "@" if is_digest(reference) else ":"
        question = self._question(repository, f"whether {repository}{separator}{reference} exists")
        path = f"manifests/{quote(reference, safe=':')}"
        head = await self._ask("HEAD", path, question)
        image = Image(head.headers.get("Docker-Content-Digest", ""), _media_type(head))
        if head.status == 200 and is_digest(image.digest) and image.media_type in _INDEXES + _MANIFESTS:
            if is_digest(reference) and image.digest != reference:
                raise self._unavailable(question, f"it was asked for one digest and answered with {image.digest}")
            return image
        # HEAD is where registries differ most (405, a bare 404, no digest): GET has the last word.
        answer = await self._ask("GET", path, question)
        if answer.status == 404:
            await self._check_is_registry(answer, question)
            return None
        return self._read_manifest(answer, reference, question)[0]

    async def labels(self, repository: str, image: Image, *, platform: str = "") -> dict[str, str]:
        """Return the labels of an image that `find` returned; of an index, those of one of its images.

        That one is for ``platform`` (``os/architecture[/variant]``), or else the first that is not an
        attestation. What holds no image (a chart, a signature) has no labels.
        """
        question = self._question(repository, f"which labels {repository}@{image.digest} has")
        digest = image.digest
        for _ in range(_INDEX_DEPTH):
            answer = await self._ask("GET", f"manifests/{digest}", question)
            found, manifest = self._read_manifest(answer, digest, question)
            if found.media_type in _MANIFESTS:
                return await self._config_labels(manifest, question)
            entry = _choose_entry(manifest, platform)
            if entry is None:
                return {}
            digest = self._digest_in(entry, question)
        raise self._unavailable(question, "its indexes are nested too deeply")

    async def _config_labels(self, manifest: dict[str, Any], question: _Question) -> dict[str, str]:
        config = manifest.get("config")
        if not isinstance(config, dict) or config.get("mediaType") not in _CONFIGS:
            return {}
        digest = self._digest_in(config, question)
        answer = await self._ask("GET", f"blobs/{digest}", question)
        self._check_body(answer, (digest,), question)
        inner = answer.document.get("config")
        labels = inner.get("Labels") if isinstance(inner, dict) else None
        return {k: v for k, v in labels.items() if isinstance(v, str)} if isinstance(labels, dict) else {}

    def _read_manifest(self, answer: _Answer, reference: str, question: _Question) -> tuple[Image, dict[str, Any]]:
        """Return what the answer to a GET holds, after its bytes were compared with every digest known for them."""
        claimed = (reference, answer.headers.get("Docker-Content-Digest", ""))
        digest = self._check_body(answer, claimed, question)
        manifest = answer.document
        kinds = [k for k in (_media_type(answer), manifest.get("mediaType")) if k in _INDEXES + _MANIFESTS]
        if not manifest or not kinds:
            raise self._unavailable(question, "its answer is no manifest of a kind that podbuild knows")
        return Image(digest, kinds[0]), manifest

    def _check_body(self, answer: _Answer, claimed: tuple[str, ...], question: _Question) -> str:
        """Return the digest of the body, once it agrees with each digest among the claims."""
        if answer.status == 404:
            raise self._unavailable(
                question,
                "a part of the image is missing there",
                "Was it deleted this moment? Try again; if it stays so, `options.rebuild` builds the image anew.",
            )
        if answer.status != 200:
            raise self._unavailable(question, f"it answered with status {answer.status}")
        digest = f"sha256:{hashlib.sha256(answer.body).hexdigest()}"
        for other in claimed:
            if is_digest(other) and other != digest:
                raise self._unavailable(question, f"the content sent for {other} has the digest {digest}")
        return digest

    def _digest_in(self, descriptor: dict[str, Any], question: _Question) -> str:
        digest = descriptor.get("digest")
        if not isinstance(digest, str) or not is_digest(digest):
            raise self._unavailable(question, "a manifest there names something without a SHA-256 digest")
        return digest

    async def _check_is_registry(self, answer: _Answer, question: _Question) -> None:
        """Raise `RegistryUnavailable` if this 404 comes from something that is no registry.

        A mistyped host is often a web site, which has no images either: a long build would end at a
        push that cannot work.
        """
        if isinstance(answer.document.get("errors"), list) or "Docker-Distribution-Api-Version" in answer.headers:
            return
        grant = self._granted.get(question.repository)
        base = await self._exchange("GET", self._base, grant, {}, question)
        if base.status != 200 and not (base.status == 401 and "WWW-Authenticate" in base.headers):
            raise self._unavailable(question, "it answers, but not as a registry", "Check the registry's name.")

    async def _ask(self, method: str, path: str, question: _Question) -> _Answer:
        """Return the answer to one request in the repository, authenticating as the registry asks for it."""
        url = httpx.URL(f"{repository_url(self._host, question.repository, plain_http=self._plain_http)}/{path}")
        headers = {"Accept": _ACCEPT} if path.startswith("manifests/") else {}
        grant = self._granted.get(question.repository)
        answer = await self._exchange(method, url, grant, headers, question)
        if answer.status == 401:
            # The first request, or a token that has expired since.
            grant = await self._authorize(answer, question)
            answer = await self._exchange(method, url, grant, headers, question)
        if answer.status in (401, 403):
            raise self._denied(question, f"status {answer.status} for", grant.withheld_from if grant else "")
        if grant:
            self._granted[question.repository] = grant
        return answer

    async def _authorize(self, answer: _Answer, question: _Question) -> _Grant:
        """Return what the 401 asks for."""
        challenges = parse_challenges(answer.headers.get("WWW-Authenticate", ""))
        if "bearer" in challenges:
            return await self._fetch_token(challenges["bearer"], question)
        if "basic" in challenges and self._basic:
            return _Grant(self._basic)
        raise self._denied(question, "status 401 for")

    async def _fetch_token(self, challenge: Mapping[str, str], question: _Question) -> _Grant:
        realm = usable_url(challenge.get("realm", ""))
        if realm is None:
            raise self._unavailable(question, "it names no usable address of its token server")
        server = _shown(realm)
        login = _Grant(self._basic) if self._basic and may_receive_credentials(realm, self._base) else None
        withheld_from = server if self._basic and not login else ""
        name = _full_name(self._host, question.repository)
        query = {"service": challenge.get("service", ""), "scope": f"repository:{name}:pull"}
        url = realm.copy_merge_params({k: v for k, v in query.items() if v})
        answer = await self._exchange("GET", url, login, {}, question, _TOKEN_LIMIT_BYTES)
        if answer.status in (401, 403):
            raise self._denied(question, f"its token server {server} has status {answer.status} for", withheld_from)
        token = answer.document.get("token") or answer.document.get("access_token")
        # Anything else would reach the HTTP library, whose complaint would quote it.
        if answer.status != 200 or not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise self._unavailable(question, f"its token server {server} gave no token (status {answer.status})")
        return _Grant(f"Bearer {token}", withheld_from)

    async def _exchange(
        self,
        method: str,
        url: httpx.URL,
        grant: _Grant | None,
        headers: dict[str, str],
        question: _Question,
        limit_bytes: int = _DOCUMENT_LIMIT_BYTES,
    ) -> _Answer:
        """Return the answer to a request; ask again while there is none, or one that says "later"."""
        headers = headers | {"Authorization": grant.header} if grant else headers
        trouble, remedy, tries = "", _CHECK, 0
        cause: Exception | None = None
        while tries < _TRIES:
            tries += 1
            cause, remedy, asked_to_wait = None, _CHECK, 0.0
            try:
                with anyio.fail_after(max(0.0, question.deadline - anyio.current_time())):
                    answer = await self._send(method, url, headers, question, limit_bytes)
                if answer.status != 429 and (answer.status < 500 or answer.status == 501):
                    return answer
                trouble = f"was answered with status {answer.status}"
                asked_to_wait = retry_after(answer.headers, time.time())
            except (TimeoutError, httpx.TimeoutException) as error:
                trouble, cause = "got no answer in time", error
            except httpx.ConnectError as error:
                trouble, cause = f"found no connection ({printable(str(error))})", error
                if tls := _tls_error(error):
                    trouble, remedy = f"met no TLS that can be trusted ({printable(str(tls))})", _SPEAKS_PLAIN_HTTP
                    if isinstance(tls, ssl.SSLCertVerificationError):
                        remedy = _UNTRUSTED
                    if not isinstance(tls, ssl.SSLEOFError):
                        break
            except httpx.TransportError as error:
                # Not chained: the library quotes what it cannot parse, and a server can echo a password there.
                trouble = f"got no proper HTTP answer ({type(error).__name__})"
            # Half of the wait is chance, so that fifty flows that were refused together do not come back together.
            backoff = self._timeout / 60 * 2 ** (tries - 1) * random.uniform(0.5, 1)  # noqa: S311
            wait = max(asked_to_wait, backoff)
            if asked_to_wait:
                trouble += f" and the wish to wait {asked_to_wait:.0f} s"
            if anyio.current_time() + wait >= question.deadline:
                break
            if tries < _TRIES:
                await anyio.sleep(wait)
        happened = f"{method} {_shown(url)} {trouble} ({tries} {'try' if tries == 1 else 'tries'})"
        raise self._unavailable(question, happened, remedy) from cause

    async def _send(
        self, method: str, url: httpx.URL, headers: dict[str, str], question: _Question, limit_bytes: int
    ) -> _Answer:
        """Return the answer to one request, wherever redirects lead. The body is empty for HEAD."""
        for _ in range(_REDIRECTS + 1):
            async with self._client.stream(method, url, headers=headers) as response:
                if not response.has_redirect_location:
                    body = b"" if method == "HEAD" else await self._read_body(response, question, limit_bytes)
                    return _Answer(response.status_code, response.headers, body)
                target = usable_url(response.headers["Location"], url)
            if target is None or (url.scheme == "https" and target.scheme == "http"):
                raise self._unavailable(question, f"{_shown(url)} redirects to where podbuild does not follow")
            if origin(target) != origin(url):
                headers = {k: v for k, v in headers.items() if k != "Authorization"}
            url = target
        raise self._unavailable(question, f"it redirects more than {_REDIRECTS} times")

    async def _read_body(self, response: httpx.Response, question: _Question, limit_bytes: int) -> bytes:
        if response.status_code == 200 and response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._unavailable(question, "it compresses its answer, although it was asked not to")
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > limit_bytes:
                raise self._unavailable(question, f"its answer is larger than {limit_bytes // 1024} KiB")
        return bytes(body)

    def _question(self, repository: str, what: str) -> _Question:
        return _Question(what, repository, anyio.current_time() + self._timeout)

    def _unavailable(self, question: _Question, happened: str, remedy: str = _CHECK) -> RegistryUnavailable:
        return RegistryUnavailable(f"The registry {self._host} does not tell {question.what}: {happened}.", remedy)

    def _denied(self, question: _Question, refusal: str, withheld_from: str = "") -> AccessDenied:
        known = self._basic and not withheld_from
        who = "the credentials that were given" if known else "a caller without credentials"
        remedy = (
            f"The credentials were not sent to {withheld_from}, which is not of the registry's domain. "
            "Ask the registry's operator for a name of the registry in its token server's domain."
            if withheld_from
            else f"Check the `registry-credentials` block for {self._host}, which the host block must name: "
            f"it needs the scope `pull` on {question.repository}."
        )
        return AccessDenied(f"The registry {self._host} does not tell {question.what}: {refusal} {who}.", remedy)


def open_registry(host: str, settings: HostSettings) -> Registry:
    """Return the registry as the host's settings say: its credentials, and plain HTTP only where they allow it."""
    plain = host.lower() in {name.lower() for name in settings.plain_http_registries}
    return Registry(host, settings.registry_credentials_for(host), plain_http=plain)


async def find_image(image: ImageName, settings: HostSettings, *, reference: str | None = None) -> Image | None:
    """Return what the registry holds under the image's tag, or under another tag or digest; None if nothing."""
    async with open_registry(image.registry, settings) as registry:
        return await registry.find(image.repository, reference or image.tag)


async def find_labelled(
    image: ImageName, settings: HostSettings, *, platform: str = ""
) -> tuple[Image, dict[str, str]] | None:
    """Return what the registry holds under the image's tag, with its labels; None if nothing."""
    async with open_registry(image.registry, settings) as registry:
        found = await registry.find(image.repository, image.tag)
        if found is None:
            return None
        return found, await registry.labels(image.repository, found, platform=platform)


def repository_url(host: str, repository: str, *, plain_http: bool = False) -> str:
    """Return where the registry's API has this repository."""
    return f"{_api(host, plain_http=plain_http)}/{quote(_full_name(host, repository))}"


def _api(host: str, *, plain_http: bool) -> str:
    # The one registry whose API lives on another host than the one that images name.
    return f"{'http' if plain_http else 'https'}://{'registry-1.docker.io' if host == 'docker.io' else host}/v2"


def _full_name(host: str, repository: str) -> str:
    return f"library/{repository}" if host == "docker.io" and "/" not in repository else repository


def may_receive_credentials(realm: httpx.URL, registry: httpx.URL) -> bool:
    """Return whether a token server may see the registry's credentials.

    It speaks TLS, unless the registry does not either; and it is the registry's own host (any port),
    or shares its domain: the last two labels (auth.example.org, registry.example.org), or three
    where two are sold to anybody (example.co.uk). Addresses and one-part names have no domain.
    """
    if realm.scheme != "https" and registry.scheme != "http":
        return False
    return realm.host == registry.host or _domain(realm.host) == _domain(registry.host) != ""


def _domain(host: str) -> str:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        labels = host.rstrip(".").split(".")
        count = 3 if len(labels[-1]) == 2 and labels[-2:-1] and labels[-2] in _SOLD_BELOW else 2
        return ".".join(labels[-count:]) if len(labels) >= count else ""
    return ""


def parse_challenges(header: str) -> dict[str, dict[str, str]]:
    """Return the parameters of each scheme in a WWW-Authenticate header; schemes and keys in lower case."""
    challenges: dict[str, dict[str, str]] = {}
    parameters: dict[str, str] = {}
    position = 0
    while match := _CHALLENGE_PART.match(header, position):
        position = match.end()
        name, value = match[1].lower(), match[2]
        if value is None:
            parameters = challenges.setdefault(name, {})
        else:
            plain = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
            parameters.setdefault(name, plain)
    return challenges


def retry_after(headers: Mapping[str, str], now: float) -> float:
    """Return how many seconds the server wants to be left alone; 0 if it does not say, or not clearly.

    A date is read by the server's own clock where it shows it, else by ours (``now``, Unix time).
    """
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        until = parsedate_to_datetime(text).timestamp()
        return max(0.0, until - (parsedate_to_datetime(headers["Date"]).timestamp() if "Date" in headers else now))
    except (ValueError, OverflowError):
        return 0.0


def _choose_entry(index: dict[str, Any], platform: str) -> dict[str, Any] | None:
    """Return the entry for a platform, or else the first that is an image; None if there is none."""
    listed = index.get("manifests")
    entries = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    images = [e for e in entries if not _is_attestation(e)]
    return next((e for e in images if platform and _fits(e, platform)), next(iter(images), None))


def _is_attestation(entry: dict[str, Any]) -> bool:
    annotations, platform = entry.get("annotations"), entry.get("platform")
    return (isinstance(annotations, dict) and "vnd.docker.reference.type" in annotations) or (
        isinstance(platform, dict) and platform.get("os") == "unknown"
    )


def _fits(entry: dict[str, Any], platform: str) -> bool:
    own = entry.get("platform")
    if not isinstance(own, dict):
        return False
    wanted = platform.split("/")
    return [own.get("os"), own.get("architecture"), own.get("variant")][: len(wanted)] == wanted


def _media_type(answer: _Answer) -> str:
    text: str = answer.headers.get("Content-Type", "")
    return text.partition(";")[0].strip().lower()


def _shown(url: httpx.URL) -> str:
    # Not the rest: a query may hold a signature that opens a blob, and any part what a server echoes.
    return printable(f"{url.scheme}://{url.netloc.decode('ascii')}")


def _tls_error(error: BaseException | None) -> ssl.SSLError | None:
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error
