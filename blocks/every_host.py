"""What every kind of host is told, whatever runs its pods."""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel, Field

from blocks.credentials import GitCredentials, RegistryCredentials


class EveryHost(BaseModel):
    """The fields that all host blocks share."""

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

    async def shared_settings(self) -> dict[str, Any]:
        """Return these fields, with the credentials they name, as arguments for `HostSettings`.

        Raises ValueError when a named block does not exist.
        """
        logins = [cast(RegistryCredentials, await RegistryCredentials.aload(n)) for n in self.registry_credentials]
        gits = [cast(GitCredentials, await GitCredentials.aload(n)) for n in self.git_credentials]
        return {
            "registry": self.registry,
            "builder_image": self.builder_image,
            "registry_credentials": tuple(login.to_settings() for login in logins),
            "git_credentials": tuple(git.to_settings() for git in gits),
            "plain_http_registries": tuple(self.plain_http_registries),
            "mirrors": tuple(self.mirrors.items()),
            "allowed_repositories": tuple(self.allowed_repositories),
        }
