"""Log lines of both daemons: fields rather than sentences, as text or as JSON.

A record's fields come in ``extra={"fields": {...}}``, or from :func:`info`, which costs a fifth; its message is the
line's name.
"""

import asyncio
import functools
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from enum import StrEnum
from typing import Any, TextIO

import orjson

from cortex._fast.log_fields import log_lines


class LogFormat(StrEnum):
    """Format of log lines."""

    TEXT = "text"
    JSON = "json"


WRITE_AFTER_S = 0.01
"""Time for which an event loop's lines wait for others, to be written together."""


_listeners: list[Callable[[str], None]] = []


def listen(listener: Callable[[str], None]) -> Callable[[], None]:
    """Call ``listener`` with the lines that are written from now on, several at a time; return a function that ends
    this.

    It is called in any thread, and may not log.
    """
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


_TELLS_NOTHING: Mapping[str, object] = logging.makeLogRecord({"levelno": logging.INFO, "levelname": "INFO"}).__dict__


class _Line(logging.LogRecord):
    """Record of a name and fields, without the caller's code location."""

    def __init__(self, logger: str, message: str, fields: Mapping[str, object], now: float) -> None:
        own = {"name": logger, "msg": message, "fields": fields, "created": now, "msecs": now % 1 * 1000}
        self.__dict__.update(_TELLS_NOTHING, **own)


def info(logger: logging.Logger, message: str, fields: Mapping[str, object]) -> None:
    """Log a line of fields: most of what a request costs each time is its line."""
    if logger.isEnabledFor(logging.INFO):
        logger.handle(_Line(logger.name, message, fields, time.time()))


def info_each(logger: logging.Logger, message: str, lines: Sequence[tuple[float, dict[str, Any]]]) -> None:
    """Log lines of fields, each with its Unix time: in one batch they cost a fifth."""
    if not logger.isEnabledFor(logging.INFO):
        return
    handler = _only_handler(logger)
    if handler is not None:
        handler.take(logger.name, message, lines)
        return
    for at, fields in lines:
        logger.handle(_Line(logger.name, message, fields, at))


def _only_handler(logger: logging.Logger) -> "_Handler | None":
    """Return the only handler of a logger's lines, if it is this module's and unfiltered."""
    handlers = [*logger.handlers]
    above: logging.Logger | None = logger
    while above is not None and above.propagate:
        above = above.parent
        handlers += above.handlers if above is not None else ()
    if len(handlers) != 1 or not isinstance(handlers[0], _Handler) or logger.filters or handlers[0].filters:
        return None
    return handlers[0]


def rejected(logger: logging.Logger, request_id: str, method: str, path: str, status: int, code: str) -> None:
    """Log a request that reached no endpoint; method and path are cut, as their length is the client's."""
    fields = {"id": request_id, "method": method[:16], "path": path[:128], "status": status, "finish": code}
    info(logger, "rejected", fields)


class _Handler(logging.StreamHandler[TextIO]):
    """Handler that writes an event loop's lines in batches; warnings, and other threads' lines, at once."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Buffer or write a line."""
        try:
            self._lines.append(self.format(record))
        except Exception:  # noqa: BLE001 - a line that cannot be written must not fail its cause
            self.handleError(record)
            return
        if record.levelno > logging.INFO:
            self.flush()
        elif len(self._lines) == 1:
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                self.flush()
            else:
                loop.call_later(WRITE_AFTER_S, self.flush)

    def take(self, logger: str, message: str, lines: Sequence[tuple[float, dict[str, Any]]]) -> None:
        """Write lines of fields at once."""
        try:
            assert isinstance(self.formatter, FieldsFormatter)
            text = self.formatter.lines(logger, message, lines)
        except Exception:  # noqa: BLE001 - one by one, only the one that cannot be written is lost
            for at, fields in lines:
                self.emit(_Line(logger, message, fields, at))
            return
        self._lines.append(text.rstrip("\n"))
        self.flush()

    def flush(self) -> None:
        """Write the buffered lines."""
        with self.lock or nullcontext():
            if self._lines:
                lines, self._lines = self._lines, []
                text = "\n".join(lines)
                self.stream.write(text + "\n")
                for listener in _listeners:
                    listener(text)
            super().flush()


class FieldsFormatter(logging.Formatter):
    """Base of both formatters: ``constant`` fields are on every line."""

    def __init__(self, **constant: str) -> None:
        super().__init__()
        self._constant = constant

    def fields(self, record: logging.LogRecord) -> Mapping[str, object]:
        """Return the fields of a line."""
        fields: Mapping[str, object] = getattr(record, "fields", None) or {}
        return {**self._constant, **fields} if self._constant else fields

    def lines(self, logger: str, message: str, lines: Sequence[tuple[float, dict[str, Any]]]) -> str:
        """Return the lines that :meth:`format` makes of each."""
        return "".join(f"{self.format(_Line(logger, message, fields, at))}\n" for at, fields in lines)


class TextFormatter(FieldsFormatter):
    """Text lines: ``2026-01-31T12:00:00.000Z INFO cortex.request request id=... status=200``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        head = f"{record.levelname} {record.name} {record.getMessage()}"
        line = log_lines(head, [(record.created, self.fields(record))]).removesuffix("\n")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line

    def lines(self, logger: str, message: str, lines: Sequence[tuple[float, dict[str, Any]]]) -> str:
        """Return the lines that :meth:`format` makes of each."""
        if self._constant:
            return super().lines(logger, message, lines)
        return log_lines(f"INFO {logger} {message}", lines)


class JsonFormatter(FieldsFormatter):
    """JSON lines: an object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        document = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self.fields(record),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(document).decode()


def formatter(log_format: LogFormat, **constant: str) -> logging.Formatter:
    """Return the formatter of a format, with these constant fields."""
    return JsonFormatter(**constant) if log_format is LogFormat.JSON else TextFormatter(**constant)


def configure(log_format: LogFormat, level: int | str = logging.INFO, logger: str = "cortex", **constant: str) -> None:
    """Log a logger and its children to standard error, in this format only."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(formatter(log_format, **constant))
    found = logging.getLogger(logger)
    for old in tuple(found.handlers):
        found.removeHandler(old)
        old.close()
    found.addHandler(handler)
    found.setLevel(level)
    found.propagate = False


def server_settings(log_format: LogFormat) -> Mapping[str, Any]:
    """Return Granian's logging settings for lines in this format."""
    formats = {"format": {"()": formatter, "log_format": log_format}}
    handler = {"formatter": "format", "class": "logging.StreamHandler", "stream": "ext://sys.stderr"}
    loggers = {"_granian": {"handlers": ["console"], "level": "INFO", "propagate": False}}
    return {"formatters": formats, "handlers": {"console": handler}, "loggers": loggers}


def _timestamp(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@functools.lru_cache(maxsize=4)
def _second(second: int) -> str:
    """Return the text of a second, which many lines share."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
