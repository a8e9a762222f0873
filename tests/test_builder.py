"""The two programs of the builder image: what `build` calls, and how both meet, end and report."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import build
import meeting
import pytest
from meeting import Failure, PartnerLost

PROGRAMS = Path(__file__).parent.parent / "images" / "builder"
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
    plain, with_bundle = build.containers_conf(ca_bundle=False), build.containers_conf(ca_bundle=True)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    assert f'"nofile={files}:{files}"' in plain
    assert 'runtime = "runc"' in plain
    assert "volumes = []" in plain
    assert f'volumes = ["{build.CA_BUNDLE}:{build.CA_BUNDLE}:ro"]' in with_bundle


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


# --- meeting --------------------------------------------------------------------------------------------------


def program(work: Path, code: str) -> subprocess.Popen[str]:
    """Start a process that has imported `meeting` and knows the shared folder as `work`."""
    prelude = "import os, sys, time, pathlib, meeting; work = pathlib.Path(sys.argv[1]);"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, str(work)],
        env={**os.environ, "PYTHONPATH": str(PROGRAMS)},
        stdout=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> str:
    """Return what a process printed, once it is over."""
    said, _ = process.communicate(timeout=60)
    return said.strip()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_the_other_ones_death_is_noticed_at_once(tmp_path: Path, number: signal.Signals) -> None:
    """Whatever kills one process, the other learns of it in well under a second."""
    partner = program(tmp_path, "meeting.take_lock('build', work); print('here', flush=True); time.sleep(60)")
    waiting = program(
        tmp_path,
        "lock = meeting.await_start('build', work); print('met', flush=True);"
        "meeting.await_death(lock); print(time.time())",
    )
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "met\n"
    time.sleep(0.2)
    assert waiting.poll() is None

    killed = time.time()
    partner.send_signal(number)
    noticed = float(output(waiting))

    output(partner)
    assert 0 <= noticed - killed < 1


def test_a_partner_that_is_late_is_met_all_the_same(tmp_path: Path) -> None:
    """The order in which a host starts the two does not matter."""
    waiting = program(tmp_path, "meeting.await_start('build', work, seconds=60); print('met')")
    time.sleep(0.3)
    partner = program(tmp_path, "meeting.take_lock('build', work)")

    assert output(waiting) == "met"
    output(partner)


def test_a_partner_that_never_comes_is_a_consequence(tmp_path: Path) -> None:
    """The report is marked, so that the other container's own end is asked first."""
    with pytest.raises(PartnerLost, match="did not start within") as raised:
        meeting.await_start("build", tmp_path, seconds=0.1)

    assert raised.value.report["consequence"] is True


def test_nobody_sees_half_of_an_announcement(tmp_path: Path) -> None:
    """A file is there with all of its content, or not at all."""
    content = "x" * 5_000_000
    writer = program(tmp_path, "meeting.announce('result.json', 'x' * 5_000_000, work=work)")
    seen: set[bool] = set()
    while writer.poll() is None or not seen:
        if (tmp_path / "result.json").exists():
            seen.add((tmp_path / "result.json").read_text() == content)

    output(writer)
    assert seen == {True}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_lock_is_not_inherited_by_what_a_program_starts(tmp_path: Path) -> None:
    """A step that lives on cannot make its dead container look alive."""
    partner = program(
        tmp_path,
        "import subprocess; meeting.take_lock('build', work);"
        "child = subprocess.Popen(['sleep', '30'], close_fds=False, stdout=subprocess.DEVNULL);"
        "print(child.pid, flush=True); os._exit(0)",
    )
    child = int(output(partner))
    waiting = program(tmp_path, "meeting.await_death(meeting.await_start('build', work)); print('noticed')")

    try:
        assert output(waiting) == "noticed"
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("code", "exit_code", "error"),
    [
        pytest.param("meeting.keep_deadline(0.2, time.time(), end)", 124, "DeadlineExceeded", id="P10 time is over"),
        pytest.param(
            "meeting.keep_deadline(5, time.time() - 60, end)", 124, "DeadlineExceeded", id="it was over before"
        ),
        pytest.param(
            "meeting.keep_deadline(60, time.time(), end); os.kill(os.getpid(), 15)", 143, "BuildStopped", id="SIGTERM"
        ),
    ],
)
def test_a_program_ends_at_once_and_says_why(tmp_path: Path, code: str, exit_code: int, error: str) -> None:
    """Also while it blocks on the other one's lock. The report and the log say the same."""
    holder = program(tmp_path, "meeting.take_lock('build', work); print('here', flush=True); time.sleep(60)")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "here\n"
    ended = program(
        tmp_path,
        f"end = work / 'end'; lock = meeting.await_start('build', work); {code}; meeting.await_death(lock)",
    )

    said = output(ended)

    holder.kill()
    output(holder)
    assert ended.returncode == exit_code
    report = json.loads((tmp_path / "end").read_text())
    assert report["error"] == error
    assert said == f"{error}: {report['problem']} {report['remedy']}"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("short", id="short"),
        pytest.param("x" * 100_000, id="long"),
        pytest.param("ü" * 100_000, id="not ASCII"),
        pytest.param("😀" * 100_000, id="beyond the basic plane"),
        pytest.param("\x00" * 100_000, id="control characters"),
        pytest.param("\udcff" * 100_000, id="half a surrogate pair"),
    ],
)
def test_a_report_never_exceeds_what_a_kubelet_keeps(tmp_path: Path, text: str) -> None:
    """It is JSON of at most 4,096 bytes, whatever the texts are, and the error's name is whole."""
    failure = Failure("BuildFailed", text, text, exit_code=7, phase="build")

    meeting.write_report(failure.report, tmp_path / "end")

    written = (tmp_path / "end").read_bytes()
    assert len(written) <= 4096
    report = json.loads(written)
    assert (report["error"], report["exit_code"], report["phase"]) == ("BuildFailed", 7, "build")
    assert text.startswith(report["problem"])
    assert report["problem"]


def test_the_pod_is_what_the_host_laid_down(tmp_path: Path) -> None:
    """Identity and settings in one: what to build, and how."""
    identity = {"request": {"commit": "c"}, "image": "r.invalid/x:1", "builder_image": "b"}
    (tmp_path / "identity").write_text(json.dumps(identity))
    (tmp_path / "settings").write_text(json.dumps({"isolation": "rootless"}))

    assert meeting.read_pod(tmp_path) == {"commit": "c", "isolation": "rootless", "image": "r.invalid/x:1"}
