"""What this machine is like: its engine, its certificates, its limits. Detected, never assumed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from podbuild import HostUnavailable
from podbuild.hosts.local import Engine, detect_engine

CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
_LOCAL_CERTIFICATES = Path("/usr/local/share/ca-certificates")


class Problem(Exception):
    """Something the person at the keyboard must change. Its text says what, and how."""


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is being done, and how long it took."""
    print(f"· {what} … ", end="", flush=True)
    begun = time.monotonic()
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.monotonic() - begun:.1f} s", flush=True)


@cache
def engine() -> Engine:
    """Return the container engine of this machine. Raises `Problem` with the command to install one."""
    try:
        return asyncio.run(detect_engine())
    except HostUnavailable as error:
        raise Problem(str(error)) from error


def run(*command: str, seconds: float = 600, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program quietly and return what came of it. Raises `Problem` with its last words if it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as late:
        raise Problem(f"`{command[0]} {command[1]}` did not end within {seconds:g} s.") from late
    if check and done.returncode != 0:
        words = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise Problem(f"`{' '.join(command[:3])} …` failed: " + "\n  ".join(words[-5:]))
    return done


def call_engine(*arguments: str, seconds: float = 600, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the container engine."""
    return run(engine().program, *arguments, seconds=seconds, check=check)


def ca_bundle() -> str:
    """Return the machine's certificate bundle if it holds certificates of its own, which containers lack; else ""."""
    own = _LOCAL_CERTIFICATES.is_dir() and any(_LOCAL_CERTIFICATES.rglob("*.crt"))
    return str(CA_BUNDLE) if own and CA_BUNDLE.exists() else ""


def main(work: object) -> None:
    """Run a script's work; end with one clear sentence if something must be changed."""
    try:
        work()  # type: ignore[operator]
    except Problem as problem:
        print(f"\n{problem}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
