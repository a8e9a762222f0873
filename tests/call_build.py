"""One caller in a process of its own: builds what it is told, and prints the outcome as one line of JSON.

Run as `python -m tests.call_build`, with settings, repository, commit, image and options as JSON on its input.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from podbuild import (
    BuildError,
    Line,
    LocalHost,
    LocalSettings,
    parse_options,
    parse_repository,
    plan_build,
    submit,
)


async def build(order: dict[str, Any]) -> dict[str, Any]:
    """Return what came of the build: the outcome, the digest, and the log, or the error."""
    settings = LocalSettings(
        **{
            **order["settings"],
            "plain_http_registries": tuple(order["settings"]["plain_http_registries"]),
            "mirrors": tuple(tuple(m) for m in order["settings"]["mirrors"]),
        }
    )
    plan = plan_build(
        parse_repository(order["repo"]), order["commit"], order["image"], parse_options(order["options"]), settings
    )
    async with LocalHost(settings) as host:
        try:
            handle = await submit(host, plan)
            lines = [f"{e.container}: {e.text}" async for e in handle.events() if isinstance(e, Line)]
            result = await handle.result()
        except BuildError as error:
            return {"error": type(error).__name__, "text": str(error)}
    return {"outcome": handle.outcome, "uid": handle.uid, "digest": result.digest, "lines": sorted(lines)}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(build(json.load(sys.stdin)))))
