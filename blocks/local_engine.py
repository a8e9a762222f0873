"""The container engine of the machine that the worker runs on."""

from __future__ import annotations

from prefect.blocks.core import Block
from pydantic import Field

from blocks.every_host import EveryHost
from podbuild.settings import LocalSettings


class LocalEngine(EveryHost, Block):
    """Builds run with podman, or with docker, on the worker's own machine.

    One such block is one trust domain: who may use it may join its builds and read their logs.

    Example:
        ```python
        from blocks import LocalEngine

        host = LocalEngine.load("BLOCK_NAME")
        ```
    """

    _block_type_name = "Local Engine"
    _block_type_slug = "local-engine"
    _description = "Builds images with podman or docker on the worker's own machine."

    engine: str = Field(
        default="auto", title="Engine", description="auto, podman or docker, or the path of such a program."
    )
    network: str = Field(
        default="podbuild",
        title="Network",
        description="The engine's network for the repository's steps; `host` opens this machine's services to them.",
    )
    ca_bundle: str = Field(
        default="",
        title="CA bundle",
        description="A file of certificates that containers need to reach the outside, where there is one.",
    )
    state_folder: str = Field(
        default="", title="State folder", description="Where builds keep their files; empty: the usual place."
    )

    async def to_settings(self) -> LocalSettings:
        """Return this block, with the credentials it names, as plain podbuild settings.

        Raises ValueError when a named block does not exist.
        """
        return LocalSettings(
            **await self.shared_settings(),
            engine=self.engine,
            network=self.network,
            ca_bundle=self.ca_bundle,
            state_folder=self.state_folder,
        )
