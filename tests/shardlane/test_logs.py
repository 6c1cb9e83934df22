"""Log lines: what they say first, in text and in JSON, and whose they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardlane.config import LogConfig
from shardlane.errors import UserError
from shardlane.logs import configure, logger


@pytest.fixture(autouse=True)
def _leave_logging_as_it_was() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    configure(LogConfig(), to_stderr=False)
    logging.getLogger().setLevel(level)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_json_line_carries_run_role_rank_step_and_epoch(tmp_path: Path) -> None:
    configure(LogConfig(format="json"), tmp_path / "logs" / "shard-0.log")
    log = logger(role="shard", run="demo-1", rank=0, step=7, epoch="1.2")
    log.info("checkpoint written", seconds=0.5)
    (line,) = lines(tmp_path / "logs" / "shard-0.log")
    assert list(line) == ["timestamp", "level", "run", "role", "rank", "step", "epoch", "event", "seconds"]
    assert (line["run"], line["role"], line["rank"], line["step"], line["epoch"]) == ("demo-1", "shard", 0, 7, "1.2")


def test_a_value_that_can_be_called_is_asked_for_each_line_and_none_is_left_out(tmp_path: Path) -> None:
    configure(LogConfig(format="json"), tmp_path / "log")
    step = iter([3, None, 5])
    log = logger(role="worker", step=lambda: next(step), epoch=None)
    for _ in range(3):
        log.info("went on")
    assert [line.get("step") for line in lines(tmp_path / "log")] == [3, None, 5]
    assert all("epoch" not in line for line in lines(tmp_path / "log"))


def test_text_is_one_line_whatever_it_says(tmp_path: Path) -> None:
    configure(LogConfig(), tmp_path / "log")
    logger(role="worker", rank=1).warning("a peer\nsaid", reason='two words, "quoted"\n', path="/plain", speed=0.123456789)
    text = (tmp_path / "log").read_text()
    assert text.count("\n") == 1
    assert text.split(" ", 1)[1] == (
        'warning role=worker rank=1 | a peer\\nsaid  reason="two words, \\"quoted\\"\\n" path=/plain speed=0.123457\n'
    )


def test_lines_of_libraries_carry_the_process_context(tmp_path: Path) -> None:
    configure(LogConfig(format="json"), tmp_path / "log", run="demo-1", role="worker", rank=2)
    logging.getLogger("some.library").warning("retried %d times", 3)
    logger(role="worker", rank=5).info("mine")
    library, own = lines(tmp_path / "log")
    assert (library["event"], library["role"], library["rank"]) == ("retried 3 times", "worker", 2)
    assert (own["run"], own["rank"]) == ("demo-1", 5)  # the logger's own word counts


def test_two_services_in_one_process_keep_their_names(tmp_path: Path) -> None:
    one, two = logger(role="shard", rank=0), logger(role="worker", rank=1)
    configure(LogConfig(format="json"), tmp_path / "log")  # after they were made: loggers hold no handler
    one.info("a")
    two.bind(step=4).info("b")
    two.info("c")
    assert [(line["role"], line.get("step")) for line in lines(tmp_path / "log")] == [
        ("shard", None),
        ("worker", 4),
        ("worker", None),
    ]


def test_configuring_again_replaces_and_does_not_double(tmp_path: Path) -> None:
    configure(LogConfig(), tmp_path / "first")
    configure(LogConfig(level="warning"), tmp_path / "second")
    logger(role="shard").info("unheard")
    logger(role="shard").error("heard")
    assert (tmp_path / "first").read_text() == ""
    assert (tmp_path / "second").read_text().count("\n") == 1


def test_an_exception_keeps_its_traceback(tmp_path: Path) -> None:
    configure(LogConfig(format="json"), tmp_path / "log")
    try:
        raise ValueError("no")
    except ValueError:
        logger(role="shard").exception("went wrong")
    (line,) = lines(tmp_path / "log")
    assert line["level"] == "error" and line["exception"].endswith("ValueError: no")


def test_a_file_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the log"):
        configure(LogConfig(), tmp_path / "file" / "log")


def test_stderr_gets_the_lines_too(capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogConfig())
    logger(role="coordinator").info("serving", address="127.0.0.1:1")
    assert capsys.readouterr().err.endswith("role=coordinator | serving  address=127.0.0.1:1\n")
