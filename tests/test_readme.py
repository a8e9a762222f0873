"""The README says what the code does."""

import re
from pathlib import Path
from typing import Any

from podbuild import errors
from podbuild.plan import BuildOptions

README = Path(__file__).parent.parent / "README.md"
FLOW_PARAMETERS = {
    "repo": ("text, required", "The repository's address: `https`, `http`, `ssh`, `git@host:path`, or `file:///path`."),
    "ref": ("`HEAD`", "A branch, a tag, or a commit."),
    "image": ("none", "Where to push: `registry/name` or `registry/name:tag`. Derived when empty."),
    "host": ("`local-engine/default`", "The block that says where the build runs."),
}


def shown(value: Any) -> str:
    """Return a default as the table writes it."""
    if value in ("", (), {}):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def expected_table() -> str:
    """Return the parameter table that the code asks for."""
    rows = [f"| `{name}` | {default} | {meaning} |" for name, (default, meaning) in FLOW_PARAMETERS.items()]
    for name, field in BuildOptions.model_fields.items():
        default = field.get_default(call_default_factory=True)
        rows.append(f"| `options.{name}` | {shown(default)} | {field.description} |")
    return "\n".join(["| parameter | default | meaning |", "|---|---|---|", *rows])


def test_the_parameter_table_is_the_codes() -> None:
    """The table between the markers equals what the code's fields say."""
    text = README.read_text()
    table = re.search(r"<!-- parameters:[^\n]*-->\n(.*?)\n?<!-- /parameters -->", text, re.DOTALL)
    assert table is not None

    assert table[1] == expected_table()


def test_the_readme_is_short() -> None:
    """A newcomer finishes it in five minutes."""
    assert len(README.read_text().splitlines()) < 150


def test_every_error_that_this_release_raises_has_a_row() -> None:
    """An error without a remedy in the table is one a reader cannot look up."""
    text = README.read_text()
    raised = {c.__name__ for c in errors.BuildError.__subclasses__()}

    assert {name for name in raised if f"`{name}`" not in text} == set()
