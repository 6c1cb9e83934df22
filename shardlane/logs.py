"""Log lines that say which run, process, step and epoch they are of: text for people, JSON for machines.

    log = logger(role="shard", rank=0, run=run_id, step=lambda: shard.version)
    log.info("checkpoint written", version=100, seconds=0.4)

    2026-11-24T00:27:01.123Z info    run=demo role=shard rank=0 step=100 | checkpoint written  version=100 seconds=0.4

`configure` is for a `__main__`: it says where the lines of the process go, those of libraries that use `logging` as well.
Loggers hold no handler and no file, so several services in one process do not disturb one another.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from shardlane.config import LogConfig
from shardlane.errors import UserError

CONTEXT = ("run", "role", "rank", "step", "epoch")  # what a line says first, in this order, as far as it is known

_LEVEL_WIDTH = 7
_installed: list[logging.Handler] = []
_process_context: dict[str, Any] = {}


def logger(*, role: str, **bound: Any) -> FilteringBoundLogger:
    """A logger whose lines carry `role` and `bound`. A value that can be called is asked anew for each line; None is left out."""
    made: FilteringBoundLogger = structlog.wrap_logger(
        logging.getLogger(f"shardlane.{role}"),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            _ask,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
        role=role,
        **bound,
    )
    return made


def configure(log: LogConfig, file: Path | None = None, *, to_stderr: bool = True, **context: Any) -> None:
    """Sends this process's lines to stderr and to the end of `file`. A later call takes the place of an earlier one.

    `context`, such as `run=…, role=…, rank=…`, goes on every line that does not say otherwise, so on those of libraries too.
    Raises `UserError` if the file cannot be written.
    """
    handlers: list[logging.Handler] = [_Lines(sys.stderr)] if to_stderr else []
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(_FileLines(file, encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot write the log {file}: {error.strerror}") from error
    root = logging.getLogger()
    while _installed:
        old = _installed.pop()
        root.removeHandler(old)
        old.close()
    _process_context.clear()
    _process_context.update(context)
    formatter = _formatter(log.format)
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
        _installed.append(handler)
    root.setLevel(log.level.upper())


class _Lines(logging.StreamHandler[TextIO]):
    """Lines that a full disk does not take are lost, without a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _FileLines(logging.FileHandler, _Lines):
    """The same in a file."""


def _formatter(form: str) -> logging.Formatter:
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _order,
        structlog.processors.format_exc_info,
    ]
    render = structlog.processors.JSONRenderer(sort_keys=False, default=str) if form == "json" else _text
    return structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *shared, render],
        foreign_pre_chain=[],
        keep_exc_info=False,
        use_get_message=True,
    )


def _ask(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Asks what can be called, once for all handlers, and leaves out what is not known."""
    asked = {name: value() if callable(value) else value for name, value in event.items()}
    return {name: value for name, value in asked.items() if value is not None}


def _order(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Puts the context first, the process's where the line has none of its own."""
    values = {**_process_context, **event}
    first = {name: values.pop(name) for name in ("timestamp", "level", *CONTEXT, "event") if name in values}
    return {**first, **values}


def _text(_: WrappedLogger, __: str, event: EventDict) -> str:
    exception = event.pop("exception", "")
    context = " ".join(f"{name}={_plain(event.pop(name))}" for name in CONTEXT if name in event)
    time, level, what = event.pop("timestamp"), event.pop("level"), str(event.pop("event", "")).replace("\n", "\\n")
    rest = " ".join(f"{name}={_plain(value)}" for name, value in event.items())
    line = f"{time} {level:{_LEVEL_WIDTH}} {context} | {what}" if context else f"{time} {level:{_LEVEL_WIDTH}} | {what}"
    return "".join((line, f"  {rest}" if rest else "", f"\n{exception}" if exception else ""))


def _plain(value: object) -> str:
    """One word: quoted where it would otherwise be several, or break the line."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if text and text.isprintable() and not any(each in text for each in ' "=') else json.dumps(text)
