"""The operators' endpoint of use per key, model and day."""

import datetime
import time
from collections.abc import Mapping
from urllib.parse import parse_qsl

import msgspec

from cortex.errors import StoreUnavailableError
from cortex.http_io import Exchange
from cortex.store.interface import StoreError
from cortex.store.usage import DAY_S, FIELDS, UsageQuery, UsageRow
from cortex.usage_recorder import UsageRecorder, day_of
from cortex.wire.errors import InvalidRequestError, UnsupportedParameterError

DEFAULT_DAYS = 30
_KNOWN = ("from", "to", "key", "model", "by")


class UsageReport(msgspec.Struct, frozen=True):
    """``GET /admin/usage``: use of the days ``first`` to ``last``. ``persists`` is whether it survives the process."""

    first: str
    last: str
    persists: bool
    rows: tuple[UsageRow, ...]


class UsageAdmin:
    """The endpoint of use, after authentication."""

    def __init__(self, recorder: UsageRecorder) -> None:
        self._recorder = recorder

    async def report(self, exchange: Exchange) -> None:
        """``GET /admin/usage``: the use of the days ``from`` to ``to``, else of the last 30; of a ``key``, a ``model``.

        Rows are added up ``by`` some of day, key and model, else by all three.
        """
        query = usage_query(exchange.query)
        try:
            rows = await self._recorder.rows(query)
        except StoreError as error:
            raise StoreUnavailableError(f"The store of use does not answer: {error}", retry_after_s=5) from None
        report = UsageReport(query.first, query.last, self._recorder.persists, tuple(rows))
        await exchange.reply(200, msgspec.json.encode(report))


def usage_query(query: bytes) -> UsageQuery:
    """Return the query in a query string. An empty ``key`` asks for the use without a key.

    Raises:
        InvalidRequestError: a day is none, or the last is before the first.
        UnsupportedParameterError: a parameter is not known.
    """
    given = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    for name in given:
        if name not in _KNOWN:
            raise UnsupportedParameterError(f"Unknown parameter '{name}'; there is: {', '.join(_KNOWN)}.", param=name)
    last = _day(given, "to", day_of(time.time()))
    first = _day(given, "from", day_of(_seconds(last) - (DEFAULT_DAYS - 1) * DAY_S))
    if first > last:
        raise InvalidRequestError(f"'from', {first}, is after 'to', {last}.", param="from")
    by = tuple(given["by"].split(",")) if "by" in given else FIELDS
    if not set(by) <= set(FIELDS):
        raise InvalidRequestError(f"'by' has some of {', '.join(FIELDS)}, separated by commas.", param="by")
    return UsageQuery(first, last, given.get("key"), given.get("model"), by)


def _day(given: Mapping[str, str], name: str, otherwise: str) -> str:
    if name not in given:
        return otherwise
    try:
        day = datetime.datetime.strptime(given[name], "%Y-%m-%d").replace(tzinfo=datetime.UTC).date()
    except ValueError:
        raise InvalidRequestError(f"'{name}' is not a day, such as 2027-01-31.", param=name) from None
    return day.isoformat()


def _seconds(day: str) -> float:
    return datetime.datetime.fromisoformat(day).replace(tzinfo=datetime.UTC).timestamp()
