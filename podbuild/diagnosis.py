"""What became of a pod: its status in, a verdict out. Pure.

The containers' states are read, not the pod's phase, which lags behind them. What the two programs
report in their termination messages says why; an end without a report is judged by how it came.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from podbuild.errors import (
    BuildError,
    BuildFailed,
    DeadlineExceeded,
    Evicted,
    ImagePullFailed,
    OutOfDisk,
    OutOfMemory,
    PodLost,
    PodRejected,
    Unschedulable,
    by_name,
)
from podbuild.manifest import GATE
from podbuild.names import printable

_KILLED = 137
_TERMINATED = 143
#: An autoscaler needs minutes for a new node.
_UNSCHEDULABLE_SECONDS = 900
_IMAGE = "Correct `builder_image`, or its pull secrets, in the host block."
_AGAIN = "Run the build again; the log shows how far it came."
_MEMORY = {
    "build": "Raise `options.memory_limit`, or make the build need less.",
    "courier": "Fetching and pushing have a fixed limit: make the repository, or a single file of it, smaller.",
}
_CONFIG = "Correct what the text names, in the host block or in the cluster."
#: Waiting reason → the error, after how many seconds it is final, and what to change.
_NEVER: dict[str, tuple[type[BuildError], int, str]] = {
    "ErrImageNeverPull": (ImagePullFailed, 0, "Load the builder image onto the nodes, or let it be pulled."),
    "InvalidImageName": (ImagePullFailed, 0, _IMAGE),
    "ErrImagePull": (ImagePullFailed, 180, _IMAGE),
    "ImagePullBackOff": (ImagePullFailed, 180, _IMAGE),
    "CreateContainerConfigError": (PodRejected, 30, _CONFIG),
    "CreateContainerError": (PodRejected, 30, _CONFIG),
    "RunContainerError": (PodRejected, 30, _CONFIG),
}


def container_state(pod: Mapping[str, Any], container: str) -> dict[str, Any]:
    """Return a container's state, `waiting`, `running` or `terminated` in it; {} before it has one."""
    for status in pod.get("status", {}).get("containerStatuses") or ():
        if status.get("name") == container:
            state = status.get("state")
            return state if isinstance(state, dict) else {}
    return {}


def is_gated(pod: Mapping[str, Any]) -> bool:
    """Return whether the pod still waits for its creator to finish the preparations. Others' gates are not ours."""
    return any(gate.get("name") == GATE for gate in pod.get("spec", {}).get("schedulingGates") or ())


def is_terminating(pod: Mapping[str, Any]) -> bool:
    """Return whether somebody has asked for the pod's deletion."""
    return "deletionTimestamp" in pod["metadata"]


def is_finished(pod: Mapping[str, Any]) -> bool:
    """Return whether both containers have ended, or the pod has without them.

    Also if one has ended and the other cannot start: it has nobody left to meet, and its host may try for hours.
    """
    states = [container_state(pod, name) for name in ("courier", "build")]
    ended = ["terminated" in state for state in states]
    stuck = [(state.get("waiting") or {}).get("reason") in _NEVER for state in states]
    over = any(ended) and all(e or s for e, s in zip(ended, stuck, strict=True))
    return over or pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def waiting_reason(pod: Mapping[str, Any]) -> str:
    """Return why a pod has not started, in the cluster's own words; "" for a pod that has."""
    for condition in pod.get("status", {}).get("conditions") or ():
        lifted = condition.get("reason") == "SchedulingGated" and not pod["spec"].get("schedulingGates")
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False" and not lifted:
            said = printable(str(condition.get("message") or ""), 500)
            return f"{condition.get('reason') or 'not scheduled'}: {said}" if said else str(condition.get("reason"))
    states = [container_state(pod, name) for name in ("courier", "build")]
    if any("running" in state or "terminated" in state for state in states):
        return ""
    waiting: dict[str, Any] = next((state["waiting"] for state in states if "waiting" in state), {})
    reason, said = str(waiting.get("reason") or "Pending"), printable(str(waiting.get("message") or ""), 500)
    return f"{reason}: {said}" if said else reason


def why_never(pod: Mapping[str, Any], waited_seconds: float) -> BuildError | None:
    """Return the error of a pod that will not start any more, after it has waited for so long; None while it may.

    Some reasons are final at once. Others heal by themselves (an image pull is tried again, a node
    is added), and are final only after the time that `_NEVER` gives them.
    """
    for condition in pod.get("status", {}).get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable":
            if waited_seconds < _UNSCHEDULABLE_SECONDS:
                return None
            said = printable(str(condition.get("message") or ""), 500)
            return Unschedulable(
                f"No node took the pod within {_UNSCHEDULABLE_SECONDS // 60} min: {said}",
                "Ask for less (`options.memory_request`), correct `options.node_selector`, or add a node.",
            )
    for name in ("courier", "build"):
        waiting = container_state(pod, name).get("waiting") or {}
        reason = str(waiting.get("reason") or "")
        kind, seconds, remedy = _NEVER.get(reason, (None, 0, ""))
        if kind is not None and waited_seconds >= seconds:
            said = printable(str(waiting.get("message") or ""), 500)
            return kind(f"The container {name} cannot start: {reason}: {said}", remedy)
    return None


def finished_at(pod: Mapping[str, Any]) -> str:
    """Return when the last container ended, as its host wrote it; "" if that is not known."""
    ends = [container_state(pod, name).get("terminated", {}).get("finishedAt") or "" for name in ("courier", "build")]
    return max(ends)


def report_of(pod: Mapping[str, Any], container: str) -> dict[str, Any]:
    """Return what a container's program reported at its end, or {}."""
    message = container_state(pod, container).get("terminated", {}).get("message") or ""
    try:
        report = json.loads(message)
    except (ValueError, RecursionError):  # a few thousand brackets are enough for the latter
        return {}
    return report if isinstance(report, dict) else {}


def succeeded(pod: Mapping[str, Any]) -> bool:
    """Return whether both containers ended with exit code 0 and none was killed for memory."""
    ends = [container_state(pod, name).get("terminated") for name in ("courier", "build")]
    return all(end is not None and end["exitCode"] == 0 and end.get("reason") != "OOMKilled" for end in ends)


def diagnose(pod: Mapping[str, Any]) -> BuildError | None:
    """Return what went wrong with a finished pod, and what to change; None for a pod that succeeded.

    The cause comes before its consequence: a container that only ended because the other one did
    is asked last.
    """
    if succeeded(pod):
        return None
    reports = {name: report_of(pod, name) for name in ("build", "courier")}
    causes = [r for r in reports.values() if "error" in r and not r.get("consequence")]
    # Whoever ends a pod tells both containers to stop: that alone never is the reason.
    causes.sort(key=lambda report: report["error"] == "BuildStopped")
    if causes and causes[0]["error"] != "BuildStopped":
        return _reported(causes[0])
    by_host = _ended_by_host(pod)
    if by_host is not None:
        return by_host
    if causes:
        return _reported(causes[0])
    for name in ("build", "courier"):
        end = container_state(pod, name).get("terminated")
        if end is None or "error" in reports[name]:
            continue
        if end.get("reason") == "OOMKilled":
            return OutOfMemory(f"The container {name} was killed because it reached its memory limit.", _MEMORY[name])
        if end["exitCode"] != 0:
            return PodLost(_ended(name, end["exitCode"]), _AGAIN)
    if never := why_never(pod, math.inf):
        return never
    if not all(container_state(pod, name) for name in reports):
        return PodLost("The pod is being deleted, and a container of it is gone already.", _AGAIN)
    problem = next((r.get("problem") for r in reports.values() if "error" in r), None)
    return PodLost(printable(str(problem or "The pod ended without a report."), 500), _AGAIN)


def _ended_by_host(pod: Mapping[str, Any]) -> BuildError | None:
    """Return the error of a pod that its host ended, and said why; None for any other."""
    status = pod.get("status", {})
    reason, said = printable(str(status.get("reason") or "")), printable(str(status.get("message") or "").strip(), 500)
    if not reason:
        return None
    problem = f"The host ended the pod: {reason}: {said}" if said else f"The host ended the pod: {reason}."
    if reason == "DeadlineExceeded":
        return DeadlineExceeded(problem, "Raise `options.timeout_minutes`, or make the build shorter.")
    if reason == "Evicted" and re.search(r"\bexceed(s|ed)\b.*\blimit\b", said):
        return OutOfDisk(problem, "Raise `options.storage_limit`, or make the build write less.")
    if reason == "Evicted":
        return Evicted(problem, "Run the build again; if it stays, give the nodes more room.")
    return PodLost(problem, _AGAIN)


def _ended(container: str, code: int) -> str:
    if code in (_KILLED, _TERMINATED):
        return f"The container {container} was killed (exit code {code}) before the build was over."
    return f"The container {container} ended with exit code {code} and without a report."


def _reported(report: Mapping[str, Any]) -> BuildError:
    """Return the error that a program in the pod named. Its texts are shown with control characters escaped."""
    kind = by_name(str(report["error"])) or PodLost
    problem = printable(str(report.get("problem") or "The pod ended without a reason."), 1500)
    remedy = printable(str(report.get("remedy") or _AGAIN), 1500)
    if issubclass(kind, BuildFailed):
        code, phase = report.get("exit_code"), report.get("phase")
        exit_code = code if type(code) is int and 0 < code < 256 else 1
        return kind(problem, remedy, exit_code, phase if phase in ("fetch", "build", "push") else "build")
    return kind(problem, remedy)
