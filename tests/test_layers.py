"""The one direction between the rooms: flows → blocks → podbuild, and nothing of Prefect in the library."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("podbuild", "blocks", "flows", "images")

#: What each room must not import. The pod's programs run in an image that has none of the rest.
FORBIDDEN = {
    "podbuild": {"prefect", "prefect_kubernetes", "kubernetes", "podman", "docker", "blocks", "flows", "images"},
    "blocks": {"kubernetes", "flows", "images"},
    "flows": {"kubernetes", "httpx", "images"},
    "images": {"prefect", "kubernetes", "podbuild", "blocks", "flows", "httpx", "anyio", "pydantic"},
}
#: The only places that talk to Kubernetes.
EXCEPTIONS = {("podbuild/hosts/kubernetes.py", "kubernetes")}


def sources(*rooms: str) -> Iterator[Path]:
    """Yield the Python files of these rooms; a room that is still empty has none."""
    for room in rooms:
        yield from sorted((ROOT / room).rglob("*.py"))


def imported(source: str) -> Iterator[str]:
    """Yield the full name of each module that a source text imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the room"
            assert node.module
            yield node.module


@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in sources(*ROOMS)])
def test_imports_point_right(path: Path) -> None:
    """No file imports from a room to its left, nor a client that its room must not know."""
    name = path.relative_to(ROOT).as_posix()
    tops = {module.partition(".")[0] for module in imported(path.read_text())}

    wrong = {top for top in tops & FORBIDDEN[name.partition("/")[0]] if (name, top) not in EXCEPTIONS}

    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("name", ["errors", "events", "logs", "names", "plan", "redaction", "settings"])
def test_the_pure_modules_do_no_io(name: str) -> None:
    """No clock, no randomness, no files, no network, no tasks: data in, data out."""
    tops = {module.partition(".")[0] for module in imported((ROOT / "podbuild" / f"{name}.py").read_text())}

    assert not tops & {
        "anyio",
        "asyncio",
        "httpx",
        "os",
        "pathlib",
        "random",
        "secrets",
        "socket",
        "subprocess",
        "time",
    }


def test_importing_the_library_imports_no_client() -> None:
    """A program that uses podbuild alone needs neither Prefect nor a Kubernetes client, nor waits for them."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import podbuild"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}

    assert "podbuild" in modules
    assert not modules & {"prefect", "kubernetes", "podman", "docker"}


def test_every_import_is_seen() -> None:
    """The reader of imports finds those inside functions, too."""
    source = "import a.b\ndef f():\n    from c.d import e\n    if 1:\n        import g as h\n"

    assert sorted(imported(source)) == ["a.b", "c.d", "g"]


def test_no_file_names_the_folder_of_this_checkout() -> None:
    """What works here works in any other folder."""
    rooms = ("podbuild", "blocks", "flows", "images", "deploy", "tests", "bench", "scripts", "examples", ".ci")
    files = [p for room in rooms for p in (ROOT / room).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    files += [p for p in ROOT.iterdir() if p.suffix in {".md", ".toml", ".yaml", ".txt"} or p.name == "Makefile"]

    naming = [str(p.relative_to(ROOT)) for p in files if f"{ROOT}/".encode() in p.read_bytes()]

    assert naming == []
