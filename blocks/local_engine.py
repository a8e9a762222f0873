"""The container engine of the machine that the worker runs on."""

from __future__ import annotations

from typing import cast

from prefect.blocks.core import Block
from pydantic import Field

from blocks.credentials import GitCredentials, RegistryCredentials
from podbuild.settings import LocalSettings


class LocalEngine(Block):
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

    registry: str = Field(
        default="",
        title="Registry",
        description="Where images go whose name is not given: a registry, or registry/prefix.",
    )
    builder_image: str = Field(
        default="localhost/podbuild-builder:1",
        title="Builder image",
        description="The image that runs the builds; `make builder-image` makes it.",
    )
    registry_credentials: list[str] = Field(
        default_factory=list,
        title="Registry credentials",
        description="Names of registry-credentials blocks that builds may push with.",
    )
    git_credentials: list[str] = Field(
        default_factory=list,
        title="Git credentials",
        description="Names of git-credentials blocks that builds may fetch with.",
    )
    plain_http_registries: list[str] = Field(
        default_factory=list,
        title="Plain HTTP registries",
        description="Registries that speak plain HTTP. All others must speak TLS.",
    )
    mirrors: dict[str, str] = Field(
        default_factory=dict,
        title="Mirrors",
        description="Where base images are pulled from first: registry in FROM, and the mirror to ask.",
    )
    allowed_repositories: list[str] = Field(
        default_factory=list,
        title="Allowed repositories",
        description="Patterns like git.example.org/team/* that a repository must match. Empty: all.",
    )
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
        logins = [cast(RegistryCredentials, await RegistryCredentials.aload(n)) for n in self.registry_credentials]
        gits = [cast(GitCredentials, await GitCredentials.aload(n)) for n in self.git_credentials]
        return LocalSettings(
            registry=self.registry,
            builder_image=self.builder_image,
            registry_credentials=tuple(login.to_settings() for login in logins),
            git_credentials=tuple(git.to_settings() for git in gits),
            plain_http_registries=tuple(self.plain_http_registries),
            mirrors=tuple(self.mirrors.items()),
            allowed_repositories=tuple(self.allowed_repositories),
            engine=self.engine,
            network=self.network,
            ca_bundle=self.ca_bundle,
            state_folder=self.state_folder,
        )
