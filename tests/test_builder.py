"""What `build` does with a checkout: which builder it takes, what it calls it with, and what its end means."""

import json
import os
import resource
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import build
import pytest
from meeting import Failure

POD: dict[str, Any] = {
    "builder": "auto",
    "commit": "c" * 40,
    "subdirectory": "",
    "dockerfile": "",
    "target": "",
    "build_args": {},
    "appendix": "",
    "extra_args": [],
    "platform": "",
}


def make(folder: Path, *files: str) -> Path:
    """Make a checkout of empty files; a name that ends in / is a folder."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.touch()
    return folder


# --- choosing and calling a builder -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "options", "builder"),
    [
        pytest.param(["Dockerfile"], {}, "dockerfile", id="a Dockerfile"),
        pytest.param(["Containerfile"], {}, "dockerfile", id="a Containerfile"),
        pytest.param(["Dockerfile", "binder/"], {}, "repo2docker", id="a binder folder goes first"),
        pytest.param(["Dockerfile", ".binder/"], {}, "repo2docker", id="a hidden binder folder too"),
        pytest.param(["Dockerfile", "binder"], {}, "dockerfile", id="a file named binder is none"),
        pytest.param(["requirements.txt"], {}, "repo2docker", id="neither"),
        pytest.param([], {}, "repo2docker", id="an empty repository"),
        pytest.param(["binder/"], {"target": "stage"}, "dockerfile", id="a target stage needs a Dockerfile"),
        pytest.param(["binder/"], {"dockerfile": "x"}, "dockerfile", id="a named Dockerfile"),
        pytest.param(["Dockerfile"], {"builder": "repo2docker"}, "repo2docker", id="asked for repo2docker"),
        pytest.param([], {"builder": "dockerfile"}, "dockerfile", id="asked for a Dockerfile"),
    ],
)
def test_the_builder_is_what_was_asked_for_or_what_the_folder_looks_like(
    tmp_path: Path, files: list[str], options: dict[str, Any], builder: str
) -> None:
    """`auto` takes a Dockerfile where there is one, and no binder folder; else repo2docker."""
    assert build.choose_builder({**POD, **options}, make(tmp_path, *files)) == builder


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        pytest.param({}, [], id="plain"),
        pytest.param(
            {"build_args": {"B": "2", "A": "a b; $(x)"}}, ["--build-arg=A=a b; $(x)", "--build-arg=B=2"], id="arguments"
        ),
        pytest.param({"target": "late"}, ["--target=late"], id="target"),
        pytest.param({"extra_args": ["--squash", "--x"]}, ["--squash", "--x"], id="extra arguments"),
    ],
)
def test_podman_gets_the_options_and_nothing_more(options: dict[str, Any], arguments: list[str]) -> None:
    """Each option is one argument, and the context comes last, after `--`."""
    command = build.podman_command({**POD, **options}, Path("/work/source"), Path("/work/source/Dockerfile"))

    assert command == [
        "podman",
        "build",
        "--tag",
        build.IMAGE,
        "--format=oci",
        "--layers",
        "--network=host",
        "--file",
        "/work/source/Dockerfile",
        *arguments,
        "--",
        "/work/source",
    ]


def test_a_platform_is_handed_to_both_builders(tmp_path: Path) -> None:
    """podman and repo2docker spell it in their own ways."""
    pod = {**POD, "platform": "linux/arm64"}

    assert "--platform=linux/arm64" in build.podman_command(pod, tmp_path, tmp_path / "Dockerfile")
    assert "--Repo2Docker.platform=linux/arm64" in build.repo2docker_command(pod, tmp_path)


@pytest.mark.parametrize(
    ("files", "options", "arguments"),
    [
        pytest.param([], {}, [], id="plain"),
        pytest.param([], {"build_args": {"A": "b"}}, ["--build-arg=A=b"], id="arguments"),
        pytest.param([], {"appendix": "RUN x"}, ["--appendix=RUN x"], id="appendix"),
        pytest.param(["binder/Dockerfile"], {"appendix": "RUN x"}, [], id="no appendix to a Dockerfile"),
        pytest.param(
            ["Dockerfile", "binder/"], {"appendix": "RUN x"}, ["--appendix=RUN x"], id="a shadowed Dockerfile"
        ),
        pytest.param([], {"extra_args": ["--no-build"]}, ["--no-build"], id="extra arguments"),
    ],
)
def test_repo2docker_gets_a_path_and_a_fixed_user(
    tmp_path: Path, files: list[str], options: dict[str, Any], arguments: list[str]
) -> None:
    """It never runs the image, and is not asked to find out what kind of repository this is."""
    source = make(tmp_path / "source", *files) if files else tmp_path

    assert build.repo2docker_command({**POD, **options}, source) == [
        "jupyter-repo2docker",
        "--no-run",
        "--user-id=1000",
        "--user-name=jovyan",
        f"--image-name={build.IMAGE}",
        "--DockerEngine.extra_buildx_build_args=--network=host",
        f"--label=org.opencontainers.image.revision={POD['commit']}",
        *arguments,
        "--",
        str(source),
    ]


@pytest.mark.parametrize(
    ("files", "dockerfile", "found"),
    [
        (["Dockerfile", "Containerfile"], "", "Dockerfile"),
        (["Containerfile"], "", "Containerfile"),
        (["a/b.docker", "Dockerfile"], "a/b.docker", "a/b.docker"),
    ],
)
def test_the_dockerfile_is_found(tmp_path: Path, files: list[str], dockerfile: str, found: str) -> None:
    """The one that was named, else the usual names in the usual order."""
    assert build.dockerfile_of({**POD, "dockerfile": dockerfile}, make(tmp_path, *files)) == tmp_path / found


@pytest.mark.parametrize(
    ("dockerfile", "says"),
    [
        pytest.param("", "no Dockerfile in the top folder", id="none"),
        pytest.param("x", "has no 'x'", id="not this one"),
    ],
)
def test_a_missing_dockerfile_is_an_invalid_request(tmp_path: Path, dockerfile: str, says: str) -> None:
    """The remedy names the option."""
    with pytest.raises(Failure, match=says) as raised:
        build.dockerfile_of({**POD, "dockerfile": dockerfile}, tmp_path)

    assert raised.value.report["error"] == "InvalidRequest"
    assert "options." in raised.value.report["remedy"]


def test_no_path_leads_out_of_the_checkout(tmp_path: Path) -> None:
    """A link in the repository cannot make a folder of the container the build's context (S11)."""
    source = make(tmp_path / "source", "inside/file")
    (tmp_path / "outside").mkdir()
    (source / "out").symlink_to(tmp_path / "outside")
    (source / "in").symlink_to(source / "inside")
    (source / "loop").symlink_to(source / "loop")

    assert build.inside(source, "in", "subdirectory") == source / "inside"
    for path in ("out", "..", "missing", "loop"):
        with pytest.raises(Failure) as raised:
            build.inside(source, path, "subdirectory")
        assert raised.value.report["error"] == "InvalidRequest"


# --- configuration --------------------------------------------------------------------------------------------


def test_steps_get_the_limits_of_their_container() -> None:
    """It may not raise any, so podman's own defaults would fail; the bundle is mounted where there is one."""
    plain, with_bundle = (tomllib.loads(build.containers_conf(ca_bundle=bundle)) for bundle in (False, True))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    assert f"nofile={files}:{files}" in plain["containers"]["default_ulimits"]
    assert plain["containers"]["volumes"] == []
    assert plain["engine"] == {"runtime": "runc", "cgroup_manager": "cgroupfs", "events_logger": "file"}
    plain["containers"]["volumes"] = [f"{build.CA_BUNDLE}:{build.CA_BUNDLE}:ro"]
    assert with_bundle == plain


def test_plain_http_is_allowed_only_where_the_host_says_so() -> None:
    """A mirror is insecure only if it is listed, too; a name cannot break out of its quotes."""
    text = build.registries_conf(
        ["plain.invalid:5000"],
        {"docker.io": "plain.invalid:5000/cache", "quay.invalid": "tls.invalid", 'odd"\nname': "x"},
    )

    parsed = {r["location"]: r for r in tomllib.loads(text)["registry"]}
    assert parsed["plain.invalid:5000"] == {"location": "plain.invalid:5000", "insecure": True}
    assert parsed["docker.io"]["insecure"] is False
    assert parsed["docker.io"]["mirror"] == [{"location": "plain.invalid:5000/cache", "insecure": True}]
    assert parsed["quay.invalid"]["mirror"] == [{"location": "tls.invalid", "insecure": False}]
    assert set(parsed) == {"plain.invalid:5000", "docker.io", "quay.invalid", 'odd"\nname'}


@pytest.mark.parametrize(
    ("isolation", "uid_map", "allowed"),
    [
        pytest.param("rootless", "0 1879048192 65536", True, id="a map of its own"),
        pytest.param("rootless", "         0          0 4294967295\n", False, id="host root"),
        pytest.param("rootless", "0 0 1", False, id="host root alone"),
        pytest.param("chroot", "0 0 4294967295", True, id="masked /proc"),
    ],
)
def test_proc_is_unmasked_only_where_container_root_is_not_host_root(
    isolation: str, uid_map: str, allowed: bool
) -> None:
    """Rootless isolation needs an unmasked /proc, so it is refused where the map's second field is 0."""
    if allowed:
        build.check_isolation(isolation, uid_map)
        return
    with pytest.raises(Failure) as raised:
        build.check_isolation(isolation, uid_map)
    assert raised.value.report["error"] == "PodRejected"


# --- what cannot become an option ---------------------------------------------------------------------------

DASHES = {"build_args": {"A": "--privileged", "B": "-v=/:/host"}, "target": "--privileged", "appendix": "-x"}


@pytest.mark.parametrize("name", ["-f", "--privileged", "-v=/:/host"])
def test_no_value_becomes_an_option_of_podman(tmp_path: Path, name: str) -> None:
    """Values stand behind their own option's `=`, paths are absolute, and the context comes after `--`."""
    source = make(tmp_path / "source", f"{name}/{name}")
    context = build.inside(source, name, "subdirectory")
    pod = {**POD, **DASHES, "dockerfile": name}

    command = build.podman_command(pod, context, build.dockerfile_of(pod, context))

    own = {"--tag", "--format=oci", "--layers", "--network=host", "--file", "--"}
    values = {"--build-arg=A=--privileged", "--build-arg=B=-v=/:/host", "--target=--privileged"}
    assert {word for word in command if word.startswith("-")} == own | values
    assert command[command.index("--file") + 1] == str(context / name)
    assert command[-2:] == ["--", str(context)]


def test_no_value_becomes_an_option_of_repo2docker(tmp_path: Path) -> None:
    """An appendix that begins with a dash is text, too."""
    source = make(tmp_path / "source", "-f/")
    context = build.inside(source, "-f", "subdirectory")

    command = build.repo2docker_command({**POD, **DASHES, "target": ""}, context)

    assert "--build-arg=A=--privileged" in command
    assert "--appendix=-x" in command
    assert not {"--privileged", "-v=/:/host", "-x", "-f"} & set(command)
    assert command[-2:] == ["--", str(context)]


@pytest.mark.parametrize("name", ["Dockerfile", "Containerfile", "named"])
def test_a_dockerfile_outside_the_checkout_is_refused(tmp_path: Path, name: str) -> None:
    """A link to a file of the container is no Dockerfile, under whichever name it is found (S11)."""
    source = make(tmp_path / "source", "sub/")
    (tmp_path / "outside").write_text("FROM x")
    (source / "sub" / name).symlink_to("../../outside")
    pod = {**POD, "dockerfile": "named" if name == "named" else ""}

    with pytest.raises(Failure) as raised:
        build.dockerfile_of(pod, source / "sub")

    assert raised.value.report["error"] == "InvalidRequest"


@pytest.mark.parametrize(
    ("builder", "files", "takes"),
    [
        pytest.param("dockerfile", ["Dockerfile"], False, id="podman never does"),
        pytest.param("repo2docker", ["requirements.txt"], True, id="repo2docker does"),
        pytest.param("repo2docker", ["Dockerfile"], False, id="not to a Dockerfile"),
        pytest.param("repo2docker", ["binder/Dockerfile"], False, id="not to one in binder"),
        pytest.param("repo2docker", [".binder/Dockerfile"], False, id="not to one in .binder"),
        pytest.param("repo2docker", ["Dockerfile", "binder/x"], True, id="what binder shadows does not count"),
        pytest.param("repo2docker", [".binder/Dockerfile", "binder/x"], True, id="binder goes before .binder"),
    ],
)
def test_the_appendix_is_added_by_whoever_can(tmp_path: Path, builder: str, files: list[str], takes: bool) -> None:
    """Where the builder does not add it, a build of its own does: so it is never lost, and never added twice."""
    assert build.takes_appendix(builder, make(tmp_path, *files)) is takes


# --- what its end means -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "builder", "code", "says"),
    [
        pytest.param("exit 7", "dockerfile", 7, "A step of the Dockerfile failed", id="a step"),
        pytest.param("exit 1", "repo2docker", 1, "repo2docker failed", id="repo2docker"),
        pytest.param("kill -9 $$", "dockerfile", 137, "exit code 137", id="killed"),
        pytest.param("kill -15 $$", "dockerfile", 143, "exit code 143", id="stopped"),
    ],
)
def test_a_builders_failure_keeps_its_exit_code(
    tmp_path: Path, script: str, builder: str, code: int, says: str
) -> None:
    """A signal counts as shells count it."""
    with pytest.raises(Failure, match=says) as raised:
        build.run(["sh", "-c", script], dict(os.environ), builder, tmp_path)

    report = raised.value.report
    assert (report["error"], report["exit_code"], report["phase"]) == ("BuildFailed", code, "build")


def test_a_builder_that_ends_well_is_no_failure(tmp_path: Path) -> None:
    """And it reads nothing from the container's own input."""
    build.run(["sh", "-c", "! read line"], dict(os.environ), "dockerfile", tmp_path)


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        pytest.param({}, 0, id="no cgroup to be seen"),
        pytest.param({"memory.events": "low 0\nhigh 0\nmax 9\noom 3\noom_kill 2\noom_group_kill 1\n"}, 2, id="v2"),
        pytest.param({"memory.events": "low 0\n"}, 0, id="v2 without the field"),
        pytest.param({"memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"}, 4, id="v1"),
        pytest.param({"memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"}, 0, id="v1, old kernel"),
    ],
)
def test_the_kernel_counts_what_it_killed_for_memory(tmp_path: Path, files: dict[str, str], kills: int) -> None:
    """Of either kind of cgroups; what cannot be seen is no kill."""
    for name, content in files.items():
        make(tmp_path, name)
        (tmp_path / name).write_text(content)

    assert build.out_of_memory_kills(tmp_path) == kills


@pytest.mark.parametrize("room", [True, False], ids=["with room for the result", "on a full disk"])
def test_a_failure_reaches_courier_where_that_is_possible(tmp_path: Path, room: bool) -> None:
    """The report and the exit code are there in any case."""
    work = tmp_path / ("work" if room else "missing")
    (tmp_path / "work").mkdir()
    code = (
        "import sys, pathlib, build; from meeting import Failure; work, end = map(pathlib.Path, sys.argv[1:]);"
        "build.leave(Failure('OutOfDisk', 'A.', 'B.', exit_code=5), work, end)"
    )
    programs = Path(build.__file__).parent

    done = subprocess.run(
        [sys.executable, "-c", code, str(work), str(tmp_path / "end")],
        env={**os.environ, "PYTHONPATH": str(programs)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (5, "OutOfDisk: A. B.\n", "")
    assert json.loads((tmp_path / "end").read_text())["error"] == "OutOfDisk"
    assert [p.name for p in (tmp_path / "work").iterdir()] == (["result.json"] if room else [])
