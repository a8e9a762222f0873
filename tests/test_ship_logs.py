"""A build's log on its way into a run's log: what becomes a record, when, and with which time."""

import asyncio
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from flows.ship_logs import RunLog, run_log
from podbuild import Line

START = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


class Kept(logging.Handler):
    """Keeps every record it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def kept() -> Iterator[tuple[logging.LoggerAdapter[logging.Logger], Kept]]:
    """A logger like a run's: an adapter that adds the run's id to each record."""
    logger, handler = logging.getLogger("tests.ship_logs"), Kept()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    yield logging.LoggerAdapter(logger, {"flow_run_id": "run-1"}), handler
    logger.removeHandler(handler)


async def test_lines_travel_together_with_the_pods_own_time(
    kept: tuple[logging.LoggerAdapter[logging.Logger], Kept],
) -> None:
    """Lines of one container make one record, stamped with the first line's time and the run's id."""
    adapter, handler = kept

    async with run_log(adapter) as log:
        for number in range(3):
            log.add(Line(START + timedelta(milliseconds=number), "build", f"line {number}"))

    (record,) = handler.records
    assert record.getMessage() == "line 0\nline 1\nline 2"
    assert record.name == "podbuild.build"
    assert datetime.fromtimestamp(record.created, UTC) == START
    assert record.__dict__["flow_run_id"] == "run-1"


async def test_a_quiet_builds_line_is_shown_within_about_a_second(
    kept: tuple[logging.LoggerAdapter[logging.Logger], Kept],
) -> None:
    """A chunk that nothing is added to is sent when its time has come, not at the end."""
    adapter, handler = kept

    async with run_log(adapter) as log:
        log.add(Line(START, "build", "only one"))
        async with asyncio.timeout(30):
            while not handler.records:  # noqa: ASYNC110 - a logging handler has no event to await
                await asyncio.sleep(0.05)

    assert [r.getMessage() for r in handler.records] == ["only one"]


async def test_containers_never_share_a_record_and_order_is_kept(
    kept: tuple[logging.LoggerAdapter[logging.Logger], Kept],
) -> None:
    """Records come in the order of the lines, with strictly growing times: Prefect sorts by time alone."""
    adapter, handler = kept

    async with run_log(adapter) as log:
        for container in ("courier", "build", "build", "courier"):
            log.add(Line(START, container, f"from {container}"))

    times = [r.created for r in handler.records]
    assert [r.name for r in handler.records] == ["podbuild.courier", "podbuild.build", "podbuild.courier"]
    assert times == sorted(set(times))


async def test_what_was_collected_is_sent_when_the_build_fails(
    kept: tuple[logging.LoggerAdapter[logging.Logger], Kept],
) -> None:
    """An exception inside the block loses no line."""
    adapter, handler = kept

    with pytest.raises(RuntimeError):
        async with run_log(adapter) as log:
            log.add(Line(START, "build", "the last words"))
            raise RuntimeError

    assert [r.getMessage() for r in handler.records] == ["the last words"]


async def test_a_percent_sign_is_text(kept: tuple[logging.LoggerAdapter[logging.Logger], Kept]) -> None:
    """A line is never taken for a format string."""
    adapter, handler = kept

    RunLog(adapter).say("100%s done")

    assert [r.getMessage() for r in handler.records] == ["100%s done"]
