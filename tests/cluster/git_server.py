"""Serve the git repositories of a folder over HTTP, until it is stopped.

Usage: python -m tests.cluster.git_server FOLDER ADDRESS:PORT
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from tests.fakes.git_server import GitServer


def main() -> None:
    """Serve what the command line names."""
    folder, where = sys.argv[1:]
    host, _, port = where.rpartition(":")
    with GitServer(Path(folder), host=host, port=int(port)):
        signal.pause()


if __name__ == "__main__":
    main()
