"""What podbuild learns from a registry: the contract against a real one and the fake, faults against the fake.

Names carry the ids of the fault table: R1 authentication, R2 refusal, R3 absence, R4 retries,
R5 media types and HEAD, R6 digests, R8 redirects, S12 endless bodies, S25 secrets, S37 TLS.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import socket
import subprocess
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from podbuild.errors import AccessDenied, BuildError, InvalidRequest, RegistryUnavailable
from podbuild.names import ImageName
from podbuild.registry import (
    Image,
    Registry,
    find_image,
    find_labelled,
    may_receive_credentials,
    parse_challenges,
    repository_url,
    retry_after,
)
from podbuild.settings import HostSettings, RegistryCredentials
from tests.fakes.real_registry import HTPASSWD, PASSWORD, USERNAME, RealRegistry, start_registry
from tests.fakes.registry import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    TOKEN,
    FakeRegistry,
    Fault,
    Pusher,
    digest_of,
)

NOWHERE = f"sha256:{'0' * 64}"
LABELS = {"org.opencontainers.image.revision": "c0ffee", "podbuild": "1"}
CANARY = "canary/pa ss+word"
ATTESTATION = {
    "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
    "platform": {"os": "unknown", "architecture": "unknown"},
}
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies of the machine that runs the tests are for other hosts."""
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def real_open(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    with start_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="session")
def real_basic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    with start_registry(tmp_path_factory.mktemp("registry"), htpasswd=HTPASSWD) as registry:
        yield registry


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        yield registry


@pytest.fixture(params=["fake", "real"])
def either(request: pytest.FixtureRequest) -> FakeRegistry | RealRegistry:
    """A registry that is open to all."""
    registry = request.getfixturevalue("fake" if request.param == "fake" else "real_open")
    assert isinstance(registry, FakeRegistry | RealRegistry)
    return registry


@pytest.fixture(params=["fake", "real"])
def either_basic(request: pytest.FixtureRequest) -> Iterator[FakeRegistry | RealRegistry]:
    """A registry that wants Basic authentication."""
    if request.param == "real":
        yield request.getfixturevalue("real_basic")
    else:
        with FakeRegistry(auth="basic", username=USERNAME, password=PASSWORD) as registry:
            yield registry


@pytest.fixture
def repository() -> str:
    """A repository that no other test uses: the real registry keeps what it was given."""
    return f"team/app-{next(_numbers)}"


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody trusts yet, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        (
            *("openssl", "req", "-x509", "-nodes", "-days", "2", "-newkey", "ec"),
            *("-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-out", paths[0], "-keyout", paths[1]),
        ),
        check=True,
        capture_output=True,
    )
    return paths


def reader(
    registry: FakeRegistry | RealRegistry, username: str = "", password: str = "", timeout_seconds: float = 3
) -> Registry:
    credentials = RegistryCredentials(host=registry.host, username=username, password=password)
    return Registry(registry.host, credentials if username else None, plain_http=True, timeout_seconds=timeout_seconds)


def settings_for(registry: FakeRegistry | RealRegistry, password: str = "") -> HostSettings:
    credentials = RegistryCredentials(host=registry.host, username=USERNAME, password=password)
    return HostSettings(plain_http_registries=(registry.host,), registry_credentials=(credentials,) if password else ())


def drip() -> Iterator[bytes]:
    """Bytes without end, 20 a second."""
    while True:
        time.sleep(0.05)
        yield b" "


def push(registry: FakeRegistry, tag: str = "1", labels: dict[str, str] = LABELS) -> str:
    """Put an image into an open fake; its authentication and faults may follow."""
    with Pusher(registry.url, "app") as pusher:
        digest = pusher.image(tag, labels)
    registry.requests.clear()
    return digest


# The contract: the same for a real registry and the fake.


@pytest.mark.parametrize(
    ("media_type", "by_digest"),
    list(itertools.product((OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST), (False, True))),
)
async def test_r5_every_kind_of_image_is_found_by_tag_and_by_digest(
    either: FakeRegistry | RealRegistry, repository: str, media_type: str, by_digest: bool
) -> None:
    """What was pushed is found, with its digest and kind, and costs one request."""
    with Pusher(either.url, repository) as pusher:
        if media_type in (OCI_MANIFEST, DOCKER_MANIFEST):
            digest = pusher.image("1", LABELS, media_type)
        else:
            inner = OCI_MANIFEST if media_type == OCI_INDEX else DOCKER_MANIFEST
            platform = {"platform": {"os": "linux", "architecture": "amd64"}}
            digest = pusher.index("1", [(pusher.image("", LABELS, inner), platform)], media_type)

    async with reader(either) as registry:
        found = await registry.find(repository, digest if by_digest else "1")

    assert found == Image(digest, media_type)


@pytest.mark.parametrize(("name", "reference"), [("", "2"), ("", NOWHERE), ("never/pushed", "1")])
async def test_r3_what_the_registry_says_is_absent_is_none(
    either: FakeRegistry | RealRegistry, repository: str, name: str, reference: str
) -> None:
    """An unknown tag, digest or repository is None, not an error."""
    with Pusher(either.url, repository) as pusher:
        pusher.image("1", LABELS)

    async with reader(either) as registry:
        assert await registry.find(name or repository, reference) is None


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST])
@pytest.mark.parametrize("labels", [LABELS, {}])
async def test_labels_are_those_of_the_image(
    either: FakeRegistry | RealRegistry, repository: str, media_type: str, labels: dict[str, str]
) -> None:
    """The labels in the image's config come back as they were pushed."""
    with Pusher(either.url, repository) as pusher:
        digest = pusher.image("1", labels, media_type)
    image = ImageName(either.host, repository, "1")

    found = await find_labelled(image, settings_for(either))

    assert found == (Image(digest, media_type), labels)


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("", "amd64"), ("linux/arm64", "arm64"), ("linux/arm64/v8", "arm64"), ("linux/s390x", "amd64")],
)
async def test_r5_labels_of_an_index_are_those_of_the_platform_never_of_an_attestation(
    either: FakeRegistry | RealRegistry, repository: str, platform: str, expected: str
) -> None:
    """The entry for the platform counts, else the first that is an image."""
    with Pusher(either.url, repository) as pusher:
        attestation = pusher.image("", {"for": "nobody"})
        amd64, arm64 = (pusher.image("", {"for": name}, platform=name) for name in ("amd64", "arm64"))
        entries: list[tuple[str, dict[str, Any]]] = [
            (attestation, ATTESTATION),
            (amd64, {"platform": {"os": "linux", "architecture": "amd64"}}),
            (arm64, {"platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}}),
        ]
        digest = pusher.index("1", entries)

    async with reader(either) as registry:
        labels = await registry.labels(repository, Image(digest, OCI_INDEX), platform=platform)

    assert labels == {"for": expected}


async def test_what_is_no_image_has_no_labels(either: FakeRegistry | RealRegistry, repository: str) -> None:
    """A chart or a signature is found, and its config is left alone."""
    with Pusher(either.url, repository) as pusher:
        config = {"mediaType": "application/vnd.example.chart+json", "digest": pusher.blob(b"{}"), "size": 2}
        digest = pusher.manifest("1", OCI_MANIFEST, {"config": config, "layers": []})

    async with reader(either) as registry:
        assert await registry.labels(repository, Image(digest, OCI_MANIFEST)) == {}


async def test_r1_basic_credentials_of_the_settings_open_the_registry(
    either_basic: FakeRegistry | RealRegistry, repository: str
) -> None:
    """`find_image` takes credentials from the host's settings; another reference may be asked for."""
    with Pusher(either_basic.url, repository, (USERNAME, PASSWORD)) as pusher:
        digest = pusher.image("1", LABELS)
    image = ImageName(either_basic.host, repository, "1")
    settings = settings_for(either_basic, PASSWORD)

    assert await find_image(image, settings) == Image(digest, OCI_MANIFEST)
    assert await find_image(image, settings, reference=digest) == Image(digest, OCI_MANIFEST)
    assert await find_image(image, settings, reference="2") is None
    assert await find_labelled(ImageName(either_basic.host, repository, "2"), settings) is None


@pytest.mark.parametrize(("password", "text"), [("", "without credentials"), ("wrong", "that were given")])
async def test_r1_refused_credentials_are_never_an_absent_image(
    either_basic: FakeRegistry | RealRegistry, password: str, text: str
) -> None:
    """A 401 that stays is `AccessDenied`, although the image is not there."""
    with pytest.raises(AccessDenied, match=text):
        await find_image(ImageName(either_basic.host, "team/app", "1"), settings_for(either_basic, password))


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
async def test_s37_plain_http_is_only_for_registries_of_the_settings(
    either: FakeRegistry | RealRegistry, name: str
) -> None:
    """A registry without TLS is an error that names the setting; loopback is no exception."""
    host = f"{name}:{either.host.rpartition(':')[2]}"

    with pytest.raises(RegistryUnavailable, match="plain_http_registries"):
        await find_image(ImageName(host, "team/app", "1"), HostSettings())

    if isinstance(either, FakeRegistry):
        assert either.requests == []


# R1, R2: who we are, and to whom we say it.


@pytest.mark.parametrize("token_key", ["token", "access_token"])
@pytest.mark.parametrize(
    "challenge",
    [
        'Bearer realm="{realm}",service="fake",scope="repository:x:pull,push"',
        'bearer scope="a,b", SERVICE=fake , Realm="{realm}"',
        'Basic realm="a, Bearer realm=x", Bearer service="fake", realm="{realm}?account=a"',
        'Negotiate abc==, Bearer realm="{realm}", service="fake", error="insufficient_scope"',
    ],
)
async def test_r1_a_token_is_fetched_for_pulling_this_repository(
    fake: FakeRegistry, challenge: str, token_key: str
) -> None:
    """However the challenge is written, one token request follows, for `pull` only, and the repeated request holds."""
    digest = push(fake)
    fake.auth, fake.anonymous, fake.token_key = "bearer", True, token_key
    fake.challenge = challenge.format(realm=f"{fake.url}/token")

    async with reader(fake) as registry:
        assert await registry.find("app", "1") == Image(digest, OCI_MANIFEST)
        assert fake.calls == ["HEAD /v2/app/manifests/1", "GET /token", "HEAD /v2/app/manifests/1"]
        await registry.find("app", "1")

    assert len(fake.calls) == 4
    query = {"service": ["fake"], "scope": ["repository:app:pull"]}
    assert fake.requests[1].query in (query, query | {"account": ["a"]})
    assert fake.requests[2].headers["Accept"] == fake.requests[0].headers["Accept"]


@pytest.mark.parametrize(
    ("password", "anonymous", "error"),
    [(CANARY, False, None), ("wrong", True, AccessDenied), ("", False, AccessDenied)],
)
async def test_r1_the_token_server_sees_the_credentials(
    password: str, anonymous: bool, error: type[BuildError] | None
) -> None:
    """Right ones open the registry; wrong ones are an error even where anybody may pull."""
    with FakeRegistry(password=CANARY, anonymous=anonymous) as fake:
        push(fake)
        fake.auth = "bearer"
        async with reader(fake, "user" if password else "", password) as registry:
            if error is None:
                assert await registry.find("app", "1")
            else:
                with pytest.raises(error, match="token server"):
                    await registry.find("app", "1")


async def test_r1_a_token_that_expired_is_fetched_anew(fake: FakeRegistry) -> None:
    """A later 401 costs one more token request, not the answer."""
    push(fake)
    fake.auth, fake.anonymous = "bearer", True
    async with reader(fake) as registry:
        await registry.find("app", "1")
        challenge = {"WWW-Authenticate": fake.challenge}
        fake.faults.append(Fault("HEAD", 401, challenge, times=1))

        assert await registry.find("app", "1")

    assert fake.calls.count("GET /token") == 2


async def test_r1_a_second_401_is_a_refusal(fake: FakeRegistry) -> None:
    """A token that does not help is `AccessDenied`, after exactly one token."""
    fake.anonymous = True
    fake.faults.append(Fault("manifests", 401, {"WWW-Authenticate": fake.challenge}))

    async with reader(fake) as registry:
        with pytest.raises(AccessDenied, match="without credentials"):
            await registry.find("app", "1")

    assert fake.calls == ["HEAD /v2/app/manifests/1", "GET /token", "HEAD /v2/app/manifests/1"]


@pytest.mark.parametrize("public", [True, False])
async def test_r1_s26_a_token_server_of_another_host_gets_no_credentials(public: bool) -> None:
    """It is asked anonymously: that is enough for a public image, and else an error that says what was withheld."""
    with FakeRegistry(password=CANARY) as fake, FakeRegistry(password=CANARY, anonymous=public) as other:
        push(fake)
        fake.auth, fake.challenge = "bearer", f'Bearer realm="http://localhost:{other.port}/token",service="fake"'
        async with reader(fake, "user", CANARY) as registry:
            if public:
                assert await registry.find("app", "1")
            else:
                with pytest.raises(AccessDenied, match="were not sent to http://localhost"):
                    await registry.find("app", "1")

    assert other.calls == ["GET /token"]
    assert "Authorization" not in other.requests[0].headers


async def test_r1_a_token_server_on_another_port_of_the_registrys_host_gets_them() -> None:
    """The usual set-up of a private registry: its token server beside it."""
    with FakeRegistry(password=CANARY) as fake, FakeRegistry(password=CANARY) as other:
        push(fake)
        fake.auth, fake.challenge = "bearer", f'Bearer realm="{other.url}/token"'
        async with reader(fake, "user", CANARY) as registry:
            assert await registry.find("app", "1")

    assert other.requests[0].headers["Authorization"] == other.login


@pytest.mark.parametrize(
    ("realm", "registry", "allowed"),
    [
        ("https://registry.example.org/token", "https://registry.example.org", True),
        ("https://registry.example.org:8443/token", "https://registry.example.org:5000", True),
        ("https://auth.example.org/token", "https://registry.example.org", True),
        ("https://example.org/jwt/auth", "https://registry.example.org", True),
        ("https://AUTH.Example.ORG/token", "https://registry.example.org", True),
        ("http://auth.example.org/token", "http://registry.example.org", True),
        ("https://auth.example.org/token", "http://registry.example.org", True),
        ("http://registry.example.org/token", "https://registry.example.org", False),
        ("https://example.org.evil.net/token", "https://registry.example.org", False),
        ("https://evilexample.org/token", "https://registry.example.org", False),
        ("https://other.org/token", "https://example.org", False),
        ("https://evil.co.uk/token", "https://registry.co.uk", False),
        ("https://evil.co.uk/token", "https://registry.example.co.uk", False),
        ("https://auth.example.co.uk/token", "https://registry.example.co.uk", True),
        ("https://10.1.2.3/token", "https://10.9.2.3", False),
        ("https://[fd00::1]/token", "https://[fd00::2]", False),
        ("https://[fd00::1]/token", "https://[fd00::1]:5000", True),
        ("https://evil/token", "https://registry", False),
    ],
)
def test_r1_credentials_go_to_the_registrys_own_domain_over_tls(realm: str, registry: str, allowed: bool) -> None:
    """Own host or own domain, and never in the clear for a registry that speaks TLS."""
    assert may_receive_credentials(httpx.URL(realm), httpx.URL(registry)) is allowed


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", {}),
        ("Basic", {"basic": {}}),
        ('Bearer realm="https://a/t",service="s"', {"bearer": {"realm": "https://a/t", "service": "s"}}),
        ('BEARER Scope="a:b:pull,push" , REALM = "x"', {"bearer": {"scope": "a:b:pull,push", "realm": "x"}}),
        (r'Bearer realm="a \"quoted\", b"', {"bearer": {"realm": 'a "quoted", b'}}),
        ("Bearer realm=x,scope=,service=y", {"bearer": {"realm": "x", "scope": "", "service": "y"}}),
        ('Bearer realm="1", realm="2"', {"bearer": {"realm": "1"}}),
        ('Basic realm="b", Bearer realm="c"', {"basic": {"realm": "b"}, "bearer": {"realm": "c"}}),
        ('Bearer realm="never closed', {"bearer": {"realm": ""}}),
        (",,, ;", {}),
    ],
)
def test_r1_challenges_are_read_in_every_spelling(header: str, expected: dict[str, dict[str, str]]) -> None:
    """Any order and case, quoted commas, several schemes; of malformed text, what can be read."""
    assert parse_challenges(header) == expected


@pytest.mark.parametrize(
    "realm",
    ["", "token", "ftp://127.0.0.1/x", "http://", "http://u:p@127.0.0.1/", "http://[::", "http://127.0.0.1:99999/"],
)
async def test_r1_a_realm_that_is_no_address_is_an_error(fake: FakeRegistry, realm: str) -> None:
    """The registry does not answer as one."""
    fake.auth, fake.challenge = "bearer", f'Bearer realm="{realm}"'

    async with reader(fake) as registry:
        with pytest.raises(RegistryUnavailable, match="token server"):
            await registry.find("app", "1")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"token": 7}', b'{"token": "a\\nb"}', b'{"token": "' + b"x" * 70_000 + b'"}']
)
async def test_r1_s12_an_answer_without_a_usable_token_is_an_error(fake: FakeRegistry, body: bytes) -> None:
    """No token, one that no header can carry, or more than 64 KiB."""
    fake.auth = "bearer"
    fake.faults.append(Fault("/token", 200, body=body))

    async with reader(fake) as registry:
        with pytest.raises(RegistryUnavailable, match=r"no token|64 KiB"):
            await registry.find("app", "1")


async def test_r2_403_names_the_missing_scope(fake: FakeRegistry) -> None:
    """A 403 is final: one request, and the text names the scope and the repository."""
    fake.faults.append(Fault("manifests", 403))

    async with reader(fake) as registry:
        with pytest.raises(AccessDenied, match="`pull` on app"):
            await registry.find("app", "1")

    assert len(fake.calls) == 1


def test_s26_credentials_serve_the_host_they_were_stored_for() -> None:
    """Credentials for one host cannot be handed to another."""
    with pytest.raises(ValueError, match=r"not for other\.example"):
        Registry("other.example", RegistryCredentials(host="registry.example", password=CANARY))


# R3, R5, R6: what is there, and what the bytes say.


@pytest.mark.parametrize("status", [400, 404, 405, 406, 501])
async def test_r5_get_decides_where_head_cannot(fake: FakeRegistry, status: int) -> None:
    """A registry that knows no HEAD, or answers it oddly, is asked with GET; without a body to HEAD, as HTTP wants."""
    digest = push(fake)
    fake.faults.append(Fault("HEAD", status))

    async with reader(fake) as registry:
        assert await registry.find("app", "1") == Image(digest, OCI_MANIFEST)
        assert await registry.find("app", "2") is None


async def test_r6_a_missing_digest_header_is_replaced_by_the_hash_of_the_body(fake: FakeRegistry) -> None:
    """The header is optional; the digest is that of the bytes."""
    digest = push(fake)
    fake.tells_digest = False

    async with reader(fake) as registry:
        assert await registry.find("app", "1") == Image(digest, OCI_MANIFEST)
        assert await registry.find("app", digest) == Image(digest, OCI_MANIFEST)

    assert fake.calls[:2] == ["HEAD /v2/app/manifests/1", "GET /v2/app/manifests/1"]


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/json; charset=utf-8"])
async def test_r5_a_wrong_content_type_is_replaced_by_the_manifests_own_media_type(
    fake: FakeRegistry, content_type: str
) -> None:
    """A registry that calls every manifest JSON still has its images found."""
    digest = push(fake)
    content = fake.manifests["app", "1"][1]
    fake.faults.append(Fault("manifests", 200, {"Content-Type": content_type}, content))

    async with reader(fake) as registry:
        assert await registry.find("app", "1") == Image(digest, OCI_MANIFEST)


@pytest.mark.parametrize("match", ["HEAD", "GET", "GET .*blobs"])
async def test_r6_bytes_with_another_digest_are_an_error(fake: FakeRegistry, match: str) -> None:
    """Neither the registry's word nor its bytes pass for a digest that they do not have."""
    digest = push(fake)
    fake.tells_digest = match == "HEAD"
    headers = {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": NOWHERE if match == "HEAD" else ""}
    fake.faults.append(Fault(match, 200, headers, b'{"mediaType": "tampered"}'))

    async with reader(fake) as registry:
        with pytest.raises(RegistryUnavailable, match="digest"):
            await registry.find("app", digest)
            await registry.labels("app", Image(digest, OCI_MANIFEST))


async def test_r6_a_tags_body_must_have_the_digest_of_its_header(fake: FakeRegistry) -> None:
    """A proxy that rewrites manifests is noticed."""
    push(fake)
    fake.faults += [
        Fault("HEAD", 405),
        Fault("GET", 200, {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": NOWHERE}, b'{"x": 1}'),
    ]

    async with reader(fake) as registry:
        with pytest.raises(RegistryUnavailable, match=NOWHERE):
            await registry.find("app", "1")


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"null", b"", b"[" * 200_000, b"\xff", b'{"schemaVersion": 1}'])
async def test_r5_an_answer_that_is_no_manifest_is_an_error(fake: FakeRegistry, body: bytes) -> None:
    """A login page with status 200 is not an image."""
    headers = {"Content-Type": "text/html", "Docker-Content-Digest": digest_of(body)}
    fake.faults.append(Fault("manifests", 200, headers, body))

    async with reader(fake) as registry:
        with pytest.raises(RegistryUnavailable, match="no manifest of a kind"):
            await registry.find("app", "1")


@pytest.mark.parametrize("body", [b"<html>", b"[]", b""])
async def test_r5_a_content_type_alone_makes_no_manifest(fake: FakeRegistry, body: bytes) -> None:
    """What is read has to be a document."""
    fake.faults += [Fault("HEAD", 405), Fault("GET", 200, {"Content-Type": OCI_MANIFEST}, body)]

    async with reader(fake) as registry:
        with pytest.raises(RegistryUnavailable, match="no manifest of a kind"):
            await registry.find("app", "1")


@pytest.mark.parametrize(
    ("body", "base", "found"),
    [
        pytest.param(b"", 200, True, id="a registry that is short of words"),
        pytest.param(b"<html>", 401, True, id="a registry behind a login"),
        pytest.param(b"<html>", 404, False, id="a web site"),
    ],
)
async def test_r3_a_404_from_a_web_site_is_not_an_absent_image(
    fake: FakeRegistry, body: bytes, base: int, found: bool
) -> None:
    """A 404 that does not look like a registry's counts only if the registry's API is there at all."""
    fake.faults += [Fault("manifests", 404, body=body), Fault("/v2/$", base, {"WWW-Authenticate": "Basic"})]

    async with reader(fake) as registry:
        if found:
            assert await registry.find("app", "1") is None
        else:
            with pytest.raises(RegistryUnavailable, match="not as a registry"):
                await registry.find("app", "1")


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        pytest.param({"config": {"Labels": {"a": "b", "c": 1}}}, {"a": "b"}, id="a label that is no text"),
        pytest.param({"config": {"Labels": None}}, {}, id="null"),
        pytest.param({"config": []}, {}, id="a config that is a list"),
        pytest.param({}, {}, id="nothing"),
    ],
)
async def test_labels_of_odd_configs(fake: FakeRegistry, document: dict[str, Any], expected: dict[str, str]) -> None:
    """What is not a label is left out."""
    content = json.dumps(document).encode()
    with Pusher(fake.url, "app") as pusher:
        config = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": pusher.blob(content), "size": 9}
        digest = pusher.manifest("1", OCI_MANIFEST, {"config": config, "layers": []})

    async with reader(fake) as registry:
        assert await registry.labels("app", Image(digest, OCI_MANIFEST)) == expected


@pytest.mark.parametrize(
    "manifests", [None, [], "x", [1], *([{"digest": NOWHERE, k: v}] for k, v in ATTESTATION.items())]
)
async def test_r5_an_index_without_images_has_no_labels(fake: FakeRegistry, manifests: object) -> None:
    """An index of nothing, of nonsense, or of attestations only."""
    with Pusher(fake.url, "app") as pusher:
        digest = pusher.manifest("1", OCI_INDEX, {"manifests": manifests})

    async with reader(fake) as registry:
        assert await registry.labels("app", Image(digest, OCI_INDEX)) == {}


async def test_r5_an_index_inside_an_index_is_followed_but_not_forever(fake: FakeRegistry) -> None:
    """Two levels are read; more is an error."""
    with Pusher(fake.url, "app") as pusher:
        levels = [pusher.image("", LABELS)]
        for _ in range(3):
            levels.append(pusher.index("", [(levels[-1], {})]))

    async with reader(fake) as registry:
        assert await registry.labels("app", Image(levels[2], OCI_INDEX)) == LABELS
        with pytest.raises(RegistryUnavailable, match="too deeply"):
            await registry.labels("app", Image(levels[3], OCI_INDEX))


@pytest.mark.parametrize(
    ("config", "text"),
    [({"digest": NOWHERE}, "is missing there"), ({"digest": "md5:1"}, "SHA-256"), ({}, "SHA-256")],
)
async def test_labels_of_a_broken_image_are_an_error(fake: FakeRegistry, config: dict[str, str], text: str) -> None:
    """A config that is gone or has no digest is not the same as no labels."""
    with Pusher(fake.url, "app") as pusher:
        media_type = {"mediaType": "application/vnd.oci.image.config.v1+json"}
        digest = pusher.manifest("1", OCI_MANIFEST, {"config": media_type | config, "layers": []})

    async with reader(fake) as registry:
        with pytest.raises(RegistryUnavailable, match=text):
            await registry.labels("app", Image(digest, OCI_MANIFEST))


# R4: a registry that has a bad day.


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_r4_a_bad_moment_is_waited_out(fake: FakeRegistry, status: int) -> None:
    """Three refusals, and the fourth try has the answer."""
    digest = push(fake)
    fake.faults.append(Fault("HEAD", status, times=3))

    async with reader(fake) as registry:
        assert await registry.find("app", "1") == Image(digest, OCI_MANIFEST)

    assert len(fake.calls) == 4


@pytest.mark.parametrize("match", ["manifests", "/token"])
@pytest.mark.parametrize("status", [429, 503])
async def test_r4_w20_a_bad_day_is_unknown_not_absent(fake: FakeRegistry, match: str, status: int) -> None:
    """After four tries: `RegistryUnavailable`, which says what was asked, what came, and how to build all the same."""
    fake.auth = "bearer"
    fake.faults.append(Fault(match, status))

    async with reader(fake) as registry:
        with pytest.raises(RegistryUnavailable) as caught:
            await registry.find("app", "1")

    assert sum(match in call for call in fake.calls) == 4
    assert "whether app:1 exists" in caught.value.problem
    assert f"status {status} (4 tries)" in caught.value.problem
    assert "if_unknown='build'" in caught.value.remedy


async def test_r4_retry_after_is_obeyed(fake: FakeRegistry) -> None:
    """The next try comes when the registry said, not earlier."""
    push(fake)
    fake.faults.append(Fault("HEAD", 429, {"Retry-After": "1"}, times=1))
    started = time.monotonic()

    async with reader(fake) as registry:
        assert await registry.find("app", "1")

    assert 1 <= time.monotonic() - started < 2


@pytest.mark.parametrize("wait", ["3600", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
async def test_r4_a_wish_to_wait_longer_than_the_limit_ends_the_tries_at_once(fake: FakeRegistry, wait: str) -> None:
    """Waiting would not help, and asking earlier would not be polite."""
    fake.faults.append(Fault("HEAD", 429, {"Retry-After": wait}))
    started = time.monotonic()

    async with reader(fake) as registry:
        with pytest.raises(RegistryUnavailable, match=r"wish to wait \w+ s \(1 try\)"):
            await registry.find("app", "1")

    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": " 7 "}, 7),
        ({"Retry-After": "-7"}, 0),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": "\u0667"}, 0),
        ({"Retry-After": "Thu, 01 Jan 1970 00:01:40 GMT"}, 60),
        ({"Retry-After": "Thu, 01 Jan 1970 00:00:10 GMT"}, 0),
        ({"Retry-After": "Thu, 01 Jan 1970 00:01:40 GMT", "Date": "Thu, 01 Jan 1970 00:01:30 GMT"}, 10),
        ({"Retry-After": "Thu, 01 Jan 1970 00:01:40 GMT", "Date": "today"}, 0),
    ],
)
def test_r4_retry_after_is_seconds_or_a_date_of_the_servers_clock(headers: dict[str, str], seconds: float) -> None:
    """Unclear values are no wish at all."""
    assert retry_after(headers, now=40.0) == seconds


async def test_r4_a_silent_registry_ends_at_the_time_limit(fake: FakeRegistry) -> None:
    """No answer at all: an error within the time limit, and the tries fit into it."""
    fake.faults.append(Fault("HEAD", silent=True))
    started = time.monotonic()

    async with reader(fake, timeout_seconds=0.6) as registry:
        with pytest.raises(RegistryUnavailable, match=r"no answer in time \([234] tries\)"):
            await registry.find("app", "1")

    assert time.monotonic() - started < 0.9


async def test_r4_s12_a_body_that_drips_ends_at_the_time_limit(fake: FakeRegistry) -> None:
    """A byte now and then keeps no call alive: the limit is for the whole."""
    fake.faults += [Fault("HEAD", 405), Fault("GET", 200, body=drip())]
    started = time.monotonic()

    async with reader(fake, timeout_seconds=0.6) as registry:
        with pytest.raises(RegistryUnavailable, match="no answer in time"):
            await registry.find("app", "1")

    assert time.monotonic() - started < 0.9


@pytest.mark.parametrize("raw", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"])
async def test_r4_what_is_not_http_is_unknown(fake: FakeRegistry, raw: bytes) -> None:
    """Another protocol, or an answer that breaks off."""
    fake.faults += [Fault("HEAD", 405), Fault("GET", raw=raw)]

    async with reader(fake) as registry:
        with pytest.raises(RegistryUnavailable, match=r"no proper HTTP answer .* \(4 tries\)"):
            await registry.find("app", "1")


async def test_r4_a_closed_port_is_unknown() -> None:
    """Connection refused, four times."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        host = f"127.0.0.1:{held.getsockname()[1]}"

    async with Registry(host, plain_http=True, timeout_seconds=3) as registry:
        with pytest.raises(RegistryUnavailable, match=r"no connection .* \(4 tries\)"):
            await registry.find("app", "1")


async def test_a_cancelled_question_stays_cancelled(fake: FakeRegistry) -> None:
    """The caller's own time limit is the caller's: it is not turned into a registry's failure."""
    fake.faults.append(Fault("HEAD", silent=True))

    async with reader(fake) as registry:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await registry.find("app", "1")


# R8: redirects.


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_r8_a_redirected_blob_is_read_without_our_credentials(status: int) -> None:
    """Another host (here: another port) gets no Authorization; the digest still has to fit."""
    with FakeRegistry(auth="", password=CANARY) as fake, FakeRegistry() as store:
        digest = push(fake)
        fake.auth = "basic"
        (config,) = [d for d, content in fake.blobs.items() if b"config" in content]
        store.faults.append(Fault("/stored", 200, body=fake.blobs[config]))
        fake.faults.append(Fault("GET .*blobs", status, {"Location": f"{store.url}/stored?signature=1"}))

        async with reader(fake, "user", CANARY) as registry:
            assert await registry.labels("app", Image(digest, OCI_MANIFEST)) == LABELS

    assert fake.requests[-1].headers["Authorization"] == fake.login
    assert [r.headers.get("Authorization") for r in store.requests] == [None]


async def test_r8_a_redirect_on_the_same_host_keeps_the_credentials() -> None:
    """A registry may move its own paths."""
    with FakeRegistry(password=CANARY) as fake:
        digest = push(fake)
        fake.auth = "basic"
        fake.faults.append(Fault("/v2/old/", 308, {"Location": f"/v2/app/manifests/{digest}"}))

        async with reader(fake, "user", CANARY) as registry:
            await registry.find("app", "1")
            assert await registry.find("old", "1") == Image(digest, OCI_MANIFEST)


@pytest.mark.parametrize(("steps", "found"), [(5, True), (6, False)])
async def test_r8_at_most_five_redirects_are_followed(fake: FakeRegistry, steps: int, found: bool) -> None:
    """The sixth is an error, at once."""
    push(fake)
    for step in range(steps):
        target = f"/hop/{step + 1}" if step + 1 < steps else "/v2/app/manifests/1"
        fake.faults.append(Fault(f"/hop/{step}$" if step else "/v2/moved/", 307, {"Location": target}))

    async with reader(fake) as registry:
        if found:
            assert await registry.find("moved", "1")
        else:
            with pytest.raises(RegistryUnavailable, match="more than 5 times"):
                await registry.find("moved", "1")

    assert len(fake.calls) == 6


@pytest.mark.parametrize("location", ["file:///etc/passwd", "http://u:p@127.0.0.1/", "http://127.0.0.1:99999/"])
async def test_r8_a_redirect_to_nowhere_is_refused(fake: FakeRegistry, location: str) -> None:
    """Only web addresses without a user in them are followed."""
    fake.faults.append(Fault("HEAD", 307, {"Location": location}))

    async with reader(fake) as registry:
        with pytest.raises(RegistryUnavailable, match="does not follow"):
            await registry.find("app", "1")


async def test_r8_s37_tls_is_verified_and_never_left(
    fake: FakeRegistry, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown CA is an error at once; a known one works; a redirect from https to http is refused."""
    with FakeRegistry(certificate=certificate) as secure:
        async with Registry(secure.host, timeout_seconds=3) as registry:
            with pytest.raises(RegistryUnavailable, match=r"certificate verify failed.*\(1 try\).*SSL_CERT_FILE"):
                await registry.find("app", "1")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        secure.manifests["app", "1"] = (OCI_MANIFEST, b"{}")
        secure.faults.append(Fault("/2$", 307, {"Location": f"{fake.url}/v2/app/manifests/1"}))

        async with Registry(secure.host, timeout_seconds=3) as registry:
            assert await registry.find("app", "1") == Image(digest_of(b"{}"), OCI_MANIFEST)
            with pytest.raises(RegistryUnavailable, match="does not follow"):
                await registry.find("app", "2")

    assert fake.requests == []


# S12: how much is read. S25: what is never written.


@pytest.mark.parametrize("match", ["GET .*manifests", "GET .*blobs"])
@pytest.mark.parametrize(
    ("headers", "text"),
    [
        pytest.param({}, "larger than 4096 KiB", id="endless"),
        pytest.param({"Content-Encoding": "gzip"}, "compresses", id="endless gzip"),
    ],
)
async def test_s12_an_endless_body_is_read_to_its_limit(
    fake: FakeRegistry, match: str, headers: dict[str, str], text: str
) -> None:
    """More than 4 MiB is an error, and so is anything that would have to be decompressed."""
    digest = push(fake)
    fake.faults.append(Fault(match, 200, headers, itertools.repeat(b"\0" * 65536)))

    async with reader(fake) as registry:
        with pytest.raises(RegistryUnavailable, match=text):
            await registry.labels("app", Image(digest, OCI_MANIFEST))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault("never"), id="wrong password"),
        pytest.param(Fault("manifests", 403, body=CANARY.encode()), id="403"),
        pytest.param(Fault("manifests", 503, body=CANARY.encode()), id="503"),
        pytest.param(Fault("manifests", 200, {"Content-Type": CANARY}, CANARY.encode()), id="nonsense"),
        pytest.param(Fault("manifests", 401, {"WWW-Authenticate": CANARY}), id="401"),
        pytest.param(Fault("manifests|token", 200, body=json.dumps({"token": f"{CANARY}\n"}).encode()), id="bad token"),
        pytest.param(Fault("manifests|token", 401, body=CANARY.encode()), id="refused token"),
        pytest.param(Fault("manifests", 307, {"Location": f"ftp://x/?{CANARY}"}), id="redirect"),
        pytest.param(
            Fault("manifests", raw=f"HTTP/1.1 200 OK\r\n{CANARY} {TOKEN}\r\n\r\n".encode()), id="a server that echoes"
        ),
    ],
)
@pytest.mark.parametrize("auth", ["basic", "bearer"])
async def test_s25_no_error_holds_a_secret(fault: Fault, auth: str) -> None:
    """Text, repr, traceback and the whole chain of causes are free of password and token."""
    right = CANARY if fault.match != "never" else "another"
    with FakeRegistry(auth=auth, password=right) as fake:
        challenge = Fault("^HEAD", 401, {"WWW-Authenticate": "Basic" if auth == "basic" else fake.challenge}, times=1)
        fake.faults += [challenge, fault]
        async with reader(fake, "user", CANARY) as registry:
            shown = [repr(registry), repr(vars(registry)["_granted"])]
            with pytest.raises(BuildError) as caught:
                await registry.find("app", "1")
            shown += [repr(registry), repr(vars(registry)["_granted"])]

    error: BaseException | None = caught.value
    shown += ["".join(traceback.format_exception(caught.value))]
    while error is not None:
        shown += [str(error), repr(error), repr(error.args)]
        error = error.__cause__ or error.__context__
    text = "\n".join(shown)
    for secret in (CANARY, quote(CANARY), quote(CANARY, safe=""), fake.login.removeprefix("Basic "), TOKEN):
        assert secret not in text


# Names of registries and images.


async def test_an_image_without_a_tag_is_not_asked_for() -> None:
    """A 404 for nothing in particular would pass for an absent image."""
    with pytest.raises(ValueError, match="tag or a digest"):
        await find_image(ImageName("registry.example.org", "app"), HostSettings())


@pytest.mark.parametrize("host", ["", "127.0.0.1:99999", "[1:2]:3", "user@127.0.0.1", "127.0.0.1/x", "h:x"])
async def test_a_host_that_cannot_be_one_is_an_invalid_request(host: str) -> None:
    """Not a failure of the HTTP library."""
    with pytest.raises(InvalidRequest):
        await find_image(ImageName(host, "app", "1"), HostSettings())


async def test_a_registry_may_have_an_ipv6_address() -> None:
    """`[::1]:port` is a host like any other."""
    try:
        fake = FakeRegistry(address="::1", auth="bearer", anonymous=True)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with fake:
        fake.manifests["app", "1"] = (OCI_MANIFEST, b"{}")

        found = await find_image(ImageName(fake.host, "app", "1"), settings_for(fake))

    assert found == Image(digest_of(b"{}"), OCI_MANIFEST)


@pytest.mark.parametrize(
    ("host", "repository", "plain_http", "expected"),
    [
        ("registry.example.org", "team/app", False, "https://registry.example.org/v2/team/app"),
        ("registry.example.org:5000", "app", True, "http://registry.example.org:5000/v2/app"),
        ("localhost:5000", "app", False, "https://localhost:5000/v2/app"),
        ("[::1]:5000", "app", False, "https://[::1]:5000/v2/app"),
        ("docker.io", "debian", False, "https://registry-1.docker.io/v2/library/debian"),
        ("docker.io", "team/app", False, "https://registry-1.docker.io/v2/team/app"),
        ("registry.example.org", "a/b?c#d", False, "https://registry.example.org/v2/a/b%3Fc%23d"),
    ],
)
def test_where_a_repository_is(host: str, repository: str, plain_http: bool, expected: str) -> None:
    """TLS unless told otherwise; one registry has another host for its API, and a prefix for short names."""
    assert repository_url(host, repository, plain_http=plain_http) == expected
