"""Which commit a name means: real git on both ends, and a git server that fails on demand.

Names carry the ids of the fault table: G1 unreachable, G2 missing refs, G3 exact matches, G4 branch
and tag, G5 hex names, G6 abbreviations, G7 annotated tags, G9 HEAD, G10 many refs, G11 redirects,
G12 private repositories, S1 options in disguise, S2 transports, S4 and S26 credentials, S12 endless
answers.
"""

from __future__ import annotations

import asyncio
import base64
import getpass
import itertools
import os
import pickle
import shutil
import socket
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podbuild.errors import AccessDenied, AmbiguousRef, BuildError, InvalidRequest, RefNotFound, SourceUnavailable
from podbuild.names import Repository, parse_repository
from podbuild.settings import GitCredentials
from podbuild.source import Resolved, resolve_commit
from tests.fakes.git_server import Fault, GitServer

TOKEN = "canary-t0ken/+=x"
GREETING = "application/x-git-upload-pack-advertisement"
ONES = "1" * 40


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies of the machine that runs the tests are for other hosts."""
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


def git(folder: Path, *arguments: str, text: str = "") -> str:
    """Run git as nobody in particular."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        **{f"GIT_{who}_{what}": f"{who}@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=environment, input=text, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


class Repo:
    """A bare repository to ask about; ``commits`` are five, each the child of the one before."""

    commits: list[str]

    def __init__(self, folder: Path, object_format: str = "sha1", like: Repo | None = None) -> None:
        self.folder = folder
        if like:
            shutil.copytree(like.folder, folder)
            self.commits = like.commits
            return
        folder.mkdir(parents=True)
        git(folder, "init", "--quiet", "--bare", "--initial-branch=main", f"--object-format={object_format}", ".")
        tree = git(folder, "mktree")
        self.commits = []
        for number in range(5):
            parents = [f"-p{parent}" for parent in self.commits[-1:]]
            self.commits.append(git(folder, "commit-tree", tree, *parents, "-m", f"commit {number}"))

    def set(self, name: str, commit: str) -> None:
        git(self.folder, "update-ref", name, commit)
        git(self.folder, "update-server-info")

    def tag(self, name: str, commit: str) -> None:
        git(self.folder, "tag", "-a", "-m", "a tag", name, commit)
        git(self.folder, "update-server-info")

    @property
    def file(self) -> Repository:
        return parse_repository(f"file://{self.folder}")

    def at(self, server: GitServer) -> Repository:
        return parse_repository(f"{server.url}/{self.folder.relative_to(server.folder)}")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Repo:
    repo = Repo(tmp_path_factory.mktemp("template") / "app.git")
    shutil.rmtree(repo.folder / "hooks", ignore_errors=True)
    repo.set("refs/heads/main", repo.commits[0])
    return repo


@pytest.fixture
def repo(tmp_path: Path, template: Repo) -> Repo:
    """``served/app.git`` with a branch ``main`` at its first commit."""
    return Repo(tmp_path / "served" / "app.git", like=template)


@pytest.fixture
def server(repo: Repo) -> Iterator[GitServer]:
    with GitServer(repo.folder.parent) as server:
        yield server


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Repo:
    """A repository with every kind of ref; nobody changes it."""
    repo = Repo(tmp_path_factory.mktemp("served") / "rich.git")
    first, second, third, fourth, fifth = repo.commits
    repo.set("refs/heads/main", first)
    repo.set("refs/heads/feature/main", second)
    repo.set("refs/tags/light", second)
    repo.set("refs/pull/7/head", third)
    repo.tag("v1.0", fourth)
    git(repo.folder, "tag", "-a", "-m", "a tag of a tag", "v1.0-again", "v1.0")
    repo.set(f"refs/heads/{fifth[:8]}", first)
    repo.set("refs/heads/deadbeef", second)
    repo.set("refs/heads/ümläut", second)
    return repo


@pytest.fixture(scope="module", params=["v2", "v1", "v0", "files", "folder"])
def dialect(request: pytest.FixtureRequest, rich: Repo) -> Iterator[Repository]:
    """The rich repository behind a server of each kind: protocols 2, 1, 0, plain files, and a local folder."""
    if request.param == "folder":
        yield rich.file
    else:
        with GitServer(rich.folder.parent, speaks=request.param) as server:
            yield rich.at(server)


def credentials(repository: Repository, username: str = "", password: str = TOKEN, path: str = "") -> GitCredentials:
    return GitCredentials(host=repository.host, path=path, username=username, password=password)


def everything_said(error: BaseException) -> str:
    """All that a log could show of an error."""
    return "".join(traceback.format_exception(error)) + repr(error.args)


async def until(condition: Callable[[], bool]) -> None:
    """Wait, for 5 seconds at most, until something has happened."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (other threads and processes set no event)
            await asyncio.sleep(0.01)


# --- what a name means ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "commit", "full_name"),
    [
        pytest.param("main", 0, "refs/heads/main", id="G3 main is not feature/main"),
        pytest.param("feature/main", 1, "refs/heads/feature/main", id="a branch in a folder"),
        pytest.param("ümläut", 1, "refs/heads/ümläut", id="a branch beyond ASCII"),
        pytest.param("light", 1, "refs/tags/light", id="a plain tag"),
        pytest.param("v1.0", 3, "refs/tags/v1.0", id="G7 an annotated tag is its commit"),
        pytest.param("v1.0-again", 3, "refs/tags/v1.0-again", id="G7 a tag of a tag is its commit"),
        pytest.param("HEAD", 0, "refs/heads/main", id="G9 HEAD says which branch it is"),
        pytest.param("refs/heads/main", 0, "refs/heads/main", id="the full name of a branch"),
        pytest.param("refs/tags/v1.0", 3, "refs/tags/v1.0", id="the full name of a tag"),
        pytest.param("refs/pull/7/head", 2, "refs/pull/7/head", id="a ref that is neither branch nor tag"),
        pytest.param("deadbeef", 1, "refs/heads/deadbeef", id="G6 a branch comes before an abbreviation"),
    ],
)
async def test_a_name_means_its_commit(rich: Repo, dialect: Repository, ref: str, commit: int, full_name: str) -> None:
    """Each kind of ref gives its commit and its full name, whatever the server speaks."""
    assert await resolve_commit(dialect, ref) == Resolved(rich.commits[commit], full_name)


@pytest.mark.parametrize("digits", [7, 39])
async def test_g6_an_abbreviation_means_the_one_commit_that_begins_so(
    rich: Repo, dialect: Repository, digits: int
) -> None:
    """Commits of branches, of annotated tags and of other refs can be shortened, in either case."""
    for commit in (rich.commits[0], rich.commits[2], rich.commits[3]):
        expected = Resolved(commit, "")
        assert await resolve_commit(dialect, commit[:digits]) == expected
        assert await resolve_commit(dialect, commit[:digits].upper()) == expected


async def test_g6_a_folder_knows_commits_that_no_ref_is_at(rich: Repo, tmp_path: Path) -> None:
    """Behind ``file`` an abbreviation may be any commit in the repository, but no tree and no tag."""
    loose = git(rich.folder, "commit-tree", git(rich.folder, "mktree"), "-m", "on no branch")
    tag = git(rich.folder, "rev-parse", "refs/tags/v1.0")

    assert await resolve_commit(rich.file, loose[:10]) == Resolved(loose, "")
    for other in (tag, git(rich.folder, "mktree")):
        with pytest.raises(RefNotFound):
            await resolve_commit(rich.file, other[:10])


async def test_g6_an_unknown_abbreviation_asks_for_the_full_commit(dialect: Repository) -> None:
    """Nothing begins so: the error says that the whole id would work."""
    with pytest.raises(RefNotFound, match=r"no branch or tag '0000000'.*full commit id"):
        await resolve_commit(dialect, "0000000")


@pytest.mark.parametrize("speaks", ["v2", "v0"])
async def test_g6_an_abbreviation_of_two_commits_is_ambiguous(server: GitServer, repo: Repo, speaks: str) -> None:
    """Two commits that begin alike are both named; the same commit under two refs is no question."""
    twin = ONES[:9] + "2" * 31
    listing = "".join(
        f"{len(line) + 5:04x}{line}\n"
        for line in (f"{ONES} refs/heads/a", f"{ONES} refs/heads/b", f"{twin} refs/heads/c")
    )
    if speaks == "v2":
        server.faults.append(Fault("POST", status=200, body=f"{listing}0000".encode()))
    else:
        body = f"001e# service=git-upload-pack\n0000{listing}0000".encode()
        server.faults.append(Fault("GET", status=200, headers={"Content-Type": GREETING}, body=body))

    with pytest.raises(AmbiguousRef, match=f"beginning of 2 commits.*{ONES}, {twin}.*full commit id"):
        await resolve_commit(repo.at(server), "1111111")

    assert await resolve_commit(repo.at(server), "1111111111") == Resolved(ONES, "")


@pytest.mark.parametrize("digits", [6, 4])
async def test_g6_fewer_than_seven_digits_are_a_name(rich: Repo, dialect: Repository, digits: int) -> None:
    """Short words of hex digits are mistyped names more often than commits."""
    with pytest.raises(RefNotFound):
        await resolve_commit(dialect, rich.commits[0][:digits])


@pytest.mark.parametrize("length", [40, 64])
async def test_g5_a_full_id_is_a_commit_and_never_a_branch(server: GitServer, repo: Repo, length: int) -> None:
    """A branch can be called like somebody's commit. The commit is meant, and no server is asked."""
    spoofed = "c0ffee" + "0" * (length - 6)
    (repo.folder / "packed-refs").write_text(f"{repo.commits[0]} refs/heads/{spoofed}\n")

    assert await resolve_commit(repo.at(server), spoofed) == Resolved(spoofed, "")
    assert await resolve_commit(repo.at(server), spoofed.upper()) == Resolved(spoofed, "")
    assert server.calls == []


@pytest.mark.parametrize("same", [False, True], ids=["at different commits", "at the same commit"])
async def test_g4_a_branch_and_a_tag_of_one_name_are_ambiguous(server: GitServer, repo: Repo, same: bool) -> None:
    """Both full names are in the error, and each of them works."""
    first, second = repo.commits[0], repo.commits[0 if same else 1]
    repo.set("refs/heads/release", first)
    repo.set("refs/tags/release", second)

    for repository in (repo.at(server), repo.file):
        with pytest.raises(AmbiguousRef, match=r"refs/heads/release and refs/tags/release.*Pass the full name"):
            await resolve_commit(repository, "release")

        assert await resolve_commit(repository, "refs/heads/release") == Resolved(first, "refs/heads/release")
        assert await resolve_commit(repository, "refs/tags/release") == Resolved(second, "refs/tags/release")


@pytest.mark.parametrize("speaks", ["v2", "v0", "files"])
async def test_g9_a_detached_head_is_called_head(repo: Repo, speaks: str) -> None:
    """HEAD may stand for no branch."""
    (repo.folder / "HEAD").write_text(f"{repo.commits[3]}\n")

    with GitServer(repo.folder.parent, speaks=speaks) as server:  # type: ignore[arg-type]
        assert await resolve_commit(repo.at(server), "HEAD") == Resolved(repo.commits[3], "HEAD")


@pytest.mark.parametrize("speaks", ["v2", "v0", "files"])
async def test_sha256_repositories_have_longer_ids(tmp_path: Path, speaks: str) -> None:
    """The other object format works the same."""
    repo = Repo(tmp_path / "new.git", object_format="sha256")
    repo.tag("v1", repo.commits[1])

    with GitServer(tmp_path, speaks=speaks) as server:  # type: ignore[arg-type]
        assert await resolve_commit(repo.at(server), "v1") == Resolved(repo.commits[1], "refs/tags/v1")
        assert await resolve_commit(repo.at(server), repo.commits[1][:45]) == Resolved(repo.commits[1], "")


NAMES = (
    *("main", "feature/main", "a/feature/main", "refs/heads/main", "heads/main", "tags/main", "main2", "mai"),
    *("v1", "release/v1", "refs/tags/v1", "HEAD2", "deadbee", "x/HEAD", "ümläut"),
)


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Repo, list[str], GitServer]]:
    """A repository without refs, the objects that refs may have (commits, and tags of them), and its server."""
    repo = Repo(tmp_path_factory.mktemp("served") / "blank.git")
    tags = [
        git(repo.folder, "mktag", text=f"object {commit}\ntype commit\ntag t\ntagger t <t@t> 1 +0000\n\nt\n")
        for commit in repo.commits
    ]
    with GitServer(repo.folder.parent) as server:
        yield repo, [*repo.commits, *tags], server


@settings(max_examples=40)
@given(
    refs=st.dictionaries(
        st.tuples(st.sampled_from(["refs/heads", "refs/tags", "refs/pull"]), st.sampled_from(NAMES)),
        st.integers(0, 9),
        max_size=8,
    ),
    ref=st.one_of(
        st.just("HEAD"),
        st.sampled_from(NAMES),
        st.sampled_from(["feature", "ain", "release", "1"]),
        st.tuples(st.sampled_from(["refs/heads", "refs/tags", "refs/pull"]), st.sampled_from(NAMES)).map("/".join),
    ),
)
def test_g3_g4_every_name_means_what_git_says_of_the_full_name(
    blank: tuple[Repo, list[str], GitServer], refs: dict[tuple[str, str], int], ref: str
) -> None:
    """Over random sets of refs full of traps: exactly one full name, and git's own commit for it, or an error."""
    repo, objects, server = blank
    lines = (f"{objects[number]} {folder}/{name}\n" for (folder, name), number in refs.items())
    (repo.folder / "packed-refs").write_text("".join(lines))
    full = [ref] if ref == "HEAD" or ref.startswith("refs/") else [f"refs/heads/{ref}", f"refs/tags/{ref}"]
    expected: list[object] = []
    for name in full:
        try:
            # Not rev-parse alone: it takes refs/heads/refs/tags/v1 for refs/tags/v1 where that is missing.
            target = git(repo.folder, "show-ref", "--verify", name).split()[0]
        except subprocess.CalledProcessError:
            continue
        commit = git(repo.folder, "rev-parse", f"{target}^{{commit}}")
        expected.append(Resolved(commit, "refs/heads/main" if name == "HEAD" else name))
    if len(expected) != 1:
        expected = [AmbiguousRef if expected else RefNotFound]

    try:
        answer: object = asyncio.run(resolve_commit(repo.at(server), ref))
    except BuildError as error:
        answer = type(error)

    assert answer == expected[0]


async def test_what_was_resolved_can_be_fetched_from_the_same_server(
    server: GitServer, repo: Repo, tmp_path: Path
) -> None:
    """The server of these tests is git's own: it hands out the commit, as it does to a build."""
    resolved = await resolve_commit(repo.at(server), "main")
    (tmp_path / "clone").mkdir()
    git(tmp_path / "clone", "init", "--quiet")

    await asyncio.to_thread(
        git, tmp_path / "clone", "fetch", "--quiet", "--depth=1", repo.at(server).url, resolved.commit
    )

    assert git(tmp_path / "clone", "rev-parse", "FETCH_HEAD") == repo.commits[0]


# --- what is not there ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "near"),
    [
        pytest.param("mian", "Near to it: main.", id="two letters swapped"),
        pytest.param("login", "Near to it: feature/login.", id="the folder forgotten"),
        pytest.param("refs/heads/mian", "Near to it: refs/heads/main", id="a full name"),
        pytest.param("1.0", "Near to it: v1.0, ", id="a tag without its v"),
    ],
)
@pytest.mark.parametrize("speaks", ["v2", "files"])
async def test_g2_a_missing_ref_comes_with_near_names(repo: Repo, speaks: str, ref: str, near: str) -> None:
    """RefNotFound names up to five refs that are nearly called so, and the default branch."""
    for name in ("heads/feature/login", "tags/v1.0", "tags/v1.0.1", "tags/v1.0.2", "tags/v1.0.3", "tags/v1.0.4"):
        repo.set(f"refs/{name}", repo.commits[1])

    with (
        GitServer(repo.folder.parent, speaks=speaks) as server,  # type: ignore[arg-type]
        pytest.raises(RefNotFound) as caught,
    ):
        await resolve_commit(repo.at(server), ref)

    assert f"'{ref}'" in caught.value.problem
    assert near in caught.value.remedy
    assert caught.value.remedy.endswith("Its default branch is 'main'; pass ref='main'.")
    assert caught.value.remedy.partition(". Its")[0].count(",") < 5


@pytest.mark.parametrize("ref", ["HEAD", "main"])
@pytest.mark.parametrize("speaks", ["v2", "v1", "v0", "files"])
async def test_g2_an_empty_repository_is_called_empty(tmp_path: Path, speaks: str, ref: str) -> None:
    """Nothing was pushed yet: that is what the error says."""
    repo = Repo(tmp_path / "empty.git")
    git(repo.folder, "update-server-info")

    with GitServer(tmp_path, speaks=speaks) as server, pytest.raises(RefNotFound, match="is empty"):  # type: ignore[arg-type]
        await resolve_commit(repo.at(server), ref)


async def test_g2_an_empty_folder_is_called_empty(tmp_path: Path) -> None:
    """The same, without a server."""
    with pytest.raises(RefNotFound, match="is empty"):
        await resolve_commit(Repo(tmp_path / "empty.git").file, "main")


async def test_g9_a_head_without_its_branch_is_told_from_an_empty_repository(server: GitServer, repo: Repo) -> None:
    """HEAD may name a branch that nobody ever pushed; the others are offered, and it is not."""
    git(repo.folder, "symbolic-ref", "HEAD", "refs/heads/master")

    with pytest.raises(RefNotFound, match=r"'master' does not exist\. Pass one of its branches as `ref`: main\."):
        await resolve_commit(repo.at(server), "HEAD")
    with pytest.raises(RefNotFound, match=r"Near to it: main\.$"):
        await resolve_commit(repo.at(server), "mains")


async def test_g2_a_ref_is_missing_even_if_its_neighbours_cannot_be_listed(server: GitServer, repo: Repo) -> None:
    """The second question is a courtesy: its failure changes nothing about the first answer."""
    server.faults.append(Fault("POST", status=200, body=b"0000", times=1))
    server.faults.append(Fault("POST", status=503))

    with pytest.raises(RefNotFound, match="no branch or tag 'mian'"):
        await resolve_commit(repo.at(server), "mian", timeout_seconds=2)


@pytest.mark.parametrize("path", ["nothing/here.git", "plain"])
async def test_g12_a_folder_that_is_no_repository_says_so(tmp_path: Path, path: str) -> None:
    """Neither a missing folder nor an ordinary one is a repository, even inside of one."""
    Repo(tmp_path / ".git")
    (tmp_path / "plain").mkdir()

    with pytest.raises(SourceUnavailable, match="There is no repository at file://"):
        await resolve_commit(parse_repository(f"file://{tmp_path}/{path}"), "main")


async def test_an_error_survives_pickling(server: GitServer, repo: Repo) -> None:
    """Prefect stores what a run failed with."""
    with pytest.raises(RefNotFound) as caught:
        await resolve_commit(repo.at(server), "mian")

    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301 (our own bytes)


# --- who may ask ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("username", "known_as"),
    [pytest.param("ada", "ada", id="a user name"), pytest.param("", "git", id="a bare token goes with the name git")],
)
async def test_g12_credentials_open_a_private_repository(repo: Repo, username: str, known_as: str) -> None:
    """Both requests carry them, and no address does."""
    with GitServer(repo.folder.parent, username=known_as, password=TOKEN) as server:
        private = repo.at(server)

        answer = await resolve_commit(private, "main", credentials(private, username))

    assert answer == Resolved(repo.commits[0], "refs/heads/main")
    assert server.calls == ["GET /app.git/info/refs", "POST /app.git/git-upload-pack"]


@pytest.mark.parametrize(
    ("status", "password", "expected", "said"),
    [
        pytest.param(401, TOKEN, AccessDenied, "refused access.*Check.*`git-credentials`", id="wrong credentials"),
        pytest.param(403, TOKEN, AccessDenied, "refused access.*Check.*`git-credentials`", id="not allowed"),
        pytest.param(403, "", AccessDenied, "name a `git-credentials` block", id="nobody is allowed"),
        pytest.param(401, "", SourceUnavailable, "no repository.*or it is private.*name a", id="no credentials"),
        pytest.param(404, "", SourceUnavailable, "no repository.*or it is private.*name a", id="not found"),
        pytest.param(404, TOKEN, SourceUnavailable, "no repository.*read access", id="not found with credentials"),
        pytest.param(410, "", SourceUnavailable, "no repository", id="gone"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_g12_s26_a_refusal_names_the_block_and_never_the_token(
    server: GitServer, repo: Repo, method: str, status: int, password: str, expected: type[BuildError], said: str
) -> None:
    """Hosts hide private repositories, so the errors leave both open. They are not tried twice."""
    server.faults.append(Fault(method, status=status))
    repository = repo.at(server)

    with pytest.raises(expected, match=said) as caught:
        await resolve_commit(repository, "main", credentials(repository, password=password) if password else None)

    assert repository.host in caught.value.remedy
    assert TOKEN not in everything_said(caught.value)
    assert len([r for r in server.requests if r.method == method]) == 1


@pytest.mark.parametrize("path", ["other", "app", "app.git/deeper"])
async def test_s26_credentials_of_another_path_stay_here(server: GitServer, repo: Repo, path: str) -> None:
    """A block for one path on a host says nothing to the rest of the host (a path may leave out .git)."""
    repository = repo.at(server)

    await resolve_commit(repository, "main", credentials(repository, path=path))

    assert {"Authorization" in r.headers for r in server.requests} == {path == "app"}


async def test_s26_credentials_of_another_host_stay_here(server: GitServer, repo: Repo) -> None:
    """Whoever chose the wrong block sends nothing."""
    await resolve_commit(repo.at(server), "main", GitCredentials(host="git.example.org", password=TOKEN))

    assert not any("Authorization" in r.headers for r in server.requests)


@pytest.mark.parametrize("echo", ["plain", "base64"])
async def test_s26_a_server_that_echoes_the_token_does_not_get_it_into_an_error(
    server: GitServer, repo: Repo, echo: str
) -> None:
    """What a server says is shown without what it was sent."""
    secret = TOKEN if echo == "plain" else base64.b64encode(f"git:{TOKEN}".encode()).decode()
    line = f"ERR you are {secret}, and nobody"
    body = f"{len(line) + 4:04x}{line}0000".encode()
    server.faults.append(Fault("GET", status=200, headers={"Content-Type": GREETING}, body=body))
    repository = repo.at(server)

    with pytest.raises(SourceUnavailable, match=r"the error 'you are .*\*\*\*") as caught:
        await resolve_commit(repository, "main", credentials(repository))

    assert secret not in everything_said(caught.value)


# --- redirects --------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that this test trusts, and its key."""
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
    monkeypatch.setenv("SSL_CERT_FILE", str(paths[0]))
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    return paths


def redirect(match: str, location: str, times: float = float("inf")) -> Fault:
    return Fault(match, status=301, headers={"Location": location}, times=times)


async def test_g11_a_renamed_repository_is_followed_with_its_credentials(repo: Repo) -> None:
    """On the same host, credentials go along."""
    with GitServer(repo.folder.parent, username="git", password=TOKEN) as server:
        server.faults.append(redirect("/old/", "/app.git/info/refs?service=git-upload-pack"))
        old = parse_repository(f"{server.url}/old")

        answer = await resolve_commit(old, "main", credentials(old))

    assert answer.commit == repo.commits[0]
    assert server.calls[-1] == "POST /app.git/git-upload-pack"


async def test_g11_three_redirects_are_followed_and_four_are_not(server: GitServer, repo: Repo) -> None:
    """Loops end."""
    repository = parse_repository(f"{server.url}/0")
    server.faults += [redirect(f"/{n}/info", f"/{n + 1}/info/refs") for n in range(2)]
    server.faults.append(redirect("/2/info", "/app.git/info/refs", times=1))

    assert (await resolve_commit(repository, "main")).commit == repo.commits[0]

    server.faults.append(redirect("/2/info", "/0/info/refs"))
    with pytest.raises(SourceUnavailable, match="redirects more than 3 times"):
        await resolve_commit(repository, "main")


@pytest.mark.parametrize("place", ["another port", "another host", "another scheme"])
async def test_g11_s26_credentials_do_not_follow_a_redirect_elsewhere(
    server: GitServer, repo: Repo, certificate: tuple[Path, Path], place: str
) -> None:
    """What lies elsewhere is asked, as nobody. If it is private there, the error says what to pass instead."""
    repository = repo.at(server)
    with GitServer(repo.folder.parent, certificate=certificate if place == "another scheme" else None) as other:
        url = other.url.replace("127.0.0.1", "localhost") if place == "another host" else other.url
        server.faults.append(redirect("GET", f"{url}/app.git/info/refs"))

        answer = await resolve_commit(repository, "main", credentials(repository))

        assert answer.commit == repo.commits[0]
        assert len(other.requests) == 2
        assert not any("Authorization" in r.headers for r in other.requests)

        other.login = "Basic something"
        with pytest.raises(SourceUnavailable, match=r"not taken along there: pass repo='http"):
            await resolve_commit(repository, "main", credentials(repository))


@pytest.mark.parametrize(
    ("location", "said"),
    [
        pytest.param("http://{host}/app.git/info/refs", "for safety's sake", id="from https to http"),
        pytest.param("file:///etc/info/refs", "for safety's sake", id="S2 to a file"),
        pytest.param(
            "https://ada:pass@{host}/app.git/info/refs", "for safety's sake", id="S4 to an address with a login"
        ),
        pytest.param("/users/sign_in", "or it is private", id="G12 to a login page"),
    ],
)
async def test_g11_some_redirects_are_not_followed(
    repo: Repo, certificate: tuple[Path, Path], location: str, said: str
) -> None:
    """Nothing is asked at such a place."""
    with GitServer(repo.folder.parent, certificate=certificate) as server:
        server.faults.append(redirect("GET", location.format(host=server.host)))

        with pytest.raises(SourceUnavailable, match=said):
            await resolve_commit(repo.at(server), "main")

    assert server.calls == ["GET /app.git/info/refs"]


async def test_https_with_a_certificate_that_nobody_knows_is_refused(
    repo: Repo, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says where a CA of one's own is named; no second try would help."""
    with GitServer(repo.folder.parent, certificate=certificate) as server:
        assert (await resolve_commit(repo.at(server), "main")).commit == repo.commits[0]

        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(SourceUnavailable, match=r"certificate cannot be trusted.*SSL_CERT_FILE"):
            await resolve_commit(repo.at(server), "main")


# --- servers in trouble -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("status", [500, 503, 429])
async def test_g1_two_hiccups_are_outlasted(server: GitServer, repo: Repo, method: str, status: int) -> None:
    """The third try counts."""
    server.faults.append(Fault(method, status=status, times=2))

    assert (await resolve_commit(repo.at(server), "main", timeout_seconds=3)).commit == repo.commits[0]


async def test_g1_three_failures_are_enough(server: GitServer, repo: Repo) -> None:
    """It is called unavailable, not missing."""
    server.faults.append(Fault("GET", status=503))

    with pytest.raises(SourceUnavailable, match=r"status 503 \(3 tries\)"):
        await resolve_commit(repo.at(server), "main", timeout_seconds=3)

    assert len(server.calls) == 3


async def test_g1_retry_after_is_honoured(server: GitServer, repo: Repo) -> None:
    """A server that asks for a second gets it."""
    server.faults.append(Fault("GET", status=429, headers={"Retry-After": "1"}, times=1))
    start = time.monotonic()

    await resolve_commit(repo.at(server), "main", timeout_seconds=10)

    assert time.monotonic() - start >= 1


async def test_g1_a_wish_to_wait_beyond_the_deadline_ends_it_at_once(server: GitServer, repo: Repo) -> None:
    """Nobody waits for what cannot come in time."""
    server.faults.append(Fault("GET", status=429, headers={"Retry-After": "3600"}))

    with pytest.raises(SourceUnavailable, match=r"wish to wait 3600 s \(1 try\)"):
        await resolve_commit(repo.at(server), "main")


async def test_g1_nobody_listens() -> None:
    """A refused connection is tried again, and then named."""
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        port = chosen.getsockname()[1]

    with pytest.raises(SourceUnavailable, match=r"no connection was made.*\(3 tries\)"):
        await resolve_commit(parse_repository(f"http://127.0.0.1:{port}/app.git"), "main", timeout_seconds=2)


@pytest.mark.parametrize("host", ["a" * 64 + ".invalid", "999.999.999.999", "[::::]"])
async def test_g1_a_host_that_cannot_be_is_a_typed_error(host: str) -> None:
    """No library's exception comes through, whatever a host name looks like."""
    with pytest.raises((SourceUnavailable, InvalidRequest)):
        await resolve_commit(parse_repository(f"https://{host}/app.git"), "main", timeout_seconds=2)


def slowly() -> Iterator[bytes]:
    while True:
        time.sleep(0.02)
        yield b"0"


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault("GET", silent=True), id="no answer"),
        pytest.param(Fault("GET", status=200, headers={"Content-Type": GREETING}, body=slowly()), id="a slow answer"),
    ],
)
async def test_g1_the_deadline_holds_for_everything_together(server: GitServer, repo: Repo, fault: Fault) -> None:
    """A server may be slow in any way: we are gone in time."""
    server.faults.append(fault)
    start = time.monotonic()

    with pytest.raises(SourceUnavailable, match="no answer"):
        await resolve_commit(repo.at(server), "main", timeout_seconds=0.6)

    assert time.monotonic() - start < 2
    assert await asyncio.to_thread(server.left.wait, 5)


async def test_cancelling_leaves_no_connection(server: GitServer, repo: Repo) -> None:
    """The server sees us leave."""
    server.faults.append(Fault("GET", silent=True))
    task = asyncio.create_task(resolve_commit(repo.at(server), "main"))
    await until(lambda: bool(server.requests))

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.left.wait, 5)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        pytest.param({"Content-Type": "text/html; charset=utf-8"}, b"<html>Log in", id="a login page"),
        pytest.param({}, b"<html>Log in\n", id="a login page without a type"),
        pytest.param({"Content-Type": "text/plain"}, f"{ONES}\trefs/heads/main".encode(), id="a list cut short"),
        pytest.param({"Content-Type": "text/plain"}, b"main\trefs/heads/main\n", id="a list without ids"),
        pytest.param({"Content-Type": GREETING}, b"", id="nothing"),
        pytest.param({"Content-Type": GREETING}, b"0000", id="nothing at length"),
        pytest.param({"Content-Type": GREETING}, b"<html>Log in", id="a page of the wrong type"),
        pytest.param({"Content-Type": GREETING}, b"000eversion 2\n", id="a greeting cut short"),
        pytest.param({"Content-Type": GREETING}, b"000eversion 2\n00", id="a packet cut short"),
        pytest.param({"Content-Type": GREETING}, b"000eversion 2\n0000", id="protocol 2 without ls-refs"),
        pytest.param({"Content-Type": GREETING}, b"001f# service=git-receive-pack\n0000", id="another service"),
        pytest.param({"Content-Type": GREETING}, b"001e# service=git-upload-pack\n0000", id="a service and no refs"),
        pytest.param({"Content-Type": GREETING}, b"0015not-an-id refs/x\n0000", id="a ref without an id"),
        pytest.param({"Content-Type": GREETING}, b"0012ERR go away\n00000000", id="git's own error"),
    ],
)
async def test_g1_what_is_no_git_server_is_told_from_an_empty_repository(
    server: GitServer, repo: Repo, headers: dict[str, str], body: bytes
) -> None:
    """Garbage is SourceUnavailable: "not found" would be a lie."""
    server.faults.append(Fault("GET", status=200, headers=headers, body=body))

    with pytest.raises(SourceUnavailable, match="does not tell its refs"):
        await resolve_commit(repo.at(server), "main")


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        pytest.param({"Content-Type": GREETING}, "fit into 8 MiB.*full commit id", id="endless"),
        pytest.param({"Content-Type": GREETING, "Content-Encoding": "gzip"}, "compresses", id="endless and compressed"),
    ],
)
async def test_s12_an_endless_answer_is_cut_off(
    server: GitServer, repo: Repo, headers: dict[str, str], said: str
) -> None:
    """8 MiB are read at most; compressed bytes are never unpacked."""
    server.faults.append(Fault("GET", status=200, headers=headers, body=itertools.repeat(b"\0" * 65536)))

    with pytest.raises(SourceUnavailable, match=said):
        await resolve_commit(repo.at(server), "main")

    assert await asyncio.to_thread(server.left.wait, 5)


async def test_g10_a_name_among_very_many_costs_next_to_nothing(repo: Repo) -> None:
    """Protocol 2 sends what was asked for; what must list all refs says that they are too many."""
    lines = (f"{repo.commits[1]} refs/heads/renovate/{number:06}-{'x' * 40}\n" for number in range(90_000))
    (repo.folder / "packed-refs").write_text(
        f"# pack-refs with: peeled fully-peeled sorted \n{''.join(lines)}{repo.commits[0]} refs/heads/zz\n"
    )

    with GitServer(repo.folder.parent) as server:
        assert (await resolve_commit(repo.at(server), "zz")).commit == repo.commits[0]
        assert sum(r.answered for r in server.requests) < 2000
        with pytest.raises(RefNotFound, match=r"no branch or tag 'zzz'\. Its default branch is 'main'"):
            await resolve_commit(repo.at(server), "zzz")
        with pytest.raises(SourceUnavailable, match=r"more of them than fit into 8 MiB\. Pass the full commit id"):
            await resolve_commit(repo.at(server), repo.commits[2][:9])
    before = pipes()
    with pytest.raises(RefNotFound, match=r"no branch or tag 'zzz'\. Its default branch is 'main'"):
        await resolve_commit(repo.file, "zzz")
    await until(lambda: pipes() <= before)


# --- git as a program -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ref",
    ["--upload-pack=touch marker", "--upload-pack=touch${IFS}marker", "-umarker", "$(touch marker)", "`id`", "m?in"],
)
async def test_s1_a_ref_that_is_an_option_is_refused(repo: Repo, tmp_path: Path, ref: str) -> None:
    """Nothing is asked, and nothing runs."""
    with pytest.raises(InvalidRequest):
        await resolve_commit(repo.file, ref)

    assert not list(tmp_path.rglob("marker"))


@pytest.mark.parametrize(
    "url",
    [
        "--upload-pack=touch {marker}",
        "-u{marker}",
        "ext::sh -c 'touch {marker}'",
        "ssh://-oProxyCommand=touch {marker}/x",
    ],
)
@pytest.mark.parametrize("scheme", ["file", "ssh"])
async def test_s1_s2_an_address_that_is_a_command_runs_nothing(tmp_path: Path, url: str, scheme: str) -> None:
    """The address is refused where it is read; and if it ever came further, git would not take it for an option."""
    marker = tmp_path / "marker"
    url = url.format(marker=marker)
    with pytest.raises(InvalidRequest):
        parse_repository(url)

    smuggled = Repository(url=url, scheme=scheme, host="git.example.org", path="/x", key="x")
    with pytest.raises((SourceUnavailable, AccessDenied)):
        await resolve_commit(smuggled, "main", timeout_seconds=5)

    assert not marker.exists()


async def test_s1_git_is_run_without_our_environment(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables and settings that make git run or ask something else do not reach it."""
    marker = tmp_path / "marker"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".gitconfig").write_text(f'[url "ext::touch {marker} #"]\n\tinsteadOf = file://\n')
    other = Repo(tmp_path / "other.git")
    for name, value in {
        "HOME": str(tmp_path / "home"),
        "GIT_DIR": str(other.folder),
        "GIT_TRACE": str(tmp_path / "trace"),
        "GIT_ALLOW_PROTOCOL": "ext:file",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{other.file}.insteadOf",
        "GIT_CONFIG_VALUE_0": str(repo.file),
    }.items():
        monkeypatch.setenv(name, value)

    assert await resolve_commit(repo.file, "main") == Resolved(repo.commits[0], "refs/heads/main")
    assert await resolve_commit(repo.file, repo.commits[4][:8]) == Resolved(repo.commits[4], "")
    assert not marker.exists()
    assert not (tmp_path / "trace").exists()


async def test_a_folder_of_another_user_can_be_asked(repo: Repo) -> None:
    """git's guard against other users' repositories is for commands that run what they configure."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    for path in (repo.folder, *repo.folder.rglob("*")):
        os.chown(path, 12345, 12345)

    assert (await resolve_commit(repo.file, "main")).commit == repo.commits[0]
    assert (await resolve_commit(repo.file, repo.commits[4][:8])).commit == repo.commits[4]


async def test_a_checkout_with_a_blank_in_its_path_can_be_asked(repo: Repo, tmp_path: Path) -> None:
    """A folder with a .git inside is a repository, and percent-encoding is understood."""
    git(tmp_path, "clone", "--quiet", str(repo.folder), "my checkout")
    checkout = parse_repository(f"file://{tmp_path}/my%20checkout")

    assert await resolve_commit(checkout, "HEAD") == Resolved(repo.commits[0], "refs/heads/main")
    assert (await resolve_commit(checkout, repo.commits[0][:7])).commit == repo.commits[0]


async def test_without_git_the_error_says_so(repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may lack the program."""
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(SourceUnavailable, match=r"git cannot be started.*Install git"):
        await resolve_commit(repo.file, "main")


# --- ssh --------------------------------------------------------------------------------------------------


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made during the test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def install_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program called ssh in front of the real one."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


async def test_s26_ssh_gets_its_key_as_a_private_file_that_does_not_stay(
    repo: Repo, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key and the known hosts are files of mode 600 for as long as ssh runs, and in no argument."""
    record = tmp_path / "record"
    show = "stat -c %a . ssh_key known_hosts; cat ssh_key known_hosts; env"
    install_ssh(tmp_path, monkeypatch, f'{{ echo "$@"; {show}; }} > {record}; for last; do :; done; exec sh -c "$last"')
    monkeypatch.setenv("SSH_AUTH_SOCK", "/of/the/owner")
    monkeypatch.setenv("GIT_SSH_COMMAND", "false")
    repository = parse_repository(f"git@git.example.org:{str(repo.folder).lstrip('/')}")
    key = GitCredentials(host="git.example.org", ssh_key="line 1\nline 2", known_hosts="git.example.org ssh-ed25519 A")

    assert await resolve_commit(repository, "main", key) == Resolved(repo.commits[0], "refs/heads/main")

    arguments, home, *modes = record.read_text().splitlines()[:4]
    assert [home, *modes] == ["700", "600", "600"]
    for option in (
        *("-F /dev/null", "BatchMode=yes", "IdentityFile=ssh_key", "IdentitiesOnly=yes", "IdentityAgent=none"),
        *("UserKnownHostsFile=known_hosts", "StrictHostKeyChecking=yes", "git@git.example.org"),
    ):
        assert option in arguments
    assert "line 1\nline 2\ngit.example.org ssh-ed25519 A\n" in record.read_text()
    assert "SSH_AUTH_SOCK" not in record.read_text()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("key", [None, GitCredentials(host="elsewhere.example.org", ssh_key="secret")])
async def test_s26_ssh_without_credentials_uses_nobodys_key(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: GitCredentials | None
) -> None:
    """Neither the machine's own keys nor another host's serve whoever may start a flow."""
    record = tmp_path / "record"
    install_ssh(tmp_path, monkeypatch, f'{{ echo "$@"; ls -A; }} > {record}; for last; do :; done; exec sh -c "$last"')

    await resolve_commit(parse_repository(f"ssh://git@git.example.org{repo.folder}"), "main", key)

    arguments, *files = record.read_text().splitlines()
    assert "IdentityFile=none" in arguments
    assert "IdentityAgent=none" in arguments
    assert files == []


@pytest.mark.parametrize(
    ("script", "expected", "said"),
    [
        pytest.param(
            "echo 'git@h: Permission denied (publickey).' >&2; exit 255",
            AccessDenied,
            "ssh key.*block",
            id="key refused",
        ),
        pytest.param(
            "echo 'Host key verification failed.' >&2; exit 255", AccessDenied, "`known_hosts`", id="host not known"
        ),
        pytest.param(
            "echo 'ERROR: Repository not found.' >&2; exit 1", SourceUnavailable, "or it is private", id="G12 not found"
        ),
        pytest.param(
            "echo 'ssh: connect to host h port 22: Connection refused' >&2; exit 255",
            SourceUnavailable,
            r"Connection refused.*\(3 tries\)",
            id="G1 unreachable",
        ),
        pytest.param("echo hello", SourceUnavailable, "does not tell", id="no git at the other end"),
        pytest.param("yes >&2", SourceUnavailable, "no answer within", id="S12 complains without end"),
        pytest.param("exec sleep 60", SourceUnavailable, "no answer within", id="G1 silent"),
    ],
)
async def test_g1_g12_what_ssh_meets_is_a_typed_error(
    tmp_path: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    expected: type[BuildError],
    said: str,
) -> None:
    """Whatever comes, it comes within the deadline and leaves no file and no pipe."""
    install_ssh(tmp_path, monkeypatch, script)
    before = pipes()
    start = time.monotonic()

    with pytest.raises(expected, match=said):
        await resolve_commit(parse_repository("git@git.example.org:team/app.git"), "main", timeout_seconds=1)

    assert time.monotonic() - start < 3
    await until(lambda: pipes() <= before)
    assert list(temporary.iterdir()) == []


def pipes() -> set[str]:
    """Return the pipes that this process holds open."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the descriptor that lists the folder is gone by now
            found.add(str(link.readlink()))
    return {target for target in found if target.startswith("pipe:")}


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def test_cancelling_leaves_no_process(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """git is ended, and the ssh that it started."""
    record = tmp_path / "pid"
    install_ssh(tmp_path, monkeypatch, f"echo $$ > {record}.new; mv {record}.new {record}; exec sleep 60")
    task = asyncio.create_task(resolve_commit(parse_repository("git@git.example.org:team/app.git"), "main"))
    await until(record.exists)
    pid = int(record.read_text())
    assert runs(pid)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not runs(pid))
    assert list(temporary.iterdir()) == []


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[tuple[str, str, str]]:
    """A real ssh server for this user: its ``host:port``, the key that opens it, and its own line of known_hosts."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or shutil.which("ssh-keygen") is None:
        pytest.skip("sshd is not installed (Debian package openssh-server)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # root's sshd starts nowhere without it
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        port = chosen.getsockname()[1]
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\n"
        "AcceptEnv GIT_PROTOCOL\nLogLevel ERROR\n"
    )
    with subprocess.Popen([program, "-D", "-e", "-f", tmp_path / "sshd_config"], stderr=subprocess.PIPE) as server:
        try:
            for _ in range(250):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.02)
            known = f"[127.0.0.1]:{port} {(tmp_path / 'host.pub').read_text()}"
            yield f"127.0.0.1:{port}", (tmp_path / "user").read_text(), known
        finally:
            server.terminate()


async def test_ssh_resolves_over_a_real_server(repo: Repo, tmp_path: Path, sshd: tuple[str, str, str]) -> None:
    """The right key and the right host open it; another host key or another user key does not."""
    host, key, known = sshd
    repo.tag("v1", repo.commits[3])
    repository = parse_repository(f"ssh://{getpass.getuser()}@{host}{repo.folder}")
    good = GitCredentials(host=host, ssh_key=key, known_hosts=known)

    assert await resolve_commit(repository, "HEAD", good) == Resolved(repo.commits[0], "refs/heads/main")
    assert await resolve_commit(repository, "v1", good) == Resolved(repo.commits[3], "refs/tags/v1")
    assert await resolve_commit(repository, repo.commits[3][:8], good) == Resolved(repo.commits[3], "")
    assert await resolve_commit(repository, "main", GitCredentials(host=host, ssh_key=key)) == Resolved(
        repo.commits[0], "refs/heads/main"
    )
    with pytest.raises(RefNotFound, match="Near to it: main"):
        await resolve_commit(repository, "mian", good)
    with pytest.raises(SourceUnavailable, match="or it is private"):
        await resolve_commit(parse_repository(f"{repository}x"), "main", good)
    with pytest.raises(AccessDenied, match="ssh key"):
        await resolve_commit(repository, "main", GitCredentials(host=host, known_hosts=known))
    imposter = f"[127.0.0.1]:{host.rpartition(':')[2]} {(tmp_path / 'user.pub').read_text()}"
    with pytest.raises(AccessDenied, match="host key"):
        await resolve_commit(repository, "main", GitCredentials(host=host, ssh_key=key, known_hosts=imposter))
