"""Errors: one tree, each says what happened and what to change, and survives a trip between processes."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator

import pytest

import podbuild
from podbuild import errors
from podbuild.errors import BuildError, BuildFailed, by_name


def _tree(top: type[BuildError] = BuildError) -> Iterator[type[BuildError]]:
    yield top
    for below in top.__subclasses__():
        yield from _tree(below)


CLASSES = sorted(_tree(), key=lambda c: c.__name__)


@pytest.mark.parametrize("error", CLASSES)
def test_an_error_survives_pickling(error: type[BuildError]) -> None:
    """Prefect stores a failed run's error: problem, remedy and notes come back."""
    made = error("It broke.", "Mend it.")
    made.add_note("seen twice")

    back = pickle.loads(pickle.dumps(made))  # noqa: S301 - our own bytes

    assert type(back) is error
    assert (back.problem, back.remedy, back.__notes__) == ("It broke.", "Mend it.", ["seen twice"])
    assert str(back) == str(made) == "It broke. Mend it."


def test_a_failed_build_survives_pickling_with_all_it_knows() -> None:
    """Exit code, phase and last lines come back, and show."""
    made = BuildFailed("It broke.", "Mend it.", 137, "push", ("first", "second"))

    back = pickle.loads(pickle.dumps(made))  # noqa: S301 - our own bytes

    assert vars(back) == vars(made)
    assert (back.exit_code, back.phase, back.last_lines) == (137, "push", ("first", "second"))
    assert str(back) == "It broke. Mend it.\nThe last lines were:\n  first\n  second"


@pytest.mark.parametrize("error", CLASSES)
def test_an_error_is_documented_named_and_public(error: type[BuildError]) -> None:
    """Each class has a docstring, a line in the module's tree, a name to be reported by, and is exported."""
    assert error.__doc__
    assert errors.__doc__
    assert re.search(rf"\b{error.__name__}\b", errors.__doc__)
    assert by_name(error.__name__) is error
    assert getattr(podbuild, error.__name__) is error
    assert error.__name__ in podbuild.__all__


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """Nothing is drawn that does not exist."""
    assert errors.__doc__
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__)

    assert sorted([*drawn, "BuildError"]) == [c.__name__ for c in CLASSES]


@pytest.mark.parametrize("error", CLASSES)
def test_an_error_inherits_from_no_client(error: type[BuildError]) -> None:
    """Who catches a client's errors does not catch ours by accident."""
    assert {c.__module__ for c in error.__mro__} <= {"podbuild.errors", "builtins"}


@pytest.mark.parametrize("name", ["ValueError", "annotations", "by_name", "", "Exception", "__builtins__"])
def test_only_errors_of_the_tree_have_a_name(name: str) -> None:
    """A program in the pod cannot name anything else into being."""
    assert by_name(name) is None


def test_an_error_without_a_remedy_has_no_blank_at_its_end() -> None:
    """The text is problem and remedy, as far as there are any."""
    assert str(BuildError("It broke.", "")) == "It broke."
