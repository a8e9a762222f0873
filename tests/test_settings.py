"""Settings: which credentials go where, and that they never show."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from podbuild.redaction import Redactor
from podbuild.settings import GitCredentials, HostSettings, LocalSettings, RegistryCredentials

KEY = "-----BEGIN KEY-----\nkey-line-one\nkey-line-two\n-----END KEY-----\n"
SETTINGS = LocalSettings(
    registry="registry.example.org",
    registry_credentials=(
        RegistryCredentials(host="registry.example.org", username="robot", password="registry-word"),
    ),
    git_credentials=(
        GitCredentials(host="git.example.org", username="bot", password="git-word"),
        GitCredentials(host="ssh.example.org", ssh_key=KEY, known_hosts="ssh.example.org ssh-ed25519 AAAA"),
    ),
)
SECRETS = ("registry-word", "git-word", "key-line-one", "key-line-two")


@pytest.mark.parametrize(
    "shown",
    [repr(SETTINGS), str(SETTINGS), *(repr(c) for c in SETTINGS.git_credentials), repr(SETTINGS.registry_credentials)],
)
def test_s25_no_secret_shows_in_a_repr(shown: str) -> None:
    """What lands in a log or a traceback names the host and the user, never the secret."""
    assert "example.org" in shown
    assert not any(secret in shown for secret in SECRETS)


def test_s24_all_secrets_are_known_for_redaction() -> None:
    """Passwords and each line of a key, each once; users and hosts are no secrets."""
    again = dataclasses.replace(SETTINGS, git_credentials=SETTINGS.git_credentials * 2)

    assert set(SECRETS) <= set(again.secrets())
    assert len(set(again.secrets())) == len(again.secrets())
    assert not {"", "bot", "robot", "git.example.org"} & set(again.secrets())
    assert HostSettings().secrets() == ()
    for secret in SECRETS:
        assert Redactor(again.secrets()).redact(f"<{secret}>") == "<***>"


@pytest.mark.parametrize("kind", [GitCredentials, RegistryCredentials])
def test_a_new_field_of_credentials_is_either_shown_on_purpose_or_hidden(kind: type) -> None:
    """Whoever adds a field decides here whether it may show."""
    shown = {field.name for field in dataclasses.fields(kind) if field.repr}

    assert shown <= {"host", "path", "username", "known_hosts"}


@pytest.mark.parametrize(
    ("host", "path", "covered"),
    [
        pytest.param("git.example.org", "acme/app", True, id="below the path"),
        pytest.param("git.example.org", "acme", True, id="the path itself"),
        pytest.param("git.example.org", "/acme/app/", True, id="slashes around"),
        pytest.param("GIT.example.org", "acme/app.git", True, id="case of the host, .git"),
        pytest.param("git.example.org", "acme-labs/app", False, id="S26: a neighbour whose name begins alike"),
        pytest.param("git.example.org", "Acme/app", False, id="S26: case of the path"),
        pytest.param("git.example.org", "", False, id="S26: the whole host"),
        pytest.param("git.example.org:8443", "acme/app", False, id="S26: another port"),
        pytest.param("example.org", "acme/app", False, id="S26: the domain above"),
        pytest.param("git.example.org.evil.org", "acme/app", False, id="S26: a host whose name begins alike"),
    ],
)
def test_git_credentials_cover_one_host_and_path(host: str, path: str, covered: bool) -> None:
    """Whole components count, so a token is never offered to somebody else's repository."""
    assert GitCredentials(host="git.example.org", path="acme").covers(host, path) is covered


@pytest.mark.parametrize("spelling", ["acme/app", "/acme/app/", "acme/app.git", "acme/app.git/"])
def test_g14_credentials_for_one_repository_do_not_depend_on_its_spelling(spelling: str) -> None:
    """With or without ``.git``, on either side."""
    for path in ("acme/app", "acme/app.git"):
        assert GitCredentials(host="h", path=spelling).covers("h", path)


def test_the_longest_path_wins() -> None:
    """The most specific git credentials are used; without fitting ones, none."""
    everything, team, app = (GitCredentials(host="h", path=p, username=p) for p in ("", "acme", "acme/app"))
    settings = HostSettings(git_credentials=(team, everything, app))

    assert settings.git_credentials_for("h", "acme/app.git") is app
    assert settings.git_credentials_for("h", "acme/other") is team
    assert settings.git_credentials_for("h", "other/app") is everything
    assert settings.git_credentials_for("other", "acme/app") is None


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("registry.example.org", True),
        ("Registry.Example.ORG", True),
        ("registry.example.org:5000", False),
        ("r", False),
    ],
)
def test_s26_registry_credentials_are_for_exactly_one_registry(host: str, found: bool) -> None:
    """Name and port both count, the case does not."""
    assert (SETTINGS.registry_credentials_for(host) is not None) is found


def test_settings_are_plain_data() -> None:
    """They are compared by value, copied between processes, and never changed in place."""
    assert pickle.loads(pickle.dumps(SETTINGS)) == SETTINGS  # noqa: S301 - our own bytes
    with pytest.raises(dataclasses.FrozenInstanceError):
        SETTINGS.registry = "other.org"  # type: ignore[misc]
