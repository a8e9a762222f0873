"""Secrets never reach a log line, in whatever spelling a tool prints them (S24)."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from podbuild.redaction import SHORTEST_SECRET, Redactor

SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "in a URL": lambda s: quote(s, safe=""),
    "in a path of a URL": quote,
    "in a form": quote_plus,
    "in a URL, lower case": lambda s: re.sub("%..", lambda hexadecimal: hexadecimal[0].lower(), quote(s, safe="")),
    "in JSON": lambda s: json.dumps(s)[1:-1],
    "in JSON as UTF-8": lambda s: json.dumps(s, ensure_ascii=False)[1:-1],
    "in a shell": shlex.quote,
    "in hex": lambda s: s.encode().hex(),
    "in HEX": lambda s: s.encode().hex().upper(),
}

secrets = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=6, max_size=30)
texts = st.text(st.characters(codec="utf-8"), max_size=40)


@pytest.mark.parametrize("spelling", [pytest.param(spell, id=f"S24: {name}") for name, spell in SPELLINGS.items()])
@pytest.mark.parametrize("secret", ["ghp_0123456789abcdef", 'p/w "é+x?~%\\z', "a'b$c`d!e", "------"])
def test_a_secret_is_hidden_in_every_spelling(secret: str, spelling: Callable[[str], str]) -> None:
    """What stood there is gone, and what stood around it stays."""
    shown = spelling(secret)

    redacted = Redactor([secret]).redact(f"before {shown} after {shown}")

    assert secret not in redacted
    assert shown.strip("'") not in redacted
    assert redacted.replace("'", "") == "before *** after ***"


@given(secret=secrets, before=texts, after=texts, data=st.data())
def test_s24_no_secret_is_in_the_output_whatever_surrounds_it(
    secret: str, before: str, after: str, data: st.DataObject
) -> None:
    """For any secret, spelling and surroundings, neither the spelling nor the secret is left."""
    shown = data.draw(st.sampled_from(list(SPELLINGS.values())))(secret)

    redacted = Redactor([secret]).redact(before + shown + after)

    assert secret not in redacted
    assert "***" in redacted


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode], ids=["S24: base64", "S24: base64url"])
@given(secret=secrets, user=st.text(max_size=8), after=st.text(max_size=8))
def test_base64_hides_nothing(encode: Callable[[bytes], bytes], secret: str, user: str, after: str) -> None:
    """Wherever the secret begins in what was encoded (``user:secret``), all but its edges is hidden."""
    data = f"{user}:{secret}{after}".encode()

    redacted = Redactor([secret]).redact(f"Authorization: Basic {encode(data).decode()}")

    assert "***" in redacted
    kept = redacted.removeprefix("Authorization: Basic ").replace("***", "").rstrip("=")
    # Each side keeps what surrounds the secret, and at most one character that is partly the secret's.
    assert len(kept) <= len(f"{user}:{after}".encode()) * 8 / 6 + 2


@given(first=secrets, second=secrets, share=st.integers(0, 6))
def test_s24_secrets_that_overlap_leave_no_part_of_either(first: str, second: str, share: int) -> None:
    """Where one secret ends inside another, both are hidden as a whole."""
    second = first[len(first) - share :] + second

    assert Redactor([first, second]).redact(f"<{first}{second[share:]}>").strip("<>") in ("***", "******")


def test_s24_the_longest_secret_is_hidden_first() -> None:
    """A secret that begins another does not leave the other's rest."""
    assert Redactor(["secret", "secret-and-more"]).redact("x secret-and-more y secret z") == "x *** y *** z"


def test_s24_a_replacement_never_completes_a_secret() -> None:
    """A secret with asterisks in it is found again after another was replaced."""
    assert Redactor(["ab***cd", "secret"]).redact("absecretcd") == "***"


@given(secret=secrets, text=texts)
def test_s24_benign_text_is_unchanged_and_redacting_twice_changes_nothing(secret: str, text: str) -> None:
    """Text without a secret comes back as it is; redacted text comes back as it is."""
    redactor = Redactor([secret])
    benign = "Step 3/7 : RUN pip install --no-cache-dir -r requirements.txt"
    assume(not any(spell(secret) in benign for spell in SPELLINGS.values()))

    assert redactor.redact(benign) == benign
    assert redactor.redact(redactor.redact(text)) == redactor.redact(text)


@pytest.mark.parametrize(
    ("secrets", "text", "shown"),
    [
        pytest.param((), "anything", "anything", id="no secrets"),
        pytest.param(("", "  ", "\n"), "a  b", "a  b", id="empty secrets"),
        pytest.param(("x" * (SHORTEST_SECRET - 1),), "xxxxx", "xxxxx", id="too short to hide"),
        pytest.param(("x" * SHORTEST_SECRET,), "xxxxxx", "***", id="just long enough"),
        pytest.param(("token-1\n",), "x token-1 y", "x *** y", id="a file's last newline is not part of it"),
        pytest.param(("line-one\nline-two\n",), "a line-two b", "a *** b", id="each line of a key is a secret"),
        pytest.param(("aaaaaa",), "aaaaaaaa", "***", id="one that overlaps itself"),
        pytest.param(("token-1",), "Token-1", "Token-1", id="case counts"),
    ],
)
def test_which_secrets_are_hidden(secrets: tuple[str, ...], text: str, shown: str) -> None:
    """Every line of six characters or more, without the blanks around it."""
    assert Redactor(secrets).redact(text) == shown
