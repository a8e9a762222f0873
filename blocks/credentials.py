"""Credentials for registries and git servers. Secrets are stored by Prefect as secrets, and shown as stars."""

from __future__ import annotations

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from podbuild import settings


class RegistryCredentials(Block):
    """A login for one container registry, with the right to push.

    Example:
        ```python
        from blocks import RegistryCredentials

        login = RegistryCredentials.load("BLOCK_NAME")
        ```
    """

    _block_type_name = "Registry Credentials"
    _block_type_slug = "registry-credentials"
    _description = "A login for one container registry. A host block names it; a build never sees it."

    registry: str = Field(title="Registry", description="The registry's name, with its port if it has one.")
    username: str = Field(default="", title="User name", description="The user who pushes.")
    password: SecretStr = Field(default=SecretStr(""), title="Password", description="A password or an access token.")

    def to_settings(self) -> settings.RegistryCredentials:
        """Return these credentials as plain podbuild settings."""
        return settings.RegistryCredentials(
            host=self.registry, username=self.username, password=self.password.get_secret_value()
        )


class GitCredentials(Block):
    """A login for one git server, or for a part of it. It is used for that server only.

    Example:
        ```python
        from blocks import GitCredentials

        login = GitCredentials.load("BLOCK_NAME")
        ```
    """

    _block_type_name = "Git Credentials"
    _block_type_slug = "git-credentials"
    _description = "A login for one git server, by token or by SSH key. A host block names it."

    server: str = Field(title="Server", description="The git server's name, with its port if it has one.")
    path: str = Field(
        default="", title="Path", description="Use these only for repositories below this path, for example a group."
    )
    username: str = Field(
        default="", title="User name", description="The user; with a token, most servers take any name."
    )
    password: SecretStr = Field(
        default=SecretStr(""), title="Token", description="A token or a password that may read the repositories."
    )
    ssh_key: SecretStr = Field(
        default=SecretStr(""), title="SSH key", description="A private key in OpenSSH format, for ssh addresses."
    )
    known_hosts: str = Field(
        default="", title="Known hosts", description="The server's lines of a known_hosts file, for ssh addresses."
    )

    def to_settings(self) -> settings.GitCredentials:
        """Return these credentials as plain podbuild settings."""
        return settings.GitCredentials(
            host=self.server,
            path=self.path,
            username=self.username,
            password=self.password.get_secret_value(),
            ssh_key=self.ssh_key.get_secret_value(),
            known_hosts=self.known_hosts,
        )
