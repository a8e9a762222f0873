"""How the two programs of a pod meet, notice each other's end, keep the deadline, and report. With real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import meeting
import pytest
from hypothesis import given
from hypothesis import strategies as st
from meeting import Failure, PartnerLost

PROGRAMS = Path(__file__).parent.parent / "images" / "builder"


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
        pytest.param(
            "meeting.keep_deadline(60, time.time(), end); os.kill(os.getpid(), 2)", 143, "BuildStopped", id="SIGINT"
        ),
        pytest.param(
            "meeting.finish(meeting.Failure('BuildFailed', 'It broke.', 'Mend it.', exit_code=7), end)",
            7,
            "BuildFailed",
            id="a failure",
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


texts = st.text(max_size=3000) | st.text(alphabet='\x00\u20ac\U0001f600\udcff"\\', min_size=100, max_size=3000)


@given(problem=texts, remedy=texts, exit_code=st.integers(1, 255))
def test_a_report_of_any_texts_fits_and_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, problem: str, remedy: str, exit_code: int
) -> None:
    """At most 4,096 bytes of JSON; texts are cut at their end alone, and short ones not at all."""
    path = tmp_path_factory.getbasetemp() / "termination-log"
    failure = Failure("BuildFailed", problem, remedy, exit_code=exit_code, phase="build")

    meeting.write_report(failure.report, path)

    assert path.stat().st_size <= 4096
    report = json.loads(path.read_bytes())
    assert report.keys() == failure.report.keys()
    assert (report["error"], report["exit_code"], report["phase"]) == ("BuildFailed", exit_code, "build")
    assert problem.startswith(report["problem"])
    assert remedy.startswith(report["remedy"])
    if len(problem) <= 100 and len(remedy) <= 100:
        assert report == failure.report


@pytest.mark.parametrize(
    ("outcome", "exit_code", "said"),
    [
        pytest.param(
            "meeting.Failure('BuildFailed', 'A.', 'B.', exit_code=7)", 7, "BuildFailed: A. B.", id="a failure"
        ),
        pytest.param("meeting.PartnerLost('A.')", 1, "", id="a consequence, which is not worth a line"),
        pytest.param("{'digest': 'x'}", 0, "", id="a good end"),
    ],
)
def test_a_program_ends_with_its_code_although_it_cannot_report(
    tmp_path: Path, outcome: str, exit_code: int, said: str
) -> None:
    """A disk that is full takes no report; the log and the exit code are still right."""
    ended = program(tmp_path, f"meeting.finish({outcome}, work / 'missing' / 'end')")

    assert output(ended) == said
    assert ended.returncode == exit_code


def test_a_program_ends_with_its_code_although_nobody_reads_its_log(tmp_path: Path) -> None:
    """The report is there, and no traceback takes the exit code's place."""
    ended = program(tmp_path, "os.close(1); meeting.finish(meeting.Failure('OutOfDisk', 'A.', 'B.'), work / 'end')")

    output(ended)

    assert ended.returncode == 1
    assert json.loads((tmp_path / "end").read_text())["error"] == "OutOfDisk"


def test_a_consequence_is_marked_in_the_report(tmp_path: Path) -> None:
    """So whoever reads both reports knows which of the two to ask."""
    output(program(tmp_path, "meeting.finish(meeting.PartnerLost('The other one ended.'), work / 'end')"))

    report = json.loads((tmp_path / "end").read_text())
    assert (report["error"], report["consequence"], report["exit_code"]) == ("PodLost", True, 1)


@pytest.mark.parametrize(("number", "error"), [(28, "OutOfDisk"), (122, "OutOfDisk"), (5, "PodLost")])
def test_an_error_of_the_system_is_a_failure_with_a_remedy(number: int, error: str) -> None:
    """A full disk and a used-up quota are the caller's to change; anything else is the machine's."""
    failure = meeting.system_failure("build", OSError(number, os.strerror(number)))

    assert failure.report["error"] == error
    assert failure.report["remedy"]


def test_the_pod_is_what_the_host_laid_down(tmp_path: Path) -> None:
    """Identity and settings in one: what to build, and how."""
    identity = {"request": {"commit": "c"}, "image": "r.invalid/x:1", "builder_image": "b"}
    (tmp_path / "identity").write_text(json.dumps(identity))
    (tmp_path / "settings").write_text(json.dumps({"isolation": "rootless"}))

    assert meeting.read_pod(tmp_path) == {"commit": "c", "isolation": "rootless", "image": "r.invalid/x:1"}
