"""What runs pods: a cluster, or a container engine on this machine. One protocol for both.

A host knows nothing of what is being built. It creates, reads, lists, follows and deletes pods,
which are plain dicts in Kubernetes' spelling, wherever they run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any, Protocol

from podbuild.manifest import Isolation, Manifest
from podbuild.settings import HostSettings

Pod = dict[str, Any]


class NameExists(Exception):
    """A pod of this name is there already, or was a moment ago. Read it, then decide."""


class Host(Protocol):
    """Something that runs pods. Every call has a deadline of its own and raises `BuildError` kinds only,
    but for `NameExists`."""

    @property
    def settings(self) -> HostSettings: ...

    @property
    def isolation(self) -> Isolation:
        """The strongest isolation that this host can give the repository's steps."""
        ...

    async def now(self) -> datetime:
        """Return the time of the clock that stamps this host's pods."""
        ...

    async def create(self, manifest: Manifest, files: Mapping[str, bytes]) -> Pod:
        """Create a pod with its secret files, and let it start. Raises `NameExists`."""
        ...

    async def read(self, name: str) -> Pod | None:
        """Return the pod of this name as it is now, or None."""
        ...

    async def find(self, labels: Mapping[str, str]) -> list[Pod]:
        """Return the pods that carry all of these labels."""
        ...

    def log(self, pod: Pod, container: str, *, since: str | None = None) -> AsyncIterator[bytes]:
        """Yield a container's log as raw bytes, timestamps first on each line, following it while it grows.

        ``since`` is a whole second (RFC 3339), inclusive. The end of this iterator says nothing
        about the end of the container.
        """
        ...

    async def delete(self, pod: Pod) -> None:
        """Delete exactly this pod, gracefully; its secrets and volumes go with it. One that is gone is fine."""
        ...

    async def release(self, pod: Pod) -> None:
        """Free what a finished pod no longer needs (its secrets and volumes). The pod and its log stay."""
        ...


class OpenHost(Host, AbstractAsyncContextManager["OpenHost"], Protocol):
    """A host that still has to be entered, and gives itself."""
