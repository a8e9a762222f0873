"""One build: create the pod or join the one that is there, follow it, and prove what came out.

The pod's name is the lock. Any number of callers, in any number of processes, call `submit` with
equal plans; the host gives the name once, so one pod is made, and all of them follow it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

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
    DeadlineExceeded,
    HostUnavailable,
    NameTaken,
    PodLost,
    PushUnconfirmed,
    QuotaExceeded,
    RegistryUnavailable,
)
from podbuild.events import Event, Finished, Line, Pending, Running
from podbuild.hosts import Host, NameExists, Pod
from podbuild.logs import Bookmark, LineSplitter, RawLine, clean, parse_line
from podbuild.manifest import REQUEST_LABEL, SETTINGS, identity_of, pod_manifest, secret_files
from podbuild.names import is_digest
from podbuild.plan import Plan, canonical
from podbuild.redaction import Redactor
from podbuild.registry import find_image, find_labelled
from podbuild.settings import HostSettings

Outcome = Literal["built", "joined", "found"]
CONTAINERS = ("courier", "build")
#: A pod gated for longer has a creator that died.
GATE_SECONDS = 15
#: How long a finished pod is left to those who still read its log, before a new request replaces it.
READING_SECONDS = 10
#: How long `submit` may take: waiting for a pod to go, or for a gate to be lifted.
SUBMIT_SECONDS = 300
#: How long a registry may take to show an image that was pushed (R9: replicas lag behind).
CONFIRM_SECONDS = 30
LAST_LINES = 20
_POLL_SECONDS = 0.5
_SLOW_POLL_SECONDS = 2.0
_HOST_TRIES = 4
#: A pod's own deadline does not run before it is on a node. Longer than any reason in `why_never` takes.
_PENDING_SECONDS = 1800
#: Beyond the pod's own deadline and grace: a host that keeps neither is reported, not waited for.
_OVERDUE_SECONDS = 120


def _silent(_: str) -> None:
    """Say nothing."""


@dataclass(frozen=True, slots=True)
class Result:
    """The answer of a build, the same however it was reached."""

    image: str
    digest: str
    #: ``image@digest``: the reference that never moves.
    reference: str
    commit: str
    #: The pod's name.
    build: str
    outcome: Outcome
    #: Seconds per phase (fetch, build, push); empty where nothing was built.
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON."""
        return asdict(self)


async def find_built(plan: Plan, settings: HostSettings, note: Callable[[str], None] = _silent) -> Result | None:
    """Return the image that this plan asks for if the registry holds it, or None.

    The tag alone proves nothing: the image must carry the request's hash. A registry that does not
    answer raises `RegistryUnavailable`, unless the options say `if_unknown: build`. ``note`` is told
    in a sentence why an image under the tag is not the answer.
    """
    if plan.options.rebuild:
        note("Asked to build although the image may exist.")
        return None
    try:
        found = await find_labelled(plan.image, settings, platform=plan.options.platform)
    except RegistryUnavailable as error:
        if plan.options.if_unknown == "fail":
            raise
        note(f"{error.problem} Building without knowing whether the image exists.")
        return None
    if found is None:
        return None
    image, labels = found
    if labels.get(REQUEST_LABEL) != plan.request:
        note(f"{plan.image} holds another commit or other options; it will be built again.")
        return None
    return _result(plan, image.digest, "found", {})


async def submit(
    host: Host, plan: Plan, *, asked: datetime | None = None, note: Callable[[str], None] = _silent
) -> Build:
    """Create the plan's pod, or join the one that is there, and return a handle bound to that very pod.

    ``asked`` is when the request began, by the host's clock (now, if it is not given): a pod that
    failed later answers it, one that failed earlier is replaced, once. ``note`` is told in a
    sentence what is waited for. Raises `NameTaken`, `PodRejected`, `ImagePullFailed`,
    `HostUnavailable`, or `DeadlineExceeded` after 300 s. A cancellation leaves no half-made pod.
    """
    asked = asked or await host.now()
    identity = canonical(plan.identity)
    replaced, full = False, None
    try:
        async with asyncio.timeout(SUBMIT_SECONDS):
            while True:
                pod = await host.read(plan.name)
                if pod is None:
                    try:
                        made = await _create(host, plan)
                    except QuotaExceeded as error:
                        if str(error) != str(full):
                            note(f"{error.problem} Waiting for room.")
                        full = error
                        await asyncio.sleep(_SLOW_POLL_SECONDS)
                        continue
                    if made is not None:
                        return Build(host, plan, made, "built")
                    continue
                if identity_of(pod) != identity:
                    raise NameTaken(
                        f"A pod named {plan.name} exists, but it does not carry this build's identity.",
                        "Remove that pod, or ask who made it.",
                    )
                if is_terminating(pod):
                    note("An earlier pod of this build is being removed; waiting for it to go.")
                    await asyncio.sleep(_POLL_SECONDS)
                elif is_gated(pod):
                    await _await_gate(host, pod)
                elif not is_finished(pod):
                    _compare_settings(host, plan, pod, note)
                    return Build(host, plan, pod, "joined", joined_at=await host.now())
                elif replaced or await _answers(plan, host.settings, pod, asked):
                    return Build(host, plan, pod, "joined", joined_at=await host.now())
                else:
                    await _replace(host, pod, note)
                    replaced = True
    except TimeoutError as late:
        if full is not None:
            raise full from late
        raise DeadlineExceeded(
            f"The pod {plan.name} could not be submitted within {SUBMIT_SECONDS} s.",
            "Look at what keeps the earlier pod of this name from going away.",
        ) from late


async def _create(host: Host, plan: Plan) -> Pod | None:
    """Create the pod; None if somebody else was faster."""
    manifest = pod_manifest(
        plan, host.settings, isolation=host.isolation, secret_name=f"{plan.name}-{secrets.token_hex(8)}"
    )
    try:
        return await host.create(manifest, secret_files(host.settings, plan))
    except NameExists:
        await asyncio.sleep(_POLL_SECONDS / 5)
        return None


async def _await_gate(host: Host, pod: Pod) -> None:
    """Give a pod's creator its time, then take the pod for abandoned and delete it."""
    created = parse_moment(pod["metadata"]["creationTimestamp"])
    if (await host.now() - created).total_seconds() > GATE_SECONDS:
        await host.delete(pod)
    else:
        await asyncio.sleep(_POLL_SECONDS)


async def _answers(plan: Plan, settings: HostSettings, pod: Pod, asked: datetime) -> bool:
    """Return whether a finished pod answers a request that began at ``asked``."""
    if diagnose(pod) is not None:
        ended = finished_at(pod)
        return bool(ended) and parse_moment(ended) >= asked
    if plan.options.rebuild:
        return parse_moment(finished_at(pod)) >= asked
    tagged = await find_image(plan.image, settings)
    return tagged is not None and tagged.digest == report_of(pod, "courier").get("digest")


async def _replace(host: Host, pod: Pod, note: Callable[[str], None]) -> None:
    """Say what the finished pod came to, let its readers finish, and delete it."""
    error = diagnose(pod)
    note(f"The build before this one failed: {error.problem}" if error else "The tag no longer holds what was built.")
    ended = finished_at(pod)
    if ended:
        age = (await host.now() - parse_moment(ended)).total_seconds()
        await asyncio.sleep(max(0.0, min(READING_SECONDS, READING_SECONDS - age)))
    await host.delete(pod)


def _compare_settings(host: Host, plan: Plan, pod: Pod, note: Callable[[str], None]) -> None:
    """Say in one line if the running build was given other limits than this caller asked for."""
    mine = pod_manifest(plan, host.settings, isolation=host.isolation, secret_name="")
    same_settings = mine["metadata"]["annotations"][SETTINGS] == pod["metadata"]["annotations"].get(SETTINGS)
    theirs = {c["name"]: c.get("resources") for c in pod["spec"].get("containers", ())}
    same_limits = all(theirs.get(c["name"]) == c["resources"] for c in mine["spec"]["containers"])
    if not (same_settings and same_limits):
        note("The build that is running was asked for with other limits or settings; those stay.")


def parse_moment(text: str) -> datetime:
    """Return a time that a host wrote (RFC 3339)."""
    return datetime.fromisoformat(text).astimezone(UTC)


def _result(plan: Plan, digest: str, outcome: Outcome, seconds: dict[str, float]) -> Result:
    return Result(
        image=str(plan.image),
        digest=digest,
        reference=plan.image.at(digest),
        commit=plan.commit,
        build=plan.name,
        outcome=outcome,
        seconds=seconds,
    )


class Build:
    """A handle on one pod: bound to its UID, so that it never speaks of another pod of the same name."""

    def __init__(
        self, host: Host, plan: Plan, pod: Pod, outcome: Outcome, *, joined_at: datetime | None = None
    ) -> None:
        self.host = host
        self.plan = plan
        self.outcome: Outcome = outcome
        self._pod = pod
        self._joined_at = joined_at
        self._redactor = Redactor(host.settings.secrets())
        self._last: dict[str, deque[str]] = {name: deque(maxlen=LAST_LINES) for name in CONTAINERS}
        self._finished: Finished | None = None

    @property
    def name(self) -> str:
        """The pod's name."""
        return self.plan.name

    @property
    def uid(self) -> str:
        """The pod's UID: another pod of this name is another build."""
        uid: str = self._pod["metadata"]["uid"]
        return uid

    async def events(self) -> AsyncIterator[Event]:
        """Yield what happens to the build, and its log from the first line, until it is over.

        `Finished` comes last and exactly once, also for a build that failed, was killed, or whose
        pod is gone; a failure is in the event and not raised. Leaving early stops nothing. Raises
        `HostUnavailable` when the host stops answering for good.
        """
        loop = asyncio.get_running_loop()
        async for pending in self._await_start(loop.time() + _PENDING_SECONDS):
            yield pending
        if self._finished is not None:
            yield self._finished
            return
        yield Running()
        end = loop.time() + self._patience()
        lines: asyncio.Queue[Line] = asyncio.Queue(maxsize=10_000)
        readers = [asyncio.create_task(self._read_log(name, lines)) for name in CONTAINERS]
        try:
            while not all(reader.done() for reader in readers) or not lines.empty():
                for line in await _batch(lines):
                    yield line
                if loop.time() > end:
                    raise self._overdue()
            for reader in readers:
                await reader
            pod = await self._await_end(end)
        finally:
            for reader in readers:
                reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*readers, return_exceptions=True)
        self._finished = Finished(self._verdict(pod))
        yield self._finished

    async def result(self) -> Result:
        """Return the proven answer, following the build to its end first if nobody has.

        Proof is: both containers ended well, `courier` reported the commit and a digest, and the
        registry answers for that digest. Raises the build's error, or `PushUnconfirmed` naming what
        is missing. Afterwards the pod keeps only its log and its state.
        """
        if self._finished is None:
            async for _ in self.events():
                pass
        await self.host.release(self._pod)
        if self._finished is not None and self._finished.error is not None:
            raise self._finished.error
        report = report_of(self._pod, "courier")
        digest = report.get("digest")
        if report.get("commit") != self.plan.commit or not isinstance(digest, str) or not is_digest(digest):
            raise PushUnconfirmed(
                f"The pod {self.name} ended well, but its report names no commit or no digest.",
                "Use a builder image of this version of podbuild.",
            )
        await self._confirm(digest)
        seconds = report.get("seconds")
        phases = {str(k): float(v) for k, v in seconds.items()} if isinstance(seconds, dict) else {}
        return _result(self.plan, digest, self.outcome, phases)

    async def tag_moved(self, result: Result) -> bool:
        """Return whether the tag holds another image by now. Two builds for one tag: the last push wins."""
        tagged = await find_image(self.plan.image, self.host.settings)
        return tagged is None or tagged.digest != result.digest

    # --- the pod's life ---------------------------------------------------------------------------------

    def _patience(self) -> float:
        deadline = self._pod["spec"].get("activeDeadlineSeconds") or self.plan.options.timeout_minutes * 60
        return float(deadline) + _OVERDUE_SECONDS

    def _overdue(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"The pod {self.name} is past its deadline, but its host has not ended it.",
            "Look at the host: the engine, or the node's kubelet, does not do its work.",
        )

    async def _await_start(self, end: float) -> AsyncIterator[Pending]:
        """Yield why the pod waits, once per reason, until its first container starts or it is over."""
        said = ""
        while True:
            reason = waiting_reason(self._pod)
            if is_finished(self._pod) or not reason:
                return
            if reason != said:
                said = reason
                yield Pending(reason)
            created = parse_moment(self._pod["metadata"]["creationTimestamp"])
            if error := why_never(self._pod, (await self.host.now() - created).total_seconds()):
                # It never started, so nobody loses anything but the same wait.
                await self.host.delete(self._pod)
                self._finished = Finished(error)
                return
            if asyncio.get_running_loop().time() > end:
                raise DeadlineExceeded(
                    f"The pod {self.name} did not start within {_PENDING_SECONDS // 60} min: {reason}",
                    "Look at what the reason names; the pod is left as it is.",
                )
            await asyncio.sleep(_POLL_SECONDS)
            if await self._refresh() is None:
                self._finished = Finished(self._lost())
                return

    async def _refresh(self) -> Pod | None:
        """Read the pod again; None if it is gone or another has its name. A host may fail to answer 3 times."""
        for tries_left in reversed(range(_HOST_TRIES)):
            try:
                pod = await self.host.read(self.name)
                break
            except HostUnavailable:
                if not tries_left:
                    raise
                await asyncio.sleep(_SLOW_POLL_SECONDS)
        if pod is None or pod["metadata"]["uid"] != self.uid:
            return None
        self._pod = pod
        return pod

    async def _await_end(self, end: float) -> Pod | None:
        """Wait until both containers have ended; None if the pod is gone."""
        while True:
            pod = await self._refresh()
            if pod is None or is_finished(pod):
                return pod
            if asyncio.get_running_loop().time() > end:
                raise self._overdue()
            await asyncio.sleep(_POLL_SECONDS)

    def _lost(self) -> PodLost:
        return PodLost(f"The pod {self.name} was deleted before the build was over.", "Run the build again.")

    def _verdict(self, pod: Pod | None) -> BuildError | None:
        """Return the build's error with the last lines of the log, or None for a build that ended well."""
        if pod is None:
            return self._lost()
        error = diagnose(pod)
        if isinstance(error, BuildFailed):
            container = "build" if error.phase == "build" else "courier"
            lines = tuple(self._last[container])
            error = BuildFailed(error.problem, error.remedy, error.exit_code, error.phase, lines)
        return error

    async def _confirm(self, digest: str) -> None:
        """Ask the registry for the digest until it answers. Raises `PushUnconfirmed` after 30 s."""
        end = asyncio.get_running_loop().time() + CONFIRM_SECONDS
        while True:
            try:
                found = await find_image(self.plan.image, self.host.settings, reference=digest)
            except BuildError as error:
                raise PushUnconfirmed(
                    f"{self.plan.image.at(digest)} was pushed, but the registry cannot be asked: {error.problem}",
                    error.remedy,
                ) from error
            if found is not None and found.digest == digest:
                return
            if asyncio.get_running_loop().time() > end:
                raise PushUnconfirmed(
                    f"{self.plan.image.at(digest)} was pushed, but the registry does not have it.",
                    "Check the registry's storage, then run the build again with `options.rebuild`.",
                )
            await asyncio.sleep(_SLOW_POLL_SECONDS)

    # --- the log ----------------------------------------------------------------------------------------

    async def _read_log(self, container: str, lines: asyncio.Queue[Line]) -> None:
        """Put every line of a container's log into the queue, once, over as many streams as it takes.

        The end of a stream says nothing. Only a stream that was opened after the container's end,
        and was read to its own, has shown everything.
        """
        bookmark = Bookmark()
        backlog = _Backlog(self.plan.options.log_tail_lines if self._joined_at else 0, self._joined_at)
        while True:
            pod = self._pod
            ended = "terminated" in container_state(pod, container) or is_finished(pod)
            bookmark.restart()
            splitter = LineSplitter()
            async for raw in _raw_lines(self.host.log(pod, container, since=bookmark.since), splitter):
                line = parse_line(raw)
                if line is not None and bookmark.accept(line):
                    for shown in backlog.pass_on(line):
                        await lines.put(self._shown(container, shown))
            if ended:
                tail = parse_line(splitter.tail())
                rest = [tail] if tail is not None and bookmark.accept(tail) else []
                for shown in [s for line in rest for s in backlog.pass_on(line)] + backlog.rest():
                    await lines.put(self._shown(container, shown))
                return
            if await self._refresh() is None:
                return
            state = container_state(self._pod, container)
            if "terminated" not in state:
                await asyncio.sleep(_POLL_SECONDS)

    def _shown(self, container: str, line: RawLine) -> Line:
        text = self._redactor.redact(clean(line.text))
        self._last[container].append(text)
        return Line(line.moment, container, text)


class _Backlog:
    """Shows a joiner only the last ``limit`` lines of what was written before it came; 0 shows all."""

    def __init__(self, limit: int, joined_at: datetime | None) -> None:
        self._held: deque[RawLine] | None = deque(maxlen=limit) if limit and joined_at else None
        self._joined_at = joined_at or datetime.min.replace(tzinfo=UTC)

    def pass_on(self, line: RawLine) -> list[RawLine]:
        """Return the lines to show now that this one came."""
        if self._held is None:
            return [line]
        if line.moment < self._joined_at - timedelta(seconds=1):
            self._held.append(line)
            return []
        return [*self.rest(), line]

    def rest(self) -> list[RawLine]:
        """Return what was held back, and hold nothing from now on."""
        held, self._held = self._held or (), None
        return list(held)


async def _raw_lines(chunks: AsyncIterator[bytes], splitter: LineSplitter) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        for raw in splitter.feed(chunk):
            yield raw


async def _batch(lines: asyncio.Queue[Line]) -> list[Line]:
    """Return the lines that are at hand, in the order of time; none if none comes within 0.2 s."""
    try:
        async with asyncio.timeout(0.2):
            found = [await lines.get()]
    except TimeoutError:
        return []
    while not lines.empty() and len(found) < 1000:
        found.append(lines.get_nowait())
    return sorted(found, key=lambda line: line.time)
