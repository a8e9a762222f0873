"""From a block's name, as flows are given it, to a host."""

from __future__ import annotations

from typing import cast

from blocks.build_cluster import BuildCluster
from blocks.local_engine import LocalEngine
from podbuild import InvalidRequest, LocalHost
from podbuild.hosts import OpenHost
from podbuild.names import printable
from podbuild.settings import ClusterSettings

_KINDS: dict[str, type[LocalEngine] | type[BuildCluster]] = {"local-engine": LocalEngine, "build-cluster": BuildCluster}


async def load_host(reference: str) -> OpenHost:
    """Return the host that a block describes; ``reference`` is ``SLUG/NAME``, like ``local-engine/default``.

    It is entered with `async with`. Raises `InvalidRequest` when there is no such block, or it
    names credentials that do not exist.
    """
    slug, _, name = reference.partition("/")
    if slug not in _KINDS or not name:
        raise InvalidRequest(
            f"`host` is {printable(reference)!r}, which names no kind of host.",
            f"Write KIND/NAME, where KIND is one of: {', '.join(_KINDS)}.",
        )
    try:
        block = cast(LocalEngine | BuildCluster, await _KINDS[slug].aload(name))
        settings = await block.to_settings()
    except ValueError as error:
        raise InvalidRequest(
            f"The block {printable(reference)!r}, or a credentials block it names, does not exist.",
            "List them with `prefect block ls`; make one in the Prefect UI under Blocks, or with `make demo`.",
        ) from error
    if isinstance(settings, ClusterSettings):
        # The client's import takes a second: only those who build on a cluster wait for it.
        from podbuild.hosts.kubernetes import KubernetesHost

        return KubernetesHost(settings)
    return LocalHost(settings)
