"""Log lines: fields rather than sentences, as text or as JSON, of either daemon.

A record's fields come in ``extra={"fields": {...}}``; its message is the line's name. What they
mean is not known here.
"""

import functools
import logging
import sys
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import orjson


class LogFormat(StrEnum):
    """How a log line is written."""

    TEXT = "text"
    JSON = "json"


class FieldsFormatter(logging.Formatter):
    """What both formats have in common: ``constant`` fields are on every line."""

    def __init__(self, **constant: str) -> None:
        super().__init__()
        self._constant = constant

    def fields(self, record: logging.LogRecord) -> Mapping[str, object]:
        """Return the fields of a line."""
        return self._constant | (getattr(record, "fields", None) or {})


class TextFormatter(FieldsFormatter):
    """``2026-01-31T12:00:00.000Z INFO cortex.request request id=... status=200``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        parts = [_timestamp(record), record.levelname, record.name, record.getMessage()]
        parts += [f"{key}={_text(value)}" for key, value in self.fields(record).items()]
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(FieldsFormatter):
    """One JSON object a line."""

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
    """Return what writes lines in a format, each with these fields."""
    return JsonFormatter(**constant) if log_format is LogFormat.JSON else TextFormatter(**constant)


def configure(log_format: LogFormat, level: int | str = logging.INFO, logger: str = "cortex", **constant: str) -> None:
    """Send the lines of a logger and of those below it to standard error, in this format and no other."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(log_format, **constant))
    found = logging.getLogger(logger)
    for old in tuple(found.handlers):
        found.removeHandler(old)
    found.addHandler(handler)
    found.setLevel(level)
    found.propagate = False


def server_settings(log_format: LogFormat) -> Mapping[str, Any]:
    """Return what Granian takes as its own logging's settings, for lines that look like ours."""
    formats = {"format": {"()": formatter, "log_format": log_format}}
    handler = {"formatter": "format", "class": "logging.StreamHandler", "stream": "ext://sys.stderr"}
    loggers = {"_granian": {"handlers": ["console"], "level": "INFO", "propagate": False}}
    return {"formatters": formats, "handlers": {"console": handler}, "loggers": loggers}


def _timestamp(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@functools.lru_cache(maxsize=4)
def _second(second: int) -> str:
    """Return the time of a second, which many lines share."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if text and text.isprintable() and " " not in text and '"' not in text else orjson.dumps(text).decode()
