"""Bring a build's log into the flow run's log: in chunks, with the pod's own times, in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from podbuild.events import Line
from podbuild.logs import Chunk, Chunker

_TICK_SECONDS = 0.25
_MICROSECOND = 1e-6


class RunLog:
    """Where lines of a build go on their way into a run's log.

    Prefect stores a row for each record, and about 1,000 rows a second, so lines travel in chunks:
    one container's, about 100 lines, 16 KB or 1 s, whichever comes first. The logger is named after
    the container: ``podbuild.courier`` and ``podbuild.build``.
    """

    def __init__(self, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self._adapter = logger
        self._chunks = Chunker()
        self._latest = 0.0

    def add(self, line: Line) -> None:
        """Take one line; it is sent with its chunk."""
        for chunk in self._chunks.add(line.container, line.time, line.text, _now()):
            self._send(chunk)

    def flush(self, *, due: bool = False) -> None:
        """Send what is waiting; with ``due``, only what has waited for its time."""
        for chunk in self._chunks.flush(_now() if due else None):
            self._send(chunk)

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Put one sentence of ours into the log, after what came before it."""
        self.flush()
        self._handle("podbuild", level, text, datetime.now(UTC).timestamp())

    def _send(self, chunk: Chunk) -> None:
        self._handle(f"podbuild.{chunk.container}", logging.INFO, chunk.text, chunk.time.timestamp())

    def _handle(self, name: str, level: int, text: str, created: float) -> None:
        # Prefect sorts records by their time alone: equal or earlier times would shuffle them.
        self._latest = created = max(created, self._latest + _MICROSECOND)
        adapter = self._adapter
        logger = adapter.logger if isinstance(adapter, logging.LoggerAdapter) else adapter
        extra = dict(adapter.extra or {}) if isinstance(adapter, logging.LoggerAdapter) else {}
        if not logger.isEnabledFor(level):
            return
        record = logger.makeRecord(name, level, __file__, 0, text, (), None, extra=extra)
        record.created, record.msecs = created, created % 1 * 1000
        logger.handle(record)


def _now() -> float:
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def run_log(logger: logging.Logger | logging.LoggerAdapter[Any]) -> AsyncIterator[RunLog]:
    """Give a `RunLog` that sends each chunk when it is due, and everything at the end, however that comes."""
    log = RunLog(logger)

    async def tick() -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            log.flush(due=True)

    ticker = asyncio.create_task(tick())
    try:
        yield log
    finally:
        ticker.cancel()
        log.flush()
