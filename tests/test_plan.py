"""The plan: which options are part of a build's identity, and what its names are made of."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from podbuild.errors import InvalidRequest
from podbuild.names import parse_repository
from podbuild.plan import PUBLIC_LIMIT_BYTES, BuildOptions, Plan, canonical, parse_options, plan_build
from podbuild.settings import HostSettings, LocalSettings, RegistryCredentials

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SETTINGS = HostSettings(registry="registry.example.org/builds", builder_image="builder:1")

#: Options that change the image: another value is another build.
IDENTITY: dict[str, Any] = {
    "subdirectory": "app",
    "builder": "dockerfile",
    "dockerfile": "Dockerfile.prod",
    "build_args": {"A": "1"},
    "target": "final",
    "appendix": "RUN true",
    "extra_args": ("--no-cache",),
    "platform": "linux/arm64",
}

#: Options that say how it is built: whoever asks for other values joins the same build.
HOW: dict[str, Any] = {
    "cpu": "500m",
    "memory_request": "1Gi",
    "memory_limit": "8Gi",
    "storage_limit": "1Ti",
    "timeout_minutes": 5,
    "node_selector": {"disk": "fast"},
    "tolerations": ({"key": "builds", "operator": "Exists"},),
    "log_tail_lines": 10,
    "if_unknown": "build",
    "rebuild": True,
}


def plan(
    image: str | None = None,
    *,
    repo: str = "https://git.example.org/team/app",
    commit: str = COMMIT,
    settings: HostSettings = SETTINGS,
    **options: Any,
) -> Plan:
    """Return a plan that differs from the plain one only in what is given."""
    return plan_build(parse_repository(repo), commit, image, parse_options(options), settings)


def test_every_option_is_classified() -> None:
    """An option that is added to BuildOptions is either part of the identity or not, and its author says which."""
    assert IDENTITY.keys() | HOW.keys() == BuildOptions.model_fields.keys()
    assert not IDENTITY.keys() & HOW.keys()


@pytest.mark.parametrize("name", IDENTITY)
def test_an_option_that_changes_the_image_changes_both_hashes(name: str) -> None:
    """Neither an image that exists nor a pod that runs is taken for the other."""
    plain, changed = plan("h.org/app:1"), plan("h.org/app:1", **{name: IDENTITY[name]})

    assert changed.request != plain.request
    assert changed.build != plain.build
    assert changed.name != plain.name


@pytest.mark.parametrize("name", HOW)
def test_an_option_that_says_how_to_build_changes_no_name(name: str) -> None:
    """Limits, deadlines and placement enter neither hash: two callers still share one pod."""
    plain, changed = plan(), plan(**{name: HOW[name]})

    assert changed.options != plain.options
    assert (changed.request, changed.build, changed.name, changed.image) == (
        plain.request,
        plain.build,
        plain.name,
        plain.image,
    )


def test_options_that_change_the_image_are_never_mixed_up() -> None:
    """One value in two different options makes two different builds."""
    plans = [
        plan(),
        plan(appendix="x"),
        plan(target="x"),
        plan(subdirectory="x"),
        plan(dockerfile="x"),
        plan(build_args={"x": ""}),
        plan(build_args={"X": ""}),
        plan(extra_args=("x",)),
        plan(extra_args=("x", "y")),
        plan(extra_args=("y", "x")),
        plan(extra_args=("xy",)),
    ]

    assert (
        len({p.request for p in plans}) == len({p.build for p in plans}) == len({p.name for p in plans}) == len(plans)
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param({"subdirectory": "a/b"}, {"subdirectory": "./a//b/"}, id="a path's spelling"),
        pytest.param({"subdirectory": ""}, {"subdirectory": "."}, id="the top"),
        pytest.param({"dockerfile": "a/F"}, {"dockerfile": "./a/F"}, id="the Dockerfile's spelling"),
        pytest.param(
            {"build_args": {"A": "1", "B": "2"}}, {"build_args": {"B": "2", "A": "1"}}, id="order of arguments"
        ),
        pytest.param({"extra_args": ["--x"]}, {"extra_args": ("--x",)}, id="list or tuple"),
    ],
)
def test_options_that_mean_the_same_are_the_same_build(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Spelling and order that change nothing in the image change no name."""
    assert plan(**one).name == plan(**other).name


@pytest.mark.parametrize(
    ("changes", "request_stays", "build_stays"),
    [
        pytest.param({"commit": "f" * 40}, False, False, id="another commit is another image"),
        pytest.param({"repo": "https://git.example.org/team/other"}, False, False, id="another repository is, too"),
        pytest.param({"settings": replace(SETTINGS, builder_image="builder:2")}, True, False, id="another builder"),
        pytest.param({"image": "h.org/app:2"}, True, False, id="another target"),
        pytest.param({"settings": replace(SETTINGS, registry="other.org")}, True, True, id="another default registry"),
        pytest.param({"repo": "https://GIT.example.org/team/app.git/"}, True, True, id="G14: another spelling"),
    ],
)
def test_the_request_says_what_and_the_build_adds_with_what_and_where_to(
    changes: dict[str, Any], request_stays: bool, build_stays: bool
) -> None:
    """A new builder image rebuilds nothing that exists, but does not join an older builder's pod."""
    plain, changed = plan("h.org/app:1"), plan(**{"image": "h.org/app:1", **changes})

    assert (changed.request == plain.request) is request_stays
    assert (changed.build == plain.build) is build_stays
    assert (changed.name == plain.name) is build_stays


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        pytest.param(None, {}, "registry.example.org/builds/team/app:0123456789ab", id="plain: the commit"),
        pytest.param("h.org/app", {}, "h.org/app:0123456789ab", id="a name without a tag"),
        pytest.param("h.org/app:1", {"target": "x"}, "h.org/app:1", id="a tag that was given stays"),
        pytest.param(None, {"subdirectory": "."}, "registry.example.org/builds/team/app:0123456789ab", id="the top"),
        pytest.param(None, HOW, "registry.example.org/builds/team/app:0123456789ab", id="how it is built"),
    ],
)
def test_a_derived_tag_is_the_commit(image: str | None, options: dict[str, Any], expected: str) -> None:
    """The first 12 characters of the commit are the tag where none was given."""
    assert str(plan(image, **options).image) == expected


@pytest.mark.parametrize("name", IDENTITY)
def test_a_derived_tag_names_the_request_where_options_change_the_image(name: str) -> None:
    """Two images of one commit never share a derived tag: ``-`` and 8 of the request's hash follow."""
    made = plan(**{name: IDENTITY[name]})

    assert made.image.tag == f"0123456789ab-{made.request[:8]}"


def test_the_names_of_a_build_stay_what_they_are() -> None:
    """A golden plan: if this fails, every image that exists is built again and running pods are not joined."""
    made = plan(build_args={"A": "ä"}, subdirectory="app")

    assert made.identity == {
        "request": {
            "repository": "https://git.example.org/team/app",
            "commit": COMMIT,
            "subdirectory": "app",
            "builder": "auto",
            "dockerfile": "",
            "target": "",
            "build_args": {"A": "ä"},
            "appendix": "",
            "extra_args": [],
            "platform": "",
        },
        "builder_image": "builder:1",
        "image": str(made.image),
    }
    assert made.request == "a6a08eb43bdb9b59a3f5227b576a425aec2fbf55794b1cf3788e4a61194d4045"
    assert made.name == "build-team-app-a159fc012d7fd7b172b8"


def test_an_identity_is_plain_data_and_holds_no_secret() -> None:
    """It goes into an annotation that many may read, and comes back equal."""
    credentials = RegistryCredentials(host="registry.example.org", username="robot", password="secret-word")
    made = plan(settings=replace(SETTINGS, registry_credentials=(credentials,)), **IDENTITY)

    assert "secret-word" not in repr(made) + canonical(made.identity)

    assert json.loads(canonical(made.identity)) == made.identity
    assert canonical(made.identity).isascii()


def test_equal_plans_are_equal_whoever_makes_them() -> None:
    """The same request on the same host is the same plan."""
    assert plan() == plan()
    assert plan().name == plan().name
    assert plan() != plan(target="x")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"appendix": "x" * PUBLIC_LIMIT_BYTES}, id="appendix"),
        pytest.param({"build_args": {"A": "x" * PUBLIC_LIMIT_BYTES}}, id="one argument"),
        pytest.param({"build_args": {f"A{i}": "x" * 1000 for i in range(205)}}, id="many arguments"),
        pytest.param({"extra_args": ["x" * 2100] * 100}, id="extra arguments"),
        pytest.param({"appendix": "é" * (PUBLIC_LIMIT_BYTES // 5)}, id="as they are written in the annotation"),
    ],
)
def test_what_does_not_fit_into_an_annotation_is_refused(options: dict[str, Any]) -> None:
    """Over 200 KiB together the request is refused before anything is created."""
    with pytest.raises(InvalidRequest, match="KiB"):
        plan(**options)


def test_what_just_fits_is_accepted() -> None:
    """The limit is on the whole identity, to the byte."""
    room = PUBLIC_LIMIT_BYTES - len(canonical(plan(target="x").identity))

    assert plan(target="x", appendix="x" * room)
    with pytest.raises(InvalidRequest, match="KiB"):
        plan(target="x", appendix="x" * (room + 1))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"nope": 1}, id="unknown option"),
        pytest.param({"nope\nforged": 1}, id="S3: unknown option with a newline"),
        pytest.param({"builder": "docker"}, id="unknown builder"),
        pytest.param({"subdirectory": "../x"}, id="S11: subdirectory outside"),
        pytest.param({"dockerfile": "/etc/passwd"}, id="S11: Dockerfile outside"),
        pytest.param({"target": "--x"}, id="S1: target that is an option"),
        pytest.param({"target": "a\n"}, id="S3: target with a newline"),
        pytest.param({"platform": "linux"}, id="half a platform"),
        pytest.param({"platform": "linux/arm64,linux/amd64"}, id="two platforms"),
        pytest.param({"build_args": {"A B": "x"}}, id="S8: argument's name with a blank"),
        pytest.param({"build_args": {"1A": "x"}}, id="S8: argument's name with a digit first"),
        pytest.param({"build_args": {"A=": "x"}}, id="S8: argument's name with an equals sign"),
        pytest.param({"build_args": {"A\n": "x"}}, id="S3: argument's name with a newline"),
        pytest.param({"build_args": {"A": "\x00"}}, id="S3: argument with NUL"),
        pytest.param({"build_args": {"A": "\ud800"}}, id="S3: argument with half a surrogate pair"),
        pytest.param({"build_args": {"A": 1}}, id="argument that is a number"),
        pytest.param({"appendix": "\x00"}, id="S3: appendix with NUL"),
        pytest.param({"extra_args": ["\x00"]}, id="S3: extra argument with NUL"),
        pytest.param({"extra_args": "--x"}, id="extra arguments as one text"),
        pytest.param({"builder": "repo2docker", "dockerfile": "x"}, id="repo2docker with a Dockerfile"),
        pytest.param({"builder": "repo2docker", "target": "x"}, id="repo2docker with a stage"),
        pytest.param({"cpu": "two"}, id="cpu in words"),
        pytest.param({"cpu": "-1"}, id="negative cpu"),
        pytest.param({"cpu": "0"}, id="cpu 0 is no limit"),
        pytest.param({"cpu": "0.0"}, id="cpu 0.0"),
        pytest.param({"memory_limit": "0Gi"}, id="memory 0 is no limit"),
        pytest.param({"memory_limit": "4GB"}, id="foreign unit"),
        pytest.param({"memory_limit": "4Gi\n"}, id="S3: quantity with a newline"),
        pytest.param({"storage_limit": ""}, id="no quantity"),
        pytest.param({"timeout_minutes": 0}, id="no time"),
        pytest.param({"timeout_minutes": float("nan")}, id="time that is no number"),
        pytest.param({"timeout_minutes": float("inf")}, id="time without an end"),
        pytest.param({"log_tail_lines": -1}, id="negative tail"),
        pytest.param({"if_unknown": "guess"}, id="unknown choice"),
    ],
)
def test_options_that_cannot_be_built_are_refused(options: dict[str, Any]) -> None:
    """One typed error, safe to show, that names the option."""
    with pytest.raises(InvalidRequest, match=r"options|build argument") as caught:
        plan(**options)

    assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", ["1", "0.5", "500m", "010", "1.50Gi", "20Ti"])
def test_quantities_are_written_as_in_kubernetes(value: str) -> None:
    """Whole and decimal numbers with Kubernetes' units pass as they are."""
    assert parse_options({"cpu": value}).cpu == value


@pytest.mark.parametrize("commit", ["main", COMMIT[:12], COMMIT.upper(), COMMIT + "\n", ""])
def test_only_a_full_commit_is_planned(commit: str) -> None:
    """A plan never depends on where a branch stands."""
    with pytest.raises(InvalidRequest, match="full commit"):
        plan(commit=commit)


@pytest.mark.parametrize(
    ("patterns", "repo", "allowed"),
    [
        pytest.param((), "https://h/a", True, id="no patterns: all"),
        pytest.param(("git.example.org/team/*",), "https://git.example.org/team/app", True, id="a team"),
        pytest.param(("git.example.org/team/*",), "https://git.example.org/team/sub/app", True, id="its subgroups"),
        pytest.param(("git.example.org/team/*",), "https://git.example.org/team-b/app", False, id="not its neighbour"),
        pytest.param(
            ("git.example.org/team/*",), "https://git.example.org.evil.org/team/app", False, id="not its host"
        ),
        pytest.param(
            ("git.example.org/*",), "https://git.example.org:8443/a", False, id="another port is another host"
        ),
        pytest.param(("h/a", "h/b"), "https://h/b", True, id="any of them"),
        pytest.param(("h/a",), "https://H/a.git", True, id="G14: with .git"),
        pytest.param(("h/a.git",), "https://h/a/", True, id="G14: without .git"),
        pytest.param(("h/*",), "file:///h/a", False, id="local folders are not on a host"),
        pytest.param(("file/srv/*",), "file:///srv/a", True, id="local folders are on the host 'file'"),
    ],
)
def test_a_host_builds_only_repositories_it_allows(patterns: tuple[str, ...], repo: str, allowed: bool) -> None:
    """The patterns of the host block decide, and the refusal names the setting."""
    settings = LocalSettings(registry=SETTINGS.registry, allowed_repositories=patterns)
    if allowed:
        assert plan(repo=repo, settings=settings)
    else:
        with pytest.raises(InvalidRequest, match="allowed_repositories"):
            plan(repo=repo, settings=settings)


def test_options_cannot_be_changed_afterwards() -> None:
    """What was hashed is what is built."""
    options = parse_options({})

    with pytest.raises(ValueError, match="frozen"):
        options.target = "x"
