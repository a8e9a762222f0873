"""Names: what callers may write, what becomes of it, and what is refused.

Ids like S1 and G14 are rows of the fault table that the design was made from.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podbuild.errors import InvalidRequest
from podbuild.names import (
    NAME_LIMIT,
    Repository,
    check_path,
    check_ref,
    derive_image,
    is_commit,
    is_digest,
    parse_image,
    parse_repository,
    pod_name,
    printable,
    slug,
)

HASH = "0123456789abcdef" * 4

hosts = st.from_regex(
    r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,20}[a-zA-Z0-9])?(\.[a-z]{2,10}){0,3}(:[1-9][0-9]{0,3})?", fullmatch=True
)
paths = st.lists(st.from_regex(r"[A-Za-z0-9._~%+,=][A-Za-z0-9._~+,=-]{0,80}", fullmatch=True), min_size=1, max_size=5)
urls = st.builds(
    lambda scheme, host, path, end: f"{scheme}://{host}/{'/'.join(path)}{end}",
    st.sampled_from(["https", "http", "ssh", "HTTPS"]),
    hosts,
    paths,
    st.sampled_from(["", "/", ".git", ".git/"]),
)


def repository_or_none(url: str) -> Repository | None:
    """Return the repository, or None where the URL is refused; any other exception is a failure."""
    try:
        return parse_repository(url)
    except InvalidRequest:
        return None


# ---------------------------------------------------------------- repositories


@pytest.mark.parametrize(
    ("text", "url", "host", "path"),
    [
        pytest.param("https://github.com/a/b", "https://github.com/a/b", "github.com", "a/b", id="https"),
        pytest.param("http://h:8080/a", "http://h:8080/a", "h:8080", "a", id="http with a port"),
        pytest.param("ssh://git@h/a/b.git", "ssh://git@h/a/b.git", "h", "a/b.git", id="ssh with its user"),
        pytest.param("git@h.org:a/b.git", "ssh://git@h.org/a/b.git", "h.org", "a/b.git", id="short form of ssh"),
        pytest.param("file:///srv/a.git/", "file:///srv/a.git", "", "/srv/a.git", id="file"),
        pytest.param("HTTPS://H.Org:443/A/", "https://h.org/A", "h.org", "A", id="upper case, default port"),
        pytest.param(
            "https://[2001:DB8::1]:8443/a", "https://[2001:db8::1]:8443/a", "[2001:db8::1]:8443", "a", id="v6"
        ),
        pytest.param(
            "https://h/%C3%BC/~u/a+b%40c", "https://h/%C3%BC/~u/a+b%40c", "h", "%C3%BC/~u/a+b%40c", id="odd path"
        ),
    ],
)
def test_a_git_url_is_taken_apart(text: str, url: str, host: str, path: str) -> None:
    """Each kind of address that git knows by URL gives git's URL, the host and the path."""
    repository = parse_repository(text)

    assert (repository.url, repository.host, repository.path) == (url, host, path)
    assert str(repository) == url


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="S2: nothing"),
        pytest.param("a/b", id="S2: no scheme"),
        pytest.param("/srv/a.git", id="S2: local path"),
        pytest.param("../a", id="S2: relative path"),
        pytest.param("ext::sh -c id", id="S2: ext transport"),
        pytest.param("ext::sh%20-c%20id", id="S2: ext transport without blanks"),
        pytest.param("fd::17", id="S2: fd transport"),
        pytest.param("ftp://h/a", id="S2: ftp"),
        pytest.param("git://h/a", id="S2: the unauthenticated git protocol"),
        pytest.param("git+ssh://h/a", id="S2: compound scheme"),
        pytest.param("javascript://h/a", id="S2: foreign scheme"),
        pytest.param("https:/h/a", id="S2: one slash"),
        pytest.param("https://", id="S2: no host"),
        pytest.param("https:///a", id="S2: empty host"),
        pytest.param("https://h", id="S2: no path"),
        pytest.param("https://h/", id="S2: empty path"),
        pytest.param("file://h/a", id="S2: file on another host"),
        pytest.param("file://a", id="S2: file, relative"),
        pytest.param("file:///", id="S2: file, the root"),
        pytest.param("ssh://-oProxyCommand=id/a", id="S2: option as host"),
        pytest.param("ssh://-oProxyCommand=id@h/a", id="S2: option as user"),
        pytest.param("-oProxyCommand=id@h:a", id="S2: option as user, short form"),
        pytest.param("git@-oProxyCommand=id:a", id="S2: option as host, short form"),
        pytest.param("--upload-pack=id", id="S1: option as URL"),
        pytest.param("-u", id="S1: short option"),
        pytest.param("https://h/-u", id="S1: option as path"),
        pytest.param("https://h/a/--upload-pack=id", id="S1: option inside the path"),
        pytest.param("https://h/a/%2du", id="S1: option inside the path, encoded"),
        pytest.param("https://h/a\nb", id="S3: newline"),
        pytest.param("https://h/a\r", id="S3: carriage return"),
        pytest.param("https://h/a\tb", id="S3: tab"),
        pytest.param("https://h/a b", id="S3: blank"),
        pytest.param("https://h/a\x00", id="S3: NUL"),
        pytest.param("https://h/a\x7f", id="S3: delete"),
        pytest.param("https://h/a%0ab", id="S3: newline, encoded"),
        pytest.param("https://h/a%00", id="S3: NUL, encoded"),
        pytest.param("https://h\u0438.org/a", id="S3: look-alike host"),
        pytest.param("https://h/\u202ea", id="S3: text direction"),
        pytest.param("https://user:secret-word@h/a", id="S4: password"),
        pytest.param("https://secret-word@h/a", id="S4: token as user"),
        pytest.param("https://@h/a", id="S4: empty user"),
        pytest.param("ssh://git:secret-word@h/a", id="S4: password for ssh"),
        pytest.param("https://user:secret-word/x@h/a", id="S4: password with a slash"),
        pytest.param("https://user:8443/secret-word@h/a", id="S4: password that begins like a port"),
        pytest.param("https://user/secret-word@h/a", id="S4: token with a slash"),
        pytest.param("https://user:x@secret-word@h/a", id="S4: password with an at sign"),
        pytest.param("https://user:x#secret-word@h/a", id="S4: password with a hash"),
        pytest.param("https://user:x?secret-word@h/a", id="S4: password with a question mark"),
        pytest.param("https://user:secret-word\nx@h/a", id="S4: password with a newline"),
        pytest.param("https://user:x secret-word@h/a", id="S4: password with a blank"),
        pytest.param("user:secret-word@h:a", id="S4: password in the short form"),
        pytest.param("https:/user:secret-word@h/a", id="S4: password in a malformed URL"),
        pytest.param("https://user:secret-word@[h/a", id="S4: password before a malformed host"),
        pytest.param("https://h/a?token=secret-word", id="S4: token in the query"),
        pytest.param("https://h/a#main", id="fragment"),
        pytest.param("https://h/a?", id="empty query"),
        pytest.param("https://h:0/a", id="port 0"),
        pytest.param("https://h:65536/a", id="port too high"),
        pytest.param("https://h:port/a", id="port that is none"),
        pytest.param("https://h:/a", id="empty port"),
        pytest.param("https://h:80:80/a", id="two ports"),
        pytest.param("https://[::1/a", id="open bracket"),
        pytest.param("https://[h]/a", id="brackets around a name"),
        pytest.param("https://[fe80::1%25eth0]/a", id="zone of an interface"),
        pytest.param("https://h_x/a", id="underscore in the host"),
        pytest.param("https://.h/a", id="dot before the host"),
        pytest.param("https://h..org/a", id="two dots in the host"),
        pytest.param(f"https://{'h' * 300}/a", id="S6: host of 300 characters"),
        pytest.param(f"https://h/{'a' * 1100}", id="S6: URL over 1024 characters"),
        pytest.param("https://h/$(SECRET)", id="S8: variable of the container"),
        pytest.param("https://h/`id`", id="S8: shell"),
        pytest.param("https://h/a;id", id="S8: shell, second command"),
        pytest.param("https://h/a\\b", id="S11: backslash"),
        pytest.param("https://h/../a", id="S11: parent"),
        pytest.param("https://h/a/%2e%2e/b", id="S11: parent, encoded"),
        pytest.param("https://h/a/..%2fb", id="S11: parent, slash encoded"),
    ],
)
def test_what_is_no_git_url_is_refused(text: str) -> None:
    """Refused with an explanation that is safe to show: no control characters, no password."""
    with pytest.raises(InvalidRequest) as caught:
        parse_repository(text)

    shown = str(caught.value)
    assert shown.isprintable()
    assert "secret-word" not in shown
    assert caught.value.__context__ is None or "secret-word" not in str(caught.value.__context__)
    assert caught.value.remedy
    assert len(shown) < 600


@given(
    password=st.text(max_size=20), around=st.sampled_from(["https://u:{}@h/a", "u:{}@h:a", "http://{}@h/a", "x://:{}@"])
)
def test_s4_no_password_shows_in_an_error_however_malformed_the_url(password: str, around: str) -> None:
    """Whatever a password holds, neither its beginning nor its end is shown."""
    with pytest.raises(InvalidRequest) as caught:
        parse_repository(around.format(f"first-part{password}last-part"))

    assert "first-part" not in str(caught.value)
    assert "last-part" not in str(caught.value)


@given(text=st.one_of(st.text(max_size=60), urls, st.from_regex(r"(https?|ssh|file)://[!-~]{0,40}", fullmatch=True)))
def test_s3_any_text_is_a_repository_or_an_explained_refusal(text: str) -> None:
    """Nothing but `InvalidRequest` is raised, and what passes is printable ASCII that starts with no '-'."""
    if repository := repository_or_none(text):
        assert re.fullmatch(r"(https?|ssh|file)://[!-~]+", repository.url)
        assert not any(part.startswith("-") or part == ".." for part in repository.path.split("/"))


@given(url=urls)
def test_g14_parsing_is_idempotent(url: str) -> None:
    """A repository's own URL is its canonical spelling."""
    if repository := repository_or_none(url):
        assert parse_repository(repository.url) == repository


@pytest.mark.parametrize(
    "spelling",
    [
        "https://git.example.org/Team/App",
        "https://git.example.org/Team/App/",
        "https://git.example.org/Team/App.git",
        "https://git.example.org/Team/App.git/",
        "https://GIT.Example.ORG/Team/App",
        "https://git.example.org:443/Team/App",
        "HTTPS://git.example.org//Team/App",
    ],
)
def test_g14_spellings_of_one_repository_have_one_key_and_one_pod_name(spelling: str) -> None:
    """Host case, default port, ``.git`` and the last slash do not matter; so callers meet at one pod."""
    repository = parse_repository(spelling)

    assert repository.key == "https://git.example.org/Team/App"
    assert pod_name(repository, HASH) == pod_name(parse_repository("https://git.example.org/Team/App"), HASH)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("https://h/Team/app", "https://h/team/app", id="case of the path"),
        pytest.param("https://h/a", "http://h/a", id="scheme"),
        pytest.param("https://h/a", "https://h:8443/a", id="port"),
        pytest.param("https://h/a/b", "https://h/b", id="folder"),
        pytest.param("file:///a", "file:///a.git", id="local folders are what they are called"),
    ],
)
def test_g14_other_repositories_have_other_keys(one: str, other: str) -> None:
    """What a server may tell apart is told apart."""
    assert parse_repository(one).key != parse_repository(other).key


def test_g14_the_short_form_of_ssh_is_the_same_repository() -> None:
    """``git@host:path`` and ``ssh://`` share a key, and the user is not part of it."""
    keys = {parse_repository(t).key for t in ("git@h:a/b.git", "ssh://git@h/a/b", "ssh://h:22/a/b", "me@H:a/b")}

    assert keys == {"ssh://h/a/b"}


# ------------------------------------------------------------------- pod names


@given(url=urls, build=st.from_regex(r"[0-9a-f]{64}", fullmatch=True))
def test_s6_a_pod_name_is_always_a_dns_label(url: str, build: str) -> None:
    """For any repository that is accepted: at most 63 of a-z, 0-9 and '-', and the hash is whole."""
    if repository := repository_or_none(url):
        name = pod_name(repository, build)
        assert len(name) <= NAME_LIMIT
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name)
        assert "--" not in name
        assert name.startswith("build-")
        assert name.endswith(f"-{build[:20]}")


@given(
    url=urls, one=st.from_regex(r"[0-9a-f]{20}", fullmatch=True), other=st.from_regex(r"[0-9a-f]{20}", fullmatch=True)
)
def test_s6_builds_with_different_hashes_have_different_names(url: str, one: str, other: str) -> None:
    """The 80 bits of the hash decide, not the readable part."""
    if repository := repository_or_none(url):
        assert (pod_name(repository, one) == pod_name(repository, other)) == (one == other)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        pytest.param("https://github.com/Acme/My_App.git", "build-acme-my-app-0123456789abcdef0123", id="readable"),
        pytest.param("https://h/%C3%BC/~", "build-c3-bc-0123456789abcdef0123", id="not ASCII"),
        pytest.param("https://h/~", "build-0123456789abcdef0123", id="nothing readable"),
        pytest.param("file:///srv/git/app", "build-app-0123456789abcdef0123", id="a local folder's last part only"),
        pytest.param(f"https://h/{'a' * 300}", f"build-{'a' * 36}-0123456789abcdef0123", id="name of 300 characters"),
        pytest.param(f"https://h/{'a' * 35}/b", f"build-{'a' * 35}-0123456789abcdef0123", id="cut at a separator"),
    ],
)
def test_s6_a_pod_name_reads_as_its_repository(url: str, name: str) -> None:
    """Prefix, the path's last two parts, hash; all of it within 63 characters."""
    assert pod_name(parse_repository(url), HASH) == name


# ------------------------------------------------------------------------ refs


@pytest.mark.parametrize(
    "ref",
    [
        "HEAD",
        "main",
        "v1.0",
        "feature/x-1",
        "refs/heads/main",
        "a" * 40,
        "Ünï",
        "x@y",
        "user+tag,1=2",
        "a.lockx",
        "a/-b",
    ],
)
def test_what_git_can_hold_is_a_ref(ref: str) -> None:
    """Branches, tags, full names and commits pass as they are."""
    assert check_ref(ref) == ref


@pytest.mark.parametrize(
    "ref",
    [
        pytest.param("", id="nothing"),
        pytest.param("--upload-pack=touch /tmp/x", id="S1: option"),
        pytest.param("-", id="S1: dash"),
        pytest.param("--output=x", id="S1: option without blanks"),
        pytest.param("a\nb", id="S3: newline"),
        pytest.param("main\n", id="S3: newline at the end"),
        pytest.param("a\x00", id="S3: NUL"),
        pytest.param("a\x7f", id="S3: delete"),
        pytest.param("a\u202eb", id="S3: text direction"),
        pytest.param("a\u2028b", id="S3: line separator"),
        pytest.param("a b", id="S3: blank"),
        pytest.param("\ud800", id="S3: half a surrogate pair"),
        pytest.param("a..b", id="range"),
        pytest.param("a...b", id="range of three dots"),
        pytest.param("a~1", id="ancestor"),
        pytest.param("a^{}", id="peeled"),
        pytest.param("a:b", id="refspec"),
        pytest.param("m?in", id="G3: pattern ?"),
        pytest.param("m*", id="pattern *"),
        pytest.param("m[a]in", id="pattern []"),
        pytest.param("a\\b", id="backslash"),
        pytest.param("@", id="at sign alone"),
        pytest.param("a@{1}", id="reflog"),
        pytest.param("a.lock", id="lock file"),
        pytest.param("a.lock/b", id="lock file as folder"),
        pytest.param(".a", id="hidden"),
        pytest.param("a/.b", id="hidden part"),
        pytest.param("a.", id="dot at the end"),
        pytest.param("/a", id="slash first"),
        pytest.param("a/", id="slash last"),
        pytest.param("a//b", id="empty part"),
        pytest.param("a" * 256, id="S6: 256 characters"),
        pytest.param("$(SECRET)", id="S8: variable of the container"),
        pytest.param("a;id", id="S8: shell"),
        pytest.param("`id`", id="S8: shell, quoted"),
        pytest.param("a|id", id="S8: pipe"),
        pytest.param("a'b", id="S8: quote"),
    ],
)
def test_what_git_cannot_hold_is_no_ref(ref: str) -> None:
    """The rules of git-check-ref-format, no option, nothing for a shell; the explanation is safe to show."""
    with pytest.raises(InvalidRequest) as caught:
        check_ref(ref)

    assert str(caught.value).isprintable()


@given(ref=st.text(max_size=20))
def test_s1_s3_a_ref_that_passes_is_safe_in_any_command(ref: str) -> None:
    """Any text is refused, or printable, without blanks, and no option."""
    try:
        check_ref(ref)
    except InvalidRequest:
        return
    assert ref.isprintable()
    assert not ref.startswith("-")
    assert not set(ref) & set(" $`'\"\\;|&<>*?[")


# ----------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("", ""),
        (".", ""),
        ("./", ""),
        ("a", "a"),
        ("a/", "a"),
        ("./a//b/.", "a/b"),
        (".github", ".github"),
        ("ä b", "ä b"),
    ],
)
def test_a_path_has_one_spelling(path: str, plain: str) -> None:
    """Equal places give equal hashes; checking twice changes nothing."""
    assert check_path(path, "options.subdirectory") == plain
    assert check_path(plain, "options.subdirectory") == plain


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/", id="S11: root"),
        pytest.param("/etc", id="S11: absolute"),
        pytest.param("..", id="S11: parent"),
        pytest.param("a/../..", id="S11: parent inside"),
        pytest.param("a/..", id="S11: parent at the end"),
        pytest.param(".git", id="S11: git's own folder"),
        pytest.param("a/.git/hooks", id="S11: a submodule's own folder"),
        pytest.param("a\\..\\b", id="S11: backslashes"),
        pytest.param("-f", id="S1: option"),
        pytest.param("a/-f", id="S1: option inside"),
        pytest.param("./-f", id="S1: option once it is plain"),
        pytest.param("a\nb", id="S3: newline"),
        pytest.param("a\x00", id="S3: NUL"),
        pytest.param("a" * 501, id="S6: 501 characters"),
    ],
)
def test_a_path_outside_the_repository_is_refused(path: str) -> None:
    """Nothing leads out of the repository, into git's folder, or looks like an option."""
    with pytest.raises(InvalidRequest, match=r"options\.dockerfile") as caught:
        check_path(path, "options.dockerfile")

    assert str(caught.value).isprintable()


@given(path=st.text(alphabet="ab./-\\ \n~", max_size=12))
def test_s11_a_path_that_passes_stays_inside(path: str) -> None:
    """Any text is refused, or relative without a way up, and plain."""
    try:
        plain = check_path(path, "path")
    except InvalidRequest:
        return
    assert not plain.startswith(("/", "-"))
    assert not {"", ".", "..", ".git"} & set(plain.split("/")) or plain == ""
    assert check_path(plain, "path") == plain


# ---------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("registry.example.org/team/app:1.0", "registry.example.org/team/app:1.0", id="all of it"),
        pytest.param("localhost/app", "localhost/app", id="localhost, no tag"),
        pytest.param("h:5000/app", "h:5000/app", id="port, no tag"),
        pytest.param("h:5000/app:Tag_1.x-y", "h:5000/app:Tag_1.x-y", id="port and tag"),
        pytest.param("[::1]:5000/app", "[::1]:5000/app", id="IPv6"),
        pytest.param("Registry.Example.ORG/app", "registry.example.org/app", id="the registry's case does not matter"),
        pytest.param("h.org/a__b/c--d/e.f_g", "h.org/a__b/c--d/e.f_g", id="separators"),
        pytest.param(f"h.org/{'a' * 249}:{'t' * 128}", f"h.org/{'a' * 249}:{'t' * 128}", id="as long as it may be"),
    ],
)
def test_an_image_name_is_taken_apart(text: str, shown: str) -> None:
    """Registry, name and tag come apart, and together again in one spelling."""
    image = parse_image(text)

    assert str(image) == shown
    assert parse_image(str(image)) == image
    assert image.at("sha256:0") == f"{image.name}@sha256:0"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="S9: nothing"),
        pytest.param("app", id="S9: no registry"),
        pytest.param("team/app:1", id="S9: no registry, but a folder"),
        pytest.param("h.org/", id="S9: no name"),
        pytest.param("h.org/:1", id="S9: tag only"),
        pytest.param("h.org/App", id="S9: upper case"),
        pytest.param("h.org/a b", id="S9: blank"),
        pytest.param("h.org/a\n", id="S9: newline"),
        pytest.param("h.org/a:1\n", id="S9: newline in the tag"),
        pytest.param("h.org/a//b", id="S9: empty part"),
        pytest.param("h.org/../a", id="S9: parent"),
        pytest.param("h.org/a..b", id="S9: two dots"),
        pytest.param("h.org/a___b", id="S9: three underscores"),
        pytest.param("h.org/-a", id="S9: dash first"),
        pytest.param("h.org/a-", id="S9: dash last"),
        pytest.param("h.org/a/", id="S9: slash last"),
        pytest.param("h.org/ä", id="S9: not ASCII"),
        pytest.param("\u017f.org/a", id="S9: a letter that only looks like s without its case"),
        pytest.param("\u212a.org/a", id="S9: a Kelvin sign for a k"),
        pytest.param("h.org/a:", id="S9: empty tag"),
        pytest.param("h.org/a:.x", id="S9: tag with a dot first"),
        pytest.param("h.org/a:x/y", id="S9: tag with a slash"),
        pytest.param("h.org/a:1:2", id="S9: two tags"),
        pytest.param(f"h.org/a:{'t' * 129}", id="S9: tag of 129 characters"),
        pytest.param(f"h.org/{'a' * 250}", id="S9: name of 256 characters"),
        pytest.param("-h.org/a", id="S9: option"),
        pytest.param("h..org/a", id="S9: registry with two dots"),
        pytest.param("h.-x/a", id="S9: registry with a dash first"),
        pytest.param("h:port/a", id="S9: port that is none"),
        pytest.param("https://h.org/a", id="S9: a URL"),
        pytest.param("docker://h.org/a", id="S9: a transport"),
        pytest.param(f"h.org/a@sha256:{HASH}", id="S9: digest"),
        pytest.param(f"h.org/a:1@sha256:{HASH}", id="S9: tag and digest"),
        pytest.param("user:secret-word@h.org/a", id="S4: password"),
        pytest.param("https://user:secret-word@h.org/a", id="S4: password in a URL"),
    ],
)
def test_what_is_no_image_name_is_refused(text: str) -> None:
    """The OCI grammar, with the registry written out; the explanation is safe to show."""
    with pytest.raises(InvalidRequest) as caught:
        parse_image(text)

    assert str(caught.value).isprintable()
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("registry", "url", "image"),
    [
        pytest.param("h.org", "https://github.com/Acme/App.git", "h.org/acme/app", id="registry alone"),
        pytest.param(
            "h.org/builds/", "https://github.com/x/acme/app", "h.org/builds/acme/app", id="prefix, last two parts"
        ),
        pytest.param("h:5000", "file:///srv/git/My_App", "h:5000/my_app", id="local folder"),
        pytest.param("h.org", "https://h/a__b/.c--d.", "h.org/a_b/c-d", id="separators are made single"),
        pytest.param("h.org", "https://h/~/app", "h.org/app", id="a part with nothing usable"),
    ],
)
def test_an_image_name_is_derived_from_the_repository(registry: str, url: str, image: str) -> None:
    """The host's registry, then the repository's last two parts in what registries allow."""
    assert str(derive_image(registry, parse_repository(url))) == image


@pytest.mark.parametrize(
    ("registry", "url"),
    [
        pytest.param("", "https://h/a", id="no registry"),
        pytest.param("h.org/builds", "https://h/~/_", id="nothing usable: the prefix alone is no image of its own"),
        pytest.param("registry", "https://h/a", id="registry without a dot or a port"),
    ],
)
def test_no_image_name_is_made_up(registry: str, url: str) -> None:
    """Where nothing sensible can be derived, the caller is asked for `image`."""
    with pytest.raises(InvalidRequest):
        derive_image(registry, parse_repository(url))


@given(url=urls)
def test_s9_a_derived_image_name_is_always_valid(url: str) -> None:
    """For any repository that is accepted: a valid name, or a refusal, never another exception."""
    if repository := repository_or_none(url):
        try:
            image = derive_image("h.org/builds", repository)
        except InvalidRequest:
            return
        assert parse_image(str(image)) == image
        assert image.name.startswith("h.org/builds/")


# ------------------------------------------------------------------ small ones


@pytest.mark.parametrize(
    ("check", "text", "expected"),
    [
        pytest.param(is_commit, "a" * 40, True, id="SHA-1"),
        pytest.param(is_commit, "a" * 64, True, id="SHA-256"),
        pytest.param(is_commit, "a" * 39, False, id="G5: abbreviated"),
        pytest.param(is_commit, "a" * 41, False, id="G5: one too many"),
        pytest.param(is_commit, "A" * 40, False, id="G5: upper case"),
        pytest.param(is_commit, "a" * 40 + "\n", False, id="G5: newline"),
        pytest.param(is_commit, "٣" * 40, False, id="G5: digits of another script"),
        pytest.param(is_digest, f"sha256:{HASH}", True, id="digest"),
        pytest.param(is_digest, HASH, False, id="digest without its algorithm"),
        pytest.param(is_digest, f"sha256:{HASH}\n", False, id="digest and newline"),
    ],
)
def test_a_commit_and_a_digest_are_known_by_every_character(
    check: Callable[[str], bool], text: str, expected: bool
) -> None:
    """Full ids only: nothing that merely begins like one."""
    assert check(text) is expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("plain", "plain", id="plain"),
        pytest.param("a\nb\x1b[0m", r"a\nb\x1b[0m", id="L18: control characters"),
        pytest.param("see https://u:p/w@x@h/a now", "see https://***@h/a now", id="S4: password up to the last @"),
        pytest.param("x" * 201, "x" * 200 + "…", id="long"),
        pytest.param("https://u:" + "p" * 300 + "@h", "https://***@h", id="S4: hidden before it is cut"),
    ],
)
def test_text_in_an_error_message_is_printable(text: str, shown: str) -> None:
    """Nobody's text can forge a log line or carry a login."""
    assert printable(text) == shown


@given(text=st.text(max_size=50), limit=st.integers(1, 50))
def test_s6_a_slug_has_single_separators_inside_only(text: str, limit: int) -> None:
    """For any text: lower-case words with single dashes between, or nothing; and again the same."""
    made = slug(text, limit=limit)

    assert re.fullmatch(r"([a-z0-9]+(-[a-z0-9]+)*)?", made)
    assert len(made) <= limit
    assert slug(made, limit=limit) == made
