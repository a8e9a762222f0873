"""The verdict on a pod: from what its containers' states and reports say, whatever they hold."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podbuild.diagnosis import (
    container_state,
    diagnose,
    finished_at,
    is_finished,
    is_gated,
    is_terminating,
    report_of,
    waiting_reason,
    why_never,
)
from podbuild.errors import (
    BuildError,
    BuildFailed,
    BuildStopped,
    DeadlineExceeded,
    Evicted,
    ImagePullFailed,
    OutOfDisk,
    OutOfMemory,
    PodLost,
    PodRejected,
    RefNotFound,
    Unschedulable,
)

State = dict[str, Any]


def ended(code: int = 0, message: str = "", reason: str = "", at: str = "2026-01-02T03:04:05Z") -> State:
    """A container that has ended, as a kubelet writes it."""
    reason = reason or ("Completed" if code == 0 else "Error")
    state = {"exitCode": code, "reason": reason, "startedAt": "2026-01-02T03:04:00Z", "finishedAt": at}
    return {"terminated": {**state, "message": message} if message else state}


def reported(error: str, code: int = 1, **more: Any) -> State:
    """A container whose program ended with a report."""
    report = {"error": error, "problem": "It broke.", "remedy": "Mend it.", "exit_code": code, **more}
    return ended(code, json.dumps(report))


def waiting(reason: str, message: str = "") -> State:
    """A container that has not started."""
    return {"waiting": {"reason": reason, **({"message": message} if message else {})}}


RUNNING: State = {"running": {"startedAt": "2026-01-02T03:04:00Z"}}
NONE: State = {}
GOOD_COURIER = ended(0, json.dumps({"commit": "c" * 40, "digest": "sha256:" + "0" * 64}))
GOOD_BUILD = ended(0, json.dumps({"builder": "dockerfile", "isolation": "rootless", "seconds": 1.5}))
CONSEQUENCE = reported("PodLost", consequence=True)


def pod(courier: State | None, build: State | None, **status: Any) -> dict[str, Any]:
    """A pod whose two containers are in these states; None: the host has written nothing about one."""
    states = {"courier": courier, "build": build}
    statuses = [{"name": name, "state": state} for name, state in states.items() if state is not None]
    return {"metadata": {"name": "build-x"}, "spec": {}, "status": {"containerStatuses": statuses, **status}}


def unscheduled(reason: str, message: str = "") -> dict[str, Any]:
    """A condition of a pod that is on no node."""
    return {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}


# --- the verdict ------------------------------------------------------------------------------------------


def test_two_good_ends_are_no_error() -> None:
    """Both containers ended with exit code 0: nothing went wrong."""
    assert diagnose(pod(GOOD_COURIER, GOOD_BUILD, phase="Succeeded")) is None
    assert diagnose(pod(GOOD_COURIER, GOOD_BUILD, phase="Running")) is None, "the phase lags behind"


@pytest.mark.parametrize(
    ("courier", "build", "kind"),
    [
        pytest.param(CONSEQUENCE, reported("BuildFailed", 7), BuildFailed, id="a step failed"),
        pytest.param(reported("RefNotFound"), CONSEQUENCE, RefNotFound, id="no such commit"),
        pytest.param(reported("BuildFailed", phase="push"), GOOD_BUILD, BuildFailed, id="a hostile image"),
        pytest.param(reported("OutOfDisk"), GOOD_BUILD, OutOfDisk, id="courier found no room"),
        pytest.param(CONSEQUENCE, reported("OutOfMemory", 137), OutOfMemory, id="P7 a step was out of memory"),
        pytest.param(CONSEQUENCE, ended(137, reason="OOMKilled"), OutOfMemory, id="P7 build was out of memory"),
        pytest.param(ended(137, reason="OOMKilled"), CONSEQUENCE, OutOfMemory, id="P7 courier was out of memory"),
        pytest.param(GOOD_COURIER, ended(0, reason="OOMKilled"), OutOfMemory, id="P7 memory, though the exit is good"),
        pytest.param(ended(137), CONSEQUENCE, PodLost, id="courier was killed"),
        pytest.param(CONSEQUENCE, ended(137), PodLost, id="build was killed"),
        pytest.param(ended(137), ended(137), PodLost, id="both were killed"),
        pytest.param(ended(143), ended(143), PodLost, id="both were killed politely"),
        pytest.param(CONSEQUENCE, CONSEQUENCE, PodLost, id="each blames the other"),
        pytest.param(ended(128, reason="StartError"), CONSEQUENCE, PodLost, id="a program that is not there"),
        pytest.param(GOOD_COURIER, ended(1), PodLost, id="a bad end without a reason"),
        pytest.param(reported("DeadlineExceeded", 124), CONSEQUENCE, DeadlineExceeded, id="P10 courier was late"),
        pytest.param(CONSEQUENCE, reported("DeadlineExceeded", 124), DeadlineExceeded, id="P10 build was late"),
        pytest.param(reported("BuildStopped", 143), reported("BuildStopped", 143), BuildStopped, id="told to stop"),
        pytest.param(reported("BuildStopped", 143), CONSEQUENCE, BuildStopped, id="courier was told to stop"),
        pytest.param(
            reported("RefNotFound"), reported("BuildStopped", 143), RefNotFound, id="the rest was told to stop after"
        ),
        pytest.param(
            reported("BuildStopped", 143), reported("BuildFailed"), BuildFailed, id="courier was told to stop after"
        ),
        pytest.param(CONSEQUENCE, NONE, PodLost, id="build never came"),
        pytest.param(CONSEQUENCE, None, PodLost, id="the host knows nothing of build"),
        pytest.param(None, None, PodLost, id="the host knows nothing"),
        pytest.param(
            CONSEQUENCE, waiting("CreateContainerError", "procMount"), PodRejected, id="P5 build cannot start"
        ),
        pytest.param(waiting("ImagePullBackOff"), CONSEQUENCE, ImagePullFailed, id="P2 courier cannot start"),
        pytest.param(CONSEQUENCE, waiting("ContainerCreating"), PodLost, id="build has not started yet"),
    ],
)
def test_the_cause_comes_before_its_consequence(
    courier: State | None, build: State | None, kind: type[BuildError]
) -> None:
    """Of two containers that ended, the one that ended because of the other is not asked why."""
    error = diagnose(pod(courier, build, phase="Failed"))

    assert type(error) is kind
    assert error.problem
    assert error.remedy


def test_a_report_is_handed_on_whole() -> None:
    """Texts, exit code and phase of a program's report are the error's."""
    error = diagnose(pod(reported("BuildFailed", 7, phase="push", problem="A.", remedy="B."), GOOD_BUILD))

    assert isinstance(error, BuildFailed)
    assert (error.problem, error.remedy, error.exit_code, error.phase) == ("A.", "B.", 7, "push")


@pytest.mark.parametrize(
    ("container", "remedy"), [("build", "options.memory_limit"), ("courier", "a fixed limit")], ids=lambda x: str(x)
)
def test_out_of_memory_names_a_limit_that_can_be_raised(container: str, remedy: str) -> None:
    """Only `build` has a limit of the caller's choosing; for `courier`, the sources must shrink."""
    killed = ended(137, reason="OOMKilled")
    states = (CONSEQUENCE, killed) if container == "build" else (killed, CONSEQUENCE)

    error = diagnose(pod(*states))

    assert isinstance(error, OutOfMemory)
    assert container in error.problem
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("reason", "message", "kind", "remedy"),
    [
        pytest.param(
            "Evicted",
            "Pod ephemeral local storage usage exceeds the total limit of containers 20Mi. ",
            OutOfDisk,
            "storage_limit",
            id="P8 more disk than its limit",
        ),
        pytest.param(
            "Evicted",
            'Usage of EmptyDir volume "e" exceeds the limit "20Mi". ',
            OutOfDisk,
            "storage_limit",
            id="P8 EmptyDir",
        ),
        pytest.param(
            "Evicted",
            'Container build exceeded its local ephemeral storage limit "20Mi". ',
            OutOfDisk,
            "storage_limit",
            id="P8 one container",
        ),
        pytest.param(
            "Evicted",
            "The node was low on resource: memory. Container build was using 9Gi, which exceeds its request of 512Mi. ",
            Evicted,
            "again",
            id="P8 the node had no room",
        ),
        pytest.param(
            "DeadlineExceeded",
            "Pod was active on the node longer than the specified deadline",
            DeadlineExceeded,
            "timeout_minutes",
            id="P10 the kubelet's own deadline",
        ),
        pytest.param("NodeShutdown", "", PodLost, "again", id="P9 the node was shut down"),
    ],
)
@pytest.mark.parametrize(
    "state",
    [
        pytest.param(None, id="no container"),
        pytest.param(ended(137), id="killed"),
        pytest.param(reported("BuildStopped", 143), id="told to stop"),
    ],
)
def test_a_host_that_ends_a_pod_says_why(
    state: State | None, reason: str, message: str, kind: type[BuildError], remedy: str
) -> None:
    """That its containers were killed, or told to stop, is only how it did that."""
    error = diagnose(pod(state, state, phase="Failed", reason=reason, message=message))

    assert type(error) is kind
    assert error.problem == f"The host ended the pod: {reason}" + (f": {message.strip()}" if message else ".")
    assert remedy in error.remedy


def test_a_failure_that_came_before_the_hosts_is_the_cause() -> None:
    """A step that failed did not fail because the node was cleared afterwards."""
    failed = pod(CONSEQUENCE, reported("BuildFailed", 7), phase="Failed", reason="Evicted", message="low on disk")

    assert type(diagnose(failed)) is BuildFailed


# --- reports that nobody honest writes --------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        pytest.param("Segmentation fault\n", id="no JSON"),
        pytest.param("a\ufffd\x00b", id="no text"),
        pytest.param("[]", id="a list"),
        pytest.param("null", id="null"),
        pytest.param("5", id="a number"),
        pytest.param("[" * 4096, id="4,096 brackets"),
        pytest.param('{"error":' * 450, id="450 objects"),
        pytest.param("[" * 2048 + "]" * 2048, id="2,048 lists"),
        pytest.param("9" * 4096, id="a number of 4,096 digits"),
        pytest.param("x" * 1_000_000, id="a megabyte"),
        pytest.param("{}", id="an empty object"),
        pytest.param('{"error": "BuildFailed", "probl', id="cut"),
    ],
)
@pytest.mark.parametrize("container", ["courier", "build"])
def test_a_report_that_is_none_is_judged_by_how_the_container_ended(message: str, container: str) -> None:
    """It is as if nothing had been reported, and it is not repeated."""
    states = {"courier": CONSEQUENCE, "build": CONSEQUENCE, container: ended(3, message)}

    error = diagnose(pod(states["courier"], states["build"]))

    assert type(error) is PodLost
    assert error.problem == f"The container {container} ended with exit code 3 and without a report."


def test_reported_texts_are_printable_and_short() -> None:
    """A step that forges its container's report can forge no line of a log, and shows no password of a URL."""
    forged = reported("BuildFailed", problem="a\nb\x1b[2J\u202e https://u:canary@h/ " + "x" * 4000, remedy="c\x00\r")

    error = diagnose(pod(CONSEQUENCE, forged))

    assert error is not None
    assert error.problem.startswith(r"a\nb\x1b[2J\u202e https://***@h/ xxx")
    assert error.remedy == r"c\x00\r"
    assert len(error.problem) < 1600


@pytest.mark.parametrize("name", ["", "Exception", "SystemExit", "by_name", "annotations", "__name__", 5, None, ["x"]])
def test_an_error_that_podbuild_does_not_know_is_a_lost_pod(name: object) -> None:
    """Only the names of errors count, not whatever else Python calls so."""
    state = ended(1, json.dumps({"error": name, "problem": "It broke.", "remedy": "Mend it."}))

    assert type(diagnose(pod(CONSEQUENCE, state))) is PodLost


@pytest.mark.parametrize(
    ("more", "code", "phase"),
    [
        pytest.param({}, 1, "build", id="neither"),
        pytest.param({"exit_code": "7", "phase": 5}, 1, "build", id="other types"),
        pytest.param({"exit_code": True, "phase": None}, 1, "build", id="a truth value is no code"),
        pytest.param({"exit_code": 0}, 1, "build", id="a failure does not end with 0"),
        pytest.param({"exit_code": 10**300}, 1, "build", id="a code that no process has"),
        pytest.param({"exit_code": -9}, 1, "build", id="a negative code"),
        pytest.param({"exit_code": 255, "phase": "fetch"}, 255, "fetch", id="what the programs write"),
        pytest.param({"phase": "\x1b[2J"}, 1, "build", id="a phase with control characters"),
    ],
)
def test_a_failed_build_has_a_real_exit_code_and_phase(more: dict[str, Any], code: int, phase: str) -> None:
    """They are shown, and decide whose last lines are: only what a program of ours can write is taken."""
    state = ended(1, json.dumps({"error": "BuildFailed", "problem": "It broke.", "remedy": "Mend it.", **more}))

    error = diagnose(pod(CONSEQUENCE, state))

    assert isinstance(error, BuildFailed)
    assert (error.exit_code, error.phase) == (code, phase)


@pytest.mark.parametrize("report", [{"error": "BuildFailed"}, {"error": "BuildFailed", "problem": None, "remedy": ""}])
@pytest.mark.parametrize("consequence", [False, True], ids=["cause", "consequence"])
def test_a_report_without_texts_still_gives_an_error_with_both(report: dict[str, Any], consequence: bool) -> None:
    """Whoever reads it learns what to try."""
    state = ended(1, json.dumps({**report, "consequence": consequence}))

    error = diagnose(pod(state, state))

    assert error is not None
    assert (type(error), error.problem) == (
        (PodLost, "The pod ended without a report.")
        if consequence
        else (BuildFailed, "The pod ended without a reason.")
    )
    assert error.remedy == "Run the build again; the log shows how far it came."


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
reports = st.dictionaries(
    st.sampled_from(["error", "problem", "remedy", "exit_code", "phase", "consequence", "digest", "x"]),
    values | st.sampled_from(["BuildFailed", "BuildStopped", "PodLost", "BuildError"]),
    max_size=8,
)
states = st.one_of(
    st.sampled_from([None, NONE, RUNNING, CONSEQUENCE, waiting("ErrImagePull"), waiting("ContainerCreating")]),
    st.builds(ended, st.integers(0, 255), st.text(max_size=30) | st.builds(json.dumps, reports)),
)


@given(courier=states, build=states, phase=st.sampled_from(["Pending", "Running", "Failed", "Succeeded", "Unknown"]))
def test_whatever_the_states_are_there_is_a_verdict(courier: State | None, build: State | None, phase: str) -> None:
    """Every pod gives None or a documented error that says what happened and what to change, in printable text."""
    judged = pod(courier, build, phase=phase)

    error = diagnose(judged)

    if error is None:
        assert all(s is not None and s["terminated"]["exitCode"] == 0 for s in (courier, build))
    else:
        assert error.problem.isprintable()
        assert error.remedy.isprintable()
        assert error.problem
        assert error.remedy
    assert isinstance(is_finished(judged), bool)
    assert waiting_reason(judged).isprintable()
    assert isinstance(finished_at(judged), str)


# --- the pod's life ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("courier", "build", "phase", "finished"),
    [
        pytest.param(None, None, "Pending", False, id="nothing yet"),
        pytest.param(RUNNING, RUNNING, "Running", False, id="both run"),
        pytest.param(RUNNING, GOOD_BUILD, "Running", False, id="courier still pushes"),
        pytest.param(ended(1), RUNNING, "Running", False, id="build is about to end"),
        pytest.param(ended(1), ended(1), "Running", True, id="both ended, the phase lags"),
        pytest.param(RUNNING, RUNNING, "Failed", True, id="the pod ended, the states lag"),
        pytest.param(None, None, "Failed", True, id="P8 the pod ended before its containers came"),
        pytest.param(RUNNING, RUNNING, "Unknown", False, id="P11 the node is silent"),
        pytest.param(RUNNING, waiting("CreateContainerError"), "Pending", False, id="P5 courier still waits"),
        pytest.param(CONSEQUENCE, waiting("CreateContainerError"), "Pending", True, id="P5 courier has waited"),
        pytest.param(CONSEQUENCE, waiting("ContainerCreating"), "Pending", False, id="build may still come"),
        pytest.param(waiting("ErrImagePull"), waiting("ErrImagePull"), "Pending", False, id="P2 none has started yet"),
    ],
)
def test_a_pod_is_finished_when_nothing_can_happen_any_more(
    courier: State | None, build: State | None, phase: str, finished: bool
) -> None:
    """The containers' states decide; the phase only where the pod ended without them."""
    assert is_finished(pod(courier, build, phase=phase)) is finished


def test_a_pod_without_a_status_is_new() -> None:
    """A host may return a pod before it has written anything about it."""
    new: dict[str, Any] = {"metadata": {"name": "x"}, "spec": {}}

    assert container_state(new, "courier") == {}
    assert not is_finished(new)
    assert report_of(new, "build") == {}
    assert finished_at(new) == ""
    assert waiting_reason(new) == "Pending"
    assert why_never(new, 1e9) is None
    assert not is_gated(new)
    assert not is_terminating(new)


def test_only_our_own_gate_is_ours() -> None:
    """Another controller's gate does not mean that the creator still prepares the pod."""
    gates = [{"name": "example.org/queue"}]
    assert not is_gated({"metadata": {}, "spec": {"schedulingGates": gates}})
    assert is_gated({"metadata": {}, "spec": {"schedulingGates": [*gates, {"name": "podbuild.io/secret"}]}})


def test_a_pod_that_somebody_deletes_is_terminating() -> None:
    """The mark is there from the request on, while the containers still run."""
    assert is_terminating({"metadata": {"deletionTimestamp": "2026-01-02T03:04:05Z"}})


def test_a_pod_ends_with_its_last_container() -> None:
    """The later of both ends; a container without an end does not count."""
    first, last = ended(at="2026-01-02T03:04:05Z"), ended(at="2026-01-02T03:04:06Z")

    assert finished_at(pod(first, last)) == finished_at(pod(last, first)) == "2026-01-02T03:04:06Z"
    assert finished_at(pod(first, RUNNING)) == "2026-01-02T03:04:05Z"


@pytest.mark.parametrize(
    ("judged", "reason"),
    [
        pytest.param(pod(RUNNING, waiting("ContainerCreating")), "", id="one has started"),
        pytest.param(pod(GOOD_COURIER, GOOD_BUILD), "", id="over"),
        pytest.param(pod(waiting("ContainerCreating"), NONE), "ContainerCreating", id="being made"),
        pytest.param(pod(waiting("ErrImagePull", "no\nhost"), NONE), r"ErrImagePull: no\nhost", id="with a message"),
        pytest.param(pod(NONE, waiting("ErrImagePull")), "ErrImagePull", id="only build has a state"),
        pytest.param(pod(None, None), "Pending", id="nobody says"),
        pytest.param(
            pod(None, None, conditions=[unscheduled("Unschedulable", "0/1 nodes")]),
            "Unschedulable: 0/1 nodes",
            id="P1 no node",
        ),
    ],
)
def test_why_a_pod_waits_is_said_in_the_clusters_own_words(judged: dict[str, Any], reason: str) -> None:
    """In one printable line; none for a pod that has started."""
    assert waiting_reason(judged) == reason


def test_a_gate_that_was_lifted_is_no_reason_to_wait() -> None:
    """The condition stays behind for a moment when the gate is gone."""
    gated = pod(None, None, conditions=[unscheduled("SchedulingGated", "gates")])
    assert waiting_reason(gated) == "Pending"

    gated["spec"]["schedulingGates"] = [{"name": "podbuild.io/secret"}]
    assert waiting_reason(gated) == "SchedulingGated: gates"


@pytest.mark.parametrize(
    ("judged", "seconds", "kind"),
    [
        pytest.param(pod(waiting("InvalidImageName"), NONE), 0, ImagePullFailed, id="P3 no such name"),
        pytest.param(pod(NONE, waiting("ErrImageNeverPull")), 0, ImagePullFailed, id="P3 may not be pulled"),
        pytest.param(pod(waiting("ErrImagePull"), NONE), 180, ImagePullFailed, id="P2 not pulled"),
        pytest.param(pod(waiting("ImagePullBackOff"), NONE), 180, ImagePullFailed, id="P2 not pulled again"),
        pytest.param(pod(waiting("CreateContainerConfigError"), NONE), 30, PodRejected, id="P4 no secret"),
        pytest.param(pod(NONE, waiting("CreateContainerError")), 30, PodRejected, id="P5 cannot be made"),
        pytest.param(pod(waiting("RunContainerError"), NONE), 30, PodRejected, id="P5 cannot be run"),
        pytest.param(pod(None, None, conditions=[unscheduled("Unschedulable")]), 900, Unschedulable, id="P1 no node"),
    ],
)
def test_a_reason_is_final_after_its_time(judged: dict[str, Any], seconds: float, kind: type[BuildError]) -> None:
    """What heals by itself gets time to; what does not, none."""
    assert seconds == 0 or why_never(judged, seconds - 1) is None
    error = why_never(judged, seconds)

    assert type(error) is kind
    assert error.remedy


@pytest.mark.parametrize("reason", ["ContainerCreating", "PodInitializing", "SomethingNew", ""])
def test_other_reasons_are_never_final(reason: str) -> None:
    """Only the pod's deadline ends that wait."""
    assert why_never(pod(waiting(reason), NONE), 1e9) is None
