"""Make the images that podbuild needs: a base, the builder, and a small registry. What is up to date stays.

Usage: python -m scripts.images [builder] [registry]
The base is debian:trixie-slim where a public registry answers. Where none does, it is made from
Debian's packages with mmdebstrap. BASE=image names another one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from podbuild.hosts.local import limits_here
from scripts.machine import CA_BUNDLE, Problem, ca_bundle, call_engine, engine, main, run, step

IMAGES = Path(__file__).resolve().parent.parent / "images"
PUBLIC_BASE = "docker.io/library/debian:trixie-slim"
BASE = "localhost/podbuild-base:trixie"
TAGS = {"builder": "localhost/podbuild-builder:1", "registry": "localhost/podbuild-registry:1"}
#: A label with the hash of what an image was made from.
MADE_FROM = "io.podbuild.made-from"
_PULL_SECONDS = 120


def exists(image: str) -> bool:
    """Return whether the engine has this image."""
    return call_engine("image", "inspect", image, check=False).returncode == 0


def make_base() -> str:
    """Return a Debian base image: the one given, the one that is there, the public one, or one made here."""
    if given := os.environ.get("BASE"):
        return given
    if exists(BASE):
        return BASE
    with step(f"Pulling {PUBLIC_BASE}"):
        pulled = call_engine("pull", "--quiet", PUBLIC_BASE, seconds=_PULL_SECONDS, check=False).returncode == 0
    if pulled:
        call_engine("tag", PUBLIC_BASE, BASE)
        return BASE
    print("  No public registry answers here; making a stand-in from Debian's packages.")
    if shutil.which("mmdebstrap") is None:
        with step("Installing mmdebstrap with apt-get"):
            install("mmdebstrap")
    with step("Making a Debian base image with mmdebstrap"), tempfile.TemporaryDirectory() as folder:
        archive = str(Path(folder) / "base.tar")
        run("mmdebstrap", "--variant=minbase", "--include=ca-certificates", "trixie", archive)
        call_engine("import", archive, BASE)
    return BASE


def install(package: str) -> None:
    """Install a Debian package, as root or with sudo."""
    as_root = [] if os.geteuid() == 0 else ["sudo"]
    if as_root and shutil.which("sudo") is None:
        raise Problem(f"{package} is missing, you are not root, and there is no sudo: ask for it to be installed.")
    run(*as_root, "apt-get", "install", "-y", "--no-install-recommends", package)


def make(name: str, base: str) -> None:
    """Build one of our images, unless it was made from exactly these files and this base."""
    folder, tag = IMAGES / name, TAGS[name]
    content = hashlib.sha256(base.encode())
    for file in sorted(f for f in folder.iterdir() if f.is_file()):
        content.update(file.name.encode() + file.read_bytes())
    label = content.hexdigest()[:32]
    made_from = call_engine(
        "image", "inspect", "--format", f'{{{{index .Config.Labels "{MADE_FROM}"}}}}', tag, check=False
    )
    if made_from.returncode == 0 and made_from.stdout.strip() == label:
        return
    options = [f"--label={MADE_FROM}={label}", f"--build-arg=BASE={base}", *limits_here()]
    if ca_bundle() and engine().kind == "podman":
        options.append(f"--volume={CA_BUNDLE}:{CA_BUNDLE}:ro")
    with step(f"Building {tag}"):
        # Named, because docker looks for no Containerfile by itself.
        options.append(f"--file={folder / 'Containerfile'}")
        call_engine("build", "--quiet", *options, "--tag", tag, str(folder), seconds=1800)


def work() -> None:
    """Make what the command line asks for, or all."""
    wanted = sys.argv[1:] or list(TAGS)
    if unknown := [name for name in wanted if name not in TAGS]:
        raise Problem(f"There is no image {unknown[0]!r}; there are: {', '.join(TAGS)}.")
    base = make_base()
    for name in wanted:
        make(name, base)


if __name__ == "__main__":
    main(work)
