"""What became of a pod: its status in, a verdict out. Pure.

The containers' states are read, not the pod's phase, which lags behind them. What the two programs
report in their termination messages says why; an end without a report is judged by how it came.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from podbuild.errors import BuildError, BuildFailed, OutOfMemory, PodLost, by_name
from podbuild.names import printable

_KILLED = 137
_TERMINATED = 143


def container_state(pod: Mapping[str, Any], container: str) -> dict[str, Any]:
    """Return a container's state, `waiting`, `running` or `terminated` in it; {} before it has one."""
    for status in pod.get("status", {}).get("containerStatuses") or ():
        if status.get("name") == container:
            state = status.get("state")
            return state if isinstance(state, dict) else {}
    return {}


def is_gated(pod: Mapping[str, Any]) -> bool:
    """Return whether the pod still waits for its creator to finish the preparations."""
    return bool(pod.get("spec", {}).get("schedulingGates"))


def is_terminating(pod: Mapping[str, Any]) -> bool:
    """Return whether somebody has asked for the pod's deletion."""
    return "deletionTimestamp" in pod["metadata"]


def is_finished(pod: Mapping[str, Any]) -> bool:
    """Return whether both containers have ended, or the pod has without them."""
    ended = all("terminated" in container_state(pod, name) for name in ("courier", "build"))
    return ended or pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def finished_at(pod: Mapping[str, Any]) -> str:
    """Return when the last container ended, as its host wrote it; "" if that is not known."""
    ends = [container_state(pod, name).get("terminated", {}).get("finishedAt") or "" for name in ("courier", "build")]
    return max(ends)


def report_of(pod: Mapping[str, Any], container: str) -> dict[str, Any]:
    """Return what a container's program reported at its end, or {}."""
    message = container_state(pod, container).get("terminated", {}).get("message") or ""
    try:
        report = json.loads(message)
    except ValueError:
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
    if causes:
        return _reported(causes[0])
    for name in ("build", "courier"):
        end = container_state(pod, name).get("terminated")
        if end is None or "error" in reports[name]:
            continue
        if end.get("reason") == "OOMKilled":
            return OutOfMemory(
                f"The container {name} was killed because it reached its memory limit.",
                "Raise `options.memory_limit`, or make the build need less.",
            )
        if end["exitCode"] != 0:
            return PodLost(_ended(name, end["exitCode"]), "Run the build again; the log shows how far it came.")
    problem = next((r["problem"] for r in reports.values() if "error" in r), "The pod ended without a report.")
    return PodLost(printable(str(problem), 500), "Run the build again; the log shows how far it came.")


def _ended(container: str, code: int) -> str:
    if code in (_KILLED, _TERMINATED):
        return f"The container {container} was killed (exit code {code}) before the build was over."
    return f"The container {container} ended with exit code {code} and without a report."


def _reported(report: Mapping[str, Any]) -> BuildError:
    """Return the error that a program in the pod named. Its texts are shown with control characters escaped."""
    kind = by_name(str(report["error"])) or PodLost
    problem = printable(str(report.get("problem", "")), 1500)
    remedy = printable(str(report.get("remedy", "")), 1500)
    if issubclass(kind, BuildFailed):
        code = report.get("exit_code", 1)
        return kind(problem, remedy, code if isinstance(code, int) else 1, str(report.get("phase", "build"))[:10])
    return kind(problem, remedy)
